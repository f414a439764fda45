"""Saved adapters as files: rewritten in another dtype or scaling, or merged into their backbone for good."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from peftkern import checkpoint, targets
from peftkern.adapter import AdapterConfig
from peftkern.attach import merge_and_unload
from peftkern.auto import AUTO_CLASSES
from peftkern.errors import CheckpointError, ConfigError, near
from peftkern.tasks.backbone import quiet, resolve
from peftkern.tasks.settings import FILE

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote: where, of which method, how many tensors, and their bytes before and after."""

    directory: Path
    method: str
    tensors: int
    bytes_before: int
    bytes_after: int


def convert(
    source: str | Path, target: str | Path, *, dtype: str | None = None, fold_rslora: bool = False
) -> Converted:
    """Read an adapter strictly, ours or Hugging Face PEFT's, and write it as a fresh checkpoint; no model is loaded.

    dtype: f32, bf16 or f16 for every floating-point tensor. fold_rslora: for loaders without rsLoRA, whose scale is
    alpha / √r: B is multiplied by √r and `use_rslora` cleared, so that alpha / r gives the same update.
    Raises ConfigError for an unknown dtype or nothing to fold, CheckpointError for files that are missing, truncated,
    not finite (also: beyond f16's range), or a target that holds an adapter already.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}{near(dtype, DTYPES)}: want one of {', '.join(DTYPES)}")
    target = Path(target)
    if (target / checkpoint.CONFIG_FILE).exists():
        raise CheckpointError(f"{target} holds an adapter already: choose another directory")
    directory = checkpoint.find(source)
    config = checkpoint.read_config(directory)
    tensors = checkpoint.read_tensors(directory)
    before = _size(tensors)
    if fold_rslora:
        config, tensors = _fold_rslora(config, tensors)
    if dtype is not None:
        tensors = {key: t.to(DTYPES[dtype]) if t.is_floating_point() else t for key, t in tensors.items()}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(f"{directory}: tensor {key} is not finite" + (f" in {dtype}" if dtype else ""))
    checkpoint.write(target, config, tensors)
    return Converted(target, config.method.name, len(tensors), before, _size(tensors))


def merge(adapter: str | Path, target: str | Path, model: str | None = None) -> Path:
    """Fold a saved adapter, or the adapter of a finished run, into its backbone and save a plain model.

    The result loads with `from_pretrained` and needs no peftkern. model: the backbone, when it is not the one that the
    adapter names. Raises MergeError for methods that cannot be merged, CheckpointError when adapter and backbone do
    not fit, ConfigError when there is no backbone or the target is not empty.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already and is not empty: choose another directory")
    directory = checkpoint.find(adapter)
    backbone, tokenizer = _restore(directory, model)
    merge_and_unload(backbone)
    backbone.save_pretrained(target)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    return target


def _restore(directory: Path, model: str | None) -> tuple[Any, Any]:
    """(backbone with the adapter attached, tokenizer or None)."""
    if (directory / FILE).is_file() and model is None:
        from peftkern.tasks.run import Predictor

        run = Predictor(directory)
        return run.trainer.model, run.task.tokenizer
    config = checkpoint.read_config(directory)
    name = model or config.base_model_name_or_path
    if not name:
        raise ConfigError(f"{directory} does not name its backbone: give it with --model")
    name = resolve(name)
    backbone = _load_backbone(name, config, checkpoint.read_tensors(directory))
    checkpoint.load(backbone, directory)
    try:
        return backbone, transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):  # a backbone may come without one
        return backbone, None


def _load_backbone(name: str, config: AdapterConfig, tensors: dict[str, Tensor]) -> nn.Module:
    """The backbone with the head that the adapter's task type says, or with the one it was saved with."""
    extra = {}
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        extra = {"num_labels": _labels(tensors)}
    try:
        if config.task_type in AUTO_CLASSES:
            loader = getattr(transformers, AUTO_CLASSES[config.task_type])
        else:
            architectures = transformers.AutoConfig.from_pretrained(name).architectures or ["AutoModel"]
            loader = getattr(transformers, architectures[0])
        with quiet():  # transformers would report the task head as missing, which the adapter brings
            loaded: nn.Module = loader.from_pretrained(name, **extra)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"no backbone at {name!r}, folder or hub id ({reason}): give it with --model") from error
    return loaded


def _labels(tensors: dict[str, Tensor]) -> int:
    """Number of classes: the width of the task head that was saved with the adapter."""
    weights = {key: tensor for key, tensor in tensors.items() if key.endswith(".weight")}
    heads = [tensor for key, tensor in weights.items() if set(key.split(".")) & set(targets.TASK_HEADS)]
    if not heads:
        raise CheckpointError("the adapter was saved without its task head, so that the number of classes is not known")
    return heads[-1].shape[0]


def _fold_rslora(config: AdapterConfig, tensors: dict[str, Tensor]) -> tuple[AdapterConfig, dict[str, Tensor]]:
    if not getattr(config, "use_rslora", False):
        raise ConfigError(f"fold_rslora: this {config.method.name} adapter does not use rsLoRA")
    folded = {}
    for key, tensor in tensors.items():
        if key.endswith(("lora_B.weight", "lora_embedding_B")):  # [N, R]
            tensor = (tensor.float() * math.sqrt(tensor.shape[1])).to(tensor.dtype)
        elif key.endswith("lora_B.bias"):
            rank = tensors[key.removesuffix("bias") + "weight"].shape[1]
            tensor = (tensor.float() * math.sqrt(rank)).to(tensor.dtype)
        folded[key] = tensor
    return replace(config, use_rslora=False), folded  # type: ignore[call-arg]


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
