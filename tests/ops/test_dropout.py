"""The mask of dropout: as random as it says, a function of seed, row and column alone, and one on every backend."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from peftkern.ops._op import Op
from peftkern.ops.dropout import dropout, keep_scale, new_seed, random_bits, threshold
from peftkern.testing import relative_error

from .conftest import OPS, device_of, first, samples, skip_unless_runs, trainable

SEEDS = [0, 1, -1, 2**62 - 1, -(2**63), 1234567890123]
WITH_DROPOUT = [
    op for op in OPS if any("seed" in kwargs for _, kwargs in op.samples(torch.device("cpu"), torch.float32))
]


@pytest.fixture(params=WITH_DROPOUT, ids=lambda op: op.name)
def op(request: pytest.FixtureRequest) -> Op:
    """An op that takes p and seed."""
    return request.param


def bits_of(seed: int, rows: int, columns: int) -> Tensor:
    return random_bits(torch.tensor([seed]), rows, columns)


def kept(seed: int, rows: int, columns: int, p: float) -> Tensor:
    return bits_of(seed, rows, columns) >= threshold(p)


def assert_binomial(counts: Tensor, n: int, q: float, what: str) -> None:
    """Each of the counts is one that Binomial(n, q) could give: fails for a right mask once in 10⁵ sets of seeds.

    Chernoff: P(count beyond k) <= exp(-n KL(k/n ‖ q)), on either side, for every n.
    """
    rate = counts.double() / n
    surprise = n * (torch.xlogy(rate, rate / q) + torch.xlogy(1 - rate, (1 - rate) / (1 - q)))
    worst, allowed = float(surprise.max()), math.log(2 * counts.numel() * 1e5)
    assert worst <= allowed, f"{what}: {counts.flatten()[surprise.argmax()]} of {n}, expected {q * n:.1f}"


def assert_independent(bits: Tensor, what: str) -> None:
    """No two rows of the 0/1 matrix [V, n] agree more or less often than coins do: agreements are Binomial(n, 1/2)."""
    signs = bits.float() * 2 - 1
    n = bits.shape[1]
    agreements = (signs @ signs.T + n) / 2
    pairs = torch.triu_indices(*agreements.shape, offset=1)
    assert_binomial(agreements[pairs[0], pairs[1]], n, 0.5, what)


# The mask itself.


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", SEEDS)
def test_keep_rate(seed: int, p: float) -> None:
    mask, q = kept(seed, 600, 500, p), 1 / keep_scale(p)
    assert_binomial(mask.sum().reshape(1), mask.numel(), q, "all")
    assert_binomial(mask.sum(1), mask.shape[1], q, "a row")
    assert_binomial(mask.sum(0), mask.shape[0], q, "a column")


@pytest.mark.parametrize("p", [1e-9, 1e-5, 0.001, 0.1, 0.5, 0.9999, 1 - 1e-9])
def test_p_is_rounded_and_the_scale_with_it(p: float) -> None:
    """To 2⁻¹⁶, and never up to 1, so that the expectation stays exactly what it was."""
    dropped = threshold(p) / 2**16
    assert abs(dropped - min(p, 1 - 2**-16)) <= 2**-17
    assert keep_scale(p) == 1 / (1 - dropped)


@pytest.mark.parametrize("dim", [0, 1])
def test_counts_scatter_as_binomials_do(dim: int) -> None:
    """Neither more than chance (rows alike) nor less (a quota per row)."""
    p, mask = 0.3, kept(77, 1200, 1000, 0.3)
    n, counts = mask.shape[dim], mask.sum(dim).double()
    chi_squared = float(((counts - n * (1 - p)) ** 2 / (n * p * (1 - p))).sum())
    degrees = counts.numel()
    assert abs(chi_squared - degrees) < 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("bit", [15, 14, 13, 8, 4])
def test_rows_columns_and_neighbours_are_independent(bit: int) -> None:
    """Bit 15 is the mask of p = 1/2.

    Below bit 4 some pair of columns is not: keys that differ by a multiple of 2^(17 + bit) share the bit. That moves
    the probability that both are dropped by less than 2^-11.
    """
    bits = (bits_of(5, 400, 400) >> bit) & 1
    assert_independent(bits, "two rows")
    assert_independent(bits.T, "two columns")
    for rows, columns in ((1, 0), (0, 1), (1, 1), (2, 3), (16, 0), (0, 16), (64, 64)):
        one, two = bits[rows:, columns:], bits[: 400 - rows, : 400 - columns]
        assert_binomial((one == two).sum().reshape(1), one.numel(), 0.5, f"{rows} rows and {columns} columns away")


@pytest.mark.parametrize("p", [0.5, 0.1])
@pytest.mark.parametrize("seed", SEEDS[:3])
def test_the_mask_has_no_pattern(seed: int, p: float) -> None:
    """Beyond pairs: columns at equal steps, the corners of rectangles, and all of it at once.

    The largest singular value of a random matrix of variance 1 is √rows + √columns (Marchenko and Pastur 1967); what
    repeats or is a product of a row's and a column's part is far above.
    """
    mask, q = kept(seed, 1500, 1200, p).double(), 1 / keep_scale(p)
    x = (mask - q) / math.sqrt(q * (1 - q))
    for one in range(1, 7):
        for two in range(1, 7):
            triples = x[:, one + two :] * x[:, two:-one] * x[:, : -one - two]
            corners = x[one:, two:] * x[one:, :-two] * x[:-one, two:] * x[:-one, :-two]
            for moment in (triples, corners):
                assert abs(float(moment.sum())) < 5 * math.sqrt(moment.numel()), f"{one} and {two} apart"
    largest = float(torch.linalg.matrix_norm(x, 2)) / (math.sqrt(1500) + math.sqrt(1200))
    assert 0.98 < largest < 1.02


@pytest.mark.parametrize("bit", [15, 14, 8])
def test_seeds_that_are_near_are_independent(bit: int) -> None:
    """Consecutive ones, and those that differ in one bit."""
    consecutive = torch.stack([bits_of(seed, 20, 150).flatten() for seed in range(-40, 60)])
    assert_independent((consecutive >> bit) & 1, "two consecutive seeds")
    one_bit = torch.stack([bits_of(seed, 20, 150).flatten() for seed in (0, *(1 << shift for shift in range(63)))])
    assert_independent((one_bit >> bit) & 1, "two seeds one bit apart")


def test_random_bits_are_uniform() -> None:
    values = bits_of(9, 700, 900).flatten()
    assert int(values.min()) >= 0 and int(values.max()) < 2**16
    for shift in (8, 4, 0):
        counts = torch.bincount((values >> shift) & 255, minlength=256)
        assert_binomial(counts, values.numel(), 1 / 256, f"bits {shift} to {shift + 7}")


def test_no_row_is_another_one_reordered() -> None:
    """Two words per row: with one that is added to the column, rows whose words are near would share their bits."""
    sums = bits_of(21, 1 << 16, 64).pow(3).sum(1)
    assert sums.unique().numel() == sums.numel()


@pytest.mark.parametrize("seed", SEEDS)
def test_an_element_does_not_depend_on_the_size(seed: int) -> None:
    whole = bits_of(seed, 67, 130)
    for rows, columns in ((1, 1), (17, 130), (67, 33), (0, 5), (5, 0)):
        assert torch.equal(bits_of(seed, rows, columns), whole[:rows, :columns])


def test_dropout_scales_what_it_keeps() -> None:
    x = torch.randn(3, 5, 40, requires_grad=True)
    seed = torch.tensor([3])
    y = dropout(x, 0.25, seed)
    mask = kept(3, 15, 40, 0.25).view(3, 5, 40)
    torch.testing.assert_close(y, torch.where(mask, x / 0.75, 0.0))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, mask / 0.75, check_dtype=False)
    assert dropout(x, 0.0, None) is x


def test_seeds_come_from_the_generator_of_torch() -> None:
    torch.manual_seed(8)
    drawn = [int(new_seed(torch.device("cpu"))) for _ in range(64)]
    assert len(set(drawn)) == 64
    torch.manual_seed(8)
    assert [int(new_seed(torch.device("cpu"))) for _ in range(64)] == drawn


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_a_probability_that_is_none(op: Op, p: float) -> None:
    kwargs = next(kwargs for _, kwargs in op.samples(torch.device("cpu"), torch.float32) if "seed" in kwargs)
    with pytest.raises(ValueError, match="want 0 <= p < 1"):
        op.run(**kwargs | {"p": p})


# The mask of an op.


def probe(op: Op, kwargs: dict[str, Any], rows: int, columns: int) -> dict[str, Any]:
    """The case with ones for x and identities for its maps, so that the output is the mask times its scale.

    What is added is zero, what multiplies is one, an index chooses the first adapter.
    """
    options = inspect.signature(op.reference).parameters
    device, (main, *beside) = kwargs[op.rows[0]].device, op.rows

    def one(name: str, value: Any) -> Any:
        if name in ("seed", "p"):
            return value
        if not isinstance(value, Tensor):
            return [1.0] * len(value) if isinstance(value, list) else 1.0 if isinstance(value, float) else "relu"
        kind = {"dtype": value.dtype, "device": device}
        if not value.is_floating_point():
            return torch.zeros(rows, **kind)
        if value.dim() == 1:
            return (torch.zeros if name.endswith("bias") else torch.ones)(columns, **kind)
        if name in beside or name in op.frozen:
            return torch.zeros(rows if name in beside else columns, columns, **kind)
        return torch.ones(rows, columns, **kind) if name == main else torch.eye(columns, **kind)

    made = {name: one(name, value) for name, value in kwargs.items() if value is not None}
    return made | ({"activation": "relu"} if "activation" in options else {})


def dropping(op: Op, backend: str) -> list[tuple[str, dict[str, Any]]]:
    """The samples with dropout on the input x; what else an op drops is tested against its reference."""
    if op.rows[0] != "x":
        pytest.skip(f"{op.name} drops no element of an input")
    return [(name, kwargs) for name, kwargs in samples(op, backend, torch.float32) if kwargs.get("p")]


@pytest.mark.parametrize(("rows", "columns"), [(1, 65), (17, 33), (64, 15), (65, 64), (301, 16)])
def test_forward_and_backward_of_an_op_drop_what_the_mask_says(op: Op, backend: str, rows: int, columns: int) -> None:
    skip_unless_runs(op.name, backend)
    for (name, kwargs), seed, p in zip(dropping(op, backend) * 3, SEEDS, (0.5, 0.1, 0.9) * 2, strict=False):
        given = probe(op, kwargs, rows, columns) | {"p": p, "seed": torch.tensor([seed], device=device_of(backend))}
        main = given[op.rows[0]].requires_grad_(True)
        tied = kwargs.get("residual") is kwargs[op.rows[0]]
        given |= {"residual": main} if tied else {}
        out = first(op.run(**given))
        out.sum().backward()
        mask = kept(seed, rows, columns, p).to(out.device) * keep_scale(p) + (1.0 if tied else 0.0)
        where = f"{name}, seed {seed}, p {p}"
        torch.testing.assert_close(out, mask, check_dtype=False, msg=lambda text, at=where: f"{at}: {text}")
        torch.testing.assert_close(main.grad, mask, check_dtype=False, msg=lambda text, at=where: f"{at}, dx: {text}")


def test_a_row_keeps_its_mask_in_a_longer_batch(op: Op, backend: str) -> None:
    """The first rows of a batch come out, and get gradients, as if the others were not there."""
    skip_unless_runs(op.name, backend)
    for name, kwargs in dropping(op, backend):
        main = kwargs[op.rows[0]]
        tied = kwargs.get("residual") is main
        for count in {1, main.shape[0] // 2, main.shape[0] - 1} - {0}:
            results = []
            for cut in (slice(None), slice(count)):
                part = {k: v[cut] if k in op.rows and isinstance(v, Tensor) else v for k, v in kwargs.items()}
                part |= {op.rows[0]: part[op.rows[0]].clone().requires_grad_(True)}
                part |= {"residual": part[op.rows[0]]} if tied else {}
                out = first(op.run(**part | {"p": 0.5}))
                out.square().sum().backward()
                results.append((out[:count].detach(), part[op.rows[0]].grad[:count]))
            for whole, alone in zip(*results, strict=True):
                assert relative_error(whole, alone) < 1e-5, f"{name}: {count} of {main.shape[0]} rows"


def test_gradients_of_an_op_use_the_mask_of_its_forward(op: Op, backend: str) -> None:
    """Every gradient, for every kind of seed: the reference's, to rounding. One wrong element is 1e-3 or more off."""
    skip_unless_runs(op.name, backend)
    for name, kwargs in dropping(op, backend):
        for seed in SEEDS:
            results = []
            given = kwargs | {"p": 0.5, "seed": torch.tensor([seed], device=device_of(backend))}
            for run in (op.run, op.reference):
                leaves = {key: given[key].clone().requires_grad_(True) for key in trainable(op, given)}
                if kwargs.get("residual") is kwargs[op.rows[0]]:
                    leaves["residual"] = leaves[op.rows[0]]
                out = first(run(**given | leaves))
                out.square().sum().backward()
                results.append({"out": out} | {key: leaf.grad for key, leaf in leaves.items()})
            for key, want in results[1].items():
                assert relative_error(results[0][key], want) < 1e-5, f"{name}, seed {seed}: {key}"
