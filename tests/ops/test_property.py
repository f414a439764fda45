"""Every op on every backend, on cases that nobody thought of: sizes at block edges, layouts, options, dtypes."""

from __future__ import annotations

import os
from random import Random
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from peftkern.ops._draw import Draw
from peftkern.ops._op import Op
from peftkern.testing import assert_as_good_as_torch

from .conftest import DTYPES, device_of, samples, skip_unless_runs, trainable
from .layouts import described, relayout

# The interpreter takes a fifth of a second per case. PEFTKERN_EXAMPLES=3000 for a long search.
EXAMPLES = int(os.environ.get("PEFTKERN_EXAMPLES", 20 if os.environ.get("TRITON_INTERPRET") == "1" else 120))
# No deadline and no database: the same cases on every machine, whatever its speed. No shrinking: no seed is simpler.
SEARCH = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
# Two digits a draw: into larger ranges hypothesis mixes constants that it finds in whatever modules are loaded, so that
# the cases would depend on the tests that ran before in the same process.
DIGITS = st.integers(0, 99)
SEEDS = st.tuples(DIGITS, DIGITS, DIGITS)


def drawn(op: Op, backend: str, random: Random) -> dict[str, Any]:
    """A random case of an op, its tensors laid out at random."""
    dtype = DTYPES[random.randrange(len(DTYPES))]
    if op.draw is not None:
        return relayout(op.draw(Draw(random, device_of(backend), dtype)), random)
    cases = samples(op, backend, dtype)
    return relayout(cases[random.randrange(len(cases))][1], random)


def test_any_case_is_as_good_as_torch(op: Op, backend: str) -> None:
    """Outputs and gradients against float64, with and without a graph."""
    skip_unless_runs(op.name, backend)

    @SEARCH
    @given(SEEDS)
    def search(seed: tuple[int, int, int]) -> None:
        random = Random("-".join(map(str, seed)))
        kwargs = drawn(op, backend, random)
        graph = random.randrange(4) > 0
        note(f"{described(kwargs)}, {graph=}")
        with torch.set_grad_enabled(graph):
            grads = trainable(op, kwargs) if graph else ()
            assert_as_good_as_torch(op.reference, op.run, kwargs, grads=grads, factor=op.factor)

    search()
