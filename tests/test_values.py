"""Factors and adapter values check themselves; slices of fused layers stack and split exactly."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_lora.config import LoRAConfig
from hf_lora.errors import LoRAConfigError, LoRAMismatchError
from hf_lora.values import AdapterValue, Block, Factors


def factors(out=6, rank=2, columns=5, **changes):
    generator = torch.Generator().manual_seed(out * 100 + rank * 10 + columns)
    fields = {
        "kind": "linear",
        "A": torch.randn(rank, columns, generator=generator),
        "B": torch.randn(out, rank, generator=generator),
        "alpha": 3.0,
    }
    return Factors(**(fields | changes))


def test_delta_is_the_definition():
    pair = factors()
    expected = [
        [sum(3.0 / 2 * pair.B[i, k].item() * pair.A[k, j].item() for k in range(2)) for j in range(5)] for i in range(6)
    ]
    torch.testing.assert_close(pair.delta(), torch.tensor(expected))
    rs = factors(rank=4, use_rslora=True)
    assert rs.scaling == 3.0 / math.sqrt(4)
    assert factors(A=torch.randn(2, 5).bfloat16(), B=torch.randn(6, 2).bfloat16()).delta().dtype == torch.float32
    assert factors(A=torch.randn(2, 5).double(), B=torch.randn(6, 2).double()).delta().dtype == torch.float64


def test_delta_and_scaling_are_pefts():
    peft = pytest.importorskip("peft")
    for rslora in (False, True):
        layer = torch.nn.Sequential(torch.nn.Linear(5, 6))
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_rslora=rslora, init_lora_weights=False)
        theirs = peft.get_peft_model(layer, config).base_model.model[0]
        ours = Factors("linear", theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, 3.0, rslora)
        assert ours.scaling == theirs.scaling["default"]
        torch.testing.assert_close(ours.delta(), theirs.get_delta_weight("default"))


@pytest.mark.parametrize(
    "changes",
    [
        {"A": torch.randn(3, 5)},
        {"A": torch.randn(2, 5, 1)},
        {"A": torch.randn(5)},
        {"A": torch.randn(0, 5), "B": torch.randn(6, 0)},
        {"A": torch.randn(2, 0)},
        {"A": torch.ones(2, 5, dtype=torch.int32), "B": torch.ones(6, 2, dtype=torch.int32)},
        {"A": torch.randn(2, 5).half()},
        {"alpha": 0},
        {"alpha": float("nan")},
        {"kind": "conv"},
    ],
)
def test_no_factors(changes):
    with pytest.raises(LoRAMismatchError):
        factors(**changes)


@pytest.mark.parametrize("rows", [(), (range(0),), (range(0, 4, 2),), (range(2, 4), range(2)), (range(3), range(2, 4))])
def test_no_block(rows):
    with pytest.raises(LoRAMismatchError, match="'q'"):
        Block("q", rows)


@given(
    st.integers(1, 3),
    st.booleans(),
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)
def test_stack_computes_the_parts_side_by_side_and_splits_again(rank, rslora, heights, random):
    # Lay the blocks' ranges out in random order with gaps, as interleaved heads are.
    spans = [(i, height) for i, heights_i in enumerate(heights) for height in heights_i]
    random.shuffle(spans)
    rows, end = [[] for _ in heights], 0
    for i, height in spans:
        end += random.randrange(2)
        rows[i].append(range(end, end + height))
        end += height
    parts = []
    for i, spans_i in enumerate(rows):
        block = Block(f"role{i}", tuple(spans_i))
        parts.append((block, torch.randn(rank, 4), torch.randn(len(block), rank)))
    fused = Factors.stack(parts, out_features=end + 1, alpha=5.0, use_rslora=rslora)
    assert fused.rank == rank * len(parts)
    expected = torch.zeros(end + 1, 4)
    for block, a, b in parts:
        expected[block.index()] = 5.0 / (math.sqrt(rank) if rslora else rank) * (b @ a)
    torch.testing.assert_close(fused.delta(), expected)
    for (block, a, b), (block2, a2, b2) in zip(parts, fused.split(), strict=True):
        assert block == block2
        assert torch.equal(a, a2)
        assert torch.equal(b, b2)


def test_blocks_are_verified():
    q, k = Block("q", (range(2),)), Block("k", (range(2, 4),))
    parts = [(q, torch.randn(2, 5), torch.randn(2, 2)), (k, torch.randn(2, 5), torch.randn(2, 2))]
    good = Factors.stack(parts, out_features=6, alpha=2.0)
    leaking = good.B.clone()
    leaking[5, 0] = 1e-20
    with pytest.raises(LoRAMismatchError, match="not zero outside the rows of role 'q'"):
        Factors("linear", good.A, leaking, 2.0, blocks=good.blocks)
    with pytest.raises(LoRAMismatchError, match="shares rows"):
        Factors("linear", good.A, good.B, 2.0, blocks=(q, q))
    with pytest.raises(LoRAMismatchError, match="the layer has 6"):
        Factors("linear", good.A, good.B, 2.0, blocks=(q, Block("k", (range(5, 7),))))
    with pytest.raises(LoRAMismatchError, match="does not divide"):
        Factors("linear", torch.randn(3, 5), torch.zeros(6, 3), 2.0, blocks=(q, k))
    with pytest.raises(LoRAMismatchError, match="one rank"):
        Factors.stack([parts[0], (k, torch.randn(3, 5), torch.randn(2, 3))], out_features=6, alpha=2.0)
    with pytest.raises(LoRAMismatchError, match="the layer has 3"):
        Factors.stack(parts, out_features=3, alpha=2.0)


def value(**changes):
    fields = {
        "config": LoRAConfig(r=2, bias="lora_only"),
        "factors": {"a.q": factors(), "a.v": factors(out=3)},
        "biases": {"a.q.bias": torch.ones(6)},
        "modules": {"head": {"weight": torch.ones(2, 2), "steps": torch.tensor(3)}},
        "embeddings": {"emb.weight": torch.ones(7)},
    }
    return AdapterValue(**(fields | changes))


def test_counts_and_dtypes():
    adapter = value()
    assert adapter.num_parameters == (2 * 5 + 6 * 2) + (2 * 5 + 3 * 2) + 6 + 5
    assert adapter.nbytes == 4 * (22 + 16 + 6 + 4 + 7) + 8
    half = adapter.to(torch.bfloat16)
    assert half.factors["a.q"].A.dtype == half.modules["head"]["weight"].dtype == torch.bfloat16
    assert half.modules["head"]["steps"].dtype == torch.int64
    assert half.embeddings["emb.weight"].dtype == torch.float32  # compared with the base, so left alone
    assert adapter.factors["a.q"].A.dtype == torch.float32


def test_it_is_a_value():
    adapter = value()
    with pytest.raises(TypeError):
        adapter.factors["x"] = factors()
    with pytest.raises(TypeError):
        adapter.modules["head"]["weight"] = torch.ones(1)
    with pytest.raises(AttributeError):
        adapter.config = LoRAConfig()
    assert copy.deepcopy(adapter).equal(adapter)
    assert pickle.loads(pickle.dumps(adapter)).equal(adapter)


def test_equal_means_every_bit():
    adapter = value()
    assert adapter.equal(value())
    assert not adapter.equal(adapter.to(torch.float64))
    assert not adapter.equal(value(config=LoRAConfig(r=3, bias="lora_only")))
    assert not adapter.equal(value(biases={}))
    assert not adapter.equal(value(modules={}))
    assert not adapter.equal(value(embeddings={"emb.weight": torch.zeros(7)}))
    assert not adapter.equal(value(factors={"a.q": factors(), "a.v": factors(out=3, alpha=4.0)}))
    assert not adapter.equal(value(factors={"a.q": factors()}))


def test_impossible_values():
    with pytest.raises(LoRAMismatchError, match="no LoRA factors"):
        value(factors={})
    with pytest.raises(LoRAConfigError, match='Set bias="all"'):
        value(biases={"b.bias": torch.ones(1)})
    with pytest.raises(LoRAConfigError, match="lora_only"):
        value(config=LoRAConfig(r=2))
    with pytest.raises(LoRAMismatchError, match="not named"):
        value(biases={"a.q.weight": torch.ones(6)})
