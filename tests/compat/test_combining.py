"""Several adapters as one: the same adapter as Hugging Face PEFT's `add_weighted_adapter` makes."""

from __future__ import annotations

import pytest
import torch

import peftkern as pk
from peftkern import checkpoint
from peftkern.arithmetic import COMBINATIONS, Recipe
from peftkern.errors import AdapterError, ConfigError
from tests.compat.small import assert_same, batch, build, shake, tensors

WEIGHTS = {"one": 0.7, "two": -0.4}
TARGETS = {"one": ["q_proj", "v_proj", "embed_tokens"], "two": ["q_proj", "o_proj"]}


def pair(peft, directory, model="llama", kind="LoraConfig", **changes):
    """The same two adapters on both sides, made by PEFT."""
    options = {"LoraConfig": {"r": 4, "init_lora_weights": False}, "IA3Config": {"init_ia3_weights": False}}[kind]
    theirs = build(model)
    for name, alpha in (("one", 8), ("two", 2)):
        fields = options | {"target_modules": TARGETS[name]} | ({"lora_alpha": alpha} if kind == "LoraConfig" else {})
        config = getattr(peft, kind)(**fields | changes)
        if name == "one":
            theirs = peft.get_peft_model(theirs, config, name)
        else:
            theirs.add_adapter(name, config)
    theirs.save_pretrained(directory)
    ours = build(model)
    for name in WEIGHTS:
        pk.load(ours, directory / name, name)
    return ours, theirs.eval()


ELECTED = [(kind, "frequency") for kind in COMBINATIONS if "ties" in kind]


@pytest.mark.parametrize(("kind", "sign"), [*((kind, "total") for kind in COMBINATIONS), *ELECTED])
def test_lora_combined_is_peft_s(peft, kind, sign, tmp_path):
    """Of targets that only some have, an embedding among them; DARE's drawing of values included.

    DARE on an embedding's whole update draws for the transposed matrix there.
    """
    drawn = kind.startswith("dare") and kind.endswith("svd")
    ours, theirs = pair(peft, tmp_path, **{"exclude_modules": ["embed_tokens"]} if drawn else {})
    options = {} if kind in ("svd", "cat", "linear") else {"density": 0.6, "majority_sign_method": sign}
    torch.manual_seed(3)
    theirs.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "c", combination_type=kind, **options)
    torch.manual_seed(3)
    assert pk.combine(ours, WEIGHTS, "c", combination_type=kind, **options) is ours
    plain = tensors(ours(**batch("llama")))
    theirs.set_adapter("c")
    pk.set_adapter(ours, "c")
    assert_same(tensors(ours(**batch("llama"))), tensors(theirs(**batch("llama"))))
    assert not torch.allclose(plain["logits"], ours(**batch("llama")).logits, rtol=1e-3)
    assert not [p for p in ours.parameters() if p.requires_grad]
    mine, peer = pk.adapters(ours)["c"], theirs.peft_config["c"]
    assert (mine.r, mine.lora_alpha) == (peer.r, peer.lora_alpha)
    assert set(mine.target_modules) == {"q_proj", "v_proj", "o_proj"} | ({"embed_tokens"} if not drawn else set())


def test_what_is_combined_is_saved_and_loads_in_peft(peft, tmp_path):
    ours, _ = pair(peft, tmp_path / "parts")
    pk.combine(ours, WEIGHTS, "c")
    pk.set_adapter(ours, "c")
    want = tensors(ours(**batch("llama")))
    pk.save(ours, tmp_path / "c", "c")
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "c").eval()
    assert_same(tensors(theirs(**batch("llama"))), want)


def test_a_small_svd_is_the_large_one():
    """From the factors as from the update itself, and the best that there is of its rank."""
    recipe = Recipe(combination_type="svd")
    a, b = torch.randn(6, 40, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64)
    for rank in (2, 6):
        small, large = recipe.refactored(a, b, rank), recipe.factored(b @ a, rank)
        torch.testing.assert_close(small[1].abs(), large[1].abs())
        torch.testing.assert_close(small[1] @ small[0], large[1] @ large[0])
    best = torch.linalg.svdvals(b @ a)[2:].square().sum().sqrt()
    down, up = recipe.refactored(a, b, 2)
    torch.testing.assert_close((b @ a - up @ down).norm(), best)


@pytest.mark.parametrize("clamp", [0.7, 0.95, 1.0])
def test_factors_cut_off_at_a_quantile(clamp):
    a, b = torch.randn(6, 40), torch.randn(50, 6)
    free = Recipe(combination_type="svd").refactored(a, b, 4)
    cut = Recipe(combination_type="svd", svd_clamp=clamp).refactored(a, b, 4)
    bound = torch.quantile(torch.cat([free[1].flatten(), free[0].flatten()]), clamp)
    for factor, whole in zip(cut, free, strict=True):
        torch.testing.assert_close(factor, whole.clamp(-bound, bound))


def test_ranks_scales_and_patterns():
    """The sum of the updates is kept exactly by "cat" and by an SVD of enough ranks, whatever makes up each."""
    ours = build("llama")
    pattern = {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3}}
    pk.attach(ours, pk.LoraConfig(r=4, use_rslora=True, target_modules=TARGETS["one"], **pattern), "a")
    pk.attach(ours, pk.LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS["two"]), "b")
    pk.set_adapter(ours, ["a", "b"])
    shake(ours)
    both = tensors(ours(**batch("llama")))
    pk.combine(ours, {"a": 1.0, "b": 1.0}, "cat", combination_type="cat")
    pk.combine(ours, {"a": 1.0, "b": 1.0}, "svd", svd_rank=30)
    ranks = {name: config.r for name, config in pk.adapters(ours).items()}
    assert ranks == {"a": 4, "b": 2, "cat": 8, "svd": 30}
    for name in ("cat", "svd"):
        pk.set_adapter(ours, name)
        assert_same(tensors(ours(**batch("llama"))), both)
    with pytest.raises(AdapterError, match=r"one rank, these have \[6, 2\]"):
        pk.combine(ours, {"a": 1.0, "b": 1.0}, "ties", combination_type="ties", density=0.5)
    pk.attach(ours, pk.LoraConfig(r=6, target_modules=TARGETS["one"]), "c")  # 6 where "a" has 4, and where it has 6
    pk.combine(ours, {"a": 1.0, "c": 0.0}, "ties", combination_type="linear")
    pk.set_adapter(ours, "a")
    alone = tensors(ours(**batch("llama")))
    pk.set_adapter(ours, "ties")
    assert_same(tensors(ours(**batch("llama"))), alone)


def test_ia3_combined_is_peft_s(peft, tmp_path):
    changes = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    ours, theirs = pair(peft, tmp_path, kind="IA3Config", **changes)
    theirs.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "c")
    pk.combine(ours, WEIGHTS, "c")
    theirs.set_adapter("c")
    pk.set_adapter(ours, "c")
    assert_same(tensors(ours(**batch("llama"))), tensors(theirs(**batch("llama"))))
    with pytest.raises(ConfigError, match="method 'ia3' wants linear"):
        pk.combine(ours, WEIGHTS, "d", combination_type="svd")


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_one_head_comes_along(bias):
    ours = build("bert-seq")
    pk.attach(ours, pk.LoraConfig(target_modules=["query"]), "plain")
    pk.attach(ours, pk.LoraConfig(target_modules=["value"], task_type="SEQ_CLS", bias=bias), "headed")
    pk.set_adapter(ours, ["plain", "headed"])
    shake(ours)
    both = tensors(ours(**batch("bert-seq")))
    pk.combine(ours, {"plain": 1.0, "headed": 1.0}, "sum")
    pk.set_adapter(ours, "sum")
    assert_same(tensors(ours(**batch("bert-seq"))), both)
    assert [key for key in checkpoint.parameters(ours, "sum") if key.endswith("classifier.weight")]
    pk.attach(ours, pk.LoraConfig(target_modules=["key"], task_type="SEQ_CLS"), "other")
    with pytest.raises(AdapterError, match="headed, other train parameters of the backbone"):
        pk.combine(ours, {"headed": 1.0, "other": 1.0}, "both")
    pk.detach(ours, "sum")
    pk.set_adapter(ours, ["plain", "headed"])
    assert_same(tensors(ours(**batch("bert-seq"))), both)


def test_through_the_facade(peft, tmp_path):
    _, theirs = pair(peft, tmp_path)
    facade = pk.PeftModel.from_pretrained(build("llama"), tmp_path / "one", "one")
    facade.load_adapter(tmp_path / "two", "two")
    theirs.add_weighted_adapter(["one", "two"], [0.5, 0.5], "c", "svd", 3)
    facade.add_weighted_adapter(["one", "two"], [0.5, 0.5], "c", "svd", 3)
    theirs.set_adapter("c")
    facade.set_adapter("c")
    assert_same(tensors(facade(**batch("llama"))), tensors(theirs(**batch("llama"))))
    trained = {name.split(".")[-2] for name, p in facade.named_parameters() if p.requires_grad}
    assert trained == {"c"}
    for names in (["one", "two"], ["one", "one"]):
        with pytest.raises(AdapterError, match="want each once, with a weight"):
            facade.add_weighted_adapter(names, [0.5] * (3 - len(set(names))), "d")


GOOD = {"a": 1.0, "b": 1.0}
WRONG = {
    "unknown": ({"a": 1.0, "bb": 1.0}, {}, AdapterError, "no adapter 'bb'; did you mean 'b'"),
    "nothing": ({}, {}, AdapterError, "want the names of adapters"),
    "not a number": ({"a": float("nan")}, {}, AdapterError, "a finite factor"),
    "taken": (GOOD, {"name": "a"}, AdapterError, "'a' is attached already"),
    "kind": (GOOD, {"combination_type": "dare"}, ConfigError, "did you mean 'dare_ties'"),
    "no density": (GOOD, {"combination_type": "ties"}, ConfigError, "density=None"),
    "density": (GOOD, {"combination_type": "ties", "density": 1.5}, ConfigError, "0 < density <= 1"),
    "rank": (GOOD, {"svd_rank": 0}, ConfigError, "svd_rank=0"),
    "clamp": (GOOD, {"svd_clamp": 2.0}, ConfigError, "svd_clamp=2.0"),
    "sign": (GOOD, {"majority_sign_method": "most"}, ConfigError, "'total' or 'frequency'"),
    "methods": ({"a": 1.0, "i": 1.0}, {}, AdapterError, "of several methods, ia3, lora"),
    "a prompt": ({"p": 1.0}, {}, AdapterError, "'prompt_tuning' cannot be combined"),
    "vera": ({"v": 1.0}, {}, AdapterError, "'vera' cannot be combined"),
    "dora": ({"a": 1.0, "d": 1.0}, {}, AdapterError, "use_dora or lora_bias"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_combined_changes_nothing(case):
    weights, options, error, message = WRONG[case]
    model = build("llama")
    pk.attach(model, pk.LoraConfig(target_modules=["q_proj"]), "a")
    pk.attach(model, pk.LoraConfig(target_modules=["q_proj"]), "b")
    pk.attach(model, pk.LoraConfig(target_modules=["q_proj"], use_dora=True), "d")
    pk.attach(model, pk.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "i")
    pk.attach(model, pk.VeraConfig(target_modules=["q_proj"]), "v")
    pk.attach(model, pk.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "p")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        pk.combine(model, weights, **({"name": "c"} | options))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())


def test_one_scales_its_input_and_another_its_output():
    model = build("llama")
    pk.attach(model, pk.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]), "a")
    pk.attach(model, pk.IA3Config(target_modules=["down_proj"], feedforward_modules=[]), "b")
    with pytest.raises(AdapterError, match="input of a module and another its output"):
        pk.combine(model, GOOD, "c")
    assert list(pk.adapters(model)) == ["a", "b"]
