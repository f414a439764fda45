"""Compilation ahead of time: every kernel module is found, one small kernel compiles, failures are reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from peftkern.kernels import _common, aot  # noqa: E402

needs_compiler = pytest.mark.skipif(
    _common.INTERPRETED, reason="TRITON_INTERPRET=1: kernels are interpreted and cannot be compiled"
)


def test_modules_are_found_by_listing_the_folder() -> None:
    folder = Path(aot.__file__).parent
    assert {"low_rank", "bottleneck", "prompt_concat"} <= set(aot.modules())
    assert all((folder / f"{name}.py").exists() for name in aot.modules())
    assert not {"aot", "_common"} & set(aot.modules())


@needs_compiler
@pytest.mark.parametrize("target", list(aot.TARGETS))
@pytest.mark.parametrize("module", aot.modules())
def test_variants_describe_every_argument(module: str, target: str) -> None:
    variants = aot.variants(module, target)
    assert variants
    for source in variants.values():
        assert list(source.signature) == source.fn.arg_names
        assert {name for name, kind in source.signature.items() if kind == "constexpr"} == set(source.constexprs)


@needs_compiler
@pytest.mark.parametrize("target", list(aot.TARGETS))
def test_a_small_kernel_compiles(target: str) -> None:
    source = next(s for name, s in aot.variants("low_rank", target).items() if "7x33" in name and "row_kernel" in name)
    row = aot.compile_source(source, target)
    assert row["kernel"] == "row_kernel"
    assert row["dtypes"]["x_ptr"] == "bf16"
    assert 0 < row["shared_bytes"] <= aot.TARGETS[target].shared
    assert row["registers"] > 0
    assert row["spill_bytes"] == 0
    json.dumps(row)


@needs_compiler
def test_a_failing_variant_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    source = next(iter(aot.variants("prompt_concat", "sm90").values()))
    broken = source._replace(constexprs=source.constexprs | {"BLOCK_J": 3})
    monkeypatch.setattr(aot, "variants", lambda module, target: {source.name: broken})
    (row,) = aot._compile_share("prompt_concat", "sm90", 0, 1)
    assert "power of 2" in row["error"]


def test_the_interpreter_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "peftkern.kernels.aot", "--out", str(tmp_path / "rows.json")]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
