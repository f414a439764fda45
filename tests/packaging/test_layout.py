"""Wheel, editable install and bare checkout hold the same package; `kernels` stays somebody else's name."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import peftkern
from tests.packaging.conftest import ROOT, python, run

WHERE = """
import peftkern, peftkern.kernels.low_rank as low_rank
print(peftkern.__file__)
print(low_rank.__file__)
"""


def test_bare_checkout_finds_kernels(sources: Path, tmp_path: Path) -> None:
    package, kernel = python(WHERE, tmp_path, sources).splitlines()
    assert Path(package) == sources / "peftkern" / "__init__.py"
    assert Path(kernel) == sources / "kernels" / "low_rank.py"


def test_wheel_finds_kernels(installed: Path, tmp_path: Path) -> None:
    package, kernel = python(WHERE, tmp_path, installed).splitlines()
    assert Path(package) == installed / "peftkern" / "__init__.py"
    assert Path(kernel) == installed / "peftkern" / "kernels" / "low_rank.py"


def test_editable_install_finds_kernels(tmp_path: Path) -> None:
    # More than one: the checkout's own peftkern.egg-info is on pytest's path as well.
    found = list(importlib.metadata.distributions(name="peftkern"))
    if not any('"editable": true' in (distribution.read_text("direct_url.json") or "") for distribution in found):
        pytest.skip("peftkern is not installed as an editable here")
    package, kernel = python(WHERE, tmp_path).splitlines()
    assert Path(package).parent == Path(peftkern.__file__).parent
    assert Path(kernel).parent == ROOT / "kernels"


def test_kernels_from_the_root_is_the_installed_one(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("whose = 'theirs'\n")
    assert python("import kernels; print(kernels.whose)", ROOT, tmp_path) == "theirs"


def test_transformers_does_not_take_ours_for_kernels() -> None:
    if any(d.name == "kernels" for d in importlib.metadata.distributions()):
        pytest.skip("the distribution `kernels` is installed")
    code = "from transformers import BertModel, utils; print(utils.is_kernels_available())"
    assert python(code, ROOT) == "False"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_wheel_ships_types_kernels_and_entry_points(wheel: Path, sources: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "peftkern/py.typed" in names
    assert {f"peftkern/kernels/{file.name}" for file in (sources / "kernels").glob("*.py")} <= names
    assert {str(file.relative_to(sources)) for file in (sources / "peftkern").rglob("*.py")} <= names
    assert {f"peftkern/bench/{file.name}" for file in (sources / "bench").glob("*.py")} <= names
    assert not [name for name in names if name.split("/")[0] in ("kernels", "bench", "tests", "csrc")]
    assert "lora = peftkern.methods.lora:LoRA" in points
    assert "peftkern = peftkern.testing.plugin" in points


def test_every_folder_is_a_package() -> None:
    """setuptools takes the packages from a list, so that a new folder must be added to it."""
    listed = set(re.findall(r'^  "(peftkern[\w.]*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "peftkern").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} | {"peftkern.kernels", "peftkern.bench"} == listed


def test_sdist_holds_what_a_build_needs(sources: Path, tmp_path: Path) -> None:
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=sources)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = [*(sources / "csrc").rglob("*.*"), *(sources / "kernels").glob("*.py")]
    assert {str(file.relative_to(sources)) for file in wanted if file.is_file()} <= names
    assert {"setup.py", "LICENSE", "peftkern/py.typed"} <= names


@pytest.mark.parametrize("name", ["STABLE_TORCH_ERROR_CODE_CHECK"])
def test_sources_keep_to_names_that_torch_2_11_has(name: str) -> None:
    """The headers of the torch at hand offer more; with an older one the extension would then not build."""
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert files
    assert not [str(path) for path in files if re.search(rf"\b{name}\b", path.read_text())]
