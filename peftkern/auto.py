"""A saved adapter together with the backbone that it names."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peftkern import checkpoint, targets
from peftkern.adapter import AdapterConfig
from peftkern.base import token_embeddings
from peftkern.errors import ConfigError
from peftkern.hf import PeftModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering", "FEATURE_EXTRACTION": "AutoModel",
}  # fmt: skip
"""Task type of an adapter -> class of transformers that loads a backbone for it."""


class AutoPeftModel:
    """`from_pretrained` loads the backbone that an adapter names and the adapter into it.

    The backbone's class is that of the adapter's task; without a task the one that its file names.
    """

    task_type: ClassVar[str | None] = None

    def __init__(self) -> None:
        raise TypeError(f"{type(self).__name__} makes no instances: use {type(self).__name__}.from_pretrained(adapter)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        import_allowlist: list[str] | None = None,
        **model_kwargs: Any,
    ) -> PeftModel:
        """The model with the adapter of a directory or hub repository; further keywords (dtype, device_map) are those
        of the backbone's own from_pretrained.

        import_allowlist: packages that a file without a task may name the backbone's class from, by default
        transformers alone. A vocabulary that had grown when the adapter was saved grows here as well. Raises
        ConfigError for an adapter of another task, or one that names no backbone or class, and as `load` does.
        """
        directory = checkpoint.find(pretrained_model_name_or_path, revision, subfolder)
        config = checkpoint.read_config(directory)
        if config.base_model_name_or_path is None:
            raise ConfigError(f"{directory} names no base_model_name_or_path: load the model and use pk.load")
        backbone = cls._class(directory, config, import_allowlist or ["transformers"])
        model = backbone.from_pretrained(config.base_model_name_or_path, revision=config.revision, **model_kwargs)
        _grow(model, directory)
        return PeftModel.from_pretrained(model, directory, adapter_name, is_trainable)

    @classmethod
    def _class(cls, directory: Path, config: AdapterConfig, trusted: list[str]) -> Any:
        import transformers

        task, mapping = config.task_type, config.auto_mapping
        if cls.task_type is not None and task not in (None, cls.task_type):
            raise ConfigError(f"{directory} is an adapter for {task}, and {cls.__name__} is for {cls.task_type}")
        if asked := task or cls.task_type:
            return getattr(transformers, AUTO_CLASSES[asked])
        if not mapping:
            raise ConfigError(f"{directory} names no task_type and no class: use AutoPeftModelForCausalLM or the like")
        library, name = str(mapping.get("parent_library")), str(mapping.get("base_model_class"))
        if library.split(".")[0] not in trusted and library not in trusted:
            raise ConfigError(
                f"{directory} wants to import {library}, which is none of {', '.join(trusted)}: where you trust it, "
                f"give import_allowlist=[{library!r}]"
            )
        try:
            found = getattr(importlib.import_module(library), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{directory}: auto_mapping names {library}.{name}: {error}") from error
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise ConfigError(f"{directory}: auto_mapping names {library}.{name}, which is no model of transformers")
        return found


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Language models."""

    task_type = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Language models of an encoder and a decoder."""

    task_type = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Classifiers of texts."""

    task_type = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Classifiers of tokens."""

    task_type = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Finders of an answer's span."""

    task_type = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Models without a head."""

    task_type = "FEATURE_EXTRACTION"


def _grow(model: PreTrainedModel, directory: Path) -> None:
    """Give the embeddings as many rows as the adapter's file holds of them."""
    embedding = token_embeddings(model)[0]
    if embedding is None:
        return
    path = next(path for path, module in targets.named_modules(model) if module is embedding)
    shapes, (here, width) = checkpoint.shapes(directory), embedding.get_parameter("weight").shape
    for inside in ("", ".base_layer"):
        shape = shapes.get(f"{checkpoint.PREFIX}{path}{inside}.weight")
        if shape is not None and shape[1:] == (width,) and shape[0] > here:
            model.resize_token_embeddings(shape[0], mean_resizing=False)
