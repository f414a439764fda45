"""The compiled CPU kernels on their own: instruction sets, threads, strides, block edges and bad arguments."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import peftkern as pk
from peftkern import dispatch
from peftkern.ops._op import Op, every
from peftkern.ops.dropout import keep_scale, random_bits, threshold
from peftkern.testing import assert_as_good_as_torch

C = pytest.importorskip("peftkern._C", reason="the compiled extension is not built")

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16")
AVAILABLE = LEVELS[: LEVELS.index(C.cpu_capability()) + 1]
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float16),
]
# Rounding steps of one value: f32 sums; half results; half operands of pair products.
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
SEED = torch.tensor([987654321987])
ops = torch.ops.peftkern_cpu


@pytest.fixture(autouse=True)
def _lift_force() -> Iterator[None]:
    yield
    C.force_isa(None)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def rand_like(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def mask(m: int, c: int, p: float) -> Tensor:
    if p == 0.0:
        return torch.ones(m, c, dtype=torch.float64)
    return (random_bits(SEED, m, c) >= threshold(p)).double() * keep_scale(p)


def assert_near(got: Tensor, want: Tensor, epsilon: float) -> None:
    """Errors below epsilon of a typical magnitude; sums over up to a few hundred terms."""
    assert got.shape == want.shape
    error = (got.double() - want).abs().max().item()
    assert error <= epsilon * (want.abs().mean() + 0.1 * want.abs().max()).item() * 4


def tolerances(isa: str, t: torch.dtype, p: torch.dtype) -> tuple[float, float]:
    """(of results in t, of f32 gradients): bf16 pairs round what they multiply."""
    pairs = isa == "avx512_bf16" and t == p == torch.bfloat16
    return EPSILON[t], EPSILON[torch.bfloat16] if pairs else 5e-6


def low_rank_case(m: int, k: int, n: int, r: int, t: torch.dtype, p: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(m * 7 + k)
    a, b = rand(r, k, dtype=p) / k**0.5, rand(n, r, dtype=p) / r**0.5
    return rand(m, k, dtype=t), a, b, rand(m, n, dtype=t), rand(m, n, dtype=t), rand(m, k, dtype=t)


# Around every edge: 3 rows, 8 columns of a tile, 16 lanes, 48 and 96 columns of a block, 48 and 64 rows of a chunk.
SIZES = [(1, 1, 1, 1), (2, 15, 17, 3), (47, 48, 49, 4), (48, 96, 95, 8), (49, 97, 144, 9), (64, 33, 31, 5)]
SIZES += [(65, 200, 130, 13), (130, 47, 193, 33), (97, 600, 64, 130)]
# B larger than its share of the L2 cache: expand then goes down the rows of one panel after the other.
SIZES += [(17, 33, 800, 130)]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("t", "w"), PAIRS, ids=str)
@pytest.mark.parametrize("isa", AVAILABLE)
def test_low_rank_matches_float64(isa: str, t: torch.dtype, w: torch.dtype, p: float) -> None:
    C.force_isa(isa)
    half, grad = tolerances(isa, t, w)
    for m, k, n, r in SIZES:
        x, a, b, y, dy, dx = low_rank_case(m, k, n, r, t, w)
        dropped, x64, a64, b64, dy64 = mask(m, k, p), x.double(), a.double(), b.double(), dy.double()
        out, d_in = y.clone(), dx.clone()
        h = ops.low_rank_forward(x, a, b, out, 0.7, p, SEED)
        da, db = ops.low_rank_backward(dy, x, a, b, h, d_in, 0.7, p, SEED, True, True)
        h64, dh64 = (x64 * dropped) @ a64.T, 0.7 * dy64 @ b64
        assert_near(h, h64, 2e-6)
        assert_near(out, y.double() + 0.7 * h64 @ b64.T, half)
        assert_near(d_in, dx.double() + dropped * (dh64 @ a64), half)
        assert_near(da, dh64.T @ (x64 * dropped), grad)
        assert_near(db, 0.7 * dy64.T @ h64, grad)


COMPILED = [op for op in every() if hasattr(ops, f"{op.name}_forward")]


@pytest.mark.parametrize("t", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", COMPILED, ids=lambda op: op.name)
@pytest.mark.parametrize("isa", AVAILABLE)
def test_every_op_matches_float64_on_every_instruction_set(isa: str, op: Op, t: torch.dtype) -> None:
    C.force_isa(isa)
    with pk.use_backend("cpu"):
        for name, kwargs in op.samples(torch.device("cpu"), t):
            floating = [k for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()]
            grads = [key for key in floating if key not in op.frozen] if dispatch.load("cpu", op.name).trains else []  # type: ignore[union-attr]
            try:
                assert_as_good_as_torch(op.reference, op.run, kwargs, grads=grads, factor=op.factor)
            except AssertionError as error:
                raise AssertionError(f"{op.name}, {isa}, case {name}: {error}") from error


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("t", "w"), PAIRS, ids=str)
@pytest.mark.parametrize("isa", AVAILABLE)
def test_few_rows_match_float64(isa: str, t: torch.dtype, w: torch.dtype, p: float) -> None:
    """Up to four rows take a path of their own; five do not. With and without what is there, scale and shift."""
    C.force_isa(isa)
    for m in (1, 2, 4, 5):
        for k, n, r in ((1, 1, 1), (15, 17, 3), (64, 64, 8), (33, 50, 21)):
            x, a, b, y, _, _ = low_rank_case(m, k, n, r, t, w)
            column, shift = rand(n), rand(n)
            h64 = (x.double() * mask(m, k, p)) @ a.double().T
            update = 0.7 * h64 @ b.double().T
            out = y.clone()
            h = ops.low_rank_forward(x, a, b, out, 0.7, p, SEED)
            assert_near(h, h64, 2e-6)
            assert_near(out, y.double() + update, EPSILON[t])
            ops.low_rank_forward(x, a, b, out, 0.7, p, SEED, y, column, shift)
            assert_near(out, column.double() * (y.double() + update) + shift.double(), EPSILON[t])
            out.fill_(torch.nan)
            ops.low_rank_forward(x, a, b, out, 0.7, p, SEED, None, None, shift, True)
            assert_near(out, update + shift.double(), EPSILON[t])


ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("isa", AVAILABLE)
def test_bottleneck_matches_float64(isa: str, act: str, p: float) -> None:
    C.force_isa(isa)
    for (t, w), (m, k, n, r) in zip(PAIRS * 2, SIZES, strict=False):
        half, grad = tolerances(isa, t, w)
        x, down, up, residual, dy, _ = low_rank_case(m, k, n, r, t, w)
        down_bias, up_bias = rand(r, dtype=w), rand(n, dtype=w)
        leaves = [v.double().requires_grad_() for v in (x, down, down_bias, up, up_bias)]
        pre64 = leaves[0] @ leaves[1].T + leaves[2]
        branch = mask(m, n, p) * 0.7 * (ACTIVATIONS[act](pre64) @ leaves[3].T + leaves[4])
        y, pre = ops.bottleneck_forward(x, down, down_bias, up, up_bias, residual, act, 0.7, p, SEED)
        assert_near(pre, pre64.detach(), 2e-6)
        assert_near(y, (residual.double() + branch).detach(), half)
        wanted = torch.autograd.grad(branch, leaves, dy.double())
        got = ops.bottleneck_backward(dy, x, pre, down, up, act, 0.7, p, SEED, False, True)
        assert_near(got[0], wanted[0], half)
        # A pre-activation on relu's kink may fall on the other side of it in f32.
        limit = 4 * grad if w == torch.float32 else 4 * max(grad, EPSILON[w])
        for one, want in zip(got[1:], wanted[1:], strict=True):
            assert one.dtype == w
            assert_near(one, want, limit)
        if n == k:
            dx = ops.bottleneck_backward(dy, x, pre, down, up, act, 0.7, p, SEED, True, True)[0]
            assert_near(dx, wanted[0] + dy.double(), half)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("isa", AVAILABLE)
def test_activations_hold_over_the_whole_range(isa: str, act: str) -> None:
    C.force_isa(isa)
    special = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 90.0, -90.0, 1e4, -1e4, torch.nan])
    x = torch.cat([torch.linspace(-30, 30, 4001), special])
    one, zero = torch.ones(1, 1), torch.zeros(1)
    y, pre = ops.bottleneck_forward(x[:, None], one, zero, one, zero, None, act, 1.0, 0.0, None)
    x64 = x.double().requires_grad_()
    want = ACTIVATIONS[act](x64)
    (slope,) = torch.autograd.grad(want.sum(), x64)
    dx = ops.bottleneck_backward(torch.ones_like(y), x[:, None], pre, one, one, act, 1.0, 0.0, None, False, True)[0]
    torch.testing.assert_close(y[:, 0].double(), want.detach(), rtol=2e-6, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(dx[:, 0].double(), slope, rtol=2e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(("act", "lowest"), [("silu", -80.0), ("gelu", -12.0)])
@pytest.mark.parametrize("isa", AVAILABLE)
def test_tails_are_as_exact_as_the_middle(isa: str, act: str, lowest: float) -> None:
    """Values down to 1e-33 to a few parts in a million, where an absolute tolerance would take 0 for them."""
    C.force_isa(isa)
    x, one, zero = torch.linspace(lowest, -4.0, 2001)[:, None], torch.ones(1, 1), torch.zeros(1)
    y, _ = ops.bottleneck_forward(x, one, zero, one, zero, None, act, 1.0, 0.0, None)
    x = x.double()
    # 1 + erf, as torch writes gelu, cancels there even in f64.
    want = F.silu(x) if act == "silu" else 0.5 * x * torch.special.erfc(-x / 2**0.5)
    torch.testing.assert_close(y.double(), want, rtol=2e-5, atol=0)


def hard_to_round(t: torch.dtype) -> Tensor:
    """f32: every value of a half dtype, what lies halfway between two of them, and right beside that."""
    exact = torch.arange(2**15, dtype=torch.int16).view(t)
    exact = exact[exact.isfinite()].double()
    following = torch.cat([exact[1:], 2 * exact[-1:] - exact[-2:-1]])
    halfway = ((exact + following) / 2).float()
    above, below = (torch.nextafter(halfway, torch.tensor(end)) for end in (torch.inf, 0.0))
    # Rounding a NaN of ones as if it were a number carries into the sign.
    ones = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)
    positive = torch.cat([exact.float(), halfway, above, below, torch.tensor([torch.inf, torch.nan]), ones])
    return torch.cat([positive, -positive])


def assert_same_numbers(got: Tensor, want: Tensor, flushed: bool = False) -> None:
    """Every bit but those of a NaN; with `flushed` what is subnormal before it is rounded may be zero."""
    there = ~((want.abs() <= torch.finfo(want.dtype).tiny) & (want != 0) & flushed)
    torch.testing.assert_close(got[there], want[there], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("t", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", AVAILABLE)
def test_half_values_are_read_and_rounded_as_torch_does(isa: str, t: torch.dtype) -> None:
    C.force_isa(isa)
    # VCVTNEPS2BF16 takes subnormal numbers for zero.
    flushed = isa == "avx512_bf16" and t == torch.bfloat16
    values, every_value = hard_to_round(t), torch.arange(-(2**15), 2**15, dtype=torch.int16).view(t)
    for x, s in ((torch.ones_like(values, dtype=t), values), (every_value, torch.full((2**16,), 0.5))):
        y = torch.empty_like(x[None])
        ops.column_scale_forward(x[None], s, y)
        assert_same_numbers(y[0], (x.float() * s).to(t), flushed)


@pytest.mark.parametrize("t", [torch.bfloat16, torch.float16], ids=str)
def test_prompts_are_read_and_rounded_as_torch_does(t: torch.dtype) -> None:
    one = torch.ones(1, 1, dtype=torch.int64)
    values, every_value = hard_to_round(t), torch.arange(-(2**15), 2**15, dtype=torch.int16).view(t)
    for prompt, wanted in ((values, t), (every_value, torch.float32)):
        embeds = torch.zeros(1, 1, len(prompt), dtype=wanted)
        out = ops.prompt_concat_forward(None, embeds, prompt[None], one, None)[0]
        assert_same_numbers(out[0, 0], prompt.to(wanted))


@pytest.mark.parametrize(("t", "w"), PAIRS, ids=str)
@pytest.mark.parametrize("isa", AVAILABLE)
def test_column_scale_matches_float64(isa: str, t: torch.dtype, w: torch.dtype) -> None:
    C.force_isa(isa)
    # One row or two at a time, rows and columns around the edges of lanes and tiles.
    for m, c in [(1, 1), (2, 15), (3, 17), (64, 33), (65, 16), (129, 47), (600, 5), (5, 2049), (4200, 3)]:
        torch.manual_seed(m)
        x, dy, s = rand(m, c, dtype=t), rand(m, c, dtype=t), rand(c, dtype=w)
        y = torch.full_like(x, torch.nan)
        ops.column_scale_forward(x, s, y)
        assert_near(y, x.double() * s.double(), EPSILON[t])
        dx, ds = ops.column_scale_backward(dy, x, s, True)
        assert_near(dx, dy.double() * s.double(), EPSILON[t])
        assert_near(ds, (dy.double() * x.double()).sum(0), 5e-6)
        none, alone = ops.column_scale_backward(dy, x, s, False)
        assert none.numel() == 0 and torch.equal(alone, ds)
        assert torch.equal(ops.column_scale_backward(dy, None, s, True)[0], dx)
        ops.column_scale_forward(x, s, x)
        assert torch.equal(x, y)


@pytest.mark.parametrize("isa", AVAILABLE)
def test_threads_do_not_change_a_bit(isa: str) -> None:
    C.force_isa(isa)
    before = torch.get_num_threads()
    results = []
    # The threads' shares begin in the middle of a sequence, whose padding comes first.
    tokens = (torch.arange(60) >= 7).long().expand(4, -1).contiguous()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, a, b, y, dy, dx = low_rank_case(300, 200, 136, 12, torch.float32, torch.float32)
            h = ops.low_rank_forward(x, a, b, y, 0.5, 0.2, SEED)
            da, db = ops.low_rank_backward(dy, x, a, b, h, dx, 0.5, 0.2, SEED, True, True)
            out, pre = ops.bottleneck_forward(x, a, None, b, None, None, "gelu", 0.5, 0.2, SEED)
            grads = ops.bottleneck_backward(dy, x, pre, a, b, "gelu", 0.5, 0.2, SEED, False, True)
            scaled = ops.column_scale_backward(dy, y, b[:, 0].contiguous(), True)
            tall = ops.column_scale_backward(rand_like(5000, 70), rand_like(5000, 70), torch.ones(70), True)
            prompted = ops.prompt_concat_forward(None, rand_like(4, 60, 768), rand_like(50, 768), tokens, None)
            unprompted = ops.prompt_concat_backward(prompted[0], tokens, 50, True)
            results.append([h, y, dx, da, db, out, pre, *grads, *scaled, *tall, *prompted, *unprompted])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert torch.equal(one, two)


def test_row_strides_do_not_change_a_bit() -> None:
    x, a, b, y, dy, dx = low_rank_case(70, 50, 60, 6, torch.bfloat16, torch.float32)
    wide_x, wide_dy = torch.full((70, 83), torch.nan).to(x.dtype), torch.full((70, 61), torch.nan).to(x.dtype)
    wide_x[:, :50], wide_dy[:, :60] = x, dy
    y2, dx2 = y.clone(), dx.clone()
    h = ops.low_rank_forward(x, a, b, y, 0.5, 0.1, SEED)
    h2 = ops.low_rank_forward(wide_x[:, :50], a, b, y2, 0.5, 0.1, SEED)
    grads = ops.low_rank_backward(dy, x, a, b, h, dx, 0.5, 0.1, SEED, True, True)
    grads2 = ops.low_rank_backward(wide_dy[:, :60], wide_x[:, :50], a, b, h2, dx2, 0.5, 0.1, SEED, True, True)
    for one, two in zip((h, y, dx, *grads), (h2, y2, dx2, *grads2), strict=True):
        assert torch.equal(one, two)
    residual, wide_residual = rand(70, 60, dtype=torch.bfloat16), torch.full((70, 67), torch.nan).bfloat16()
    wide_residual[:, :60] = residual
    out, pre = ops.bottleneck_forward(x, a, None, b, None, residual, "gelu", 0.5, 0.1, SEED)
    out2, pre2 = ops.bottleneck_forward(wide_x[:, :50], a, None, b, None, wide_residual[:, :60], "gelu", 0.5, 0.1, SEED)
    assert torch.equal(out, out2) and torch.equal(pre, pre2)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("isa", AVAILABLE)
def test_an_element_at_the_threshold_is_kept(isa: str, rows: int) -> None:
    C.force_isa(isa)
    drawn = random_bits(SEED, rows, 40)
    for value in drawn[-1].tolist():
        p = value / 2**16
        y = torch.zeros(rows, 1)
        h = ops.low_rank_forward(torch.ones(rows, 40), torch.eye(40), torch.ones(1, 40), y, 1.0, p, SEED)
        assert torch.equal(h != 0, (drawn >= value) if value else torch.ones_like(drawn, dtype=torch.bool))


@pytest.mark.parametrize("queries", [1, 9])
@pytest.mark.parametrize("isa", AVAILABLE)
def test_one_key_far_above_the_others_wherever_it_stands(isa: str, queries: int) -> None:
    """A highest score that misses one key overflows: each key in turn scores 400, the others 0."""
    C.force_isa(isa)
    keys, prefix, d = 150, 5, 7
    k, v = torch.zeros(keys, 1, keys, d), rand_like(keys, 1, keys, d)
    k[torch.arange(keys), 0, torch.arange(keys), 0] = 20.0
    q = torch.zeros(keys, 1, queries, d)
    q[..., 0] = 20.0
    pk, pv = torch.zeros(keys, 1, prefix, d), rand_like(keys, 1, prefix, d)
    out, _ = ops.prefix_attention_forward(q, k, v, pk, pv, None, False, 1.0, 0.0, None)
    assert torch.equal(out, v.diagonal(dim1=0, dim2=2).permute(2, 0, 1)[:, :, None].expand_as(out))


@pytest.mark.parametrize("isa", AVAILABLE)
def test_dropped_elements_are_not_read_as_numbers(isa: str) -> None:
    C.force_isa(isa)
    x, a, b, y, dy, _ = low_rank_case(40, 70, 50, 5, torch.bfloat16, torch.bfloat16)
    x[mask(40, 70, 0.5) == 0] = torch.nan
    h = ops.low_rank_forward(x, a, b, y, 1.0, 0.5, SEED)
    da, _ = ops.low_rank_backward(dy, x, a, b, h, None, 1.0, 0.5, SEED, True, False)
    assert not h.isnan().any() and not y.isnan().any() and not da.isnan().any()


def test_prompt_concat_puts_the_prompt_before_the_first_token() -> None:
    ids, table, prompt = torch.tensor([[0, 1, 2], [3, 1, 0]]), rand(4, 5), rand(2, 5, dtype=torch.bfloat16)
    attention, labels = torch.tensor([[0, 1, 1], [1, 1, 0]]), torch.tensor([[7, 8, 9], [4, 5, 6]])
    out, new_mask, positions, new_labels = ops.prompt_concat_forward(ids, table, prompt, attention, labels)
    left = torch.cat([table[[0]], prompt.float(), table[[1, 2]]])
    right = torch.cat([prompt.float(), table[[3, 1, 0]]])
    assert torch.equal(out, torch.stack([left, right]))
    assert new_mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert positions.tolist() == [[0, 0, 1, 2, 3], [0, 1, 2, 3, 3]]
    assert new_labels.tolist() == [[7, -100, -100, 8, 9], [-100, -100, 4, 5, 6]]
    d_prompt, d_embeds = ops.prompt_concat_backward(out, attention, 2, True)
    assert torch.equal(d_prompt, 2 * prompt.float())
    assert torch.equal(d_embeds, table[ids])


def test_force_isa() -> None:
    assert C.active_isa() == C.cpu_capability()
    for isa in AVAILABLE:
        C.force_isa(isa)
        assert C.active_isa() == isa
    with pytest.raises(ValueError, match="unknown instruction set 'sse9'"):
        C.force_isa("sse9")
    for isa in LEVELS[len(AVAILABLE) :]:
        with pytest.raises(ValueError, match=f"lacks '{isa}'"):
            C.force_isa(isa)
    C.force_isa(None)
    assert C.active_isa() == C.cpu_capability()


def test_build_info_says_how_it_was_built() -> None:
    info = C.build_info()
    assert set(info) == {"compiler", "flags", "git_revision", "torch", "isas"}
    assert "-march=native" not in info["flags"]
    assert C.cpu_capability() in info["isas"].split(",")
