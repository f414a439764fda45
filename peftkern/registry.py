"""Methods as plugins: the entry points of group `peftkern.methods`, read lazily.

A plugin that does not import is listed with its error and never stops the others; two distributions that claim one
name are an error that names both.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from peftkern.adapter import AdapterConfig, Method
from peftkern.errors import PeftkernError, PluginConflictError, PluginLoadError, UnknownMethodError, near

GROUP = "peftkern.methods"
KNOWN_PLUGINS = {"scale": "peftkern-scale"}
"""Method -> distribution that is known to provide it, for install hints."""


@dataclass(frozen=True)
class MethodInfo:
    """What `pk.methods()` tells of one method; `error` says why it cannot be used, None when it can."""

    name: str
    summary: str
    distribution: str
    version: str
    paper: str
    error: str | None = None


class Methods(Mapping[str, MethodInfo]):
    """Name -> MethodInfo. Names come from metadata; a method's module is imported when its entry is looked at."""

    def __getitem__(self, name: str) -> MethodInfo:
        points = _entry_points().get(name)
        if not points:
            raise UnknownMethodError(f"unknown method {name!r}{near(name, self)}")
        distribution, version = _distribution(points[0])
        try:
            method = load(name)
        except PeftkernError as error:
            return MethodInfo(name, "", distribution, version, "", str(error))
        return MethodInfo(name, method.summary, distribution, version, method.paper)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(_entry_points()))

    def __len__(self) -> int:
        return len(_entry_points())


def methods() -> Methods:
    """All installed methods."""
    return Methods()


def names() -> list[str]:
    """Names of all installed methods, without importing any."""
    return list(Methods())


def load(name: str) -> type[Method]:
    """The class of a method.

    Raises UnknownMethodError (with near names, and the distribution to install where it is known), PluginConflictError
    when two distributions claim the name, PluginLoadError when the plugin does not import or is no method.
    """
    points = _entry_points().get(name)
    if not points:
        hint = f"; pip install {KNOWN_PLUGINS[name]}" if name in KNOWN_PLUGINS else near(name, names())
        raise UnknownMethodError(f"unknown method {name!r}{hint} (installed: {', '.join(names())})")
    claims = {(_distribution(point)[0], point.value) for point in points}
    if len(claims) > 1:
        who = " and ".join(f"{dist} ({value})" for dist, value in sorted(claims))
        raise PluginConflictError(f"method {name!r} is claimed by {who}: uninstall one of them")
    return _load(points[0])


def by_config(config: AdapterConfig) -> type[Method]:
    """The method that a configuration belongs to."""
    method = getattr(type(config), "method", None)
    if method is None:
        raise PluginLoadError(f"{type(config).__name__} is not the Config of any method")
    return method  # type: ignore[no-any-return]


def by_peft_type(peft_type: str) -> type[Method] | None:
    """The method that stores its checkpoints under this Hugging Face PEFT type, or None."""
    for name in _own_first():
        try:
            method = load(name)
        except PeftkernError:
            continue
        if (method.Config.peft_type or name.upper()) == peft_type:
            return method
    return None


def config_classes() -> dict[str, type[AdapterConfig]]:
    """Name -> configuration class of every installed method that can be loaded."""
    found: dict[str, type[AdapterConfig]] = {}
    for method_name in _own_first():
        try:
            config = load(method_name).Config
        except PeftkernError:
            continue
        found.setdefault(config.__name__, config)
    return found


def _own_first() -> list[str]:
    """All names, those of peftkern before those of plugins, which so cannot take a built-in method's place."""
    return sorted(names(), key=lambda name: (_distribution(_entry_points()[name][0])[0] != "peftkern", name))


def _load(point: EntryPoint) -> type[Method]:
    where = f"method {point.name!r} of {_distribution(point)[0]} ({point.value})"
    try:
        loaded = point.load()
    except (Exception, SystemExit) as error:
        raise PluginLoadError(f"{where} does not import: {type(error).__name__}: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Method) and hasattr(loaded, "Config")):
        raise PluginLoadError(f"{where} is not a method: want a subclass of peftkern.adapter.Method with a Config")
    if not (isinstance(loaded.Config, type) and issubclass(loaded.Config, AdapterConfig)):
        raise PluginLoadError(f"{where}: its Config {loaded.Config!r} is no subclass of AdapterConfig")
    if loaded.Config.method is not loaded:
        raise PluginLoadError(f"{where}: its Config belongs to {loaded.Config.method.__name__}: want one of its own")
    if getattr(loaded, "name", None) != point.name:
        raise PluginLoadError(f"{where} calls itself {getattr(loaded, 'name', None)!r}: want the entry point's name")
    return loaded


def _entry_points() -> dict[str, list[EntryPoint]]:
    return _read_entry_points(tuple(sys.path))


@functools.lru_cache(maxsize=4)
def _read_entry_points(_path: tuple[str, ...]) -> dict[str, list[EntryPoint]]:
    importlib.invalidate_caches()
    found: dict[str, list[EntryPoint]] = {}
    seen: set[tuple[str, str, str]] = set()
    for point in [*entry_points(group=GROUP), *_checkout_entry_points()]:
        key = (point.name, point.value, _distribution(point)[0])
        if key not in seen:
            seen.add(key)
            found.setdefault(point.name, []).append(point)
    return found


def _checkout_entry_points() -> list[EntryPoint]:
    """The built-in methods of a bare checkout that nobody installed, from its pyproject.toml."""
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    if any(_distribution(point)[0] == "peftkern" for point in entry_points(group=GROUP)) or not pyproject.is_file():
        return []
    section = pyproject.read_text("utf-8").partition(f'[project.entry-points."{GROUP}"]')[2].partition("\n[")[0]
    lines = (line.partition("=") for line in section.splitlines() if "=" in line and not line.startswith("#"))
    return [EntryPoint(key.strip(), value.strip().strip('"'), GROUP) for key, _, value in lines]


def _distribution(point: EntryPoint) -> tuple[str, str]:
    dist = getattr(point, "dist", None)
    return (dist.name, dist.version) if dist is not None else ("peftkern", "checkout")
