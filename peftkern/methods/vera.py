"""VeRA: one pair of frozen random matrices for all layers, and two trained vectors for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkern import ops, targets
from peftkern.adapter import LayerAdapter, LayerConfig
from peftkern.base import BaseLayer, adapter_dtype
from peftkern.errors import TargetError


@dataclass(frozen=True, kw_only=True)
class VeraConfig(LayerConfig):
    """Fields as Hugging Face PEFT's VeraConfig.

    r: rank of the shared matrices, larger than LoRA's. projection_prng_key: seed that they are drawn from.
    save_projection: write them to the file; without, a reader draws them again, on which other versions of torch need
    not agree. vera_dropout: probability on A's input. d_initial: start of λ_d. bias: "none", "all" or "vera_only",
    which of the backbone's own biases train. init_weights: True (λ_d at d_initial, λ_b at zero) or False (λ_d normal,
    λ_b at one: for tests). fan_in_fan_out is read and written, but the layout is taken from the module itself.
    """

    peft_type: ClassVar[str | None] = "VERA"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"runtime_config": (None, {})}
    extensions: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: str = "none"
    init_weights: bool = True
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(isinstance(self.r, int) and self.r > 0, "r", "an integer > 0")
        self.require(0.0 <= self.vera_dropout < 1.0, "vera_dropout", "0 <= p < 1")
        self.require(isinstance(self.projection_prng_key, int), "projection_prng_key", "an integer")
        self.one_of("bias", ("none", "all", "vera_only"))


class Projections(nn.Module):
    """a [R, largest K] and b [largest N, R], frozen; a layer of K inputs and N outputs reads a[:, :K] and b[:N].

    Kaiming uniform for ReLU, drawn in f32 on the CPU, a before b, as Hugging Face PEFT draws them from the same key.
    """

    a: Tensor
    b: Tensor

    def __init__(self, n: int, k: int, config: VeraConfig) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        for name, shape in (("a", (config.r, k)), ("b", (n, config.r))):
            bound = math.sqrt(6.0 / shape[1])
            drawn = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn, persistent=config.save_projection)


class VeRA(LayerAdapter):
    """y = base(x) + λ_b ⊙ B (λ_d ⊙ A drop(x)) with A [R, K], B [N, R] frozen and shared, λ_d [R] and λ_b [N] trained.

    Source: Kopiczko et al. 2024 (arXiv:2310.11454), eq. 2.
    """

    name = "vera"
    summary = "two trained vectors a layer around random matrices that all layers share"
    paper = "https://arxiv.org/abs/2310.11454"
    Config = VeraConfig
    keys: ClassVar[Mapping[str, str]] = {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"}
    shared_keys: ClassVar[Mapping[str, str]] = {"a": "vera_A", "b": "vera_B"}
    shared: Projections

    def __init__(self, base: BaseLayer, config: VeraConfig) -> None:
        super().__init__(base, config)
        if base.is_embedding:
            raise TargetError(f"{base.path} is an embedding: VeRA adapts nn.Linear and Conv1D")
        self.n, self.k, self.p = base.out_features, base.in_features, config.vera_dropout
        weight = base.weight
        dtype = adapter_dtype(weight.dtype)
        self.lambda_b = nn.Parameter(weight.new_zeros(self.n, dtype=dtype))
        self.lambda_d = nn.Parameter(weight.new_full((config.r,), config.d_initial, dtype=dtype))
        if not config.init_weights:
            nn.init.ones_(self.lambda_b)
            nn.init.normal_(self.lambda_d)

    @classmethod
    def share(cls, layers: Mapping[str, BaseLayer], config: VeraConfig) -> Projections:
        """A and B, as large as the largest layers need them."""
        n, k = (max(getattr(base, side) for base in layers.values()) for side in ("out_features", "in_features"))
        return Projections(n, k, config)

    @classmethod
    def select(cls, model: nn.Module, config: VeraConfig) -> list[str]:
        """The backbone's own biases that train with it: all, or those of adapted modules."""
        return targets.biases(model, config.bias, (site.path for site in cls.sites(model, config)))

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:  # type: ignore[override]
        """Fused with the base's own product where that is a plain linear map, onto its output elsewhere."""
        a, b = self._slices(x.device)
        linear = base.linear
        weight, bias = (None, None) if linear is None else linear
        return ops.low_rank(
            x,
            a,
            b,
            weight=weight,
            bias=bias,
            base_out=base(x) if linear is None else None,
            rank_scale=self.lambda_d,
            update_scale=self.lambda_b,
            p=self.p if self.training else 0.0,
        )

    def delta_weight(self) -> Tensor:
        """(λ_b ⊙ B) (λ_d ⊙ A), [N, K]."""
        wide = torch.promote_types(self.lambda_b.dtype, torch.float32)
        a, b = (matrix.to(wide) for matrix in self._slices(self.lambda_b.device))
        return (self.lambda_b.to(wide)[:, None] * b) @ (self.lambda_d.to(wide)[:, None] * a)

    def _slices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """This layer's part of A and B: views, except where a model spread over devices has the layer elsewhere."""
        return self.shared.a[:, : self.k].to(device), self.shared.b[: self.n].to(device)
