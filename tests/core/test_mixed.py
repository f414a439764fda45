"""Mixed batches: what an adapter computes alone it computes for its own rows, whatever the method and the others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

import peftkern as pk
from peftkern import registry
from peftkern.adapter import LayerAdapter
from peftkern.attach import active_adapters
from peftkern.attachment import adapted_modules, state
from peftkern.errors import AdapterError, MergeError, TargetError
from peftkern.methods.lora import LoRA
from peftkern.rows import BASE
from peftkern.testing import relative_error, tiny_bert, tiny_gpt2, tiny_llama, token_batch
from peftkern.testing.case import move, own_parameters, switch_checkpointing

MODELS = {"bert": tiny_bert, "gpt2": tiny_gpt2, "llama": tiny_llama}
LORA = {"target_modules": "all-linear", "init_lora_weights": False}


def layer_methods() -> list[str]:
    """Every installed layer method, by name; those that others install beside peftkern too."""
    return [name for name in registry.names() if issubclass(registry.load(name), LayerAdapter)]


def with_adapters(model: nn.Module, configs: dict[str, pk.LoraConfig]) -> nn.Module:
    """The model with every adapter attached and moved away from its start."""
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        pk.attach(model, config, name)
        move(own_parameters(model, name).values(), seed, by=0.1)
    return model


def loras(model: nn.Module, **more) -> nn.Module:
    """Three LoRA adapters a, b, c of different ranks, scales and targets."""
    ranks = {
        "a": {"r": 3},
        "b": {"r": 8, "lora_alpha": 24, "use_rslora": True},
        "c": {"r": 1, "exclude_modules": ["q_proj"]},
    }
    return with_adapters(model, {name: pk.LoraConfig(**(LORA | own | more)) for name, own in ranks.items()})


def batch(rows: int) -> dict[str, Tensor]:
    return {key: value for key, value in token_batch(rows, 7).items() if key != "labels"}


def alone(model: nn.Module, names: Sequence[str], inputs: dict[str, Tensor]) -> Tensor:
    """The logits of a mixed batch as a user would get them without it: a whole batch per adapter, rows picked."""
    found = {}
    active = active_adapters(model)
    for name in set(names):
        if name == BASE:
            with pk.disabled(model):
                found[name] = model(**inputs).logits
        else:
            pk.set_adapter(model, name)
            found[name] = model(**inputs).logits
    pk.set_adapter(model, active)
    return torch.stack([found[name][row] for row, name in enumerate(names)])


def assert_mixes(model: nn.Module, names: Sequence[str], inputs: dict[str, Tensor] | None = None) -> None:
    inputs = batch(len(names)) if inputs is None else inputs
    want = alone(model, names, inputs)
    with pk.mixed(model, names):
        got = model(**inputs).logits
    assert relative_error(got, want) < 1e-5
    for row, name in enumerate(names):
        assert relative_error(got[row], want[row]) < 1e-5, f"row {row} of {name}"
    assert len(names) == 1 or relative_error(want, want.roll(1, 0)) > 0.1


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", layer_methods())
def test_every_method_mixes(method: str, kind: str) -> None:
    model, config = MODELS[kind](), registry.load(method).Config()
    try:
        with_adapters(model, {"a": config, "b": config})
    except TargetError as error:
        pytest.skip(f"{method} on {kind}: {error}")
    names = ["a", BASE, "b", "a", "b"]
    inputs = batch(5)
    want = {name: alone(model, [name] * 5, inputs) for name in ("a", "b", BASE)}
    assert relative_error(want["a"], want["b"]) > 1e-4 and relative_error(want["a"], want[BASE]) > 1e-4
    assert_mixes(model, names, inputs)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("names", [["c", "a", BASE, "b", "a"], ["a", "a"], [BASE, BASE], ["b"]], ids=str)
def test_lora_of_different_ranks_scales_and_targets(names: list[str], kind: str) -> None:
    assert_mixes(loras(MODELS[kind]()), names)


@pytest.mark.parametrize("kind", MODELS)
def test_dora_beside_lora(kind: str) -> None:
    configs = {"plain": pk.LoraConfig(**LORA), "dora": pk.LoraConfig(**LORA, use_dora=True, r=4)}
    model = with_adapters(MODELS[kind](), configs | {"more": pk.LoraConfig(**LORA, use_dora=True, r=2)})
    assert_mixes(model, ["dora", "plain", BASE, "more", "dora"])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_embeddings(kind: str) -> None:
    names = {"llama": ["embed_tokens", "q_proj"], "gpt2": ["wte", "c_attn"]}[kind]
    assert_mixes(loras(MODELS[kind](), target_modules=names), ["c", "a", BASE, "b", "a"])


def test_different_methods_in_one_batch() -> None:
    """On the same module, and with an adapter that reads another module's input."""
    configs = {
        "lora": pk.LoraConfig(**LORA),
        "sequential": pk.BottleneckConfig(placement="ffn", r=4),
        "parallel": pk.BottleneckConfig(placement="parallel", r=3),
        "more": pk.LoraConfig(**LORA, r=2),
        "other": pk.BottleneckConfig(placement="parallel", r=3),
    }
    model = with_adapters(tiny_llama(), configs)
    assert_mixes(model, ["parallel", "lora", "sequential", BASE, "more", "other", "parallel"])
    assert all(tap.value is None for tap in state(model).taps.values())


def test_lora_runs_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One op call per module, and the base's product once: the reason for all this."""
    calls: list[int] = []
    original = pk.ops.multi_low_rank

    def counted(*args, **kwargs):
        calls.append(len(args[1]))
        return original(*args, **kwargs)

    monkeypatch.setattr(pk.ops, "multi_low_rank", counted)
    model = loras(tiny_llama())
    with pk.mixed(model, ["a", "b", "c", BASE]):
        model(**batch(4))
    without_c = sum("c" not in module.adapters for module in adapted_modules(model))
    assert calls.count(2) == without_c > 0 and len(calls) == len(list(adapted_modules(model)))


def test_adapters_with_another_dropout_run_apart() -> None:
    """In training p is part of what is fused; each row still gets its own adapter's."""
    configs = {"a": pk.LoraConfig(**LORA, lora_dropout=0.5), "b": pk.LoraConfig(**LORA)}
    model = with_adapters(tiny_llama(), configs).train()
    inputs = batch(3)
    want = alone(model, ["b"] * 3, inputs)
    with pk.mixed(model, ["b", "a", "b"]):
        one, two = model(**inputs).logits, model(**inputs).logits
    assert relative_error(one[[0, 2]], want[[0, 2]]) < 1e-5
    assert relative_error(one[1], two[1]) > 1e-3


class _Doubled(LoRA):
    """A subclass that changes forward and knows nothing of mixed batches."""

    def forward(self, base, x):
        return 2 * super().forward(base, x)


def test_a_subclass_that_changes_forward_is_not_bypassed() -> None:
    model = loras(tiny_llama())
    for module in adapted_modules(model):
        if "b" in module.adapters:
            module.adapters["b"].__class__ = _Doubled
    assert_mixes(model, ["a", "b", BASE])


def test_hooks_on_an_adapter_run() -> None:
    model, seen = loras(tiny_llama()), []
    assert_mixes(model, ["a", "b", "a"])  # what is known of a batch from before must not outlive the hook
    for module in adapted_modules(model):
        if "a" in module.adapters:
            module.adapters["a"].register_forward_hook(lambda _module, _args, out: seen.append(len(out)) or out + 1)
    assert_mixes(model, ["a", "b", "a"])
    assert 2 in seen


def test_hooks_on_the_base_run() -> None:
    model = loras(tiny_llama())
    for module in adapted_modules(model):
        module.base_layer.register_forward_hook(lambda _module, _args, out: out * 1.1)
    assert_mixes(model, ["a", "b", BASE, "a"])


def gradients(
    model: nn.Module, names: Sequence[str], inputs: dict[str, Tensor], mixed: bool
) -> dict[str, Tensor | None]:
    """Gradients of every adapter's parameters for one loss over the batch, mixed or a batch per adapter."""
    model.zero_grad(set_to_none=True)
    if mixed:
        with pk.mixed(model, names):
            logits = model(**inputs).logits
        logits.square().mean().backward()  # after the block, as a trainer does
    else:
        for name in dict.fromkeys(names):
            if name != BASE:
                pk.set_adapter(model, name)
                rows = torch.tensor([own == name for own in names])
                (model(**inputs).logits[rows].square().sum() / (len(names) * 7 * 61)).backward()
        pk.set_adapter(model, ["a", "b", "c"])
    return {key: p.grad for name in "abc" for key, p in _named(model, name).items()}


def _named(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return {f"{name}:{key}": p for key, p in own_parameters(model, name).items()}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_reaches_the_rows_adapters_alone(kind: str, reentrant: bool | None) -> None:
    model = loras(MODELS[kind]()).train()
    pk.set_adapter(model, ["a", "b", "c"])
    names, inputs = ["b", "a", BASE, "b"], batch(4)
    want = gradients(model, names, inputs, mixed=False)
    if reentrant is not None:
        switch_checkpointing(model, reentrant)
    got = gradients(model, names, inputs, mixed=True)
    assert want.keys() == got.keys()
    for key, grad in want.items():
        if key.startswith("c"):
            assert grad is None and got[key] is None, key
        else:
            assert relative_error(got[key], grad) < 1e-4, key


def test_only_what_set_adapter_made_trainable_trains() -> None:
    model = loras(tiny_llama()).train()
    pk.set_adapter(model, "a")
    with pk.mixed(model, ["a", "b"]):
        model(**batch(2)).logits.square().mean().backward()
    assert all(p.grad is not None for p in own_parameters(model, "a").values())
    assert all(p.grad is None for p in own_parameters(model, "b").values())


def test_generation_repeats_rows_for_beams_and_samples() -> None:
    model = pk.get_peft_model(tiny_llama(), pk.LoraConfig(**LORA), "a")
    model.add_adapter("b", pk.LoraConfig(**LORA, r=3))
    model.eval()
    inputs = {"input_ids": token_batch(3, 6)["input_ids"].clamp_min(3)}
    names = ["b", BASE, "a"]
    options = {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    for more in ({}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        got = model.generate(**inputs, **options, **more, adapter_names=names)
        times = more.get("num_return_sequences", 1)
        for row, name in enumerate(names):
            one = {"input_ids": inputs["input_ids"][row : row + 1]}
            if name == BASE:
                with model.disable_adapter():
                    want = model.generate(**one, **options, **more)
            else:
                model.set_adapter(name)
                want = model.generate(**one, **options, **more)
            assert torch.equal(got[row * times : (row + 1) * times], want), (more, name)
    sampled = model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=3, adapter_names=names)
    assert sampled.shape[0] == 9


def test_compiles_without_a_break_whatever_the_rows_name() -> None:
    model = loras(tiny_llama(num_hidden_layers=1))
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for names in (["a", "b", BASE, "a"], ["b", "a", "a", BASE], ["a", BASE, "b", "b"]):
        with pk.mixed(model, sorted(names)), torch.no_grad():
            want = model(**batch(4)).logits
            assert relative_error(compiled(**batch(4)).logits, want) < 1e-5
    assert counter.frame_count == 1


WRONG = {
    "an unknown name": (["a", "bb"], AdapterError, "adapter_names: .*did you mean 'b'"),
    "one string": ("a", AdapterError, "one name per row"),
    "no strings": ([0, 1], AdapterError, "one name per row"),
    "a prompt": (["a", "prompt"], AdapterError, "'prompt' is a prompt"),
    "a head of its own": (["a", "head"], AdapterError, "lm_head.weight"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_mixed_is_an_error_before_anything_runs(case: str) -> None:
    names, error, message = WRONG[case]
    model = loras(tiny_llama())
    pk.attach(model, pk.PromptTuningConfig(num_virtual_tokens=2), "prompt")
    pk.attach(model, pk.LoraConfig(**LORA, modules_to_save=["lm_head"]), "head")
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(error, match=message), pk.mixed(model, names):
        model(**batch(2))
    assert state(model).batch.rows is None and active_adapters(model) == ["a"]


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_a_wrong_number_of_names_is_an_error(count: int) -> None:
    """4 for 2 rows and 1 for 2 as well: nothing is repeated or cut unless generation says so."""
    model = loras(tiny_llama())
    want = model(**batch(2)).logits
    with pytest.raises(AdapterError, match=rf"has 2 rows, and adapter_names has {count} names"):
        with pk.mixed(model, ["a"] * count):
            model(**batch(2))
    assert torch.equal(model(**batch(2)).logits, want)


def test_a_module_that_does_not_see_the_batch_is_an_error() -> None:
    """Learned positions are looked up once for all rows."""
    model = with_adapters(tiny_gpt2(), {"a": pk.LoraConfig(**LORA | {"target_modules": ["wpe"]})})
    with pytest.raises(AdapterError, match=r"wpe: its input has 1 rows"), pk.mixed(model, ["a", BASE]):
        model(**batch(2))


def test_merged_adapters_are_an_error() -> None:
    model = loras(tiny_llama())
    pk.merge(model)
    with pytest.raises(MergeError, match="unmerge first"), pk.mixed(model, ["a", "b"]):
        pass


def test_nothing_is_switched_inside() -> None:
    model = loras(tiny_llama())
    with pk.mixed(model, ["a", "b"]):
        for change in (lambda: pk.set_adapter(model, "b"), lambda: pk.detach(model, "b"), lambda: pk.merge(model)):
            with pytest.raises(AdapterError, match="mixed batch"):
                change()
    pk.set_adapter(model, "b")


def test_disabled_wins_inside_and_outside() -> None:
    model = loras(tiny_llama())
    with pk.disabled(model):
        want = model(**batch(2)).logits
        with pk.mixed(model, ["a", "b"]):
            assert torch.equal(model(**batch(2)).logits, want)
    with pk.mixed(model, ["a", "b"]), pk.disabled(model):
        assert torch.equal(model(**batch(2)).logits, want)


def test_nested_batches_and_an_error_inside_give_back_what_was() -> None:
    model = loras(tiny_llama())
    want = model(**batch(2)).logits
    with pk.mixed(model, ["a", "b"]):
        outer = model(**batch(2)).logits
        with pk.mixed(model, ["b", "a"]):
            assert relative_error(model(**batch(2)).logits, outer) > 0.01
        assert torch.equal(model(**batch(2)).logits, outer)
    with pytest.raises(KeyError), pk.mixed(model, ["a", "b"]):
        raise KeyError
    assert torch.equal(model(**batch(2)).logits, want)


def test_an_active_head_or_prompt_stands_back() -> None:
    """The rows are what they name: an active adapter outside the modules must not show through."""
    model = loras(tiny_llama())
    want = alone(model, ["a", BASE], batch(2))
    for config, name in (
        (pk.LoraConfig(**LORA, modules_to_save=["lm_head"]), "head"),
        (pk.PromptTuningConfig(num_virtual_tokens=2), "prompt"),
    ):
        with_adapters(model, {name: config})
        pk.set_adapter(model, name)
        before = model(**batch(2)).logits
        with pk.mixed(model, ["a", BASE]):
            assert relative_error(model(**batch(2)).logits, want) < 1e-5
        assert active_adapters(model) == [name] and torch.equal(model(**batch(2)).logits, before)


def test_copies_mix_on_their_own() -> None:
    model = loras(tiny_llama())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pk.mixed(twin, ["a", "b", BASE]):
            assert state(model).batch.rows is None
            got = twin(**batch(3)).logits
        assert relative_error(got, alone(model, ["a", "b", BASE], batch(3))) < 1e-5


def test_half_precision_and_autocast() -> None:
    model = loras(tiny_llama().to(torch.bfloat16))
    names = ["c", "a", BASE, "b"]
    want = alone(model, names, batch(4))
    with pk.mixed(model, names):
        got = model(**batch(4)).logits
    assert got.dtype == want.dtype == torch.bfloat16 and relative_error(got, want) < 0.02
    model = loras(tiny_llama())
    with torch.autocast("cpu", torch.bfloat16):
        want = alone(model, names, batch(4))
        with pk.mixed(model, names):
            assert relative_error(model(**batch(4)).logits, want) < 0.02


def test_train_and_eval_inside_a_block() -> None:
    model = loras(tiny_llama(), lora_dropout=0.5)
    with pk.mixed(model, ["a", "b"]):
        still = model(**batch(2)).logits
        assert relative_error(model.train()(**batch(2)).logits, still) > 0.01
        assert torch.equal(model.eval()(**batch(2)).logits, still)
