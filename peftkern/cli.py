"""The command line: parses, calls the package, prints; the work of every command is a function of the package."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich import box
from rich.console import Console
from rich.table import Column, Table
from typer.core import TyperGroup

from peftkern.errors import PeftkernError
from peftkern.tasks.settings import TrainSettings, load_settings, parse_words

_TRAIN_EXTRAS = ("accelerate", "datasets", "matplotlib", "seqeval", "sklearn", "tensorboard")


class Commands(TyperGroup):
    """Ends a user's mistake, or a missing extra, with one line and exit code 2 instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except PeftkernError as error:
            message = str(error)
        except ModuleNotFoundError as error:
            if error.name not in _TRAIN_EXTRAS:
                raise
            message = f"this command needs {error.name}: {sys.executable} -m pip install 'peftkern[train]'"
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2)


app = typer.Typer(
    cls=Commands,
    help="Parameter-efficient fine-tuning: methods as plugins, on fused ops.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _settings_as_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for every plain field of TrainSettings, under its name and help; None is not given."""
    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
    hints = get_type_hints(TrainSettings)
    for field in dataclasses.fields(TrainSettings):
        kind = hints[field.name] if hints[field.name] in (str, int, float, bool) else str
        flag = "--" + field.name.rstrip("_").replace("_", "-")
        if field.default is dataclasses.MISSING:  # a mapping: --set, --verbalizer, or YAML
            continue
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
            help=field.metadata["help"] + (f" (default: {shown})" if shown else ""),
            show_default=False,
        )
        parameter = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None)
        parameters.append(parameter.replace(annotation=Annotated[kind | None, option]))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


@app.command()
def methods() -> None:
    """List the installed methods, and plugins that are broken or in conflict with the reason."""
    from peftkern import registry

    table = Table(Column("name", no_wrap=True), "summary", "from", Column("paper", no_wrap=True), box=box.SIMPLE_HEAD)
    broken = []
    for name, info in registry.methods().items():
        paper = (info.paper or "").replace("https://arxiv.org/abs/", "arXiv:")
        table.add_row(name, info.summary, f"{info.distribution} {info.version}", paper)
        if info.error:
            broken.append(f"{name}: {info.error}")
    console = Console()
    console.print(table)
    for line in broken:
        console.print(f"[red]cannot be used[/red]  {line}", highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Print versions, devices and backends, what is missing and why, and the command that mends it."""
    from peftkern import doctor as examination

    raise typer.Exit(examination.main())


@app.command(name="new-method")
def new_method(
    name: Annotated[str, typer.Argument(help="name of the method: lower case letters, digits and _")],
    directory: Annotated[Path, typer.Option("--dir", help="where to put the new folder")] = Path(),
) -> None:
    """Write a distribution with one working method, its tests and its README."""
    from peftkern.newmethod import write

    folder = write(name, directory)
    typer.echo(f"wrote {folder}\nnext: {sys.executable} -m pip install -e {folder}")
    typer.echo(f"then: {sys.executable} -m pytest {folder}")


Run = Annotated[Path, typer.Argument(help="folder of a finished run", show_default=False)]


@app.command()
@_settings_as_flags
def train(
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file, which flags override")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", help="field of the method's config, e.g. r=8")] = None,
    words: Annotated[
        list[str] | None, typer.Option("--verbalizer", help="a label's words at {mask}: good=great,fine; repeat it")
    ] = None,
    **flags: Any,
) -> None:
    """Train a method on labelled data: settings from a YAML file, flags, or both."""
    settings = load_settings(config, flags | {"verbalizer": parse_words(words) if words else None}, sets or ())
    from peftkern.tasks import report, run

    results = run.train_all(settings)
    names = report.labels(results)
    console = Console()
    console.print(report.table(results, names))
    console.print(*(f"saved in {result.folder}" for result in results), sep="\n", highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    run: Run,
    split: Annotated[str, typer.Option(help="train, dev or test")] = "test",
    data: Annotated[str | None, typer.Option(help="other data than the run's own")] = None,
    encoding: Annotated[str | None, typer.Option(help="encoding of that data")] = None,
) -> None:
    """Score a finished run on a split of its data, or of other data."""
    from peftkern.tasks.run import evaluate as score

    source = {"data": data, "encoding": encoding}
    result = score(run, split, **{name: value for name, value in source.items() if value is not None})
    typer.echo(result.table)
    typer.echo("  ".join(f"{name} {value:.4f}" for name, value in result.metrics.items()))


@app.command()
def predict(
    run: Run,
    texts: Annotated[list[str] | None, typer.Argument(help="texts, each in quotes", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option(help="a text per line, or a CoNLL file")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object per text")] = False,
) -> None:
    """Tag or classify texts with a finished run."""
    from peftkern.tasks.run import predict as tag

    for prediction in tag(run, texts or (), file):
        if as_json:
            shown = dataclasses.asdict(prediction) | {"entities": prediction.entities}
            typer.echo(json.dumps(shown, ensure_ascii=False))
        elif prediction.words:
            entities = ", ".join(f"{words} [{kind}]" for kind, words in prediction.entities)
            typer.echo(f"{prediction.text}\n  {entities or 'no entity'}")
        else:
            typer.echo(f"{prediction.label}\t{prediction.text}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of finished runs", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder for report.md and the pictures")] = Path("report"),
) -> None:
    """Compare finished runs side by side: a table, report.md and pictures."""
    from peftkern.tasks.report import compare

    console = Console()
    console.print(compare(runs, out))
    console.print(f"written to {out}", highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for everything that is made")] = Path("demo"),
    data: Annotated[Path | None, typer.Option(help="folder with CoNLL files instead of generated sentences")] = None,
    text: Annotated[str | None, typer.Option(help="the sentence to tag at the end")] = None,
) -> None:
    """Compare the built-in methods on named-entity recognition, save them, load one back and tag a sentence."""
    from peftkern.tasks.demo import demo as compare_methods

    compare_methods(out, data, text)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="folder or hub id of an adapter, or a run", show_default=False)],
    out: Annotated[Path, typer.Argument(help="folder for the merged model", show_default=False)],
    model: Annotated[str | None, typer.Option(help="the backbone, when the adapter does not name it")] = None,
) -> None:
    """Fold an adapter into its backbone and save a plain model."""
    from peftkern.convert import merge as fold

    typer.echo(f"wrote {fold(adapter, out, model)}")


@app.command()
def convert(
    adapter: Annotated[str, typer.Argument(help="folder or hub id of an adapter, ours or PEFT's", show_default=False)],
    out: Annotated[Path, typer.Argument(help="folder for the new checkpoint", show_default=False)],
    dtype: Annotated[str | None, typer.Option(help="f32, bf16 or f16")] = None,
    fold_rslora: Annotated[bool, typer.Option("--fold-rslora", help="write rsLoRA's scale into B")] = False,
) -> None:
    """Check an adapter strictly and write it anew, in another dtype or scaling; needs no backbone."""
    from peftkern.convert import convert as rewrite

    done = rewrite(adapter, out, dtype=dtype, fold_rslora=fold_rslora)
    size = f"{done.bytes_before / 1024:,.0f} KiB -> {done.bytes_after / 1024:,.0f} KiB"
    typer.echo(f"wrote {done.directory}: {done.method}, {done.tensors} tensors, {size}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Time every op and training step against Hugging Face PEFT and plain PyTorch (see `peftkern bench --help`)."""
    from peftkern.bench import main

    raise typer.Exit(main(context.args))
