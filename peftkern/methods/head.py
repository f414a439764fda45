"""Training the task head alone, or with the last k transformer blocks: the "adaptive layer"."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peftkern import targets
from peftkern.adapter import AdapterConfig, Selection
from peftkern.errors import TargetError


@dataclass(frozen=True, kw_only=True)
class HeadConfig(AdapterConfig):
    """last_k: how many of the top transformer blocks train with the head."""

    last_k: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(isinstance(self.last_k, int) and self.last_k >= 0, "last_k", "an integer >= 0")


class Head(Selection):
    """The parameters outside the backbone (the task head), and on request the last k blocks.

    Source: Howard and Ruder 2018 (arXiv:1801.06146), section 3.3, for training from the top down.
    """

    name = "head"
    summary = "the task head and, on request, the last k blocks"
    paper = "https://arxiv.org/abs/1801.06146"
    Config = HeadConfig

    @classmethod
    def select(cls, model: nn.Module, config: HeadConfig) -> list[str]:
        """Names of the head's parameters and of those in the last k blocks."""
        backbone = getattr(model, "base_model", model)
        inside = {id(p) for p in backbone.parameters()} if backbone is not model else set()
        own = list(targets.named_parameters(model))
        heads = [name for name, p in own if (id(p) not in inside if inside else _in_head(name))]
        if not heads and not config.last_k:
            kind = type(model).__name__
            raise TargetError(f"{kind} has no task head outside its backbone: load it with one, or set last_k")
        stacks = targets.blocks(model)
        longest = max((len(stack) for _, stack in stacks), default=0)
        config.require(config.last_k <= longest, "last_k", f"at most {longest}, the number of blocks")
        for path, stack in stacks if config.last_k else []:
            top = tuple(f"{path}.{i}." for i in range(len(stack) - config.last_k, len(stack)))
            heads += [name for name, _ in own if name.startswith(top)]
        return heads


def _in_head(name: str) -> bool:
    return any(part in targets.TASK_HEADS for part in name.split("."))
