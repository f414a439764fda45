"""The command line: parses, calls the package, prints. Every command's work is a function that can be called without it."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from peftkern.errors import PeftkernError
from peftkern.tasks.settings import TrainSettings, load_settings

_TRAIN_EXTRAS = ("accelerate", "datasets", "matplotlib", "seqeval", "sklearn", "tensorboard")


class Commands(TyperGroup):
    """Ends a user's mistake, or a missing extra, with one line and exit code 2 instead of a traceback."""

    def invoke(self, ctx: typer.Context) -> Any:
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
        if field.default is dataclasses.MISSING:  # a mapping: --set, or YAML
            continue
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
        option = typer.Option(
            f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
            help=f"{field.metadata['help']}" + (f" [default: {shown}]" if shown else ""),
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

    table = Table("name", "summary", "from", "paper")
    broken = []
    for name, info in registry.methods().items():
        table.add_row(name, info.summary, f"{info.distribution} {info.version}", info.paper)
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
    typer.echo(f"wrote {folder}\nnext: {sys.executable} -m pip install -e {folder} && {sys.executable} -m pytest {folder}")
