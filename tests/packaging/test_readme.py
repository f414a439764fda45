"""The Python of README.md runs as it stands, on tiny models."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from peftkern.testing import tiny_bert
from tests.packaging.conftest import ROOT, run

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


def test_there_is_a_block_for_each_of_the_jobs() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{number}" for number in range(1, len(BLOCKS) + 1)])
def test_block_runs(block: str, tmp_path: Path, plugin: Path) -> None:
    """`my-model` is a folder with a tiny BERT; the plugin that the README installs is installed."""
    tiny_bert().save_pretrained(tmp_path / "my-model")
    (tmp_path / "block.py").write_text(block)
    run(sys.executable, "block.py", cwd=tmp_path, path=plugin)


def test_tables_name_every_method_and_op() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    names = [*(ROOT / "peftkern" / "methods").glob("[a-z]*.py"), *(ROOT / "kernels").glob("[a-z]*.py")]
    missing = [file.stem for file in names if file.stem != "aot" and f"`{file.stem}`" not in readme]
    assert not missing
