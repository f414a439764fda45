"""A plugin that does not import, and two that claim one name, are listed with the reason and stop nobody else."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import peftkern as pk
from peftkern import doctor
from peftkern.cli import app
from peftkern.errors import PluginConflictError, PluginLoadError
from peftkern.testing import tiny_bert


def distribution(site: Path, name: str, points: str, module: str = "") -> None:
    """A distribution as pip leaves it: metadata and, unless empty, a module of the same name."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[peftkern.methods]\n{points}\n")
    if module:
        (site / f"{name.replace('-', '_')}.py").write_text(module)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on sys.path with one broken plugin and one that claims `lora`."""
    distribution(tmp_path, "fractured", "fractured = fractured:Fractured", "raise RuntimeError('no such luck')")
    distribution(tmp_path, "hollow", "hollow = hollow:Hollow", "class Hollow: pass")
    distribution(tmp_path, "other-lora", "lora = other_lora:LoRA", "class LoRA: pass")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.usefixtures("site")
def test_broken_plugins_are_listed_with_their_error() -> None:
    methods = pk.methods()
    assert "RuntimeError: no such luck" in (methods["fractured"].error or "")
    assert "fractured" in methods["fractured"].distribution
    assert "subclass of peftkern.adapter.Method" in (methods["hollow"].error or "")
    with pytest.raises(PluginLoadError, match="no such luck"):
        pk.registry.load("fractured")


@pytest.mark.usefixtures("site")
def test_conflict_names_both_distributions() -> None:
    with pytest.raises(PluginConflictError, match="other-lora") as caught:
        pk.registry.load("lora")
    assert "peftkern" in str(caught.value)


@pytest.mark.usefixtures("site")
def test_others_go_on_working() -> None:
    assert pk.methods()["bitfit"].error is None
    pk.attach(tiny_bert(), pk.BitFitConfig())


@pytest.mark.usefixtures("site")
def test_methods_command_lists_everything() -> None:
    done = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for word in ("bitfit", "fractured", "no such luck", "claimed by", "other-lora"):
        assert word in done.output


@pytest.mark.usefixtures("site")
def test_doctor_says_how_to_mend_them() -> None:
    found = {finding.name: finding for finding in doctor.examine() if finding.section == "methods"}
    assert "pip uninstall fractured" in found["fractured"].fix
    assert "uninstall one of them" in found["lora"].problem
    assert not found["bitfit"].problem
