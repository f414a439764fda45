from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch

import peftkern
from peftkern import dispatch
from peftkern.testing import MODELS, TinyModel

# Where the extension with emulated AVX-512 lies (make test-emulated): it takes the place of the installed one.
if folder := os.environ.get("PEFTKERN_EMULATED"):
    if not list(Path(folder).glob("_C.*.so")):  # the installed one would be tested
        raise RuntimeError(f"no extension in {folder}: setup.py has not built it")
    peftkern.__path__.insert(0, folder)

# csrc/cuda compiled for the CPU (make test-cuda-emulated): the cuda backend then takes the CPU's tensors.
if emulated := os.environ.get("PEFTKERN_EMULATED_CUDA"):
    torch.ops.load_library(emulated)
    load_library, refusal = dispatch.load_library, dispatch._refusal

    def _refusal(name: str, op: str, device: torch.device, *args: Any, **dims: int) -> str | None:
        return refusal(name, op, torch.device("cuda") if name == "cuda" else device, *args, **dims)

    dispatch.load_library = lambda name: Path(emulated) if name == "cuda" else load_library(name)
    dispatch._refusal = _refusal

# One thread: the models are tiny, and threads that wait for each other cost more than they do.
torch.set_num_threads(1)

# An installed peftkern has registered its plugin by itself; a bare checkout has not.
pytest_plugins = ["pytester"]
if not any(point.value == "peftkern.testing.plugin" for point in entry_points(group="pytest11")):
    pytest_plugins.append("peftkern.testing.plugin")


def pytest_collection_finish() -> None:
    """What is imported and collected stays: no collection of garbage during the tests has to walk it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Extension modules look for leaks when the interpreter ends, and what is frozen looks like one."""
    gc.unfreeze()


@pytest.fixture(params=list(MODELS))
def family(request: pytest.FixtureRequest) -> TinyModel:
    """A BERT-, GPT-2- and Llama-like model in turn: `family.build()` and `family.batch()`."""
    return MODELS[request.param]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU and, where there is one, the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA or ROCm device")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def kernels_at_any_size(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny models run the kernels that large ones run, not the plain products that are faster at their size."""
    monkeypatch.setattr(dispatch, "_limits", {})
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()
