"""Parameters of the model itself that an adapter trains: heads, biases, modules_to_save, everything.

Each is trained on a copy that takes the original's place while its adapter is active, so that switching, disabling and
detaching give back the untouched backbone to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from peftkern import targets
from peftkern.base import is_sharded
from peftkern.errors import AdapterError

Place = tuple[nn.Module, str]


class _Spare(nn.ParameterList):
    """The halves that are out of the model; those that it holds elsewhere are saved there, and not a second time."""

    held_elsewhere: frozenset[int] = frozenset()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for index in self.held_elsewhere:
            del destination[f"{prefix}{index}"]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for index in self.held_elsewhere:
            state_dict.setdefault(f"{prefix}{index}", self[index])
        super()._load_from_state_dict(state_dict, prefix, *rest)


class SelectedParameters(nn.Module):
    """The trained copies of one adapter. `spare` holds whichever half, trained or original, is out of the model.

    A tied parameter stays tied, except for the names in `apart`, each of which gets a copy of its own. With
    `keep_original=False` the originals themselves train: nothing is copied, and there is no way back.
    """

    def __init__(
        self, model: nn.Module, names: Iterable[str], keep_original: bool = True, apart: Iterable[str] = ()
    ) -> None:
        super().__init__()
        wanted, separate = set(names), set(apart)
        groups: dict[int | str, list[Place]] = {}
        paths: dict[int | str, str] = {}
        parameters: dict[int | str, nn.Parameter] = {}
        modules = dict(targets.named_modules(model))
        named = list(targets.named_parameters(model))
        shared = {id(p) for name, p in named if name in wanted and name not in separate}
        for name, parameter in named:
            key = name if name in separate else id(parameter)
            if name in separate or id(parameter) in shared:
                path, _, attribute = name.rpartition(".")
                groups.setdefault(key, []).append((modules[path], attribute))
                paths.setdefault(key, name)
                parameters[key] = parameter
        self.places = list(groups.values())
        self.names = list(paths.values())
        if any(is_sharded(p) for p in parameters.values()):
            raise AdapterError(f"{self.names[0]} is sharded by FSDP2: attach before sharding")
        copies = [nn.Parameter(p.detach().clone()) for p in parameters.values()] if keep_original else []
        self.spare = _Spare(copies)
        held = {id(p) for name, p in named if name not in separate and id(p) not in shared}
        elsewhere: set[int] = set()  # originals of copies made apart from what they are tied to
        for index, parameter in enumerate(parameters.values()):
            if id(parameter) in held:
                elsewhere.add(index)
            held.add(id(parameter))
        self._held_elsewhere = frozenset(elsewhere if keep_original else ())
        self.keep_original = keep_original
        self.active = False

    def check_movable(self) -> None:
        """Raise AdapterError when FSDP2 has sharded the parameters: it would put its own back in the modules."""
        if any(is_sharded(parameter) for parameter in [*self.spare, *self.trained().values()]):
            raise AdapterError(f"{self.names[0]} is sharded by FSDP2: switch, disable and detach before sharding")

    def swap(self) -> None:
        """Exchange the spare half with the one in the model."""
        for index, places in enumerate(self.places if self.keep_original else ()):
            incoming, outgoing = self.spare[index], getattr(*places[0])
            for module, attribute in places:
                setattr(module, attribute, incoming)
            self.spare[index] = outgoing
        self.active = not self.active
        self.spare.held_elsewhere = self._held_elsewhere if self.active else frozenset()

    def trained(self) -> dict[str, nn.Parameter]:
        """Original name -> the copy that trains, wherever it is now."""
        if self.keep_original and not self.active:
            return dict(zip(self.names, self.spare, strict=True))
        return {name: getattr(*places[0]) for name, places in zip(self.names, self.places, strict=True)}

    def placed(self) -> list[tuple[Place, nn.Parameter]]:
        """Every place in the model with the trained copy that belongs there."""
        pairs = zip(self.places, self.trained().values(), strict=True)
        return [(place, parameter) for places, parameter in pairs for place in places]

    def overlaps(self, other: SelectedParameters) -> list[str]:
        """Names that both select."""
        mine = {(id(module), attribute) for places in self.places for module, attribute in places}
        return [
            name
            for name, places in zip(other.names, other.places, strict=True)
            if any((id(module), attribute) in mine for module, attribute in places)
        ]
