"""The files: exact columns, atomic writing, gates that report."""

import csv
import io
import json
import math

import pytest

from bench import _plots, _report
from bench._row import Row
from bench._supervise import Result

LIGER = (
    "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,x_value,y_value_50,"
    "y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,version"
)


GATE = {"limit": 1.25, "mode": "full", "against": "floor", "metric": "speed"}


@pytest.fixture
def result() -> Result:
    config = {"case": "64", "gates": [GATE], "M": 128, "R": 8}
    ok = Row("low_rank", "peftkern", "full", "K", "input width", 64.0, config, y=(2.0, 1.9, 2.1))
    ok.ratios = {"floor": (1.2, 1.1, 1.3), "peft": (1.05, 1.0, 1.1), "torch": (0.9, 0.8, 0.95)}
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
    floor, peft, eager = _report.gates(result)
    assert floor["met"] is True and floor["value"] == [1.2, 1.1, 1.3]
    assert peft["met"] is False and eager["met"] is True
    result.rows[0].ratios = {"peft": (math.nan,) * 3}
    assert [gate["met"] for gate in _report.gates(result)] == [None, None]


def test_gates_in_microseconds_and_on_memory(result):
    row = result.rows[0]
    row.kernel_operation_mode, row.ratios = "forward", {}
    row.config["gates"] = [{"limit": 1950.0, "mode": "forward", "against": "", "metric": "speed"}]
    (gate,) = _report.gates(result)
    assert (gate["wanted"], gate["value"], gate["met"]) == ("forward <= 1950 us", [2000.0, 1900.0, 2100.0], False)
    row.metric_name, row.ratios = "memory", {"peft": (0.7, 0.7, 0.7)}
    row.config["gates"] = [{"limit": 0.8, "mode": "full", "against": "peft", "metric": "peak"}]
    (gate,) = _report.gates(result)
    assert (gate["wanted"], gate["met"]) == ("peak memory <= 0.8 x peft", True)


def test_a_shape_slower_than_eager_pytorch_is_a_missed_gate(result):
    result.rows[0].ratios = {"torch": (1.1, 1.0, 1.2)}
    assert "gate MISSED: low_rank 64: full pass not slower than eager PyTorch 1.100" in _report.table(result)
    result.rows[0].kernel_name = "step"
    assert not any("eager" in gate["wanted"] for gate in _report.gates(result))


def test_inference_has_its_gate_too(result):
    row = result.rows[0]
    row.kernel_operation_mode, row.config = "forward", {"case": "64", "grad": False}
    assert [gate["wanted"] for gate in _report.gates(result)] == [
        "forward without grad not slower than Hugging Face PEFT",
        "forward without grad not slower than eager PyTorch",
    ]
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
    assert {end: picture[:4] for end, picture in _plots.pictures(result).items()} == {
        ".png": b"\x89PNG",
        "-heat.png": b"\x89PNG",
    }
    result.rows.clear()
    assert _plots.pictures(result) == {}


def test_the_heat_map_shows_the_worst_case_of_a_cell(result):
    again = Row.from_dict(result.rows[0].to_dict())
    again.ratios["torch"] = (1.3, 1.2, 1.4)
    graph = Row.from_dict(result.rows[0].to_dict())
    graph.config["launch"] = "graph"
    step = Row.from_dict(result.rows[0].to_dict())
    step.kernel_name = "step"
    result.rows = [again, *result.rows, graph, step]
    assert _plots.heat_cells(result) == {
        ("low_rank", ""): {8: {(64.0, 128): 1.3}},
        ("low_rank", "graph"): {8: {(64.0, 128): 0.9}},
    }


def test_cells_of_the_heat_map_take_one_line_of_the_table(result):
    for row in result.rows:
        row.config["light"] = True
    peer = Row("low_rank", "torch", "full", config={"case": "64", "light": True}, y=(1.0, 1.0, 1.0))
    result.rows.append(peer)
    lines = _report.table(result).splitlines()
    assert sum("low_rank 64" in line for line in lines if not line.startswith("gate")) == 1
    assert any("missing" in line for line in lines)


def test_slug():
    assert _report.slug({"gpu_name": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"
    assert _report.slug({"cpu_name": "AMD EPYC", "threads": 2}) == "cpu"
