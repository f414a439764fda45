"""`peftkern doctor`: what is there, what is missing and why, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest
import torch

from peftkern import dispatch, doctor
from tests.packaging.conftest import python, run


def found(section: str) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine() if finding.section == section}


def test_names_versions_devices_ops_and_methods() -> None:
    versions = found("versions")
    assert versions["torch"].detail == torch.__version__ and not versions["torch"].problem
    assert versions["transformers"].detail == importlib.metadata.version("transformers")
    assert "threads" in found("devices")["cpu"].detail
    assert set(found("backends")) == set(dispatch.ORDER)
    assert {"low_rank", "bottleneck", "prompt_concat"} <= set(found("ops"))
    assert "lora" in found("methods")


def test_report_puts_problem_and_fix_below_their_line() -> None:
    broken = doctor.Finding("backends", "cpu", "", "not built", "make it")
    text = doctor.report([broken, doctor.Finding("ops", "f", "cpu")])
    assert text.splitlines()[:4] == ["backends", "  ! cpu", "         not built", "         mend with: make it"]


def test_an_old_requirement_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    old = {"transformers": "4.57.1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: old.get(name) or version(name))
    finding = found("versions")["transformers"]
    assert "too old: want 5.0" in finding.problem and 'pip install "transformers>=5.0"' in finding.fix
    assert doctor.main() == 1


def test_a_missing_compiled_part_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dispatch, "load_library", lambda name: f"peftkern/{name} is not built{dispatch.ASK_DOCTOR}")
    monkeypatch.setattr(doctor.peftkern, "__file__", str(tmp_path / "__init__.py"))
    (tmp_path / "_C.not-built.txt").write_text("c++ ended with exit code 1:\nno such header\n")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    cpu = found("backends")["cpu"]
    assert cpu.problem == "peftkern/cpu is not built\nc++ ended with exit code 1:\nno such header"
    assert "apt-get install g++" in cpu.fix and "--no-build-isolation" in cpu.fix and "pybind11" in cpu.fix


def test_installed_without_compiler_triton_and_typer(installed: Path, wheel: Path, tmp_path: Path) -> None:
    """A pure-Python wheel, with neither triton nor typer: everything still runs, and doctor says what is missing."""
    code = """
import json, sys
sys.modules["triton"] = sys.modules["typer"] = None
import torch
import peftkern as pk
from peftkern import doctor
from peftkern.testing import tiny_bert, token_batch
model = pk.attach(tiny_bert(), pk.LoraConfig())
model(**token_batch(labels=5)).loss.backward()
findings = {f"{f.section}/{f.name}": [f.problem, f.fix] for f in doctor.examine()}
print(json.dumps(findings))
"""
    findings = json.loads(python(code, tmp_path, installed).splitlines()[-1])
    problem, fix = findings["backends/cpu"]
    assert "not built\n/nonexistent/c++ does not run: [Errno 2]" in problem and "peftkern doctor" not in problem
    assert "--no-build-isolation" in fix and wheel.as_uri() in fix
    assert findings["backends/triton"] == ["triton is not installed", f"{sys.executable} -m pip install triton"]
    assert findings["methods/lora"][0] == ""


def test_runs_as_a_module(tmp_path: Path) -> None:
    done = run(sys.executable, "-m", "peftkern.doctor", cwd=tmp_path)
    assert [line for line in done.stdout.splitlines() if line and not line.startswith(" ")] == [
        "versions", "devices", "backends", "ops", "methods",
    ]  # fmt: skip
