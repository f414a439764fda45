"""README's figures are those of the committed result files, and say what they are worth."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import _readme, _run, _sources

ROOT = Path(__file__).parents[2]


def test_the_readme_is_what_the_generator_writes() -> None:
    assert _readme.main("check") == 0, "`make readme-figures` writes README's figures from bench/results"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A README, kernels and results of their own."""
    for name in ("bench/results/cpu", "kernels", "csrc/cpu", "csrc/cuda", "peftkern/ops"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("kernels/a.py", "csrc/cpu/a.cpp", "csrc/cuda/a.cu", "peftkern/ops/a.py", "peftkern/dispatch.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / "README.md").write_text(f"# title\n{_readme.BEGIN}\nold\n{_readme.END}\nrest\n")
    return tmp_path


def write(checkout: Path, device: str, folder: str, *, name: str = "all", ratio: float = 1.1, **change: object) -> None:
    machine = {
        "device": device, "cpu_name": "Some CPU", "gpu_name": "Some GPU" if device == "cuda" else "", "threads": 2,
        "active_isa": "avx2", "cuda": "13.0", "load_average": 0.1, "git_revision": "abc1234",
        "versions": {"torch": "2.13", "triton": "3.9", "peft": "0.21"},
        "kernel_sources_sha256": _sources.kernel_hash(device, checkout),
    }  # fmt: skip

    def row(provider: str, value: float) -> dict:
        row = {"kernel_name": "step", "kernel_provider": provider, "kernel_operation_mode": "full", "x_value": 64}
        row |= {"x_name": "tokens", "config": {"case": "bert lora"}, "y": [2, 1, 3]}
        row |= {"ratios": {"floor": [value] * 3}}
        return row | dict.fromkeys(("gbps", "tflops", "percent_of_floor"))

    whole = {
        "timestamp": "2026-11-24T00:00:00Z", "machine": machine, "arguments": {"quick": False}, "complete": True,
        "tests": {"outcome": "passed", "summary": "9 passed"}, "rows": [row("peftkern", ratio), row("peft", 1.7)],
    }  # fmt: skip
    (checkout / "bench" / "results" / folder).mkdir(exist_ok=True)
    (checkout / "bench" / "results" / folder / f"{name}.json").write_text(json.dumps(whole | change))


def test_without_a_file_no_gpu_figure_is_claimed(checkout: Path) -> None:
    write(checkout, "cpu", "cpu")
    text = _readme.figures(checkout)
    assert _readme.NO_GPU in text and "### Figures: Some CPU" in text
    assert "| bert lora, 64 tokens | 1.10 (1.10-1.10) | 1.70 (1.70-1.70) |" in text
    assert _readme.OLDER not in text and "abc1234, 2026-11-24" in text


def test_a_gpu_has_a_table_of_its_own(checkout: Path) -> None:
    write(checkout, "cuda", "some-gpu")
    text = _readme.figures(checkout)
    assert _readme.NO_GPU not in text and "### Figures: Some GPU" in text
    text = " ".join(text.split())
    assert "CUDA 13.0" in text and "Correctness tests before the run: passed (9 passed)." in text


def test_every_cpu_has_tables_of_its_own(checkout: Path) -> None:
    write(checkout, "cpu", "cpu")
    write(checkout, "cpu", "cpu-other", ratio=1.4)
    text = _readme.figures(checkout)
    assert _readme.NO_GPU in text and text.count("### Figures: Some CPU, avx2") == 2
    assert text.index("1.10 (") < text.index("1.40 (")


@pytest.mark.parametrize(
    ("file", "older"),
    [
        ("kernels/a.py", {"cuda"}),
        ("csrc/cuda/a.cu", {"cuda"}),
        ("csrc/cpu/a.cpp", {"cpu"}),
        ("peftkern/ops/a.py", {"cpu", "cuda"}),
        ("peftkern/dispatch.py", {"cpu", "cuda"}),
        ("kernels/aot.py", set()),
    ],
)
def test_figures_of_other_kernels_say_so(checkout: Path, file: str, older: set[str]) -> None:
    write(checkout, "cpu", "cpu")
    write(checkout, "cuda", "some-gpu")
    (checkout / file).write_text("changed")
    _, cpu, gpu = _readme.figures(checkout).split("### Figures:")
    assert {name for name, text in (("cpu", cpu), ("cuda", gpu)) if _readme.OLDER in text} == older


def test_the_later_file_wins_and_quick_runs_do_not_count(checkout: Path) -> None:
    write(checkout, "cpu", "cpu", name="z-old", ratio=1.4, timestamp="2026-11-01T00:00:00Z")
    write(checkout, "cpu", "cpu", name="a-new", ratio=1.2)
    write(checkout, "cpu", "cpu", name="quick", ratio=9.0, arguments={"quick": True}, timestamp="2027-01-01T00:00:00Z")
    text = _readme.figures(checkout)
    assert "1.20 (" in text and "1.40 (" not in text and "9.00 (" not in text


def test_missed_gates_are_named(checkout: Path) -> None:
    gates = [{"case": "low_rank 64", "wanted": "forward <= 2 x floor", "met": met} for met in (True, False, None)]
    write(checkout, "cuda", "some-gpu", gates=gates)
    text = " ".join(_readme.figures(checkout).split())
    assert "1 of 2 gates met; missed: forward <= 2 x floor: low_rank 64." in text


def test_a_run_cut_short_says_so(checkout: Path) -> None:
    write(checkout, "cpu", "cpu", complete=False)
    assert "The time budget cut the run short." in _readme.figures(checkout)


def test_writing_and_checking(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(checkout, "cpu", "cpu")
    assert _readme.main("check", checkout) == 1 and "make readme-figures" in capsys.readouterr().err
    assert _readme.main("write", checkout) == 0
    assert _readme.main("check", checkout) == 0
    text = (checkout / "README.md").read_text()
    assert text.startswith("# title\n") and text.endswith("\nrest\n") and "old" not in text
    with pytest.raises(ValueError, match="no section"):
        _readme.replaced("nothing here", "x")


def test_the_command_line_writes_and_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(_run._readme, "main", lambda how: asked.append(str(how)) or 1)
    assert _run.main(["--readme", "check"]) == 1 and asked == ["check"]
