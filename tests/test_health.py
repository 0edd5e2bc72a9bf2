"""The spectrum of ΔW from its factors, and what is odd about an adapter: against dense float64 and by construction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_lora import LoRAConfig, LoRAMismatchError
from hf_lora.health import examine, parts_of, require_publishable
from hf_lora.spectrum import delta_norm, effective_rank, parts, singular_values
from hf_lora.values import AdapterValue, Block, Factors


def dense(factors: Factors) -> Tensor:
    """ΔW in float64, by the definition."""
    scaling = factors.alpha / (math.sqrt(factors.rank) if factors.use_rslora else factors.rank)
    return factors.B.double() @ factors.A.double() * scaling


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def value(**factors: Factors) -> AdapterValue:
    return AdapterValue(LoRAConfig(r=4, target_modules=sorted(factors)), factors)


def healthy(rank: int = 4, seed: int = 0) -> Factors:
    return Factors("linear", normal(rank, 9, seed=seed), normal(7, rank, seed=seed + 1), 3.0)


# ---- the spectrum ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 9),
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 12),
    scale=st.floats(1e-6, 1e6),
    rslora=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 999),
)
def test_the_spectrum_is_that_of_the_dense_change(
    rank: int, inputs: int, outputs: int, scale: float, rslora: bool, dtype: torch.dtype, seed: int
) -> None:
    A = normal(rank, inputs, seed=seed, dtype=dtype)
    B = normal(outputs, rank, seed=seed + 1, dtype=dtype)
    factors = Factors("linear", A, B, scale, rslora)
    expected = torch.linalg.svdvals(dense(factors))
    found = singular_values(factors)
    assert (found.dtype, tuple(found.shape)) == (torch.float64, (min(rank, inputs, outputs),))
    assert bool((found[:-1] >= found[1:]).all())
    largest = float(expected[0])
    torch.testing.assert_close(found, expected[: len(found)], rtol=1e-9, atol=1e-12 * largest)
    assert float(expected[len(found) :].sum()) <= 1e-10 * largest  # there are no more
    norm = float(torch.linalg.matrix_norm(dense(factors)))
    assert math.isclose(delta_norm(factors), norm, rel_tol=1e-9)
    assert math.isclose(float(found.square().sum().sqrt()), norm, rel_tol=1e-9)


@pytest.mark.parametrize("sigmas", [(5.0, 3.0, 0.25), (1.0, 1e-7, 1e-7), (2.0, 0.0, 0.0), (1e3, 1e3, 1e-3)])
def test_a_spectrum_that_was_put_in(sigmas: tuple[float, ...]) -> None:
    """Small singular values beside large ones are those that were put in, not what squaring leaves of them."""
    left, right = (torch.linalg.qr(normal(20, 3, seed=s, dtype=torch.float64)).Q for s in (1, 2))
    root = torch.tensor(sigmas, dtype=torch.float64).sqrt()
    factors = Factors("linear", (right * root).T.contiguous(), left * root, 6.0)  # scaling 2
    expected = 2 * torch.tensor(sigmas, dtype=torch.float64)
    torch.testing.assert_close(singular_values(factors), expected, rtol=1e-8, atol=1e-12)
    assert math.isclose(delta_norm(factors), float(expected.norm()), rel_tol=1e-12)


def test_ranks_above_the_sizes() -> None:
    factors = Factors("linear", normal(16, 3), normal(5, 16), 8.0)
    assert len(singular_values(factors)) == 3
    torch.testing.assert_close(singular_values(factors), torch.linalg.svdvals(dense(factors)))


def test_an_embedding() -> None:
    factors = Factors("embedding", normal(4, 50), normal(8, 4), 8.0)
    torch.testing.assert_close(singular_values(factors), torch.linalg.svdvals(dense(factors))[:4])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], 1.0),
        ([2.0, 2.0], 2.0),
        ([1.0] * 7, 7.0),
        ([5.0, 0.0, 0.0], 1.0),
        ([1e-300, 1e-300], 2.0),
        ([0.0, 0.0], 0.0),
        ([], 0.0),
        ([3.0, 1.0], math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))),
    ],
)
def test_effective_rank(values: list[float], expected: float) -> None:
    assert math.isclose(effective_rank(torch.tensor(values, dtype=torch.float64)), expected, rel_tol=1e-12)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=8), factor=st.floats(1e-3, 1e3))
def test_effective_rank_lies_between_one_and_the_rank_and_knows_no_scale(values: list[float], factor: float) -> None:
    sigmas = torch.tensor(values, dtype=torch.float64)
    found = effective_rank(sigmas)
    if float(sigmas.sum()) < 1e-200:
        return
    assert 1 - 1e-9 <= found <= len(values) + 1e-9
    assert math.isclose(found, effective_rank(sigmas * factor), rel_tol=1e-9)


# ---- fused layers ----------------------------------------------------------------------------------------------------


def fused(*, rslora: bool = False, parts: Any = None) -> Factors:
    """q and v of a layer of 12 rows in an interleaved order, rank 4 each."""
    blocks = (Block("q", (range(2), range(6, 8))), Block("v", (range(3, 6), range(9, 12))))
    made = parts or [(normal(4, 9, seed=1), normal(4, 4, seed=2)), (normal(4, 9, seed=3), normal(6, 4, seed=4))]
    return Factors.stack(
        [(block, a, b) for block, (a, b) in zip(blocks, made, strict=True)],
        out_features=12,
        alpha=6.0,
        use_rslora=rslora,
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_a_roles_part_is_its_rows_of_the_dense_change(rslora: bool) -> None:
    factors = fused(rslora=rslora)
    whole = dense(factors)
    torch.testing.assert_close(singular_values(factors), torch.linalg.svdvals(whole)[:8])
    found = dict(parts(factors))
    assert set(found) == {"q", "v"}
    for block in factors.blocks:
        rows = torch.cat([torch.arange(span.start, span.stop) for span in block.rows])
        own = found[block.role]
        torch.testing.assert_close(dense(own), whole[rows])
        torch.testing.assert_close(singular_values(own), torch.linalg.svdvals(whole[rows])[: own.rank])
    total = math.sqrt(sum(delta_norm(part) ** 2 for part in found.values()))
    assert math.isclose(total, delta_norm(factors), rel_tol=1e-9)


def test_a_whole_layer_is_one_part() -> None:
    factors = healthy()
    assert parts(factors) == [("", factors)]


# ---- what is odd -----------------------------------------------------------------------------------------------------


def kinds(adapter: AdapterValue) -> list[tuple[str, bool]]:
    return [(finding.kind, finding.fatal) for finding in examine(adapter)]


def test_a_healthy_adapter_has_no_findings() -> None:
    adapter = value(a=healthy(), b=healthy(seed=5), c=fused())
    assert examine(adapter) == ()
    require_publishable(adapter)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["A", "B"])
def test_one_number_that_is_none(bad: float, side: str) -> None:
    factors = healthy()
    getattr(factors, side)[2, 3] = bad
    adapter = value(good=healthy(), bad=factors)
    (finding,) = examine(adapter)
    assert (finding.kind, finding.where, finding.fatal) == ("non-finite", (f"bad.{side}",), True)
    assert f"bad.{side}" in finding.message
    with pytest.raises(LoRAMismatchError, match="bad") as caught:
        require_publishable(adapter)
    assert "force" in str(caught.value)


def test_a_bias_a_head_or_a_copied_embedding_that_is_none() -> None:
    config = LoRAConfig(r=4, target_modules=["a"], bias="lora_only", modules_to_save=["head"])
    nan = torch.tensor([1.0, math.nan])
    for more, where in [
        ({"biases": {"a.bias": nan}}, "a.bias"),
        ({"modules": {"head": {"weight": nan}}}, "head.weight"),
        ({"embeddings": {"e.weight": nan}}, "e.weight"),
    ]:
        (finding,) = examine(AdapterValue(config, {"a": healthy()}, **more))
        assert (finding.kind, finding.where) == ("non-finite", (where,))
    whole = AdapterValue(config, {"a": healthy()}, modules={"head": {"count": torch.tensor(3)}})
    assert examine(whole) == ()


def still(side: str = "B") -> Factors:
    factors = healthy()
    getattr(factors, side).zero_()
    return factors


@pytest.mark.parametrize("side", ["A", "B"])
def test_an_adapter_that_was_never_trained(side: str) -> None:
    adapter = value(a=still(side), b=still(side))
    (finding,) = examine(adapter)
    assert (finding.kind, finding.where, finding.fatal) == ("untouched", ("a", "b"), True)
    with pytest.raises(LoRAMismatchError, match="never trained"):
        require_publishable(adapter)


def test_an_untouched_adapter_with_a_trained_head_is_of_use() -> None:
    config = LoRAConfig(r=4, target_modules=["a"], modules_to_save=["head"])
    adapter = AdapterValue(config, {"a": still()}, modules={"head": {"weight": torch.ones(2, 2)}})
    assert kinds(adapter) == [("partly untouched", False)]
    require_publishable(adapter)


def test_layers_that_were_not_trained_are_named() -> None:
    (finding,) = examine(value(a=still(), b=healthy(), c=still()))
    assert (finding.kind, finding.where, finding.fatal) == ("partly untouched", ("a", "c"), False)
    assert "2 of 3" in finding.message


def test_a_role_of_a_fused_layer_that_was_not_trained() -> None:
    q, v = (normal(4, 9, seed=1), normal(4, 4, seed=2)), (normal(4, 9, seed=3), torch.zeros(6, 4))
    (finding,) = examine(value(c=fused(parts=[q, v])))
    assert (finding.kind, finding.where) == ("partly untouched", ("c (v)",))


def one_direction(rank: int, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    A, B = torch.zeros(rank, 9), torch.zeros(7, rank)
    A[0], B[:, 0] = normal(9), normal(7, seed=1)
    return A + noise * normal(rank, 9, seed=2), B + noise * normal(7, rank, seed=3)


def test_a_collapsed_layer() -> None:
    adapter = value(flat=Factors("linear", *one_direction(4), 4.0), good=healthy())
    (finding,) = examine(adapter)
    assert (finding.kind, finding.where, finding.fatal) == ("collapsed", ("flat",), False)
    require_publishable(adapter)
    # Not where the rank asks for little, nor where there are other directions.
    assert examine(value(small=Factors("linear", *one_direction(3), 4.0), good=healthy())) == ()
    assert examine(value(noisy=Factors("linear", *one_direction(4, 0.3), 4.0))) == ()


def test_a_collapsed_role_of_a_fused_layer() -> None:
    """Two roles, of which one has one direction: together their effective rank would be far from one."""
    q, v = (normal(4, 9, seed=1), normal(4, 4, seed=2)), (normal(4, 9, seed=3), normal(6, 1, seed=4) @ normal(1, 4))
    (finding,) = examine(value(c=fused(parts=[q, v])))
    assert (finding.kind, finding.where) == ("collapsed", ("c (v)",))


def test_known_spectra_are_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = value(flat=Factors("linear", *one_direction(4), 4.0), c=fused())
    spectra = {key: singular_values(part) for key, part in parts_of(adapter).items()}
    expected = examine(adapter)
    monkeypatch.setattr("hf_lora.health.singular_values", lambda _: pytest.fail("computed again"))
    assert examine(adapter, spectra) == expected != ()


@settings(max_examples=40, deadline=None)
@given(zero=st.lists(st.booleans(), min_size=1, max_size=6), flat=st.lists(st.booleans(), min_size=6, max_size=6))
def test_every_odd_layer_is_named_and_no_other(zero: list[bool], flat: list[bool]) -> None:
    factors = {}
    for i, is_zero in enumerate(zero):
        A, B = one_direction(4) if flat[i] else (normal(4, 9, seed=i), normal(7, 4, seed=i + 9))
        factors[f"l{i}"] = Factors("linear", A.clone(), B.clone() * (0 if is_zero else 1), 4.0)
    found = {finding.kind: set(finding.where) for finding in examine(value(**factors))}
    names = {f"l{i}" for i, is_zero in enumerate(zero) if is_zero}
    if all(zero):
        assert found == {"untouched": names}
        return
    collapsed = {f"l{i}" for i, is_zero in enumerate(zero) if flat[i] and not is_zero}
    expected = {"partly untouched": names, "collapsed": collapsed}
    assert found == {kind: where for kind, where in expected.items() if where}
