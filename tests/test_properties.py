"""add → forward → save → load → switch → merge → remove, over random models, targets, ranks and dtypes, in float64
by hand.
"""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracles import (
    FAMILIES,
    Snapshot,
    assert_apart,
    assert_close,
    build,
    disturb,
    error,
    inputs,
    logits,
    merged,
)
from torch import Tensor, nn

import hf_lora
from hf_lora import LoRAConfig, LoRAUnsupportedError

ROLES = ("q", "k", "v", "o", "up", "down")
GATED = ("llama", "llama-tied", "llama-cls", "qwen3", "gemma3", "mistral", "phi3")
FUSED = ("phi3", "gpt2", "gpt2-cls", "neox", "bloom", "falcon", "falcon-heads", "falcon-new", "mpt")
EMBEDDINGS = {
    "llama": "embed_tokens",
    "llama-tied": "embed_tokens",
    "gemma3": "embed_tokens",
    "gpt2": "wte",
    "bloom": "word_embeddings",
    "opt": "embed_tokens",
    "bert-cls": "word_embeddings",
    "t5": "shared",
    "bart": "embed_tokens",
    "vit-cls": "classifier",  # no embedding: the head takes a LoRA instead
}
NAMES = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt2-cls": ["c_proj"],
    "neox": ["query_key_value", "dense"],
    "bloom": ["query_key_value"],
    "falcon-new": ["query_key_value", "dense_4h_to_h"],
    "mpt": ["Wqkv"],
    "phi3": ["gate_up_proj", "o_proj"],
    "bert-cls": ["query", "output.dense"],
    "t5": ["SelfAttention.q", "wo"],
    "whisper": ["encoder_attn.q_proj", "fc1"],
}
SIZES = {torch.float32: 4, torch.float64: 1, torch.bfloat16: 2, torch.float16: 2}  # how often each dtype is drawn


@st.composite
def cases(draw: st.DrawFn, family: str) -> tuple[LoRAConfig, torch.dtype, int]:
    """A config that fits the family's models, a dtype of the base, a seed."""
    roles = (*ROLES, "gate") if family in GATED else ROLES
    kinds = [st.just("all-linear"), st.lists(st.sampled_from(roles), min_size=1, unique=True)]
    if family in NAMES:
        kinds.append(st.just(NAMES[family]))
    targets: Any = draw(st.one_of(kinds))
    if family in EMBEDDINGS and targets != "all-linear" and draw(st.booleans()):
        targets = [*targets, EMBEDDINGS[family]]
    rank = draw(st.sampled_from([1, 2, 3]))
    whole_head = family == "vit-cls" and EMBEDDINGS[family] in targets
    config = LoRAConfig(
        r=rank,
        target_modules=targets,
        alpha=draw(st.sampled_from([None, 4, 8.0, 12])),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        use_rslora=draw(st.booleans()),
        bias=draw(st.sampled_from(["none", "none", "lora_only", "all"])),
        init=draw(st.sampled_from(["kaiming", "gaussian"])),
        modules_to_save=[] if whole_head else None,
    )
    dtype = draw(st.sampled_from([dtype for dtype, count in SIZES.items() for _ in range(count)]))
    return config, dtype, draw(st.integers(0, 3))


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(
    max_examples=6,
    deadline=None,
    derandomize=os.environ.get("CI") == "true",  # a change is judged by the same cases as the one before it
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a case is small as it is; shrinking would take minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_an_adapters_life_follows_the_float64_oracle(family: str, data: st.DataObject) -> None:
    config, dtype, seed = data.draw(cases(family))
    with tempfile.TemporaryDirectory() as folder:
        live(family, config, dtype, seed, Path(folder))


def live(family: str, config: LoRAConfig, dtype: torch.dtype, seed: int, folder: Path) -> None:
    model: Any = build(family, seed=seed, dtype=dtype)
    base, before, batch = build(family, seed=seed, dtype=dtype), Snapshot(model), inputs(model)
    plain = logits(model, batch)

    model.add_lora(config, "new")
    assert torch.equal(logits(model, batch), plain), "step 0 is the base"
    scaling = (config.alpha or config.r) / (config.r**0.5 if config.use_rslora else config.r)
    assert disturb(model, seed=seed + 1, std=0.12 / scaling**0.5) > 0  # ΔW of W's size, not far above it
    trained = logits(model, batch)

    model.save_lora(folder / "task", "new")
    oracle = merged(base, folder / "task")
    expected = logits(oracle, batch)
    exact = dtype in (torch.float32, torch.float64)
    # Nothing can be nearer to the truth than the merged model itself, rounded to that dtype: this is what it loses.
    least = 4 * error(logits(copy.deepcopy(oracle).to(dtype), batch), expected)

    def close(found: Tensor, wanted: Tensor, what: str) -> None:
        assert_close(found, wanted, dtype, what, least)

    if exact:
        assert_apart(expected, plain, dtype, "the adapter's effect")
    close(trained, expected, "trainable")

    name = model.load_lora(folder / "task", name="org/frozen")
    assert (name, model.active_lora) == ("org/frozen", "new")
    with model.use_lora(name):
        close(logits(model, batch), expected, "use_lora")
    with model.no_lora():
        assert torch.equal(logits(model, batch), plain), "no_lora is the base"
    model.set_lora(name)
    frozen = logits(model, batch)
    close(frozen, expected, "set_lora")
    with model.route_lora(["new", None, name]):
        routed = logits(model, batch)
    close(routed, torch.cat([expected[:1], plain[1:2].to(expected.dtype), expected[2:]]), "routed")
    # Each row by its own largest logit, against the same row where its adapter is active for all: both round alike. (By
    # its own logit a 16-bit row can be far from the float64 oracle, merged, routed or active alike.)
    low = logits(oracle.to(dtype), batch)
    for i, alone in enumerate((trained, plain, frozen)):
        lost = 4 * error(low[i : i + 1], expected[i : i + 1])
        assert_close(routed[i : i + 1], alone[i : i + 1], dtype, f"row {i}", lost if exact else 0.0)

    if tied(model, config, folder / "task"):
        with pytest.raises(LoRAUnsupportedError, match="tied"):
            model.merge_lora()
    else:
        for which in ("new", name):
            model.merge_lora(which)
            close(logits(model, batch), expected, "merged")
            model.unmerge_lora()
            before.assert_weights(model)
    assert torch.equal(logits(model, batch), frozen)

    again = model.load_lora(folder / "task", name="again", trainable=True)
    model.save_lora(folder / "again", again)
    expected_again = logits(merged(base, folder / "again"), batch)
    assert error(expected_again, expected) < 1e-12, "what was loaded is saved again as it was"

    model.remove_lora("new")
    model.set_lora(name)
    assert torch.equal(logits(model, batch), frozen), "the others stay when one goes"
    model.remove_lora()
    before.assert_same(model)
    assert torch.equal(logits(model, batch), plain)


def tied(model: nn.Module, config: LoRAConfig, folder: Path) -> list[str]:
    """Adapted layers whose weight another module has, too."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        paths = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in file.keys() if ".lora_" in key}  # noqa: SIM118
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if isinstance(weight, Tensor):
            owners.setdefault(id(weight), []).append(path)
    return [path for shared in owners.values() if len(shared) > 1 for path in shared if path in paths]


# ---- a role of a fused layer is exactly its rows ---------------------------------------------------------------------

ROLE_ROWS = {  # the layer, and the head dimension's place in its rows: (q, k, v) of head h, written down by hand
    "gpt2": ("transformer.h.0.attn.c_attn", lambda h: (8 * h, 32 + 8 * h, 64 + 8 * h)),
    "phi3": ("model.layers.0.self_attn.qkv_proj", lambda h: (8 * h, 32 + 8 * (h // 2), 48 + 8 * (h // 2))),
    "neox": ("gpt_neox.layers.0.attention.query_key_value", lambda h: (24 * h, 24 * h + 8, 24 * h + 16)),
    "bloom": ("transformer.h.0.self_attention.query_key_value", lambda h: (24 * h, 24 * h + 8, 24 * h + 16)),
    "falcon": ("transformer.h.0.self_attention.query_key_value", lambda h: (8 * h, 32, 40)),
    "falcon-heads": ("transformer.h.0.self_attention.query_key_value", lambda h: (24 * h, 24 * h + 8, 24 * h + 16)),
    "falcon-new": (
        "transformer.h.0.self_attention.query_key_value",
        lambda h: (32 * (h // 2) + 8 * (h % 2), 32 * (h // 2) + 16, 32 * (h // 2) + 24),
    ),
    "mpt": ("transformer.blocks.0.attn.Wqkv", lambda h: (8 * h, 32 + 8 * h, 64 + 8 * h)),
}


@pytest.mark.parametrize("roles", [("q",), ("v",), ("q", "v"), ("k",)], ids="+".join)
@pytest.mark.parametrize("family", ROLE_ROWS)
def test_a_role_changes_its_own_rows_and_no_others(family: str, roles: tuple[str, ...], tmp_path: Path) -> None:
    model, base = build(family), build(family)
    path, place = ROLE_ROWS[family]
    model.add_lora(LoRAConfig(r=2, target_modules=list(roles)))
    disturb(model)
    model.save_lora(tmp_path)
    change = merged(base, tmp_path).get_submodule(path).weight - base.get_submodule(path).weight.double()
    change = change.T if type(base.get_submodule(path)).__name__ == "Conv1D" else change
    mine = {place(h)["qkv".index(role)] + i for role in roles for h in range(4) for i in range(8)}
    assert {row for row, values in enumerate(change.detach()) if values.abs().max() > 1e-9} == mine


def test_the_families_cover_what_they_should() -> None:
    assert set(GATED) | set(FUSED) | set(EMBEDDINGS) | set(NAMES) <= set(FAMILIES)
    assert set(ROLE_ROWS) >= set(FUSED) - {"gpt2-cls"}
    assert hf_lora.LoRAConfig is LoRAConfig
