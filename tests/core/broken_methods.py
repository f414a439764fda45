"""One sound method, and methods that each break one promise: the conformance kit must tell them apart."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from peftkern.adapter import LayerAdapter, LayerConfig, Selection
from peftkern.errors import MergeError


@dataclass(frozen=True, kw_only=True)
class SoundConfig(LayerConfig):
    pass


class Sound(LayerAdapter):
    """y = base(x) + c · mean(x) + d: enough to be seen in everything, c and d [N] start at zero."""

    name = "sound"
    Config = SoundConfig

    def __init__(self, base, config):
        super().__init__(base, config)
        self.c = nn.Parameter(torch.zeros(base.out_features))
        self.d = nn.Parameter(torch.zeros(base.out_features))
        self.k = base.in_features

    def delta(self, x):
        return self.c * x.mean(-1, keepdim=True) + self.d

    def merge(self, weight, bias):
        if bias is None:
            raise MergeError("the base has no bias to merge d into")
        return weight + (self.c[:, None] / self.k).to(weight.dtype), bias + self.d.to(bias.dtype)


BROKEN = {}


def breaks(*checks):
    """Register a class, each with a configuration class of its own, and the checks that must notice it."""

    def register(cls):
        name = cls.__name__.lower()
        config = dataclass(frozen=True, kw_only=True)(
            type(f"{cls.__name__}Config", (LayerConfig,), {"__module__": __name__})
        )
        made = type(cls)(cls.__name__, (cls,), {"name": name, "Config": cls.__dict__.get("Config", config)})
        made.Config.method = made
        made.__module__, made.__qualname__ = __name__, cls.__name__
        globals()[config.__name__] = config
        BROKEN[name] = checks
        return made

    return register


@breaks("starts_as_promised")
class StartsElsewhere(Sound):
    def __init__(self, base, config):
        super().__init__(base, config)
        nn.init.constant_(self.d, 0.1)


@breaks("starts_as_promised")
class PromisesAChange(Sound):
    starts_as_identity = False


@breaks("does_something", "switches_between_two")
class DoesNothing(Sound):
    def delta(self, x):
        return 0 * super().delta(x)


@breaks("only_its_parameters_train")
class LeavesOneOut(Sound):
    def delta(self, x):
        return self.d.expand(*x.shape[:-1], -1)


@breaks("only_its_parameters_train")
class MakesNaN(Sound):
    def delta(self, x):
        return super().delta(x) + 0 * (0 * self.c).sqrt()


@breaks("trains")
class Ascends(Sound):
    def delta(self, x):
        good = super().delta(x)
        return 2 * good.detach() - good


@breaks("only_its_parameters_train")
class ForgetsToSave(Sound):
    def state_keys(self):
        return {"sound_d": self.d}


@breaks("switches_between_two", "copies_and_pickles")
class Shares(Sound):
    common: ClassVar[dict] = {}

    def __init__(self, base, config):
        super().__init__(base, config)
        self.key = base.path
        self.common.setdefault(base.path, torch.zeros(base.out_features))

    def delta(self, x):
        self.common[self.key] += 1.0
        return super().delta(x) + 0.01 * self.common[self.key]


@breaks("copies_and_pickles")
class HoldsALambda(Sound):
    def __init__(self, base, config):
        super().__init__(base, config)
        self.function = lambda x: x


@breaks("copies_and_pickles", "saves_and_loads")
class HoldsATensor(Sound):
    def __init__(self, base, config):
        super().__init__(base, config)
        self.hidden = (torch.randn(base.out_features),)

    def delta(self, x):
        return super().delta(x) + (self.hidden[0].to(x.dtype) if self.d.any() else 0)

    def __deepcopy__(self, memo):
        return self


@breaks("merges_or_says_why_not")
class MergesWrongly(Sound):
    def merge(self, weight, bias):
        weight, bias = super().merge(weight, bias)
        return weight, 1.001 * bias


@breaks("merges_or_says_why_not")
class MovesBeforeItRefuses(Sound):
    def merge(self, weight, bias):
        self.d.data.add_(1)
        raise MergeError("too late")


@breaks("combines_or_says_why_not")
class CombinesNothing(Sound):
    combinations = ("linear",)

    def combine(self, parts, recipe):
        pass


@breaks("combines_or_says_why_not")
class ForgetsToCombine(Sound):
    combinations = ("linear",)


@breaks("refuses_to_merge_nan")
class HidesNaN(Sound):
    def merge(self, weight, bias):
        weight, bias = super().merge(weight, bias)
        return weight.nan_to_num(), bias.nan_to_num()


@breaks("detaches_without_a_trace", "disabled_is_the_backbone", "trains")
class TouchesTheBase(Sound):
    def __init__(self, base, config):
        super().__init__(base, config)
        base.weight.data.mul_(1.01)


@breaks("detaches_without_a_trace")
class LeavesAHook(Sound):
    def __init__(self, base, config):
        super().__init__(base, config)
        base.module.register_forward_hook(nothing)


def nothing(*_):
    pass


@breaks("half_precision_backbone")
class StaysInTheBasesDtype(Sound):
    def __init__(self, base, config):
        super().__init__(base, config)
        self.to(base.weight.dtype)

    def to(self, *args, **kwargs):
        return super().to(*args, **kwargs) if isinstance(args[0], torch.dtype) else self


@breaks("follows_to_and_half")
class WidensItsOutput(Sound):
    def forward(self, base, x):
        return base(x) + self.delta(x).float()


@breaks("compiles_in_one_graph")
class BreaksTheGraph(Sound):
    def delta(self, x):
        return super().delta(x) if x.sum().item() < 1e9 else x


@breaks("checkpoints_gradients")
class DrawsAnew(Sound):
    def delta(self, x):
        return super().delta(x) * (1 + random.random() if self.training else 1)


@breaks("generates_the_same_with_and_without_cache")
class LooksAhead(Sound):
    def delta(self, x):
        return super().delta(x) + self.d * x.mean((-1, -2), keepdim=True)


@breaks("memory_is_as_reported")
class HoldsAnotherParameter(Sound):
    """A parameter that nothing reports or freezes, since it hides from `parameters()`."""

    def __init__(self, base, config):
        super().__init__(base, config)
        self.cell = [nn.Parameter(torch.zeros(base.out_features))]

    def delta(self, x):
        self.register_parameter("late", None)
        self.late = self.cell[0].requires_grad_(True)
        return super().delta(x) + self.late.to(x.dtype)


@breaks("configuration_round_trips")
class LosesItsConfig(Sound):
    @dataclass(frozen=True, kw_only=True)
    class Config(LayerConfig):
        pair: tuple = (1, 2)


@breaks("fits_at_least_one_model")
class FitsNothing(Selection):
    @classmethod
    def select(cls, model, config):
        return []
