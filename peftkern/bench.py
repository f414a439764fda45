"""Finds the benchmark: `peftkern/bench` in a wheel (it then hides this file), the top-level `bench` in a checkout."""

from __future__ import annotations

from pathlib import Path

_here = Path(__file__).parent
__path__ = [str(next((p for p in (_here / "bench", _here.parent / "bench") if p.is_dir()), _here / "bench"))]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark with these command-line arguments; the exit code."""
    from peftkern.bench._run import main as run

    return int(run(argv))


if __name__ == "__main__":
    raise SystemExit(main())
