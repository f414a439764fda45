"""The peers: plain PyTorch as people write it, in-place addmm, torch.compile, Hugging Face PEFT, Unsloth and Liger.

What is not installed raises ImportError when it is built, and its row says "missing".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._clock import Runner, Values
from ._measure import FLOOR, OURS, YARDSTICK, Options


def op_providers(
    options: Options,
    floor: Callable[[], Runner],
    plain: Callable[[str | None], Runner],
    ours: Callable[[], Runner],
    light: bool = False,
) -> dict[str, Callable[[], Runner]]:
    """What every op is measured against; plain(mode) is PyTorch as people write it, mode that of torch.compile."""
    found = {FLOOR: floor, YARDSTICK: lambda: plain(None), OURS: ours}
    return found | ({} if options.compile == "none" or light else {"torch.compile": lambda: plain(options.compile)})


def normal(device: torch.device) -> Callable[..., Tensor]:
    """Draws f32 tensors of the sizes it is called with, the same ones in the same order for every case."""
    generator = torch.Generator(device).manual_seed(0)
    return lambda *size: torch.randn(*size, generator=generator, device=device)


def differentiable(
    function: Callable[[], Tensor],
    leaves: dict[str, Tensor],
    dy: Tensor,
    *,
    off: Callable[[], Tensor] | None = None,
    on: Callable[[], Tensor] | None = None,
    backend: str = "",
    parameters: tuple[Tensor, ...] = (),
) -> Runner:
    """Times function() and the gradients of `leaves` for the upstream gradient dy.

    `off` is the same with dropout off, for the gate; `on` the same with the gate's own dropout seed, where the provider
    can be given one. Without `off` the provider is not gated.
    """
    tensors = list(leaves.values())

    def backward(y: Tensor) -> None:
        torch.autograd.grad(y, tensors, dy)

    def check() -> Values:
        values = evaluate(off, leaves, dy) if off is not None else {}
        return values | ({f"{key}/dropout": v for key, v in evaluate(on, leaves, dy).items()} if on is not None else {})

    return Runner(function, backward, check if off is not None else None, backend=backend, parameters=parameters)


def evaluate(function: Callable[[], Tensor], leaves: dict[str, Tensor], dy: Tensor) -> Values:
    """Output "y" and gradients "d NAME"."""
    y = function()
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | {f"d {name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def inference(function: Callable[[], Tensor], gated: bool = True, backend: str = "") -> Runner:
    """Times function() without a graph."""

    def forward() -> Tensor:
        with torch.no_grad():
            return function()

    return Runner(forward, None, (lambda: {"y": forward()}) if gated else None, backend=backend)


def leaves(t: Mapping[str, Tensor], names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of these tensors that require grad, in a dtype of their own or in this one."""
    return {name: leaf(t[name] if dtype is None else t[name].to(dtype)) for name in names}


def leaf(tensor: Tensor) -> Tensor:
    """A copy that requires grad."""
    return tensor.detach().clone().requires_grad_()


class LoraLinear(nn.Module):
    """base(x) + s · B(A(drop(x))): the textbook module; the update runs in the adapter's dtype, as in PEFT."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scale: float, p: float) -> None:
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, nn.Dropout(p)
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        h = F.linear(self.dropout(x.to(self.a.dtype)), self.a)
        return y + (self.scale * F.linear(h, self.b)).to(y.dtype)


class DoraLinear(LoraLinear):
    """bias + m / ‖W + s · BA‖ ⊙ (W x + s · B(A(drop(x)))), the norm detached: the paper's formula, in eager PyTorch."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scale: float, p: float) -> None:
        super().__init__(base, a, b, scale, p)
        self.magnitude = nn.Parameter(base.weight.detach().to(a.dtype).norm(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        norm = (self.base.weight + self.scale * (self.b @ self.a)).detach().norm(dim=1)
        h = F.linear(self.dropout(x.to(self.a.dtype)), self.a)
        z = F.linear(x, self.base.weight) + self.scale * F.linear(h, self.b)
        y = (self.magnitude / norm * z).to(x.dtype)
        return y if self.base.bias is None else y + self.base.bias


class AddmmLoraLinear(LoraLinear):
    """The same without dropout, as one autograd function with in-place addmm_, in the dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        y: Tensor = _Addmm.apply(  # type: ignore[no-untyped-call]
            x, self.base.weight, self.base.bias, a, b, self.scale
        )
        return y


class _Addmm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = F.linear(rows, weight, bias)
        y.addmm_(rows @ a.T, b.T, alpha=scale)
        ctx.save_for_backward(rows, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1])
        dh = dy @ b
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(dh, a, alpha=ctx.scale).view(ctx.shape)
        return dx, None, None, (dh.T @ rows).mul_(ctx.scale), (dy.T @ (rows @ a.T)).mul_(ctx.scale), None


class UnslothLoraLinear(LoraLinear):
    """Unsloth's own autograd function over the same weights: no dropout and no bias, x [batch, length, K]."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor, scale: float, p: float) -> None:
        from unsloth.kernels.fast_lora import LoRA_W

        if base.bias is not None or p > 0:
            raise ValueError("Unsloth's fused LoRA has neither bias nor dropout")
        super().__init__(base, a, b, scale, p)
        self.apply_lora: Callable[..., Tensor] = LoRA_W.apply

    def forward(self, x: Tensor) -> Tensor:
        batched = x if x.dim() == 3 else x[None]
        return self.apply_lora(batched, self.base.weight, None, self.a, self.b, self.scale).view(*x.shape[:-1], -1)


class BottleneckLinear(nn.Module):
    """y + U(relu(D y + b_d)) + b_u after a linear layer: the textbook module, in the adapter's dtype."""

    def __init__(self, base: nn.Linear, r: int, p: float, dtype: torch.dtype) -> None:
        super().__init__()
        n, device = base.out_features, base.weight.device
        self.base, self.dropout = base, nn.Dropout(p)
        self.down = nn.Parameter(torch.empty(r, n, device=device, dtype=dtype))
        self.down_bias = nn.Parameter(torch.zeros(r, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(n, r, device=device, dtype=dtype))
        self.up_bias = nn.Parameter(torch.zeros(n, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        z = F.relu(F.linear(y.to(self.down.dtype), self.down, self.down_bias))
        out: Tensor = y + self.dropout(F.linear(z, self.up, self.up_bias)).to(y.dtype)
        return out


class PromptModel(nn.Module):
    """[P; x]: embeddings looked up outside the model, the prompt put before them by torch.cat, the mask extended."""

    def __init__(self, model: nn.Module, length: int) -> None:
        super().__init__()
        self.model = model
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
        self.prompt = nn.Parameter(torch.empty(length, weight.shape[1], device=weight.device))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        embeds = self.model.get_input_embeddings()(input_ids)  # type: ignore[operator]
        rows = self.prompt.to(embeds.dtype).expand(len(embeds), -1, -1)
        mask = torch.cat([attention_mask.new_ones(rows.shape[:2]), attention_mask], 1)
        return self.model(inputs_embeds=torch.cat([rows, embeds], 1), attention_mask=mask)


def peft_model(model: nn.Module, kind: str, **options: Any) -> nn.Module:
    """Hugging Face PEFT's model for its configuration class `kind`; ImportError when peft is not installed."""
    import peft

    wrapped: nn.Module = peft.get_peft_model(model, getattr(peft, kind)(**options))
    return wrapped


def peft_linear(linear: nn.Linear, a: Tensor, b: Tensor, scale: float, p: float) -> tuple[nn.Module, Tensor, Tensor]:
    """PEFT's LoRA over one linear layer: the layer, its A and its B."""
    r = a.shape[0]
    holder = nn.Sequential()
    holder.add_module("proj", linear)
    wrapped = peft_model(
        holder, "LoraConfig", r=r, lora_alpha=scale * r, lora_dropout=p, target_modules=["proj"], bias="none"
    )
    layer = wrapped.get_submodule("base_model.model.proj").train()
    weights = layer.get_parameter("lora_A.default.weight"), layer.get_parameter("lora_B.default.weight")
    for parameter, value in zip(weights, (a, b), strict=True):
        parameter.data = value.detach().clone()
    return layer, *weights


def with_liger(model: nn.Module) -> nn.Module:
    """The Llama model with Liger's RMS norms and SwiGLU in place, this instance only; it has no kernels of adapters."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    from liger_kernel.transformers.rms_norm import LigerRMSNorm
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    for path, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = LigerRMSNorm(module.weight.shape[0], eps=module.variance_epsilon)
            norm.weight = module.weight
            model.set_submodule(path, norm)
        elif isinstance(module, LlamaMLP):

            def forward(x: Tensor, mlp: Any = module) -> Tensor:
                y: Tensor = mlp.down_proj(LigerSiLUMulFunction.apply(mlp.gate_proj(x), mlp.up_proj(x)))
                return y

            module.forward = forward  # type: ignore[method-assign]
    return model


def compiled(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    """torch.compile, one graph, shapes fixed; the function itself without a mode."""
    if mode is None:
        return function
    found: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, mode=mode)
    return found


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Inside the block the module is in evaluation mode, so that dropout is off."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
