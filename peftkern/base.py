"""What differs between nn.Linear, Conv1D, nn.Embedding and quantised linears: once, here.

Every kind is seen as a linear map with `weight` [N, K]: an embedding maps one-hot rows of K = vocabulary to N = width.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from peftkern.errors import MergeError, TargetError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLAIN_TENSORS = (Tensor, nn.Parameter)  # others (quantised, sharded) bring their own product


class BaseLayer:
    """The frozen module under an adapter. Calling it runs the module with all its hooks."""

    def __init__(self, module: nn.Module, path: str = "") -> None:
        if not is_supported(module):
            raise TargetError(
                f"{path or 'module'} is a {type(module).__name__}: want nn.Linear, Conv1D, nn.Embedding or a subclass"
            )
        self.module = module
        self.path = path
        self.is_embedding = isinstance(module, nn.Embedding)
        self._transposed = self.is_embedding or isinstance(module, _conv1d())
        plain: tuple[type[nn.Module], ...] = (nn.Linear, *_conv1d())
        self._plain = type(module).forward in [kind.forward for kind in plain]

    def __call__(self, x: Tensor) -> Tensor:
        """The module's own output."""
        out: Tensor = self.module(x)
        return out

    @property
    def in_features(self) -> int:
        """K: input width, or vocabulary size of an embedding."""
        if isinstance(self.module, nn.Linear):
            return self.module.in_features
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """N: output width."""
        if isinstance(self.module, nn.Linear):
            return self.module.out_features
        return self.weight.shape[0]

    @property
    def weight(self) -> Tensor:
        """[N, K], a view of the module's weight."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.T if self._transposed else weight

    @property
    def bias(self) -> Tensor | None:
        """[N] or None."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return bias

    @property
    def embed_scale(self) -> float | Tensor:
        """Factor that the embedding applies to its rows (Gemma), 1.0 elsewhere."""
        scale: float | Tensor = getattr(self.module, "embed_scale", 1.0)
        return scale

    @property
    def linear(self) -> tuple[Tensor, Tensor | None] | None:
        """(weight [N, K], bias) for fused ops, or None where going round the module would skip its hooks or code."""
        module = self.module
        if (
            not self._plain
            or "forward" in module.__dict__  # accelerate's, where weights are kept elsewhere, or a patch
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return None
        own = module._parameters
        weight = own["weight"] if "weight" in own else module.weight
        if type(weight) not in _PLAIN_TENSORS or not weight.is_floating_point():  # type: ignore[union-attr, operator]
            return None
        bias = own["bias"] if "bias" in own else module.bias
        return (weight.T if self._transposed else weight), bias  # type: ignore[return-value, union-attr]

    def in_place(self) -> AbstractContextManager[None]:
        """Inside, weights that accelerate keeps elsewhere (on disk, on the CPU) are on the device that computes."""
        hook = getattr(self.module, "_hf_hook", None)
        if hook is None or not self.weight.is_meta:
            return nullcontext()
        from accelerate.utils import align_module_device  # type: ignore[import-untyped]

        return align_module_device(self.module)  # type: ignore[no-any-return]

    def weights(self) -> dict[str, nn.Parameter]:
        """The parameters that a merge replaces, by attribute name."""
        return {key: p for key in ("weight", "bias") if isinstance(p := getattr(self.module, key, None), nn.Parameter)}

    def with_weights(self, weight: Tensor, bias: Tensor | None) -> dict[str, nn.Parameter]:
        """Parameters of the module's own layout and dtype that hold `weight` [N, K] and `bias` [N]."""
        old = self.weights()
        if bias is not None and "bias" not in old:
            raise MergeError(
                f"{self.path}: the adapter has a bias and the base layer has none to merge it into: keep it unmerged"
            )
        laid_out = (weight.T if self._transposed else weight).to(old["weight"].dtype).contiguous()
        new = {"weight": nn.Parameter(laid_out, requires_grad=False)}
        if bias is not None:
            new["bias"] = nn.Parameter(bias.to(old["bias"].dtype), requires_grad=False)
        return new

    def check_mergeable(self) -> None:
        """Raise MergeError for a weight that is quantised, on the meta device or sharded."""
        weight = self.module.weight
        if isinstance(weight, Tensor) and is_sharded(weight):
            raise MergeError(f"{self.path}: weight is sharded, and FSDP2 would put its own back: merge before sharding")
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
            kind = type(self.module).__name__
            raise MergeError(f"{self.path}: weight of {kind} is not a plain floating-point tensor")


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which FSDP2 and tensor parallelism keep a part on each rank."""
    return hasattr(type(tensor), "full_tensor")


def check_no_replica(module: nn.Module) -> None:
    """Raise RuntimeError for a copy that nn.DataParallel has made: what adapters share is not copied with it."""
    if "_is_replica" in module.__dict__:
        raise RuntimeError(
            "nn.DataParallel copies modules without what adapters share: use one process for each GPU (torchrun, "
            "accelerate launch), or let CUDA_VISIBLE_DEVICES name one GPU"
        )


def is_supported(module: nn.Module) -> bool:
    """Whether adapters can sit on this module."""
    return isinstance(module, (nn.Linear, nn.Embedding, *_conv1d()))


def is_pretrained(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether this is a model of transformers."""
    return isinstance(model, _loaded("transformers.modeling_utils", "PreTrainedModel"))


def token_embeddings(model: nn.Module) -> list[nn.Module | None]:
    """The model's input and output embeddings, None for one that it does not have or does not know."""
    found: list[nn.Module | None] = []
    for end in ("input", "output"):
        try:
            found.append(getattr(model, f"get_{end}_embeddings", lambda: None)())
        except (AttributeError, NotImplementedError):  # a model of images, of sound, of several kinds
            found.append(None)
    return found


def _conv1d() -> tuple[type[nn.Module], ...]:
    return _loaded("transformers.pytorch_utils", "Conv1D")


def _loaded(module: str, name: str) -> tuple[type[nn.Module], ...]:
    """A class of transformers; none where it is not imported yet, since no module can then be of that class."""
    return (getattr(sys.modules[module], name),) if module in sys.modules else ()


def adapter_dtype(base: torch.dtype) -> torch.dtype:
    """Adapters over a half-precision backbone are kept in f32; otherwise in the backbone's own dtype."""
    return torch.float32 if base in (torch.float16, torch.bfloat16) or not base.is_floating_point else base
