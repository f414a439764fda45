"""The contract of a method: its configuration, its shape, and what everything above may ask of it.

A method is a class with a frozen-dataclass `Config` and one of three shapes: `LayerAdapter` wraps one module,
`PromptAdapter` adds rows in front of the sequence (`KeyValueAdapter`: of the keys and values), `Selection` names
existing parameters that train.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, get_args

from torch import Tensor, nn

from peftkern import fields, rows, targets
from peftkern.arithmetic import Recipe
from peftkern.base import BaseLayer
from peftkern.errors import ConfigError, MergeError, TargetError, near

C = TypeVar("C", bound="AdapterConfig")
L = TypeVar("L", bound="LayerConfig")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Fields that every method has; names as Hugging Face PEFT has them.

    task_type: None or one of SEQ_CLS, TOKEN_CLS, QUESTION_ANS, CAUSAL_LM, SEQ_2_SEQ_LM, FEATURE_EXTRACTION; the first
    three train the task head as well. modules_to_save: modules trained and saved in full beside the adapter.
    """

    method: ClassVar[type[Method]]
    peft_type: ClassVar[str | None] = None
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Fields of Hugging Face PEFT that are accepted only with one of these values: others change the mathematics."""
    extensions: ClassVar[tuple[str, ...]] = ()
    """Fields that Hugging Face PEFT's class does not have: not written to a file while they have their default."""

    task_type: str | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None

    TASK_TYPES: ClassVar[tuple[str, ...]] = (
        "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.task_type is not None:
            object.__setattr__(self, "task_type", getattr(self.task_type, "value", self.task_type))
            self.one_of("task_type", self.TASK_TYPES)
        if isinstance(self.modules_to_save, str):
            raise ConfigError(f"modules_to_save={self.modules_to_save!r}: want a list of module names like [head]")

    def require(self, ok: bool, name: str, want: str) -> None:
        """Raise ConfigError for the field `name` unless `ok`."""
        if not ok:
            raise ConfigError(f"{type(self).__name__}: {name}={getattr(self, name)!r}: want {want}")

    def one_of(self, name: str, choices: Iterable[str]) -> None:
        """Raise ConfigError unless the field is one of the choices."""
        value, choices = getattr(self, name), tuple(choices)
        if value not in choices:
            hint = near(str(value), choices)
            raise ConfigError(f"{type(self).__name__}: {name}={value!r}{hint}: want one of {', '.join(choices)}")

    def regular(self, name: str, patterns: Iterable[str]) -> None:
        """Raise ConfigError, for the field `name`, for a pattern that is no regular expression."""
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                kind = type(self).__name__
                raise ConfigError(f"{kind}: {name}={pattern!r} is no regular expression: {error}") from error

    @property
    def is_prompt_learning(self) -> bool:
        """Raises AttributeError: Hugging Face PEFT's own functions ask for it, and would find none of our tensors.

        accelerate calls them for sharded checkpoints, which they would leave empty without a word.
        """
        raise AttributeError(
            "Hugging Face PEFT's state dict functions do not know adapters of peftkern: import them from peftkern. "
            "FSDP: with version 2 set fsdp_state_dict_type to FULL_STATE_DICT, or train what pk.attach returns"
        )

    def resolved(self: C, model: nn.Module) -> C:
        """With everything decided that the fields leave to the model; asked once, when an adapter is attached."""
        return self

    def stored(self: C) -> C:
        """The configuration of what a checkpoint holds, where that is less than what trains."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, sets as sorted lists."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {key: sorted(v) if isinstance(v, (set, frozenset)) else v for key, v in values.items()}

    def __new__(cls: type[C], *_args: Any, **given: Any) -> C:
        """An instance; ConfigError, with near names, for a field that there is not."""
        known = cls._names()
        for name in given:
            if name not in known:
                raise ConfigError(f"{cls.__name__} has no field {name!r}{near(name, known)}")
        return object.__new__(cls)

    @classmethod
    def from_dict(cls: type[C], values: Mapping[str, Any]) -> C:
        """Build from a mapping; an unknown field, or one that asks for what is not implemented, raises ConfigError."""
        known, accepted = cls._names(), {}
        for key, value in values.items():
            if key in known or key not in (*cls.neutral, "peft_type", "peftkern"):
                accepted[key] = value
            elif key in cls.neutral and value not in cls.neutral[key]:
                raise ConfigError(f"{cls.__name__}: {key}={value!r} is not implemented and would change the result")
        for key, kind in fields.kinds(cls).items():
            if key not in accepted or (accepted[key] is None and kind not in (bool, int, float)):
                continue
            if not fields.fits(accepted[key], kind):
                raise ConfigError(f"{cls.__name__}: {key}={accepted[key]!r}: want {_said(kind)}")
        try:
            return cls(**accepted)
        except TypeError as error:
            raise ConfigError(f"{cls.__name__}: {error}") from error

    @classmethod
    def from_file(cls: type[C], values: Mapping[str, Any]) -> C:
        """The same for what a checkpoint says, whose weights are in the file, however they began."""
        return cls.from_dict(values)

    @classmethod
    def _names(cls) -> set[str]:
        return {field.name for field in dataclasses.fields(cls)}


def _said(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)


@dataclass(frozen=True, kw_only=True)
class LayerConfig(AdapterConfig):
    """Which modules a layer method wraps.

    target_modules: names (matched exactly or as a `.suffix`), a regular expression (a string, matched in full),
    "all-linear", or None for the method's own default. exclude_modules: the same, taken away. layers_to_transform:
    indices of transformer blocks; layers_pattern: name of the block list, when it is not to be found by itself.
    """

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", sorted(set(self.target_modules)))
            self.require(bool(self.target_modules), "target_modules", "at least one name")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            self.regular(name, [value] if isinstance(value, str) else [])
        if self.layers_pattern:
            given = self.layers_to_transform is not None
            self.require(given, "layers_to_transform", "block indices beside layers_pattern")

    def resolved(self: L, model: nn.Module) -> L:
        """With targets by name where they are chosen in a way that Hugging Face PEFT's class has no field for."""
        choice = {"exclude_modules", "layers_to_transform", "layers_pattern"}
        if not any(getattr(self, name) is not None for name in choice & set(self.extensions)):
            return self
        names = targets.short_names(model, targets.match(model, self))
        return dataclasses.replace(
            self, target_modules=names, exclude_modules=None, layers_to_transform=None, layers_pattern=None
        )

    def for_target(self, path: str) -> LayerConfig:
        """The configuration that holds for one target; patterns over module names are resolved here."""
        return self


@dataclass(frozen=True, kw_only=True)
class PromptConfig(AdapterConfig):
    """Fields of methods that put rows in front: num_virtual_tokens is T, the others describe the backbone."""

    num_virtual_tokens: int = 20
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.num_virtual_tokens > 0, "num_virtual_tokens", "an integer > 0")
        self.require(self.num_transformer_submodules in (None, 1), "num_transformer_submodules", "1")


class Method:
    """Common base of the three shapes. `summary` and `paper` are what `peftkern methods` prints.

    `starts_as_identity` promises that the output is the backbone's until something has trained.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    starts_as_identity: ClassVar[bool] = True
    Config: ClassVar[type[AdapterConfig]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        config = cls.__dict__.get("Config")
        if isinstance(config, type) and issubclass(config, AdapterConfig) and "method" not in config.__dict__:
            config.method = cls  # the first method with this Config keeps it


@dataclass(frozen=True)
class Site:
    """Where one layer adapter sits: the module it wraps, and a module whose input it also reads, if any."""

    path: str
    source: str | None = None


class LayerAdapter(Method, nn.Module):
    """One adapter on one module. Override `delta`, or `forward` for a fused or non-additive method.

    `__init__(base, config)` creates the parameters so that the first forward equals the base. Parameters are moved to
    the base's device and, over a half-precision base, kept in f32. Attributes that are not parameters stay plain.
    """

    keys: ClassVar[Mapping[str, str]] = {}
    """Parameter name -> name in a checkpoint behind the module's path; a name not listed is stored as METHOD_NAME."""
    shared: nn.Module | None = None
    """What `share` made, once the adapter has been built; not a submodule, so that it has one place and one copy."""

    def __init__(self, base: BaseLayer, config: AdapterConfig) -> None:
        super().__init__()

    @classmethod
    def share(cls, layers: Mapping[str, BaseLayer], config: Any) -> nn.Module | None:
        """What all layers of one adapter read, made once for the wrapped layers (by path); None: each stands alone.

        Parameters of this module train with the adapter; they and its persistent buffers are saved, at the top level of
        the file, under the names that `shared_keys` gives them (else METHOD_NAME). It is moved to the device of the
        first layer and, over a half-precision base, kept in f32.
        """
        return None

    shared_keys: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def shared_state(cls, shared: nn.Module | None) -> dict[str, Tensor]:
        """Checkpoint name -> parameter or persistent buffer of what `share` made."""
        found: dict[str, Tensor] = {} if shared is None else shared.state_dict(keep_vars=True)
        return {cls.shared_keys.get(name, f"{cls.name}_{name}"): tensor for name, tensor in found.items()}

    @classmethod
    def sites(cls, model: nn.Module, config: Any) -> list[Site]:
        """Where adapters go; by default the modules that `config.target_modules` matches."""
        return [Site(path) for path in targets.match(model, config)]

    def forward(self, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """base(x) + delta(x), with x cast to the adapter's dtype and the result to the base's."""
        y = base(x)
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), y.dtype)
        return y + self.delta(x.to(dtype) if x.is_floating_point() else x).to(y.dtype)

    def delta(self, x: Tensor) -> Tensor:
        """What is added to the base's output; x [..., K] -> [..., N]."""
        raise TypeError(f"{type(self).__name__} overrides neither delta nor forward")

    def delta_weight(self) -> Tensor:
        """ΔW [N, K], added to the base weight on merge."""
        raise MergeError(f"method {self.name!r} cannot be merged: it is not a change of the base weight")

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The base weight [N, K] and bias [N], in f32 or wider, with the adapter folded in."""
        return weight + self.delta_weight().to(weight.dtype), bias

    def mixed_key(self) -> Hashable:
        """Adapters of one module with the same key run together in a batch that mixes them, through `forward_mixed`.

        None, the default: each runs its own forward on its own rows.
        """
        return None

    @classmethod
    def forward_mixed(
        cls, adapters: Sequence[Any], index: Tensor, base: Callable[[Tensor], Tensor], x: Tensor
    ) -> Tensor:
        """The output for x [B, ...] whose row m goes through adapters[index[m]], and only through base where -1."""
        raise TypeError(f"{cls.__name__} has a mixed_key and does not override forward_mixed")

    combinations: ClassVar[tuple[str, ...]] = ()
    """In what ways adapters of this method can be combined into one, the usual one first; see `arithmetic.Recipe`."""

    @classmethod
    def combined(cls, configs: Sequence[Any], recipe: Recipe) -> Any:
        """The configuration of an adapter that can hold what several with these have learnt; the first leads."""
        return configs[0]

    def combine(self, parts: Sequence[tuple[Any, float]], recipe: Recipe) -> None:
        """Take over what these adapters of the same module have learnt, each with its weight."""
        raise TypeError(f"{type(self).__name__} has combinations and does not override combine")

    def state_keys(self) -> dict[str, nn.Parameter]:
        """Checkpoint name -> parameter."""
        return _state_keys(self, self.name, self.keys)


@dataclass(frozen=True)
class PromptSite:
    """What a prompt method may know of the model: token width, embedding module, the model's own config."""

    hidden_size: int
    embedding: nn.Embedding
    model_config: Any = field(repr=False, default=None)

    @property
    def key_value_shape(self) -> tuple[int, int, int]:
        """Layers, heads of keys and values, and width of a head; TargetError where the config does not tell."""
        config = self.model_config
        layers, heads = getattr(config, "num_hidden_layers", None), getattr(config, "num_attention_heads", None)
        if not layers or not heads:
            raise TargetError(f"{type(config).__name__} tells no num_hidden_layers and num_attention_heads")
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return layers, getattr(config, "num_key_value_heads", None) or heads, width


class PromptAdapter(Method, nn.Module):
    """Rows in front of the sequence. `__init__(site, config)` creates the parameters."""

    starts_as_identity: ClassVar[bool] = False
    keys: ClassVar[Mapping[str, str]] = {}

    def __init__(self, site: PromptSite, config: AdapterConfig) -> None:
        super().__init__()

    def prompt(self) -> Tensor:
        """[T, H] rows that go in front of the text."""
        raise TypeError(f"{type(self).__name__} does not override prompt")

    def state_keys(self) -> dict[str, nn.Parameter]:
        """Checkpoint name -> parameter."""
        return _state_keys(self, self.name, self.keys)

    def stored_tensors(self) -> Mapping[str, Tensor]:
        """Checkpoint name -> tensor, as a configuration of `config.stored()` reads it; by default the parameters."""
        return self.state_keys()


class KeyValueAdapter(PromptAdapter):
    """Rows in front of the keys and values of every layer. Set `length` (T) and `layers` in `__init__`.

    Positions of the text start at T, every token sees all T rows, and outputs keep the rows of the text alone.
    """

    length: int
    layers: int

    def key_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """[Hkv, T, D] keys and values of one layer, from the parameters at each call: layers may be recomputed."""
        raise TypeError(f"{type(self).__name__} does not override key_values")

    def every_layer(self) -> list[tuple[Tensor, Tensor]]:
        """`key_values` of all layers; to be overridden where all at once cost less. Not used under recomputation."""
        return [self.key_values(layer) for layer in range(self.layers)]


class Selection(Method):
    """Existing parameters that train. Instances are never made: the class only chooses."""

    @classmethod
    def select(cls, model: nn.Module, config: Any) -> list[str]:
        """Names of the parameters, as in `model.named_parameters()`, that train and are saved."""
        raise TypeError(f"{cls.__name__} does not override select")


class InputTap(nn.Module):
    """Remembers the input of one module until the adapters that read it have run. Used as a forward pre-hook.

    `readers` is how many active adapters read it in each forward. In a batch that mixes adapters a reader is given the
    rows `places`, and whoever ends the batch forgets the value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None
        self.readers = 0
        self.left = 0
        self.batch = rows.Batch()
        self.places: Tensor | None = None

    def hook(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep the first positional argument, while an active adapter wants it."""
        wanted = self.readers or self.batch.rows is not None
        self.value, self.left = (args[0], self.readers) if wanted else (None, 0)

    def take(self) -> Tensor:
        """The remembered input, once for each reader; then it is forgotten, so that it does not outlive the forward."""
        value = self.value
        if value is None:
            raise RuntimeError("the module whose input this adapter reads has not run before it")
        if self.places is not None:
            return value.index_select(0, self.places)
        self.left -= 1
        if self.left == 0:
            self.value = None
        return value


def _state_keys(adapter: nn.Module, method: str, keys: Mapping[str, str]) -> dict[str, nn.Parameter]:
    return {keys.get(name, f"{method}_{name}"): p for name, p in adapter.named_parameters()}


def kaiming_(parameter: Tensor) -> Tensor:
    """Uniform on ±1/√fan_in, as nn.Linear's weight: the field's initialisation of A and of D."""
    return nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
