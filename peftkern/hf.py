"""Drop-in for Hugging Face PEFT: `get_peft_model` and `PeftModel` over `attach`; changing the import is enough."""

from __future__ import annotations

import enum
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from peftkern import checkpoint, registry
from peftkern.adapter import AdapterConfig, PromptAdapter
from peftkern.attach import (
    active_adapters,
    adapters,
    detach,
    disabled,
    merge,
    merge_and_unload,
    set_adapter,
    unmerge,
)
from peftkern.attachment import adapted_modules, attached
from peftkern.combining import combine
from peftkern.errors import AdapterError, ConfigError, UnknownMethodError
from peftkern.fusing import FuseReport, fuse, unfuse
from peftkern.mixing import mixed
from peftkern.plan import Plan
from peftkern.state_dicts import Loaded, get_peft_model_state_dict

__all__ = ["FuseReport", "PeftConfig", "PeftModel", "TaskType", "fuse", "get_peft_model", "unfuse"]


class TaskType(str, enum.Enum):
    """The task types of Hugging Face PEFT; every configuration also takes them as plain strings."""

    SEQ_CLS = "SEQ_CLS"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    CAUSAL_LM = "CAUSAL_LM"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftConfig:
    """Reads the configuration of a saved adapter of any installed method."""

    @staticmethod
    def from_pretrained(
        model_id: str | Path, *, revision: str | None = None, subfolder: str | None = None
    ) -> AdapterConfig:
        """The configuration in a directory or hub repository; CheckpointError, ConfigError or UnknownMethodError."""
        return checkpoint.read_config(checkpoint.find(model_id, revision, subfolder))


def get_peft_model(
    model: nn.Module,
    peft_config: Any,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Attach a new adapter to the model, in place, and return the model behind PEFT's interface.

    peft_config: a configuration of ours, or a `peft.LoraConfig` and the like, whose fields are taken over.
    autocast_adapter_dtype=False keeps layer adapters in the backbone's dtype where that is half precision.
    low_cpu_mem_usage changes nothing here. Raises what `attach` raises, before any change.
    """
    config = as_config(peft_config)
    if revision is not None:
        config = replace(config, revision=revision)
    return PeftModel(model, config, adapter_name, autocast_adapter_dtype)


def as_config(config: Any) -> AdapterConfig:
    """Our own configuration for ours or for one of Hugging Face PEFT's; ConfigError for anything else."""
    if isinstance(config, AdapterConfig):
        return config
    if not hasattr(config, "to_dict") or not hasattr(config, "peft_type"):
        raise ConfigError(f"peft_config is a {type(config).__name__}: want a configuration such as pk.LoraConfig(r=8)")
    values = {key: getattr(value, "value", value) for key, value in config.to_dict().items()}
    method = registry.by_peft_type(str(values["peft_type"]))
    if method is None:
        raise UnknownMethodError(f"no installed method is of the PEFT type {values['peft_type']!r}")
    return method.Config.from_dict(values)


class PeftModel(nn.Module):
    """A model with adapters behind the interface of Hugging Face PEFT's class.

    `base_model.model` (for prompts `base_model`) is the model itself, of its own class, with everything attached to it:
    what the functions of peftkern do to that model shows here, and the other way round. Attributes not found here are
    the model's. Where `peft` is installed, instances are also instances of its PeftModel, since that is how
    transformers, accelerate and TRL recognise a model whose checkpoints are adapters.
    """

    def __new__(cls, *_args: Any, **_kwargs: Any) -> PeftModel:
        """An instance of this class and, where it is there, of PEFT's."""
        made: PeftModel = object.__new__(_recognised() if cls is PeftModel else cls)
        return made

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
    ) -> None:
        config = as_config(peft_config)
        _attach(model, config, adapter_name, autocast_adapter_dtype)
        self._wrap(model, config)
        set_adapter(model, adapter_name)

    def _wrap(self, model: nn.Module, config: AdapterConfig) -> None:
        nn.Module.__init__(self)
        self.train(model.training)
        self.base_model = model if issubclass(config.method, PromptAdapter) else _Tuner(model)
        self._resume: tuple[str, ...] | None = None

    def __reduce__(self) -> Any:
        return _blank, (), self.__dict__

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        torch_device: Any = None,
        low_cpu_mem_usage: bool = False,
    ) -> PeftModel:
        """Load a saved adapter into the model, in place; frozen and in eval mode unless `is_trainable`.

        Each tensor goes to its layer's device: torch_device and low_cpu_mem_usage change nothing here.
        """
        _check_plain(model)
        where = {"revision": revision, "subfolder": subfolder}
        checkpoint.load(model, model_id, adapter_name, trainable=is_trainable, **where)
        made = _blank()
        made._wrap(model, adapters(model)[adapter_name])
        set_adapter(model, adapter_name)
        return made if is_trainable else made.eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_embedding_layers: bool | str = "auto",
    ) -> None:
        """Write adapters: the one named default into the directory itself, each other one into a folder of its name.

        state_dict and save_embedding_layers as in `get_peft_model_state_dict`. Raises ConfigError for
        safe_serialization=False (pickles are never written), AdapterError for an unknown name, CheckpointError when the
        directory cannot be written.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False: adapters are written as safetensors only, never as a pickle")
        model = self.get_base_model()
        wanted = list(self.peft_config) if selected_adapters is None else selected_adapters
        contents = [
            (
                name,
                checkpoint.described(model, name),
                get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers),
            )
            for name in wanted
        ]
        for name, config, tensors in contents if is_main_process else ():
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            checkpoint.write(folder, config, tensors)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload adapter",
    ) -> str:
        """Upload what `save_pretrained` writes to a repository of the hub and return the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        target = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=target, folder_path=folder, revision=revision, commit_message=commit_message
            )
        return str(commit.commit_url)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        torch_device: Any = None,
        low_cpu_mem_usage: bool = False,
    ) -> Loaded:
        """Load a saved adapter beside those that are there; for a name that is attached its weights are replaced.

        torch_device and low_cpu_mem_usage as in `from_pretrained`. What is returned is empty: a file that does not fit
        raises CheckpointError.
        """
        model, where = self.get_base_model(), {"revision": revision, "subfolder": subfolder}
        if adapter_name in self.peft_config:
            checkpoint.restore(model, model_id, adapter_name, **where)
        else:
            checkpoint.load(model, model_id, adapter_name, trainable=is_trainable, **where)
        if not is_trainable:
            self.eval()
        return Loaded([], [])

    def add_adapter(self, adapter_name: str, peft_config: Any, autocast_adapter_dtype: bool = True) -> None:
        """Attach a further, untrained adapter; it waits for `set_adapter`."""
        _attach(self.get_base_model(), as_config(peft_config), adapter_name, autocast_adapter_dtype)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str | None = None,
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Attach a new adapter that stands for several of one method, as `combine` does; it waits for `set_adapter`.

        svd_full_matrices changes nothing here: the rows and columns that it adds are not used.
        """
        if len(set(adapters)) != len(weights):
            raise AdapterError(f"adapters={list(adapters)}, weights={list(weights)}: want each once, with a weight")
        combine(
            self.get_base_model(), dict(zip(adapters, weights, strict=True)), adapter_name,
            combination_type=combination_type, svd_rank=svd_rank, svd_clamp=svd_clamp, svd_driver=svd_driver,
            density=density, majority_sign_method=majority_sign_method,
        )  # fmt: skip

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters, and no others, active: trainable, or frozen with `inference_mode`."""
        model, names = self.get_base_model(), [adapter_name] if isinstance(adapter_name, str) else adapter_name
        attachment = attached(model)
        known = {name for name in names if name in attachment.configs}
        before = set(attachment.trainable)
        attachment.trainable = before - known if inference_mode else before | known
        try:
            set_adapter(model, adapter_name)
        except AdapterError:
            attachment.trainable = before
            raise

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; when it was the only active one, the first of those that are left becomes active."""
        model = self.get_base_model()
        detach(model, adapter_name)
        left = list(self.peft_config)
        if left and not self.active_adapters:
            warnings.warn(f"adapter {adapter_name!r} was active and is gone: {left[0]!r} is active now", stacklevel=2)
            set_adapter(model, left[0])

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside the block the model is the frozen backbone."""
        with disabled(self.get_base_model()):
            yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters, by default the active ones, into the weights; each merge is checked for NaN (`safe_merge`)."""
        model, active = self.get_base_model(), tuple(self.active_adapters)
        if adapter_names is not None:
            set_adapter(model, adapter_names)
        try:
            merge(model)
        except AdapterError:
            if adapter_names is not None:
                set_adapter(model, list(active))
            raise
        self._resume = active

    def unmerge_adapter(self) -> None:
        """Put the untouched weights back, to the bit, and activate what was active before the merge."""
        model = self.get_base_model()
        unmerge(model)
        if self._resume is not None:
            set_adapter(model, list(self._resume))
        self._resume = None

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge for good and return the plain model; `progressbar` and `safe_merge` change nothing here.

        What `merge_adapter` has merged is merged for good, unless other names are given.
        """
        model = self.get_base_model()
        if attached(model).merged:
            unmerge(model)
        if adapter_names is not None:
            set_adapter(model, adapter_names)
        return merge_and_unload(model)

    def unload(self) -> nn.Module:
        """Remove every adapter and return the untouched model."""
        model = self.get_base_model()
        for name in list(self.peft_config):
            detach(model, name)
        return model

    def get_base_model(self) -> nn.Module:
        """The model itself, with what is attached to it."""
        base = self.base_model
        return base.model if isinstance(base, _Tuner) else base

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """Name -> configuration of every adapter."""
        return adapters(self.get_base_model())

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in the order in which they act."""
        return active_adapters(self.get_base_model())

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter, or a list unless there is exactly one."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> AdapterConfig:
        """The configuration of the first active adapter."""
        names = self.active_adapters
        if not names:
            raise AdapterError("no adapter is active: set_adapter first")
        return self.peft_config[names[0]]

    @property
    def peft_type(self) -> str:
        """What Hugging Face PEFT calls the method of the active adapter."""
        config = self.active_peft_config
        return config.peft_type or config.method.name.upper()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable parameters and of all."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print both numbers and the share, in PEFT's words."""
        ours, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {ours:,d} || all params: {total:,d} || trainable%: {100 * ours / max(total, 1):.4f}")

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own forward; adapter_names: one name, or "__base__", per row of the batch, as in `mixed`."""
        model = self.get_base_model()
        if adapter_names is None:
            return model(*args, **kwargs)
        with mixed(model, adapter_names):
            return model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The model's own generate; adapter_names: one name, or "__base__", per prompt, as in `mixed`."""
        model: Any = self.get_base_model()
        if adapter_names is None:
            return model.generate(*args, **kwargs)
        with mixed(model, adapter_names, expand=_expansions(model, kwargs)):
            return model.generate(*args, **kwargs)

    @property
    def generation_config(self) -> Any:
        """The model's, also when it is set here."""
        return self.get_base_model().generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.get_base_model().generation_config = value

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if "base_model" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.get_base_model(), name)


class _Tuner(nn.Module):
    """`base_model` of layer methods: it only holds `model`, so that parameters are called base_model.model.<path>."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.train(model.training)
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "model" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.model, name)


def _attach(model: nn.Module, config: AdapterConfig, name: str, autocast: bool) -> None:
    _check_plain(model)
    Plan(model, config, name).commit(trainable=not config.inference_mode)
    for module in adapted_modules(model) if not autocast else ():
        if name in module.adapters:
            module.adapters[name].to(module.base.weight.dtype)
            if module.adapters[name].shared is not None:
                module.adapters[name].shared.to(module.base.weight.dtype)


def _check_plain(model: nn.Module) -> None:
    if isinstance(model, PeftModel):
        raise AdapterError("the model is a PeftModel already: use add_adapter or load_adapter on it")


def _expansions(model: Any, kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """How many times generate may repeat a row: numbers of beams and of returned sequences."""
    config = kwargs.get("generation_config") or model.generation_config
    names = ("num_beams", "num_return_sequences")
    return tuple(int(kwargs.get(name) or getattr(config, name, None) or 1) for name in names)


def _blank() -> PeftModel:
    return PeftModel.__new__(PeftModel)


def _recognised() -> type[PeftModel]:
    """PeftModel, made a subclass of PEFT's own class where that can be imported; every method used is ours."""
    try:
        found = importlib.util.find_spec("peft") and importlib.import_module("peft").PeftModel
    except Exception:
        found = None
    return _subclass(found) if isinstance(found, type) else PeftModel


@functools.cache
def _subclass(known: type) -> type[PeftModel]:
    return type("PeftModel", (PeftModel, known), {"__module__": __name__, "__doc__": PeftModel.__doc__})
