"""The main job in one command: methods compared on identical work, saved, loaded back and put to use."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text as RichText

from peftkern.errors import ConfigError, DataError, PeftkernError
from peftkern.tasks.backbone import DEMO_PACKAGE, PACKAGE, resolve
from peftkern.tasks.data import load_sentences
from peftkern.tasks.settings import TrainSettings
from peftkern.tasks.synth import generate

SENTENCE = "Professor Marovka left Talvona Bank in May and moved to Port Selinda ."
LOADED_BACK = "LoRA"
GENERATED = "data"

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


@dataclass(frozen=True)
class Row:
    """One row of the comparison. Learning rates are each method's own; everything else is the same for all."""

    name: str
    method: str
    lr: float = 1e-3
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The run's folder below the demo's."""
        return self.name.replace(" ", "-").lower()


ROWS = (
    Row("before tuning", "none"),
    Row("head only", "head", 1e-2),
    Row("LoRA", "lora", 4e-3, {"r": 8}),
    Row("bottleneck adapter", "adapter", 4e-3, {"reduction_factor": 16}),
    Row("soft prompt", "prompt_tuning", 2e-2, {"num_virtual_tokens": 10, "prompt_tuning_init": "SAMPLE_VOCAB"}),
    Row("full fine-tuning", "full", 2e-4, {"keep_original": False}),
)


def demo(
    out: Path | str = "demo",
    data: Path | str | None = None,
    text: str | None = None,
    model: str = PACKAGE + DEMO_PACKAGE,
    changes: dict[str, Any] | None = None,
    say: Callable[[Any], None] | None = None,
) -> None:
    """Compare `ROWS` on generated sentences (or on the CoNLL files in `data`) and tag `text`.

    Writes below `out`, replacing an earlier demo there: a folder per run with its adapter and TensorBoard events,
    report.md, report.png and curves.png. Each run has a process of its own, so that its peak memory is its own.
    `changes` go to every run's settings. Raises PeftkernError when a run fails, and when an adapter that is loaded
    back predicts anything else than before.
    """
    say = say or Console().print
    out = Path(out)
    started = time.perf_counter()
    resolve(model)
    _check_empty(out)
    source = Path(data) if data else generate(out / GENERATED)
    common: dict[str, Any] = {
        "data": str(source), "model": model, "epochs": 3, "batch_size": 8, "max_length": 96, "progress": False,
    }  # fmt: skip
    plan = [
        TrainSettings(
            method=row.method, lr=row.lr, options=row.options, output=str(out / row.folder), **common | (changes or {})
        )
        for row in ROWS
    ]
    splits = load_sentences(plan[0].source)
    if not splits.test:
        raise DataError(f"data: {source} has no test set, and the table is about that")
    for settings in plan:
        shutil.rmtree(settings.output, ignore_errors=True)
    say(f"{len(splits.train)} training, {len(splits.dev)} development, {len(splits.test)} test sentences in {source}")
    _run_all(plan, say)
    _show(out, say)
    say(_check_loading(out / next(row.folder for row in ROWS if row.name == LOADED_BACK), splits.test))
    say(_tagged(out, text or SENTENCE))
    say(f"\nEverything is in {out}/: report.md, curves.png, a folder per run; tensorboard --logdir {out}")
    say(f"{time.perf_counter() - started:.0f} s in all")


def _check_empty(out: Path) -> None:
    """ConfigError for a folder that holds anything but an earlier demo, whose runs are about to be replaced."""
    if not out.exists():
        return
    ours = {GENERATED, "report.md", "report.png", "curves.png", *(row.folder for row in ROWS)}
    others = sorted({path.name for path in out.iterdir()} - ours) if out.is_dir() else [out.name]
    if others:
        raise ConfigError(f"out: {out} holds {', '.join(others[:3])}, which no demo wrote; choose another folder")


def _run_all(plan: list[TrainSettings], say: Callable[[Any], None]) -> None:
    """Train each in a fresh process, forked from a server that has imported everything and done nothing else."""
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context: Any = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(["peftkern.tasks.run", "transformers.models.auto.modeling_auto"])
    for row, settings in zip(ROWS, plan, strict=True):
        started = time.perf_counter()
        reports: Any = context.SimpleQueue()
        process = context.Process(target=_train, args=(settings, reports))
        process.start()
        process.join()
        failure = "its process was ended" if reports.empty() else reports.get()
        if failure:
            raise PeftkernError(f"demo: {row.name} failed: {failure}")
        say(f"  {row.name}: {time.perf_counter() - started:.0f} s")


def _train(settings: TrainSettings, reports: Any) -> None:
    from peftkern.tasks.run import train

    try:
        train(settings)
    except PeftkernError as error:
        reports.put(str(error))
    except BaseException as error:
        reports.put(f"{type(error).__name__}: {error}")
        raise
    else:
        reports.put("")


def _show(out: Path, say: Callable[[Any], None]) -> None:
    from peftkern.tasks.report import compare, table
    from peftkern.tasks.run import RunResult

    folders = [out / row.folder for row in ROWS]
    compare(folders, out)
    say(table([RunResult.load(folder) for folder in folders], [row.name for row in ROWS], title="Test set"))
    say("P, R and F1 over whole entities; seconds: training steps only; peak: resident set of the run's own process")


def _check_loading(run: Path, test: list[Any]) -> str:
    """Load a saved adapter into a fresh backbone and compare its predictions with those made after training."""
    import json

    from peftkern.tasks.run import Predictor

    before = json.loads((run / "test-predictions.json").read_text(encoding="utf-8"))
    predictor = Predictor(run)
    after = predictor.tags([sentence.words for sentence in test])
    if before != after:
        wrong = sum(a != b for a, b in zip(before, after, strict=True))
        raise PeftkernError(f"demo: {run} loaded back predicts {wrong} of {len(test)} sentences differently")
    size = (run / "adapter_model.safetensors").stat().st_size
    return (
        f"{run} ({size / 1024:.0f} KiB) loaded into a fresh backbone: the same tags on all {len(test)} test sentences"
    )


def _tagged(out: Path, text: str) -> RichText:
    """The sentence as the LoRA run tags it, entities in colour."""
    from peftkern.tasks.run import predict

    run = out / next(row.folder for row in ROWS if row.name == LOADED_BACK)
    prediction = predict(run, [text])[0]
    kinds = sorted({tag[2:] for tag in prediction.tags if tag != "O"})
    shown = RichText()
    for word, tag in zip(prediction.words, prediction.tags, strict=True):
        style = f"bold {_COLOURS[kinds.index(tag[2:]) % len(_COLOURS)]}" if tag != "O" else ""
        shown.append(word, style=style)
        shown.append(f"[{tag}] " if tag != "O" else " ", style="dim")
    return shown
