"""Finding the modules that a configuration names, and the parts every transformer has, without naming model classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from peftkern.base import BaseLayer, is_pretrained, is_supported, token_embeddings
from peftkern.errors import TargetError, near

ATTENTION_PROJECTIONS = (
    "query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "query_proj", "value_proj", "q", "v",
    "c_attn", "qkv_proj", "query_key_value", "Wqkv",
)  # fmt: skip
"""Names under which the field's models keep the query and value projections: the default targets of LoRA's paper."""

KEY_VALUE_PROJECTIONS = (
    "key", "value", "k_proj", "v_proj", "k_lin", "v_lin", "key_proj", "value_proj", "k", "v",
    "c_attn", "qkv_proj", "query_key_value",
)  # fmt: skip
"""The same for keys and values: what (IA)³'s paper scales inside attention."""

TASK_HEADS = ("classifier", "score", "qa_outputs", "classification_head", "pre_classifier")
"""Names under which transformers keeps task heads; Hugging Face PEFT trains the same ones for these task types."""

HEAD_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Task types whose head trains with the adapter, unasked."""

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the argument for keys and values seen before: since 5.24, and until then."""


def matches(path: str, spec: list[str] | str | None) -> bool:
    """A list matches the exact path or a `.suffix`; a string is a regular expression over the whole path."""
    if spec is None:
        return False
    if isinstance(spec, str):
        return re.fullmatch(spec, path) is not None
    return any(path == name or path.endswith("." + name) for name in spec)


def match(model: nn.Module, config: Any) -> list[str]:
    """Paths of the modules that `config.target_modules` names, in the model's order.

    Raises TargetError, listing near names, when nothing matches or a match is of a kind that cannot be wrapped.
    """
    spec = config.target_modules
    candidates = adaptable(model)
    if spec is None:
        spec = [n for n in ATTENTION_PROJECTIONS if any(matches(path, [n]) for path in candidates)] or "all-linear"
    if spec == "all-linear":
        output = token_embeddings(model)[1] if is_pretrained(model) else None
        outputs = {path for path, module in named_modules(model) if module is output}
        chosen = [p for p, m in candidates.items() if not isinstance(m, nn.Embedding) and p not in outputs]
    else:
        everything = {path: m for path, m in named_modules(model) if path}
        named = {id(m) for path, m in named_modules(model, remove_duplicate=False) if path and matches(path, spec)}
        chosen = [path for path, m in everything.items() if id(m) in named]
        unfit = {path: type(everything[path]).__name__ for path in chosen if path not in candidates}
        if unfit and len(unfit) == len(chosen):
            path, kind = next(iter(unfit.items()))
            raise TargetError(f"{path} is a {kind}: want nn.Linear, Conv1D or nn.Embedding inside it as target_modules")
        if unfit:
            raise TargetError(f"target_modules={spec!r} also matches modules that cannot be adapted: {unfit}")
    layers = config.layers_to_transform
    layers = {layers} if isinstance(layers, int) else layers or None
    whole = saved_names(config)
    named_whole = spec if isinstance(spec, list) else ()  # Hugging Face PEFT asks a path named in full for no block
    paths = [
        path
        for path in chosen
        if not matches(path, config.exclude_modules)
        and not _inside(path, whole)
        and (layers is None or path in named_whole or block_index(model, path, config.layers_pattern) in layers)
    ]
    if not paths:
        raise TargetError(_no_match(spec, candidates, config, bool(chosen)))
    return paths


def short_names(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The shortest ends of the paths, cut at dots, that match these modules and no other."""
    wanted = set(paths)
    ends: dict[str, list[str]] = {path: _ends(path) for path, _ in named_modules(model, remove_duplicate=False) if path}
    foreign = {end for path, own in ends.items() if path not in wanted for end in own}
    return sorted({next(end for end in ends[path] if end not in foreign) for path in wanted})


def _ends(path: str) -> list[str]:
    words = path.split(".")
    return [".".join(words[-count:]) for count in range(1, len(words) + 1)]


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module for everything an adapter can sit on, adapted modules counted as what they wrap."""
    return {path: m for path, m in named_modules(model) if is_supported(m)}


def named_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules under the paths they had before anything was attached, shared ones once or every time."""
    return _walk(model, "", set() if remove_duplicate else None)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own parameters under the names they had before anything was attached, tied ones under each name."""
    for path, module in named_modules(model):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{attribute}" if path else attribute, parameter


def biases(model: nn.Module, which: str, adapted: Iterable[str]) -> list[str]:
    """Names of the model's own biases: of no module ("none"), of every one ("all"), or else of the adapted ones."""
    if which == "none":
        return []
    paths = set(adapted)
    found = [name for name, _ in named_parameters(model) if name.split(".")[-1] == "bias"]
    return [name for name in found if which == "all" or name.rpartition(".")[0] in paths]


def _walk(module: nn.Module, path: str, seen: set[int] | None) -> Iterator[tuple[str, nn.Module]]:
    if hasattr(type(module), "merged_weights"):
        module = module.base_layer  # type: ignore[assignment]
    if seen is not None:
        if id(module) in seen:
            return
        seen.add(id(module))
    yield path, module
    for name, child in module._modules.items():
        if child is not None and name != "_peftkern":
            yield from _walk(child, f"{path}.{name}" if path else name, seen)


def _inside(path: str, names: Iterable[str] | None) -> bool:
    return any(f".{name}." in f".{path}." for name in names or ())


def saved_names(config: Any) -> list[str]:
    """Names of the modules that train in full beside the adapter: `modules_to_save`, and the head of these tasks."""
    return [*(config.modules_to_save or ()), *(TASK_HEADS if config.task_type in HEAD_TASKS else ())]


def saved_modules(model: nn.Module, config: Any) -> list[str]:
    """Paths of those modules. As in Hugging Face PEFT a name stands for every path that ends so, at a dot or not:
    "norm" is also "input_layernorm", and "classifier" is also "pre_classifier".

    Raises TargetError, listing near names, for a name in `modules_to_save` that no path ends with.
    """
    paths = [path for path, _ in named_modules(model) if path]
    heads = TASK_HEADS if config.task_type in HEAD_TASKS else ()
    for name in config.modules_to_save or ():
        if name not in heads and not any(path.endswith(name) for path in paths):
            ends = {path.split(".")[-1] for path in paths}
            raise TargetError(f"modules_to_save: no module is called {name!r}{near(name, ends)}")
    return [path for path in paths if path.endswith(tuple(saved_names(config)))]


def blocks(model: nn.Module, pattern: list[str] | str | None = None) -> list[tuple[str, nn.ModuleList]]:
    """(path, list) of the stacks of transformer blocks: ModuleLists of one class, the outermost of each branch.

    `pattern` restricts them to lists of that name.
    """
    found: list[tuple[str, nn.ModuleList]] = []
    names = [pattern] if isinstance(pattern, str) else pattern
    for path, module in named_modules(model):
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or len({type(m) for m in module}) != 1:
            continue
        if names is not None and path.split(".")[-1] not in names:
            continue
        if any(path.startswith(outer + ".") for outer, _ in found) or not any(True for _ in module[0].parameters()):
            continue
        found.append((path, module))
    return found


def block_index(model: nn.Module, path: str, pattern: list[str] | str | None = None) -> int | None:
    """Index of the transformer block that holds `path`, or None when it is in none."""
    for prefix, _ in blocks(model, pattern):
        if path.startswith(prefix + "."):
            return int(path[len(prefix) + 1 :].split(".")[0])
    return None


def block_parts(model: nn.Module) -> list[dict[str, str]]:
    """For each transformer block the paths of its `attention_output`, `ffn_input` and `ffn_output` projections.

    By structure: the attention output is the last projection to the hidden size inside the block's attention, the
    feed-forward network is what follows outside it, from its first projection to the last one back to the hidden size.
    Raises TargetError when the model has no such blocks.
    """
    parts: list[dict[str, str]] = []
    for path, stack in blocks(model):
        for index, block in enumerate(stack):
            inside, outside = _split_attention(block)
            if not outside:
                continue
            width = _out_features(outside[-1][1])
            prefix = f"{path}.{index}."
            part = {"ffn_input": prefix + outside[0][0], "ffn_output": prefix + outside[-1][0]}
            outputs = [name for name, module in inside if _out_features(module) == width]
            if outputs:
                part["attention_output"] = prefix + outputs[-1]
            parts.append(part)
    if not parts:
        raise TargetError("found no transformer blocks with a feed-forward network: give target_modules by name")
    return parts


def _split_attention(block: nn.Module) -> tuple[list[tuple[str, nn.Module]], list[tuple[str, nn.Module]]]:
    linears = [(p, m) for p, m in named_modules(block) if is_supported(m) and not isinstance(m, nn.Embedding)]
    inside = [(p, m) for p, m in linears if "att" in p.lower().rsplit(".", 1)[0] or p.lower().startswith("att")]
    return inside, [item for item in linears if item not in inside]


def _out_features(module: nn.Module) -> int:
    return BaseLayer(module).out_features


def _no_match(spec: list[str] | str, candidates: dict[str, nn.Module], config: Any, matched: bool) -> str:
    if matched:
        return (
            f"target_modules={spec!r} matches, but exclude_modules={config.exclude_modules!r}, modules_to_save="
            f"{config.modules_to_save!r} and layers_to_transform={config.layers_to_transform!r} leave nothing"
        )
    names = sorted({path.split(".")[-1] for path in candidates})
    hints = "".join(near(name, names) for name in ([spec] if isinstance(spec, str) else spec))
    return f"target_modules={spec!r} matches no module{hints or '.'} The model has: {', '.join(names)}"
