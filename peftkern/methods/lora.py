"""LoRA: a trained low-rank update beside each frozen linear map; DoRA: the same with a trained magnitude per output."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkern import ops, targets
from peftkern.adapter import LayerAdapter, LayerConfig, kaiming_
from peftkern.arithmetic import COMBINATIONS, Recipe
from peftkern.base import BaseLayer, adapter_dtype, is_sharded
from peftkern.errors import AdapterError, TargetError


@dataclass(frozen=True, kw_only=True)
class LoraConfig(LayerConfig):
    """Fields as Hugging Face PEFT's LoraConfig.

    r: rank. lora_alpha: scale is alpha / r, or alpha / √r with use_rslora. lora_dropout: probability on A's input.
    bias: "none", "all" or "lora_only", which of the backbone's own biases train. lora_bias: B has a bias, which a merge
    adds to the base layer's, so that this must have one then. init_lora_weights: True (A Kaiming
    uniform, B zero), "gaussian" (A normal with σ = 1/r) or False (both random: for tests). rank_pattern and
    alpha_pattern: module name or regular expression -> value that replaces r or lora_alpha there. fan_in_fan_out is
    read and written, but the layout is taken from the module itself. use_dora: DoRA, see `LoRA`.
    """

    peft_type: ClassVar[str | None] = "LORA"
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "use_qalora": (False,), "qalora_group_size": (16,),
        "target_parameters": (None, []), "layer_replication": (None, []), "trainable_token_indices": (None, []),
        "ensure_weight_tying": (False,), "megatron_config": (None,), "megatron_core": ("megatron.core", None),
        "loftq_config": (None, {}), "eva_config": (None,), "corda_config": (None,), "lora_ga_config": (None,),
        "velora_config": (None,), "monteclora_config": (None,), "alora_invocation_tokens": (None, []),
        "use_bdlora": (None, False), "arrow_config": (None,), "kasa_config": (None,),
        "runtime_config": (None, {}, {"ephemeral_gpu_offload": False}),
    }  # fmt: skip

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: str = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(isinstance(self.r, int) and self.r > 0, "r", "an integer > 0")
        self.require(0.0 <= self.lora_dropout < 1.0, "lora_dropout", "0 <= p < 1")
        self.require(self.lora_alpha > 0, "lora_alpha", "a number > 0")
        self.one_of("bias", ("none", "all", "lora_only"))
        known = self.init_lora_weights in (True, False, "gaussian")
        self.require(known, "init_lora_weights", "True, False or 'gaussian'")
        if self.lora_bias:
            self.require(not self.use_dora, "use_dora", "False with lora_bias=True")
            self.require(self.init_lora_weights in (True, False), "init_lora_weights", "a bool with lora_bias")
        self.require(all(rank > 0 for rank in (self.rank_pattern or {}).values()), "rank_pattern", "ranks > 0")
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, getattr(self, name) or {})
            self.regular(name, getattr(self, name))

    @classmethod
    def from_file(cls, values: Mapping[str, Any]) -> LoraConfig:
        """A start that leaves the backbone as it is ("eva", "orthogonal") is over in a file: it says True."""
        over = values.get("init_lora_weights") in ("eva", "orthogonal")
        return cls.from_dict({**values, "init_lora_weights": True, "eva_config": None} if over else values)

    def for_target(self, path: str) -> LoraConfig:
        """With r and lora_alpha as the patterns have them for this module."""
        r, alpha = _pattern(self.rank_pattern, path, self.r), _pattern(self.alpha_pattern, path, self.lora_alpha)
        return replace(self, r=int(r), lora_alpha=alpha)


class LoRA(LayerAdapter):
    """y = base(x) + s · B (A · drop(x)), A [R, K], B [N, R], s = alpha / R (rsLoRA: alpha / √R).

    With use_dora the direction of the weight and its magnitude m [N] train apart:
    y = bias + c ⊙ (W x + s · B (A · drop(x))), c = m / ‖W + s · BA‖ by rows. m starts as that norm, which gets no
    gradient (the paper's section 4.3) and is computed again only when W, A or B has changed. Dropout acts on the input
    of A alone; Hugging Face PEFT, in training, also multiplies W with the dropped input for the share of c - 1: a
    second frozen product whose expectation is the first. Over another adapter, W is still the base's own and c leaves
    only the base's bias as it is.

    Source: Hu et al. 2021 (arXiv:2106.09685), eq. 3; rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732); DoRA: Liu et al.
    2024 (arXiv:2402.09353), eq. 5 and section 4.3.
    """

    name = "lora"
    summary = "low-rank update of linear, Conv1D and embedding layers"
    paper = "https://arxiv.org/abs/2106.09685"
    Config = LoraConfig
    combinations = COMBINATIONS

    norms: ops.NormCache | None = None  # of DoRA

    def __init__(self, base: BaseLayer, config: LoraConfig) -> None:
        super().__init__(base, config)
        if config.lora_bias and base.is_embedding:
            raise TargetError(f"{base.path} is an embedding: lora_bias=True is for nn.Linear and Conv1D")
        n, k, r = base.out_features, base.in_features, config.r
        weight, dtype = base.weight, adapter_dtype(base.weight.dtype)
        self.a = nn.Parameter(weight.new_empty(r, k, dtype=dtype))
        self.b = nn.Parameter(weight.new_zeros(n, r, dtype=dtype))
        self.b_bias = nn.Parameter(weight.new_zeros(n, dtype=dtype)) if config.lora_bias else None
        self.scale = config.lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.p = 0.0 if base.is_embedding else config.lora_dropout
        self.is_embedding, self.embed_scale = base.is_embedding, base.embed_scale
        self.lookup = {key: getattr(base.module, key) for key in _LOOKUP} if base.is_embedding else {}
        self.keys = _EMBEDDING_KEYS if base.is_embedding else _LINEAR_KEYS  # type: ignore[misc]
        self._initialise(config)
        if config.use_dora:
            self._start_dora(base)

    @classmethod
    def select(cls, model: nn.Module, config: LoraConfig) -> list[str]:
        """The backbone's own biases that train with it: all, or those of adapted modules."""
        return targets.biases(model, config.bias, (site.path for site in cls.sites(model, config)))

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:  # type: ignore[override]
        """Fused with the base's own product where that is a plain linear map, onto its output elsewhere."""
        c = self._column_scale() if self.norms is not None else None
        if self.is_embedding:
            y = base(x)
            hidden = F.embedding(x, self.a.T, **self.lookup)
            update = self.scale * self.embed_scale * (hidden @ self.b.T)
            return y + update.to(y.dtype) if c is None else (c * (y + update)).to(y.dtype)
        p = self.p if self.training else 0.0
        a, b, linear = _parameter(self, "a"), _parameter(self, "b"), base.linear
        if linear is None:
            bias = None if c is None else self.base.bias
            y = ops.low_rank(x, a, b, scale=self.scale, base_out=base(x), bias=bias, column_scale=c, p=p)
        else:
            weight, bias = linear
            y = ops.low_rank(x, a, b, scale=self.scale, weight=weight, bias=bias, column_scale=c, p=p)
        return y if self.b_bias is None else y + (self.scale * self.b_bias).to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + s · B A or, with DoRA, c ⊙ (W + s · B A); the bias as it is, or with s times B's added."""
        weight, bias = super().merge(weight, bias)
        if self.b_bias is not None:
            shift = self.scale * self.b_bias.to(weight.dtype)
            bias = shift if bias is None else bias + shift  # a base without a bias then refuses it
        return (weight if self.norms is None else self._column_scale().to(weight.dtype)[:, None] * weight), bias

    def train(self, mode: bool = True) -> LoRA:
        """As nn.Module's. Where the mode changes, weights may be swapped (averages for evaluation): drop the norm."""
        if self.norms is not None and mode != self.training:
            self.norms.clear()
        super().train(mode)
        return self

    def mixed_key(self) -> Hashable:
        """Plain updates of a linear map with the same dropout are one op for the whole batch."""
        plain = not self.is_embedding and self.norms is None and self.b_bias is None
        return (self.p if self.training else 0.0) if plain else None

    @classmethod
    def forward_mixed(cls, adapters: Sequence[LoRA], index: Tensor, base: BaseLayer, x: Tensor) -> Tensor:  # type: ignore[override]
        """All rows in one op: the base's product once, each A and B read once."""
        a, b = ([_parameter(one, name) for one in adapters] for name in ("a", "b"))
        scales, p = [one.scale for one in adapters], adapters[0].p if adapters[0].training else 0.0
        linear = base.linear
        if linear is None:
            return ops.multi_low_rank(x, a, b, index, scales=scales, base_out=base(x), p=p)
        weight, bias = linear
        return ops.multi_low_rank(x, a, b, index, scales=scales, weight=weight, bias=bias, p=p)

    def delta_weight(self) -> Tensor:
        """s · B A, [N, K]."""
        wide = torch.promote_types(self.b.dtype, torch.float32)
        return self.scale * (self.b.to(wide) @ self.a.to(wide))

    @classmethod
    def combined(cls, configs: Sequence[LoraConfig], recipe: Recipe) -> LoraConfig:
        """Of one rank for all targets, and scale 1. AdapterError for what is more than an update, or unequal ranks."""
        if any(config.use_dora or config.lora_bias for config in configs):
            raise AdapterError("use_dora or lora_bias: only adapters that are s · B A and nothing else can be combined")
        ranks = [max([config.r, *config.rank_pattern.values()]) for config in configs]
        if recipe.by_svd:
            r = recipe.svd_rank or max(ranks)
        else:
            r = sum(ranks) if recipe.rule == "cat" else ranks[0]
            if recipe.rule != "cat" and len(set(ranks)) > 1:
                raise AdapterError(f"combination_type={recipe.combination_type!r} wants one rank, these have {ranks}")
        return replace(configs[0], r=r, lora_alpha=r, use_rslora=False, rank_pattern={}, alpha_pattern={})

    def combine(self, parts: Sequence[tuple[LoRA, float]], recipe: Recipe) -> None:
        """By factors, A and B each weighted by √|w s| and A by the sign as well; or by the updates w s B A."""
        r, scales = self.a.shape[0], [weight * one.scale for one, weight in parts]
        most = max(one.a.shape[0] for one, _ in parts)  # a pattern may have given one of them less
        downs, ups = zip(*(_padded(one.a.float(), one.b.float(), most) for one, _ in parts), strict=True)
        if recipe.rule == "cat" or recipe.combination_type == "svd":
            a, b = torch.cat([scale * down for scale, down in zip(scales, downs, strict=True)]), torch.cat(ups, 1)
            if recipe.by_svd:
                a, b = recipe.refactored(a, b, r)
        elif recipe.by_svd:
            a, b = recipe.factored(recipe.merged([one.delta_weight() for one, _ in parts], [w for _, w in parts]), r)
        else:
            roots = [math.sqrt(abs(scale)) for scale in scales]
            signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
            a, b = recipe.merged(downs, signed), recipe.merged(ups, roots)
        a, b = _padded(a, b, r)
        self.a.copy_(a)
        self.b.copy_(b)

    def _start_dora(self, base: BaseLayer) -> None:
        weight = base.weight
        if not weight.is_floating_point() or is_sharded(weight):
            kind = f"{type(weight).__name__}, {weight.dtype}"
            raise TargetError(f"{base.path}: use_dora needs the weight's norm, and it is quantised or sharded ({kind})")
        self.base, self.norms = base, ops.NormCache()
        with torch.no_grad():
            norm = ops.weight_norm(weight, self.a, self.b, scale=self.scale)
        self.magnitude = nn.Parameter(norm.to(self.a.dtype))

    def _column_scale(self) -> Tensor:
        """c = m / ‖W + s · BA‖, [N]."""
        assert self.norms is not None
        return self.magnitude / self.norms(self.base.weight, self.a, self.b, scale=self.scale)

    def _initialise(self, config: LoraConfig) -> None:
        if config.init_lora_weights == "gaussian":
            nn.init.normal_(self.b if self.is_embedding else self.a, std=1 / config.r)
        elif self.is_embedding:
            nn.init.normal_(self.b)
        else:
            kaiming_(self.a)
        if self.is_embedding:
            nn.init.zeros_(self.a)
        if config.init_lora_weights is False:
            nn.init.normal_(self.a if self.is_embedding else self.b, std=1 / config.r)
            if self.b_bias is not None:
                nn.init.normal_(self.b_bias, std=1 / config.r)


def _padded(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, K] and B [N, rank] with rows and columns of zeros where they have less."""
    spare = rank - a.shape[0]
    return F.pad(a, (0, 0, 0, spare)), F.pad(b, (0, spare))


_LINEAR_KEYS = {
    "a": "lora_A.weight", "b": "lora_B.weight", "b_bias": "lora_B.bias", "magnitude": "lora_magnitude_vector",
}  # fmt: skip
_LOOKUP = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_EMBEDDING_KEYS = {"a": "lora_embedding_A", "b": "lora_embedding_B", "magnitude": "lora_magnitude_vector"}


def _pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    """Value of the first pattern that is the end of the path, at a dot; else the default."""
    return next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", path)), default)


def _parameter(adapter: LoRA, name: str) -> Tensor:
    """The attribute of this name; nn.Module's own look-up costs ten times as much, which shows in small calls."""
    try:
        return adapter._parameters[name]  # type: ignore[return-value]
    except KeyError:  # parametrised
        return getattr(adapter, name)  # type: ignore[no-any-return]
