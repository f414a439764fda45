"""pytest-benchmark over one training step of tiny models, each after its correctness gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from . import step
from ._clock import one_pass
from ._measure import YARDSTICK, Case, Options, Settings, prepare

pytest.importorskip("pytest_benchmark")
_OPTIONS = Options(torch.device("cuda" if torch.cuda.is_available() else "cpu"), quick=True)
_WORK = [
    pytest.param(case, provider, id=f"{case.label.replace(' ', '-')}-{provider}")
    for case in step.cases(_OPTIONS)
    for provider in case.providers
]


@pytest.mark.parametrize(("case", "provider"), _WORK)
def test_step(case: Case, provider: str, benchmark: Any) -> None:
    others = frozenset(case.providers) - {provider, YARDSTICK}
    runners, rows = prepare(case, Settings(without=others))
    assert provider in runners, [row.note for row in rows]
    benchmark.group = f"step {case.label}"
    benchmark.extra_info |= {"backend": runners[provider].backend}
    benchmark(one_pass, runners[provider])
