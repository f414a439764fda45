"""What the tests of a GPU launch is known before they run: every op's samples are walked through."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

_SCRIPT = """
import torch
from bench._compile import launches

print(*(launch.kernel.fn.__qualname__ for launch in launches(torch.device("cpu"))))
"""


def test_launches_of_every_op_are_found() -> None:
    """In the interpreter's process, the only one without a GPU where the triton backend takes tensors."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", _SCRIPT]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert len(names) > 300
    shared = {"row_kernel", "both_kernel", "expand_kernel", "column_kernel", "reduce_kernel"}
    own = {"scale_kernel", "norm_kernel", "sort_kernel", "shrink_kernel", "gradient_kernel", "queries_kernel"}
    assert shared | own <= set(names), sorted(set(names))
