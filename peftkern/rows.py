"""A batch whose rows go through different adapters, as the adapted modules see it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftkern.errors import AdapterError

BASE = "__base__"
"""The name of no adapter, as Hugging Face PEFT has it."""

Base = Callable[[Tensor], Tensor]


class Batch:
    """What the rows at hand go through; one object, which all adapted modules of a model hold.

    rows: None unless adapters are mixed. off: adapters are disabled, whatever a batch may ask for.
    """

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self.off = False
        self._known: dict[Hashable, Rows] = {}

    def of(self, names: Sequence[str], expand: Sequence[int]) -> Rows:
        """The rows of these names; the same object as last time, since decoding asks for them once a token."""
        key = tuple(names), tuple(expand)
        if key not in self._known:
            if len(self._known) >= 64:
                self._known.clear()
            self._known[key] = Rows(*key)
        return self._known[key]

    def forget(self) -> None:
        """Drop what is known of adapters, when they have changed."""
        self._known.clear()

    @contextmanager
    def set(self, rows: Rows | None, off: bool = False) -> Iterator[None]:
        """Inside the block the batch is this one."""
        before = self.rows, self.off
        self.rows, self.off = None if off else rows, off
        try:
            yield
        finally:
            self.rows, self.off = before

    def __getstate__(self) -> dict[str, Any]:
        return {"rows": None, "off": False, "_known": {}}


class Group(NamedTuple):
    """Adapters of one module that take part in a batch: run together when `fused`, else each on its own rows."""

    names: tuple[str, ...]
    adapters: list[Any]
    fused: bool


class Rows:
    """One adapter name per row of the batch, BASE for none.

    expand: how many times generation may repeat each row, in place, beside once: numbers of beams or of samples.
    """

    def __init__(self, names: Sequence[str], expand: Sequence[int] = ()) -> None:
        self.names = tuple(name for name in dict.fromkeys(names) if name != BASE)
        self.of, self.count = tuple(names), len(names)
        self.expand = tuple(expand)
        self.index = torch.tensor([self.names.index(name) if name != BASE else -1 for name in names])
        self._kept: dict[Hashable, Any] = {}

    def repeats(self, count: int, path: str) -> int:
        """How many times each row stands in `count` rows; AdapterError where that cannot be."""
        if count == self.count:
            return 1
        if self.count and count % self.count == 0 and count // self.count in self.expand:
            return count // self.count
        raise AdapterError(
            f"{path}: its input has {count} rows, and adapter_names has {self.count} names: give one name per row of "
            "the batch; a module that sees other rows than the batch's cannot take part"
        )

    def index_of(self, names: tuple[str, ...], repeats: int, device: torch.device) -> Tensor:
        """int64: for each row the place of its adapter in `names`, or -1."""
        if names == self.names and repeats == 1 and device == self.index.device:
            return self.index
        index: Tensor = self._keep(("index", names, repeats, device), lambda: self._index_of(names, repeats, device))
        return index

    def _index_of(self, names: tuple[str, ...], repeats: int, device: torch.device) -> Tensor:
        places = torch.tensor([names.index(name) if name in names else -1 for name in (*self.names, BASE)])
        index = places[self.index]  # -1 is the last
        return index.repeat_interleave(repeats).to(device) if repeats > 1 else index.to(device)

    def places(self, names: tuple[str, ...], repeats: int, device: torch.device) -> Tensor:
        """Numbers of the rows whose adapter is one of these."""

        def find() -> Tensor:
            rows = [row * repeats + i for row, name in enumerate(self.of) if name in names for i in range(repeats)]
            return torch.tensor(rows, dtype=torch.int64, device=device)

        places: Tensor = self._keep(("places", names, repeats, device), find)
        return places

    def groups(self, module: Any) -> list[Group]:
        """The adapters that sit on the module and take part, by how they run.

        Kept in evaluation, where nothing that a group is made by changes but hooks.
        """
        if module.training or torch.compiler.is_compiling():
            return _groups(self.names, module.adapters)
        path, hooks = module.base.path, RemovableHandle.next_id
        groups: list[Group]
        known, groups = self._kept.get(path, (None, []))
        if known != hooks:  # a hook has been registered since, on whatever: looking at every adapter's would cost more
            groups = _groups(self.names, module.adapters)
            self._kept[path] = hooks, groups
        return groups

    def _keep(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if torch.compiler.is_compiling():
            return make()
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


def forward(module: Any, rows: Rows, x: Tensor) -> Tensor:
    """The adapted module's output for a mixed batch x [B, ...].

    Adapters that a method can run together are one fused call; each of the others runs its own forward on its own rows.
    Nothing depends on the method: whatever runs alone runs mixed.
    """
    repeats = rows.repeats(x.shape[0], module.base.path)
    call: Base = module.base
    for names, adapters, fused in rows.groups(module):
        if fused:
            call = _Fused(adapters, rows.index_of(names, repeats, x.device), call)
        else:
            call = _RowByRow(rows, dict(zip(names, adapters, strict=True)), repeats, call)
    return call(x)


def _groups(names: Sequence[str], adapters: Mapping[str, Any]) -> list[Group]:
    found: dict[Hashable, list[str]] = {}
    for name in names:
        if name in adapters:
            adapter = adapters[name]
            key = adapter.mixed_key() if _runs_fused(adapter.__class__) and not _hooked(adapter) else None
            found.setdefault(None if key is None else (type(adapter), key), []).append(name)
    return [Group(tuple(group), [adapters[name] for name in group], key is not None) for key, group in found.items()]


def _runs_fused(kind: type) -> bool:
    """Whether `forward_mixed` was written for this class's forward: a subclass may have changed the latter only."""
    for parent in kind.__mro__:
        if "forward_mixed" in vars(parent):
            return True
        if "forward" in vars(parent) or "delta" in vars(parent):
            return False
    return False


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class _View:
    """A base seen through something else: no plain linear inside, all other facts are the base's."""

    linear = None

    def __init__(self, base: Base) -> None:
        self._base = base

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)


class _Fused(_View):
    def __init__(self, adapters: list[Any], index: Tensor, base: Base) -> None:
        super().__init__(base)
        self._adapters, self._index = adapters, index

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = type(self._adapters[0]).forward_mixed(self._adapters, self._index, self._base, x)
        return out


class _RowByRow(_View):
    def __init__(self, rows: Rows, adapters: dict[str, nn.Module], repeats: int, base: Base) -> None:
        super().__init__(base)
        self._rows, self._adapters, self._repeats = rows, adapters, repeats

    def __call__(self, x: Tensor) -> Tensor:
        whole = _Whole(self._base, x)
        parts, order = [], []
        for name, adapter in self._adapters.items():
            places = self._rows.places((name,), self._repeats, x.device)
            mine = x.index_select(0, places)
            tap = getattr(adapter, "tap", None)
            if tap is not None:
                tap.places = places
            parts.append(adapter(_BaseRows(whole, mine, places), mine))
            if tap is not None:
                tap.places = None
            order.append(places)
        others = tuple(name for name in (*self._rows.names, BASE) if name not in self._adapters)
        places = self._rows.places(others, self._repeats, x.device)
        if places.shape[0]:
            parts.append(whole().index_select(0, places))
            order.append(places)
        joined = torch.cat([part.to(parts[0].dtype) for part in parts])
        return joined.index_select(0, torch.cat(order).argsort())


class _Whole:
    """The base's output for the whole batch, computed when first wanted, and then once."""

    def __init__(self, base: Base, x: Tensor) -> None:
        self.base, self.x = base, x
        self._out: Tensor | None = None

    def __call__(self) -> Tensor:
        if self._out is None:
            self._out = self.base(self.x)
        return self._out


class _BaseRows(_View):
    """The base for some rows of the batch: one product serves all of them, unless an adapter has changed the input."""

    def __init__(self, whole: _Whole, x: Tensor, places: Tensor) -> None:
        super().__init__(whole.base)
        self._whole, self._x, self._places = whole, x, places

    def __call__(self, x: Tensor) -> Tensor:
        if x is self._x:
            return self._whole().index_select(0, self._places)
        return self._base(x)
