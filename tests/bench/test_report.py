"""The files: exact columns, atomic writing, gates that report."""

import csv
import io
import json
import math

import pytest

from bench import _report
from bench._row import Row
from bench._run import Result

LIGER = (
    "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,x_value,y_value_50,"
    "y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,version"
)


@pytest.fixture
def result() -> Result:
    ok = Row("low_rank", "peftkern", "full", "K", "input width", 64.0, {"case": "64", "limit": 1.25}, y=(2.0, 1.9, 2.1))
    ok.ratios = {"floor": (1.2, 1.1, 1.3), "peft": (1.05, 1.0, 1.1)}
    ok.backend, ok.gbps, ok.percent_of_floor = "cpu", 12.5, 61.0
    failed = Row("low_rank", "peft", "full", config={"case": "64"}, status="missing")
    failed.note = 'No module named "peft", sorry'
    machine = {"device": "cpu", "cpu_name": "Some CPU", "gpu_name": "", "versions": {"torch": "2.13", "triton": "3.9"}}
    return Result("cpu", machine, rows=[ok, failed])


def test_csv_has_the_columns_of_liger_and_ours(result):
    text = _report.csv_text(result, "2026-01-01T00:00:00Z")
    assert text.splitlines()[0] == LIGER + (
        ",cpu_name,torch_version,triton_version,backend,gbps,tflops,percent_of_floor,ratio_to_floor_50,"
        "ratio_to_floor_20,ratio_to_floor_80,status,note"
    )
    ours, missing = csv.DictReader(io.StringIO(text))
    assert (ours["y_value_50"], ours["ratio_to_floor_80"], ours["tflops"]) == ("2", "1.3", "")
    assert (ours["cpu_name"], ours["torch_version"], ours["triton_version"]) == ("Some CPU", "2.13", "3.9")
    assert json.loads(ours["extra_benchmark_config_str"])["case"] == "64"
    assert (missing["status"], missing["y_value_50"]) == ("missing", "")
    assert missing["note"] == 'No module named "peft", sorry'


def test_json_is_strict_and_whole(result):
    whole = json.loads(_report.json_text(result, "now"), parse_constant=pytest.fail)
    assert whole["rows"][0]["ratios"]["floor"] == [1.2, 1.1, 1.3]
    assert whole["rows"][1]["y"] == [None, None, None]
    assert whole["complete"] is True


def test_gates_report(result):
    floor, peft = _report.gates(result)
    assert floor["met"] is True and floor["ratio"] == [1.2, 1.1, 1.3]
    assert peft["met"] is False
    result.rows[0].ratios = {"peft": (math.nan,) * 3}
    assert [gate["met"] for gate in _report.gates(result)] == [None, None]


def test_inference_has_its_gate_too(result):
    row = result.rows[0]
    row.kernel_operation_mode, row.config = "forward", {"case": "64", "grad": False}
    (gate,) = _report.gates(result)
    assert gate["wanted"] == "forward without grad not slower than Hugging Face PEFT"
    row.config = {"case": "64", "grad": True}
    assert _report.gates(result) == []


def test_a_gate_of_what_failed_is_not_measured(result):
    result.rows[0].status, result.rows[0].ratios = "failed", {}
    (gate,) = _report.gates(result)
    assert gate["met"] is None and gate["wanted"] == "full pass <= 1.25 x floor"


def test_table_says_what_failed_and_which_gates_are_missed(result):
    text = _report.table(result)
    assert 'missing: No module named "peft", sorry' in text
    assert "gate met: low_rank 64: full pass <= 1.25 x floor 1.200 (1.100-1.300)" in text
    assert "gate MISSED: low_rank 64: full pass not slower than Hugging Face PEFT" in text


def test_files_are_replaced_whole_or_not_at_all(result, tmp_path, monkeypatch):
    written = _report.write(result, tmp_path, "all")
    assert {path.suffix for path in written} >= {".csv", ".json"}
    before = (tmp_path / "all.csv").read_bytes()

    def full_disk(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_report.os, "fsync", full_disk)
    result.rows.clear()
    with pytest.raises(OSError, match="No space left"):
        _report.write(result, tmp_path, "all")
    assert (tmp_path / "all.csv").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in written}


def test_plot_needs_ratios(result):
    pytest.importorskip("matplotlib")
    assert _report.plot(result)[:4] == b"\x89PNG"
    result.rows.clear()
    assert _report.plot(result) is None


def test_slug():
    assert _report.slug({"gpu_name": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"
    assert _report.slug({"cpu_name": "AMD EPYC", "threads": 2}) == "cpu-amd-epyc-2-threads"
