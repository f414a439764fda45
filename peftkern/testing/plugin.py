"""pytest plugin: `--peftkern-method NAME`, and the argument `peftkern_case` for tests that run the conformance kit.

Installing peftkern registers it; from a bare checkout it is `-p peftkern.testing.plugin`. A test that takes
`peftkern_case` runs once for every check, model and method: the methods named on the command line, else all installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--peftkern-method`."""
    parser.getgroup("peftkern").addoption(
        "--peftkern-method",
        action="append",
        default=[],
        metavar="NAME",
        help="run the conformance kit for this method only; may be given more than once",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Stop at a method that is not installed."""
    names = config.getoption("--peftkern-method")
    if not names:
        return
    import pytest

    from peftkern import registry
    from peftkern.errors import near

    installed = registry.names()
    for name in names:
        if name not in installed:
            raise pytest.UsageError(f"--peftkern-method {name}: no such method is installed{near(name, installed)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give tests that take `peftkern_case` one case per method, model and check."""
    if "peftkern_case" not in metafunc.fixturenames:
        return
    from peftkern import registry
    from peftkern.testing.conformance import PytestCase, cases

    names = metafunc.config.getoption("--peftkern-method") or registry.names()
    found = [PytestCase(name, None, case) for name in names for case in cases()]
    metafunc.parametrize("peftkern_case", found, ids=str)
