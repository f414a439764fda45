"""Compilation ahead of time: every kernel is found, the committed table is that of these kernels, failures are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from peftkern.kernels import _common, _tiles, aot  # noqa: E402

needs_compiler = pytest.mark.skipif(
    _common.INTERPRETED, reason="TRITON_INTERPRET=1: kernels are interpreted and cannot be compiled"
)
TABLE = aot.read_table(aot.TABLE)


def variant(module: str, target: str, *words: str) -> aot.Variant:
    found = aot.variants([module], [target]).values()
    return next(v for v in found if all(word in f"{v.row['call']} {v.row['kernel']}" for word in words))


def test_modules_are_found_by_listing_the_folder() -> None:
    folder = Path(aot.__file__).parent
    assert {"low_rank", "bottleneck", "prompt_concat"} <= set(aot.modules())
    assert all((folder / f"{name}.py").exists() for name in aot.modules())
    assert not {"aot", "_common"} & set(aot.modules())


@needs_compiler
@pytest.mark.parametrize("target", list(aot.TARGETS))
@pytest.mark.parametrize("module", aot.modules())
def test_variants_describe_every_argument(module: str, target: str) -> None:
    variants = aot.variants([module], [target])
    assert variants
    for found in variants.values():
        source = found.source
        assert list(source.signature) == source.fn.arg_names
        assert {name for name, kind in source.signature.items() if kind == "constexpr"} == set(source.constexprs)


@needs_compiler
def test_the_committed_table_is_that_of_these_kernels() -> None:
    """Names, configurations and, under the same Triton, keys; compiling them again is left to `make aot`."""
    differences = aot.differences(TABLE, aot.variants(aot.modules(), aot.TARGETS))
    assert not differences, "\n".join([*differences[:10], "`make aot` brings bench/results/aot.json up to date"])


def test_nothing_spills() -> None:
    assert TABLE["rows"] and {row["spill_bytes"] for row in TABLE["rows"]} == {0}
    assert all(row["shared_bytes"] <= aot.TARGETS[row["target"]].shared for row in TABLE["rows"])
    assert {row["target"] for row in TABLE["rows"]} == set(aot.TARGETS)


@needs_compiler
@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_a_small_kernel_compiles_to_what_the_table_says(target: str) -> None:
    found = variant("low_rank", target, "7x33", "row_kernel")
    row = aot.compiled_row(found)
    assert row["kernel"] == "row_kernel" and row["dtypes"].startswith("bf16 bf16")
    assert 0 < row["shared_bytes"] <= aot.TARGETS[target].shared
    assert row["registers"] > 0 and row["spill_bytes"] == 0
    if aot.versions() == TABLE["compilers"]:
        assert row in TABLE["rows"]


@needs_compiler
def test_a_failing_variant_becomes_a_row() -> None:
    found = variant("prompt_concat", "sm90")
    broken = found.source._replace(constexprs=found.source.constexprs | {"BLOCK_J": 3})
    row = aot.compiled_row(found._replace(source=broken))
    assert "power of 2" in row["error"]


@needs_compiler
def test_spills_and_too_much_shared_memory_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    found = variant("prompt_concat", "sm90")
    usage = {"registers": 255, "spill_bytes": 8, "shared_bytes": 0}
    monkeypatch.setattr(aot, "compile_source", lambda source, target: usage)
    assert "spills 8 bytes" in aot.compiled_row(found)["error"]
    usage.update(spill_bytes=0, shared_bytes=1 << 20)
    assert "1048576 bytes of shared memory" in aot.compiled_row(found)["error"]


@needs_compiler
def test_what_calls_share_is_compiled_once() -> None:
    from peftkern.kernels import low_rank

    distinct = aot.variants(["low_rank"], ["sm90"])
    assert len(distinct) < len(list(low_rank.aot_sources(aot.TARGETS["sm90"].device)))
    assert set(aot.variants(["low_rank", "low_rank"], ["sm90"])) == set(distinct)


@needs_compiler
def test_variants_that_differ_in_hints_alone_keep_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    found = variant("prompt_concat", "sm90").source
    twin = found._replace(attrs={})
    module = type(sys)("twins")
    module.aot_sources = lambda device: iter([found, twin, found])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "peftkern.kernels.twins", module)
    one, two = aot.variants(["twins"], ["sm90"]).values()
    assert two.row["call"] == one.row["call"] + " #2" and one.row["key"] != two.row["key"]


@needs_compiler
def test_a_key_follows_the_kernel_its_callees_and_its_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftkern.kernels import low_rank

    text = aot.source_text(low_rank.dy_kernel)
    assert "def dy_kernel" in text and "def dot" in text and "def _dot_split" in text and "_INTERPRETED = False" in text
    before = set(aot.variants(["low_rank"], ["sm90"]))
    monkeypatch.setitem(_tiles._OVERRIDES, ("sm90", "dy", "half"), {32: (32, 128, 32, 4, 2)})
    _tiles.tile.cache_clear()
    after = set(aot.variants(["low_rank"], ["sm90"]))
    _tiles.tile.cache_clear()
    assert before - after and after - before


@pytest.fixture
def table() -> dict:
    return json.loads(json.dumps(TABLE))


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [TABLE["rows"][0] | {"error": "spills"}, *TABLE["rows"][1:]]
    (tmp_path / "aot.json").write_text(aot.table_text(reversed(rows)))
    again = aot.read_table(tmp_path / "aot.json")
    order = {row["key"]: row for row in again["rows"]}
    assert len(again["rows"]) == len(rows) and all(order[row["key"]] == row for row in rows)
    assert aot.table_text(again["rows"]) == (tmp_path / "aot.json").read_text()


@needs_compiler
@pytest.mark.parametrize("change", ["config", "missing", "more", "error"])
def test_a_table_that_is_out_of_date_is_told(table: dict, change: str) -> None:
    found = aot.variants(aot.modules(), aot.TARGETS)
    row = table["rows"][0]
    if change == "missing":
        table["rows"].remove(row)
    elif change == "more":
        table["rows"].append(row | {"call": "an op of yesterday"})
    else:
        row[change] = "something else"
    told = "\n".join(aot.differences(table, found))
    expected = {"missing": "not in the table", "more": "an op of yesterday", "error": "something else"}
    assert expected.get(change, "no longer a variant") in told


@needs_compiler
def test_a_figure_that_compiling_does_not_give_is_told(table: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "versions", lambda: table["compilers"])
    figures = ("registers", "spill_bytes", "shared_bytes")
    known = {row["key"]: {name: row[name] for name in figures} for row in table["rows"]}
    found = aot.variants(aot.modules(), aot.TARGETS)
    if set(found) != set(known):
        pytest.skip(f"triton {triton.__version__} has other keys than the table's {table['compilers']['triton']}")
    monkeypatch.setattr(aot, "compiled_row", lambda v: v.row | known[v.row["key"]])
    assert aot.check(table, found, 5) == []
    for row in table["rows"]:
        row["registers"] += 1
    assert len(aot.check(table, found, 5)) == 5


def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "peftkern.kernels.aot", "--out", str(tmp_path / "rows.json")]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
