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
from peftkern.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from peftkern.checkpoint import load, save
from peftkern.combining import combine
from peftkern.dispatch import explain, use_backend
from peftkern.hf import PeftConfig, PeftModel, TaskType, fuse, get_peft_model, unfuse
from peftkern.kbit import prepare_model_for_kbit_training
from peftkern.memory import trainable
from peftkern.mixing import mixed
from peftkern.registry import methods
from peftkern.state_dicts import get_peft_model_state_dict, set_peft_model_state_dict

__version__ = "0.1.0"
__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "PeftConfig",
    "PeftModel",
    "TaskType",
    "active_adapters",
    "adapters",
    "attach",
    "combine",
    "detach",
    "disabled",
    "errors",
    "explain",
    "fuse",
    "get_peft_model",
    "get_peft_model_state_dict",
    "layers",
    "load",
    "merge",
    "merge_and_unload",
    "methods",
    "mixed",
    "ops",
    "prepare_model_for_kbit_training",
    "registry",
    "save",
    "set_adapter",
    "set_peft_model_state_dict",
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
