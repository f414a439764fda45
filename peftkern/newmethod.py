"""Writes a distribution with one method: what `peftkern new-method NAME` does.

The method as written is a per-channel scale, y = s · base(x); it trains, saves, loads, merges and passes its tests, and
waits to be replaced by the author's own.
"""

from __future__ import annotations

import keyword
import re
from pathlib import Path
from string import Template

from peftkern import registry
from peftkern.errors import ConfigError

_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$distribution"
version = "0.1.0"
description = "The method $name for peftkern."
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["peftkern"]

[project.optional-dependencies]
test = ["pytest"]

# This line is all that peftkern needs to find the method.
[project.entry-points."peftkern.methods"]
$name = "$package:$cls"

[tool.setuptools]
packages = ["$package"]
"""

_MODULE = '''\
"""A per-channel scale of a frozen layer: y = s · base(x)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftkern.adapter import LayerAdapter, LayerConfig
from peftkern.base import BaseLayer


@dataclass(frozen=True, kw_only=True)
class ${cls}Config(LayerConfig):
    """Which modules are scaled; fields of the method go here, and are checked in `__post_init__` with `require`."""


class $cls(LayerAdapter):
    """y = s · base(x), s [N] f32, for base(x) [..., N]; one factor per output channel.

    A method that adds to the base overrides `delta` and `delta_weight` instead of `forward` and `merge`.
    """

    name = "$name"
    summary = "a learned factor per output channel"
    paper = "https://arxiv.org/abs/2205.05638"
    Config = ${cls}Config

    def __init__(self, base: BaseLayer, config: ${cls}Config) -> None:
        super().__init__(base, config)
        self.scale = nn.Parameter(torch.ones(base.out_features))

    def forward(self, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """s · base(x), in the dtype of base(x)."""
        y = base(x)
        return y * self.scale.to(y.dtype)

    def merge(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Rows of W [N, K] and of the bias [N] times s."""
        scale = self.scale.to(weight.dtype)
        return scale[:, None] * weight, None if bias is None else scale * bias
'''

_TEST = '''\
"""The method under peftkern's conformance kit, and its formula."""

from __future__ import annotations

import torch

import peftkern as pk
from peftkern.testing import conformance_tests, tiny_bert
from $package import ${cls}Config

test_conformance = conformance_tests("$name")


def test_scales_every_channel_of_the_base() -> None:
    model = tiny_bert()
    target = "bert.encoder.layer.0.intermediate.dense"
    x = torch.randn(3, model.config.hidden_size)
    base = model.get_submodule(target)(x)
    pk.attach(model, ${cls}Config(target_modules=[target]))
    layer = model.get_submodule(target)
    factors = torch.rand(base.shape[-1]) + 0.5
    with torch.no_grad():
        layer.adapters["default"].scale.copy_(factors)
    torch.testing.assert_close(layer(x), base * factors)
'''

_README = """\
# $distribution

The method `$name` for [peftkern](https://pypi.org/project/peftkern/). As written it is a per-channel scale,
y = s · base(x): change `$package/__init__.py` into what the method should be, and the second test with it.

```
pip install -e '.[test]'
peftkern methods          # lists $name
pytest                    # attaches, trains, saves, loads, merges and switches it on tiny models
peftkern train --method $name --data DIR --model MODEL
```

```python
import peftkern as pk

pk.attach(model, pk.${cls}Config(task_type="TOKEN_CLS"))
```
"""

_FILES = {
    "pyproject.toml": _PYPROJECT,
    "README.md": _README,
    "$package/__init__.py": _MODULE,
    "tests/test_$name.py": _TEST,
}


def write(name: str, directory: str | Path = ".") -> Path:
    """Write `peftkern-NAME/` into `directory` and return it.

    Raises ConfigError for a name that is no identifier in lower case or belongs to an installed method, and when the
    folder exists; nothing is overwritten.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError(f"method name {name!r}: want lower case letters, digits and _, a letter first")
    if name in registry.names():
        info = registry.methods()[name]
        raise ConfigError(f"method {name!r} is provided by {info.distribution} already: choose another name")
    distribution = f"peftkern-{name.replace('_', '-')}"
    folder = Path(directory) / distribution
    if folder.exists():
        raise ConfigError(f"{folder} is there already and is not overwritten")
    cls = "".join(part.capitalize() for part in name.split("_"))
    names = {"name": name, "distribution": distribution, "package": f"peftkern_{name}", "cls": cls}
    for path, text in _FILES.items():
        file = folder / Template(path).substitute(names)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(text).substitute(names), encoding="utf-8")
    return folder
