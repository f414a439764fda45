"""Kernels run on the current stream of the tensors' own device."""

from __future__ import annotations

import contextlib

import pytest
import torch

from peftkern.ops._op import Op

from .conftest import Call, Place, assert_equal, cases


def test_another_stream_than_the_default_one(op: Op, place: Place) -> None:
    """The inputs are NaN until the side stream has slept: a kernel on any other stream would read NaN."""
    on_gpu = place.device.type == "cuda"
    for name, kwargs in cases(op, place):
        call, source = Call(op, kwargs), Call(op, kwargs)
        want = source()
        call()  # compiles
        call.fill(None)
        if on_gpu:
            torch.cuda.synchronize()
        side = torch.cuda.Stream() if on_gpu else None
        with torch.cuda.stream(side) if on_gpu else contextlib.nullcontext():
            if on_gpu:
                torch.cuda._sleep(100_000_000)
            call.fill(source)
            got = call()
        if side is not None:
            side.synchronize()
        assert_equal(got, want, name)


def test_a_second_device_while_the_first_is_current(op: Op, place: Place) -> None:
    if place.device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPU: this needs two")
    other = Place(torch.device("cuda", 1) if place.device.type == "cuda" else place.device, place.backend)
    for name, kwargs in cases(op, other):
        call = Call(op, kwargs)
        got = call()
        assert {value.device for value in got} == {call.tensors[0].device}, name
        with torch.cuda.device(other.device) if place.device.type == "cuda" else contextlib.nullcontext():
            assert_equal(got, call(), name)


def test_cpu_tensors_beside_a_gpu(op: Op) -> None:
    """The tensors' device decides, not whether there is a GPU."""
    from peftkern import dispatch

    assert dispatch.choose(op.name, torch.device("cpu"), torch.float32) in ("cpu", "triton", "reference")
