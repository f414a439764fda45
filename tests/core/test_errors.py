"""What a user's mistake gets, before anything is changed: the registry, names, fields, values and backends."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import peftkern as pk
from peftkern import dispatch, registry
from peftkern.attachment import state
from peftkern.errors import (
    AdapterError,
    BackendError,
    ConfigError,
    PeftkernError,
    PluginConflictError,
    PluginLoadError,
    RegistryError,
    TargetError,
    UnknownMethodError,
    near,
)
from peftkern.testing import TinyModel, tiny_bert, tiny_llama, token_batch, unchanged


def install(site: Path, name: str, points: str, source: str = "") -> None:
    """A distribution as pip leaves it, with its module."""
    info = site / f"{name}-2.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.1\n")
    (info / "entry_points.txt").write_text(f"[peftkern.methods]\n{points}\n")
    (site / f"{name}.py").write_text(source)


GOOD = """
from dataclasses import dataclass
from peftkern.adapter import Selection, AdapterConfig

@dataclass(frozen=True, kw_only=True)
class TwigConfig(AdapterConfig):
    pass

class Twig(Selection):
    name = "twig"
    summary = "a twig"
    Config = TwigConfig

    @classmethod
    def select(cls, model, config):
        return [name for name, _ in model.named_parameters()][:1]
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("twig_plugin", "cracked", "no_method", "misnamed", "rival_one", "rival_two"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


# Targets.


@pytest.mark.parametrize(
    ("target", "hint"), [("quary", "'query'"), ("qproj", "'q_proj'"), ("c_atn", "'c_attn'"), ("nothing-like-it", None)]
)
def test_no_target_matches(family: TinyModel, target: str, hint: str | None) -> None:
    model = family.build()
    names = {path.split(".")[-1] for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    with unchanged(model), pytest.raises(TargetError, match="matches no module") as caught:
        pk.attach(model, pk.LoraConfig(target_modules=[target]))
    assert all(name in str(caught.value) for name in names), "the names that there are"
    assert "?." not in str(caught.value)
    if hint is not None and hint.strip("'") in names:
        assert f"did you mean {hint}" in str(caught.value)


def test_a_match_that_is_taken_away_again() -> None:
    model = tiny_bert()
    for fields in ({"exclude_modules": ["query"]}, {"layers_to_transform": [9]}, {"modules_to_save": ["query"]}):
        with unchanged(model), pytest.raises(TargetError, match="leave nothing"):
            pk.attach(model, pk.LoraConfig(target_modules=["query"], **fields))


def test_a_wrong_regular_expression() -> None:
    model = tiny_bert()
    with unchanged(model), pytest.raises((TargetError, ConfigError), match=r"target_modules='\*query'"):
        pk.attach(model, pk.LoraConfig(target_modules="*query"))


def test_modules_to_save_that_is_no_list() -> None:
    with pytest.raises(ConfigError, match=r"modules_to_save='classifier': want a list of module names like \["):
        pk.LoraConfig(modules_to_save="classifier")


# Names and fields.


def test_attaching_a_name_twice(family: TinyModel) -> None:
    model = pk.attach(family.build(), pk.LoraConfig())
    for config in (pk.LoraConfig(), pk.PromptTuningConfig(), pk.FullConfig()):
        with unchanged(model), pytest.raises(AdapterError, match="'default' is attached already: detach it first"):
            pk.attach(model, config)


@pytest.mark.parametrize("config", [None, {"r": 8}, "lora", pk.LoraConfig], ids=str)
def test_a_configuration_that_is_none(config) -> None:
    model = tiny_bert()
    with unchanged(model), pytest.raises(ConfigError, match="want a configuration such as"):
        pk.attach(model, config)


def test_misspelt_method() -> None:
    with pytest.raises(UnknownMethodError, match="unknown method 'lroa'; did you mean 'lora'"):
        registry.load("lroa")
    with pytest.raises(UnknownMethodError, match="did you mean 'prompt_tuning'"):
        pk.methods()["prompt-tuning"]
    with pytest.raises(UnknownMethodError, match=r"installed: .*adapter.*lora"):
        registry.load("something else entirely")
    with pytest.raises(AttributeError, match="has no attribute 'LoRAConfig'; did you mean 'LoraConfig'"):
        _ = pk.LoRAConfig
    with pytest.raises(AttributeError, match="has no attribute 'atach'; did you mean 'attach'"):
        _ = pk.atach


def test_method_that_a_known_distribution_provides() -> None:
    if "scale" in registry.names():
        pytest.skip("peftkern-scale is installed")
    with pytest.raises(UnknownMethodError, match="unknown method 'scale'; pip install peftkern-scale"):
        registry.load("scale")


def test_misspelt_field() -> None:
    with pytest.raises(ConfigError, match="LoraConfig has no field 'lora_alhpa'; did you mean 'lora_alpha'"):
        pk.LoraConfig.from_dict({"lora_alhpa": 3})
    with pytest.raises(ConfigError, match="use_qalora=True is not implemented"):
        pk.LoraConfig.from_dict({"use_qalora": True})
    with pytest.raises(ConfigError, match="LoraConfig has no field 'lora_alhpa'; did you mean 'lora_alpha'"):
        pk.LoraConfig(lora_alhpa=3)
    with pytest.raises(ConfigError, match="LoraConfig has no field 'peft_type'"):
        pk.LoraConfig(peft_type="LORA")
    assert pk.LoraConfig.from_dict({"use_qalora": False, "peft_type": "LORA"}) == pk.LoraConfig()


def ranges() -> list[tuple[str, str, object]]:
    """Method, field and a value beyond its range: every probability and every rank or count of the methods here."""
    beyond = {"dropout": (-0.1, 1.0, float("nan")), "r": (0, -8), "num_virtual_tokens": (0,), "last_k": (-1,)}
    return [
        (method, field.name, value)
        for method in registry.names()
        for field in dataclasses.fields(registry.load(method).Config)
        for value in beyond.get("dropout" if field.name.endswith("dropout") else field.name, ())
    ]


@pytest.mark.parametrize(("method", "field", "value"), ranges())
def test_a_value_out_of_range(method: str, field: str, value: object) -> None:
    kind = registry.load(method).Config
    with pytest.raises(ConfigError, match=rf"{kind.__name__}: {field}={value}: want "):
        kind(**{field: value})


def test_nothing_to_train() -> None:
    model = tiny_llama()
    with unchanged(model), pytest.raises(TargetError, match="LlamaForCausalLM has no bias that"):
        pk.attach(model, pk.BitFitConfig())


def test_configurations_are_frozen() -> None:
    with pytest.raises(AttributeError):
        pk.LoraConfig().r = 3


def test_errors_are_also_what_they_are_in_python() -> None:
    assert issubclass(ConfigError, ValueError) and issubclass(RegistryError, LookupError)
    assert issubclass(BackendError, RuntimeError)
    assert all(
        issubclass(e, PeftkernError) for e in (TargetError, AdapterError, ConfigError, RegistryError, BackendError)
    )
    assert near("qery", ["query", "key"]) == "; did you mean 'query'?"
    assert near("xyz", ["query"]) == ""


# Plugins.


def test_a_plugin_is_there_as_soon_as_it_is_installed(site: Path, tmp_path: Path) -> None:
    assert "twig" not in registry.names()
    install(site, "twig_plugin", "twig = twig_plugin:Twig", GOOD)
    registry._read_entry_points.cache_clear()
    assert "twig" in registry.names() and "twig_plugin" not in sys.modules, "listing names imports nothing"
    info = pk.methods()["twig"]
    assert (info.summary, info.distribution, info.version, info.error) == ("a twig", "twig_plugin", "2.1", None)
    model = pk.attach(tiny_bert(), pk.TwigConfig())
    assert pk.trainable(model).trainable == 61 * 32
    where = pk.save(model, tmp_path / "saved")
    assert pk.adapters(pk.load(tiny_bert(), where)) != {}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemError('odd')", "does not import: SystemError: odd"),
        ("", "AttributeError"),
        ("class Cracked: pass", "is not a method: want a subclass of peftkern.adapter.Method with a Config"),
        ("from peftkern.methods.lora import LoRA as Cracked", "calls itself 'lora': want the entry point's name"),
    ],
)
def test_a_broken_plugin_is_listed_and_hurts_nobody(site: Path, source: str, message: str) -> None:
    install(site, "cracked", "cracked = cracked:Cracked", source)
    assert "cracked" in registry.names()
    with pytest.raises(PluginLoadError, match=message) as caught:
        registry.load("cracked")
    assert "method 'cracked' of cracked" in str(caught.value)
    infos = dict(pk.methods())
    assert infos["cracked"].error == str(caught.value)
    assert all(info.error is None for name, info in infos.items() if name in ("lora", "adapter", "full"))
    model = pk.attach(tiny_bert(), pk.LoraConfig())
    assert model(**token_batch(labels=5)).loss.isfinite()
    assert registry.by_peft_type("LORA") is registry.load("lora")
    with pytest.raises(AttributeError):
        _ = pk.CrackedConfig


def test_two_plugins_that_claim_one_name(site: Path) -> None:
    for name in ("rival_one", "rival_two"):
        install(site, name, f"twig = {name}:Twig", GOOD)
    with pytest.raises(PluginConflictError, match=r"'twig' is claimed by rival_one .* and rival_two .*uninstall one"):
        registry.load("twig")
    assert "rival_one" in pk.methods()["twig"].error
    pk.attach(tiny_bert(), pk.LoraConfig())


def test_a_plugin_that_claims_a_built_in_name(site: Path, tmp_path: Path) -> None:
    model = pk.attach(tiny_bert(), pk.LoraConfig())
    saved = pk.save(model, tmp_path / "saved")
    install(site, "rival_one", "lora = rival_one:LoRA", "class LoRA: pass")
    registry._read_entry_points.cache_clear()
    with pytest.raises(PluginConflictError, match=r"peftkern .* and rival_one"):
        registry.load("lora")
    plain = tiny_bert()
    with unchanged(plain), pytest.raises(PluginConflictError, match=r"peftkern .* and rival_one"):
        pk.load(plain, saved)


def test_two_entry_points_to_one_method_are_no_conflict(site: Path) -> None:
    """An editable install and the checkout's own metadata may both be found."""
    install(site, "twig_plugin", "twig = twig_plugin:Twig", GOOD)
    (site / "copy").mkdir()
    install(site / "copy", "twig_plugin", "twig = twig_plugin:Twig", GOOD)
    sys.path.insert(0, str(site / "copy"))
    try:
        assert registry.load("twig").name == "twig"
    finally:
        sys.path.remove(str(site / "copy"))


# Backends.


def test_misspelt_backend() -> None:
    for name, hint in (("tritn", "'triton'"), ("cpuu", "'cpu'"), ("referense", "'reference'")):
        with pytest.raises(BackendError, match=f"unknown backend '{name}'; did you mean {hint}"), pk.use_backend(name):
            pass
    with pytest.raises(ValueError, match="unknown op 'low_rnk'; did you mean 'low_rank'"):
        pk.explain("low_rnk", torch.ones(1))
    with pytest.raises(ValueError, match="give the op's own arguments"):
        pk.explain("low_rank")


def test_a_backend_forced_by_the_environment_that_does_not_exist(monkeypatch) -> None:
    """PEFTKERN_BACKEND is read once, into this variable."""
    monkeypatch.setattr(dispatch, "_forced", "tritn")
    model = pk.attach(tiny_bert(), pk.LoraConfig())
    with unchanged(model), pytest.raises(BackendError, match="unknown backend 'tritn'; did you mean 'triton'"):
        model(**token_batch(labels=5))


def test_a_forced_backend_that_cannot_run_leaves_the_model_alone() -> None:
    model = pk.attach(tiny_llama().double(), pk.LoraConfig())
    refusal = pytest.raises(BackendError, match="low_rank: backend 'cpu' was forced and cannot run")
    with unchanged(model), refusal, pk.use_backend("cpu"):
        model(**token_batch())
    assert model(**token_batch()).loss.isfinite()
    assert state(model) is not None
