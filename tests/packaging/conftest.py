"""Real installations for the packaging tests: a plugin, and a wheel built without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(
    *command: str | Path, cwd: Path, path: Path | None = None, check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command outside this process; `path` goes in front of its sys.path."""
    whole = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | env
    whole.pop("PYTHONPATH", None)
    if path is not None:
        whole["PYTHONPATH"] = str(path)
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=whole, text=True, capture_output=True)
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done


def python(code: str, cwd: Path, path: Path | None = None, **env: str) -> str:
    """Standard output of a Python program run in a process of its own."""
    return run(sys.executable, "-c", code, cwd=cwd, path=path, **env).stdout.strip()


def pip_install(source: Path, target: Path, cwd: Path) -> Path:
    """pip-install a distribution, for real, into a folder."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"]
    run(*pip, "--no-deps", "--no-build-isolation", "--target", target, source, cwd=cwd)
    return target


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which examples/peftkern-scale is installed."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "examples" / "peftkern-scale", folder / "source")  # so that no build folder is left behind
    return pip_install(folder / "source", folder / "site", folder)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a checkout holds, compiled parts left out."""
    folder = tmp_path_factory.mktemp("sources") / "peftkern"
    folder.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.not-built.txt", "results")
    for name in ("peftkern", "kernels", "csrc", "bench", "examples", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for pattern in ("*.toml", "*.py", "*.in", "*.md", "LICENSE", "Makefile"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def wheel(sources: Path) -> Path:
    """A wheel built where no compiler works: pure Python."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index"]
    none = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "PEFTKERN_BUILD_CUDA": "0"}
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", sources / "dist", sources, cwd=sources.parent, **none)
    return next((sources / "dist").glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which that wheel is installed."""
    folder = tmp_path_factory.mktemp("installed")
    return pip_install(wheel, folder / "site", folder)
