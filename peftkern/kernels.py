"""Finds the Triton kernels: `peftkern/kernels` in a wheel, the top-level `kernels` folder in a checkout.

The top-level folder has no `__init__.py`, since another distribution owns the module name `kernels`.
"""

from pathlib import Path

_here = Path(__file__).parent
__path__ = [str(next((p for p in (_here / "kernels", _here.parent / "kernels") if p.is_dir()), _here / "kernels"))]
