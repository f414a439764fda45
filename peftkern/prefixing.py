"""Key-value prefixes in front of every layer's keys and values, without a change of class and without patches.

Two ways. Fused: transformers' registry of attention functions holds one of ours, which gives the prefix and the text to
`ops.prefix_attention` apart; nothing is concatenated, and gradient checkpointing recomputes the prefix with the layer.
Joined, for models that do not look their attention up in the registry: the cache that they are given returns [P; K] and
[P; V]. Either way a cache that the caller keeps holds the text alone: it is reordered, cropped and continued as ever.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peftkern import ops, prompting
from peftkern.adapter import KeyValueAdapter
from peftkern.errors import TargetError
from peftkern.targets import CACHE_NAMES

ATTENTION = "peftkern_prefix"
_MARK = "_peftkern_prefixes"


class PrefixedCache(Cache):
    """What a backbone sees as its cache: T positions are taken before the first token. `inner` holds the text."""

    def __init__(self, inner: Cache | None, length: int, joined: Prefixes | None) -> None:
        super().__init__(layers=[] if inner is None else inner.layers)
        self.inner, self.length, self.joined = inner, length, joined

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of the text so far, behind those of the prefix where they are joined."""
        keys, values = key_states, value_states
        if self.inner is not None:
            keys, values = self.inner.update(keys, values, layer_idx, *args, **kwargs)
        if self.joined is None:
            return keys, values
        prefix = self.joined.key_values(layer_idx)
        return (
            torch.cat([prefix[0].to(keys.dtype).expand(len(keys), -1, -1, -1), keys], 2),
            torch.cat([prefix[1].to(values.dtype).expand(len(values), -1, -1, -1), values], 2),
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions start here."""
        return self.length + (0 if self.inner is None else self.inner.get_seq_length(layer_idx))

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Masks count queries from here."""
        text = 0 if self.inner is None else self.inner.get_query_offset(layer_idx)
        return text if self.joined is None else text + self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys, and the first one's index, that masks are made for."""
        keys, offset = (query_length, 0) if self.inner is None else self.inner.get_mask_sizes(query_length, layer_idx)
        return (keys, offset) if self.joined is None else (keys + self.length, offset)


class Prefixes(nn.Module):
    """The active key-value prefixes of one model, and how they reach its attention."""

    model: PreTrainedModel  # these are kept unregistered: the model holds this module, not the reverse
    adapters: nn.ModuleDict
    attentions: list[nn.Module]

    def __init__(self, model: nn.Module, backbone: nn.Module, adapters: nn.ModuleDict) -> None:
        super().__init__()
        self.__dict__.update(model=model, adapters=adapters, attentions=[])
        self.__dict__["attentions"] = [
            module for module in backbone.modules() if isinstance(getattr(module, "layer_idx", None), int)
        ]
        self.active: tuple[str, ...] = ()
        self.previous: str | None = None  # attention function that the model had
        self.joined_because: str | None = None
        self._served: set[int] = set()
        self._rows: list[tuple[Tensor, Tensor]] | None = None  # of all layers, for the length of one forward

    @property
    def length(self) -> int:
        """T over all active prefixes."""
        return sum(self._adapter(name).length for name in self.active)

    def key_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """[Hkv, T, D] keys and values of one layer, in the order of activation."""
        if not torch.compiler.is_compiling():
            self._served.add(layer)
        if self._rows is not None:
            return self._rows[layer]
        return _together([self._adapter(name).key_values(layer) for name in self.active])

    def _adapter(self, name: str) -> KeyValueAdapter:
        return self.adapters[name]  # type: ignore[return-value]

    def activate(self, names: Iterable[str]) -> None:
        """Make these the active ones; the model's attention function is ours while there is one."""
        self.active = tuple(names)
        if self.active and self.previous is None:
            self._switch_on()
        elif not self.active and self.previous is not None:
            self._switch_off()

    def _switch_on(self) -> None:
        self.previous = str(self.model.config._attn_implementation)
        self.model.set_attn_implementation(ATTENTION)
        if self.model.config._attn_implementation == ATTENTION:
            self.joined_because = None
            for module in self.attentions:
                module.__dict__[_MARK] = self
            return
        self.joined_because = (
            f"{type(self.model).__name__} does not look its attention up in transformers' registry: "
            "prefixes are concatenated with keys and values, and gradient checkpointing raises"
        )
        warnings.warn(self.joined_because, stacklevel=2)

    def _switch_off(self) -> None:
        for module in self.attentions:
            module.__dict__.pop(_MARK, None)
        if self.previous is not None and self.model.config._attn_implementation == ATTENTION:
            self.model.set_attn_implementation(self.previous)
        self.previous = None

    def enter(self, backbone: nn.Module, values: dict[str, Any]) -> None:
        """Change the backbone's arguments in place: its cache counts T positions more than it holds."""
        if self.joined_because is not None and torch.is_grad_enabled() and _recomputes(backbone):
            raise ValueError(f"gradient checkpointing would lose the prefix: {self.joined_because}")
        if self.joined_because is None and self.model.config._attn_implementation != ATTENTION:
            raise ValueError(
                f"the model's attention was set to {self.model.config._attn_implementation!r} after a prefix was "
                "activated, which would lose the prefix: set the attention function first, then attach or set_adapter"
            )
        length, name = self.length, cache_name(backbone, values)
        cache = values.get(name)
        if cache is None and self._keeps_cache(backbone, values):
            cache = DynamicCache(config=self.model.config)
        values[name] = PrefixedCache(cache, length, self if self.joined_because is not None else None)
        if values.get("position_ids") is not None:
            values["position_ids"] = values["position_ids"] + length
        mask = values.get("attention_mask")
        if mask is not None and self.joined_because is not None:
            seen = 0 if mask.is_floating_point() and mask.dim() == 4 else 1
            values["attention_mask"] = nn.functional.pad(mask, (length, 0), value=seen)
        self._served.clear()
        # A layer that is recomputed in backward makes its own: reentrant recomputation cannot share a graph.
        if _recomputes(backbone):
            self._rows = None
        else:
            layers = zip(*(self._adapter(name).every_layer() for name in self.active), strict=True)
            self._rows = [_together(list(found)) for found in layers]

    def leave(self, output: Any) -> Any:
        """Give the caller the cache of the text alone; RuntimeError for a layer that never asked for its prefix."""
        self._rows = None
        if not torch.compiler.is_compiling():
            layers = self._adapter(self.active[0]).layers
            if missing := sorted(set(range(layers)) - self._served):
                kind = type(self.model).__name__
                raise RuntimeError(f"{kind}: layers {missing} did not attend to their prefix; it would be lost")
        if isinstance(output, dict):
            if not any(isinstance(value, PrefixedCache) for value in output.values()):
                return output
            return type(output)(**{key: _text_cache(value) for key, value in output.items()})
        if isinstance(output, tuple):
            return tuple(_text_cache(v) for v in output if not (isinstance(v, PrefixedCache) and v.inner is None))
        return output

    def _keeps_cache(self, backbone: nn.Module, values: dict[str, Any]) -> bool:
        """Whether the model would make a cache of its own; it does not once it is given one."""
        wanted = values.get("use_cache")
        if wanted is None:
            wanted = self.model.can_generate() and getattr(self.model.config, "use_cache", False)
        return bool(wanted) and not _recomputes(backbone)


def cache_name(backbone: nn.Module, values: dict[str, Any]) -> str:
    """The name under which this version of transformers passes caches."""
    given = [name for name in CACHE_NAMES if values.get(name) is not None]
    if given:
        return given[0]
    return CACHE_NAMES[0] if CACHE_NAMES[0] in inspect.signature(backbone.forward).parameters else CACHE_NAMES[1]


def check(model: nn.Module, layers: int) -> None:
    """Raise TargetError for a model whose layers cannot be told apart or that has more than self-attention."""
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "add_cross_attention", False):
        raise TargetError(f"{kind} has cross-attention: prefixes are for models with self-attention alone")
    if not hasattr(Cache, "get_query_offset"):
        raise TargetError("prefixes need transformers >= 5.17, whose caches tell masks and positions apart")
    if getattr(model.config, "model_type", None) == "opt":
        raise TargetError(f"{kind} counts positions by a mask that does not know of a prefix")
    found = (getattr(module, "layer_idx", None) for module in prompting.backbone(model).modules())
    indices: set[int] = {index for index in found if isinstance(index, int)}
    if indices != set(range(layers)):
        raise TargetError(
            f"{kind} has {layers} layers, and its modules give the indices {sorted(indices)} (layer_idx): "
            "prefixes need to know the layer of each attention"
        )


def _together(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The rows of several prefixes, one behind the other."""
    if len(found) == 1:
        return found[0]
    return torch.cat([keys for keys, _ in found], 1), torch.cat([values for _, values in found], 1)


def _recomputes(backbone: nn.Module) -> bool:
    return backbone.training and any(getattr(m, "gradient_checkpointing", False) for m in backbone.modules())


def _text_cache(value: Any) -> Any:
    return value.inner if isinstance(value, PrefixedCache) else value


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer over its prefix and the text, in the signature of transformers' registry."""
    prefixes: Prefixes | None = getattr(module, _MARK, None)
    if prefixes is None:  # a model that shares its configuration with the prefixed one
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        out: tuple[Tensor, None] = plain(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
        return out
    changing = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if changing:
        raise ValueError(f"{type(module).__name__} attends with {', '.join(changing)}: prefixes do not know it")
    length = query.shape[2]
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    causal = length > 1 and attention_mask is None and causal
    if causal and key.shape[2] > length:  # an empty static cache: the places behind the text are not filled yet
        key, value = key[:, :, :length], value[:, :, :length]
    pk, pv = prefixes.key_values(module.layer_idx)  # type: ignore[arg-type]
    attended = ops.prefix_attention(
        query, key, value, pk, pv, mask=attention_mask, causal=causal, scale=scaling, p=dropout
    )
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
