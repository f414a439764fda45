"""Peers that are missing, out of memory or wrong cost a row; those that are there do identical work."""

import dataclasses
import sys

import pytest
import torch

from bench import _models, _peers, low_rank
from bench._measure import Case, Options, Settings, measure, prepare

CPU = Options(torch.device("cpu"), quick=True)
SETTINGS = Settings(rounds=1, least=1, seconds=0.0)


def lora(**change) -> Case:
    half = torch.bfloat16
    shape = low_rank.Shape(16, 32, 48, 4, 0.0, half, half, bias=False)
    return low_rank._case(CPU, dataclasses.replace(shape, **change))


def test_a_peer_that_is_not_installed_has_a_row_that_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", None)
    runners, rows = prepare(lora(), SETTINGS)
    (row,) = rows
    assert (row.kernel_provider, row.status) == ("unsloth", "missing") and "unsloth" in row.note
    assert {"floor", "torch", "peftkern"} <= set(runners)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match="liger_kernel"):
        _peers.with_liger(torch.nn.Module())


def test_peers_with_other_kernels_do_the_same_work(monkeypatch):
    """Stand-ins with the signatures of Unsloth and Liger: what this benchmark hands them is right."""
    class Lora(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w, w_quant, a, b, s):
            assert x.dim() == 3 and w_quant is None
            ctx.save_for_backward(x, w, a, b)
            ctx.s = s
            return x @ w.T + s * (x @ a.T) @ b.T

        @staticmethod
        def backward(ctx, dy):
            x, w, a, b = (t.flatten(0, 1) if t.dim() == 3 else t for t in ctx.saved_tensors)
            d = dy.flatten(0, 1)
            dx = d @ w + ctx.s * (d @ b) @ a
            da, db = ctx.s * (d @ b).T @ x, ctx.s * d.T @ (x @ a.T)
            return dx.view(dy.shape[0], -1, w.shape[1]), None, None, da, db, None

    fake = type(torch)("fast_lora")
    fake.LoRA_W = Lora
    for name in ("unsloth", "unsloth.kernels", "unsloth.kernels.fast_lora"):
        monkeypatch.setitem(sys.modules, name, fake)
    runners, rows = prepare(lora(), SETTINGS)
    assert not rows and "unsloth" in runners, [row.note for row in rows]

    norms = type(torch)("rms_norm")
    norms.LigerRMSNorm = lambda size, eps: torch.nn.RMSNorm(size, eps)
    swiglu = type(torch)("swiglu")
    swiglu.LigerSiLUMulFunction = type("F", (), {"apply": lambda a, b: torch.nn.functional.silu(a) * b})
    for name in ("liger_kernel", "liger_kernel.ops", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, type(torch)(name))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.rms_norm", norms)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.swiglu", swiglu)
    model = _models.decoder(CPU).build(torch.device("cpu"), torch.float32)
    ids = torch.arange(1, 7)[None]
    want = model(input_ids=ids).logits
    before = {name: type(module).__name__ for name, module in model.named_modules()}
    got = _peers.with_liger(model)(input_ids=ids).logits
    torch.testing.assert_close(got, want)
    assert sum(type(m).__name__ == "RMSNorm" for m in model.modules()) == sum("RMS" in n for n in before.values())


OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90.00 GiB\nmore")


@pytest.mark.parametrize("where", ["build", "forward", "backward"])
def test_a_case_that_does_not_fit_into_memory_costs_one_provider(monkeypatch, where):
    case = lora(p=0.1)
    good = case.providers["torch"]

    def big():
        if where == "build":
            raise OOM
        runner = good()

        def fail(*_args):
            raise OOM

        setattr(runner, where, fail)
        runner.check = None
        return runner

    rows = measure(dataclasses.replace(case, providers={**case.providers, "big": big}), SETTINGS)
    failed = [row for row in rows if row.kernel_provider == "big" and row.metric_name == "speed"]
    assert {row.status for row in failed} == {"failed"} and "CUDA out of memory" in failed[0].note
    ours = [row for row in rows if row.kernel_provider == "peftkern" and row.metric_name == "speed"]
    assert ours and {row.status for row in ours} == {"ok"}


def test_a_kernel_that_computes_something_else_is_a_row_and_not_a_time(monkeypatch):
    case = lora(p=0.1)
    real = low_rank.ops.low_rank
    monkeypatch.setattr(low_rank.ops, "low_rank", lambda *args, **kwargs: 1.5 * real(*args, **kwargs))
    rows = measure(case, SETTINGS)
    (row,) = [row for row in rows if row.kernel_provider == "peftkern"]
    assert row.status == "wrong" and "y is off by" in row.note


def test_a_light_case_has_a_few_rounds_and_no_memory():
    rows = measure(lora(light=True), Settings(rounds=9, least=1, seconds=9.0))
    assert {row.metric_name for row in rows if row.status == "ok"} == {"speed"}
    assert {row.rounds for row in rows if row.status == "ok"} == {3}
