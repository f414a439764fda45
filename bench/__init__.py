"""The speed benchmark: every op and whole training steps against their peers, after a correctness gate.

`python -m bench --help` from a checkout, `peftkern bench --help` where the package is installed.
"""

from __future__ import annotations

from ._run import main

__all__ = ["main"]
