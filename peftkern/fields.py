"""Whether a value from a file is what a field's annotation says."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any


def kinds(cls: type) -> dict[str, Any]:
    """Field name -> annotation of a dataclass; none where one of them cannot be resolved."""
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError):
        return {}


def fits(value: Any, kind: Any) -> bool:
    """Whether the value is of this kind: numbers, strings, None, lists, mappings and unions of them; others pass."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin in (list, tuple, set):
        return isinstance(value, (list, tuple, set)) and all(fits(item, inner[0]) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if kind in (int, float):
        return isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
    if kind in (bool, str, types.NoneType):
        return isinstance(value, kind)
    return True
