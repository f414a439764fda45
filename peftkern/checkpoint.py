"""Adapters on disk: `adapter_config.json` and `adapter_model.safetensors`, as Hugging Face PEFT writes and reads them.

Everything is checked before the model changes, and files are replaced atomically.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from peftkern import registry, targets
from peftkern.adapter import AdapterConfig, LayerAdapter, LayerConfig, PromptAdapter, Selection
from peftkern.attachment import adapted_modules, known
from peftkern.base import is_pretrained, is_sharded, token_embeddings
from peftkern.errors import AdapterError, CheckpointError, ConfigError, TargetError, UnknownMethodError
from peftkern.plan import Plan

M = TypeVar("M", bound=nn.Module)
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PROMPT_PREFIX = "base_model."
_SAVED_IN_FULL = re.compile(r"\.modules_to_save\.([^.]+\.(?=.*\.))?")
"""What PEFT's wrapper of such a module puts into a key, with the adapter's name where it has modules inside."""


def save(model: nn.Module, directory: str | Path, name: str = "default") -> Path:
    """Write one adapter to a directory and return it.

    Both files are written beside the old ones and then renamed, so that a full disk or a kill leaves the old checkpoint
    readable. Raises AdapterError for an unknown name, CheckpointError when the directory cannot be written.
    """
    found = {key: _gathered(tensor.detach()) for key, tensor in tensors(model, name).items()}
    return write(directory, described(model, name), found)


def parameters(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Key in a file -> parameter, or frozen tensor saved beside them, of one adapter.

    Raises AdapterError for an unknown name, and for an adapter that brings base weights of its own while it is merged.
    """
    attachment = known(model, name)
    if name in attachment.merged and attachment.carried[name]:
        raise AdapterError(f"adapter {name!r} brings weights of the backbone and is merged into them: unmerge first")
    config = attachment.configs[name]
    return {_file_key(key, config): parameter for key, parameter in attachment.tensors_of(model, name).items()}


def tensors(model: nn.Module, name: str = "default", embeddings: bool | None = None) -> dict[str, Tensor]:
    """Key in a file -> tensor of one adapter as it is saved: its parameters, or what an adapter makes of them.

    embeddings: whether those of the backbone go with them; by default where the vocabulary is not the backbone's own.
    """
    attachment = known(model, name)
    found: dict[str, Tensor] = dict(parameters(model, name))
    if (prompt := attachment.prompt(name)) is not None:
        config = attachment.configs[name]
        for key in prompt.state_keys():
            del found[_file_key(key, config)]
        found |= {_file_key(key, config): tensor for key, tensor in prompt.stored_tensors().items()}
    return found if embeddings is False else found | _embeddings(model, name, found, resized=embeddings is None)


def _embeddings(model: nn.Module, name: str, found: Mapping[str, Tensor], resized: bool) -> dict[str, Tensor]:
    """Key in a file -> weight of an embedding; with `resized` if it has other rows than the backbone that a file names.

    As Hugging Face PEFT saves them: whoever loads the adapter would have new rows of their own otherwise.
    """
    config = known(model, name).configs[name]
    if config.peft_type is None or not isinstance(config, LayerConfig) or not is_pretrained(model):
        return {}
    size = _vocabulary(_backbone_name(model, config)) if resized else None
    if resized and size is None:
        return {}
    ends = {id(getattr(end, "base_layer", end)) for end in token_embeddings(model)}
    adapted = {id(module.base.module) for module in adapted_modules(model) if name in module.adapters}
    weights: dict[str, Tensor] = {}
    for path, module in targets.named_modules(model):
        if id(module) in ends and module.weight.shape[0] != size:  # type: ignore[index]
            inside = ".base_layer" if id(module) in adapted else ""
            weights[f"{PREFIX}{path}{inside}.weight"] = module.weight  # type: ignore[assignment]
    return {key: tensor for key, tensor in weights.items() if key not in found}


def _vocabulary(backbone: str | None) -> int | None:
    """Rows of the embedding of a backbone, None where it is not here or not a model of text."""
    if backbone is None:
        return None
    from transformers import AutoConfig

    try:
        size: int = AutoConfig.from_pretrained(backbone, local_files_only=True).get_text_config().vocab_size
    except (AttributeError, OSError, ValueError):
        return None
    return size


def _backbone_name(model: nn.Module, config: AdapterConfig) -> str | None:
    own = getattr(getattr(model, "config", None), "_name_or_path", None)
    return config.base_model_name_or_path or own or None


def described(model: nn.Module, name: str = "default") -> AdapterConfig:
    """The configuration as it is written: what depends on the model (default targets, task heads) is spelt out."""
    config = known(model, name).configs[name].stored()
    where = _backbone_name(model, config)
    paths = [path for path, _ in targets.named_modules(model)]
    heads = targets.TASK_HEADS if config.task_type in targets.HEAD_TASKS else ()
    whole = list(config.modules_to_save or ())
    whole += [head for head in heads if head not in whole and any(path.endswith(head) for path in paths)]
    if isinstance(config, LayerConfig):
        config = _with_targets(model, config, [m.base.path for m in adapted_modules(model) if name in m.adapters])
    if config.task_type is None and is_pretrained(model):  # by which AutoPeftModel finds the backbone's class
        kind = type(model)
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        config = replace(config, auto_mapping=mapping)
    return replace(config, inference_mode=True, base_model_name_or_path=where, modules_to_save=whole or None)


def write(directory: str | Path, config: AdapterConfig, tensors: Mapping[str, Tensor]) -> Path:
    """Write configuration and tensors (by their names in the file) atomically."""
    directory = Path(directory)
    method = registry.by_config(config)
    info = registry.methods()[method.name]
    peft_type = config.peft_type or method.name.upper()
    own = {"method": method.name, "distribution": info.distribution, "version": _version()}
    fields = {f.name: f for f in dataclasses.fields(config)}
    left_out = {key for key in config.extensions if getattr(config, key) == fields[key].default}
    values = {key: value for key, value in config.to_dict().items() if key not in left_out}
    values |= {"peft_type": peft_type} | ({} if config.peft_type else {"peftkern": own})
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # Tied tensors are one memory, which a file cannot hold twice.
        data = serialise({key: t.cpu().contiguous().clone() for key, t in tensors.items()}, metadata={"format": "pt"})
        with (
            _replacing(directory / WEIGHTS_FILE, data) as put_weights,
            _replacing(directory / CONFIG_FILE, text.encode()) as put_config,
        ):
            put_weights()
            put_config()
    except OSError as error:
        raise CheckpointError(f"cannot write to {directory}: {error}; what was there before is intact") from error
    return directory


def load(
    model: M,
    directory_or_hub_id: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    revision: str | None = None,
    subfolder: str | None = None,
) -> M:
    """Attach a saved adapter and return the model; `trainable` lets it train on.

    subfolder: where in the directory or repository its files are, as those of an adapter not named default.

    Raises CheckpointError, naming tensor and shapes, for files that are missing, truncated or made for another
    backbone, UnknownMethodError for a method that is not installed; the model is then exactly as it was.
    """
    directory = find(directory_or_hub_id, revision, subfolder)
    config = read_config(directory).stored()
    found = read_tensors(directory)
    try:
        carried = _base_weights(model, config, found)
        # Nothing starts anew what the file holds: not from a tokenizer that the file names, nor by a decomposition.
        plan = Plan(model, replace(config, inference_mode=True), name, carried)
    except (TargetError, ConfigError) as error:
        raise CheckpointError(f"{directory} does not fit this {type(model).__name__}: {error}") from error
    plan.config = replace(plan.config, inference_mode=not trainable)
    wanted = {_file_key(key, config): p for key, p in plan.tensors().items()}
    _drop_tied(model, config, found, wanted)
    _fill(directory, found, wanted, model)
    plan.commit(trainable)
    return model


def restore(
    model: M,
    directory_or_hub_id: str | Path,
    name: str = "default",
    *,
    revision: str | None = None,
    subfolder: str | None = None,
) -> M:
    """Give an adapter that is attached already the weights of a saved one, in place, and return the model.

    Optimizers keep the parameters they know. Raises as `load` does; AdapterError for an unknown name and while merged.
    """
    attachment = known(model, name)
    if attachment.merged:
        raise AdapterError(f"adapters {list(attachment.merged)} are merged: unmerge before loading weights")
    directory = find(directory_or_hub_id, revision, subfolder)
    config, here = read_config(directory), attachment.configs[name]
    if type(config) is not type(here):
        raise CheckpointError(f"{directory} holds a {config.method.name}, and adapter {name!r} is a {here.method.name}")
    found, wanted = read_tensors(directory), parameters(model, name)
    if not attachment.carried[name]:
        _base_weights(model, config, found)
    _fill(directory, found, wanted, model)
    return model


def read_config(directory: str | Path) -> AdapterConfig:
    """The configuration in a checkpoint directory; an option that is not implemented is an error, never ignored."""
    path = Path(directory) / CONFIG_FILE
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: want a directory with {CONFIG_FILE}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise CheckpointError(f"{path} names no peft_type: it is not an adapter's configuration")
    own = values.get("peftkern") or {}
    if not isinstance(own, dict):
        raise CheckpointError(f"{path}: peftkern={own!r}: want a mapping of method, distribution and version")
    method = registry.by_peft_type(values["peft_type"])
    if method is None:
        installed = own.get("method", values["peft_type"].lower())
        if installed in registry.names():
            registry.load(installed)  # it is there and cannot be used: this raises why
        distribution = own.get("distribution")
        named = isinstance(distribution, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", distribution)
        hint = f"pip install {distribution}" if named else "no distribution is known to provide it"
        raise UnknownMethodError(f"{path}: method {own.get('method', values['peft_type'])!r} is not installed: {hint}")
    return method.Config.from_file(values)


def read_tensors(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory, on the CPU."""
    with _opened(Path(directory) / WEIGHTS_FILE) as file:
        return {key: file.get_tensor(key) for key in file.keys()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        pickled = (path.parent / "adapter_model.bin").is_file()
        hint = "; adapter_model.bin is a pickle, which is never loaded: save it as safetensors" if pickled else ""
        raise CheckpointError(f"{path} does not exist{hint}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error


def shapes(directory: str | Path) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a checkpoint directory, without reading them."""
    with _opened(Path(directory) / WEIGHTS_FILE) as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}


def find(directory_or_hub_id: str | Path, revision: str | None = None, subfolder: str | None = None) -> Path:
    """A local directory as it is, else a snapshot of a hub repository's adapter files; in it the subfolder, if any."""
    inside, directory = subfolder or "", Path(directory_or_hub_id)
    if directory.is_dir():
        return directory / inside
    try:
        from huggingface_hub import snapshot_download

        patterns = [str(Path(inside, file)) for file in (CONFIG_FILE, WEIGHTS_FILE)]
        found = snapshot_download(str(directory_or_hub_id), revision=revision, allow_patterns=patterns)
        return Path(found, inside)
    except Exception as error:
        raise CheckpointError(
            f"{directory_or_hub_id} is no directory, and as a hub repository it cannot be had: {error}"
        ) from error


class _replacing:
    """Writes data beside `path` on entry; calling the result renames it into place, until an error in the block."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data = path, data
        self.temporary: Path | None = None
        self.old: Path | None = None

    def __enter__(self) -> Callable[[], None]:
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        self.temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(self.data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            self.temporary.unlink(missing_ok=True)
            raise
        self.temporary.chmod(0o666 & ~_umask())
        return self._rename

    def _rename(self) -> None:
        if self.temporary is None:
            return
        if self.path.exists():
            aside = self.temporary.with_name(self.temporary.name + ".old")
            with suppress(OSError):  # a file system without hard links cannot go back
                aside.hardlink_to(self.path)
                self.old = aside
        self.temporary.replace(self.path)
        self.temporary = None

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and self.old is not None:
            with suppress(OSError):
                self.old.replace(self.path)
        for leftover in (self.temporary, self.old):
            if leftover is not None:
                leftover.unlink(missing_ok=True)


def _gathered(tensor: Tensor) -> Tensor:
    """A shard of FSDP2's as the whole tensor; every rank must ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _prefix(config: AdapterConfig) -> str:
    """What Hugging Face PEFT's wrappers put before the paths of the model."""
    return PROMPT_PREFIX if issubclass(config.method, PromptAdapter) else PREFIX


def _file_key(key: str, config: AdapterConfig) -> str:
    """Prompts stand at the top level of a file, what layers share too, behind the wrapper's name.

    All others stand under the path of the wrapped model.
    """
    if "." in key:
        return _prefix(config) + key
    return PROMPT_PREFIX + key if issubclass(config.method, LayerAdapter) else key


def _with_targets(model: nn.Module, config: LayerConfig, paths: list[str]) -> LayerConfig:
    """`target_modules` as a list where others would read the same words differently, or not at all."""
    spec = config.target_modules
    pattern = isinstance(spec, str) and spec != "all-linear"
    if (
        config.peft_type is None
        or not paths
        or isinstance(spec, list)
        or (pattern and config.layers_to_transform is None)
    ):
        return config
    short = replace(config, target_modules=[path.split(".")[-1] for path in paths])
    try:
        if not pattern and sorted(targets.match(model, short)) == sorted(paths):
            return short
    except TargetError:
        pass
    return replace(config, target_modules=paths, exclude_modules=None, layers_to_transform=None, layers_pattern=None)


def _base_weights(model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor]) -> list[str]:
    """Names of base weights that come with the adapter and differ from the model's own; those that do not are dropped.

    Hugging Face PEFT adds the weights of embeddings that are adapted or were resized; methods of our own never do.
    """
    if config.peft_type is None or issubclass(config.method, Selection):
        return []
    modules = {path: module for path, module in targets.named_modules(model) if path}
    ends = token_embeddings(model)
    embeddings = {path for path, module in modules.items() if any(module is getattr(e, "base_layer", e) for e in ends)}
    whole = set(targets.saved_modules(model, config))
    carried: list[str] = []
    for key in list(tensors):  # with bias="all" it repeats the biases of modules that it saves in full anyway
        if ".original_module." in key or _SAVED_IN_FULL.sub(".", key) in tensors.keys() - {key}:
            del tensors[key]
    for key in list(tensors):
        stored = key.removeprefix(_prefix(config)).removesuffix(".weight")
        path = stored.removesuffix(".base_layer")
        brought = stored != path or path in embeddings
        if not key.endswith(".weight") or path not in modules or path in whole or not brought:
            continue
        if _same(modules[path].weight, tensors[key]):  # type: ignore[arg-type]
            del tensors[key]
        else:
            carried.append(f"{path}.weight")
    return carried


def _drop_tied(
    model: nn.Module, config: AdapterConfig, tensors: dict[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    """Drop what a file holds once more under another name of a tied parameter, as PEFT writes it with bias="all"."""
    names: dict[int, list[str]] = {}
    for name, parameter in targets.named_parameters(model):
        names.setdefault(id(parameter), []).append(_prefix(config) + name)
    for tied in names.values():
        kept = [key for key in tied if key in wanted and key in tensors]
        for key in tied:
            if kept and key in tensors and key not in wanted and _same(tensors[key], tensors[kept[0]]):
                del tensors[key]


def _same(here: Tensor, found: Tensor) -> bool:
    """Whether the two hold the same values, in the dtype of one of them."""
    mine = here.detach().cpu()
    return mine.shape == found.shape and (
        torch.equal(mine, found.to(mine.dtype)) or torch.equal(mine.to(found.dtype), found)
    )


def _fill(directory: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: nn.Module) -> None:
    _check_fit(directory, found, wanted, model)
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(found[key])


def _check_fit(directory: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: nn.Module) -> None:
    path = directory / WEIGHTS_FILE
    where = f"{path} does not fit this {type(model).__name__}"
    for key, parameter in wanted.items():
        if key not in found:
            raise CheckpointError(f"{where}: tensor {key} {tuple(parameter.shape)} is missing")
        if parameter.is_meta:
            raise CheckpointError(f"{where}: tensor {key} is on the meta device here: give the model its weights first")
        if found[key].shape != parameter.shape:
            raise CheckpointError(
                f"{where}: tensor {key} is {tuple(found[key].shape)}, wanted {tuple(parameter.shape)}"
            )
    if extra := sorted(set(found) - set(wanted)):
        raise CheckpointError(f"{where}: {len(extra)} tensors have no place in it, the first is {extra[0]}")


def _version() -> str:
    try:
        return version("peftkern")
    except PackageNotFoundError:
        return "checkout"
