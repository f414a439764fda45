"""An adapter's tensors in memory, under the names that they have in a file."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from peftkern import checkpoint
from peftkern.attachment import state
from peftkern.errors import CheckpointError, ConfigError


class Loaded(NamedTuple):
    """Keys that were not given, and given keys that have no place in the adapter."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter under their names in a file, not copied.

    model: any with something attached, a PeftModel, or either inside of torch.compile or DistributedDataParallel;
    unwrap_compiled changes nothing here. state_dict: that of `model`, gathered from its shards, to take them from.
    save_embedding_layers: whether the backbone's embeddings are among them, "auto" where its vocabulary is not its own.
    Raises AdapterError for an unknown name, CheckpointError for what state_dict lacks.
    """
    if save_embedding_layers not in (True, False, "auto"):
        raise ConfigError(f"save_embedding_layers={save_embedding_layers!r}: want True, False or 'auto'")
    embeddings = None if save_embedding_layers == "auto" else bool(save_embedding_layers)
    tensors = checkpoint.tensors(bare(model), adapter_name, embeddings)
    if state_dict is not None:
        named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
        names = {id(tensor): path for path, tensor in named}
        found = {key: names[id(t)] for key, t in tensors.items() if id(t) in names}  # others are made from parameters
        if missing := [path for path in found.values() if path not in state_dict]:
            raise CheckpointError(
                f"the state_dict given lacks {len(missing)} tensors of adapter {adapter_name!r}: {missing[0]}"
            )
        tensors |= {key: state_dict[path] for key, path in found.items()}
    return {key: tensor.detach() for key, tensor in tensors.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Loaded:
    """Copy tensors, under their names in a file, into an attached adapter; what is not among them stays as it is.

    ignore_mismatched_sizes: leave out tensors of another shape, which otherwise raise CheckpointError before any
    change. low_cpu_mem_usage changes nothing here. Raises AdapterError for an unknown name.
    """
    wanted = checkpoint.parameters(bare(model), adapter_name)
    given: dict[str, Tensor] = {}
    for key, tensor in peft_model_state_dict.items():
        if key not in wanted:
            continue
        if tensor.shape == wanted[key].shape:
            given[key] = tensor
        elif not ignore_mismatched_sizes:
            raise CheckpointError(f"tensor {key} is {tuple(tensor.shape)}, wanted {tuple(wanted[key].shape)}")
    with torch.no_grad():
        for key, tensor in given.items():
            wanted[key].copy_(tensor)
    extra = [key for key in peft_model_state_dict if key not in wanted]
    return Loaded([key for key in wanted if key not in given], extra)


def bare(model: nn.Module) -> nn.Module:
    """The model that adapters are attached to, inside of PeftModel, torch.compile and data parallelism."""
    while state(model) is None:
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if hasattr(type(model), "get_base_model"):
            inner = model.get_base_model()  # type: ignore[operator]
        if inner is None:
            break
        model = inner
    return model
