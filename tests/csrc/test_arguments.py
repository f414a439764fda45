"""What the compiled kernels refuse, each with a message that names the op and the argument."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("peftkern._C", reason="the compiled extension is not built")
ops, rand = torch.ops.peftkern_cpu, torch.randn


def bad_calls() -> Iterator[tuple[str, str, list[object]]]:
    seed = torch.tensor([987654321987])
    x, a, b, y, dy, dx, h = (rand(shape) for shape in ((4, 6), (3, 6), (5, 3), (4, 5), (4, 5), (4, 6), (4, 3)))
    yield "low_rank_forward", r"a has shape \[3, 5\], want \[3, 6\]", [x, rand(3, 5), b, y, 1.0, 0.0, None]
    yield "low_rank_forward", r"b has shape \[5, 4\], want \[5, 3\]", [x, a, rand(5, 4), y, 1.0, 0.0, None]
    yield "low_rank_forward", "x has dtype Double", [x.double(), a, b, y, 1.0, 0.0, None]
    yield "low_rank_forward", "y has dtype BFloat16, want Float", [x, a, b, y.bfloat16(), 1.0, 0.0, None]
    yield "low_rank_forward", "y is not contiguous", [x, a, b, rand(4, 9)[:, :5], 1.0, 0.0, None]
    yield "low_rank_forward", "x has stride 2", [rand(4, 12)[:, ::2], a, b, y, 1.0, 0.0, None]
    yield "low_rank_forward", "x has 1 dimensions", [rand(6), a, b, y, 1.0, 0.0, None]
    yield "low_rank_forward", "M is 0", [rand(0, 6), a, b, rand(0, 5), 1.0, 0.0, None]
    yield "low_rank_forward", "p is 1", [x, a, b, y, 1.0, 1.0, seed]
    yield "low_rank_forward", "p is -0.1", [x, a, b, y, 1.0, -0.1, seed]
    yield "low_rank_forward", "seed is None", [x, a, b, y, 1.0, 0.5, None]
    yield "low_rank_forward", "seed has", [x, a, b, y, 1.0, 0.5, torch.tensor([1, 2])]
    yield "low_rank_backward", r"h has shape \[4, 2\]", [dy, x, a, b, rand(4, 2), dx, 1.0, 0.0, None, True, True]
    yield "low_rank_backward", "h has dtype Half", [dy, x, a, b, h.half(), dx, 1.0, 0.0, None, True, True]
    yield "bottleneck_forward", "act is 'swish'", [x, a, None, b, None, None, "swish", 1.0, 0.0, None]
    yield "bottleneck_forward", "act is", [x, a, None, b, None, None, "an activation with a long name", 1.0, 0.0, None]
    yield "bottleneck_forward", "up_bias has shape", [x, a, None, b, rand(6), None, "relu", 1.0, 0.0, None]
    yield "bottleneck_forward", "residual has shape", [x, a, None, b, None, x, "relu", 1.0, 0.0, None]
    yield "bottleneck_backward", "add_dy needs N == K", [dy, x, h, a, b, "relu", 1.0, 0.0, None, True, True]
    yield "column_scale_forward", r"s has shape \[5\], want \[6\]", [x, rand(5), x]
    yield "column_scale_forward", "y is not contiguous", [x, rand(6), rand(4, 12)[:, :6]]
    yield "column_scale_forward", "y has dtype BFloat16", [x, rand(6), x.bfloat16()]
    yield "column_scale_forward", "s has dtype Double", [x, rand(6).double(), x]
    yield "column_scale_forward", "M is 0", [rand(0, 6), rand(6), rand(0, 6)]
    yield "column_scale_backward", r"x has shape \[4, 5\]", [x, dy, rand(6), True]
    yield "column_scale_backward", "dy has stride 2", [rand(4, 12)[:, ::2], x, rand(6), True]
    yield "column_scale_backward", "x is None and need_dx false", [x, None, rand(6), False]
    index, one_adapter = torch.tensor([0, 0]), torch.tensor([[0, 0, 3, 0, 0]])
    for message, cells, entries, most, ranks, dtype in (
        ("row 0 of the table does not fit", one_adapter + torch.tensor([0, 0, 0, 1, 0]), index, 3, 3, 0),
        ("row 0 of the table does not fit", one_adapter, index, 2, 3, 0),
        ("row 0 of the table does not fit", one_adapter - torch.tensor([0, 0, 3, 0, 0]), index, 3, 0, 0),
        ("the table's ranks add up to 3, want 4", one_adapter, index, 3, 4, 0),
        ("the adapters' dtype has code 3", one_adapter, index, 3, 3, 3),
        ("the adapters' dtype has code -1", one_adapter, index, 3, 3, -1),
        ("index has 3 entries for 4 rows", one_adapter, torch.tensor([0, 0, 0]), 3, 3, 0),
        ("index has 0 entries for 4 rows", one_adapter, index[:0], 3, 3, 0),
        (r"index\[1\] is 1, want -1 to 0", one_adapter, torch.tensor([0, 1]), 3, 3, 0),
        (r"index\[1\] is -2, want -1 to 0", one_adapter, torch.tensor([0, -2]), 3, 3, 0),
    ):
        yield "multi_low_rank_forward", message, [x, cells, entries, y, most, ranks, dtype, False, 0.0, None]
    ids, ones = torch.tensor([[0, 9]]), torch.ones(1, 2, dtype=torch.int64)
    yield "prompt_concat_forward", "ids has 9 at flat index 1", [ids, rand(9, 6), rand(2, 6), ones, None]
    yield "prompt_concat_forward", "ids has -1 at flat index 0", [ids - 1, rand(9, 6), rand(2, 6), ones, None]
    yield "prompt_concat_forward", "mask has dtype Bool", [ids, rand(10, 6), rand(2, 6), ones.bool(), None]
    yield "prompt_concat_backward", "T is -1", [rand(1, 4, 6), ones, -1, True]


@pytest.mark.parametrize(("op", "message", "args"), [pytest.param(*c, id=f"{c[0]}-{c[1]}") for c in bad_calls()])
def test_bad_arguments_raise(op: str, message: str, args: list[object]) -> None:
    with pytest.raises(RuntimeError, match=f"{op}: .*{message}"):
        getattr(ops, op)(*args)
