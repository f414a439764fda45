"""The ops as people call them: nothing that PyTorch's own functions do should surprise here."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import peftkern as pk
from peftkern import ops
from peftkern.errors import BackendError
from peftkern.ops._op import Op
from peftkern.ops.bottleneck import reference as bottleneck_reference
from peftkern.ops.low_rank import reference as low_rank_reference
from peftkern.ops.multi_low_rank import reference as multi_low_rank_reference

from .conftest import OPS, device_of, first, samples, skip_unless_runs, trained

_CASE = {
    "bottleneck": "sequential",
    "column_scale": "3d-64",
    "low_rank": "3d-bias-r16",
    "multi_low_rank": "per-sequence-bias",
    "prefix_attention": "grouped",
    "prompt_concat": "ids-left",
    "weight_norm": "97x200-r8",
}


def large(op: Op, backend: str) -> dict[str, Any]:
    """The arguments of one call with three dimensions where the op takes them, and without dropout."""
    return dict(samples(op, backend, torch.float32))[_CASE[op.name]]


@pytest.fixture
def kwargs(op: Op, backend: str) -> dict[str, Any]:
    skip_unless_runs(op.name, backend)
    return large(op, backend)


def test_a_result_may_be_changed_in_place(op: Op, kwargs: dict[str, Any]) -> None:
    """As by ReLU(inplace=True) or a residual's +=."""
    if op.name in ("prefix_attention", "weight_norm"):
        pytest.skip(f"{op.name} saves its result for backward, as torch.exp does")
    out = first(op.run(**trained(op, kwargs)))
    out += 1.0
    out[..., 0] = 0.0
    out.sum().backward()


def test_no_argument_changes(op: Op, kwargs: dict[str, Any]) -> None:
    tensors = {key: value for key, value in kwargs.items() if isinstance(value, Tensor)}
    before = {key: value.clone() for key, value in tensors.items()}
    with torch.no_grad():
        op.run(**kwargs)
    for key, value in tensors.items():
        assert torch.equal(value, before[key]), key


def test_a_base_output_stays_as_it_is(backend: str) -> None:
    skip_unless_runs("low_rank", backend)
    device = device_of(backend)
    x, a, b, base = (torch.randn(s, device=device) for s in ((300, 64), (4, 64), (48, 4), (300, 48)))
    before = base.clone()
    with torch.no_grad():
        ops.low_rank(x, a, b, base_out=base)
    assert torch.equal(base, before)


def overwriting(
    backend: str, columns: int
) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """(tensor, op that may overwrite it, the same that may not)."""
    device = device_of(backend)
    x, a, b = (
        torch.randn(100, 64, device=device),
        torch.randn(4, 64, device=device),
        torch.randn(columns, 4, device=device),
    )
    s = torch.rand(columns, device=device) + 2
    yield (
        torch.randn(100, columns, device=device),
        lambda t: ops.low_rank(x, a, b, base_out=t, overwrite=True),
        (lambda t: ops.low_rank(x, a, b, base_out=t)),
    )
    yield (
        torch.randn(100, columns, device=device),
        lambda t: ops.column_scale(t, s, overwrite=True),
        (lambda t: ops.column_scale(t, s)),
    )


def test_what_is_overwritten_counts_a_version(backend: str) -> None:
    """So that a graph that has saved it says so in its backward."""
    for op in ("low_rank", "column_scale"):
        skip_unless_runs(op, backend)
    for given, overwrite, _ in overwriting(backend, 33):
        weight = given.clone().requires_grad_()
        saved = torch.sigmoid(weight)
        with torch.no_grad():
            overwrite(saved.detach())
        if backend != "reference":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                saved.sum().backward()


def test_one_column_of_any_stride(backend: str) -> None:
    """Such a matrix is contiguous whatever its column stride."""
    for op in ("low_rank", "column_scale"):
        skip_unless_runs(op, backend)
    for given, overwrite, keep in overwriting(backend, 1):
        odd = torch.empty(1, 100, device=given.device).T.copy_(given)
        assert odd.is_contiguous() and odd.stride() == (1, 100)
        with torch.no_grad():
            torch.testing.assert_close(overwrite(odd), keep(given))


def test_another_default_device(op: Op, kwargs: dict[str, Any]) -> None:
    want = first(op.run(**kwargs))
    with torch.device("meta"):
        got = first(op.run(**kwargs))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", [op for op in OPS if op.name != "prompt_concat"], ids=lambda op: op.name)
def test_differentiating_twice(op: Op, backend: str) -> None:
    """Kernels have no second derivative and say so; the reference has."""
    skip_unless_runs(op.name, backend)
    given = trained(op, large(op, backend))
    leaves = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
    out = first(op.run(**given))
    # The gradient from above depends on nothing here, as that of a sum.
    grads = torch.autograd.grad(out, leaves, torch.rand_like(out), create_graph=True, allow_unused=True)
    twice = sum(((grad**2).sum() for grad in grads if grad is not None), start=out.new_zeros(()))
    if backend == "reference":
        twice.backward()
    else:
        with pytest.raises(BackendError, match=rf"{op.name}: its kernels have no second derivative"):
            twice.backward()


TRANSFORMED = [op for op in OPS if op.name not in ("prompt_concat", "weight_norm")]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("op", TRANSFORMED, ids=lambda op: op.name)
def test_functional_transforms(op: Op, grad: bool) -> None:
    """torch.func sees PyTorch's own functions alone; what it gives does not depend on the size of the batch."""
    given = large(op, "cpu")
    name = op.rows[0]
    x = given.pop(name)
    if given.get("residual") is x:
        del given["residual"]

    def run(x: Tensor) -> Tensor:
        return first(op.run(**{name: x}, **given))

    def reference(x: Tensor) -> Tensor:
        return first(op.reference(**{name: x}, **given))

    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.func.jvp(run, (x,), (x,)), torch.func.jvp(reference, (x,), (x,)))
        twice = torch.stack((x, 2 * x))
        torch.testing.assert_close(torch.func.vmap(run)(twice), torch.stack((run(x), run(2 * x))), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.func.grad(lambda x: run(x).sum())(x), torch.func.grad(lambda x: reference(x).sum())(x)
    )


def test_a_forced_kernel_under_a_transform() -> None:
    skip_unless_runs("low_rank", "cpu")
    x, a, b = torch.randn(3, 8), torch.randn(2, 8), torch.randn(4, 2)
    with pk.use_backend("cpu"), pytest.raises(BackendError, match="'cpu' was forced"):
        torch.func.jvp(lambda x: ops.low_rank(x, a, b), (x,), (x,))


@pytest.mark.parametrize("op", TRANSFORMED, ids=lambda op: op.name)
def test_traced_with_fake_tensors(op: Op, kernels_at_any_size: None) -> None:
    given = large(op, "cpu")
    name = op.rows[0]
    x = given.pop(name)
    given.pop("residual", None)

    def run(x: Tensor) -> Tensor:
        return first(op.run(**{name: x}, **given))

    traced = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x)
    torch.testing.assert_close(traced(x), run(x))


@pytest.mark.parametrize("op", TRANSFORMED, ids=lambda op: op.name)
def test_tensors_without_data(op: Op) -> None:
    given = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in large(op, "cpu").items()}
    assert first(op.run(**given)).shape == first(op.run(**large(op, "cpu"))).shape


SCALED = [
    op for op in OPS if op.name in ("low_rank", "bottleneck", "weight_norm", "prefix_attention", "multi_low_rank")
]


@pytest.mark.parametrize("op", SCALED, ids=lambda op: op.name)
def test_a_scale_that_would_get_no_gradient(op: Op) -> None:
    given, scale = large(op, "cpu"), torch.tensor(2.0, requires_grad=True)
    changed = {"scales": [scale] * len(given["scales"])} if "scales" in given else {"scale": scale}
    with pytest.raises(TypeError, match=f"{op.name}: the scale requires grad"):
        op.run(**(given | changed))


DROPPING = [op for op in OPS if op.name in ("low_rank", "bottleneck", "prefix_attention", "multi_low_rank")]


@pytest.mark.parametrize("seed", [3, torch.tensor([3], dtype=torch.int32), torch.tensor([3, 4])], ids=str)
@pytest.mark.parametrize("op", DROPPING, ids=lambda op: op.name)
def test_a_seed_that_is_none(op: Op, seed: Any) -> None:
    with pytest.raises(ValueError, match="want a tensor, int64"):
        op.run(**(large(op, "cpu") | {"p": 0.1, "seed": seed}))


@pytest.mark.parametrize("op", TRANSFORMED, ids=lambda op: op.name)
def test_integers(op: Op) -> None:
    given = large(op, "cpu")
    with pytest.raises(ValueError, match=r"dtype torch\.int64: want a floating-point one"):
        op.run(**(given | {op.rows[0]: given[op.rows[0]].to(torch.int64)}))


def test_the_dtype_does_not_depend_on_the_backend(backend: str) -> None:
    """base_out and residual keep theirs, and two adapter weights of two dtypes are taken in the wider one."""
    for op in ("low_rank", "multi_low_rank", "bottleneck"):
        skip_unless_runs(op, backend)
    device = device_of(backend)
    x, a, b, wide = (torch.randn(s, device=device) for s in ((9, 5, 64), (4, 64), (64, 4), (9, 5, 64)))
    half, c = x.bfloat16(), torch.rand(64, device=device)
    index = torch.zeros(9, dtype=torch.int64, device=device)
    bias = torch.randn(64, device=device)
    cases: list[tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]] = []
    for other, one in ((half, wide), (x, wide.bfloat16())):
        cases += [
            (ops.low_rank, low_rank_reference, (other, a, b), {"base_out": one}),
            (ops.low_rank, low_rank_reference, (other, a, b),
             {"base_out": one, "column_scale": c, "bias": bias}),
            (ops.multi_low_rank, multi_low_rank_reference, (other, [a], [b], index),
             {"base_out": one, "scales": [0.5]}),
            (ops.bottleneck, bottleneck_reference, (other, a, b), {"residual": one}),
        ]  # fmt: skip
    cases += [
        (ops.low_rank, low_rank_reference, (half, a, b.bfloat16()), {}),
        (ops.low_rank, low_rank_reference, (half, a.bfloat16(), b), {}),
        (ops.bottleneck, bottleneck_reference, (half, a.bfloat16(), b), {}),
    ]
    for run, reference, args, kwargs in cases:
        got, want = run(*args, **kwargs), reference(*args, **kwargs)
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_a_residual_of_f32_is_not_rounded_by_autocast(backend: str) -> None:
    skip_unless_runs("bottleneck", backend)
    device = device_of(backend)
    x, down, up = (
        torch.randn(40, 64, device=device),
        torch.randn(4, 64, device=device),
        torch.zeros(64, 4, device=device),
    )
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(ops.bottleneck(x, down, up, residual=x), x)


def test_backward_inside_autocast(backend: str) -> None:
    """The norm's products stay in f32."""
    skip_unless_runs("weight_norm", backend)
    if backend == "reference":
        pytest.skip("reference: its backward is PyTorch's own, which autocast follows")
    device = device_of(backend)
    weight, a, b = (torch.randn(s, device=device) for s in ((40, 64), (4, 64), (40, 4)))
    want, got = ((a.clone().requires_grad_(), b.clone().requires_grad_()) for _ in range(2))
    ops.weight_norm(weight, *want).sum().backward()
    with torch.autocast(device.type, torch.bfloat16):
        ops.weight_norm(weight, *got).sum().backward()
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_nan_is_not_hidden(backend: str) -> None:
    skip_unless_runs("weight_norm", backend)
    device = device_of(backend)
    weight, a, b = (torch.randn(s, device=device) for s in ((5, 7), (2, 7), (5, 2)))
    a[0, 0] = torch.nan
    a.requires_grad_()
    ops.weight_norm(weight, a, b).sum().backward()
    assert a.grad is not None and a.grad.isnan().all()


def test_ids_and_labels_of_any_integer_dtype(backend: str) -> None:
    skip_unless_runs("prompt_concat", backend)
    device = device_of(backend)
    prompt, table = torch.randn(3, 8, device=device), torch.randn(11, 8, device=device)
    ids = torch.randint(11, (2, 5), device=device)
    want = ops.prompt_concat(prompt, ids=ids, table=table, labels=ids)
    got = ops.prompt_concat(prompt, ids=ids.int(), table=table, labels=ids.int())
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype


def test_a_norm_bias_alone() -> None:
    x, down, up = torch.randn(3, 8), torch.randn(2, 8), torch.randn(8, 2)
    with pytest.raises(ValueError, match="norm_bias without norm_weight"):
        ops.bottleneck(x, down, up, norm_bias=torch.zeros(8))
    with pytest.raises(ValueError, match=r"norm_weight \(7,\): want \[K\] = \(8,\)"):
        ops.bottleneck(x, down, up, norm_weight=torch.zeros(7))
    with pytest.raises(ValueError, match=r"activation <.*>: want a name"):
        ops.bottleneck(x, down, up, activation=torch.relu)  # type: ignore[arg-type]


def test_a_node_is_named_after_its_op() -> None:
    skip_unless_runs("low_rank", "cpu")
    x, a, b = torch.randn(3, 8), torch.randn(2, 8, requires_grad=True), torch.randn(4, 2)
    with pk.use_backend("cpu"):
        assert type(ops.low_rank(x, a, b).grad_fn).__name__ == "LowRankBackward"


def in_threads(work: Callable[[int], None], count: int = 2) -> list[Exception]:
    """What `count` threads raise that switch as often as they can."""
    failures: list[Exception] = []

    def run(number: int) -> None:
        try:
            work(number)
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return failures


def test_threads_that_go_back_through_one_graph() -> None:
    skip_unless_runs("multi_low_rank", "cpu")
    x, a, b = (torch.randn(s, requires_grad=True) for s in ((6, 8), (2, 8), (4, 2)))
    with pk.use_backend("cpu"):
        loss = ops.multi_low_rank(x, [a], [b], torch.zeros(6, dtype=torch.int64), scales=[1.0]).sum()
    want = torch.autograd.grad(loss, (x, a, b), retain_graph=True)

    def work(_number: int) -> None:
        for _ in range(100):
            for got, wanted in zip(torch.autograd.grad(loss, (x, a, b), retain_graph=True), want, strict=True):
                assert torch.equal(got, wanted)

    assert in_threads(work) == []


def test_threads_that_share_a_cache() -> None:
    cache = ops.NormCache()
    weights = [torch.randn(4, 6), torch.randn(4, 6)]
    a, b = torch.randn(2, 6), torch.randn(4, 2)
    want = [ops.weight_norm(weight, a, b) for weight in weights]

    def work(number: int) -> None:
        for _ in range(1000):
            torch.testing.assert_close(cache(weights[number], a, b), want[number])

    with pk.use_backend("reference"):  # Triton's interpreter is not made for threads
        assert in_threads(work) == []
