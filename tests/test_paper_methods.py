"""recipes/paper: what each system trains, counted on the real models' shapes, and that it trains that and no more."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_lora import LoRAConfig

pytest.importorskip("evaluate", reason="evaluate is not installed: install hf_lora[test]")

PAPER = Path(__file__).resolve().parents[1] / "recipes" / "paper"
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "roberta-base": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
    "roberta-large": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {
            "vocab_size": 50265,
            "max_position_embeddings": 514,
            "type_vocab_size": 1,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "gpt2-medium": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 24, "n_embd": 1024, "n_head": 16}),
    "gpt2-large": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 36, "n_embd": 1280, "n_head": 20}),
    "gpt3": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 96, "n_embd": 12288, "n_head": 96, "n_positions": 2048}),
    "deberta-xxl": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144},
    ),
    "minilm": (
        "BertForSequenceClassification",
        "BertConfig",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    "smollm2": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "tie_word_embeddings": True,
        },
    ),
}
QV = ["q", "v"]


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PAPER))
    from paper_parts import methods

    return methods


@functools.cache
def seen(name: str) -> Any:
    """A model that nothing is done to."""
    return meta(name)


def meta(name: str) -> Any:
    model, config, fields = SHAPES[name]
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, config)(**fields))


# (base, method, size) -> the count, worked out from the paper's formulas; in brackets what the paper prints.
PRINTED = [
    *[
        ("gpt3", "lora", {"lora": LoRAConfig(r=r, target_modules=targets)}, count)
        for targets, r, count in (
            (QV, 1, 4_718_592),  # 4.7M
            (QV, 2, 9_437_184),  # 9.4M
            (QV, 4, 18_874_368),  # 18.9M
            (QV, 8, 37_748_736),  # 37.7M
            (QV, 64, 301_989_888),  # 302M
            (["q"], 1, 2_359_296),  # 2.4M
        )
    ],
    ("gpt3", "adapter-h", {"bottleneck": 1}, 192 * (2 * 12288 + 1 + 12288)),  # 7.1M
    ("gpt3", "adapter-h", {"bottleneck": 8}, 192 * (16 * 12288 + 8 + 12288)),  # 40.1M
    ("gpt3", "preembed", {"tokens": 256}, 256 * 12288),  # 3.2M
    ("roberta-base", "lora", {"lora": LoRAConfig(r=8, target_modules=QV)}, 294_912),  # 0.3M
    ("roberta-large", "lora", {"lora": LoRAConfig(r=8, target_modules=QV)}, 786_432),  # 0.8M
    ("deberta-xxl", "lora", {"lora": LoRAConfig(r=16, target_modules=QV)}, 4_718_592),  # 4.7M
    ("gpt2-medium", "lora", {"lora": LoRAConfig(r=4, target_modules=QV)}, 393_216),  # 0.39M
    ("gpt2-large", "lora", {"lora": LoRAConfig(r=4, target_modules=QV)}, 737_280),  # 0.77M
    ("gpt2-medium", "adapter-l", {"bottleneck": 6}, 24 * (2 * 1024 * 6 + 6 + 1024) + 2 * 24 * 1024),  # 0.37M
    ("gpt2-medium", "adapter-l", {"bottleneck": 224}, 24 * (2 * 1024 * 224 + 224 + 1024) + 2 * 24 * 1024),  # 11.09M
    ("gpt2-medium", "prelayer", {"tokens": 14}, 24 * 1024 * 14),  # 0.35M
    ("roberta-base", "adapter-d", {"bottleneck": 16, "dropped": 0.5}, 6 * (2 * 768 * 16 + 16 + 768)),
    ("roberta-base", "bitfit", {}, 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 768),  # 0.1M
    ("roberta-base", "ft", {}, 124_055_040),  # 125M
    ("roberta-base", "ft-top2", {}, 14_175_744),
]


@pytest.mark.parametrize(("base", "name", "size", "count"), PRINTED, ids=[f"{b} {n} {c}" for b, n, _, c in PRINTED])
def test_counts_are_the_papers(methods: Any, peft: Any, base: str, name: str, size: dict[str, Any], count: int) -> None:
    size = methods.Size(**size)
    assert methods.METHODS[name].count(seen(base), size) == count
    if base != "gpt3" or (name, size.lora.r) == ("lora", 1) or size.bottleneck == 1:  # 2 s each
        assert methods.trainable(methods.apply(name, meta(base), size))[0] == count


@pytest.mark.parametrize("base", ["minilm", "smollm2"])
def test_counts_of_every_system_on_the_local_models(methods: Any, peft: Any, base: str) -> None:
    size = methods.Size()
    for name, method in methods.METHODS.items():
        if (base, name) == ("smollm2", "bitfit"):
            with pytest.raises(ValueError, match="no bias"):
                methods.apply(name, meta(base), size)
            continue
        model = meta(base)
        expected = method.count(model, size)
        own, head = methods.trainable(methods.apply(name, model, size))
        assert own == expected, name
        assert head == (384 * 384 + 384 + 770 if base == "minilm" else 0), name
    model = meta(base)
    total = sum(p.numel() for p in model.parameters())
    assert sum(methods.trainable(methods.apply("lora", model, size))) / total < 0.01  # the head with it


@pytest.mark.parametrize("model", ["bert-cls", "llama"])
def test_each_system_trains_what_it_says_and_nothing_else(
    methods: Any, peft: Any, tiny: Any, batch: Any, model: str
) -> None:
    size = methods.Size(bottleneck=2, tokens=4)
    for name, method in methods.METHODS.items():
        if not method.trains or (model, name) == ("llama", "bitfit") or (model, name) == ("llama", "head"):
            continue
        base = tiny(model)
        inputs = batch(base)
        before_logits = base(**inputs).logits
        changed = methods.apply(name, base, size)
        if not name.startswith(("pre", "lora+")):  # a prefix is read from the start
            assert torch.equal(changed.eval()(**inputs).logits, before_logits), name
        labels = inputs["input_ids"] if model == "llama" else torch.tensor([0, 2])
        before = {key: value.detach().clone() for key, value in changed.named_parameters()}
        optimizer = torch.optim.SGD([p for p in changed.parameters() if p.requires_grad], lr=10.0)
        for _ in range(2):  # in the first step only the second of two factors has a gradient
            optimizer.zero_grad()
            changed.train()(**inputs, labels=labels).loss.backward()
            optimizer.step()
        moved = {key for key, value in changed.named_parameters() if not torch.equal(before[key], value)}
        trains = {key for key, value in changed.named_parameters() if value.requires_grad}
        assert moved <= trains, name
        # A pooler's or an unused embedding's gradient may be zero; of what is small all moves.
        small = {key for key in trains if "bottleneck" in key or "lora_slots" in key or "prompt_encoder" in key}
        assert small - moved == set(), name
        assert moved, name


def test_adapters_stand_where_the_kind_says(methods: Any, tiny: Any) -> None:
    def places(name: str, **size: Any) -> list[str]:
        model = methods.apply(name, tiny("bert-cls"), methods.Size(**size))
        return [path for path, module in model.named_modules() if type(module).__name__ == "Bottleneck"]

    attention, mlp = "attention.output.dense.bottleneck", "output.dense.bottleneck"
    layers = [f"bert.encoder.layer.{i}." for i in range(2)]
    assert places("adapter-h") == [layer + place for layer in layers for place in (attention, mlp)]
    assert places("adapter-p") == places("adapter-l") == [layer + mlp for layer in layers]
    assert places("adapter-d", dropped=0.5) == [layers[1] + mlp]


def test_a_bottleneck_is_its_equation(methods: Any) -> None:
    from paper_parts.adapters import Bottleneck

    module = Bottleneck(6, 3, norm=True).double()
    torch.nn.init.normal_(module.up.weight)
    torch.nn.init.normal_(module.up.bias)
    h = torch.randn(4, 6, dtype=torch.float64)
    n = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    z = n @ module.down.weight.T + module.down.bias
    expected = (0.5 * z * (1 + torch.erf(z / 2**0.5))) @ module.up.weight.T + module.up.bias
    torch.testing.assert_close(module(h), expected)
