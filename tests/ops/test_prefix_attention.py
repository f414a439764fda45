"""prefix_attention against what it replaces, what it keeps for backward, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peftkern.memory import saved_bytes
from peftkern.ops import prefix_attention
from peftkern.ops.prefix_attention import OP, _concatenated, _concatenation_is_faster, reference
from peftkern.testing import assert_as_good_as_torch

from .conftest import device_of, skip_unless_runs

Tensors = dict[str, Tensor]


def drawn(backend: str, b: int, hq: int, hkv: int, s: int, length: int, t: int, d: int) -> Tensors:
    torch.manual_seed(0)
    shapes = {"q": (b, hq, s, d), "k": (b, hkv, length, d), "v": (b, hkv, length, d), "pk": (hkv, t, d)}
    return {
        name: torch.randn(shape, device=device_of(backend)) for name, shape in (shapes | {"pv": (hkv, t, d)}).items()
    }


@pytest.mark.parametrize("name", [name for name, _ in OP.samples(torch.device("cpu"), torch.float32)])
def test_what_a_gpu_leaves_to_torch_is_the_same(name: str) -> None:
    """Where its kernels are slower than PyTorch's attention over the concatenation, a GPU runs that."""
    kwargs = dict(OP.samples(torch.device("cpu"), torch.float32))[name]
    if kwargs.get("p") or 0 in (*kwargs["q"].shape, *kwargs["k"].shape, *kwargs["pk"].shape):
        pytest.skip("dropout, or nothing to attend to: no kernel of torch's does it")

    def run(
        q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, *, mask: Tensor | None = None, causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        return _concatenated(q, k, v, pk, pv, mask, causal, q.shape[-1] ** -0.5 if scale is None else scale)

    assert_as_good_as_torch(reference, run, kwargs, grads=["q", "k", "v", "pk", "pv"], factor=4.0)


def test_many_queries_go_to_torch_on_a_gpu_only() -> None:
    assert "faster" in str(_concatenation_is_faster("triton", torch.bfloat16, S=512, plain=True))
    assert _concatenation_is_faster("triton", torch.bfloat16, S=512, plain=False) is None
    assert _concatenation_is_faster("triton", torch.bfloat16, S=1, plain=True) is None
    assert _concatenation_is_faster("cpu", torch.bfloat16, S=512, plain=True) is None


def test_equals_attention_over_the_concatenation(backend: str) -> None:
    skip_unless_runs("prefix_attention", backend)
    case = drawn(backend, 2, 4, 4, 11, 11, 5, 16)
    k, v = (torch.cat([case[p].expand(2, -1, -1, -1), case[x]], 2) for p, x in (("pk", "k"), ("pv", "v")))
    seen = torch.ones(11, 16, dtype=torch.bool, device=k.device).tril(5)
    want = F.scaled_dot_product_attention(case["q"], k, v, attn_mask=seen)
    torch.testing.assert_close(prefix_attention(**case, causal=True), want)


@pytest.mark.parametrize("causal", [False, True])
def test_saves_nothing_of_queries_times_keys(causal: bool, backend: str) -> None:
    """The inputs, the output and two numbers per query: neither scores nor keys behind a prefix per batch row."""
    skip_unless_runs("prefix_attention", backend)
    if backend == "reference":
        pytest.skip("reference: plain autograd saves what it likes")
    case = drawn(backend, 3, 4, 2, 33, 40, 9, 8)
    leaves = {name: value.requires_grad_() for name, value in case.items()}
    saved = saved_bytes(lambda: prefix_attention(**leaves, causal=causal), [leaves["pk"], leaves["pv"]])
    inputs = sum(leaves[name].numel() for name in ("q", "k", "v"))
    assert saved == 4 * (inputs + leaves["q"].numel() + 2 * 3 * 4 * 33)


def test_decoding_is_the_last_row_of_the_full_pass(backend: str) -> None:
    skip_unless_runs("prefix_attention", backend)
    case = drawn(backend, 2, 4, 2, 21, 21, 5, 16)
    full = prefix_attention(**case, causal=True)
    for last in (1, 4):
        step = prefix_attention(**case | {"q": case["q"][:, :, -last:]}, causal=True)
        torch.testing.assert_close(step, full[:, :, -last:])


@pytest.mark.parametrize("queries", [3, 20])
def test_keys_that_only_some_queries_see(queries: int, backend: str) -> None:
    """A whole block of keys that the first query does not see counts for the others."""
    skip_unless_runs("prefix_attention", backend)
    case = drawn(backend, 1, 2, 2, queries, 300, 5, 16)
    mask = torch.ones(1, 1, queries, 300, dtype=torch.bool, device=case["q"].device)
    mask[:, :, 0, 10:] = False
    both = prefix_attention(**case, mask=mask)
    for i in range(queries):
        alone = prefix_attention(**case | {"q": case["q"][:, :, i : i + 1]}, mask=mask[:, :, i : i + 1])
        torch.testing.assert_close(both[:, :, i : i + 1], alone)


@pytest.mark.parametrize("masked", ["causal", "bool", "float"])
@pytest.mark.parametrize("queries", [1, 3, 20])
def test_one_key_of_a_block_is_seen(masked: str, queries: int, backend: str) -> None:
    """Of a block of 64 keys only one, its first or its last, is seen (or all, by an additive mask of zeros).

    Sums of few terms, in which PyTorch may err by a third of one rounding: hence four heads and a factor of 4.
    """
    skip_unless_runs("prefix_attention", backend)
    case = drawn(backend, 1, 4, 4, queries, 60 if masked == "causal" else 123, 5, 16)
    mask = torch.zeros(1, 1, queries, 123, dtype=torch.bool, device=case["q"].device)
    mask[..., -1] = True
    masks = {"causal": None, "bool": mask, "float": torch.zeros_like(mask, dtype=torch.float32)}
    given = {**case, "mask": masks[masked], "causal": masked == "causal"}
    assert_as_good_as_torch(reference, prefix_attention, given, grads=list(case), factor=4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", ["nothing", "first half", "last half", "all"])
def test_a_long_text_in_parts(hidden: str, dtype: torch.dtype, backend: str) -> None:
    """Few queries, many keys: parts of the text may be masked as a whole, and dropout goes on from part to part."""
    skip_unless_runs("prefix_attention", backend)
    length = 300 if dtype == torch.float32 else 1100
    case = {name: value.to(dtype) for name, value in drawn(backend, 1, 4, 2, 3, length, 5, 16).items()}
    mask = torch.ones(1, 1, 3, length, dtype=torch.bool, device=case["q"].device)
    mask[..., 1, :] = False
    parts = {"nothing": slice(0), "first half": slice(length // 2), "last half": slice(length // 2, None)}
    mask[..., parts.get(hidden, slice(None))] = False
    given = {**case, "mask": mask, "causal": True, "p": 0.3, "seed": torch.tensor([11], device=mask.device)}
    assert_as_good_as_torch(reference, prefix_attention, given, grads=list(case), factor=3.0)


@pytest.mark.parametrize("queries", [2, 20])
def test_dropout_goes_on_from_block_to_block(queries: int, backend: str) -> None:
    """Every block of keys has bits of its own, those of its columns."""
    skip_unless_runs("prefix_attention", backend)
    case = drawn(backend, 1, 2, 2, queries, 150, 5, 16)
    given = {**case, "p": 0.5, "seed": torch.tensor([11], device=case["q"].device)}
    assert_as_good_as_torch(reference, prefix_attention, given, grads=list(case), factor=3.0)


@pytest.mark.parametrize("heads", [1, 2])
def test_threads_that_share_few_heads(heads: int, backend: str) -> None:
    """More queries than a share: a thread that begins in the middle of a head lays out its keys as well.

    Two heads are shared only where there are more than two cores.
    """
    skip_unless_runs("prefix_attention", backend)
    case, before = drawn(backend, 1, heads, heads, 400, 70, 5, 16), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        out = prefix_attention(**case)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out, reference(**case))


@pytest.mark.parametrize("additive", [False, True])
def test_a_query_without_text_sees_the_prefix_alone(additive: bool, backend: str) -> None:
    skip_unless_runs("prefix_attention", backend)
    case = drawn(backend, 2, 2, 2, 7, 70, 4, 16)
    mask = torch.ones(2, 1, 7, 70, dtype=torch.bool, device=case["q"].device)
    mask[1, :, 2:5] = False
    given = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf) if additive else mask
    leaves = {name: value.requires_grad_() for name, value in case.items()}
    out = prefix_attention(**leaves, mask=given)
    alone = F.scaled_dot_product_attention(case["q"][1, :, 2:5], case["pk"], case["pv"])
    torch.testing.assert_close(out[1, :, 2:5], alone)
    dk, dv, dpk = torch.autograd.grad(out[1, :, 2:5].square().sum(), [leaves["k"], leaves["v"], leaves["pk"]])
    assert not dk.any() and not dv.any() and dpk.isfinite().all() and dpk.any()


def test_grouped_queries_equal_repeated_keys(backend: str) -> None:
    skip_unless_runs("prefix_attention", backend)
    case = drawn(backend, 2, 6, 2, 13, 13, 5, 16)
    leaves = {name: value.requires_grad_() for name, value in case.items()}
    repeated = {name: value if name == "q" else value.repeat_interleave(3, -3) for name, value in leaves.items()}
    upstream = torch.randn_like(case["q"])
    grouped, plain = (prefix_attention(**given, causal=True) for given in (leaves, repeated))
    torch.testing.assert_close(grouped, plain)
    for one, two in zip(
        *(torch.autograd.grad(y, list(leaves.values()), upstream) for y in (grouped, plain)), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_compiled_call_meets_a_mask_after_its_batch_has_grown(backend: str) -> None:
    """The batch is symbolic by then, the mask's is not."""
    skip_unless_runs("prefix_attention", backend)
    device = device_of(backend)
    prefix = torch.randn(2, 3, 16, device=device)
    torch.compiler.reset()
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    for batch in (2, 3):
        q = torch.randn(batch, 2, 5, 16, device=device)
        mask = torch.ones(batch, 1, 1, 5, dtype=torch.bool, device=device) if batch == 3 else None
        want = prefix_attention(q, q, q, prefix, prefix, mask=mask)
        torch.testing.assert_close(compiled(q, q, q, prefix, prefix, mask=mask), want)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_a_mask_may_lie_in_memory_as_it_likes(dtype: torch.dtype, backend: str) -> None:
    skip_unless_runs("prefix_attention", backend)
    case = drawn(backend, 2, 2, 2, 9, 9, 3, 16)
    mask = (torch.rand(2, 1, 9, 9, device=case["q"].device) < 0.7).to(dtype)
    want = prefix_attention(**case, mask=mask)
    wide = mask.new_zeros(2, 1, 9, 18)
    wide[..., ::2] = mask
    for view in (mask.mT.contiguous().mT, wide[..., ::2]):
        assert torch.equal(prefix_attention(**case, mask=view), want)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("q", (2, 4, 9)),
        ("q", (2, 3, 9, 16)),
        ("k", (2, 2, 8, 16)),
        ("v", (1, 2, 9, 16)),
        ("pk", (2, 5, 8)),
        ("pv", (2, 6, 16)),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...]) -> None:
    case = drawn("reference", 2, 4, 2, 9, 9, 5, 16)
    with pytest.raises(ValueError, match=r"want q \[B, Hq, S, D\]"):
        prefix_attention(**case | {name: torch.ones(shape)})


@pytest.mark.parametrize(
    "mask", [torch.ones(9, 9), torch.ones(2, 3, 9, 9), torch.ones(2, 1, 9, 8), torch.ones(1, 1, 1, 9).int()]
)
def test_masks_that_do_not_fit(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"want bool or floating \[2 or 1, 4 or 1, 9 or 1, 9\]"):
        prefix_attention(**drawn("reference", 2, 4, 2, 9, 9, 5, 16), mask=mask)
