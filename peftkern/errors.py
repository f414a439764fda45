"""Every error that a user of peftkern can catch.

Each class also derives from the built-in that fits, so that ``except ValueError`` goes on working.
A message says what came, what was wanted, where, and how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftkernError(Exception):
    """Base of all errors raised on purpose by peftkern."""


class ConfigError(PeftkernError, ValueError):
    """A configuration field is unknown, out of range, or asks for something that is not implemented."""


class TargetError(PeftkernError, ValueError):
    """No module of the model, or an unsuitable one, matches what a configuration names."""


class AdapterError(PeftkernError, ValueError):
    """An adapter name is unknown or taken, or the adapter cannot do what was asked in its present state."""


class MergeError(AdapterError):
    """Adapters cannot be merged or unmerged; no weight has moved."""


class CheckpointError(PeftkernError, ValueError):
    """A saved adapter is missing, truncated, mis-shaped or made for another backbone; the model is unchanged."""


class DataError(PeftkernError, ValueError):
    """Input data is malformed; the message names file and line."""


class RegistryError(PeftkernError, LookupError):
    """A method cannot be found or loaded."""


class UnknownMethodError(RegistryError):
    """No installed distribution provides the method."""


class PluginConflictError(RegistryError):
    """Two distributions claim the same method name."""


class PluginLoadError(RegistryError):
    """A plugin's entry point cannot be imported or does not provide a method."""


class BackendError(PeftkernError, RuntimeError):
    """A backend was forced, or asked for by name, and cannot run; the message lists every reason."""


def near(name: str, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest choices, or ``""`` when none is close."""
    matches = difflib.get_close_matches(name, list(choices), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(m) for m in matches)}?" if matches else ""
