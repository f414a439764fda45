"""Importing the kernels does no work: no compilation, no tuning, no device, no change of the environment."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = """
import importlib, os, sys
import torch, triton
from triton.runtime import autotuner, jit

def fail(*args, **kwargs):
    raise AssertionError("work at import")

jit.JITFunction.run = autotuner.Autotuner.run = triton.compile = triton.compiler.compile = fail
torch.cuda._lazy_init = fail
torch.compile = fail
before = dict(os.environ)
from peftkern.kernels import aot
for name in aot.modules():
    module = importlib.import_module(f"peftkern.kernels.{name}")
    tuned = [key for key, value in vars(module).items() if isinstance(value, autotuner.Autotuner)]
    assert not tuned, (name, tuned)
assert dict(os.environ) == before
assert not torch.cuda.is_initialized()
print("imported", len(aot.modules()))
"""


def test_importing_the_kernels_does_no_work() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported")
