"""Where this code lies and a hash of its kernels; needs no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
from pathlib import Path

_SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")


def root() -> Path:
    """The folder from which both `bench` and `peftkern` are imported: of a checkout, its root."""
    if __package__ == "bench":
        return Path(__file__).resolve().parents[1]
    spec = importlib.util.find_spec("peftkern")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).resolve().parents[1]


def kernel_hash(device: str, folder: Path | None = None) -> str:
    """SHA-256 over names and contents of what runs on a "cpu" or "cuda" device: its kernels, the ops, dispatch.

    A CPU result outlives a change of a Triton kernel, and the other way round. In an installed package csrc/ is absent,
    so that the hash is another one.
    """
    top = folder or root()
    kernels = top / "kernels" if (top / "kernels").is_dir() else top / "peftkern" / "kernels"
    parts = {"csrc": top / "csrc" / device, "ops": top / "peftkern" / "ops"}
    shared = [*sorted((top / "csrc").glob("*.h")), top / "peftkern" / "dispatch.py"]
    if device == "cuda":
        parts["kernels"] = kernels
    digest = hashlib.sha256()
    for name, part in sorted(parts.items()):
        files = (path for path in part.rglob("*") if path.suffix in _SUFFIXES and path.name != "aot.py")
        for path in sorted(files):
            digest.update(f"{name}/{path.relative_to(part).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    for path in shared:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def git_revision(folder: Path) -> str:
    """Short revision of the checkout, with "+changes" when sources differ from it; "" outside a checkout."""
    if not (folder / ".git").exists():
        return ""
    git = ["git", "-C", str(folder)]
    sources = ["peftkern", "kernels", "csrc", "bench", ":!bench/results"]
    try:
        revision = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, check=True, text=True)
        status = [*git, "status", "--porcelain", "--", *sources]
        changed = subprocess.run(status, capture_output=True, check=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return revision.stdout.strip() + ("+changes" if changed.stdout.strip() else "")
