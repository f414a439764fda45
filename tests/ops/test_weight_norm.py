"""weight_norm where it is hard, and when its cache computes again."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkern as pk
from peftkern.ops import NormCache, weight_norm
from peftkern.ops.weight_norm import reference
from peftkern.testing import relative_error

from .conftest import device_of, skip_unless_runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_an_update_that_nearly_undoes_the_weight(backend: str, dtype: torch.dtype, transposed: bool) -> None:
    """What is left is a thousandth: the factored form would keep hardly a digit of its square."""
    skip_unless_runs("weight_norm", backend, dtype)
    device = device_of(backend)
    a, b = torch.randn(4, 120, device=device), torch.randn(31, 4, device=device)
    weight = (1e-3 * torch.randn(31, 120, device=device) - 0.5 * b @ a).to(dtype)
    if transposed:
        weight = weight.T.contiguous().T
    want = reference(weight.double(), a.double(), b.double(), scale=0.5)
    own = relative_error(reference(weight, a, b, scale=0.5), want)
    assert relative_error(weight_norm(weight, a, b, scale=0.5), want) <= 2 * own + 1e-7


def test_nothing_as_large_as_the_weight_is_made(backend: str) -> None:
    skip_unless_runs("weight_norm", backend)
    if backend == "reference":
        pytest.skip("reference: the sum is built")
    from .test_all_ops import _WideAllocations

    weight = torch.randn(96, 128, device=device_of(backend))
    a, b = (torch.randn(4, 128, device=weight.device).requires_grad_(), torch.randn(96, 4, device=weight.device))
    for view in (weight, weight.T.contiguous().T):
        with _WideAllocations(weight.numel()) as mode:
            weight_norm(view, a, b).sum().backward()
        views = ("aten.t.", "aten.detach.", "aten.transpose.", "aten.alias.", "aten.permute.", "aten.set_.")
        assert not [name for name in mode.seen if not name.startswith(views)]


def test_shapes_that_do_not_chain() -> None:
    with pytest.raises(ValueError, match=r"a \(2, 5\).*want weight \[N, K\]"):
        weight_norm(torch.ones(3, 4), torch.ones(2, 5), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"b \(4, 2\): want weight \[N, K\]"):
        weight_norm(torch.ones(3, 4), torch.ones(2, 4), torch.ones(4, 2))


class Case:
    """W, A, B and a cache, whose answer is compared with a fresh one at every call."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.randn(6, 8), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(6, 2))
        self.cache = NormCache()
        self()

    def __call__(self, scale: float = 1.0) -> Tensor:
        norm = self.cache(self.weight, self.a, self.b, scale=scale)
        assert not norm.requires_grad
        torch.testing.assert_close(norm, reference(self.weight, self.a, self.b, scale=scale).detach())
        return norm

    def computes(self) -> bool:
        before = self.cache.computed
        self()
        return self.cache.computed > before


@pytest.fixture
def case() -> Case:
    return Case()


def test_unchanged_tensors_are_not_computed_again(case: Case) -> None:
    assert not case.computes()
    with torch.no_grad():
        assert not case.computes()
    with torch.inference_mode():
        assert not case.computes()
    case(scale=2.0)
    assert case.cache.computed == 2


@pytest.mark.parametrize("name", ["weight", "a", "b"])
def test_every_change_is_seen(case: Case, name: str) -> None:
    tensor: nn.Parameter = getattr(case, name)
    with torch.no_grad():
        tensor.mul_(2.0)
    assert case.computes()
    tensor.data = torch.randn_like(tensor)
    assert case.computes()
    holder = nn.Module()
    holder.p = tensor
    holder.load_state_dict({"p": torch.randn(tensor.shape)})
    assert case.computes()
    setattr(case, name, nn.Parameter(torch.randn(tensor.shape)))
    assert case.computes()
    assert not case.computes()


def test_a_new_tensor_at_an_old_address_is_seen(case: Case) -> None:
    """The allocator gives freed memory out again; the address and the version counter then are those of before."""
    for _ in range(20):
        case.a.data = torch.zeros(0)
        gc.collect()
        case.a.data = torch.randn(2, 8)
        assert case.computes()


def test_to_another_dtype_and_back_is_seen(case: Case) -> None:
    case.weight.data = case.weight.data.to(torch.bfloat16)
    assert case.computes()
    case.weight.data = case.weight.data.to(torch.float32)
    assert case.computes()


def test_a_step_through_data_is_seen_by_the_dropped_gradients(case: Case) -> None:
    for _ in range(2):
        (case.a.sum() + case.b.sum()).backward()
        assert not case.computes()
    case.a.data.add_(1.0)
    case.a.grad = case.b.grad = None
    assert case.computes()
    assert not case.computes()


def test_the_cache_keeps_no_tensor_alive_and_copies_start_empty(case: Case) -> None:
    import weakref

    dead = weakref.ref(case.weight)
    storage = torch.multiprocessing.reductions.StorageWeakRef(case.weight.untyped_storage())
    for other in (copy.deepcopy(case.cache), pickle.loads(pickle.dumps(case.cache))):
        assert other.computed == 0 and other._kept is None
        other(case.weight, case.a, case.b)
        assert other.computed == 1
    case.weight = nn.Parameter(torch.randn(6, 8))
    gc.collect()
    assert dead() is None and storage.expired()


def test_a_norm_of_inference_mode_is_not_used_in_training(case: Case) -> None:
    case.cache.clear()
    with torch.inference_mode():
        case()
        assert not case.computes()
    (case.a.sum() / case()).sum().backward()
    with torch.inference_mode():
        made = [torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)]
        first = case.cache(*made).clone()
        made[0].mul_(3.0)  # counts no version
        assert not torch.equal(case.cache(*made), first)


def dora(**fields) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    config = pk.LoraConfig(use_dora=True, target_modules=["0"], init_lora_weights=False, **fields)
    pk.attach(model, config)
    return model.train(), model[0].adapters["default"]


def test_training_computes_once_per_step() -> None:
    """Micro-steps of an accumulation, replays of checkpointing and evaluation share one computation."""
    model, adapter = dora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    counts = []
    for reentrant in (True, False):
        before = adapter.norms.computed
        for _ in range(3):
            x = torch.randn(4, 8, requires_grad=True)
            checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
            model(x).square().sum().backward()
        counts.append(adapter.norms.computed - before)
        optimizer.step()
        optimizer.zero_grad()
    assert counts == [1, 1]
    model.eval()
    before = adapter.norms.computed
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 8))
    assert adapter.norms.computed == before + 1


def test_compile_computes_in_one_graph_without_recompiling() -> None:
    model, adapter = dora()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    before = adapter.norms.computed
    x = torch.randn(4, 8)
    for _ in range(3):
        got = compiled(x)
        with torch.no_grad():
            adapter.a.add_(0.1)
        want = compiled(x)
        assert not torch.allclose(got, want)
        torch.testing.assert_close(want, model(x))
    assert counter.frame_count == 1
    assert adapter.norms.computed == before + 3, "compiled calls do not touch the cache"
