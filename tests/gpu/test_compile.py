"""torch.compile to code for the device: with inductor and with CUDA graphs on a GPU, with aot_eager on a CPU."""

from __future__ import annotations

from typing import Any

import torch

from peftkern.ops._op import Op

from .conftest import Call, Place, cases


def modes(place: Place) -> list[dict[str, Any]]:
    if place.device.type == "cpu":
        return [{"backend": "aot_eager"}]
    return [{"backend": "inductor"}, {"mode": "reduce-overhead"}]


def test_compiled_and_eager_agree(op: Op, place: Place) -> None:
    for name, kwargs in cases(op, place):
        want = Call(op, kwargs)()
        for mode in modes(place):
            torch.compiler.reset()
            call = Call(op, kwargs)
            run = torch.compile(op.run, fullgraph=True, **mode)
            for _ in range(3):  # CUDA graphs warm up, record, replay
                torch.compiler.cudagraph_mark_step_begin()
                got = [value.clone() for value in call(run)]
            for index, (one, two) in enumerate(zip(got, want, strict=True)):
                where = f"{name}, value {index}, {mode}"
                message = lambda text, where=where: f"{where}: {text}"  # noqa: E731
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=message)
