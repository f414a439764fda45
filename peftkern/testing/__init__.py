"""The conformance kit: tries any installed method on tiny models, and the yardstick for numerical tests.

A plugin's test file is three lines:

    from peftkern.testing import conformance_tests

    test_conformance = conformance_tests("scale")

The same from the command line, for any installed method, without a test file:

    pytest --pyargs peftkern.testing --peftkern-method scale
"""

from __future__ import annotations

from peftkern.testing.accuracy import assert_as_good_as_torch, relative_error
from peftkern.testing.case import Case, NotApplicable, unchanged
from peftkern.testing.checks import CHECKS
from peftkern.testing.conformance import check_method, conformance_tests
from peftkern.testing.models import MODELS, TinyModel, tiny_bert, tiny_gpt2, tiny_llama, token_batch

__all__ = [
    "CHECKS",
    "MODELS",
    "Case",
    "NotApplicable",
    "TinyModel",
    "assert_as_good_as_torch",
    "check_method",
    "conformance_tests",
    "relative_error",
    "tiny_bert",
    "tiny_gpt2",
    "tiny_llama",
    "token_batch",
    "unchanged",
]
