"""Tries an installed method, by name, on tiny models: everything that a user may expect of every method."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftkern import registry
from peftkern.adapter import AdapterConfig
from peftkern.errors import ConfigError
from peftkern.testing.case import Case, NotApplicable
from peftkern.testing.checks import CHECKS
from peftkern.testing.models import TinyModel, chosen


@dataclass
class Report:
    """What `check_method` found: names of the checks that passed, and (name, reason) of those that did not apply."""

    passed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def check_method(
    name: str,
    config: AdapterConfig | Mapping[str, Any] | None = None,
    models: Iterable[str | TinyModel] | None = None,
    checks: Iterable[str] | None = None,
) -> Report:
    """Run all checks, or those named, for an installed method on all tiny models, or those given.

    `config` is a configuration or its fields; None is the method's own default. Raises AssertionError that lists every
    failure, UnknownMethodError for a method that is not installed, and AssertionError when no model fits the method.
    """
    tried = chosen(models)
    fits_a_model(name, config, tried)
    report, failures = Report(), []
    for model in tried:
        for name_of_check in CHECKS if checks is None else checks:
            where = f"{name}-{model.name}-{name_of_check}"
            try:
                run_check(name_of_check, name, config, model)
            except NotApplicable as reason:
                report.skipped.append((where, str(reason)))
            except Exception as error:
                failures.append(f"{where}: {type(error).__name__}: {error}")
            else:
                report.passed.append(where)
    if failures:
        raise AssertionError(f"method {name!r} fails {len(failures)} checks:\n" + "\n".join(failures))
    return report


def conformance_tests(
    name: str,
    config: AdapterConfig | Mapping[str, Any] | None = None,
    models: Iterable[str | TinyModel] | None = None,
    checks: Iterable[str] | None = None,
) -> Callable[..., None]:
    """A pytest test function, parametrised over models and checks; assign it to a name that starts with `test`.

    Arguments as `check_method`. The method is looked up when the tests run, not when they are collected.
    """
    import pytest

    found = [PytestCase(name, config, case) for case in cases(models, checks)]

    @pytest.mark.parametrize("case", found, ids=[str(item.case) for item in found])
    def test(case: PytestCase) -> None:
        """One check of one method on one model."""
        case.run()

    return test


@dataclass(frozen=True)
class Trial:
    """A check and what it runs on: one model, or all of them for the check that wants a model that fits."""

    check: str
    models: tuple[TinyModel, ...]

    def __str__(self) -> str:
        return self.check if self.check == FITS else f"{self.models[0].name}-{self.check}"


FITS = "fits_at_least_one_model"


def cases(models: Iterable[str | TinyModel] | None = None, checks: Iterable[str] | None = None) -> list[Trial]:
    """All checks, or those named, on all tiny models, or those given; and that one of the models fits at all."""
    tried, wanted = tuple(chosen(models)), list(CHECKS if checks is None else checks)
    return [Trial(FITS, tried), *(Trial(check, (model,)) for model in tried for check in wanted)]


@dataclass(frozen=True)
class PytestCase:
    """A trial of one method with one configuration, for pytest to run."""

    method: str
    config: AdapterConfig | Mapping[str, Any] | None
    case: Trial

    def __str__(self) -> str:
        return f"{self.method}-{self.case}"

    def run(self) -> None:
        """Run it; skips, with the reason, what does not apply."""
        import pytest

        if self.case.check == FITS:
            fits_a_model(self.method, self.config, self.case.models)
            return
        try:
            run_check(self.case.check, self.method, self.config, self.case.models[0])
        except NotApplicable as reason:
            pytest.skip(str(reason))


def fits_a_model(name: str, config: AdapterConfig | Mapping[str, Any] | None, models: Iterable[TinyModel]) -> None:
    """Raise AssertionError, with the reason for each model, when the method can be attached to none of them."""
    reasons = []
    for model in models:
        try:
            Case(name, configuration(name, config), model, Path()).attached()
        except NotApplicable as reason:
            reasons.append(str(reason))
        else:
            return
    raise AssertionError(f"method {name!r} applies to none of the models:\n" + "\n".join(reasons))


def run_check(which: str, name: str, config: AdapterConfig | Mapping[str, Any] | None, model: TinyModel) -> None:
    """Run one check in a scratch directory, with the global random state put back afterwards."""
    if which not in CHECKS:
        raise ValueError(f"unknown check {which!r}: want one of {', '.join(CHECKS)}")
    with tempfile.TemporaryDirectory() as directory, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CHECKS[which](Case(name, configuration(name, config), model, Path(directory)))


def configuration(name: str, config: AdapterConfig | Mapping[str, Any] | None) -> AdapterConfig:
    """The configuration as given, built from its fields, or the method's default."""
    method = registry.load(name)
    if config is None or isinstance(config, Mapping):
        return method.Config.from_dict(config or {})
    if not isinstance(config, method.Config):
        raise ConfigError(f"config is a {type(config).__name__}: method {name!r} wants a {method.Config.__name__}")
    return config
