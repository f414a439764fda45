"""A quantised backbone on its way to training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HALF = (torch.float16, torch.bfloat16)


def prepare_model_for_kbit_training(
    model: PreTrainedModel,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Freeze a model of transformers and make it ready for training in low precision, in place, as QLoRA does.

    What bitsandbytes has left in half precision (norms, embeddings, the head) goes to f32. With
    use_gradient_checkpointing a quantised model recomputes activations in backward; its inputs require grad then,
    unless gradient_checkpointing_kwargs say use_reentrant=False, which needs no such thing.
    Source: Dettmers et al. 2023 (arXiv:2305.14314), section 3.
    """
    by_bitsandbytes = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    kind = getattr(model, "quantization_method", None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if kind is None or by_bitsandbytes:  # the kernels of others compute in the dtype that they were made for
        for parameter in model.parameters():
            if parameter.dtype in _HALF and type(parameter) is torch.nn.Parameter:
                parameter.data = parameter.data.float()
    if use_gradient_checkpointing and (kind is not None or by_bitsandbytes):
        options = dict(gradient_checkpointing_kwargs or {})
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()  # type: ignore[no-untyped-call]
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[no-untyped-call]
    return model
