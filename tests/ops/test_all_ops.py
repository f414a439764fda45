"""What holds for every op on every backend."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peftkern as pk
from peftkern import dispatch
from peftkern.memory import saved_bytes
from peftkern.ops._op import Op
from peftkern.testing import assert_as_good_as_torch

from .conftest import DTYPES, device_of, first, samples, skip_unless_runs, tied, trainable, trained


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(op: Op, backend: str, dtype: torch.dtype) -> None:
    skip_unless_runs(op.name, backend, dtype)
    for name, kwargs in samples(op, backend, dtype):
        try:
            assert_as_good_as_torch(op.reference, op.run, kwargs, grads=trainable(op, kwargs), factor=op.factor)
        except AssertionError as error:
            raise AssertionError(f"{op.name} on {backend}, case {name}: {error}") from error


def test_reference_passes_gradcheck(op: Op) -> None:
    for name, kwargs in op.samples(torch.device("cpu"), torch.float64):
        if 0 in first(op.reference(**kwargs)).shape:
            continue
        copy = trained(op, kwargs)
        leaves = {key: value for key, value in copy.items() if isinstance(value, Tensor) and value.requires_grad}
        keys = [key for key in leaves if key != "residual" or copy["residual"] is not copy["x"]]
        if kwargs.get("activation") == "relu":
            continue

        def run(*values: Tensor, keys: list[str] = keys, copy: dict[str, Any] = copy) -> Tensor:
            return first(op.run(**tied(copy, copy | dict(zip(keys, values, strict=True)))))

        assert torch.autograd.gradcheck(run, [leaves[key] for key in keys], fast_mode=True), name


def test_same_seed_same_bits(op: Op, backend: str) -> None:
    skip_unless_runs(op.name, backend)
    for name, kwargs in samples(op, backend, torch.float32):
        results = []
        for _ in range(2):
            copy = trained(op, kwargs)
            out = first(op.run(**copy))
            out.sum().backward()
            leaves = [v for v in copy.values() if isinstance(v, Tensor) and v.requires_grad and v.numel()]
            results.append([out, *(leaf.grad for leaf in leaves)])
        for one, two in zip(*results, strict=True):
            assert torch.equal(one, two), name


def test_every_output_element_is_written(op: Op, backend: str) -> None:
    """torch.empty is filled with NaN under deterministic algorithms: what a kernel leaves out shows."""
    skip_unless_runs(op.name, backend)
    torch.use_deterministic_algorithms(True)
    try:
        for name, kwargs in samples(op, backend, torch.float32):
            copy = trained(op, kwargs)
            out = first(op.run(**copy))
            out.sum().backward()
            assert out.isfinite().all(), name
            for key, value in copy.items():
                if isinstance(value, Tensor) and value.requires_grad:
                    grad_is_finite = value.numel() == 0 or (value.grad is not None and value.grad.isfinite().all())
                    assert grad_is_finite, f"{name}: gradient of {key}"
    finally:
        torch.use_deterministic_algorithms(False)


def test_inputs_are_left_alone(op: Op, backend: str) -> None:
    skip_unless_runs(op.name, backend)
    for name, kwargs in samples(op, backend, torch.float32):
        before = {k: v.clone() for k, v in kwargs.items() if isinstance(v, Tensor)}
        copy = trained(op, kwargs)
        first(op.run(**copy)).sum().backward()
        assert all(torch.equal(copy[key], value) for key, value in before.items()), name


def test_no_graph_gives_the_same_result(op: Op, backend: str) -> None:
    skip_unless_runs(op.name, backend)
    for name, kwargs in samples(op, backend, torch.float32):
        with_graph = first(op.run(**trained(op, kwargs))).detach()
        copies = {k: v.clone() if k == "base_out" else v for k, v in kwargs.items()}
        with torch.no_grad():
            assert torch.equal(first(op.run(**copies)), with_graph), name


def test_compiles_to_one_graph_without_recompiling(op: Op, backend: str) -> None:
    skip_unless_runs(op.name, backend)
    chosen = [item for item in samples(op, backend, torch.float32) if item[0] in op.compiled]
    assert chosen
    for name, kwargs in chosen:
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(op.run, fullgraph=True, backend=counter)
        for rows in (2, 3, 5):
            grown = tied(kwargs, trained(op, _with_rows(op, kwargs, rows)))
            again = tied(kwargs, {k: _leaf(v) for k, v in grown.items()})
            given = [again[key] for key in op.rows if isinstance(again.get(key), Tensor)]
            for value in {id(value): value for value in given}.values():
                torch._dynamo.mark_dynamic(value, 0)
            expected, got = first(op.run(**grown)), first(compiled(**again))
            torch.testing.assert_close(got, expected, msg=lambda m, name=name: f"{name}: {m}")
            expected.square().sum().backward()
            got.square().sum().backward()
            for key, value in grown.items():
                if isinstance(value, Tensor) and value.requires_grad:
                    torch.testing.assert_close(again[key].grad, value.grad, msg=lambda m, key=key: f"{key}: {m}")
        assert counter.frame_count == 1, f"{name}: {counter.frame_count} graphs for three batch sizes"


def test_opcheck(op: Op, backend: str) -> None:
    """The registered op itself: schema, fake tensors, autograd registration, AOT dispatch."""
    skip_unless_runs(op.name, backend)
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, no registered op runs")
    recorded: list[tuple[Any, ...]] = []
    module = inspect.getmodule(op.run)
    original = module._differentiable  # type: ignore[union-attr]
    for name, kwargs in samples(op, backend, torch.float32):
        if name not in op.compiled:
            continue
        module._differentiable = lambda *args: recorded.append(args) or original(*args)  # type: ignore[union-attr, func-returns-value]
        try:
            op.run(**trained(op, kwargs))
        finally:
            module._differentiable = original  # type: ignore[union-attr]
    assert recorded
    for args in recorded:
        torch.library.opcheck(getattr(torch.ops.peftkern, op.name).default, tuple(map(_leaf, args)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_replays_dropout(op: Op, backend: str, reentrant: bool) -> None:
    skip_unless_runs(op.name, backend)
    for name, kwargs in samples(op, backend, torch.float32):
        if name not in op.compiled:
            continue
        kwargs = kwargs | ({"seed": None} if "seed" in kwargs else {})
        grads = []
        for checkpointed in (False, True):
            copy = trained(op, kwargs)
            torch.manual_seed(3)
            main = next(v for v in copy.values() if isinstance(v, Tensor) and v.requires_grad)
            key = next(k for k, v in copy.items() if v is main)

            def run(value: Tensor, copy: dict[str, Any] = copy, key: str = key) -> Tensor:
                return first(op.run(**tied(copy, copy | {key: value})))

            out = checkpoint(run, main, use_reentrant=reentrant) if checkpointed else run(main)
            out.square().sum().backward()
            grads.append(main.grad)
        assert torch.equal(*grads), name


def test_explain_names_a_reason_for_every_other_backend(op: Op) -> None:
    _, kwargs = next(op.samples(torch.device("cpu"), torch.float32))
    told = pk.explain(op.name, **kwargs)
    assert {told.backend, *told.refused} == set(dispatch.ORDER)
    assert all(reason for reason in told.refused.values())
    assert told.backend in str(told)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_explain_names_the_backend_that_a_call_takes(
    op: Op, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes, dtypes of the adapter, autocast and gradients count as in the call."""
    taken: list[str] = []
    choose = dispatch._choose

    class Enough(Exception):
        """No kernel need run: through Triton's interpreter that takes minutes."""

    def record(name: str, *args: Any, **dims: Any) -> str:
        taken.append(choose(name, *args, **dims))
        raise Enough

    for name, kwargs in op.samples(torch.device("cpu"), dtype):
        for autocast, grad in ((False, False), (True, False), (False, True)):
            given = trained(op, kwargs) if grad else kwargs
            state = torch.random.get_rng_state()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                told = pk.explain(op.name, **given)
                assert torch.equal(torch.random.get_rng_state(), state)
                taken.clear()
                with monkeypatch.context() as patch, pytest.raises(Enough):
                    patch.setattr(dispatch, "_choose", record)
                    op.run(**given)
            assert taken[0] == told.backend, (name, autocast, grad)


def test_explain_asks_as_a_call_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend without a backward, one for few rows, one for narrow heads; a few of the arguments are enough."""
    narrow = dispatch.Backend("cpu", print, print, lambda *_, D=0, **dims: "heads too wide" if D > 4 else None)
    few = dispatch.Backend("cpu", print, print, lambda *_, M=0, **dims: "too many rows" if M > 4 else None, False)
    backends = {"prefix_attention": narrow, "multi_low_rank": few}
    monkeypatch.setattr(dispatch, "load", lambda name, op: backends[op] if name == "cpu" else "not here")
    dispatch._choose.cache_clear()
    heads = [torch.ones(1, 1, 2, d) for d in (4, 8)]
    assert [pk.explain("prefix_attention", h, h, h, h[0], h[0]).backend for h in heads] == ["cpu", "reference"]
    a, b, index = [torch.ones(1, 3)], [torch.ones(2, 1)], torch.zeros(4, dtype=torch.int64)
    told = pk.explain("multi_low_rank", torch.ones(4, 3), a, b, index, scales=[1.0])
    assert told.backend == "cpu"
    told = pk.explain("multi_low_rank", torch.ones(4, 3, requires_grad=True), a, b, index, scales=[1.0])
    assert "no backward" in told.refused["cpu"]
    told = pk.explain("multi_low_rank", torch.ones(5, 3), a, b, torch.zeros(5, dtype=torch.int64), scales=[1.0])
    assert told.refused["cpu"] == "too many rows"
    assert pk.explain("multi_low_rank", torch.ones(5, 3)).backend == "cpu"
    dispatch._choose.cache_clear()


def test_forced_backend_that_cannot_run_raises_with_reasons(op: Op) -> None:
    _, kwargs = next(op.samples(torch.device("cpu"), torch.float64))
    for backend in ("cuda", "triton", "cpu"):
        with pk.use_backend(backend), pytest.raises(pk.errors.BackendError, match="float64"):
            op.run(**kwargs)


def test_unknown_backend_suggests_the_near_name() -> None:
    with pytest.raises(pk.errors.BackendError, match="triton"), pk.use_backend("tritn"):
        pass


class _WideAllocations(TorchDispatchMode):
    """Counts results of at least `numel` f32 elements."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.seen = numel, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32 and tensor.numel() >= self.numel:
                self.seen.append(str(func))
        return out


@pytest.mark.parametrize("name", ["low_rank", "bottleneck"])
def test_half_precision_input_is_never_copied_to_f32(name: str, backend: str) -> None:
    skip_unless_runs(name, backend, torch.bfloat16)
    if backend == "reference":
        pytest.skip("reference: computes in f32 by design")
    x = torch.randn(64, 96, device=device_of(backend), dtype=torch.bfloat16, requires_grad=True)
    down = torch.randn(8, 96, device=x.device, requires_grad=True)
    up = torch.randn(96, 8, device=x.device, requires_grad=True)
    run = pk.ops.low_rank if name == "low_rank" else pk.ops.bottleneck
    extra = {"weight": torch.randn(96, 96, device=x.device, dtype=x.dtype)} if name == "low_rank" else {"residual": x}
    with _WideAllocations(x.numel()) as mode:
        run(x, down, up, p=0.1, **extra).sum().backward()
    assert not mode.seen


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("name", ["low_rank", "bottleneck"])
def test_saved_bytes(name: str, p: float, backend: str) -> None:
    """x once and [M, R] in f32; dropout adds its seed of 8 bytes and nothing else."""
    skip_unless_runs(name, backend)
    if backend == "reference":
        pytest.skip("reference: plain autograd saves what it likes")
    m, width, r = 48, 80, 8
    x = torch.randn(m, width, device=device_of(backend), requires_grad=True)
    down = torch.randn(r, width, device=x.device, requires_grad=True)
    up = torch.randn(width, r, device=x.device, requires_grad=True)
    weight = torch.randn(width, width, device=x.device)
    if name == "low_rank":
        saved = saved_bytes(lambda: pk.ops.low_rank(x, down, up, weight=weight, p=p), [down, up, weight])
    else:
        saved = saved_bytes(lambda: pk.ops.bottleneck(x, down, up, residual=x, p=p), [down, up])
    assert saved == 4 * m * width + 4 * m * r + (8 if p else 0)


def _with_rows(op: Op, kwargs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The same case with another number of rows in every tensor that has the leading dimension of x."""
    main = next(kwargs[key] for key in op.rows if kwargs.get(key) is not None)

    def grow(value: Tensor) -> Tensor:
        repeats = -(-rows // main.shape[0])
        return value.repeat(repeats, *[1] * (value.dim() - 1))[:rows].contiguous()

    return {k: grow(v) if k in op.rows and isinstance(v, Tensor) else v for k, v in kwargs.items()}


def _leaf(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
