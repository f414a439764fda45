"""examples/peftkern-scale, pip-installed for real: does all that a built-in method does, with no line changed here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, python, run

LIFE = """
import torch
import peftkern as pk
from peftkern.testing import tiny_bert, token_batch

info = pk.methods()["scale"]
assert (info.distribution, info.version, info.error) == ("peftkern-scale", "0.1.0", None), info
assert info.summary and info.paper.startswith("https://")

model, batch = tiny_bert(), token_batch(labels=5)
before = model(**batch).logits.detach()
pk.attach(model, pk.ScaleConfig(target_modules=["query", "dense"], task_type="TOKEN_CLS"))
assert torch.equal(model(**batch).logits, before)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(10):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
assert losses[-1] < losses[0], losses
model.eval()
after = model(**batch).logits.detach()
assert not torch.allclose(after, before)

pk.save(model, "saved")
loaded = pk.load(tiny_bert(), "saved").eval()
assert torch.equal(loaded(**batch).logits, after)
pk.merge(loaded)
torch.testing.assert_close(loaded(**batch).logits, after)
pk.unmerge(loaded)
assert torch.equal(pk.detach(loaded)(**batch).logits, before)
print("lived")
"""


def test_lives_a_whole_life(plugin: Path, tmp_path: Path) -> None:
    assert python(LIFE, tmp_path, plugin) == "lived"


def test_is_listed(plugin: Path, tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "peftkern", "methods", cwd=tmp_path, path=plugin, COLUMNS="200")
    line = next(line for line in done.stdout.splitlines() if " scale " in line)
    assert "peftkern-scale 0.1.0" in line


def test_its_own_tests_pass(plugin: Path, tmp_path: Path) -> None:
    """The formula, and the whole conformance kit."""
    tests = ROOT / "examples" / "peftkern-scale" / "tests"
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, cwd=tmp_path, path=plugin)
    assert " passed" in done.stdout


def test_is_benchmarked(plugin: Path, tmp_path: Path) -> None:
    command = ["-m", "peftkern", "bench", "--method", "scale", "--quick", "--no-build", "--out", "results"]
    done = run(sys.executable, *command, cwd=tmp_path, path=plugin)
    assert "scale" in done.stdout
    assert any("scale" in file.read_text() for file in (tmp_path / "results").rglob("*.csv"))


def test_checkpoint_names_the_distribution_to_install(plugin: Path, tmp_path: Path) -> None:
    code = """
import peftkern as pk
from peftkern.testing import tiny_bert
pk.save(pk.attach(tiny_bert(), pk.ScaleConfig()), "saved")
"""
    python(code, tmp_path, plugin)
    with pytest.raises(AssertionError, match="pip install peftkern-scale"):
        python('import peftkern as pk\nfrom peftkern.testing import tiny_bert\npk.load(tiny_bert(), "saved")', tmp_path)
