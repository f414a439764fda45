"""What only the Triton backend has: its hash, its split products, its refusals, its tiles."""

from __future__ import annotations

import math

import pytest
import torch

from peftkern.ops import dropout

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language", reason="triton is not installed")

from peftkern.kernels._column import Gradients  # noqa: E402

from peftkern.kernels import _common, _device, _dropout, _tiles, bottleneck, column_scale, low_rank, prompt_concat  # noqa: E402

GPU = torch.cuda.is_available() and not _common.INTERPRETED
DEVICE = torch.device("cuda" if GPU else "cpu")
needs_launch = pytest.mark.skipif(
    not (GPU or _common.INTERPRETED), reason="no GPU, and TRITON_INTERPRET=1 is not set: no Triton kernel can run"
)


@triton.jit
def _keep_kernel(seed_ptr, out_ptr, row, col, threshold, ROWS: tl.constexpr, COLS: tl.constexpr, ANY: tl.constexpr):
    rows = row + tl.arange(0, ROWS)
    cols = col + tl.arange(0, COLS)
    key1, key2 = _dropout.row_keys(seed_ptr, rows)
    if ANY:
        keep = _dropout.keep_mask_at(key1, key2, cols, threshold)
    else:
        keep = _dropout.keep_mask(key1, key2, cols, threshold)
    offsets = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(out_ptr + offsets, keep.to(tl.int32))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    tl.store(out_ptr + offsets, _common.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets), acc, PRECISION))


@triton.jit
def _act_kernel(x_ptr, out_ptr, grad_ptr, ACT: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, _common.activation(x, ACT))
    tl.store(grad_ptr + offsets, _common.activation_grad(x, ACT))


@triton.jit
def _round_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, _common.round_to(tl.load(x_ptr + offsets), out_ptr.dtype.element_ty))


@needs_launch
@pytest.mark.parametrize("seed", [0, 1, -1, 1234567890123, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9999])
def test_hash_is_the_reference_bit_for_bit(seed: int, p: float) -> None:
    rows, cols, row = 16, 64, 7
    seed_tensor = torch.tensor([seed], device=DEVICE)
    out = torch.empty(rows, cols, dtype=torch.int32, device=DEVICE)
    drop = _dropout.dropout_args(p, seed_tensor)
    for col in (65536 - 32, 65536 - 33):  # only `keep_mask_at` may begin with an odd column
        any_column = bool(col % 2)
        _keep_kernel[(1,)](drop.seed, out, row, col, drop.threshold, ROWS=rows, COLS=cols, ANY=any_column)
        hashes = dropout.random_bits(seed_tensor, row + rows, col + cols)[row:, col:]
        assert torch.equal(out.bool(), hashes >= dropout.threshold(p))


@pytest.mark.parametrize(("p", "seed"), [(-0.1, torch.tensor([1])), (1.0, torch.tensor([1])), (0.1, None)])
def test_dropout_arguments_are_checked(p: float, seed: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="p"):
        _dropout.dropout_args(p, seed)


@needs_launch
@pytest.mark.parametrize("dtypes", ["bf16-f32", "f16-f32", "f32-bf16", "f32-f32", "f16-bf16"])
@pytest.mark.parametrize(("name", "bits"), [("split", 14), ("split3", 22)])
def test_split_products_keep_their_bits(dtypes: str, name: str, bits: int) -> None:
    kinds = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
    a, b = (torch.randn(32, 32).to(DEVICE, kinds[kind]) for kind in dtypes.split("-"))
    out = torch.full((32, 32), math.nan, device=DEVICE)
    _dot_kernel[(1,)](a, b, out, PRECISION=name, SIZE=32)
    exact = a.double() @ b.double()
    budget = 2.0**-bits * (a.double().abs() @ b.double().abs())
    assert ((out.double() - exact).abs() <= budget).all()


@needs_launch
@pytest.mark.parametrize("act", ["relu", "gelu", "silu", "tanh"])
def test_activations_and_their_gradients(act: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 248), torch.tensor([0.0, 1e-6, -1e-6, 0.5, -0.5, 30.0, -30.0, 1e-30])])
    x = x.to(DEVICE)
    out, grad = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    _act_kernel[(1,)](x, out, grad, ACT=act, SIZE=256)
    function = getattr(torch.nn.functional, act)
    exact = x.double().requires_grad_(True)
    value = function(exact)
    value.sum().backward()
    # 1 + erf cancels for large negative x, in torch as well: the absolute part of the budget.
    budget = {"rtol": 4e-6, "atol": 1e-6} if act == "gelu" else {"rtol": 2e-6, "atol": 1e-11}
    torch.testing.assert_close(out.double(), value.detach(), **budget)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=4e-6, atol=1e-6)


@needs_launch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_to_nearest_even(dtype: torch.dtype) -> None:
    step = torch.finfo(dtype).eps
    ties = 1.0 + step * torch.arange(0, 32) / 4
    x = torch.cat([ties, -ties, torch.randn(60), torch.tensor([math.inf, -math.inf, math.nan, 0.0])]).to(DEVICE)
    out = torch.empty(128, dtype=dtype, device=DEVICE)
    _round_kernel[(1,)](x, out, SIZE=128)
    torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "module", [low_rank, bottleneck, prompt_concat, column_scale], ids=lambda module: module.__name__
)
def test_refusals_say_what_came(module) -> None:
    assert "float64" in module.refuse(torch.device("cpu"), torch.float64)
    assert "meta" in module.refuse(torch.device("meta"), torch.float32)
    reason = module.refuse(torch.device("cpu"), torch.float32)
    assert reason is None if _common.INTERPRETED else "TRITON_INTERPRET" in reason
    if _common.INTERPRETED or GPU:
        assert module.refuse(DEVICE, torch.bfloat16, M=5, R=3) is None
        assert "2147483648" in module.refuse(DEVICE, torch.bfloat16, M=2**31)


def test_tf32_only_where_torch_allows_it() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        allowed = _common.precision(torch.float32, torch.float32)
        matmul.fp32_precision = "ieee"
        assert _common.precision(torch.float32, torch.bfloat16) == "ieee"
    finally:
        matmul.fp32_precision = before
    assert allowed == ("tf32" if torch.version.hip is None else "ieee")
    assert _common.precision(torch.bfloat16, torch.bfloat16) == "bf16"
    assert _common.precision(torch.float16, torch.float32) == "split"


@pytest.mark.parametrize("name", ["row", "expand", "column", "both"])
@pytest.mark.parametrize("precision", ["bf16", "fp16", "split", "ieee", "tf32"])
def test_every_rank_has_a_tile(name: str, precision: str) -> None:
    for arch in ("sm80", "sm90", "sm100", "gfx942", "one of tomorrow"):
        for rank in (1, 15, 16, 17, 64, 65, 128, 129, 1000):
            if name == "both" and precision in ("ieee", "tf32") and rank > 64:
                continue  # f32 of large rank takes a pass for each product
            tile = _tiles.tile(name, precision, rank, arch)
            assert all(size & (size - 1) == 0 and size >= 16 for size in tile[:3])
            assert _tiles.row_block_m(1, tile, 132) == 16


def test_an_op_may_override_the_rows_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = _tiles.tile("row", "bf16", 128, "one of tomorrow")
    assert _tiles.tile("some_op/row", "bf16", 128, "one of tomorrow") == shared
    monkeypatch.setitem(_tiles._OVERRIDES, ("one of tomorrow", "some_op/row", "half"), {128: (32, 32, 128, 8, 2)})
    _tiles.tile.cache_clear()
    assert _tiles.tile("some_op/row", "bf16", 128, "one of tomorrow") == (32, 32, 128, 8, 2)
    assert _tiles.tile("row", "bf16", 128, "one of tomorrow") == shared
    _tiles.tile.cache_clear()


@needs_launch
def test_gradients_over_many_row_splits() -> None:
    """Uneven splits, then the reduction over a workspace whose slots are not aligned."""
    m, k, n, r = 331, 37, 29, 3
    x, dy = torch.randn(m, k, device=DEVICE), torch.randn(m, n, device=DEVICE)
    a, b = torch.randn(r, k, device=DEVICE), torch.randn(n, r, device=DEVICE)
    assert _common.INTERPRETED is False or Gradients(x, [k, n], [(r, k), (n, r)], "ieee", r).splits > 1
    h = (x @ a.T).contiguous()
    for need_a, need_b in ((True, True), (True, False), (False, True)):
        dx = torch.zeros_like(x)
        da, db = low_rank.backward(dy, x, a, b, h, dx, 0.5, 0.0, None, need_a, need_b)
        dh = 0.5 * (dy.double() @ b.double())
        torch.testing.assert_close(dx.double(), dh @ a.double(), rtol=1e-5, atol=1e-4)
        assert (da is None, db is None) == (not need_a, not need_b)
        if da is not None:
            torch.testing.assert_close(da.double(), dh.T @ x.double(), rtol=1e-5, atol=1e-3)
        if db is not None:
            torch.testing.assert_close(db.double(), 0.5 * dy.double().T @ h.double(), rtol=1e-5, atol=1e-3)


@needs_launch
def test_unknown_ids_become_nan_rows() -> None:
    ids = torch.tensor([[0, 3, -1, 2]], device=DEVICE)
    table, prompt = torch.ones(3, 5, device=DEVICE), torch.zeros(1, 5, device=DEVICE)
    embeds, *_ = prompt_concat.forward(ids, table, prompt, torch.ones_like(ids), None)
    assert embeds[0].isnan().any(1).tolist() == [False, False, True, True, False]


def test_recording_launches_nothing_and_ends() -> None:
    x, weight = torch.empty(64, 32, device="meta"), torch.empty(4, 32, device="meta")
    with _device.recording(_device.Device("sm90", 132, 50 << 20)) as launches:
        up, y = torch.empty(16, 4, device="meta"), torch.empty(64, 16, device="meta")
        low_rank.forward(x, weight, up, y, 1.0, 0.0, None)
    assert [launch.kernel.fn.__name__ for launch in launches] == ["row_kernel", "expand_kernel"]
    assert not _device.is_recording()
