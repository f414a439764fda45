"""Attaching, switching and detaching where models are awkward: tied, shared, hooked, oddly named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import peftkern as pk
from peftkern.attachment import adapted_modules, state
from peftkern.errors import AdapterError, TargetError
from peftkern.testing import TinyModel, tiny_bert, tiny_gpt2, tiny_llama, token_batch, unchanged

RANDOM = {"r": 3, "init_lora_weights": False}


def own(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    return state(model).parameters_of(model, name)


def delta(model: nn.Module, path: str, name: str = "default") -> Tensor:
    """ΔW [N, K] of one LoRA from its two factors, written out once more."""
    parameters = own(model, name)
    config = pk.adapters(model)[name]
    return config.lora_alpha / config.r * parameters[f"{path}.lora_B.weight"] @ parameters[f"{path}.lora_A.weight"]


class Shared(nn.Module):
    """One linear module that is called twice and known under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("target", ["first", "second"])
def test_module_shared_under_two_names(target: str) -> None:
    model, x = Shared(), torch.randn(4, 6)
    before = model(x)
    weight = model.first.weight
    pk.attach(model, pk.LoraConfig(target_modules=[target], **RANDOM))
    assert model.first is model.second, "the two names came apart"
    (path,) = {module.base.path for module in adapted_modules(model)}
    full = (weight + delta(model, path)).detach().requires_grad_(True)
    twin = nn.functional.linear(torch.tanh(nn.functional.linear(x, full, model.first.bias)), full, model.first.bias)
    want = model.last(torch.tanh(twin))
    torch.testing.assert_close(model(x), want)
    want.sum().backward()
    model(x).sum().backward()
    factors = own(model)
    scale = pk.adapters(model)["default"].lora_alpha / 3
    torch.testing.assert_close(
        factors[f"{path}.lora_A.weight"].grad, scale * factors[f"{path}.lora_B.weight"].T @ full.grad
    )
    pk.detach(model)
    assert model.first is model.second
    assert torch.equal(model(x), before)


def test_shared_block_as_in_albert() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    model = nn.Sequential(block, block, nn.Linear(4, 1))
    x = torch.randn(3, 4)
    pk.attach(model, pk.LoraConfig(target_modules=["0.0"], **RANDOM))
    want = x
    weight = block[0].weight + delta(model, "0.0")
    for _ in range(2):
        want = torch.tanh(nn.functional.linear(want, weight, block[0].bias))
    torch.testing.assert_close(model(x), model[2](want))


def test_tied_embedding_is_adapted_on_one_side_only() -> None:
    model = tiny_gpt2()
    batch = token_batch()
    assert model.lm_head.weight is model.transformer.wte.weight
    tied = model.lm_head.weight
    hidden = []
    model.lm_head.register_forward_pre_hook(lambda _m, args: hidden.append(args[0]))
    pk.attach(model, pk.LoraConfig(target_modules=["wte"], **RANDOM))
    unmerged = model(**batch).logits
    torch.testing.assert_close(unmerged, hidden[-1] @ tied.T)
    pk.merge(model)
    assert model.lm_head.weight is tied
    assert model.transformer.wte.weight is not tied
    torch.testing.assert_close(model(**batch).logits, unmerged)
    pk.unmerge(model)
    assert model.transformer.wte.weight is tied
    pk.detach(model)
    assert model.lm_head.weight is model.transformer.wte.weight is tied


def test_tied_head_is_adapted_on_one_side_only() -> None:
    model = tiny_gpt2()
    tied = model.lm_head.weight
    before = tied.clone()
    pk.attach(model, pk.LoraConfig(target_modules=["lm_head"], **RANDOM))
    unmerged = model(**token_batch()).logits
    pk.merge(model)
    assert model.transformer.wte.weight is tied
    assert torch.equal(tied, before)
    torch.testing.assert_close(model(**token_batch()).logits, unmerged)


def test_tied_head_in_modules_to_save_gets_a_copy_of_its_own() -> None:
    model = tiny_gpt2()
    tied = model.lm_head.weight
    pk.attach(model, pk.LoraConfig(modules_to_save=["lm_head"]))
    assert model.transformer.wte.weight is tied
    assert model.lm_head.weight is not tied
    assert model.lm_head.weight.requires_grad
    assert not tied.requires_grad
    model(**token_batch()).loss.backward()
    assert tied.grad is None
    with pk.disabled(model):
        assert model.lm_head.weight is tied
    pk.detach(model)
    assert model.lm_head.weight is model.transformer.wte.weight is tied


def test_full_fine_tuning_keeps_a_tie() -> None:
    model = pk.attach(tiny_gpt2(), pk.FullConfig())
    assert model.lm_head.weight is model.transformer.wte.weight
    count = sum(p.numel() for p in tiny_gpt2().parameters())
    assert pk.trainable(model).trainable == count


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_of_the_base_layer_still_run(kind: str) -> None:
    model, twin = tiny_llama(), tiny_llama()
    for one in (model, twin):
        target = one.model.layers[0].mlp.up_proj
        if kind == "forward":
            target.register_forward_hook(lambda _m, _a, out: out * 1.5)
        elif kind == "pre":
            target.register_forward_pre_hook(lambda _m, args: (args[0] * 1.5,))
        else:
            target.register_full_backward_hook(lambda _m, grads, _out: (grads[0] * 1.5,))
    pk.attach(model, pk.LoraConfig(target_modules=["up_proj"]))
    torch.testing.assert_close(model(**token_batch()).logits, twin(**token_batch()).logits)
    below = []
    for one in (model, twin):
        one.model.embed_tokens.weight.requires_grad_(True)
        one(**token_batch()).loss.backward()
        below.append(one.model.embed_tokens.weight.grad)
    torch.testing.assert_close(*below)


def test_hook_that_is_added_later_runs() -> None:
    model = pk.attach(tiny_llama(), pk.LoraConfig(target_modules=["up_proj"], **RANDOM))
    calls = []
    model.model.layers[0].mlp.up_proj.base_layer.register_forward_hook(lambda *_: calls.append(1))
    model(**token_batch())
    assert calls == [1]


def test_two_active_adapters_add_up() -> None:
    model = tiny_bert()
    base, inputs = model.bert.encoder.layer[0].intermediate.dense, torch.randn(3, 32)
    config = pk.LoraConfig(target_modules=["intermediate.dense"], **RANDOM)
    pk.attach(model, config, "one")
    pk.attach(model, config, "two")
    path = "bert.encoder.layer.0.intermediate.dense"
    module = model.get_submodule(path)
    for names in (["one"], ["two"], ["one", "two"], ["two", "one"]):
        pk.set_adapter(model, names)
        want = base(inputs) + inputs @ sum(delta(model, path, name) for name in names).T
        torch.testing.assert_close(module(inputs), want)
        assert {p for n in names for p in own(model, n).values()} == {p for p in model.parameters() if p.requires_grad}
    assert pk.active_adapters(model) == ["two", "one"]
    pk.set_adapter(model, [])
    torch.testing.assert_close(module(inputs), base(inputs))


def test_methods_of_different_shape_act_together(family: TinyModel) -> None:
    """A layer method, a prompt and a selection at once; each alone afterwards as if the others were not there."""
    model, batch = family.build(), family.batch()
    configs = {
        "lora": pk.LoraConfig(**RANDOM),
        "prompt": pk.PromptTuningConfig(num_virtual_tokens=3),
        "last": pk.HeadConfig(last_k=1),
    }
    torch.manual_seed(1)
    for name, config in configs.items():
        pk.attach(model, config, name)
    with torch.no_grad():
        for p in own(model, "last").values():
            p.add_(0.1)
    alone = {}
    for name in configs:
        pk.set_adapter(model, name)
        alone[name] = model(**batch).logits
    pk.set_adapter(model, list(configs))
    together = model(**batch)
    together.loss.backward()
    assert all(p.grad is not None for name in configs for p in own(model, name).values())
    for name in configs:
        pk.set_adapter(model, name)
        assert torch.equal(model(**batch).logits, alone[name])
        assert not torch.equal(alone[name], together.logits)
    for name in configs:
        pk.detach(model, name)
    assert torch.equal(model(**batch).logits, family.build()(**batch).logits)


def test_two_adapters_that_train_the_same_parameter() -> None:
    model = tiny_bert()
    pk.attach(model, pk.HeadConfig(), "one")
    pk.attach(model, pk.HeadConfig(last_k=1), "two")
    with unchanged(model), pytest.raises(AdapterError, match=r"'one' and 'two' both train classifier\.weight"):
        pk.set_adapter(model, ["one", "two"])


@pytest.mark.parametrize("names", ["tow", ["one", "tow"]], ids=str)
def test_unknown_adapter_names_near_ones(names) -> None:
    model = pk.attach(pk.attach(tiny_bert(), pk.LoraConfig(), "one"), pk.LoraConfig(), "two")
    with unchanged(model), pytest.raises(AdapterError, match=r"no adapter 'tow'; did you mean 'two'"):
        pk.set_adapter(model, names)
    with unchanged(model), pytest.raises(AdapterError, match="each adapter can be active once"):
        pk.set_adapter(model, ["one", "one"])
    with unchanged(model), pytest.raises(AdapterError, match="no adapter 'three'"):
        pk.detach(model, "three")


@pytest.mark.parametrize("name", ["", "a.b", 3], ids=str)
def test_impossible_adapter_name(name) -> None:
    model = tiny_bert()
    with unchanged(model), pytest.raises(AdapterError, match="non-empty string without a dot"):
        pk.attach(model, pk.LoraConfig(), name)


@pytest.mark.parametrize("name", ["keys", "training", "type"])
def test_adapter_names_that_a_module_dict_cannot_hold(name: str) -> None:
    model = tiny_bert()
    for config in (pk.LoraConfig(), pk.PromptTuningConfig(), pk.HeadConfig()):
        with unchanged(model), pytest.raises(AdapterError, match=f"'{name}' is an attribute of nn.ModuleDict"):
            pk.attach(model, config, name)


@pytest.mark.parametrize("name", ["weight", "lora_A", "adapters", "base_layer", "classifier", "model", "ü-1 x"])
def test_adapter_names_that_mean_something_elsewhere(name: str, tmp_path) -> None:
    """Hugging Face PEFT cuts the adapter's name out of the keys of a file."""
    model = tiny_bert()
    configs = (pk.LoraConfig(task_type="TOKEN_CLS", **RANDOM), pk.PromptTuningConfig(num_virtual_tokens=2))
    for index, config in enumerate(configs):
        want = pk.attach(tiny_bert(), config, name)
        pk.save(want, tmp_path / str(index), name)
        got = pk.load(tiny_bert(), tmp_path / str(index), name)
        assert torch.equal(got(**token_batch(labels=5)).logits, want(**token_batch(labels=5)).logits)
    with unchanged(model):
        pk.attach(model, pk.BottleneckConfig(), name)
        pk.detach(model, name)


class OddNames(nn.Module):
    """Module names that others use for their own ends."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(4, 4)
        self.adapters = nn.ModuleDict({"default": nn.Linear(4, 4)})
        self.base_layer = nn.Linear(4, 4)
        self.inner = nn.ModuleDict(
            {"base_layer": nn.Linear(4, 4), "lora_A": nn.Linear(4, 4), "base_layers": nn.Linear(4, 4)}
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.weight, self.adapters["default"], self.base_layer, *self.inner.values()):
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize(
    "target", ["weight", "adapters.default", "base_layer", "inner.base_layer", "inner.lora_A", "inner.base_layers"]
)
def test_odd_module_names(target: str, tmp_path) -> None:
    torch.manual_seed(5)
    model = OddNames()
    plain, x = copy.deepcopy(model), torch.randn(3, 4)
    with unchanged(model):
        pk.attach(model, pk.LoraConfig(target_modules=f".*{target.replace('.', '[.]')}", **RANDOM))
        assert model.get_submodule(target).base_layer.weight.shape == (4, 4)
        got = model(x)
        assert not torch.equal(got, plain(x))
        pk.save(model, tmp_path / "adapter")
        assert torch.equal(pk.load(copy.deepcopy(plain), tmp_path / "adapter")(x), got)
        pk.merge(model)
        torch.testing.assert_close(model(x), got)
        pk.detach(model)


@pytest.mark.parametrize("selected", ["weight", "inner.base_layer", "adapters"])
def test_odd_names_in_modules_to_save(selected: str) -> None:
    model, x = OddNames(), torch.randn(3, 4)
    want = model(x)
    with unchanged(model):
        pk.attach(model, pk.LoraConfig(target_modules=["inner.lora_A"], modules_to_save=[selected]))
        names = {key for key in own(model) if "lora_" not in key.replace("inner.lora_A", "inner.x")}
        assert names and all(selected in name for name in names), names
        model(x).sum().backward()
        pk.detach(model)
    assert torch.equal(model(x), want)


def test_nested_target_names() -> None:
    """`dense` is also the end of `output.dense`; a longer name restricts, exclude_modules takes away."""
    model = tiny_bert()

    def matched(**fields) -> set[str]:
        twin = pk.attach(copy.deepcopy(model), pk.LoraConfig(**fields))
        return {module.base.path.removeprefix("bert.encoder.layer.") for module in adapted_modules(twin)}

    dense = {f"{i}.{p}" for i in (0, 1) for p in ("attention.output.dense", "intermediate.dense", "output.dense")}
    assert matched(target_modules=["dense"]) == dense
    assert matched(target_modules=["output.dense"]) == {p for p in dense if "output" in p}
    assert matched(target_modules=["attention.output.dense"]) == {p for p in dense if "attention" in p}
    assert matched(target_modules=["dense"], exclude_modules=["output.dense"]) == {
        p for p in dense if "output" not in p
    }
    assert matched(target_modules=["dense"], exclude_modules=r".*attention.*") == {p for p in dense if "att" not in p}
    assert matched(target_modules=r".*layer\.1\.output\.dense") == {"1.output.dense"}
    assert matched(target_modules=["dense"], layers_to_transform=[1]) == {p for p in dense if p.startswith("1")}
    assert matched(target_modules=["dense"], layers_to_transform=0) == {p for p in dense if p.startswith("0")}
    assert "classifier" in {p for p in matched(target_modules="all-linear")}
    assert "classifier" not in matched(target_modules="all-linear", task_type="TOKEN_CLS")
    assert matched() == {f"{i}.attention.self.{p}" for i in (0, 1) for p in ("query", "value")}


def test_all_linear_leaves_out_the_output_embedding(family: TinyModel) -> None:
    model = pk.attach(family.build(), pk.LoraConfig(target_modules="all-linear"))
    head = model.get_output_embeddings()
    assert head is None or not hasattr(head, "base_layer")
    wrapped = {id(module.base_layer) for module in adapted_modules(model)}
    kinds = {type(m).__name__ for m in model.modules() if id(m) in wrapped}
    assert kinds <= {"Linear", "Conv1D"} and len(wrapped) >= 2 * 4


def test_a_mode_set_before_attaching_holds_for_the_adapter() -> None:
    for training in (True, False):
        model = pk.attach(tiny_bert().train(training), pk.BottleneckConfig(dropout=0.5))
        assert {m.training for module in adapted_modules(model) for m in module.modules()} == {training}


def test_a_model_whose_parts_need_gradients_gets_them_back() -> None:
    model = tiny_bert()
    model.classifier.bias.requires_grad_(False)
    with unchanged(model):
        pk.attach(model, pk.LoraConfig())
        assert not model.classifier.weight.requires_grad
        pk.detach(model)


def test_attach_in_a_container_that_runs_its_children() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    before = model(x)
    pk.attach(model, pk.LoraConfig(target_modules=["0", "2"]))
    torch.testing.assert_close(model(x), before)


def test_attach_on_another_dtype_and_device_than_the_default() -> None:
    model = tiny_bert().to(torch.float64)
    pk.attach(model, pk.LoraConfig(**RANDOM))
    assert {p.dtype for p in own(model).values()} == {torch.float64}
    assert model(**token_batch(labels=5)).logits.dtype == torch.float64
    assert torch.autograd.gradcheck(
        lambda a: torch.func.functional_call(
            model.bert.encoder.layer[0].attention.self.query, {"adapters.default.a": a}, (torch.ones(2, 32).double(),)
        ),
        next(iter(own(model).values())).detach().clone().requires_grad_(True),
    )


def test_unsuitable_targets() -> None:
    model = tiny_bert()
    with unchanged(model), pytest.raises(TargetError, match="LayerNorm"):
        pk.attach(model, pk.LoraConfig(target_modules=["LayerNorm"]))
    with unchanged(model), pytest.raises(TargetError, match="also matches modules that cannot be adapted"):
        pk.attach(model, pk.LoraConfig(target_modules=r".*layer\.0\.output.*"))
