"""Random cases of an op for its property tests: sizes around block edges, optional arguments, mixed dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
EDGES = tuple(edge + step for edge in (16, 32, 64, 128) for step in (-1, 0, 1))


@dataclass(frozen=True)
class Draw:
    """Choices for one case; `random` decides all of them, so that a failing case is found again and made smaller.

    Tensors come contiguous, on `device`: the test lays them out anew. `dtype` is that of the input.
    """

    random: Random
    device: torch.device
    dtype: torch.dtype

    def one_of(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[self.random.randrange(len(choices))]

    def maybe(self, value: T) -> T | None:
        """The value, or None."""
        return value if self.random.randrange(2) else None

    def size(self, largest: int = EDGES[-1]) -> int:
        """A size of at most `largest`: at a block's edge, or small."""
        return self.one_of([1, 2, 3, 5, 8, *(edge for edge in EDGES if edge <= largest)])

    def lead(self, largest: int = EDGES[-1]) -> tuple[int, ...]:
        """One to three leading dimensions; one case in sixteen has no rows."""
        rows = 0 if self.random.randrange(16) == 15 else self.size(largest)
        splits = self.random.randrange(3)
        if splits == 0:
            return (rows,)
        factor = 2 + self.random.randrange(2)
        inner = -(-rows // factor)
        return (factor, inner) if splits == 1 else (1 + self.random.randrange(2), factor, -(-inner // 2))

    def adapter_dtype(self) -> torch.dtype:
        """The dtype of the input, or another one in which adapters are kept beside it."""
        other = torch.bfloat16 if self.dtype == torch.float32 else torch.float32
        return self.one_of([self.dtype, self.dtype, other])

    def dropout(self) -> tuple[float, Tensor | None]:
        """p, and the seed where p > 0."""
        p = self.one_of([0.0, 0.1, 0.5])
        return p, torch.tensor([self.random.getrandbits(62)], device=self.device) if p else None

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers in `dtype`, the input's unless given."""
        values = torch.randn(*shape, generator=self._generator(), dtype=torch.float64)
        return values.to(self.device, self.dtype if dtype is None else dtype)

    def randint(self, high: int, *shape: int) -> Tensor:
        """int64 in [0, high)."""
        return torch.randint(high, shape, generator=self._generator()).to(self.device)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.random.getrandbits(32))
