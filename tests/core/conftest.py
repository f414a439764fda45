from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _kernels(kernels_at_any_size: None) -> None:
    """What holds for an attached model is to hold with the kernels."""
