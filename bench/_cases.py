"""Which cases run, and in what order: the most telling ones of every op and of the steps first."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

from ._measure import FLOOR, OURS, YARDSTICK, Case, Options

_TUNED = "max-autotune-no-cudagraphs"
COMPILED = {"default": "torch.compile", _TUNED: "torch.compile max-autotune"}
"""Mode of torch.compile -> provider."""
INTRUSIVE = {"unsloth": "unsloth"}
"""Provider -> package whose import patches other libraries: it may only run after everything else."""
_COMPILE_TURNS = {"default": 2, _TUNED: 6}
_LIGHT_PER_TURN = 4


def listed(options: Options, only: list[str], method: str | None, compile: str = "none") -> Iterator[Case]:
    """The cases asked for; or those of one installed method on the steps.

    Steps and ops take turns, so that a budget cuts the tail of each. compile: "none", a mode, or "auto": both modes, on
    the first case of each source, in later turns. They take long to compile; that of a whole model, autotuned, the
    longest, so that it comes last.
    """
    from . import step

    if method is not None:
        yield from step.method_cases(options, method)
        return
    wanted = [name for name in op_names() if not only or "op" in only or name in only]
    sources = [importlib.import_module(f".{name}", __package__) for name in wanted]
    sources = [step, *sources] if not only or "step" in only else sources
    everywhere = compile if compile in COMPILED else "none"
    given = replace(options, compile=everywhere)
    turns = [_turns(source, given, auto=compile == "auto") for source in sources]
    last = [_compiled(step, given, _TUNED)] if compile == "auto" and step in sources else []
    patched: list[Case] = []
    for turn in itertools.zip_longest(*turns, fillvalue=()):
        for case in itertools.chain.from_iterable(turn):
            case, late = _postponed(case)
            yield case
            # One comparison per source is enough.
            if late is not None and late.kernel not in {other.kernel for other in patched}:
                patched.append(late)
    yield from (case for case in [*last, *patched] if case is not None)


def op_names() -> list[str]:
    """Files of this folder that time one op, or (overhead) what a call of one costs."""
    package = importlib.import_module(__package__)
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return [name for name in names if not name.startswith(("_", "test_")) and name not in ("step", "conftest")]


def _turns(source: ModuleType, options: Options, auto: bool) -> Iterator[list[Case]]:
    """One turn after the other: a case, a case with compiled peers, or a few cells of the heat map."""
    cases = list(source.cases(options))
    whole = [[case] for case in cases if not case.light]
    if auto:
        for mode, turn in _COMPILE_TURNS.items():
            if mode == _TUNED and source.__name__.endswith(".step"):
                continue
            found = _compiled(source, options, mode)
            whole.insert(min(turn, len(whole)), [] if found is None else [found])
    cells = [case for case in cases if case.light]
    batches = (cells[start : start + _LIGHT_PER_TURN] for start in range(0, len(cells), _LIGHT_PER_TURN))
    # After its first three cases a source fills its heat map and goes on with its other cases by turns.
    yield from whole[:3]
    for one, batch in itertools.zip_longest(whole[3:], batches, fillvalue=()):
        yield [*batch, *one]


def _compiled(source: ModuleType, options: Options, mode: str) -> Case | None:
    """The source's first case with torch.compile in this mode as a peer; None where the source has no such peer."""
    case = next(iter(source.cases(replace(options, compile=mode))), None)
    if case is None:
        return None
    peers = {name: build for name, build in case.providers.items() if name.endswith("compile")}
    if not peers:
        return None
    named = {name + COMPILED[mode].removeprefix("torch.compile"): build for name, build in peers.items()}
    kept = {name: case.providers[name] for name in (FLOOR, YARDSTICK, OURS) if name in case.providers}
    return replace(case, label=f"{case.label} vs {COMPILED[mode]}", providers=kept | named, gates=(), limit=None)


def _postponed(case: Case) -> tuple[Case, Case | None]:
    """The case without its intrusive peers, and one with them for the end; what is not installed stays where it is."""
    there = [name for name in case.providers if name in INTRUSIVE and _is_installed(INTRUSIVE[name])]
    if not there:
        return case, None
    others = {name: build for name, build in case.providers.items() if name not in there}
    kept = {FLOOR, YARDSTICK, OURS, *there}
    late = {name: build for name, build in case.providers.items() if name in kept}
    label = f"{case.label} vs {', '.join(there)}"
    return replace(case, providers=others), replace(case, label=label, providers=late, gates=(), limit=None)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
