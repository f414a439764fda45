"""The compiled kernels read no byte outside a tensor, whatever they do with it: what lies around one cannot be read.

Poison (tests/ops/test_bounds.py) shows a stray element only where it reaches a result. Here a tensor ends where a page
begins that may not be read, or begins where one ends; a process of its own does it, since a stray read kills it.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
KEPT: list[mmap.mmap] = []  # a tensor does not keep the memory that it is given


def at_the_edge(value: Tensor, end: bool) -> Tensor:
    """A contiguous copy, after whose last or before whose first byte lies a page that may not be read."""
    if value.numel() == 0:
        return value
    size = value.numel() * value.element_size()
    pages = -(-size // mmap.PAGESIZE)
    area = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    KEPT.append(area)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (0, pages + 1):
        if protect(ctypes.c_void_p(start + page * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    at = start + (pages + 1) * mmap.PAGESIZE - size if end else start + mmap.PAGESIZE
    memory = (ctypes.c_char * size).from_address(at)
    return torch.frombuffer(memory, dtype=value.dtype).view(value.shape).copy_(value)


def run_all() -> None:
    """Every op, forward and backward, on every instruction set; says what runs before it does."""
    sys.path.insert(0, str(ROOT))
    import peftkern as pk
    from peftkern import _C
    from peftkern.ops._op import every
    from tests.ops.conftest import trainable
    from tests.ops.test_bounds import AtEdges, each, edge_cases

    class AtBlocks(AtEdges):
        """Sizes around the 48 and 96 columns of a block of outer, 48 rows of a block of queries."""

        def size(self, largest: int = 97) -> int:
            return self.one_of([n for n in (5, 47, 48, 49, 95, 97) if n <= largest])

    built = _C.build_info()["isas"].split(",")
    torch.set_num_threads(1)
    for isa in built[: built.index(_C.cpu_capability()) + 1]:
        _C.force_isa(isa)
        for op in every():
            if not hasattr(torch.ops.peftkern_cpu, f"{op.name}_forward"):
                continue
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                cases = edge_cases(op, "cpu", dtype)[:20]
                if op.draw is not None:
                    cases += [op.draw(AtBlocks(Random(i), torch.device("cpu"), dtype)) for i in range(20)]
                for number, kwargs in enumerate(cases):
                    for end in (True, False):
                        print(isa, op.name, dtype, "case", number, "end" if end else "start", flush=True)
                        given = each(kwargs, lambda value, end=end: at_the_edge(value, end))
                        for name in trainable(op, given):
                            given[name].requires_grad_(True)
                        with pk.use_backend("cpu"):
                            # Views: autograd forbids writing in place into a leaf that requires grad.
                            out = op.run(**{k: v.view_as(v) if isinstance(v, Tensor) else v for k, v in given.items()})
                            y = out if isinstance(out, Tensor) else out[0]
                            y.backward(at_the_edge(torch.ones_like(y), end))
                        del given, out, y
                        KEPT.clear()


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect as Linux has it")
def test_no_byte_outside_is_read() -> None:
    pytest.importorskip("peftkern._C", reason="the compiled extension is not built")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"died with {done.returncode} in {done.stdout[-200:]}\n{done.stderr[-2000:]}"


if __name__ == "__main__":
    run_all()
