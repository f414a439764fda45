"""Compiles csrc/cuda for the CPU: `python -m tests.csrc.emulate_cuda FOLDER` makes FOLDER/_cuda.so.

What C++ does not know is put into words of emulate_cuda.h; the kernels themselves stay as they are.
"""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("emulate_cuda.h")
WORDS = [
    (r"#include <(cuda_\w+|torch/csrc/stable/accelerator)\.h>", ""),
    (r"(\w+(?:<[\w, ]+>)?)<<<(.*?)>>>\(", r"emulated::launch(\2)(\1, "),
    (r"extern __shared__ (\w+) (\w+)\[\];", r"\1* \2 = emulated::dynamic_shared<\1>();"),
    (r"torch::stable::accelerator::DeviceGuard", "emulated::DeviceGuard"),
    (r"TORCH_ERROR_CODE_CHECK\(aoti_torch_get_current_cuda_stream\(.*?\)\);", ""),
    (r"\.is_cuda\(\)", ".is_cpu()"),
    (r"\(peftkern_cuda, CUDA, m\)", "(peftkern_cuda, CPU, m)"),
]


def translated(text: str) -> str:
    """A source of csrc/cuda as C++, line by line where it was."""
    for word, instead in WORDS:
        text = re.sub(word, instead, text, flags=re.DOTALL)
    return text


def build(folder: Path) -> Path:
    """Translate and compile every source; returns the library."""
    sources = folder / "csrc" / "cuda"
    sources.mkdir(parents=True, exist_ok=True)
    for header in (ROOT / "csrc").glob("*.h"):
        (sources.parent / header.name).write_bytes(header.read_bytes())
    for path in (ROOT / "csrc" / "cuda").iterdir():
        (sources / path.name).write_text(translated(path.read_text(encoding="utf-8")), encoding="utf-8")
    place = Path(torch.__file__).parent
    compiler = ["c++", "-c", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
    compiler += ["-Wno-unknown-pragmas", "-isystem", str(place / "include"), "-include", str(STAND_IN), "-x", "c++"]

    def compiled(source: Path) -> str:
        target = str(source.with_suffix(".o"))
        subprocess.run([*compiler, str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, sorted(sources.glob("*.cu"))))
    library = folder / "_cuda.so"
    libraries = [f"-L{place / 'lib'}", "-ltorch_cpu", "-lc10"]
    subprocess.run(["c++", "-shared", *objects, *libraries, "-o", str(library)], check=True)
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1]).resolve()))
