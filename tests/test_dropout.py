"""Dropout from a seed: what is dropped is a Bernoulli draw for each entry, and nothing of it is stored."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lora.dropout import draw_seed, dropout, dropout_reference, dropped, seedable

LIKELY = [0.001, 0.05, 0.25, 0.3, 0.9]  # up to 0.25 gaps are drawn, beyond it bits


def masks(n: int, p: float, seeds: int) -> Tensor:
    """(seeds, n), true where dropped."""
    rows = torch.zeros(seeds, n, dtype=torch.bool)
    x = torch.empty(n)
    for seed, row in enumerate(rows):
        where = dropped(x, p, seed)
        row.copy_(where) if where.dtype is torch.bool else row.index_fill_(0, where, True)
    return rows


def assert_rate(hits: Tensor | float, draws: int, rate: float) -> None:
    """Within 5 standard deviations of a binomial (and one), each."""
    slack = 5 * math.sqrt(draws * rate * (1 - rate)) + 1
    assert (torch.as_tensor(hits, dtype=torch.float64) - draws * rate).abs().max() <= slack


@pytest.mark.parametrize("p", LIKELY)
def test_each_entry_is_dropped_with_probability_p_whatever_the_others(p: float) -> None:
    n, seeds = 500, 1500
    drop = masks(n, p, seeds)
    assert_rate(drop.sum(), seeds * n, p)
    assert_rate(drop.sum(0), seeds, p)  # each place: the first and the last as well
    counts = drop.sum(1).double()  # of a seed: binomial, so the variance is n·p·(1 − p) too
    variance, fourth = n * p * (1 - p), 1 + (1 - 6 * p * (1 - p)) / (n * p * (1 - p)) / 2
    assert abs(counts.var().item() / variance - 1) <= 5 * math.sqrt(2 * fourth / seeds)
    for distance in (1, 2, 16, 64):
        pairs = drop[:, distance:] & drop[:, :-distance]
        assert_rate(pairs.sum(), pairs.numel(), p * p)
    assert_rate((drop[1:] & drop[:-1]).sum(), (seeds - 1) * n, p * p)  # one seed and the next


def test_gaps_are_geometric() -> None:
    p, n = 0.05, 400_000
    where = dropped(torch.empty(n), p, 3)
    gaps = where.diff()
    assert gaps.min() >= 1
    for gap in (1, 2, 3, 20, 60):
        assert_rate((gaps == gap).sum(), len(gaps), p * (1 - p) ** (gap - 1))
    assert_rate((gaps > 100).sum(), len(gaps), (1 - p) ** 100)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3000), st.floats(1e-300, 0.25), st.integers(0, 2**63 - 1))
def test_places_are_within_ascending_and_the_seeds(n: int, p: float, seed: int) -> None:
    where = dropped(torch.empty(n), p, seed)
    assert torch.equal(where, dropped(torch.empty(n), p, seed))
    assert where.dtype is torch.int64
    assert (where.diff() > 0).all()
    assert ((where >= 0) & (where < n)).all()


def test_few_draws_are_continued_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the first draw had fallen short."""
    from hf_lora import dropout as room

    monkeypatch.setattr(room.math, "sqrt", lambda expected: -expected / 8)  # half of what is expected
    where = dropped(torch.empty(20_000), 0.1, 1)
    assert where[-1] > 19_800
    assert (where.diff() > 0).all()
    assert abs(len(where) - 2000) < 5 * 43


@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_rest_is_divided_by_what_is_kept(p: float, dtype: torch.dtype) -> None:
    x = torch.randn(40, 50, dtype=torch.float64).to(dtype).t().requires_grad_()
    torch.manual_seed(4)
    y = dropout(x, p)
    torch.manual_seed(4)
    reference = dropout_reference(x, p, draw_seed())
    assert torch.equal(y == 0, reference == 0)
    assert 0 < (y == 0).sum() < x.numel()
    torch.testing.assert_close(y, reference)
    g = torch.randn_like(y)
    assert [t.shape for t in torch.autograd.grad(y, x, g)] == [x.shape]
    torch.testing.assert_close(torch.autograd.grad(dropout(x, 0.0), x, g)[0], g)
    torch.manual_seed(4)
    found = torch.autograd.grad(dropout(x, p), x, g)
    torch.testing.assert_close(found, torch.autograd.grad(reference, x, g))


def test_derivatives_of_any_order() -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(4)
        return dropout(x, 0.2)

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


def test_the_seed_is_torchs_own_and_each_call_has_another() -> None:
    x = torch.ones(1000)
    torch.manual_seed(7)
    first, second = dropout(x, 0.1), dropout(x, 0.1)
    torch.manual_seed(7)
    assert torch.equal(dropout(x, 0.1), first)
    assert not torch.equal(first, second)
    with torch.device("meta"):  # whatever the default device is
        assert isinstance(draw_seed(), int)


def test_nothing_is_saved() -> None:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        dropout(torch.ones(10, requires_grad=True), 0.1)
    assert saved == []


def test_what_has_no_numbers_takes_torchs_own() -> None:
    meta = torch.empty(3, 4, device="meta")
    assert not seedable(meta)
    assert dropout(meta, 0.1).shape == (3, 4)
    x = torch.ones(5, 400)
    many = torch.func.vmap(lambda row: dropout(row, 0.5), randomness="different")(x)
    assert not torch.equal(many[0], many[1])
    tangent = torch.autograd.forward_ad
    with tangent.dual_level():
        y = tangent.unpack_dual(dropout(tangent.make_dual(x, 3 * x), 0.5))
    assert torch.equal(y.tangent, 3 * y.primal)
    exported = torch.fx.experimental.proxy_tensor.make_fx(lambda t: dropout(t, 0.5), tracing_mode="fake")(x)
    assert not torch.equal(exported(x), exported(x))  # the mask is no constant of the graph
