"""One training step (forward and backward) of BERT-like and Llama-like models, per method, against its peers.

The floor is the same frozen model with a gradient flowing through it and no adapter.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkern as pk
from peftkern import dispatch, registry
from peftkern.ops._op import every

from . import _adapterhub, _decode, _peers
from ._adapters import METHODS, PLAIN, PROVIDERS, Build, Method, adapted, ours
from ._clock import Runner, Values
from ._measure import FLOOR, OURS, SHORT, YARDSTICK, Case, Cost, Gate, Options, passes
from ._models import Model, models

_MAIN = (METHODS[0], METHODS[4], METHODS[2], METHODS[6])
LIMITS = {
    ("lora all p0.1", torch.float32): 1.12, ("lora all p0.1", torch.bfloat16): 1.20,
    ("lora q,v p0.1", torch.float32): 1.06, ("lora q,v p0.1", torch.bfloat16): 1.08,
    ("dora all p0.1", torch.float32): 1.20, ("dora all p0.1", torch.bfloat16): 1.30,
}  # fmt: skip
"""Gates on LoRA and DoRA with dropout .1 of the small BERT on a CPU: at most so many times the floor."""
_LOW_RANK = ("lora", "dora")


def cases(options: Options) -> Iterator[Case]:
    """Training steps and a decode step; the most telling cases first."""
    found = _gpu_cases(options) if options.device.type == "cuda" and not options.quick else _cpu_cases(options)
    yield from itertools.islice(found, 1)
    yield from _decode.cases(options)
    yield from found


def _cpu_cases(options: Options) -> Iterator[Case]:
    """Every method on the first model, the main ones on the others."""
    for index, (model, dtypes) in enumerate(models(options)):
        main = _MAIN[:2] if options.quick else _MAIN
        for method in METHODS if index == 0 and not options.quick else main:
            for dtype in dtypes:
                yield _case(options, model, method, dtype)


def _gpu_cases(options: Options) -> Iterator[Case]:
    """Every large model with the main method before any with the next: a budget then cuts methods, not models."""
    *large, (small, dtypes) = models(options)
    for method in (METHODS[0], METHODS[2], METHODS[1], METHODS[5], METHODS[6]):
        for model, (dtype, *_) in large:
            yield _case(options, model, method, dtype)
    for dtype in dtypes:
        yield _case(options, small, METHODS[0], dtype)


def method_cases(options: Options, name: str) -> Iterator[Case]:
    """Any installed method, by name, with its default configuration, against the floor.

    The gate compares with the same method on the reference backend. Raises UnknownMethodError.
    """
    registry.load(name)
    for model, dtypes in models(options):
        for dtype in dtypes[:1] if options.quick else dtypes:
            providers = {
                FLOOR: functools.partial(_floor, options, model, dtype),
                OURS: functools.partial(_by_name, options, model, dtype, name),
            }
            oracle = functools.partial(_by_name_reference, options, model, dtype, name)
            yield _assemble(options, model, f"{name} defaults", dtype, {"method": name}, providers, oracle)


def _case(options: Options, model: Model, method: Method, dtype: torch.dtype) -> Case:
    build = functools.partial(_runner, options, model, method, dtype)
    providers: dict[str, Callable[[], Runner]] = {
        FLOOR: functools.partial(_floor, options, model, dtype),
        YARDSTICK: functools.partial(build, PLAIN[method.kind]),
        OURS: functools.partial(build, ours),
    }
    if method.kind == "lora" and method.p == 0.0 and not options.quick:
        providers["addmm"] = functools.partial(build, PROVIDERS["addmm"])
    if method.kind in (*_LOW_RANK, "prompt") and not options.quick:
        providers["peft"] = functools.partial(build, PROVIDERS["peft"])
    if method.kind == "adapter" and model.family == "bert" and options.device.type == "cpu" and not options.quick:
        providers["adapterhub"] = functools.partial(_adapterhub_runner, options, model, method, dtype)
    if options.compile != "none" and method.kind in _LOW_RANK:
        providers["torch.compile"] = functools.partial(build, PLAIN[method.kind], mode=options.compile)
        providers["peftkern.compile"] = functools.partial(build, ours, mode=options.compile)
    if method.kind == "lora" and model.family == "llama" and options.device.type == "cuda":
        providers["peft+liger"] = functools.partial(build, PROVIDERS["peft+liger"])
        if method.p == 0.0:
            providers["unsloth"] = functools.partial(build, PROVIDERS["unsloth"])
    config = {"method": method.kind, "targets": method.targets, "p": method.p}
    oracle = functools.partial(_reference, options, model, method, dtype)
    return _assemble(
        options, model, method.label, dtype, config, providers, oracle, _gates(options, model, method, dtype)
    )


def _gates(options: Options, model: Model, method: Method, dtype: torch.dtype) -> list[Gate]:
    """Marks on LoRA and DoRA: over the floor on the small BERT; LoRA on all linear layers over its peers on a Llama.
    A bottleneck, whose peer may be faster than the floor is, is held against that peer."""
    if method.kind == "adapter" and model.name == "bert-6x384" and options.device.type == "cpu":
        return [Gate(1.0, against="adapterhub")]
    if method.kind not in _LOW_RANK or options.quick:
        return []
    if options.device.type == "cpu":
        limit = LIMITS.get((method.label, dtype)) if model.name == "bert-6x384" else None
        return [] if limit is None else [Gate(limit)]
    if method.kind != "lora" or method.targets != "all_linear" or model.name != "llama-8b-layers":
        return []
    # The fused addmm has no dropout, so that its mark belongs to the step without.
    if method.p == 0.0:
        return [Gate(1 / 1.1, "full", "addmm")]
    return [Gate(1 / 1.3, "full", "peft"), Gate(0.8, "full", "peft", "peak")]


def _assemble(
    options: Options,
    model: Model,
    label: str,
    dtype: torch.dtype,
    config: dict[str, Any],
    providers: Mapping[str, Callable[[], Runner]],
    oracle: Callable[[], Values],
    gates: Sequence[Gate] = (),
) -> Case:
    whole = {"model": model.name, "batch": model.batch, "length": model.length, **config}
    x = ("tokens", "tokens per step", model.batch * model.length)
    label = f"{model.name} {label} {SHORT[dtype]}"
    return Case("step", label, x, whole, options.device, dtype, providers, oracle,
                lambda: _cost(options, model, dtype), gates=gates)  # fmt: skip


class _Step:
    """A model with what trains in it: `trained` maps a name that every provider shares to a parameter."""

    def __init__(self, model: Model, module: nn.Module, trained: dict[str, nn.Parameter]) -> None:
        self.call: Callable[..., Any] = module
        self.module, self.trained = module, trained
        device = next(module.parameters()).device
        self.batch = model.inputs(device)
        self.labels = self.batch.pop("labels")
        self.gate_rows = model.gate_rows

    def forward(self, rows: int | None = None) -> Tensor:
        """Cross entropy over the text's own positions, rows of a prompt cut off; `rows`: only the first so many."""
        batch, labels = {name: tensor[:rows] for name, tensor in self.batch.items()}, self.labels[:rows]
        logits = self.call(**batch).logits[:, -labels.shape[1] :]
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]).to(wide), labels.reshape(-1))

    def reset(self) -> None:
        """Forget all gradients."""
        self.module.zero_grad(set_to_none=True)

    def check(self) -> Values:
        """Loss, and gradients gathered by kind of parameter, with dropout off."""
        with _peers.evaluation(self.module):
            self.reset()
            loss = self.forward(self.gate_rows)
            loss.backward()  # type: ignore[no-untyped-call]
        missing = [name for name, p in self.trained.items() if p.grad is None]
        if missing:
            raise RuntimeError(f"{len(missing)} trained parameters have no gradient, the first is {missing[0]}")
        values = _values(loss, {name: p.grad for name, p in self.trained.items() if p.grad is not None})
        self.reset()
        return values

    def runner(self, backend: str = "", gated: bool = True) -> Runner:
        """The same as a Runner."""
        return Runner(
            self.forward, lambda loss: loss.backward(), self.check if gated else None, self.reset, backend,
            tuple(self.module.parameters()),
        )  # fmt: skip


def _values(loss: Tensor, gradients: Mapping[str, Tensor]) -> Values:
    kinds: dict[str, list[Tensor]] = {}
    for name, gradient in sorted(gradients.items()):
        kinds.setdefault(name.split(":")[-1], []).append(gradient.flatten())
    return {"loss": loss.detach()} | {f"d {kind}": torch.cat(grads) for kind, grads in kinds.items()}


def _floor(options: Options, model: Model, dtype: torch.dtype) -> Runner:
    return _floor_step(options, model, dtype).runner(gated=False)


def _floor_step(options: Options, model: Model, dtype: torch.dtype) -> _Step:
    module = model.build(options.device, dtype)
    embedding = module.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(lambda _module, _args, out: out.requires_grad_())
    return _Step(model, module, {})


def _runner(
    options: Options, model: Model, method: Method, dtype: torch.dtype, build: Build, mode: str | None = None
) -> Runner:
    """Build one provider and give its adapter the values that every provider gets."""
    step = _step(options, model, method, dtype, build)
    if mode is not None:
        step.call = torch.compile(step.module, dynamic=False, mode=mode)
    op = {"lora": "low_rank", "dora": "low_rank", "adapter": "bottleneck", "prompt": "prompt_concat"}.get(method.kind)
    return step.runner(dispatch.choose(op, options.device, dtype) if op is not None and build is ours else "")


def _step(options: Options, model: Model, method: Method, dtype: torch.dtype, build: Build) -> _Step:
    module, trained = adapted(model, method, model.build(options.device, dtype), build)
    return _Step(model, module.train(), trained)


def _adapterhub_runner(options: Options, model: Model, method: Method, dtype: torch.dtype) -> Runner:
    """The same weights and batch in another process. Its adapters have the model's dtype: it knows no other."""
    base: Any = model.build(options.device, dtype)
    job = {"config": base.config.to_diff_dict(), "state": base.state_dict(), "batch": model.inputs(options.device)}
    job |= {"labels": job["batch"].pop("labels"), "gate_rows": model.gate_rows, "dtype": dtype, "p": method.p}
    job |= {"reduction_factor": 16, "threads": torch.get_num_threads()}
    trained = adapted(model, method, base, PLAIN[method.kind])[1]
    peer = _adapterhub.Peer(job | {"trained": {name: p.detach() for name, p in trained.items()}})
    return Runner(peer.step, check=lambda: _values(*peer.check()), backend=peer.versions, sample=peer.step)


def _reference(options: Options, model: Model, method: Method, dtype: torch.dtype) -> Values:
    """Plain PyTorch in float64, on weights rounded to the dtype under test."""
    step = _step(options, model, method, dtype, PLAIN[method.kind])
    step.module.double()
    return step.check()


@functools.cache
def _cost(options: Options, model: Model, dtype: torch.dtype) -> Mapping[str, Cost]:
    """Operations of the floor's matrix products and attention, counted by PyTorch; bytes are not counted.

    PyTorch cannot count fused attention whose queries share keys: here attention is made of products.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    step = _floor_step(options, model, dtype)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = step.forward()
    with FlopCounterMode(display=False) as backward:
        loss.backward()  # type: ignore[no-untyped-call]
    return passes(Cost(forward.get_total_flops()), Cost(backward.get_total_flops()))


def _by_name(options: Options, model: Model, dtype: torch.dtype, name: str) -> Runner:
    backends = sorted({dispatch.choose(op.name, options.device, dtype) for op in every()})
    return _by_name_step(options, model, dtype, name).runner("/".join(backends))


def _by_name_step(options: Options, model: Model, dtype: torch.dtype, name: str) -> _Step:
    base = model.build(options.device, dtype)
    torch.manual_seed(0)
    pk.attach(base, registry.load(name).Config())
    trained = {f"{n}:all": p for n, p in base.named_parameters() if p.requires_grad}
    return _Step(model, base.train(), trained)


def _by_name_reference(options: Options, model: Model, dtype: torch.dtype, name: str) -> Values:
    with pk.use_backend("reference"):
        return _by_name_step(options, model, dtype, name).check()
