"""The checks of the conformance kit, one function each; their names are the ids of the tests."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftkern import checkpoint, memory
from peftkern.adapter import LayerAdapter, PromptAdapter
from peftkern.attach import (
    active_adapters,
    adapters,
    attach,
    detach,
    disabled,
    merge,
    merge_and_unload,
    set_adapter,
    unmerge,
)
from peftkern.attachment import state
from peftkern.combining import combine
from peftkern.errors import AdapterError, CheckpointError, ConfigError, MergeError
from peftkern.testing.case import (
    Case,
    NotApplicable,
    expect,
    expect_close,
    expect_equal,
    expect_same,
    move,
    own_parameters,
    raises,
    snapshot,
    switch_checkpointing,
    unchanged,
)

Check = Callable[[Case], None]
CHECKS: dict[str, Check] = {}
"""Name -> check. A check raises AssertionError when the method fails, NotApplicable when there is nothing to check."""


def check(function: Check) -> Check:
    """Register a check under its function's name."""
    CHECKS[function.__name__] = function
    return function


@check
def configuration_round_trips(case: Case) -> None:
    """The configuration survives JSON, and a misspelt field is an error that names it."""
    kind = type(case.config)
    again = kind.from_dict(json.loads(json.dumps(case.config.to_dict())))
    expect(again == case.config, f"{again} came back for {case.config}")
    with raises(ConfigError, "a configuration with an unknown field") as caught:
        kind.from_dict({"no_such_field": 1})
    expect("no_such_field" in str(caught[0]), f"the error does not name the field: {caught[0]}")


@check
def keeps_class_and_identity(case: Case) -> None:
    """`attach` returns the same object, of the same class, that still answers to its own methods."""
    model = case.plain()
    kind = type(model)
    expect(case.attached(to=model) is model, "attach returned another object")
    expect(type(model) is kind, f"the class became {type(model).__name__}")
    expect(list(adapters(model)) == ["default"] and active_adapters(model) == ["default"], "not attached as default")


@check
def starts_as_promised(case: Case) -> None:
    """The output is the backbone's until something has trained, unless the method says otherwise."""
    want = case.logits(case.plain())
    got = case.logits(case.attached(moved=None))
    if case.kind.starts_as_identity:
        expect_close(got, want, "output right after attaching", 1e-6)
    else:
        moved = got.shape != want.shape or not torch.allclose(got, want)
        expect(moved, "starts_as_identity is False, and yet the output is the backbone's")


@check
def does_something(case: Case) -> None:
    """Moving what trains moves the output."""
    want = case.logits(case.plain())
    got = case.logits(case.attached())
    expect(got.shape != want.shape or not torch.allclose(got, want), "the output does not depend on what trains")
    expect(bool(got.isfinite().all()), "the output is not finite")


@check
def only_its_parameters_train(case: Case) -> None:
    """What requires a gradient is the adapter's, and gets a finite one; nothing else owns a gradient."""
    model = case.attached()
    own = {id(p): key for key, p in own_parameters(model).items()}
    training = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    left_out = [name for name, p in model.named_parameters() if ".adapters." in name and id(p) not in own]
    expect(not left_out, f"parameters of the adapter that state_keys leaves out: {left_out}")
    expect(set(own) == set(training), f"trains {sorted(training.values())}, its own are {sorted(own.values())}")
    gradients = case.gradients(model)
    expect(set(gradients) == set(training.values()), f"no gradient: {sorted(set(training.values()) - set(gradients))}")
    bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    expect(not bad, f"gradients that are not finite: {bad}")
    expect(any(bool(gradient.any()) for gradient in gradients.values()), "all gradients are zero")


@check
def trains(case: Case) -> None:
    """Fifteen steps of AdamW lower the loss, and the backbone stays as it was to the bit."""
    want = case.logits(case.plain())
    model = case.attached(moved=None).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = case.loss(model)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    expect(losses[-1] < losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    with disabled(model):
        expect_equal(case.logits(model), want, "the backbone's output after training")


@check
def saves_and_loads(case: Case) -> None:
    """A saved adapter gives the same output on a fresh backbone, frozen unless asked for."""
    model = case.attached("one")
    where = checkpoint.save(model, case.directory / "adapter", "one")
    names = sorted(path.name for path in where.iterdir())
    expect(names == ["adapter_config.json", "adapter_model.safetensors"], f"wrote {names}")
    fresh = checkpoint.load(case.plain(), where, "two")
    expect_equal(case.logits(fresh), case.logits(model), "output after loading")
    expect(not any(p.requires_grad for p in fresh.parameters()), "a loaded adapter trains without being asked to")
    again = checkpoint.load(case.plain(), where, trainable=True)
    expect(len(case.gradients(again)) == len(case.gradients(model)), "trainable=True does not train what was saved")


@check
def refuses_a_checkpoint_that_does_not_fit(case: Case) -> None:
    """Wrong shape, missing, extra and truncated tensors raise CheckpointError and leave the model as it was."""
    where = checkpoint.save(case.attached(), case.directory / "adapter")
    file = where / "adapter_model.safetensors"
    tensors, model = load_file(file), case.plain()
    first = sorted(tensors)[0]
    longer = torch.cat([tensors[first], tensors[first][:1]])
    broken: dict[str, dict[str, Tensor]] = {
        "mis-shaped": tensors | {first: longer},
        "missing": {key: value for key, value in tensors.items() if key != first},
        "extra": tensors | {"base_model.model.no.such.place": torch.ones(1)},
    }
    for name, content in broken.items():
        save_file(content, file, metadata={"format": "pt"})
        with unchanged(model), raises(CheckpointError, f"{name} tensor") as caught:
            checkpoint.load(model, where)
        named = "no.such.place" if name == "extra" else first
        expect(named in str(caught[0]), f"{name}: the error does not name the tensor {named}: {caught[0]}")
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:-3])
    with unchanged(model), raises(CheckpointError, "truncated file"):
        checkpoint.load(model, where)


@check
def switches_between_two(case: Case) -> None:
    """Two adapters on one model give each its own output, only the active one trains, and a taken name is an error."""
    model = case.attached("one", moved=1)
    one = case.logits(model)
    case.attached("two", to=model, moved=2)
    expect_equal(case.logits(model), one, "output of the first after attaching a second")
    set_adapter(model, "two")
    two = case.logits(model)
    expect(not torch.equal(one, two), "both adapters give the same output")
    expect_equal(two, case.logits(case.attached("two", moved=2)), "output of the second beside the first")
    training = {id(p) for p in model.parameters() if p.requires_grad}
    expect(training == {id(p) for p in own_parameters(model, "two").values()}, "not only the active adapter trains")
    set_adapter(model, "one")
    expect_equal(case.logits(model), one, "output after switching there and back")
    with unchanged(model), raises(AdapterError, "attaching a name that is taken"):
        attach(model, case.config, "two")
    detach(model, "two")
    expect_equal(case.logits(model), one, "output after detaching the other")


@check
def disabled_is_the_backbone(case: Case) -> None:
    """Inside `disabled` the output is the backbone's to the bit, and afterwards the adapter's again."""
    want = case.logits(case.plain())
    model = case.attached()
    mine = case.logits(model)
    with disabled(model):
        expect_equal(case.logits(model), want, "output while disabled")
    expect_equal(case.logits(model), mine, "output after disabling")


@check
def merges_or_says_why_not(case: Case) -> None:
    """Merged output equals unmerged output and unmerge is exact; or MergeError, before any weight moves."""
    model = case.attached()
    mine, before = case.logits(model), snapshot(model)
    try:
        merge(model)
    except MergeError as error:
        expect_same(model, before)
        raise NotApplicable(f"{case.method} does not merge: {error}") from error
    expect_close(case.logits(model), mine, "merged output")
    merged = snapshot(model)
    with raises(MergeError, "merging twice"):
        merge(model)
    expect_same(model, merged)
    unmerge(model)
    expect_same(model, before)
    plain = merge_and_unload(model)
    expect(adapters(plain) == {}, "merge_and_unload leaves an adapter")
    expect([n for n, _ in plain.named_modules()] == [n for n, _ in case.plain().named_modules()], "modules are left")
    expect_close(case.logits(plain), mine, "output after merge_and_unload")


@check
def refuses_to_merge_nan(case: Case) -> None:
    """A weight that would not be finite raises MergeError before any weight moves."""
    if not issubclass(case.kind, LayerAdapter):
        raise NotApplicable(f"{case.method} has no weight of its own to merge")
    model = case.attached()
    tree = [(path, id(module)) for path, module in model.named_modules()]
    added = _added(model)
    weights = {name: (p, p.detach().clone()) for name, p in model.named_parameters() if id(p) not in added}
    with torch.no_grad():
        for parameter in added.values():
            parameter.view(-1)[0] = float("nan")
    with raises(MergeError, "merging NaN"):
        merge(model)
    expect(tree == [(path, id(module)) for path, module in model.named_modules()], "modules changed")
    for name, parameter in model.named_parameters():
        if name in weights:
            expect(parameter is weights[name][0], f"{name} was replaced")
            expect_equal(parameter, weights[name][1], name)


@check
def combines_or_says_why_not(case: Case) -> None:
    """One adapter combined with weight 1, in the method's usual way, is itself; or AdapterError, before any change."""
    model = case.attached("one")
    mine, before = case.logits(model), snapshot(model)
    try:
        combine(model, {"one": 1.0}, "again")
    except AdapterError as error:
        expect_same(model, before)
        raise NotApplicable(f"{case.method} does not combine: {error}") from error
    expect_equal(case.logits(model), mine, "output before the new adapter is switched to")
    set_adapter(model, "again")
    expect_close(case.logits(model), mine, "output of the combined adapter")
    expect(not any(p.requires_grad for p in model.parameters()), "a combined adapter trains without being asked to")


@check
def detaches_without_a_trace(case: Case) -> None:
    """After `detach` modules, parameters, hooks and grad flags are the very ones from before."""
    model = case.plain()
    before = snapshot(model)
    case.attached("one", to=model)
    case.attached("two", to=model, moved=2)
    case.gradients(model)
    model.eval()
    detach(model, "one")
    detach(model, "two")
    expect_same(model, before)


@check
def copies_and_pickles(case: Case) -> None:
    """A deep copy and a pickled copy give the same output, share nothing, and can be switched and disabled."""
    want = case.logits(case.plain())
    model = case.attached()
    mine = case.logits(model)
    for what, twin in (("deepcopy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        expect_equal(case.logits(twin), mine, f"output of the {what}")
        move(own_parameters(twin).values(), 7)
        expect(not torch.equal(case.logits(twin), mine), f"{what}: its own parameters do not reach its output")
        expect_equal(case.logits(model), mine, f"output of the original after training the {what}")
        with disabled(twin):
            expect_equal(case.logits(twin), want, f"output of the {what} while disabled")
        expect(bool(case.gradients(twin)), f"the {what} does not train")
        twin.eval()
        detach(twin)
        expect_equal(case.logits(twin), want, f"output of the {what} after detaching")


@check
def half_precision_backbone(case: Case) -> None:
    """Over a bf16 backbone an adapter's own parameters are f32, and forward, backward and autocast are finite."""
    model = case.attached(to=case.plain().bfloat16())
    if issubclass(case.kind, (LayerAdapter, PromptAdapter)):
        dtypes = {p.dtype for p in _added(model).values()}
        expect(dtypes == {torch.float32}, f"an adapter's own parameters over a bf16 backbone are {dtypes}")
    logits = case.logits(model)
    expect(logits.dtype == torch.bfloat16 and bool(logits.isfinite().all()), "logits are not finite bf16")
    expect(all(bool(g.isfinite().all()) for g in case.gradients(model).values()), "gradients are not finite")
    expect_close(logits, case.logits(case.attached()), "output over bf16 against f32", 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = case.attached()
        expect_close(case.logits(mixed), case.logits(case.attached()), "output under autocast", 0.1)
        gradients = case.gradients(mixed)
    expect(all(bool(g.isfinite().all()) for g in gradients.values()), "gradients under autocast are not finite")


@check
def follows_to_and_half(case: Case) -> None:
    """`.half()` and `.to(dtype)` after attaching convert the adapter as well, and it runs and trains."""
    model = case.attached()
    want = case.logits(model)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model.to(dtype)
        logits = case.logits(model)
        expect(logits.dtype == dtype, f"logits are {logits.dtype} after .to({dtype})")
        expect_close(logits, want, f"output after .to({dtype})", 0.1)
        finite = [bool(g.isfinite().all()) for g in case.gradients(model).values()]
        expect(bool(finite) and all(finite), f"gradients after .to({dtype}) are not finite")


@check
def compiles_in_one_graph(case: Case) -> None:
    """`torch.compile(fullgraph=True)` gives the same loss and gradients."""
    model = case.attached()
    want_loss, want = case.loss(model.train()).detach(), case.gradients(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad(set_to_none=True)
    loss = compiled(**case.model.batch()).loss
    torch.autograd.backward(loss)
    expect_close(loss.detach(), want_loss, "compiled loss")
    for name, parameter in model.named_parameters():
        if name in want:
            expect(parameter.grad is not None, f"compiled: no gradient for {name}")
            _same_gradient(parameter.grad, want, name, "compiled")  # type: ignore[arg-type]


@check
def checkpoints_gradients(case: Case) -> None:
    """Gradient checkpointing of both kinds gives the gradients of a run without it."""
    model = case.attached()
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise NotApplicable(f"{type(model).__name__} has no gradient checkpointing")
    want = case.gradients(model)
    for reentrant in (False, True):
        switch_checkpointing(model, reentrant)
        got = case.gradients(model)
        switch_checkpointing(model, None)
        expect(set(got) == set(want), f"use_reentrant={reentrant}: no gradient for {sorted(set(want) - set(got))}")
        for name in want:
            _same_gradient(got[name], want, name, f"use_reentrant={reentrant}")


@check
def memory_is_as_reported(case: Case) -> None:
    """Gradients and AdamW's state take the bytes that `trainable` reports, and inference saves nothing."""
    model = case.attached().train()
    report = memory.trainable(model, case.model.batch())
    training = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(training, lr=1e-3)
    torch.autograd.backward(case.loss(model))
    optimizer.step()
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = sum(v.nbytes for s in optimizer.state.values() for key, v in s.items() if key != "step")
    expect(gradients == report.gradient_bytes, f"gradients take {gradients} bytes, reported {report.gradient_bytes}")
    expect(states == report.optimizer_bytes, f"optimizer takes {states} bytes, reported {report.optimizer_bytes}")
    expect(bool(report.activation_bytes), "no activation bytes are reported for a training step")
    with torch.no_grad():
        saved = memory.saved_bytes(lambda: case.loss(model))
    expect(saved == 0, f"{saved} bytes are saved without a graph")


@check
def generates_the_same_with_and_without_cache(case: Case) -> None:
    """Greedy generation is the same with the cache as without it, left padding included."""
    model = case.attached()
    if not (hasattr(model, "can_generate") and model.can_generate()):  # type: ignore[operator]
        raise NotApplicable(f"{type(model).__name__} does not generate")
    ids = torch.tensor([[0, 0, 7, 8], [3, 4, 5, 6]])
    mask = (ids > 0).long()
    with_cache, without = (_greedy(model, ids, mask, cache) for cache in (True, False))
    expect_equal(with_cache[0], without[0], "tokens with and without the cache")
    expect_close(with_cache[1], without[1], "logits with and without the cache", 1e-4)


def _greedy(model: nn.Module, ids: Tensor, mask: Tensor, cache: bool) -> tuple[Tensor, Tensor]:
    """Tokens, and the logits that chose them."""
    found = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        use_cache=cache,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return found.sequences, torch.stack(found.logits)


def _added(model: nn.Module) -> dict[int, nn.Parameter]:
    """Parameters that the adapter brought, by identity: its own, less those of the backbone that it trains."""
    attachment = state(model)
    chosen = [] if attachment is None else attachment.selected()
    selected = {id(p) for selection in chosen for p in selection.trained().values()}
    return {id(p): p for p in own_parameters(model).values() if id(p) not in selected}


def _same_gradient(got: Tensor, want: dict[str, Tensor], name: str, what: str) -> None:
    """Within 1e-4 of the gradient itself or, where that is next to nothing (a key's bias), of the largest one."""
    largest = max(float(gradient.norm()) for gradient in want.values())
    error = float((got - want[name]).norm())
    allowed = 1e-4 * float(want[name].norm()) + 1e-6 * largest
    expect(error <= allowed, f"{what}: gradient of {name} is off by {error:.3g}, allowed {allowed:.3g}")
