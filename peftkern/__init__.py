"""peftkern: parameter-efficient fine-tuning methods as plugins, on fused kernels.

`attach` a method's adapter to a transformers model in place, or call the fused `ops` and `layers` from your own model.
"""

from __future__ import annotations

from typing import Any

import peftkern.methods  # noqa: F401 - first, so that `peftkern.methods` ends as the function of this name below
from peftkern import errors, layers, ops, registry
from peftkern.attach import (
    active_adapters,
    adapters,
    attach,
    detach,
    disabled,
    merge,
    merge_and_unload,
    set_adapter,
    unmerge,
)
from peftkern.checkpoint import load, save
from peftkern.dispatch import explain, use_backend
from peftkern.hf import PeftConfig, PeftModel, TaskType, fuse, get_peft_model, unfuse
from peftkern.memory import trainable
from peftkern.mixing import mixed
from peftkern.registry import methods

__version__ = "0.1.0"
__all__ = [
    "PeftConfig",
    "PeftModel",
    "TaskType",
    "active_adapters",
    "adapters",
    "attach",
    "detach",
    "disabled",
    "errors",
    "explain",
    "fuse",
    "get_peft_model",
    "layers",
    "load",
    "merge",
    "merge_and_unload",
    "methods",
    "mixed",
    "ops",
    "registry",
    "save",
    "set_adapter",
    "trainable",
    "unfuse",
    "unmerge",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """`<Name>Config` of any installed method, built in or plugged in."""
    configs = registry.config_classes() if name.endswith("Config") else {}
    if name not in configs:
        raise AttributeError(f"module 'peftkern' has no attribute {name!r}{errors.near(name, [*configs, *__all__])}")
    return configs[name]
