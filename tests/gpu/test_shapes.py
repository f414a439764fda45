"""The shapes of the benchmark: on a GPU the large ones, before any clock runs; on a CPU the quick ones."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch

from bench import _cases
from bench._measure import OURS, YARDSTICK, Case, Options, Settings, prepare

_MOST = 8
"""Cases per op: the first ones of its file, which are the most telling."""


@pytest.mark.parametrize("name", _cases.op_names())
def test_an_op_at_the_shapes_it_is_timed_at(name: str, device: torch.device) -> None:
    """Within twice the error of plain PyTorch in the same dtypes, against float64, gradients and dropout included."""
    source = importlib.import_module(f"bench.{name}")
    options = Options(device, quick=device.type == "cpu")
    cases: list[Case] = list(itertools.islice(source.cases(options), _MOST))
    for case in cases:
        others = frozenset(case.providers) - {OURS, YARDSTICK}
        runners, rows = prepare(case, Settings(without=others))
        assert not rows, (case.label, [row.note for row in rows])
        if device.type == "cuda":
            assert runners[OURS].backend in ("triton", "cuda", "reference"), case.label
        del runners
