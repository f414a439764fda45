"""Fused functional ops with autograd; every one has a plain PyTorch reference in its own file."""

from peftkern.ops.bottleneck import bottleneck
from peftkern.ops.column_scale import column_scale
from peftkern.ops.low_rank import low_rank
from peftkern.ops.multi_low_rank import multi_low_rank
from peftkern.ops.prefix_attention import prefix_attention
from peftkern.ops.prompt_concat import Prompted, prompt_concat
from peftkern.ops.weight_norm import NormCache, weight_norm

__all__ = [
    "NormCache",
    "Prompted",
    "bottleneck",
    "column_scale",
    "low_rank",
    "multi_low_rank",
    "prefix_attention",
    "prompt_concat",
    "weight_norm",
]
