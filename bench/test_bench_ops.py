"""pytest-benchmark over every op, the quick cases of `python -m bench`, each after its correctness gate."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from ._cases import op_names
from ._clock import one_pass
from ._measure import YARDSTICK, Case, Options, Settings, prepare

pytest.importorskip("pytest_benchmark")
_OPTIONS = Options(torch.device("cuda" if torch.cuda.is_available() else "cpu"), quick=True)
_CASES = [case for name in op_names() for case in importlib.import_module(f".{name}", __package__).cases(_OPTIONS)]
_WORK = [
    pytest.param(case, provider, id=f"{case.kernel}-{case.label.replace(' ', '-')}-{provider}")
    for case in _CASES
    for provider in case.providers
]


@pytest.mark.parametrize(("case", "provider"), _WORK)
def test_op(case: Case, provider: str, benchmark: Any) -> None:
    others = frozenset(case.providers) - {provider, YARDSTICK}
    runners, rows = prepare(case, Settings(without=others))
    assert provider in runners, [row.note for row in rows]
    benchmark.group = f"{case.kernel} {case.label}"
    benchmark.extra_info |= {"backend": runners[provider].backend}
    benchmark(one_pass, runners[provider])
