"""The frozen backbone below the first trainable module: no graph, no gradient, no recompute, whoever checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkern import targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class FrozenPrefix(nn.Module):
    """Keeps gradient checkpointing away from the transformer blocks below the first trainable one.

    Autograd builds no graph there by itself, since nothing requires a gradient. Two habits of the field spoil that: the
    embeddings' output is made to require one (`enable_input_require_grads`, which transformers does on its own when
    checkpointing is turned on), and frozen blocks are checkpointed and so recomputed. Before each training forward
    both are undone; only reentrant checkpointing gets an input that requires grad, at the first trainable block.
    """

    model: PreTrainedModel  # these two are kept unregistered: the model holds this module, not the reverse
    stack: list[nn.Module]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model
        stacks = targets.blocks(model)
        self.__dict__["stack"] = list(stacks[0][1]) if len(stacks) == 1 else []
        self._first: int | None = None
        self._handle = model.register_forward_pre_hook(self.prepare, with_kwargs=True)

    @property
    def first_trainable_block(self) -> int:
        """Index of the first block with a trainable parameter.

        The number of blocks when there is none, 0 when something below the blocks trains.
        """
        if self._first is None:
            self._first = self._find()
        return self._first

    def refresh(self) -> None:
        """Forget what was planned; called when the set of trainable parameters changes."""
        self._first = None
        for block in self.stack:
            func = getattr(block, "_gradient_checkpointing_func", None)
            if isinstance(func, (_GradientStart, _NoRecompute)):
                block._gradient_checkpointing_func = func.func  # type: ignore[assignment]

    def remove(self) -> None:
        """Take the hook off the model and give its blocks back as they were."""
        self.refresh()
        self._handle.remove()

    def prepare(self, _model: nn.Module, args: Any, kwargs: Any) -> None:
        """Runs before each forward of the model; does something only in training, where one of the habits shows."""
        if torch.compiler.is_compiling() or not self.model.training or not self.stack:
            return
        checkpointed = any(getattr(block, "gradient_checkpointing", False) for block in self.stack)
        if not checkpointed and not _requires_input_grads(self.model):
            return
        first = self.first_trainable_block
        if first == 0 and self._trains_below:
            return
        if hasattr(self.model, "disable_input_require_grads") and _requires_input_grads(self.model):
            self.model.disable_input_require_grads()  # type: ignore[no-untyped-call]
        for block in self.stack[:first]:
            func = getattr(block, "_gradient_checkpointing_func", None)
            if func is not None and not isinstance(func, _NoRecompute):
                block._gradient_checkpointing_func = _NoRecompute(func)  # type: ignore[assignment]
        if first < len(self.stack):
            block = self.stack[first]
            func = getattr(block, "_gradient_checkpointing_func", None)
            if func is not None and not isinstance(func, _GradientStart) and _is_reentrant(func):
                block._gradient_checkpointing_func = _GradientStart(func)  # type: ignore[assignment]

    @property
    def _trains_below(self) -> bool:
        inside = {id(p) for block in self.stack for p in block.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) in inside:
                return False
            if parameter.requires_grad:
                return True
        return False

    def _find(self) -> int:
        if self._trains_below or _active_prompts(self.model):
            return 0
        for index, block in enumerate(self.stack):
            if any(parameter.requires_grad for parameter in block.parameters()):
                return index
        return len(self.stack)


class _NoRecompute:
    """Stands for a checkpoint where there is nothing to recompute for: the block just runs, its flag stays as it is."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


class _GradientStart:
    """A reentrant checkpoint whose input requires grad, so that parameters inside the block get theirs."""

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        hidden, *rest = args
        if isinstance(hidden, Tensor) and not hidden.requires_grad and torch.is_grad_enabled():
            hidden = hidden.detach().requires_grad_()
        return self.func(function, hidden, *rest, **kwargs)


def _is_reentrant(func: Callable[..., Any]) -> bool:
    return bool(getattr(func, "keywords", {}).get("use_reentrant", True))


def _requires_input_grads(model: nn.Module) -> bool:
    return bool(getattr(model, "_require_grads_hook", None) or getattr(model, "_require_grads_hooks", None))


def _active_prompts(model: nn.Module) -> bool:
    hooks = getattr(getattr(model, "_peftkern", None), "hooks", None)
    return bool(hooks is not None and hooks.active)
