"""One line of the result files; needs no torch, so that the process that only collects starts at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Quantiles = tuple[float, float, float]
NOTHING: Quantiles = (math.nan,) * 3


@dataclass
class Row:
    """A measurement (status "ok"), or the reason why there is none.

    status: ok, missing (a peer that is not installed), failed (it raised or crashed), wrong (the correctness gate) or
    "not run". y is (median, 20 %, 80 %) in metric_unit; ratios maps another provider to the same of this one's time
    over that one's, taken round by round. percent_of_floor: time that the measured ceilings allow over time taken.
    """

    kernel_name: str
    kernel_provider: str
    kernel_operation_mode: str
    x_name: str = ""
    x_label: str = ""
    x_value: float = math.nan
    config: dict[str, Any] = field(default_factory=dict)
    metric_name: str = "speed"
    metric_unit: str = "ms"
    y: Quantiles = NOTHING
    backend: str = ""
    ratios: dict[str, Quantiles] = field(default_factory=dict)
    rounds: int = 0
    gbps: float = math.nan
    tflops: float = math.nan
    percent_of_floor: float = math.nan
    status: str = "ok"
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, NaN as None."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The inverse of to_dict."""
        row = cls(**values)
        row.y = _quantiles(values["y"])
        row.ratios = {name: _quantiles(ratio) for name, ratio in values["ratios"].items()}
        for name in ("x_value", "gbps", "tflops", "percent_of_floor"):
            if values[name] is None:
                setattr(row, name, math.nan)
        return row


def quantiles(values: Sequence[float]) -> Quantiles:
    """Median, 20 % and 80 % quantile, linear between neighbours; NaN for no values."""
    if not values:
        return NOTHING
    ordered = sorted(values)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    return at(0.5), at(0.2), at(0.8)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return {key: _plain(v) for key, v in value.items()} if isinstance(value, dict) else value


def _quantiles(values: Sequence[float | None]) -> Quantiles:
    low, middle, high = (math.nan if v is None else v for v in values)
    return low, middle, high
