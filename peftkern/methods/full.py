"""Full fine-tuning, as a method beside the others: same commands, same files, for comparison."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peftkern import targets
from peftkern.adapter import AdapterConfig, Selection


@dataclass(frozen=True, kw_only=True)
class FullConfig(AdapterConfig):
    """Every parameter trains. keep_original=False trains them in place: no second copy of the backbone in memory, and
    then `detach` and `disabled` raise, since there is nothing to go back to.
    """

    keep_original: bool = True


class Full(Selection):
    """All parameters of the model."""

    name = "full"
    summary = "all parameters of the model"
    Config = FullConfig

    @classmethod
    def select(cls, model: nn.Module, config: FullConfig) -> list[str]:
        """Names of all floating-point parameters."""
        return [name for name, p in targets.named_parameters(model) if p.is_floating_point()]
