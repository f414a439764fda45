"""A process that compiles its share of what the tests launch: on a new machine that takes longer than the tests do."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

import peftkern as pk
from peftkern.errors import BackendError
from peftkern.kernels import _device
from peftkern.ops._op import Op, every


def main(argv: list[str]) -> int:
    """Compile for the first GPU; argv ends with INDEX/COUNT, the share."""
    index, count = map(int, argv[-1].split("/"))
    device = torch.device("cuda", 0)
    for launch in list(launches(device))[index::count]:
        with contextlib.suppress(Exception):  # the test that needs it says what is wrong
            _device.compile_ahead(launch)
    return 0


def launches(device: torch.device) -> Iterator[_device.Launch]:
    """Those of every sample of every op in all dtypes, with a graph and without one, on the triton backend.

    Each variant that Triton compiles is there once; no kernel runs.
    """
    here = _device.device_of(torch.empty(0, device=device))
    seen = set()
    for op, dtype in itertools.product(every(), (torch.float32, torch.bfloat16, torch.float16)):
        for (_, kwargs), train in itertools.product(op.samples(device, dtype), (True, False)):
            with _device.recording(here) as recorded:
                _call(op, kwargs, train)
            for launch in recorded:
                if (key := _device.variant(launch.kernel, launch.args, launch.keywords)) not in seen:
                    seen.add(key)
                    yield launch


def _call(op: Op, kwargs: dict[str, object], train: bool) -> None:
    floating = [k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point() and k not in op.frozen]
    leaves = {name: kwargs[name].detach().requires_grad_(train) for name in floating}  # type: ignore[attr-defined]
    one_thread = torch.autograd.set_multithreading_enabled(False)  # the one that records
    with pk.use_backend("triton"), contextlib.suppress(BackendError), one_thread:
        out = op.run(**kwargs | leaves)
        y = out if isinstance(out, Tensor) else out[0]
        if train:
            torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y), allow_unused=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
