"""The conformance kit itself: a sound method passes, and each broken one fails the check that is there for it."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

import pytest
from torch import nn

import peftkern as pk
from peftkern import registry
from peftkern.errors import ConfigError, UnknownMethodError
from peftkern.testing import (
    CHECKS,
    MODELS,
    TinyModel,
    check_method,
    conformance_tests,
    tiny_bert,
    token_batch,
    unchanged,
)
from peftkern.testing.conformance import FITS, PytestCase, cases

from . import broken_methods

NOT_TO_BE_BROKEN_BY_A_METHOD = {"keeps_class_and_identity", "refuses_a_checkpoint_that_does_not_fit"}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The methods of `broken_methods`, as if a distribution brought them."""
    found = dict(registry._entry_points())
    for kind in [broken_methods.Sound, *(vars(broken_methods)[n] for n in dir(broken_methods))]:
        if isinstance(kind, type) and getattr(kind, "name", None) in {"sound", *broken_methods.BROKEN}:
            found[kind.name] = [EntryPoint(kind.name, f"{broken_methods.__name__}:{kind.__qualname__}", registry.GROUP)]
    monkeypatch.setattr(registry, "_entry_points", lambda: found)


def test_a_sound_method_passes() -> None:
    quick = [name for name in CHECKS if name != "compiles_in_one_graph"]
    assert check_method("sound", models=["bert"], checks=set(CHECKS) - set(quick)).passed
    report = check_method("sound", checks=quick)
    assert len(report.passed) + len(report.skipped) == len(MODELS) * len(quick)
    assert {where.rpartition("-")[2] for where, _ in report.skipped} == {
        "merges_or_says_why_not",  # Llama: no bias
        "combines_or_says_why_not",
        "generates_the_same_with_and_without_cache",  # BERT
    }


@pytest.mark.parametrize("name", broken_methods.BROKEN)
def test_a_broken_method_is_caught(name: str) -> None:
    for check in broken_methods.BROKEN[name]:
        models = ["gpt2"] if check.startswith("generates") else ["bert"]
        which = [] if check == FITS else [check]
        with pytest.raises(AssertionError, match=check if which else "applies to none of the models"):
            check_method(name, models=models, checks=which or None)


def test_every_check_catches_something() -> None:
    caught = {check for checks in broken_methods.BROKEN.values() for check in checks}
    assert caught - {FITS} == set(CHECKS) - NOT_TO_BE_BROKEN_BY_A_METHOD


def test_a_method_that_fits_nothing_fails() -> None:
    with pytest.raises(AssertionError, match="none of the models"):
        PytestCase("fitsnothing", None, cases()[0]).run()


def test_one_line_makes_a_test() -> None:
    marks = conformance_tests("sound", models=["bert"]).pytestmark
    assert [str(case.case) for case in marks[0].args[1]] == [FITS, *(f"bert-{check}" for check in CHECKS)]


def test_a_model_of_ones_own() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_bert()

        def forward(self, **batch):
            return self.inner(**batch)

    mine = TinyModel("mine", Wrapped, lambda: token_batch(labels=5))
    report = check_method(
        "lora", {"r": 2}, models=[mine], checks=["trains", "saves_and_loads", "checkpoints_gradients"]
    )
    assert report.passed == ["lora-mine-trains", "lora-mine-saves_and_loads"]
    assert "Wrapped has no gradient checkpointing" in report.skipped[0][1]


def test_wrong_arguments() -> None:
    with pytest.raises(UnknownMethodError, match="did you mean 'sound'"):
        check_method("sounds", models=["bert"], checks=["trains"])
    with pytest.raises(UnknownMethodError):
        PytestCase("sounds", None, cases()[0]).run()
    with pytest.raises(ValueError, match="unknown model 'brt'"):
        check_method("sound", models=["brt"])
    with pytest.raises(AssertionError, match="unknown check 'train'"):
        check_method("sound", models=["bert"], checks=["train"])
    with pytest.raises(ConfigError, match="wants a SoundConfig"):
        PytestCase("sound", pk.LoraConfig(), cases()[0]).run()


def test_command_line(pytester: pytest.Pytester) -> None:
    """`pytest --pyargs peftkern.testing --peftkern-method NAME`, and a test file of three lines."""
    pytester.makepyfile("from peftkern.testing import conformance_tests\n\ntest_it = conformance_tests('sound')")
    loaded = any(point.value == "peftkern.testing.plugin" for point in entry_points(group="pytest11"))
    plugin = [] if loaded else ["-p", "peftkern.testing.plugin"]
    mine = pytester.runpytest_inprocess(*plugin, "-k", "starts or fits")
    mine.assert_outcomes(passed=1 + len(MODELS), deselected=len(MODELS) * (len(CHECKS) - 1))
    kit = ["--pyargs", "peftkern.testing", "--peftkern-method"]
    pytester.runpytest_inprocess(*plugin, *kit, "sound", "-k", "bert-starts").assert_outcomes(
        passed=1, deselected=len(MODELS) * len(CHECKS)
    )
    wrong = pytester.runpytest_inprocess(*plugin, *kit, "sond")
    wrong.stderr.fnmatch_lines(["*--peftkern-method sond: no such method is installed; did you mean 'sound'?"])


def test_unchanged_sees_every_change() -> None:
    def changes(model):
        yield lambda: next(model.parameters()).data.view(-1)[0].add_(1)
        yield lambda: model.register_forward_hook(broken_methods.nothing)
        yield lambda: next(model.parameters()).requires_grad_(False)
        yield lambda: setattr(model, "dropout", nn.Dropout())
        yield lambda: setattr(model.classifier, "bias", None)
        yield lambda: model.train()
        yield lambda: pk.attach(model, pk.LoraConfig())

    model = tiny_bert()
    for change in changes(model):
        with pytest.raises(AssertionError, match=r"changed|not equal"), unchanged(model):
            change()
