"""Many adapters in one batch: sorted or not, none, without rows, of any ranks; one adapter is low_rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import peftkern as pk
from peftkern import dispatch, ops
from peftkern.errors import BackendError
from peftkern.memory import saved_bytes
from peftkern.ops._adapters import table
from peftkern.ops._op import every
from peftkern.testing import assert_as_good_as_torch, relative_error

from .conftest import device_of, skip_unless_runs

OP = next(op for op in every() if op.name == "multi_low_rank")
SEED = 20240613
Adapters = tuple[list[Tensor], list[Tensor]]


def adapters(ranks: list[int], k: int, n: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Adapters:
    torch.manual_seed(sum(ranks))
    a = [torch.randn(r, k, device=device).div(k**0.5).to(dtype).requires_grad_() for r in ranks]
    b = [torch.randn(n, r, device=device).div(r**0.5).to(dtype).requires_grad_() for r in ranks]
    return a, b


def numbers(index: list[int] | Tensor, device: torch.device) -> Tensor:
    return torch.as_tensor(index, dtype=torch.int64, device=device)


def row_by_row(
    x: Tensor, a: list[Tensor], b: list[Tensor], index: Tensor, scales: list[float], weight: Tensor
) -> Tensor:
    """Each row alone: independent of every grouping."""
    base = x @ weight.T
    rows = [base[m] if i < 0 else base[m] + scales[i] * (b[i] @ (a[i] @ x[m])) for m, i in enumerate(index.tolist())]
    return torch.stack(rows)


ORDERS = {
    "sorted": lambda m, g: sorted(i % (g + 1) - 1 for i in range(m)),
    "reversed": lambda m, g: sorted((i % (g + 1) - 1 for i in range(m)), reverse=True),
    "round robin": lambda m, g: [i % g for i in range(m)],
    "shuffled": lambda m, g: (torch.randperm(m, generator=torch.Generator().manual_seed(m)) % (g + 1) - 1).tolist(),
    "one for all": lambda m, g: [g - 1] * m,
    "first and last": lambda m, g: [0, *[-1] * (m - 2), g - 1] if m > 1 else [0],
}


@pytest.mark.parametrize("order", ORDERS)
# Around the edges of 3 and 4 rows, of 16 lanes, of 48 rows that are few, and of blocks of 16 to 64 rows.
@pytest.mark.parametrize("m", [1, 2, 3, 5, 16, 17, 49, 98, 150])
def test_orders_and_row_counts(order: str, m: int, backend: str) -> None:
    skip_unless_runs("multi_low_rank", backend)
    device = device_of(backend)
    ranks, k, n = [1, 7, 8, 33], 49, 51
    index = numbers(ORDERS[order](m, len(ranks)), device)
    a, b = adapters(ranks, k, n, device)
    x, weight = torch.randn(m, k, device=device, requires_grad=True), torch.randn(n, k, device=device)
    scales = [1.0, -2.0, 0.5, 3.0]
    want = row_by_row(x, a, b, index, scales, weight)
    got = ops.multi_low_rank(x, a, b, index, scales=scales, weight=weight)
    assert relative_error(got, want) < 1e-5
    dy = torch.randn_like(want)
    leaves = [x, *a, *b]
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, dy), torch.autograd.grad(want, leaves, dy, allow_unused=True), strict=True
    ):
        assert relative_error(mine, torch.zeros_like(mine) if theirs is None else theirs) < 1e-5


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("m", [3, 70])
def test_one_adapter_is_low_rank(m: int, p: float, backend: str) -> None:
    """The dropout mask is the same too, though rows are grouped: it is drawn by a row's place in the batch."""
    skip_unless_runs("multi_low_rank", backend)
    device = device_of(backend)
    a, b = adapters([6, 5], 40, 24, device)
    x, weight = torch.randn(m, 40, device=device, requires_grad=True), torch.randn(24, 40, device=device)
    seed = torch.tensor([SEED], device=device) if p else None
    alone = ops.low_rank(x, a[1], b[1], scale=2.0, weight=weight, p=p, seed=seed)
    every = ops.multi_low_rank(x, a, b, numbers([1] * m, device), scales=[1.0, 2.0], weight=weight, p=p, seed=seed)
    assert relative_error(every, alone) < 1e-6
    some = numbers([1 if i % 3 else 0 for i in range(m)], device)
    mixed = ops.multi_low_rank(x, a, b, some, scales=[1.0, 2.0], weight=weight, p=p, seed=seed)
    assert relative_error(mixed[some == 1], alone[some == 1]) < 1e-6
    dy = torch.randn_like(alone)
    for mine, theirs in zip(
        torch.autograd.grad(every, (x, a[1], b[1]), dy), torch.autograd.grad(alone, (x, a[1], b[1]), dy), strict=True
    ):
        assert relative_error(mine, theirs) < 1e-5


@pytest.mark.parametrize("ranks", [[1] * 5, [70, 1, 16, 64, 3], [17], [128, 130, 2]], ids=str)
def test_ranks(ranks: list[int], backend: str) -> None:
    skip_unless_runs("multi_low_rank", backend)
    device = device_of(backend)
    a, b = adapters(ranks, 33, 100, device)
    x = torch.randn(21, 33, device=device)
    index = numbers([i % (len(ranks) + 1) - 1 for i in range(21)], device)
    weight = torch.zeros(100, 33, device=device)
    want = row_by_row(x, a, b, index, [1.0] * len(ranks), weight)
    assert relative_error(ops.multi_low_rank(x, a, b, index, scales=[1.0] * len(ranks)), want) < 1e-5


def test_an_adapter_without_rows_gets_zero_gradients(backend: str) -> None:
    skip_unless_runs("multi_low_rank", backend)
    device = device_of(backend)
    a, b = adapters([4, 6, 5], 32, 16, device)
    x = torch.randn(60, 32, device=device)
    for index in ([0, 2] * 30, [-1] * 60):
        out = ops.multi_low_rank(x, a, b, numbers(index, device), scales=[1.0] * 3)
        grads = torch.autograd.grad(out.sum(), [*a, *b])
        assert not grads[1].any() and not grads[4].any()
        assert bool(grads[0].any()) is (0 in index)


def test_only_the_gradients_that_are_wanted(backend: str) -> None:
    """A frozen adapter among others, and a frozen input."""
    skip_unless_runs("multi_low_rank", backend)
    device = device_of(backend)
    a, b = adapters([4, 6], 32, 16, device)
    a[0].requires_grad_(False)
    b[1].requires_grad_(False)
    x = torch.randn(10, 32, device=device)
    ops.multi_low_rank(x, a, b, numbers([0, 1] * 5, device), scales=[1.0, 1.0]).sum().backward()
    assert (a[0].grad, b[1].grad, x.grad) == (None, None, None)
    assert a[1].grad is not None and b[0].grad is not None


def test_a_nan_stays_in_its_row_and_adapter(backend: str) -> None:
    skip_unless_runs("multi_low_rank", backend)
    device = device_of(backend)
    for m in (6, 120):
        a, b = adapters([4, 6], 32, 16, device)
        x = torch.randn(m, 32, device=device)
        x[1] = torch.nan
        out = ops.multi_low_rank(x, a, b, numbers([0, 1] * (m // 2), device), scales=[1.0, 1.0])
        assert out[1].isnan().all() and out[[i for i in range(m) if i != 1]].isfinite().all()
        grads = torch.autograd.grad(out.sum(), [*a, *b])
        assert grads[0].isfinite().all() and grads[2].isfinite().all() and grads[1].isnan().any()


def test_adapters_of_several_dtypes_meet_in_the_widest(backend: str) -> None:
    skip_unless_runs("multi_low_rank", backend, torch.bfloat16)
    device = device_of(backend)
    (a0,), (b0,) = adapters([4], 32, 16, device, torch.bfloat16)
    (a1,), (b1,) = adapters([6], 32, 16, device)
    x = torch.randn(9, 32, device=device, dtype=torch.bfloat16)
    out = ops.multi_low_rank(x, [a0, a1], [b0, b1], numbers([0, 1, -1] * 3, device), scales=[1.0, 1.0])
    grads = torch.autograd.grad(out.float().sum(), [a0, a1, b0, b1])
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32] * 2
    assert out.dtype == torch.bfloat16 and not out[2].any() and out[:2].any()


def test_weights_in_other_layouts(backend: str) -> None:
    """A transposed or strided A is read right, and its gradient has its shape."""
    skip_unless_runs("multi_low_rank", backend)
    device = device_of(backend)
    a = [
        torch.randn(32, 4, device=device).T.requires_grad_(),
        torch.randn(6, 64, device=device)[:, ::2].requires_grad_(),
    ]
    b = [
        torch.randn(4, 16, device=device).T.requires_grad_(),
        torch.randn(16, 12, device=device)[:, 1::2].requires_grad_(),
    ]
    x, index = torch.randn(8, 32, device=device), numbers([0, 1] * 4, device)
    want = row_by_row(x, a, b, index, [1.0, 1.0], torch.zeros(16, 32, device=device))
    got = ops.multi_low_rank(x, a, b, index, scales=[1.0, 1.0])
    assert relative_error(got, want) < 1e-5
    for mine, theirs in zip(
        torch.autograd.grad(got.square().sum(), [*a, *b]),
        torch.autograd.grad(want.square().sum(), [*a, *b]),
        strict=True,
    ):
        assert relative_error(mine, theirs) < 1e-5


def test_saved_bytes(backend: str) -> None:
    """x once and [M, largest R] in f32; dropout adds its seed."""
    skip_unless_runs("multi_low_rank", backend)
    if backend == "reference":
        pytest.skip("reference: plain autograd saves what it likes")
    device = device_of(backend)
    a, b = adapters([4, 6], 32, 16, device)
    x = torch.randn(10, 32, device=device, requires_grad=True)
    weight, index = torch.randn(16, 32, device=device), numbers([0, 1] * 5, device)
    saved = saved_bytes(
        lambda: ops.multi_low_rank(x, a, b, index, scales=[1.0, 1.0], weight=weight, p=0.1), [*a, *b, weight]
    )
    assert saved == 4 * 10 * 32 + 4 * 10 * 6 + 8 * 10 + 8


def test_weights_that_have_moved_are_read_where_they_are_now(backend: str) -> None:
    """The table is kept by address and size: an update in place, a new tensor, another scale must all show."""
    skip_unless_runs("multi_low_rank", backend)
    device = device_of(backend)
    a, b = adapters([4, 6], 32, 16, device)
    x, index = torch.randn(8, 32, device=device), numbers([0, 1] * 4, device)

    def run(scale: float = 1.0) -> Tensor:
        with torch.no_grad():
            return ops.multi_low_rank(x, a, b, index, scales=[scale, 1.0])

    first = run()
    with torch.no_grad():
        a[0].mul_(2.0)
    torch.testing.assert_close(run()[::2], 2 * first[::2])
    torch.testing.assert_close(run(3.0)[::2], 6 * first[::2])
    a[1] = (a[1] * 0.5).detach()
    torch.testing.assert_close(run()[1::2], 0.5 * first[1::2])


def test_the_table_copies_no_weight() -> None:
    a, b = adapters([4, 6], 32, 16, torch.device("cpu"))
    one, two = table(a, b, [1.0, 1.0]), table(a, b, [1.0, 1.0])
    assert one.cells is two.cells and one.cells.numel() == 2 * 5 and one.sizes == (6, 10, 0, one.sizes[3])
    assert one.cells[:, 0].tolist() == [t.data_ptr() for t in a]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no adapter": ({"a": [], "b": [], "scales": []}, "at least one"),
    "a scale too few": ({"scales": [1.0]}, "2 a, 2 b, 1 scales"),
    "another K": ({"a": [torch.ones(4, 32), torch.ones(6, 31)]}, r"want x \[..., K\]"),
    "another N": ({"b": [torch.ones(16, 4), torch.ones(15, 6)]}, r"want x \[..., K\]"),
    "ranks that differ": ({"b": [torch.ones(16, 6), torch.ones(16, 4)]}, r"want x \[..., K\]"),
    "an index too long": ({"index": torch.zeros(9, dtype=torch.int64)}, r"index torch.int64 \(9,\)"),
    "an index of another dtype": ({"index": torch.zeros(8, dtype=torch.int32)}, "index torch.int32"),
    "an index per column": ({"index": torch.zeros(8, 32, dtype=torch.int64)}, r"leading dimensions \(8,\)"),
    "a bias alone": ({"bias": torch.ones(16)}, "together with weight"),
    "a weight of another shape": ({"weight": torch.ones(32, 16)}, r"want \[N, K\]"),
    "two bases": ({"weight": torch.ones(16, 32), "base_out": torch.ones(8, 16)}, "without weight"),
    "p of 1": ({"p": 1.0}, "0 <= p < 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    changes, message = WRONG[case]
    good = {
        "x": torch.ones(8, 32), "a": [torch.ones(4, 32), torch.ones(6, 32)],
        "b": [torch.ones(16, 4), torch.ones(16, 6)], "index": torch.zeros(8, dtype=torch.int64), "scales": [1.0, 1.0],
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.multi_low_rank(**(good | changes))


@pytest.mark.parametrize("value", [2, -2, 1 << 40])
def test_an_index_out_of_range(value: int, backend: str) -> None:
    """The CPU says so; elsewhere nothing is waited for and nothing read out of bounds: the row has no adapter."""
    skip_unless_runs("multi_low_rank", backend)
    device = device_of(backend)
    a, b = adapters([4, 6], 32, 16, device)
    x, index = torch.randn(3, 32, device=device), numbers([0, value, 1], device)
    if backend in ("cpu", "reference"):
        with pytest.raises(RuntimeError, match=rf"index\[1\] is {value}, want -1 to 1"):
            ops.multi_low_rank(x, a, b, index, scales=[1.0, 1.0])
    else:
        out = ops.multi_low_rank(x, a, b, index, scales=[1.0, 1.0])
        assert not out[1].any() and out[0].any() and out[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_large_enough_for_every_block(dtype: torch.dtype, backend: str) -> None:
    skip_unless_runs("multi_low_rank", backend, dtype)
    device = device_of(backend)
    m = 300
    index = torch.randint(-1, 3, (m,), generator=torch.Generator().manual_seed(3)).to(device)
    a, b = adapters([16, 40, 3], 200, 130, device)
    flat = {f"a{i}": t.detach() for i, t in enumerate(a)} | {f"b{i}": t.detach() for i, t in enumerate(b)}
    case = {"x": torch.randn(m, 200, device=device).to(dtype), "index": index, "scales": [1.0, 0.5, 2.0], **flat}
    case |= {"p": 0.1, "seed": torch.tensor([SEED], device=device)}
    assert_as_good_as_torch(OP.reference, OP.run, case, grads=["x", *flat])


def test_a_backend_without_backward_is_left_out_where_a_gradient_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernel serves decoding: few rows and no graph. Played on the CPU by a backend of the same kind."""
    serving = dispatch.Backend("cuda", lambda *_args: None, dispatch._no_backward, _few_rows, trains=False)
    loaded = {"cuda": serving, "triton": "no GPU here", "cpu": "not built"}
    monkeypatch.setattr(dispatch, "load", lambda name, _op: loaded[name])
    dispatch._choose.cache_clear()
    device, f32 = torch.device("cuda"), torch.float32
    assert dispatch.choose("multi_low_rank", device, f32, M=8) == "cuda"
    assert dispatch.choose("multi_low_rank", device, f32, M=65) == "reference"
    assert dispatch.choose("multi_low_rank", device, f32, True, M=8) == "reference"
    with pk.use_backend("cuda"), pytest.raises(BackendError, match="no backward"):
        dispatch.choose("multi_low_rank", device, f32, True, M=8)
    dispatch._choose.cache_clear()


def _few_rows(device: torch.device, dtype: torch.dtype, **dims: int) -> str | None:
    return dispatch._too_many_rows(64, device, dtype, **dims)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_cuda_kernel_without_a_graph(dtype: torch.dtype, weights: torch.dtype) -> None:
    device = device_of("cuda")
    if (reason := dispatch._refusal("cuda", "multi_low_rank", device, dtype)) is not None:
        pytest.skip(f"cuda multi_low_rank: {reason}")
    for m, k, n, ranks in (
        (1, 17, 19, [1]),
        (7, 33, 29, [5, 1, 70]),
        (32, 256, 520, [16] * 16),
        (64, 768, 768, [8, 8, 40]),
    ):
        order = torch.randperm(m)
        a, b = adapters(ranks, k, n, device, weights)
        x, base = torch.randn(m, k, device=device).to(dtype), torch.randn(m, n, device=device).to(dtype)
        flat = {f"a{i}": t.detach() for i, t in enumerate(a)} | {f"b{i}": t.detach() for i, t in enumerate(b)}
        # Evenly among the adapters and none, or one row each and all others to the last.
        for index in (order % (len(ranks) + 1), order.clamp(max=len(ranks))):
            case = {"x": x, "index": (index - 1).to(device), "scales": [0.5] * len(ranks), "base_out": base, **flat}
            with torch.no_grad(), pk.use_backend("cuda"):
                assert_as_good_as_torch(OP.reference, OP.run, case, grads=())
