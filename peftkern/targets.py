"""Finding the modules that a configuration names, and the parts every transformer has, without naming model classes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from peftkern.base import BaseLayer, is_supported
from peftkern.errors import TargetError, near

ATTENTION_PROJECTIONS = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "c_attn", "qkv_proj", "query_key_value")
"""Names under which the field's models keep the query and value projections: the default targets of LoRA's paper."""

TASK_HEADS = ("classifier", "score", "qa_outputs", "classification_head", "pre_classifier")
"""Names under which transformers keeps task heads; Hugging Face PEFT trains the same ones for these task types."""


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
        output = output_layers(model)
        chosen = [p for p, m in candidates.items() if not isinstance(m, nn.Embedding) and p not in output]
    else:
        everything = {path: m for path, m in named_modules(model) if path}
        chosen = [path for path in everything if matches(path, spec)]
        unfit = {path: type(everything[path]).__name__ for path in chosen if path not in candidates}
        if unfit and len(unfit) == len(chosen):
            path, kind = next(iter(unfit.items()))
            raise TargetError(f"{path} is a {kind}: want nn.Linear, Conv1D or nn.Embedding inside it as target_modules")
        if unfit:
            raise TargetError(f"target_modules={spec!r} also matches modules that cannot be adapted: {unfit}")
    layers = {config.layers_to_transform} if isinstance(config.layers_to_transform, int) else config.layers_to_transform
    paths = [
        path
        for path in chosen
        if not matches(path, config.exclude_modules)
        and not _inside(path, config.modules_to_save)
        and (layers is None or block_index(model, path, config.layers_pattern) in layers)
    ]
    if not paths:
        raise TargetError(_no_match(spec, candidates, config, bool(chosen)))
    return paths


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module for everything an adapter can sit on, adapted modules counted as what they wrap."""
    return {path: m for path, m in named_modules(model) if is_supported(m)}


def named_modules(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """The model's modules under the paths they had before anything was attached."""
    for path, module in model.named_modules():
        parts = path.split(".")
        if "_peftkern" in parts or "adapters" in parts and _is_adapted(model, path):
            continue
        if hasattr(type(module), "merged_weights"):
            continue
        yield path.replace(".base_layer", ""), module


def original_path(path: str) -> str:
    """The path a module or parameter had before anything was attached."""
    return path.replace(".base_layer", "")


def _is_adapted(model: nn.Module, path: str) -> bool:
    prefix = path.split(".adapters")[0]
    return hasattr(type(model.get_submodule(prefix)), "merged_weights")


def _inside(path: str, names: Iterable[str] | None) -> bool:
    return any(name in path.split(".") or path == name or path.endswith("." + name) for name in names or ())


def output_layers(model: nn.Module) -> set[str]:
    """Paths of the output embedding and of task heads: what "all-linear" leaves out."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {p for p, m in named_modules(model) if m is output or _inside(p, TASK_HEADS)}


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
    return f"target_modules={spec!r} matches no module{hints}. The model has: {', '.join(names)}"
