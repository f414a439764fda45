"""The `peftkern` command; typer and rich are an extra, and without them this says how to get them."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line; exit code 2 for a user's mistake, a missing extra included."""
    try:
        from peftkern.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("rich", "typer", "yaml"):
            raise
        print(
            f"peftkern's commands need {error.name}: {sys.executable} -m pip install 'peftkern[cli]'\n"
            f"`{sys.executable} -m peftkern.doctor` works without it.",
            file=sys.stderr,
        )
        return 2
    app(prog_name="peftkern")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
