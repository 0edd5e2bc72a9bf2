"""`hf_lora.analysis` against numbers by hand and dense float64 formulas."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import randomise

import hf_lora
from hf_lora import (
    LoRAAdapter,
    LoRAConfig,
    LoRAConfigError,
    LoRAError,
    LoRAFileError,
    LoRAMismatchError,
    LoRANameError,
    LoRAStateError,
    LoRATargetError,
    LoRAUnsupportedError,
)
from hf_lora.analysis import (
    amplification_factor,
    effective_rank,
    intruder_dimensions,
    overlap,
    random_similarity,
    report,
    spectrum,
    subspace_similarity,
    suggested_rank,
)
from hf_lora.values import Factors

Q = "layers.0.q_proj"


def adapter(*pairs: tuple[Any, Any], alpha: float | None = None, paths: tuple[str, ...] = ()) -> LoRAAdapter:
    """An adapter with these (A, B), layer by layer; scaling is 1 unless alpha is given."""
    factors = {}
    for number, (a, b) in enumerate(pairs):
        a, b = (torch.as_tensor(np.asarray(each)) for each in (a, b))
        path = paths[number] if paths else f"layers.{number}.q_proj"
        factors[path] = Factors("linear", a, b, alpha or a.shape[0])
    return LoRAAdapter(LoRAConfig(r=1, target_modules=["q_proj"]), factors)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def pair(r: int, inputs: int, outputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    return gaussian(r, inputs, seed=seed), gaussian(outputs, r, seed=seed + 1000)


def dense(factors: Factors) -> np.ndarray:
    return factors.scaling * (factors.B.double().numpy() @ factors.A.double().numpy())


def basis(n: int, *axes: int, values: tuple[float, ...] = ()) -> np.ndarray:
    """Rows along axes, of falling lengths unless `values` says otherwise."""
    made = np.zeros((len(axes), n))
    for row, axis in enumerate(axes):
        made[row, axis] = values[row] if values else len(axes) - row
    return made


def phi(u1: np.ndarray, u2: np.ndarray) -> np.ndarray:
    """The paper's equation, entry by entry; directions are columns."""
    shape = (u1.shape[1], u2.shape[1])
    return np.array(
        [
            [np.linalg.norm(u1[:, :i].T @ u2[:, :j]) ** 2 / min(i, j) for j in range(1, shape[1] + 1)]
            for i in range(1, shape[0] + 1)
        ]
    )


# ---- subspace similarity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["factors", "delta"])
@pytest.mark.parametrize("side", ["A", "B"])
def test_phi_is_the_papers_equation(side: str, of: str) -> None:
    a, b = adapter(pair(3, 11, 7, 0), pair(3, 11, 7, 1)), adapter(pair(5, 11, 7, 2), pair(2, 11, 7, 3))
    found = subspace_similarity(a, b, side=side, of=of)
    assert (found.side, found.of, len(found)) == (side, of, 2)
    for layer in found:
        directions = []
        for value in (a, b):
            f = value.factors[layer.path]
            matrix = dense(f) if of == "delta" else (f.A if side == "A" else f.B).numpy()
            u, _, vt = np.linalg.svd(matrix, full_matrices=False)
            directions.append((vt.T if side == "A" else u)[:, : f.rank])
        expected = phi(*directions)
        assert layer.phi.dtype == np.float64
        np.testing.assert_allclose(layer.phi, expected, atol=1e-12)
        assert layer.features == (11 if side == "A" else 7)
        assert layer.role == "q"
    assert found.layers[0].phi.shape == (3, 5)
    assert found.layers[1].phi.shape == (3, 2)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 1), (0, 1), [[1, 1], [1, 1]]),  # equal
        ((0, 1), (2, 3), [[0, 0], [0, 0]]),  # orthogonal
        ((0, 1), (1, 0), [[0, 1], [1, 1]]),  # the same plane, the directions in another order
        ((0,), (3, 0, 2), [[0, 1, 1]]),  # a line in a space
        ((0, 1), (0, 2, 1), [[1, 1, 1], [1, 0.5, 1]]),
        ((0, 1, 2), (0, 4), [[1, 1], [1, 0.5], [1, 0.5]]),  # half of the smaller one
    ],
)
@pytest.mark.parametrize("side", ["A", "B"])
def test_subspaces_along_axes(
    first: tuple[int, ...], second: tuple[int, ...], expected: list[list[float]], side: str
) -> None:
    def along(axes: tuple[int, ...]) -> LoRAAdapter:
        ours, other = basis(6, *axes), gaussian(len(axes), 6, seed=len(axes))
        return adapter((ours, other.T) if side == "A" else (other, ours.T))

    np.testing.assert_allclose(subspace_similarity(along(first), along(second), side=side)[Q].phi, expected, atol=1e-14)


def test_of_the_factors_and_of_the_change_are_two_things() -> None:
    """A's largest direction is e0; B makes e1 the largest of ΔW."""
    one = adapter((basis(4, 0, 1, values=(2.0, 1.0)), basis(4, 0, 1, values=(1.0, 9.0)).T))
    other = adapter((basis(4, 1), basis(4, 1).T))
    assert subspace_similarity(one, other)[Q].phi[:, 0].tolist() == [0, 1]
    assert subspace_similarity(one, other, of="delta")[Q].phi[:, 0].tolist() == [1, 1]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**16), r1=st.integers(1, 4), r2=st.integers(1, 4), side=st.sampled_from(["A", "B"]))
def test_what_phi_does_not_depend_on(seed: int, r1: int, r2: int, side: str) -> None:
    (a1, b1), (a2, b2) = pair(r1, 8, 7, seed), pair(r2, 8, 7, seed + 1)
    other = adapter((a2, b2))

    def found(a: np.ndarray, b: np.ndarray, of: str, **more: Any) -> np.ndarray:
        return subspace_similarity(adapter((a, b), **more), other, side=side, of=of, random_baseline=False)[Q].phi

    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((r1, r1)))[0]
    mix = turn @ np.diag(rng.uniform(0.5, 2, r1))
    for of in ("factors", "delta"):
        plain = found(a1, b1, of)
        assert (plain >= 0).all()
        assert (plain <= 1).all()
        np.testing.assert_allclose(found(-3 * a1, 5 * b1, of, alpha=0.25), plain, atol=1e-9)
        np.testing.assert_allclose(found(turn @ a1, b1 @ turn.T, of), plain, atol=1e-9)
        swapped = subspace_similarity(other, adapter((a1, b1)), side=side, of=of)[Q].phi
        np.testing.assert_allclose(swapped.T, plain, atol=1e-9)
    np.testing.assert_allclose(found(mix @ a1, b1 @ np.linalg.inv(mix), "delta"), found(a1, b1, "delta"), atol=1e-8)
    into, out = rng.permutation(8), rng.permutation(7)
    moved = subspace_similarity(
        adapter((a1[:, into], b1[out])), adapter((a2[:, into], b2[out])), side=side, random_baseline=False
    )
    np.testing.assert_allclose(moved[Q].phi, found(a1, b1, "factors"), atol=1e-9)


def test_the_gaussian_baseline_is_near_its_expectation() -> None:
    draws = np.mean([random_similarity(4, 6, 40, seed=seed) for seed in range(400)], axis=0)
    expected = np.maximum(*np.indices((4, 6)) + 1) / 40
    np.testing.assert_allclose(draws, expected, rtol=0.15)
    layer = subspace_similarity(adapter(pair(4, 40, 9, 0)), adapter(pair(6, 40, 9, 1)))[Q]
    np.testing.assert_array_equal(layer.expected, expected)
    assert layer.baseline is not None
    assert layer.baseline.shape == (4, 6)
    assert abs(layer.baseline - expected).max() < 0.2
    assert random_similarity(64, 8, 4096).max() < 0.03  # the paper: near zero


def test_the_baseline_is_drawn_anew_for_each_layer_and_repeats_with_its_seed() -> None:
    a = adapter(pair(2, 9, 9, 0), pair(2, 9, 9, 1))
    one, again, other = (subspace_similarity(a, a, seed=seed) for seed in (3, 3, 4))
    drawn = [[layer.baseline for layer in found] for found in (one, again, other)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert not np.array_equal(drawn[0][0], drawn[0][1])
    assert subspace_similarity(a, a, random_baseline=False)[Q].baseline is None


def test_directions_that_are_not_there_are_left_out() -> None:
    a = gaussian(1, 6)
    flat = adapter((np.concatenate([a, 2 * a, 0 * a]), gaussian(5, 3)))
    assert subspace_similarity(flat, adapter(pair(2, 6, 5, 1)))[Q].phi.shape == (1, 2)
    assert subspace_similarity(flat, flat)[Q].phi.tolist() == [[pytest.approx(1)]]


def test_the_mean_over_layers_is_of_what_all_of_them_have() -> None:
    a, b = adapter(pair(3, 9, 9, 0), pair(2, 9, 9, 1)), adapter(pair(2, 9, 9, 2), pair(4, 9, 9, 3))
    found = subspace_similarity(a, b)
    phis = [layer.phi for layer in found]
    np.testing.assert_allclose(found.mean("q"), (phis[0][:2, :2] + phis[1][:2, :2]) / 2)
    np.testing.assert_array_equal(found.mean(), found.mean("q"))
    assert found.mean(baseline=True).shape == (2, 2)
    with pytest.raises(LoRAConfigError, match="'q'"):
        found.mean("k")
    with pytest.raises(LoRAConfigError, match="random_baseline=True"):
        subspace_similarity(a, b, random_baseline=False).mean(baseline=True)


# ---- spectrum and ranks ----------------------------------------------------------------------------------------------


def test_the_spectrum_is_that_of_the_dense_change() -> None:
    value = adapter(pair(3, 11, 7, 0), pair(9, 8, 5, 1), alpha=4)
    for layer in spectrum(value):
        sigma = np.linalg.svd(dense(value.factors[layer.path]), compute_uv=False)
        np.testing.assert_allclose(layer.values, sigma[: len(layer.values)], rtol=1e-10)
        assert layer.norm == pytest.approx(np.linalg.norm(sigma))
        p = sigma[sigma > 1e-9] / sigma.sum()
        assert layer.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()))
        assert effective_rank(value)[layer.path, "q"] == layer.effective_rank
    assert [len(layer.values) for layer in spectrum(value)] == [3, 5]
    assert [layer.rank for layer in spectrum(value)] == [3, 9]


@pytest.mark.parametrize(
    ("sigma", "energy", "rank"),
    [
        ((3, 2, 1), 9 / 14, 1),
        ((3, 2, 1), 9 / 14 + 1e-9, 2),
        ((3, 2, 1), 0.9, 2),
        ((3, 2, 1), 0.95, 3),
        ((3, 2, 1), 1, 3),
        ((1, 1, 1, 1), 0.5, 2),
        ((1, 0, 0), 1, 1),
        ((5, 1e-9), 0.999, 1),
    ],
)
def test_suggested_ranks_by_hand(sigma: tuple[float, ...], energy: float, rank: int) -> None:
    n = len(sigma)
    value = adapter((basis(6, *range(n), values=sigma), np.eye(6)[:, :n]))
    assert suggested_rank(value, energy).rank == rank
    assert suggested_rank(value, energy).layers == {(Q, "q"): rank}


def test_the_suggested_rank_is_what_truncate_takes() -> None:
    value = adapter(pair(6, 20, 15, 0), pair(6, 20, 15, 1), (basis(20, 1), basis(15, 2).T))
    for energy in (0.5, 0.8, 0.99):
        suggested = suggested_rank(value, energy)
        cut = value.truncate(energy=energy)
        assert {path: f.rank for path, f in cut.factors.items()} == {p: r for (p, _), r in suggested.layers.items()}
        assert suggested.rank == max(suggested.layers.values())
        assert suggested.energy == energy


def test_equal_directions_make_the_effective_rank() -> None:
    value = adapter((np.eye(9)[:4], np.eye(9)[:, :4]), (basis(9, 3), np.zeros((9, 1))))
    assert list(effective_rank(value).values()) == [pytest.approx(4), 0]
    assert suggested_rank(value).layers["layers.1.q_proj", "q"] == 0


# ---- overlap ---------------------------------------------------------------------------------------------------------


def test_the_overlap_is_that_of_the_dense_changes() -> None:
    a, b = adapter(pair(3, 9, 7, 0), pair(2, 8, 5, 1), alpha=2), adapter(pair(4, 9, 7, 2), pair(2, 8, 5, 3), alpha=5)
    found = overlap(a, b)
    deltas = [[dense(f) for f in value.factors.values()] for value in (a, b)]
    for layer, one, two in zip(found, *deltas, strict=True):
        norms = np.linalg.norm(one), np.linalg.norm(two)
        assert layer.cosine == pytest.approx((one * two).sum() / norms[0] / norms[1])
        assert (layer.norm_a, layer.norm_b) == pytest.approx(norms)
        (u1, _, v1), (u2, _, v2) = (np.linalg.svd(delta, full_matrices=False) for delta in (one, two))
        k1, k2 = (np.linalg.matrix_rank(delta) for delta in (one, two))
        assert layer.input == pytest.approx(phi(v1[:k1].T, v2[:k2].T)[-1, -1])
        assert layer.output == pytest.approx(phi(u1[:, :k1], u2[:, :k2])[-1, -1])
    flat = [np.concatenate([delta.ravel() for delta in each]) for each in deltas]
    assert found.cosine == pytest.approx(flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]))


def test_the_overlap_of_what_is_the_same_opposite_or_unrelated() -> None:
    a, b = pair(3, 9, 7, 0)
    mix = gaussian(3, 3, seed=5)
    one, refactored = adapter((a, b)), adapter((mix @ a, b @ np.linalg.inv(mix)), alpha=12)  # 4 ΔW
    assert overlap(one, refactored).cosine == pytest.approx(1)
    assert overlap(one, refactored)[Q].input == pytest.approx(1)
    assert overlap(one, one.negate()).cosine == pytest.approx(-1)
    apart = adapter((basis(9, 0), basis(7, 0).T)), adapter((basis(9, 0), basis(7, 1).T))
    assert (overlap(*apart).cosine, overlap(*apart)[Q].input, overlap(*apart)[Q].output) == (0, 1, 0)


def test_a_layer_that_one_of_them_lacks_counts_as_zero() -> None:
    both, one = pair(2, 6, 6, 0), pair(2, 6, 6, 1)
    a, b = adapter(both, one), adapter(both)
    norms = [np.linalg.norm(dense(f)) for f in a.factors.values()]
    found = overlap(a, b)
    assert found.cosine == pytest.approx(norms[0] / math.hypot(*norms))
    assert (found["layers.1.q_proj"].cosine, found["layers.1.q_proj"].norm_b) == (0, 0)
    assert overlap(b, a).cosine == pytest.approx(found.cosine)
    assert overlap(a, b, only=["layers.0.q_proj"]).cosine == pytest.approx(1)


# ---- amplification ---------------------------------------------------------------------------------------------------


def test_amplification_by_hand() -> None:
    """ΔW = 3 e₁e₂ᵀ, W has 0.5 there: 6. W's own largest value is 4; a random direction sees ‖W‖/√12."""
    w = torch.zeros(4, 3, dtype=torch.float64)
    w[0, 0], w[1, 2], w[3, 1] = 4, 0.5, 2
    value = adapter((basis(3, 2, values=(1.5,)), basis(4, 1, values=(2.0,)).T))
    (layer,) = amplification_factor(value, {Q: w})
    norm = math.sqrt(16 + 0.25 + 4)
    assert (layer.path, layer.role, layer.rank) == (Q, "q", 1)
    assert (layer.delta_norm, layer.projected, layer.factor) == pytest.approx((3, 0.5, 6))
    assert (layer.base_norm, layer.own, layer.random) == pytest.approx((norm, 4, norm / math.sqrt(12)))


def test_where_the_base_has_nothing_the_factor_is_infinite() -> None:
    w = torch.zeros(4, 3, dtype=torch.float64)
    w[0, 0] = 1
    (layer,) = amplification_factor(adapter((basis(3, 2), basis(4, 1).T)), {Q: w})
    assert (layer.projected, layer.factor) == (0, math.inf)


@pytest.mark.parametrize(("inputs", "outputs"), [(9, 6), (6, 9)])
def test_amplification_is_the_dense_formula(inputs: int, outputs: int) -> None:
    value = adapter(pair(3, inputs, outputs, 0), alpha=5)
    w = gaussian(outputs, inputs, seed=9)
    (layer,) = amplification_factor(value, {Q: torch.tensor(w)})
    u, _, vt = np.linalg.svd(dense(value.factors[Q]))
    own, sigma, own_t = np.linalg.svd(w)
    assert layer.projected == pytest.approx(np.linalg.norm(u[:, :3].T @ w @ vt[:3].T))
    assert layer.own == pytest.approx(np.linalg.norm(own[:, :3].T @ w @ own_t[:3].T))
    assert layer.own == pytest.approx(np.linalg.norm(sigma[:3]))
    rng = np.random.default_rng(1)
    drawn = [
        np.linalg.norm(
            np.linalg.qr(rng.standard_normal((outputs, 3)))[0].T @ w @ np.linalg.qr(rng.standard_normal((inputs, 3)))[0]
        )
        for _ in range(2000)
    ]
    assert layer.random == pytest.approx(math.sqrt(np.mean(np.square(drawn))), rel=0.03)


def test_the_random_column_of_the_papers_table_7() -> None:
    """‖W_q‖ = 61.95, d = 12288: 0.02 for r = 4 and 0.33 for r = 64 stand there. Here a W of that size, smaller."""
    n = 96
    w = gaussian(n, n)
    w *= 61.95 * (n / 12288) / np.linalg.norm(w)  # so that k‖W‖/n is the paper's
    random = [amplification_factor(adapter(pair(r, n, n, r)), {Q: torch.tensor(w)})[Q].random for r in (4, 64)]
    assert random == [pytest.approx(0.02, abs=0.005), pytest.approx(0.33, abs=0.01)]


# ---- intruder dimensions ---------------------------------------------------------------------------------------------


def planted(n: int, m: int, at: np.ndarray, side: str) -> tuple[LoRAAdapter, torch.Tensor]:
    """W with singular values n, n − 1, … on the axes; ΔW = 500·at on one side, an axis on the other."""
    w = torch.zeros(n, m, dtype=torch.float64)
    for i in range(min(n, m)):
        w[i, i] = n - i
    at = (at / np.linalg.norm(at)).reshape(-1, 1)
    other = np.zeros((1, m if side == "B" else n))
    other[0, 2] = 500
    return adapter((other, at) if side == "B" else (at.T, other.T)), w


@pytest.mark.parametrize("shape", [(12, 12), (12, 17), (17, 12)])
@pytest.mark.parametrize("side", ["A", "B"])
def test_an_intruder_that_was_planted(shape: tuple[int, int], side: str) -> None:
    ours = shape[0] if side == "B" else shape[1]
    value, w = planted(*shape, np.ones(ours), side)
    (layer,) = intruder_dimensions({Q: w}, value, k=4, side=side)
    assert layer.intruders == (0,)
    assert layer.similarity[0] < 0.5
    assert (layer.similarity[1:] > 0.5).all()
    value, w = planted(*shape, np.eye(ours)[2], side)  # along a direction that W has already
    found = intruder_dimensions({Q: w}, value, k=4, side=side)
    assert (found.count, found[Q].intruders) == (0, ())
    np.testing.assert_allclose(found[Q].similarity, 1, atol=1e-9)


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (8, 8)])
@pytest.mark.parametrize("side", ["A", "B"])
def test_intruders_are_those_of_the_dense_algorithm(shape: tuple[int, int], side: str) -> None:
    n, m = shape
    value, w = adapter(pair(2, m, n, 3), alpha=6), gaussian(n, m, seed=4)
    svds = [np.linalg.svd(each, full_matrices=False) for each in (w, w + dense(value.factors[Q]))]
    old, new = (svd[0] if side == "B" else svd[2].T for svd in svds)
    similarity = abs(old.T @ new).max(axis=0)[:6]
    threshold = float(np.median(similarity))
    (layer,) = intruder_dimensions({Q: torch.tensor(w)}, value, k=6, threshold=threshold, side=side)
    np.testing.assert_allclose(layer.similarity, similarity, atol=1e-9)
    np.testing.assert_allclose(layer.values, svds[1][1][:6], rtol=1e-9)
    assert layer.intruders == tuple(np.flatnonzero(similarity < threshold))
    assert len(layer.intruders) == 3
    assert intruder_dimensions({Q: torch.tensor(w)}, value, k=99)[Q].values.shape == (min(n, m),)


def test_a_change_of_zero_has_no_intruders() -> None:
    value = adapter((gaussian(2, 9), np.zeros((8, 2))))
    assert intruder_dimensions({Q: torch.tensor(gaussian(8, 9))}, value, threshold=0.999).count == 0


# ---- where the base's weights come from ------------------------------------------------------------------------------

TARGETS = {"llama": ["q", "down"], "gpt2": ["q", "v", "o", "down"], "neox": ["q", "v"], "llama-tied": ["embed_tokens"]}


@pytest.mark.parametrize("name", TARGETS)
def test_model_files_and_mapping_are_the_same_base(tiny: Any, tmp_path: Path, name: str) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path)
    model.add_lora(LoRAConfig(r=3, alpha=5, target_modules=TARGETS[name]))
    randomise(model)
    value = model.lora_adapter("default")
    weights, expected = {}, {}
    for path, factors in value.factors.items():
        module = model.get_submodule(path)
        turned = isinstance(module, (transformers.pytorch_utils.Conv1D, torch.nn.Embedding))
        weights[path] = module.weight.detach().T if turned else module.weight.detach()
        whole = {path: slice(None)}
        for key, rows in {(path, block.role): block.index() for block in factors.blocks}.items() or whole.items():
            w, delta = weights[path].double().numpy()[rows], dense(factors)[rows]
            u, sigma, vt = np.linalg.svd(delta, full_matrices=False)
            k = int((sigma > 1e-9 * sigma[0]).sum())
            expected[key] = np.linalg.norm(delta) / np.linalg.norm(u[:, :k].T @ w @ vt[:k].T)
    for base in (model, tmp_path, str(tmp_path), weights):
        found = amplification_factor(value, base)
        assert {key: found[key].factor for key in expected} == pytest.approx(expected, rel=1e-6)
        assert len(found) == len(expected)
    roles = [block.role for f in value.factors.values() for block in f.blocks]
    if roles:
        assert [layer.role for layer in found if layer.role in ("q", "v")] == roles
        path = next(path for path, f in value.factors.items() if f.blocks)
        assert found[path, "v"].role == "v"
        with pytest.raises(LoRANameError, match="fused: it has 'q', 'v'"):
            found[path]


def test_files_of_the_bare_model_with_the_names_of_one_with_a_head(tiny: Any, tmp_path: Path) -> None:
    model = tiny("gpt2")
    model.transformer.save_pretrained(tmp_path)
    model.add_lora(LoRAConfig(r=2, target_modules=["o"]))
    randomise(model)
    value = model.lora_adapter("default")
    factors = [[layer.factor for layer in amplification_factor(value, base)] for base in (model, tmp_path)]
    assert factors[0] == factors[1]


def test_a_tied_weight_stands_in_the_files_under_its_other_name(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    model.save_pretrained(tmp_path)
    value = adapter(pair(2, 32, 64, 0), paths=("lm_head",))
    (layer,) = amplification_factor(value, tmp_path)
    assert layer.base_norm == pytest.approx(float(model.lm_head.weight.detach().norm()))


def test_roles_of_a_fused_layer_are_studied_apart(tiny: Any) -> None:
    model = tiny("neox")
    values = []
    for seed, r in enumerate((3, 2)):
        model.add_lora(LoRAConfig(r=r, target_modules=["q", "v"]), str(seed))
        randomise(model, seed)
        values.append(model.lora_adapter(str(seed)))
    found = subspace_similarity(*values, side="B", of="delta")
    assert list(found.by_role) == ["q", "v"]
    assert [layer.rank for layer in spectrum(values[0])] == [3] * 4
    for path, f in values[0].factors.items():
        for block in f.blocks:
            deltas = [dense(value.factors[path])[block.index()] for value in values]
            u1, u2 = (np.linalg.svd(delta)[0][:, :k] for delta, k in zip(deltas, (3, 2), strict=True))
            np.testing.assert_allclose(found[path, block.role].phi, phi(u1, u2), atol=1e-6)
            cosine = (deltas[0] * deltas[1]).sum() / np.linalg.norm(deltas[0]) / np.linalg.norm(deltas[1])
            assert overlap(*values)[path, block.role].cosine == pytest.approx(cosine, abs=1e-7)
    assert {layer.role for layer in subspace_similarity(*values, only=["v"])} == {"v"}
    whole = {p: Factors(f.kind, f.A, f.B, f.alpha) for p, f in values[1].factors.items()}
    with pytest.raises(LoRAMismatchError, match="under another role, or whole"):
        subspace_similarity(values[0], LoRAAdapter(values[1].config, whole))


# ---- mistakes --------------------------------------------------------------------------------------------------------


def refused(kind: type[LoRAError], call: Any, *says: str) -> LoRAError:
    with pytest.raises(kind) as caught:
        call()
    for words in says:
        assert words in str(caught.value), f"{words!r} is not in: {caught.value}"
    assert caught.value.remedy
    return caught.value


def test_adapters_of_different_layers_are_refused() -> None:
    a = adapter(pair(2, 6, 6, 0), pair(2, 6, 6, 1))
    b = adapter(pair(2, 6, 6, 0), pair(2, 6, 5, 1), paths=(Q, "layers.2.q_proj"))
    error = refused(LoRAMismatchError, lambda: subspace_similarity(a, b), "layers.1.q_proj: only a has it", "only=")
    assert len(error.facts) == 2
    assert len(subspace_similarity(a, b, only=[Q])) == 1
    wide = adapter(pair(2, 7, 6, 0))
    refused(LoRAMismatchError, lambda: subspace_similarity(adapter(pair(2, 6, 6, 0)), wide), "6 inputs", "7 inputs")
    elsewhere = adapter(pair(2, 6, 6, 0), paths=("layers.9.q_proj",))
    for study in (subspace_similarity, overlap):
        refused(LoRAMismatchError, lambda study=study: study(a, elsewhere), "no layer in common")


def test_what_has_no_directions_is_refused() -> None:
    live, zero = pair(2, 6, 6, 0), (gaussian(2, 6), np.zeros((6, 2)))
    a, b = adapter(live, zero), adapter(live, live)
    for of, side in (("delta", "A"), ("factors", "B")):
        refused(
            LoRAMismatchError,
            lambda of=of, side=side: subspace_similarity(a, b, side=side, of=of),
            "rank 0",
            "layers.1.q_proj, of a",
            "only=",
        )
    assert subspace_similarity(a, b, side="A").layers[1].phi.shape == (2, 2)  # A itself is there
    assert len(subspace_similarity(a, b, side="B", only=[Q])) == 1
    base = {path: torch.eye(6) for path in a.factors}
    refused(LoRAMismatchError, lambda: amplification_factor(a, base), "zero in 1 of 2 places", "layers.1.q_proj")
    untrained = adapter(zero)
    refused(LoRAMismatchError, lambda: suggested_rank(untrained), "rank 0")
    refused(LoRAMismatchError, lambda: overlap(untrained, adapter(live)), "of a")
    refused(LoRAMismatchError, lambda: overlap(adapter(live), untrained), "of b")


def test_what_is_not_finite_is_refused() -> None:
    a, b = pair(2, 6, 6, 0)
    bad = adapter((np.where(a > 1, np.nan, a), b))
    good = adapter((a, b))
    for call in (
        lambda: spectrum(bad),
        lambda: overlap(good, bad),
        lambda: subspace_similarity(bad, good),
        lambda: amplification_factor(bad, {Q: torch.eye(6)}),
        lambda: intruder_dimensions({Q: torch.eye(6)}, bad),
    ):
        refused(LoRAMismatchError, call, Q, "NaN")
    refused(LoRAMismatchError, lambda: amplification_factor(good, {Q: torch.full((6, 6), math.inf)}), "base", "NaN")


@pytest.mark.parametrize(
    ("call", "kind", "says"),
    [
        (lambda a: spectrum("task"), LoRAConfigError, "The adapter is 'task', not an adapter"),
        (lambda a: overlap(a, None), LoRAConfigError, "The adapter b is None"),
        (lambda a: spectrum(a, only=["k"]), LoRATargetError, "no 'k'; it has q, q_proj"),
        (lambda a: spectrum(a, only=["q_prj"]), LoRATargetError, "'q_proj'"),
        (lambda a: spectrum(a, only=[]), LoRAConfigError, "only=[]"),
        (lambda a: spectrum(a, only=[1]), LoRAConfigError, "only=[1]"),
        (lambda a: overlap(a, a, only=5), LoRAConfigError, "only=5"),
        (lambda a: subspace_similarity(a, a, side="C"), LoRAConfigError, "side='C'"),
        (lambda a: subspace_similarity(a, a, of="A"), LoRAConfigError, "of='A'"),
        (lambda a: subspace_similarity(a, a, seed=-1), LoRAConfigError, "seed=-1"),
        (lambda a: random_similarity(0, 1, 2), LoRAConfigError, "rank_a=0"),
        (lambda a: suggested_rank(a, 0), LoRAConfigError, "energy=0"),
        (lambda a: suggested_rank(a, 90), LoRAConfigError, "energy=90"),
        (lambda a: spectrum(a).layers[0].suggested_rank(True), LoRAConfigError, "energy=True"),
        (lambda a: intruder_dimensions({Q: torch.eye(6)}, a, k=0), LoRAConfigError, "k=0"),
        (lambda a: intruder_dimensions({Q: torch.eye(6)}, a, threshold=1.5), LoRAConfigError, "threshold=1.5"),
        (lambda a: intruder_dimensions({Q: torch.eye(6)}, a, side="U"), LoRAConfigError, "side='U'"),
        (lambda a: intruder_dimensions(a, {Q: torch.eye(6)}), LoRAConfigError, "The adapter is a dict"),
        (lambda a: amplification_factor(a, a), LoRAConfigError, "The base is a LoRAAdapter, no model"),
        (lambda a: amplification_factor(a, 7), LoRAConfigError, "The base is 7, no model"),
        (lambda a: amplification_factor(a, {}), LoRAMismatchError, "not in the base"),
        (lambda a: amplification_factor(a, {Q: torch.ones(5, 6)}), LoRAMismatchError, "W is (5, 6), ΔW (6, 6)"),
        (lambda a: amplification_factor(a, {Q: torch.ones(36)}), LoRAMismatchError, "not a floating tensor (out, in)"),
        (lambda a: amplification_factor(a, {Q: np.eye(6)}), LoRAMismatchError, "ndarray"),
        (lambda a: amplification_factor(a, {f"{Q}.weight": torch.eye(6)}), LoRAMismatchError, "Name modules"),
        (lambda a: amplification_factor(a, torch.nn.Linear(6, 6)), LoRAMismatchError, "not in the base"),
    ],
)
def test_mistakes_name_their_remedy(call: Any, kind: type[LoRAError], says: str) -> None:
    refused(kind, lambda: call(adapter(pair(2, 6, 6, 0))), says)


def test_a_weight_that_lies_the_other_way(tiny: Any) -> None:
    value = adapter(pair(2, 6, 4, 0))
    refused(LoRAMismatchError, lambda: amplification_factor(value, {Q: torch.ones(6, 4)}), "Transpose it")


def test_a_model_that_is_no_base(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=2, target_modules=["q"]))
    randomise(model)
    value = model.lora_adapter("default")
    model.merge_lora()
    refused(LoRAStateError, lambda: amplification_factor(value, model), "merged", "unmerge_lora()")
    model.unmerge_lora()
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config)
    refused(LoRAUnsupportedError, lambda: amplification_factor(value, empty), "meta")
    path = next(iter(value.factors))
    model.get_submodule(path).weight = torch.nn.Parameter(torch.ones(32, 32, dtype=torch.int8), requires_grad=False)
    refused(LoRAUnsupportedError, lambda: amplification_factor(value, model), path, "quantised")
    refused(LoRAMismatchError, lambda: amplification_factor(value, tiny("gpt2")), "not in the base")
    value.save(tmp_path)
    refused(LoRAFileError, lambda: amplification_factor(value, tmp_path), "an adapter, not a model")
    tiny("gpt2").save_pretrained(tmp_path / "other")
    refused(LoRAMismatchError, lambda: amplification_factor(value, tmp_path / "other"), "not in the base")


def test_results_by_name() -> None:
    found = spectrum(adapter(pair(2, 6, 6, 0), pair(2, 6, 6, 1)))
    assert found[Q] is found[Q, "q"] is found.layers[0]
    with pytest.raises(LoRANameError, match=f"Did you mean '{Q}'"):
        found["layers.0.q_prj"]
    with pytest.raises(ValueError, match="read-only"):
        found[Q].values[0] = 0


def test_layers_stand_by_their_numbers() -> None:
    """A file has layers.10 before layers.2."""
    paths = tuple(f"layers.{i}.q_proj" for i in (0, 10, 2, 1))
    a = adapter(*(pair(2, 6, 6, i) for i in range(4)), paths=paths)
    b = adapter(*(pair(2, 6, 6, i) for i in range(4)), paths=("layers.0.q_proj", "layers.3.q_proj", *paths[1:3]))
    assert [layer.path.split(".")[1] for layer in spectrum(a)] == ["0", "1", "2", "10"]
    assert [layer.path.split(".")[1] for layer in overlap(a, b)] == ["0", "1", "2", "3", "10"]


# ---- figures ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def matplotlib() -> Any:
    return pytest.importorskip("matplotlib", reason="matplotlib is not installed: install hf_lora[test]")


def test_every_result_draws_its_numbers(matplotlib: Any) -> None:
    paths = tuple(f"layers.{i}.{name}" for i in (3, 5) for name in ("q_proj", "_v$x$_proj"))
    a, b = (adapter(*(pair(r, 6, 6, seed + r) for seed in range(4)), paths=paths) for r in (2, 3))
    base = {path: torch.tensor(gaussian(6, 6, seed=7)) for path in paths}
    phis, amplified = subspace_similarity(a, b), amplification_factor(a, base)
    images = [axes.images[0].get_array() for axes in phis.plot().axes if axes.images]
    for image, (role, baseline) in zip(images, [(r, x) for r in phis.by_role for x in (False, True)], strict=True):
        np.testing.assert_array_equal(image, phis.mean(role, baseline=baseline))
    assert len(subspace_similarity(a, b, random_baseline=False).plot().axes) == 3  # two, and the bar of colours
    for figure, result, value in (
        (amplified.plot(), amplified, lambda x: x.factor),
        (overlap(a, b).plot(), overlap(a, b), lambda x: x.cosine),
        (intruder_dimensions(base, a).plot(), intruder_dimensions(base, a), lambda x: len(x.intruders)),
    ):
        for line, layers in zip(figure.axes[0].lines, result.by_role.values(), strict=False):
            assert list(line.get_xdata()) == [3, 5]
            assert list(line.get_ydata()) == [value(layer) for layer in layers]
        labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert labels == ["q", r" _v\$x\$_proj"]
        figure.canvas.draw()
    panels = [axes for axes in spectrum(a).plot().axes if axes.lines]
    assert [len(axes.lines) for axes in panels] == [2, 2]
    shares = spectrum(a)["layers.3.q_proj"].values
    np.testing.assert_allclose(panels[0].lines[0].get_ydata(), shares / shares[0])
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_without_matplotlib_the_numbers_are_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    value = adapter(pair(2, 6, 6, 0))
    found = report(value, value, {Q: torch.eye(6)})
    assert found.rows()[0]["cosine"] == "1.000"
    for draw in (found.spectra.plot, found.overlap.plot, found.similarity[0].plot, found.html):
        refused(LoRAUnsupportedError, draw, "matplotlib", 'pip install "hf_lora[analysis]"')


# ---- the import ------------------------------------------------------------------------------------------------------


def test_the_room_is_there_after_the_import_and_is_imported_at_its_first_use() -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
import hf_lora
assert not {{"torch", "numpy", "hf_lora.analysis"}} & set(sys.modules)
assert "analysis" in dir(hf_lora)
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert hf_lora.__getattr__("analysis") is sys.modules["hf_lora.analysis"]
    assert hf_lora.analysis.__all__ == sorted(hf_lora.analysis.__all__)
    assert all(getattr(hf_lora.analysis, name).__doc__ for name in hf_lora.analysis.__all__)
