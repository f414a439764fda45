"""Task arithmetic: what several adapters have learnt, as one tensor.

Sources: task arithmetic, Ilharco et al. 2022 (arXiv:2212.04089); TIES, Yadav et al. 2023 (arXiv:2306.01708), section 3;
DARE, Yu et al. 2023 (arXiv:2311.03099), section 3. Names and defaults are those of Hugging Face PEFT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftkern.errors import ConfigError, near

_PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
COMBINATIONS = ("svd", "cat", "linear", *_PRUNED, *(f"{name}_svd" for name in _PRUNED))
"""Of the factors themselves or, with an SVD, of the whole updates ("svd" alone: their weighted sum)."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How adapters are combined.

    combination_type: one of COMBINATIONS. svd_rank: rank of the result, where an SVD makes it. svd_clamp: quantile of
    its factors beyond which they are cut off. svd_driver: as torch.linalg.svd has it, for CUDA. density: share of the
    values that pruning keeps, 0 < density <= 1. majority_sign_method: "total" or "frequency", by which TIES elects.
    Raises ConfigError for anything else.
    """

    combination_type: str
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    def __post_init__(self) -> None:
        kind, density = self.combination_type, self.density
        if kind not in COMBINATIONS:
            raise ConfigError(f"combination_type={kind!r}{near(kind, COMBINATIONS)}: want {', '.join(COMBINATIONS)}")
        if self.rule in _PRUNED and not (density is not None and 0.0 < density <= 1.0):
            raise ConfigError(f"density={density!r}: {kind!r} wants 0 < density <= 1, the share of values that stay")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ConfigError(f"svd_rank={self.svd_rank!r}: want an integer > 0")
        if self.svd_clamp is not None and not 0.0 <= self.svd_clamp <= 1.0:
            raise ConfigError(f"svd_clamp={self.svd_clamp!r}: want a quantile, 0 to 1")
        if self.majority_sign_method not in ("total", "frequency"):
            raise ConfigError(f"majority_sign_method={self.majority_sign_method!r}: want 'total' or 'frequency'")

    @property
    def by_svd(self) -> bool:
        """Whether the whole updates are combined and the result is factored anew."""
        return self.combination_type.endswith("svd")

    @property
    def rule(self) -> str:
        """What happens to tensors of one shape: "linear", "cat" or one that prunes."""
        return "linear" if self.combination_type == "svd" else self.combination_type.removesuffix("_svd")

    def merged(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """One tensor for these of the same shape, each with its weight; in their dtype."""
        stacked = torch.stack([self._pruned(tensor) for tensor in tensors])
        scale = stacked.new_tensor(list(weights)).view(-1, *[1] * (stacked.dim() - 1))
        if not self.rule.endswith("ties"):
            return (scale * stacked).sum(0)
        signs = stacked.sign()
        elected = torch.where((stacked if self.majority_sign_method == "total" else signs).sum(0) >= 0, 1.0, -1.0)
        agree = signs == elected
        return (scale * stacked * agree).sum(0) / agree.sum(0).clamp(min=1)

    def _pruned(self, tensor: Tensor) -> Tensor:
        if self.density is None or self.rule not in _PRUNED or self.density == 1.0:
            return tensor
        if self.rule.startswith("dare"):
            return tensor * torch.bernoulli(torch.full_like(tensor, self.density)) / self.density
        kept = tensor.flatten().abs().topk(int(self.density * tensor.numel())).indices
        pruned = torch.zeros_like(tensor).flatten()
        pruned[kept] = tensor.flatten()[kept]
        return pruned.view_as(tensor)

    def factored(self, update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """A [rank, K] and B [N, rank] whose product B A is the nearest to an update [N, K]."""
        u, s, vh = torch.linalg.svd(update, full_matrices=False, driver=self.svd_driver)
        return self._cut(u, s, vh, rank)

    def refactored(self, a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The same for the update B A, from its factors: the SVD is of a matrix as small as their rank.

        With B = Q_b R_b and Aᵀ = Q_a R_a, the SVD of B A is that of R_b R_aᵀ between Q_b and Q_aᵀ.
        """
        if a.shape[0] >= min(a.shape[1], b.shape[0]):
            return self.factored(b @ a, rank)
        (outer_b, inner_b), (outer_a, inner_a) = torch.linalg.qr(b), torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(inner_b @ inner_a.T, driver=self.svd_driver)
        return self._cut(outer_b @ u, s, vh @ outer_a.T, rank)

    def _cut(self, u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        b, a = (u * s)[:, :rank], vh[:rank]
        if self.svd_clamp is None:
            return a, b
        values = torch.cat([b.flatten(), a.flatten()]).sort().values  # torch.quantile takes no more than 2^24 of them
        place = self.svd_clamp * (len(values) - 1)
        bound = float(values[int(place)].lerp(values[math.ceil(place)], place % 1))
        return a.clamp(-bound, bound), b.clamp(-bound, bound)
