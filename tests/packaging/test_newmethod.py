"""`peftkern new-method`: the package it writes works as written, and nothing is overwritten."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from peftkern.cli import app
from peftkern.errors import ConfigError
from peftkern.newmethod import write
from tests.packaging.conftest import ROOT, pip_install, run


def test_its_tests_pass_as_written(tmp_path: Path) -> None:
    """The formula and some checks of the kit on one model; test_plugin.py runs the same files in full."""
    done = CliRunner().invoke(app, ["new-method", "my_scale2", "--dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "peftkern-my-scale2"
    assert str(folder) in done.output
    site = pip_install(folder, tmp_path / "site", tmp_path)
    chosen = "channel or fits or bert and (trains or saves or merges)"
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    result = run(*pytest_, "-k", chosen, "tests", cwd=folder, path=site)
    assert " passed" in result.stdout
    listed = run(sys.executable, "-m", "peftkern", "methods", cwd=tmp_path, path=site, COLUMNS="200").stdout
    assert "my_scale2" in listed and "peftkern-my-scale2 0.1.0" in listed


def test_the_example_is_what_it_writes(tmp_path: Path) -> None:
    """Only the README of the example is its own."""
    written, example = write("scale", tmp_path), ROOT / "examples" / "peftkern-scale"
    for file in ("pyproject.toml", "peftkern_scale/__init__.py", "tests/test_scale.py"):
        assert (written / file).read_text() == (example / file).read_text(), file


@pytest.mark.parametrize("name", ["Scale", "2fast", "with-dash", "a b", "", "class", "../up"])
def test_refuses_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lower case letters"):
        write(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_refuses_an_installed_method(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'lora' is provided by peftkern"):
        write("lora", tmp_path)


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    write("scale", tmp_path)
    with pytest.raises(ConfigError, match="not overwritten"):
        write("scale", tmp_path)
