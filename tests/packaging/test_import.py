"""Importing the package does nothing but import: no build, no environment change, no file, no GPU, no kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# What other libraries do at their import is theirs: they come first, unwatched.
OTHERS = """
import importlib, importlib.util, os, pkgutil, sys
import torch, torch._dynamo, transformers
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, Trainer
for name in ("accelerate", "datasets", "hypothesis", "matplotlib.pyplot", "peft", "pytest", "rich.progress", "seqeval",
             "seqeval.metrics", "sklearn.metrics", "triton", "typer", "yaml"):
    if importlib.util.find_spec(name.split(".")[0]) is not None:
        importlib.import_module(name)
"""
# Audit events tell of every process started, every socket and every file opened for writing, whoever does it.
WATCHED = """
done = []

def audit(event, args):
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.fork", "os.exec", "socket.connect"):
        done.append((event, args[:1]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.putenv", "os.unsetenv"):
        if not any("__pycache__" in str(arg) for arg in args):
            done.append((event, args))
    elif event == "open" and isinstance(args[0], (str, bytes)):
        name, mode, flags = args
        writes = set(mode or "") & set("wxa+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and "__pycache__" not in str(name) and name != os.devnull:
            done.append((event, args))

def work(*args, **kwargs):
    raise AssertionError("work at import")

threads, before = torch.get_num_threads(), dict(os.environ)
torch.compile = torch.cuda._lazy_init = work
if "triton" in sys.modules:
    from triton.runtime import autotuner, jit
    jit.JITFunction.run = autotuner.Autotuner.run = sys.modules["triton"].compile = work
sys.addaudithook(audit)
"""
EVERYTHING = """
def visit(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:  # an extra that is not installed
        assert not error.name.startswith("peftkern"), error
        return
    for inner in pkgutil.iter_modules(getattr(module, "__path__", []), name + "."):
        if not inner.name.endswith((".__main__", "._cuda")):  # the command, and a library of ops that is no module
            visit(inner.name)

visit("peftkern")
names = {name for name in sys.modules if name.startswith("peftkern.")}
assert {"peftkern.ops.low_rank", "peftkern.methods.lora", "peftkern.checkpoint"} <= names, names
assert "triton" not in sys.modules or "peftkern.kernels.low_rank" in names, names
"""
QUIET = """
assert not done, done
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
assert not torch.cuda.is_initialized()
assert torch.get_num_threads() == threads
assert not torch.are_deterministic_algorithms_enabled() and torch.get_default_dtype() == torch.float32
print("quiet", len([name for name in sys.modules if name.startswith("peftkern.")]))
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_importing_every_module_only_imports(tmp_path: Path) -> None:
    finished = run(OTHERS + WATCHED + EVERYTHING + QUIET, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("quiet"), finished.stdout
    assert not list(tmp_path.iterdir())


def test_importing_the_package_imports_neither_transformers_nor_the_compiler(tmp_path: Path) -> None:
    """Together they take longer than torch itself. Neither ops nor the plugin that every pytest loads need them."""
    modules = "import peftkern as pk, peftkern.testing.plugin, torch"
    used = f"{modules}; pk.ops.low_rank(torch.ones(2, 8), torch.ones(2, 8), torch.ones(4, 2))"
    finished = run(f"import sys; {used}; print(*{{'transformers', 'torch._dynamo'}} & {{*sys.modules}})", tmp_path)
    assert finished.returncode == 0 and not finished.stdout.strip(), finished.stdout + finished.stderr


@pytest.mark.parametrize(
    "work",
    [
        "import subprocess; subprocess.run([sys.executable, '--version'], capture_output=True)",
        "os.environ['PEFTKERN_PROBE'] = '1'",
        "open('left-behind', 'w').close()",
        "torch.compile(torch.nn.Linear(1, 1))",
    ],
)
def test_the_watch_sees_work(work: str, tmp_path: Path) -> None:
    """The test above can fail: each of these, done by a module, is noticed."""
    finished = run("import os, sys, torch\n" + WATCHED + work + QUIET, tmp_path)
    assert finished.returncode != 0 and "AssertionError" in finished.stderr, finished.stderr
