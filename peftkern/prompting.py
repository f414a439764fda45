"""Prompt rows in front of a model's input: hooks on the backbone, so that the model keeps its class and its methods."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftkern import ops
from peftkern.adapter import KeyValueAdapter, PromptAdapter, PromptSite
from peftkern.base import check_no_replica, is_pretrained, token_embeddings
from peftkern.errors import TargetError
from peftkern.ops.prompt_concat import IGNORED, source_index
from peftkern.targets import CACHE_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def site(model: nn.Module) -> PromptSite:
    """Token width, embedding and config of a model; TargetError without a token embedding and for encoder-decoders."""
    embedding = token_embeddings(model)[0] if is_pretrained(model) else None
    embedding = getattr(embedding, "base_layer", embedding)
    if not isinstance(embedding, nn.Embedding):
        raise TargetError(f"{type(model).__name__} has no token embedding (nn.Embedding) to put a prompt beside")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        kind = type(model).__name__
        raise TargetError(f"{kind} is an encoder-decoder: prompts in front of its input are not supported")
    return PromptSite(embedding.embedding_dim, embedding, config)


def backbone(model: nn.Module) -> nn.Module:
    """The part of a model that embeds its input and runs all layers, which the model calls whatever its head.

    It is `base_model`, or where that only holds a decoder (OPT, Bart without its encoder) the decoder.
    """
    base = getattr(model, "base_model", model)
    if not isinstance(base, nn.Module):
        return model
    decoder = getattr(base, "decoder", None)
    holds = isinstance(decoder, nn.Module) and hasattr(decoder, "embed_tokens") and not hasattr(base, "encoder")
    return decoder if holds else base  # type: ignore[return-value]


class PromptHooks(nn.Module):
    """Prepends the active prompts on the way into the backbone, and takes their rows off an encoder's output.

    A causal language model keeps the prompt rows in its logits, with labels -100 there, as Hugging Face PEFT does. So
    does an encoder under a head that classifies the whole sequence by the first row, where `pools` names the adapter:
    that row is the prompt's. Decoders for that task have a head called `score`, which looks for the last real token.
    """

    model: PreTrainedModel  # these two are kept unregistered: the model holds this module, not the reverse
    backbone: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self.__dict__["backbone"] = backbone(model)
        self.prompts = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        from peftkern.prefixing import Prefixes  # imports transformers

        self.prefixes = Prefixes(model, self.backbone, self.prompts)
        self.pools: set[str] = set()
        self.keeps_rows = bool(getattr(model, "can_generate", lambda: False)())
        self._mask: Tensor | None = None
        self._entered = False
        self._handles = [
            self.backbone.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.backbone.register_forward_hook(self.leave, with_kwargs=True),
        ]
        if model is not self.backbone:
            self._handles.append(model.register_forward_pre_hook(self.extend_labels, with_kwargs=True))
            self._handles.append(model.register_forward_hook(self.check_entered))

    def activate(self, names: tuple[str, ...]) -> None:
        """Make those of `names` that are prompts or prefixes the active ones."""
        chosen = [name for name in names if name in self.prompts]
        prefixes = [name for name in chosen if isinstance(self.prompts[name], KeyValueAdapter)]
        self.active = tuple(name for name in chosen if name not in prefixes)
        self.prefixes.activate(prefixes)

    def remove(self) -> None:
        """Take the hooks off the model."""
        self.prefixes.activate(())
        for handle in self._handles:
            handle.remove()

    def prompt(self) -> Tensor:
        """[T, H] rows of all active prompts, in the order of activation."""
        return torch.cat([self._adapter(name).prompt() for name in self.active])

    def _adapter(self, name: str) -> PromptAdapter:
        return self.prompts[name]  # type: ignore[return-value]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put the active prompts and prefixes into the backbone's arguments."""
        if not self.active and not self.prefixes.active:
            return None
        check_no_replica(module)
        self._entered = True
        values = _bind(module, args, kwargs)
        past = next((values[name] for name in CACHE_NAMES if values.get(name) is not None), None)
        if self.active:
            if past is not None and past.get_seq_length() > 0:
                values = self._continue(values, self.prompt().shape[0])
            else:
                values = self._prepend(values, past)
        if self.prefixes.active:
            tokens = _tokens(values)
            text = tokens.shape[1] + (0 if past is None or torch.compiler.is_compiling() else past.get_seq_length())
            self._check_length(text + self.prefixes.length)
            self.prefixes.enter(module, values)
        return (), values

    def _prepend(self, values: dict[str, Any], past: Any) -> dict[str, Any]:
        """Replace ids or embeddings by prompted embeddings, and extend mask, positions and token types."""
        prompt, tokens = self.prompt(), _tokens(values)
        ids, embeds = values.get("input_ids"), values.get("inputs_embeds")
        mask = _whole(values.get("attention_mask"))
        if past is not None and mask is not None and not torch.compiler.is_compiling() and not mask.any(1).all():
            raise ValueError(
                "attention_mask: a row has no token to put a prompt in front of; "
                "a chunked prefill of padded rows comes to this: generate without prefill_chunk_size"
            )
        self._check_length(tokens.shape[1] + prompt.shape[0])
        prompted = self._concat(prompt, ids, embeds, mask)
        values.update(input_ids=None, inputs_embeds=prompted.embeds, attention_mask=prompted.mask)
        first_row = not self.pools.isdisjoint(self.active) and not hasattr(self.model, "score")
        text = torch.ones_like(tokens) if mask is None else mask
        self._mask = None if self.keeps_rows or first_row else text.to(torch.int64)
        if values.get("position_ids") is not None:
            values["position_ids"] = prompted.positions
        if values.get("token_type_ids") is not None:
            index = source_index(text.to(torch.int64), len(prompt))
            types = values["token_type_ids"].expand_as(tokens).gather(1, index.clamp(0))
            values["token_type_ids"] = types.masked_fill(index < 0, 0)
        values.pop("cache_position", None)
        return values

    def leave(self, _module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        """Give back the cache of the text, and gather the rows of the text out of an encoder's sequence outputs."""
        mask, self._mask = self._mask, None
        if self.prefixes.active:
            output = self.prefixes.leave(output)
        if not self.active or mask is None:
            return output
        length = mask.shape[1] + self.prompt_length()
        index = source_index(mask, self.prompt_length())
        position = torch.arange(length, device=mask.device).expand_as(index)
        order = position.masked_fill(index < 0, length).sort(1).values[:, : mask.shape[1]]
        rows = (order + length * torch.arange(len(order), device=order.device)[:, None]).flatten()

        def strip(value: Any) -> Any:
            if isinstance(value, Tensor) and value.dim() == 3 and value.shape[1] == length:
                return value.flatten(0, 1).index_select(0, rows).view(*order.shape, value.shape[2])
            return tuple(map(strip, value)) if isinstance(value, tuple) and not hasattr(value, "_fields") else value

        if isinstance(output, dict):
            for key in list(output.keys()):
                if key != "attentions" and key not in CACHE_NAMES:
                    output[key] = strip(output[key])
            return output
        return strip(output)

    def extend_labels(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Give the rows of the prompt the label -100, for models that keep them in their logits."""
        if not (self.active and self.keeps_rows):
            return None
        values = _bind(module, args, kwargs)
        labels, mask = values.get("labels"), _whole(values.get("attention_mask"))
        if labels is None:
            return None
        index = source_index(torch.ones_like(labels) if mask is None else mask, self.prompt_length())
        return (), values | {"labels": labels.gather(1, index.clamp(0)).masked_fill(index < 0, IGNORED)}

    def check_entered(self, model: nn.Module, _args: Any, _output: Any) -> None:
        """RuntimeError for a model that has run without its backbone, and so without the prompt."""
        entered, self._entered = self._entered, False
        if (self.active or self.prefixes.active) and not entered and not torch.compiler.is_compiling():
            kind, part = type(model).__name__, type(self.backbone).__name__
            raise RuntimeError(f"{kind} did not call its {part}: the prompt would be lost")

    def prompt_length(self) -> int:
        """T over all active prompts."""
        return sum(self._adapter(name).prompt().shape[0] for name in self.active)

    def _concat(self, prompt: Tensor, ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None) -> ops.Prompted:
        embedding = self.model.get_input_embeddings()
        if embeds is None and type(embedding) is nn.Embedding and not embedding._forward_hooks:
            return ops.prompt_concat(prompt, ids=ids, table=embedding.weight, mask=mask)
        return ops.prompt_concat(prompt, embeds=embedding(ids) if embeds is None else embeds, mask=mask)

    def _continue(self, values: dict[str, Any], length: int) -> dict[str, Any]:
        """One decoding step: the cache already holds the prompt, the caller's mask and positions do not."""
        mask, positions = _whole(values.get("attention_mask")), values.get("position_ids")
        if mask is not None:
            index = source_index(mask, length)
            values["attention_mask"] = mask.gather(1, index.clamp(0)).masked_fill(index < 0, 1)
        if positions is not None:
            values["position_ids"] = positions + length
        values.pop("cache_position", None)
        return values

    def _check_length(self, length: int) -> None:
        limit = getattr(getattr(self.model, "config", None), "max_position_embeddings", None)
        if limit is None or length <= limit:
            return
        names = [name for name, _ in self.backbone.named_modules()]
        if any("position_embeddings" in name or name.endswith("wpe") for name in names):
            raise ValueError(
                f"prompt and text together are {length} tokens, and the backbone has {limit} positions: "
                f"shorten the text by {length - limit} tokens or use fewer virtual tokens"
            )


def _tokens(values: dict[str, Any]) -> Tensor:
    """Something of the text's shape [B, S]."""
    ids, embeds = values.get("input_ids"), values.get("inputs_embeds")
    if ids is None and embeds is None:
        raise ValueError("a prompted model wants input_ids or inputs_embeds")
    return embeds[..., 0] if embeds is not None else ids  # type: ignore[return-value]


def _whole(mask: Tensor | None) -> Tensor | None:
    """An attention mask [B, S] as int64; ValueError for other shapes."""
    if mask is not None and mask.dim() != 2:
        hint = "; a static cache makes such masks, for the text alone: use the dynamic one" if mask.dim() == 4 else ""
        raise ValueError(f"attention_mask {tuple(mask.shape)}: a prompted model wants [batch, length]{hint}")
    return None if mask is None else mask.to(torch.int64)


def _bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    if not args:
        return dict(kwargs)
    parameters = list(inspect.signature(module.forward).parameters)
    return dict(zip(parameters, args, strict=False)) | kwargs
