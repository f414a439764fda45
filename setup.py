"""Builds the compiled parts; everything else about the package stands in pyproject.toml.

peftkern._C     csrc/module.cpp and csrc/cpu/*.cpp. Needs a C++20 compiler, torch and pybind11. Optional: where it
                cannot be built the package installs as pure Python, with a note of the reason in it: pip shows what a
                build says only under -v, `peftkern doctor` shows the note.
peftkern._cuda  csrc/cuda/*.cu, a library without a Python module. Built where torch is a CUDA build and nvcc exists;
                PEFTKERN_BUILD_CUDA=1 or 0 decides otherwise.

`python setup.py build_cuda` only compiles csrc/cuda/*.cu with nvcc, for every architecture, against any torch: a check
that needs no GPU and links nothing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
# The oldest torch whose stable ABI the sources use: 2.10.
TARGET_VERSION = "0x020a000000000000"
CPU_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
CPU_FLAGS += ["-fno-trapping-math", "-fno-strict-aliasing"]
# GCC's own AVX-512 headers set these off.
CPU_FLAGS += ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# For tests: the AVX-512 kernels in AVX2, so that every instruction set runs on a CPU that lacks them.
EMULATED = os.environ.get("PEFTKERN_EMULATE_AVX512") == "1"
if EMULATED:
    CPU_FLAGS += ["-O1", "-DPEFTKERN_EMULATE_AVX512", "-include", "tests/csrc/emulate_avx512.h"]
CUDA_ARCHITECTURES = ("80", "90", "100")


def say(message: str) -> None:
    print(f"peftkern: {message}", file=sys.stderr, flush=True)


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def torch_root() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def torch_version() -> str:
    return importlib.metadata.version("torch") if torch_root() is not None else "none"


def git_revision() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def nvcc_command(nvcc: str, torch: Path) -> list[str]:
    """The compile command up to the source: cubins for each architecture that this nvcc knows, PTX of the last."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, check=True, text=True).stdout.split()
    known = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in listed]
    codes = [flag for arch in known for flag in ("-gencode", f"arch=compute_{arch},code=sm_{arch}")]
    codes += ["-gencode", f"arch=compute_{known[-1]},code=compute_{known[-1]}"]
    includes = ["-isystem", str(torch / "include")]
    defines = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]
    return [nvcc, "-c", "-O3", "-std=c++20", "-Xcompiler", "-fPIC,-fvisibility=hidden", *defines, *includes, *codes]


def call(command: list[str], **_options: Any) -> None:
    """Run a build step; its failure is a failed build of one optional extension, and says what the step said last."""
    print(" ".join(command), flush=True)
    try:
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        raise CompileError(f"{command[0]} does not run: {error}") from error
    print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-12:]
        raise CompileError("\n".join([f"{command[0]} ended with exit code {done.returncode}:", *last]))


def up_to_date(target: Path, needed: list[str]) -> bool:
    return target.exists() and all((ROOT / path).stat().st_mtime <= target.stat().st_mtime for path in needed)


class Missing(Extension):
    """An extension that cannot be built here, for want of something that its build needs."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, [], optional=True)
        self.reason = reason


class BuildExt(build_ext):
    """Compiles the files of one extension in parallel, and .cu files with nvcc."""

    def run(self) -> None:
        self.reasons: dict[str, str] = {}
        # One place for editable installs, wheels and in-place builds, which then compile a source once.
        kind = f"{sys.implementation.cache_tag}-torch-{torch_version()}{'-emulated' if EMULATED else ''}"
        self.build_temp = str(ROOT / "build" / f"objects-{kind}")
        super().run()
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            note = target.with_name(f"{ext.name.rpartition('.')[2]}.not-built.txt")
            note.unlink(missing_ok=True)
            if ext.name in self.reasons:
                target.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(self.reasons[ext.name] + "\n", encoding="utf-8")
                say(f"{ext.name} was not built; the package works without it, more slowly. {self.reasons[ext.name]}")

    def copy_file(self, infile: str, outfile: str, **options: Any) -> tuple[str, bool]:
        """Replace the file instead of overwriting it: a running process may have the old library mapped."""
        Path(outfile).unlink(missing_ok=True)
        return super().copy_file(infile, outfile, **options)

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_one(ext)
        except Exception as error:
            self.reasons[ext.name] = str(error)
            raise

    def build_one(self, ext: Extension) -> None:
        if isinstance(ext, Missing):
            raise CompileError(ext.reason)
        self.compiler.call = self.compiler.spawn = call  # newer setuptools, and older
        if not (self.force or not up_to_date(Path(self.get_ext_fullpath(ext.name)), ext.depends)):
            return
        say(f"building {ext.name}: {len(ext.sources)} files")
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(lambda source: self.compile_one(ext, source), ext.sources))
        if ext.sources[0].endswith(".cu"):
            self.link_cuda(ext, objects)
        else:
            ext.sources, ext.extra_objects = [], objects
            super().build_extension(ext)

    def compile_one(self, ext: Extension, source: str) -> str:
        target = Path(self.build_temp) / Path(source).with_suffix(".o")
        # A header may be anywhere in csrc/, so every object depends on all of them.
        headers = [path for path in ext.depends if not path.endswith((".cpp", ".cu"))]
        if not self.force and up_to_date(target, [source, *headers]):
            return str(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.endswith(".cu"):
            call([*ext.extra_compile_args, source, "-o", str(target.resolve())])
            return str(target)
        return str(
            self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=ext.define_macros,
                include_dirs=ext.include_dirs,
                extra_postargs=ext.extra_compile_args,
                depends=ext.depends,
            )[0]
        )

    def link_cuda(self, ext: Extension, objects: list[str]) -> None:
        """Link with nvcc and its static runtime, and ask for libtorch_cuda also where this torch has none."""
        nvcc, lib = ext.extra_compile_args[0], Path(ext.library_dirs[0])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        stub = Path(self.build_temp) / "libtorch_cuda.so"
        if not (lib / stub.name).exists():
            soname = ["-cudart", "none", "-Xlinker", f"-soname={stub.name}"]
            call([nvcc, "-shared", *soname, "-x", "c++", os.devnull, "-o", str(stub.resolve())])
        places = [f"-L{path}" for path in (lib, stub.parent.resolve())]
        libraries = [f"-l{name}" for name in ext.libraries]
        command = [nvcc, "-shared", "-cudart", "static", "-Xlinker", "--no-as-needed"]
        call([*command, *objects, *places, *libraries, "-o", str(target.resolve())])


class BuildCuda(Command):
    """Compile csrc/cuda/*.cu with nvcc without linking: no GPU and no CUDA build of torch needed."""

    description = "compile the CUDA sources for every architecture, as a check"
    user_options: list[Any] = []  # noqa: RUF012 - setuptools reads this class attribute

    def initialize_options(self) -> None:
        """Nothing to set."""

    def finalize_options(self) -> None:
        """Nothing to derive."""

    def run(self) -> None:
        nvcc, torch = find_nvcc(), torch_root()
        if nvcc is None or torch is None:
            missing = "nvcc" if nvcc is None else "torch"
            raise SystemExit(f"build_cuda: {missing} not found; both nvcc and torch are needed to compile csrc/cuda")
        out = ROOT / "build" / "cuda"
        out.mkdir(parents=True, exist_ok=True)
        command = [*nvcc_command(nvcc, torch), "-Xptxas", "-v"]
        for source in sources("csrc/cuda/*.cu"):
            say(f"compiling {source} for {', '.join(part for part in command if part.startswith('arch='))}")
            call([*command, source, "-o", str(out / (Path(source).stem + ".o"))])


def cpu_extension(torch: Path | None) -> Extension:
    if torch is None:
        return Missing("peftkern._C", "torch was not installed where it was built: want --no-build-isolation")
    if importlib.util.find_spec("pybind11") is None:
        return Missing("peftkern._C", "pybind11 was not installed where it was built")
    import pybind11

    texts = {
        "PEFTKERN_BUILD_FLAGS": " ".join(CPU_FLAGS),
        "PEFTKERN_GIT_REVISION": git_revision(),
        "PEFTKERN_TORCH_VERSION": torch_version(),
    }
    files = ["csrc/module.cpp", *sources("csrc/cpu/*.cpp")]
    return Extension(
        "peftkern._C",
        files,
        include_dirs=["csrc", pybind11.get_include()],
        define_macros=[("TORCH_TARGET_VERSION", TARGET_VERSION), *((k, f'"{v}"') for k, v in texts.items())],
        extra_compile_args=[*CPU_FLAGS, "-isystem", str(torch / "include")],
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu", "c10"],
        depends=["setup.py", *files, *sources("csrc/*.h"), *sources("csrc/cpu/*.h")],
        language="c++",
        optional=True,
    )


def cuda_extension(torch: Path | None) -> Extension | None:
    if torch is None:
        return None
    from torch.version import cuda

    wanted = os.environ.get("PEFTKERN_BUILD_CUDA", "1" if cuda else "0") == "1"
    files, nvcc = sources("csrc/cuda/*.cu"), find_nvcc()
    if not wanted or not files:
        return None
    if nvcc is None:
        return Missing("peftkern._cuda", "nvcc was not found where it was built; Triton kernels serve the GPU")
    return Extension(
        "peftkern._cuda",
        files,
        extra_compile_args=nvcc_command(nvcc, torch),
        library_dirs=[str(torch / "lib")],
        libraries=["torch_cpu", "torch_cuda", "c10"],
        depends=["setup.py", *files, *sources("csrc/*.h"), *sources("csrc/cuda/*.cuh")],
        language="c++",
        optional=True,
    )


def extensions() -> list[Extension]:
    torch = torch_root()
    return [ext for ext in (cpu_extension(torch), cuda_extension(torch)) if ext is not None]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt, "build_cuda": BuildCuda})
