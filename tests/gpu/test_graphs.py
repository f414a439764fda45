"""CUDA graphs: forward and backward of every op are captured once and replayed on new values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peftkern.ops._op import Op

from ..ops.conftest import OPS
from .conftest import Call, Place, assert_equal, cases


def captured(run: Callable[[], list[Tensor]], device: torch.device) -> tuple[Callable[[], None], list[Tensor]]:
    """(replay, outputs): replay() computes the outputs anew, in place. On a CPU it calls `run` again."""
    if device.type == "cpu":
        outputs = run()

        def again() -> None:
            for old, new in zip(outputs, run(), strict=True):
                old.copy_(new)

        return again, outputs
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


def test_a_replay_computes_what_eager_does(op: Op, place: Place) -> None:
    for name, kwargs in cases(op, place):
        static, fresh = Call(op, kwargs), Call(op, kwargs)
        with torch.no_grad():
            for leaf in fresh.leaves:
                leaf.mul_(-0.75)
        replay, outputs = captured(static, place.device)
        for other in (fresh, Call(op, kwargs)):
            want = other()
            static.fill(other)
            replay()
            assert_equal(outputs, want, name)


@pytest.mark.parametrize("name", ["low_rank", "bottleneck"])
def test_every_replay_draws_another_dropout_mask(name: str, place: Place) -> None:
    """Without a seed the op draws one from torch's generator, which a graph advances at every replay."""
    op = next(op for op in OPS if op.name == name)
    kwargs = next(kwargs for _, kwargs in cases(op, place) if kwargs.get("p")) | {"seed": None}
    replay, outputs = captured(Call(op, kwargs), place.device)
    seen = []
    for _ in range(2):
        replay()
        seen.append([value.clone() for value in outputs])
    assert not torch.equal(seen[0][0], seen[1][0])
    assert all(value.isfinite().all() for values in seen for value in values)
