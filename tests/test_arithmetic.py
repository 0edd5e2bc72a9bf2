"""combine, truncate and negate against dense float64 ΔW that the test computes by hand; PEFT as a second oracle."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import logits, randomise, with_adapters
from torch import Tensor

from hf_lora import LoRAAdapter, LoRAConfig, LoRAConfigError, LoRAMismatchError, combine
from hf_lora.store import read_adapter
from hf_lora.values import Block, Factors

# path → kind, rows of B, columns of A
LAYERS = {
    "m.0.q": ("linear", 7, 5),
    "m.0.up": ("linear", 3, 9),
    "m.0.qkv": ("linear", 12, 6),
    "m.emb": ("embedding", 6, 11),
}
SHAPES = {**LAYERS, "m.large": ("linear", 120, 90)}
Q, K, V = Block("q", (range(2), range(6, 8))), Block("k", (range(2, 4), range(8, 10))), Block("v", (range(4, 6),))
BLOCKS: list[tuple[Block, ...]] = [(), (Q, V), (V, Q), (Q, K)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def adapter(
    ranks: dict[str, int],
    *,
    seed: int = 0,
    alpha: float = 4.0,
    rslora: bool = False,
    dtype: torch.dtype = torch.float32,
    blocks: tuple[Block, ...] = (),
    scale: float = 1.0,
    **config: Any,
) -> LoRAAdapter:
    """Random factors: `ranks` says the layers and their ranks (in "m.0.qkv" with blocks, a role's)."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path, rank in ranks.items():
        kind, out, columns = SHAPES[path]
        own = blocks if path == "m.0.qkv" else ()
        total = rank * max(len(own), 1)
        a = torch.randn(total, columns, generator=generator, dtype=torch.float64)
        b = torch.randn(out, total, generator=generator, dtype=torch.float64) * scale
        for i, block in enumerate(own):
            outside = [row for row in range(out) if all(row not in span for span in block.rows)]
            b[outside, i * rank : (i + 1) * rank] = 0
        factors[path] = Factors(kind, a.to(dtype), b.to(dtype), alpha, rslora, own)  # type: ignore[arg-type]
    settings = {"r": max(ranks.values()), "alpha": alpha, "target_modules": sorted(ranks), "use_rslora": rslora}
    return LoRAAdapter(LoRAConfig(**(settings | config)), factors)


def dense(value: LoRAAdapter) -> dict[str, Tensor]:
    """path → ΔW in float64 from the tensors: alpha/r · B A, or alpha/√r with rsLoRA."""
    found = {}
    for path, f in value.factors.items():
        rank = f.A.shape[0]
        found[path] = f.alpha / (math.sqrt(rank) if f.use_rslora else rank) * (f.B.double() @ f.A.double())
    return found


def total(adapters: list[LoRAAdapter], weights: list[float]) -> dict[str, Tensor]:
    """Σ w ΔW."""
    found: dict[str, Tensor] = {}
    for one, weight in zip(adapters, weights, strict=True):
        for path, delta in dense(one).items():
            found[path] = found.get(path, 0) + weight * delta
    return found


def size(adapters: list[LoRAAdapter], weights: list[float]) -> float:
    """Σ |w| ‖ΔW‖ of all layers: what rounding errors are measured against, also where the sum is zero."""
    return sum(
        abs(w) * float(delta.norm()) for one, w in zip(adapters, weights, strict=True) for delta in dense(one).values()
    )


def assert_deltas(found: LoRAAdapter, expected: dict[str, Tensor], allowed: float) -> None:
    deltas = dense(found)
    assert deltas.keys() == expected.keys()
    for path, delta in deltas.items():
        assert float((delta - expected[path]).norm()) <= allowed, path


def roles(value: LoRAAdapter, path: str) -> list[Tensor]:
    """Indices of the rows that are computed by themselves."""
    blocks = value.factors[path].blocks
    return [block.index() for block in blocks] or [torch.arange(LAYERS[path][1])]


def tail(matrix: Tensor, rank: int) -> float:
    """The least ‖M − M'‖ over M' of this rank (Eckart & Young)."""
    return float(torch.linalg.svdvals(matrix)[rank:].norm())


@st.composite
def several(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE), same_rank: int | None = None) -> Any:
    """One to three adapters and their weights."""
    adapters, count = [], draw(st.integers(1, 3))
    for _ in range(count):
        paths = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, unique=True))
        adapters.append(
            adapter(
                {path: same_rank or draw(st.integers(1, 4)) for path in paths},
                seed=draw(st.integers(0, 2**20)),
                alpha=draw(st.sampled_from([0.5, 4.0, 16.0])),
                rslora=draw(st.booleans()),
                dtype=draw(st.sampled_from(dtypes)),
                blocks=() if same_rank else draw(st.sampled_from(BLOCKS)),
            )
        )
    weights = draw(st.lists(st.sampled_from([-1.0, 0.0, 0.3, 0.7, 1, 2.5]), min_size=count, max_size=count))
    return adapters, weights


def widest(adapters: list[LoRAAdapter]) -> torch.dtype:
    dtypes = {f.A.dtype for one in adapters for f in one.factors.values()}
    return next(iter(dtypes)) if len(dtypes) == 1 else torch.float64 if torch.float64 in dtypes else torch.float32


# ---- concat ----------------------------------------------------------------------------------------------------------


@given(several())
@settings(deadline=None, max_examples=50)
def test_concat_is_the_sum(case):
    adapters, weights = case
    found = combine(adapters, weights)
    dtype = widest(adapters)
    assert_deltas(found, total(adapters, weights), TOLERANCE[dtype] * (size(adapters, weights) or 1))
    for path, f in found.factors.items():
        assert f.A.dtype == f.B.dtype == dtype
        own = [one.factors[path] for one in adapters if path in one.factors]
        assert f.rank == sum(each.rank for each in own)
        shared = all(set(each.blocks) == set(own[0].blocks) for each in own)
        assert f.blocks == (own[0].blocks if shared else ())
    assert type(found) is LoRAAdapter
    scalings = [f.scaling for f in found.factors.values()]
    assert max(scalings) == pytest.approx(min(scalings), rel=1e-14)  # right for loaders that ignore alpha_pattern, too


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_concat_with_equal_scales_rounds_nothing(dtype):
    a = adapter({"m.0.q": 2, "m.0.up": 2}, seed=1, dtype=dtype)
    b = adapter({"m.0.q": 2}, seed=2, dtype=dtype)
    found = combine([a, b], [0.3, -0.3])
    pair = found.factors["m.0.q"]
    assert torch.equal(pair.A, torch.cat([a.factors["m.0.q"].A, b.factors["m.0.q"].A]))
    assert torch.equal(pair.B, torch.cat([a.factors["m.0.q"].B, -b.factors["m.0.q"].B], dim=1))
    assert pair.scaling == pytest.approx(0.3 * 2, rel=1e-15)
    assert torch.equal(found.factors["m.0.up"].B, a.factors["m.0.up"].B)


def test_concat_owns_its_tensors():
    a = adapter({"m.0.q": 2})
    found = combine([a], [1])
    found.factors["m.0.q"].A.zero_()
    found.factors["m.0.q"].B.zero_()
    assert a.factors["m.0.q"].A.any()
    assert a.factors["m.0.q"].B.any()


@pytest.mark.parametrize("method", ["concat", "svd"])
def test_an_adapter_less_itself_is_zero(method):
    a = adapter({"m.0.q": 2, "m.emb": 3}, rslora=True)
    found = combine([a, a], [0.7, -0.7], method=method)
    assert_deltas(found, {path: torch.zeros_like(d) for path, d in dense(a).items()}, 1e-6 * size([a], [1]))


# ---- svd and truncate ------------------------------------------------------------------------------------------------


@given(several(), st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_svd_is_the_best_approximation(case, rank):
    adapters, weights = case
    found, exact = combine(adapters, weights, method="svd", rank=rank), total(adapters, weights)
    slack = TOLERANCE[widest(adapters)] * (size(adapters, weights) or 1)
    for path, delta in dense(found).items():
        f = found.factors[path]
        assert f.A.dtype == widest(adapters)
        assert f.rank <= rank * max(len(f.blocks), 1)
        for rows in roles(found, path):
            part = exact[path][rows]
            assert float((delta[rows] - part).norm()) <= tail(part, rank) + slack, path


def test_svd_has_the_largest_rank_of_the_layer():
    a = adapter({"m.0.q": 2, "m.0.up": 1, "m.0.qkv": 2}, seed=1, blocks=(Q, V))
    b = adapter({"m.0.q": 3, "m.emb": 4, "m.0.qkv": 1}, seed=2, rslora=True, blocks=(V, Q))
    found = combine([a, b], [1, 1], method="svd")
    assert {path: f.rank for path, f in found.factors.items()} == {"m.0.q": 3, "m.0.up": 1, "m.0.qkv": 4, "m.emb": 4}
    assert found.factors["m.0.qkv"].blocks == (Q, V)
    other = combine([a, adapter({"m.0.qkv": 1}, blocks=(Q, K))], [1, 1], method="svd")
    assert other.factors["m.0.qkv"].blocks == ()
    assert other.factors["m.0.qkv"].rank == 4  # the layer whole: of rank 4 and 2


@given(several(dtypes=(torch.float64, torch.bfloat16)), st.integers(1, 5))
@settings(deadline=None, max_examples=50)
def test_truncate_by_rank(case, rank):
    whole = case[0][0]
    found, before = whole.truncate(rank=rank), dense(whole)
    for path, delta in dense(found).items():
        was, now = whole.factors[path], found.factors[path]
        blocks = max(len(was.blocks), 1)
        assert now.blocks == was.blocks
        if was.rank <= rank * blocks:
            assert now.equal(was)
            continue
        assert now.rank <= rank * blocks
        assert now.scaling == pytest.approx(was.scaling, rel=1e-14)
        assert now.A.dtype == was.A.dtype
        slack = TOLERANCE[was.A.dtype] * float(before[path].norm())
        for rows in roles(whole, path):
            assert float((delta[rows] - before[path][rows]).norm()) <= tail(before[path][rows], rank) + slack


@given(several(dtypes=(torch.float64,)), st.sampled_from([0.01, 0.5, 0.9, 0.99, 1.0]))
@settings(deadline=None, max_examples=50)
def test_energy_is_the_smallest_rank_that_keeps_its_share(case, energy):
    adapters, weights = case
    for found, exact, every in [
        (adapters[0].truncate(energy=energy), dense(adapters[0]), adapters[:1]),
        (combine(adapters, weights, method="svd", energy=energy), total(adapters, weights), adapters),
    ]:
        for path, delta in dense(found).items():
            needed = 1
            for rows in roles(found, path):
                squares = torch.linalg.svdvals(exact[path][rows]).square()
                held = [float(squares[:k].sum() / squares.sum().clamp_min(1e-300)) for k in range(len(squares) + 1)]
                needed = max(needed, next((k for k in range(len(held)) if held[k] >= energy - 1e-13), 1))
                lost = float((delta[rows] - exact[path][rows]).norm()) ** 2
                assert lost <= (1 - energy) * float(squares.sum()) + 1e-9
            count = max(len(found.factors[path].blocks), 1)
            assert found.factors[path].rank // count <= max(needed, 1) or energy == 1
            most = sum(one.factors[path].rank for one in every if path in one.factors)
            assert found.factors[path].rank <= most


def test_truncate_keeps_heads_biases_and_what_needs_no_change(tmp_path):
    whole = adapter({"m.0.q": 4, "m.0.up": 2}, bias="lora_only", modules_to_save=["head"], rank_pattern={"up": 2})
    whole = dataclasses.replace(
        whole, biases={"m.0.q.bias": torch.ones(7)}, modules={"head": {"weight": torch.ones(2, 2)}}
    )
    assert whole.truncate(rank=4) is whole
    found = whole.truncate(2)
    assert type(found) is LoRAAdapter
    assert found.factors["m.0.up"].equal(whole.factors["m.0.up"])
    assert found.biases.keys() == whole.biases.keys()
    assert torch.equal(found.modules["head"]["weight"], torch.ones(2, 2))
    assert found.config.resolve(["m.0.q", "m.0.up"]) == {"m.0.q": (2, 2.0), "m.0.up": (2, 4.0)}
    found.save(tmp_path)
    assert read_adapter(tmp_path).equal(found)


def test_what_does_nothing_yet_can_still_be_trained_after_truncation():
    fresh = adapter({"m.0.q": 4}, scale=0.0)
    pair = fresh.truncate(2).factors["m.0.q"]
    assert not pair.B.any()
    assert pair.A.any(dim=1).all()


# ---- linear ----------------------------------------------------------------------------------------------------------


@given(several(dtypes=(torch.float64, torch.float32), same_rank=3))
@settings(deadline=None, max_examples=50)
def test_linear_is_pefts_formula(case):
    adapters, weights = case
    expected = {}
    for path in {path for one in adapters for path in one.factors}:
        a: Any = 0
        b: Any = 0
        for one, weight in zip(adapters, weights, strict=True):
            if path in one.factors:
                f = one.factors[path]
                scale = weight * f.alpha / (math.sqrt(3) if f.use_rslora else 3)
                a = a + math.copysign(math.sqrt(abs(scale)), scale) * f.A.double()
                b = b + math.sqrt(abs(scale)) * f.B.double()
        expected[path] = b @ a
    found = combine(adapters, weights, method="linear")
    assert_deltas(found, expected, 1e-5 * (size(adapters, weights) or 1))
    assert {f.rank for f in found.factors.values()} == {3}


def test_linear_needs_equal_ranks():
    with pytest.raises(LoRAMismatchError, match="equal ranks") as raised:
        combine([adapter({"m.0.q": 2, "m.emb": 1}), adapter({"m.0.q": 3, "m.emb": 2})], [1, 1], method="linear")
    assert raised.value.facts == ("m.0.q: ranks 2, 3", "m.emb: ranks 1, 2")
    assert "concat" in str(raised.value)


# ---- sparse merges ---------------------------------------------------------------------------------------------------


def trimmed(delta: Tensor, density: float) -> Tensor:
    order = delta.abs().flatten().argsort(descending=True)[: max(1, int(density * delta.numel()))]
    kept = torch.zeros(delta.numel(), dtype=torch.float64)
    kept[order] = delta.flatten()[order]
    return kept.view_as(delta)


def ties(taus: list[Tensor], majority: str) -> Tensor:
    """Elect and merge, entry by entry."""
    merged = torch.zeros_like(taus[0])
    for at in itertools.product(*map(range, merged.shape)):
        values = [float(tau[at]) for tau in taus]
        vote = sum(values) if majority == "total" else sum((v > 0) - (v < 0) for v in values)
        agreeing = [v for v in values if v * vote > 0]
        merged[at] = sum(agreeing) / len(agreeing) if agreeing else 0
    return merged


@given(several(dtypes=(torch.float64,)), st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from(["total", "frequency"]))
@settings(deadline=None, max_examples=40)
def test_ties_and_magnitude_pruning_are_the_papers(case, density, majority):
    adapters, weights = case
    deltas = [dense(one) for one in adapters]
    common: Any = {"density": density, "rank": 12}
    by_ties = combine(adapters, weights, method="ties", majority_sign_method=majority, **common)
    by_size = combine(adapters, weights, method="magnitude_prune", **common)
    small = combine(adapters, weights, method="ties", majority_sign_method=majority, density=density, rank=1)
    allowed = 1e-12 * (size(adapters, weights) or 1)
    for path in by_ties.factors:
        for rows in roles(by_ties, path):
            taus = [
                weight * trimmed(delta[path][rows], density)
                for delta, weight in zip(deltas, weights, strict=True)
                if path in delta
            ]
            expected = ties(taus, majority)
            assert float((dense(by_ties)[path][rows] - expected).norm()) <= allowed
            assert float((dense(by_size)[path][rows] - sum(taus)).norm()) <= allowed
            assert float((dense(small)[path][rows] - expected).norm()) <= tail(expected, 1) + allowed


@given(several(dtypes=(torch.float64,)), st.sampled_from([0.3, 0.8, 1.0]), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_dare_drops_and_rescales(case, density, seed):
    adapters, weights = case
    deltas = [dense(one) for one in adapters]
    common: Any = {"density": density, "rank": 12, "seed": seed}
    by_sum = combine(adapters, weights, method="dare_linear", **common)
    by_ties = combine(adapters, weights, method="dare_ties", **common)
    allowed = 1e-9 * (size(adapters, weights) or 1)
    for path in by_sum.factors:
        taus = [w * d[path] / density for d, w in zip(deltas, weights, strict=True) if path in d]
        # Every entry must be what some choice of kept entries gives.
        options = [[keep * tau for keep, tau in zip(kept, taus, strict=True)] for kept in masks(len(taus), density)]
        for found, results in [
            (dense(by_sum)[path], [sum(option) for option in options]),
            (dense(by_ties)[path], [ties(option, "total") for option in options]),
        ]:
            nearest = torch.stack([(found - result).abs() for result in results]).amin(dim=0)
            assert float(nearest.max()) <= allowed


def masks(count: int, density: float) -> list[tuple[int, ...]]:
    return [(1,) * count] if density == 1 else list(itertools.product((0, 1), repeat=count))


def test_dare_is_reproducible_and_drops_its_share():
    one, other = (adapter({"m.large": 2, "m.0.q": 2}, seed=s, dtype=torch.float64) for s in (1, 2))

    def run(seed: Any, method: Any = "dare_linear") -> LoRAAdapter:
        return combine([one, other], [1, 0], method=method, density=0.2, rank=90, seed=seed)

    first = run(3)
    assert first.equal(run(3))
    assert first.equal(run(torch.Generator().manual_seed(3)))
    assert not first.equal(run(4))
    torch.manual_seed(5)
    loose = run(None)
    torch.manual_seed(5)
    assert loose.equal(run(None))
    kept = dense(first)["m.large"].abs() > 1e-9
    assert kept.double().mean() == pytest.approx(0.2, abs=5 * math.sqrt(0.2 * 0.8 / kept.numel()))
    assert dense(first)["m.large"].sum() == pytest.approx(float(dense(one)["m.large"].mul(kept).sum()) / 0.2, rel=1e-9)
    # Another adapter's mask is another one.
    both = dense(combine([one, one], [1, -1], method="dare_linear", density=0.5, rank=90, seed=0))["m.large"]
    assert (both.abs() > 1e-9).double().mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("method", ["ties", "magnitude_prune", "dare_linear", "dare_ties"])
def test_sparse_merges_take_a_rank_or_an_energy_and_keep_dtype_and_blocks(method):
    a = adapter({"m.0.q": 2, "m.0.qkv": 2}, blocks=(Q, V), dtype=torch.bfloat16)
    b = adapter({"m.0.q": 3, "m.0.qkv": 1}, blocks=(Q, V), seed=1, rslora=True, dtype=torch.bfloat16)
    found = combine([a, b], [0.5, 0.5], method=method, density=0.9)
    assert {path: f.rank for path, f in found.factors.items()} == {"m.0.q": 3, "m.0.qkv": 4}
    assert found.factors["m.0.qkv"].blocks == (Q, V)
    assert {f.A.dtype for f in found.factors.values()} == {torch.bfloat16}
    assert combine([a, b], [0.5, 0.5], method=method, density=0.9, energy=1e-6).factors["m.0.q"].rank == 1


# ---- negation, heads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_negation_is_exact(dtype):
    a = adapter({"m.0.q": 2, "m.0.qkv": 1, "m.emb": 2}, rslora=True, dtype=dtype, blocks=(Q, V))
    found = a.negate()
    assert type(found) is LoRAAdapter
    assert found.config == a.config
    for path, delta in dense(a).items():
        assert torch.equal(dense(found)[path], -delta)
        by_weight = combine([a], [-1]).factors[path]
        assert torch.equal(by_weight.A, found.factors[path].A)
        assert torch.equal(by_weight.B, found.factors[path].B)
        assert by_weight.scaling == pytest.approx(a.factors[path].scaling, rel=1e-14)
    assert found.negate().equal(a)


def whole_head(seed: int = 0) -> LoRAAdapter:
    one = adapter({"m.0.q": 2}, seed=seed, bias="lora_only", modules_to_save=["head"])
    return dataclasses.replace(
        one, biases={"m.0.q.bias": torch.ones(7)}, modules={"head": {"weight": torch.ones(2, 2)}}
    )


@pytest.mark.parametrize(
    "add",
    [
        lambda one: combine([one, adapter({"m.0.q": 2})], [1, 1]),
        lambda one: combine([adapter({"m.0.q": 2}), one], [1, 0]),
        lambda one: combine([one], [0.5], method="svd"),
        lambda one: one.negate(),
    ],
)
def test_only_factors_add_up(add):
    with pytest.raises(LoRAMismatchError, match="factors_only") as raised:
        add(whole_head())
    assert [fact.partition(": ")[2] for fact in raised.value.facts] == ["head", "m.0.q.bias"]
    add(whole_head().factors_only())


def test_one_adapter_with_weight_one_keeps_its_head(tmp_path):
    found = combine([whole_head()], [1])
    assert found.modules["head"]["weight"].any()
    assert found.config.modules_to_save == ("head",)
    found.save(tmp_path)
    assert read_adapter(tmp_path).equal(found)


def test_factors_only():
    found = whole_head().factors_only()
    assert type(found) is LoRAAdapter
    assert (found.biases, found.modules, found.config.bias, found.config.modules_to_save) == ({}, {}, "none", None)
    assert found.factors["m.0.q"].equal(whole_head().factors["m.0.q"])


# ---- the config ------------------------------------------------------------------------------------------------------


@given(several(), st.sampled_from(["concat", "svd", "ties", "dare_linear"]))
@settings(deadline=None, max_examples=25)
def test_what_is_saved_is_read_back_equal(tmp_path_factory, case, method):
    adapters, weights = case
    options = {} if method in ("concat", "svd") else {"density": 0.5}
    options |= {"seed": 0} if method == "dare_linear" else {}
    found = combine(adapters, weights, method=method, **options)
    folder = tmp_path_factory.mktemp("combined")
    found.save(folder)
    assert read_adapter(folder).equal(found)
    for path, f in found.factors.items():
        assert found.config.resolve([path])[path] == (f.rank, f.alpha)
    assert not found.config.use_rslora


def test_targets_in_any_order_are_read_back_equal(tmp_path):
    one = adapter({"m.0.q": 3, "m.0.up": 2}, target_modules=["up", "q"])
    for name, found in {"sum": combine([one, one], [1, 2]), "small": one.truncate(2)}.items():
        found.save(tmp_path / name)
        assert read_adapter(tmp_path / name).equal(found)


def test_heads_that_are_named_but_not_held_are_no_longer_named():
    named = adapter({"m.0.q": 2}, modules_to_save=["head"], bias="all")
    config = combine([named, adapter({"m.0.q": 2})], [1, 1]).config
    assert (config.modules_to_save, config.bias) == (None, "none")


def test_the_rest_of_the_config_is_the_firsts():
    a = adapter({"m.0.q": 2}, dropout=0.1, task_type="CAUSAL_LM", rslora=True, peft_fields={"init_lora_weights": "eva"})
    b = adapter({"m.0.up": 2}, dropout=0.2, base_model="org/base", revision="v1")
    config = combine([a, b], [1, 1]).config
    assert (config.dropout, config.task_type, config.base_model, config.revision) == (
        0.1,
        "CAUSAL_LM",
        "org/base",
        "v1",
    )
    assert config.to_peft()["init_lora_weights"] == "eva"


def test_targets_are_those_of_all():
    def targets(*configs: dict[str, Any]) -> Any:
        one = combine(
            [adapter({path: 1}, **config) for path, config in zip(["m.0.q", "m.0.up"], configs, strict=True)], [1, 1]
        ).config
        assert (one.exclude_modules, one.layers_to_transform) == (None, None)
        return one.target_modules

    assert targets({"target_modules": ["q"]}, {"target_modules": ["up"]}) == ("q", "up")
    both = ("m.0.q", "m.0.up")
    assert targets({"target_modules": ".*q"}, {"target_modules": ["up"]}) == both
    assert targets({"target_modules": "all-linear"}, {"target_modules": "all-linear"}) == both
    limited = {"target_modules": ["up"], "layers_to_transform": [0]}
    assert targets({"target_modules": ["q"]}, limited) == both
    assert targets({"target_modules": ["q"], "exclude_modules": ["up"]}, {"target_modules": ["up"]}) == both


# ---- refusals --------------------------------------------------------------------------------------------------------

ONE, TWO = adapter({"m.0.q": 2}, seed=1), adapter({"m.0.q": 2}, seed=2)


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (([], []), {}, "not a list"),
        ((ONE, [1]), {}, "not a list"),
        ((["a", ONE], [1, 1]), {}, "Adapter 0 is 'a'"),
        (([ONE, TWO], [1]), {}, "one for each"),
        (([ONE, TWO], 1), {}, "one for each"),
        (([ONE], [True]), {}, "weight True"),
        (([ONE], [math.nan]), {}, "weight nan"),
        (([ONE], [-math.inf]), {}, "weight -inf"),
        (([ONE], [10**400]), {}, "weight 1000"),
        (([ONE], ["1"]), {}, "weight '1'"),
        (([ONE], [1]), {"method": "tees"}, "Did you mean 'ties'"),
        (([ONE], [1]), {"method": "svd", "rank": 0}, "rank=0"),
        (([ONE], [1]), {"method": "svd", "rank": True}, "rank=True"),
        (([ONE], [1]), {"method": "svd", "energy": 0}, "energy=0"),
        (([ONE], [1]), {"method": "svd", "energy": 1.5}, "energy=1.5"),
        (([ONE], [1]), {"method": "svd", "rank": 2, "energy": 0.5}, "both given"),
        (([ONE], [1]), {"method": "ties"}, "density=None"),
        (([ONE], [1]), {"method": "ties", "density": 0.0}, "density=0.0"),
        (([ONE], [1]), {"method": "ties", "density": 1.1}, "density=1.1"),
        (([ONE], [1]), {"method": "ties", "density": math.nan}, "density=nan"),
        (([ONE], [1]), {"method": "ties", "density": 0.5, "majority_sign_method": "totl"}, "Did you mean 'total'"),
        (([ONE], [1]), {"method": "ties", "density": 0.5, "seed": 1}, "seed=1 means nothing"),
        (([ONE], [1]), {"method": "dare_linear", "density": 0.5, "seed": -1}, "seed=-1"),
        (([ONE], [1]), {"method": "magnitude_prune", "density": 0.5, "majority_sign_method": "total"}, "'ties'"),
        (([ONE], [1]), {"rank": 2}, r"truncate\(rank=2\)"),
        (([ONE], [1]), {"method": "linear", "density": 0.5}, "'ties', 'dare_linear'"),
    ],
)
def test_impossible_arguments(arguments, options, match):
    with pytest.raises(LoRAConfigError, match=match) as raised:
        combine(*arguments, **options)
    assert raised.value.remedy


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "neither"),
        ({"rank": 1, "energy": 0.5}, "both"),
        ({"rank": 0}, "rank=0"),
        ({"energy": 0.0}, "energy=0.0"),
    ],
)
def test_impossible_truncations(options, match):
    with pytest.raises(LoRAConfigError, match=match):
        ONE.truncate(**options)


def test_shapes_that_differ_are_all_listed():
    a, b = adapter({"m.0.q": 2, "m.0.up": 2}), adapter({"m.0.q": 2, "m.0.up": 2})
    changed = {
        "m.0.q": Factors("linear", torch.ones(2, 6), torch.ones(7, 2), 1.0),
        "m.0.up": Factors("embedding", torch.ones(2, 9), torch.ones(3, 2), 1.0),
    }
    with pytest.raises(LoRAMismatchError, match="different shapes") as raised:
        combine([a, dataclasses.replace(b, factors=changed)], [1, 1])
    assert len(raised.value.facts) == 2
    assert "m.0.q: adapter 0 is for a layer with 5 inputs and 7 outputs" in raised.value.facts[0]
    assert "adapter 1 for an embedding" in raised.value.facts[1]


def test_bases_that_differ():
    def on(base: str | None, revision: str | None = None) -> LoRAAdapter:
        return adapter({"m.0.q": 2}, base_model=base, revision=revision)

    with pytest.raises(LoRAMismatchError, match=r"'org/one'.*'org/two'"):
        combine([on(None), on("org/one"), on("org/two")], [1, 1, 1])
    with pytest.raises(LoRAMismatchError, match="revision 'v2'"):
        combine([on("org/one"), on("org/one", "v2")], [1, 1])
    assert combine([on("org/one"), on("org/two")], [1, 1], force=True).config.base_model == "org/one"
    for first, second in [
        (("meta-llama/Llama-2-7b-hf", None), ("NousResearch/Llama-2-7b-hf", "main")),
        (("/data/base", None), ("/elsewhere/base/", None)),
        ((None, None), ("org/one", "v2")),
    ]:
        combine([on(*first), on(*second)], [1, 1])


def test_copies_of_embeddings_are_carried_where_they_agree():
    def with_copy(value: float | None) -> LoRAAdapter:
        copies = {} if value is None else {"m.emb.weight": torch.full((11, 6), value)}
        return dataclasses.replace(adapter({"m.emb": 2}), embeddings=copies)

    for pair in [(1.0, 1.0), (None, 1.0), (1.0, None)]:
        found = combine([with_copy(value) for value in pair], [1, 1])
        assert torch.equal(found.embeddings["m.emb.weight"], torch.ones(11, 6))
    with pytest.raises(LoRAMismatchError, match="another copy"):
        combine([with_copy(1.0), with_copy(2.0)], [1, 1])
    assert combine([with_copy(1.0), with_copy(2.0)], [1, 1], force=True).embeddings["m.emb.weight"][0, 0] == 1


def test_what_is_not_finite_is_refused():
    broken = adapter({"m.0.q": 2, "m.emb": 2})
    broken.factors["m.emb"].B[0, 0] = math.nan
    for verb in (lambda: combine([ONE, broken], [1, 0]), lambda: broken.truncate(1)):
        with pytest.raises(LoRAMismatchError, match="not finite") as raised:
            verb()
        assert len(raised.value.facts) == 1
        assert "m.emb.B: 1 of 12" in raised.value.facts[0]
    half = adapter({"m.0.q": 2}, dtype=torch.float16, scale=300.0)
    with pytest.raises(LoRAMismatchError, match=r"dtype(.|\n)*float32"):
        combine([half], [1e8], method="linear")
    combine([half.to(torch.float32)], [1e8], method="linear")
    with pytest.raises(LoRAMismatchError, match="smaller weights"):
        combine([ONE], [1e300])
    with pytest.raises(LoRAMismatchError, match=r"m\.0\.q.*no SVD"):
        combine([ONE], [1e38], method="magnitude_prune", density=1.0)


# ---- on a model, and in PEFT -----------------------------------------------------------------------------------------

CONFIGS = {
    "a": LoRAConfig(r=3, alpha=6, target_modules=["q", "v", "embed_tokens"]),
    "b": LoRAConfig(r=2, alpha=5, target_modules=["q", "up"], use_rslora=True),
    "c": LoRAConfig(r=3, alpha=3, target_modules=["v"], alpha_pattern={"layers.0.self_attn.v_proj": 12}),
}
WEIGHTS = {"a": 0.7, "b": -0.4, "c": 1.5}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize(("family", "configs"), [("llama", CONFIGS), ("gpt2", None)])
def test_on_a_model_concat_is_the_mixture(tiny, batch, family, configs):
    configs = configs or {
        "a": LoRAConfig(r=3, alpha=6, target_modules=["q", "v", "wte"]),
        "b": LoRAConfig(r=2, alpha=5, target_modules=["q", "v"], use_rslora=True),  # roles that a has, too
        "c": LoRAConfig(r=1, target_modules=["k", "c_proj"]),
    }
    model = with_adapters(tiny(family), configs)
    inputs = batch(model)
    for names in ("ab", "abc"):
        weights = {name: WEIGHTS[name] for name in names}
        model.set_lora(weights)
        expected = logits(model, inputs)
        model.load_lora(combine([model.lora_adapter(n) for n in names], list(weights.values())), name=names)
        model.set_lora(names)
        close(logits(model, inputs), expected)
    model.set_lora(None)
    base = logits(model, inputs)
    assert float((expected - base).abs().max()) > 0.01
    a = model.lora_adapter("a")
    model.load_lora(combine([a, a.negate()], [1, 1]), name="nothing")
    model.set_lora("nothing")
    close(logits(model, inputs), base, 1e-6)
    model.load_lora(a.truncate(rank=1), name="small")
    model.set_lora("small")
    assert torch.isfinite(logits(model, inputs)).all()
    assert float((logits(model, inputs) - base).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("method", "options"),
    [("concat", {}), ("svd", {"rank": 2}), ("svd", {"energy": 0.8}), ("ties", {"density": 0.4})],
)
def test_peft_computes_the_same_from_the_files(tiny, peft, tmp_path, method, options):
    model = with_adapters(tiny("llama"), CONFIGS)
    adapters = [model.lora_adapter(name) for name in CONFIGS]
    found = combine(adapters, list(WEIGHTS.values()), method=method, **options)
    found.save(tmp_path)
    base = tiny("llama")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    after = peft.PeftModel.from_pretrained(base, str(tmp_path)).merge_and_unload().state_dict()
    deltas = total(adapters, list(WEIGHTS.values())) if method == "concat" else dense(found)
    for name, weight in before.items():
        delta = deltas.get(name.removesuffix(".weight"))
        expected = weight.double()
        if delta is not None:
            expected = expected + (delta.T if "embed_tokens" in name else delta)
        assert float((after[name] - expected).abs().max()) <= 2e-6 * float(expected.abs().max()), name


@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [
        ("concat", "cat", {}),
        ("svd", "svd", {}),
        ("linear", "linear", {}),
        ("magnitude_prune", "magnitude_prune_svd", {"density": 0.3}),
        ("ties", "ties_svd", {"density": 0.3}),
        ("ties", "ties_svd", {"density": 0.3, "majority_sign_method": "total"}),
    ],
)
def test_where_peft_is_right_we_agree(tiny, peft, tmp_path, ours, theirs, options):
    """Equal ranks, no rsLoRA; for TIES equal weights. (PEFT cannot do without.)"""
    weights = [0.5, 0.5] if ours == "ties" else [0.7, -0.4]
    wrapped = None
    adapters = []
    for seed, name in enumerate(["a", "b"]):
        model = tiny("llama")
        model.add_lora(LoRAConfig(r=3, alpha=6 - seed, target_modules=["q_proj", "up_proj"]), name)
        randomise(model, seed)
        adapters.append(model.lora_adapter(name))
        adapters[-1].save(tmp_path / name)
        if wrapped is None:
            wrapped = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / name), adapter_name=name)
        else:
            wrapped.load_adapter(str(tmp_path / name), adapter_name=name)
    wrapped.add_weighted_adapter(["a", "b"], weights, "sum", combination_type=theirs, **options)
    found = dense(combine(adapters, weights, method=ours, **options))
    assert len(found) == 4
    for path, delta in found.items():
        expected = wrapped.base_model.model.get_submodule(path).get_delta_weight("sum").double()
        assert float((delta - expected).abs().max()) <= 1e-5 * float(expected.abs().max()), path
