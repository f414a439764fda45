"""What `pytest --pyargs peftkern.testing --peftkern-method NAME` runs."""

from __future__ import annotations

from peftkern.testing.conformance import PytestCase


def test_conformance(peftkern_case: PytestCase) -> None:
    """One check of one method on one model."""
    peftkern_case.run()
