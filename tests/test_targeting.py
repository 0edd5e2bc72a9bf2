"""What a config means on a model: names, expressions, roles, exclusions, heads, and errors where it means nothing."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from hf_lora.config import LoRAConfig
from hf_lora.errors import LoRAConfigError, LoRAError, LoRATargetError, LoRAUnsupportedError
from hf_lora.targeting import LayerInfo, Resolution, describe_layer, resolve, roles_of

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(name: str, **values: Any) -> nn.Module:
    """A small model of this class, without storage."""
    cls = getattr(transformers, name)
    with torch.device("meta"):
        return cls(cls.config_class(**{**SMALL, **values}))


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return build("LlamaForCausalLM", num_hidden_layers=3)


@pytest.fixture(scope="module")
def gpt2() -> nn.Module:
    return build("GPT2LMHeadModel")


def asked(model: nn.Module, targets: Any, *, from_file: bool = False, **values: Any) -> Resolution:
    return resolve(model, LoRAConfig(**{"r": 2, "target_modules": targets, **values}), from_file=from_file)


def paths(model: nn.Module, targets: Any, **values: Any) -> list[str]:
    return [target.path for target in asked(model, targets, **values).targets]


# -- layers -----------------------------------------------------------------------------------------------------------


class Router(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return y, y


class LoRALinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class EetqLinear(nn.Module):  # quantised, not an nn.Linear
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 3, 5
        self.register_buffer("weight", torch.zeros(3, 5, dtype=torch.int8))


class ExpertsLinear(nn.Module):  # stacked
    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 3, 5
        self.weight = nn.Parameter(torch.zeros(2, 5, 3))


@pytest.mark.parametrize(
    ("module", "info"),
    [
        (nn.Linear(3, 5), LayerInfo("linear", 3, 5)),
        (LoRALinear(3, 5), LayerInfo("linear", 3, 5)),
        (EetqLinear(), LayerInfo("linear", 3, 5)),
        (transformers.pytorch_utils.Conv1D(5, 3), LayerInfo("conv1d", 3, 5)),
        (nn.Embedding(7, 4), LayerInfo("embedding", 7, 4)),
        (
            transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding(7, 4, 0),
            LayerInfo("embedding", 7, 4),
        ),
        (transformers.models.falcon.modeling_falcon.FalconLinear(3, 5), LayerInfo("linear", 3, 5)),
        (Router(3, 5), None),
        (ExpertsLinear(), None),
        (nn.MultiheadAttention(4, 2).out_proj, LayerInfo("attention", 4, 4)),
        (nn.MultiheadAttention(4, 2), LayerInfo("attention", 4, 12)),
        (nn.MultiheadAttention(4, 2, kdim=3), None),
        (nn.Conv1d(3, 5, 2), LayerInfo("conv", 6, 5, (2,))),
        (nn.ConvTranspose1d(3, 5, 2), None),
        (nn.LayerNorm(4), None),
        (nn.Sequential(nn.Linear(3, 5)), None),
        (nn.Bilinear(2, 3, 4), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_describe_layer(module: nn.Module, info: LayerInfo | None) -> None:
    assert describe_layer(module) == info


def test_transformers_routers_that_derive_from_linear_are_no_layers() -> None:
    llama4 = transformers.Llama4TextConfig(hidden_size=8, num_local_experts=2)
    assert describe_layer(transformers.models.llama4.modeling_llama4.Llama4Router(llama4)) is None
    phimoe = transformers.PhimoeConfig(hidden_size=8, num_local_experts=2)
    assert describe_layer(transformers.models.phimoe.modeling_phimoe.PhimoeTopKRouter(phimoe)) is None
    grouped = transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4GroupedLinear
    assert issubclass(grouped, nn.Linear)
    assert describe_layer(grouped(8, 8, 2)) is None


def test_quantised_linear_of_transformers_needs_no_import() -> None:
    from transformers.integrations.higgs import HiggsLinear

    layer = HiggsLinear.__new__(HiggsLinear)
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = 3, 5
    assert describe_layer(layer) == LayerInfo("linear", 3, 5)


# -- names ------------------------------------------------------------------------------------------------------------


def test_a_name_is_a_path_or_the_end_of_one(llama: nn.Module) -> None:
    every = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert paths(llama, ["q_proj"]) == paths(llama, ["self_attn.q_proj"]) == every
    assert paths(llama, [every[1]]) == [every[1]]
    assert paths(llama, ["layers.2.self_attn.q_proj"]) == [every[2]]
    with pytest.raises(LoRATargetError):
        paths(llama, ["_proj"])  # not a whole component


def test_a_string_is_a_regular_expression_for_whole_paths(llama: nn.Module) -> None:
    assert paths(llama, r"model\.layers\.[02]\.mlp\.(up|down)_proj") == [
        f"model.layers.{i}.mlp.{name}_proj" for i in (0, 2) for name in ("up", "down")
    ]
    with pytest.raises(LoRATargetError, match="matches no module"):
        paths(llama, "q_proj")


def test_each_layer_comes_once_and_in_the_models_order(llama: nn.Module) -> None:
    found = paths(llama, ["v_proj", "self_attn.q_proj", "q", "attention"])
    assert len(found) == len(set(found)) == 12
    assert found == [name for name, _ in llama.named_modules() if name in found]


def test_roles_are_words_of_a_string_too(llama: nn.Module) -> None:
    assert paths(llama, "attention") == paths(llama, ["q", "k", "v", "o"])


def test_a_role_that_the_architecture_lacks_is_a_name(gpt2: nn.Module) -> None:
    with pytest.raises(LoRATargetError, match="'gate' matches no module") as caught:
        paths(gpt2, ["gate"])
    assert "Roles here: attention, down, head, k, mlp, o, q, up, v" in str(caught.value)


def test_shared_modules_count_once() -> None:
    model = nn.Module()
    model.a = nn.Linear(4, 4)
    model.b = model.a
    assert paths(model, ["b"]) == ["a"]
    assert paths(model, ["a", "b"]) == ["a"]
    assert paths(model, "all-linear") == ["a"]


def test_embeddings_by_name(llama: nn.Module) -> None:
    (target,) = asked(llama, ["embed_tokens"]).targets
    assert target.info == LayerInfo("embedding", 64, 32)


def test_the_head(llama: nn.Module) -> None:
    assert paths(llama, ["head"]) == ["lm_head"]
    assert paths(build("BertForMaskedLM"), ["head"]) == ["cls.predictions.decoder"]
    assert "head" not in {role for found in roles_of(build("LlamaModel")).values() for role in found}
    resolution = asked(build("RobertaForSequenceClassification"), ["head"])
    assert [target.path for target in resolution.targets] == ["classifier.dense", "classifier.out_proj"]
    assert resolution.heads == ()
    assert any("takes a LoRA" in line for line in resolution.skipped)


def test_fused_layer_by_roles_or_whole(gpt2: nn.Module) -> None:
    whole, _ = asked(gpt2, ["c_attn"]).targets
    assert whole.blocks == ()
    both, _ = asked(gpt2, ["v", "q"]).targets
    assert both.blocks == (("q", (range(32),)), ("v", (range(64, 96),)))
    all_, _ = asked(gpt2, ["q", "k", "v"]).targets
    assert [role for role, _ in all_.blocks] == ["q", "k", "v"]
    with pytest.raises(LoRATargetError, match="whole and by the role"):
        asked(gpt2, ["q", "c_attn"])
    with pytest.raises(LoRATargetError, match="whole and by the role"):
        asked(gpt2, ["c_attn", "q"])


# -- narrowing --------------------------------------------------------------------------------------------------------


def test_exclude(llama: nn.Module, gpt2: nn.Module) -> None:
    assert paths(llama, ["q_proj", "v_proj"], exclude_modules=["v_proj"]) == paths(llama, ["q_proj"])
    assert paths(llama, ["attention"], exclude_modules=["k", "o"]) == paths(llama, ["q", "v"])
    assert len(paths(llama, "all-linear", exclude_modules=r".*\.layers\.1\..*")) == 14
    assert len(paths(llama, "all-linear", exclude_modules=["mlp"])) == 12
    assert len(paths(llama, "all-linear", exclude_modules=["lm_head"])) == 21
    without, _ = asked(gpt2, ["c_attn"], exclude_modules=["q"]).targets
    assert [role for role, _ in without.blocks] == ["k", "v"]
    assert asked(gpt2, ["q", "v"], exclude_modules=["q"]).targets == asked(gpt2, ["v"]).targets


@pytest.mark.parametrize("wrong", [["k_porj"], ["self_attn"], r".*\.k_porj"])
def test_exclude_has_to_match_a_layer(llama: nn.Module, wrong: Any) -> None:
    with pytest.raises(LoRATargetError) as caught:
        asked(llama, "all-linear", exclude_modules=wrong)
    assert "exclude_modules" in str(caught.value)


def test_excluding_everything_is_an_error(llama: nn.Module) -> None:
    with pytest.raises(LoRATargetError, match="no layer is left"):
        asked(llama, ["q"], exclude_modules=["q_proj"])


def test_layers_to_transform(llama: nn.Module) -> None:
    layer = "model.layers.{}.self_attn.q_proj".format
    assert paths(llama, ["q"], layers_to_transform=1) == [layer(1)]
    assert paths(llama, ["q"], layers_to_transform=[2, 0]) == [layer(0), layer(2)]
    assert paths(llama, ["q"], layers_to_transform=[0], layers_pattern="layers") == [layer(0)]
    assert paths(llama, [layer(2), "v_proj"], layers_to_transform=[0])[-1] == layer(2)  # a full path stays, as in PEFT
    assert paths(llama.model, ["q_proj"], layers_to_transform=[1]) == ["layers.1.self_attn.q_proj"]
    with pytest.raises(LoRATargetError, match=r"no target in layer 3, 7; this model has layers 0…2") as caught:
        asked(llama, ["q"], layers_to_transform=[1, 3, 7])
    assert caught.value.expected == [0, 1, 2]
    with pytest.raises(LoRATargetError, match="after layers_pattern 'blocks'"):
        asked(llama, ["q"], layers_to_transform=[1], layers_pattern="blocks")


def test_the_first_number_is_the_layer() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(2))
    for layer in model.layers:
        layer.experts = nn.ModuleList(nn.ModuleDict({"up_proj": nn.Linear(4, 4)}) for _ in range(3))
    wrapped = nn.ModuleDict({"model": model})
    assert paths(wrapped, ["up_proj"], layers_to_transform=[1]) == [
        f"model.layers.1.experts.{i}.up_proj" for i in range(3)
    ]
    assert len(paths(wrapped, ["up_proj"], layers_to_transform=[2], layers_pattern="experts")) == 2
    assert asked(wrapped, ["up_proj"]).inner == tuple(paths(wrapped, ["up_proj"]))


def test_rank_and_alpha_patterns(llama: nn.Module) -> None:
    resolution = asked(llama, ["q", "v"], alpha=6, rank_pattern={"v_proj": 4}, alpha_pattern={r"layers\.1\..*": 12})
    assert [target.rank for target in resolution.targets] == [2, 4] * 3
    assert [target.alpha for target in resolution.targets] == [6, 6, 12, 12, 6, 6]
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(LoRATargetError, match=f"{field}: the key 'v_porj' matches no target") as caught:
            asked(llama, ["q", "v"], **{field: {"v_porj": 4}})
        assert "v_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "target", "limit"),
    [("llama", "q_proj", 32), ("llama", "up_proj", 32), ("llama", "embed_tokens", 32), ("gpt2", "q", 32)],
)
def test_no_rank_above_what_the_weight_can_have(request: Any, model: str, target: str, limit: int) -> None:
    base = request.getfixturevalue(model)
    assert asked(base, [target], r=limit).targets
    with pytest.raises(LoRAConfigError, match=f"rank {limit + 1} is above {limit}"):
        asked(base, [target], r=limit + 1)


def test_no_rank_above_the_rows_of_a_role() -> None:
    falcon = build("FalconForCausalLM", multi_query=True)  # one head of 8 rows is k
    with pytest.raises(LoRAConfigError, match=r"rank 9 is above 8.*8 x 32 \(its rows of role 'k'\)"):
        asked(falcon, ["k"], r=9)
    assert asked(falcon, ["q"], r=9).targets


# -- what matches nothing ---------------------------------------------------------------------------------------------


def test_every_item_has_to_match(llama: nn.Module) -> None:
    with pytest.raises(LoRATargetError, match="'v_porj' matches no module of LlamaForCausalLM") as caught:
        asked(llama, ["q_proj", "v_porj"])
    assert "Did you mean" in str(caught.value)
    assert "v_proj" in caught.value.remedy
    assert caught.value.value == "v_porj"


@pytest.mark.parametrize(
    ("model", "target", "error", "words"),
    [
        ("LlamaForCausalLM", "input_layernorm", LoRATargetError, ["LlamaRMSNorm", "neither a Linear-like"]),
        ("LlamaForCausalLM", "self_attn", LoRATargetError, ["LlamaAttention", "a container", "self_attn.q_proj"]),
        ("MixtralForCausalLM", "experts", LoRAUnsupportedError, ["MixtralExperts", "target_parameters"]),
        ("MixtralForCausalLM", "down", LoRAUnsupportedError, ["MixtralExperts", "target_parameters"]),
        ("PhimoeForCausalLM", "router", LoRAUnsupportedError, ["PhimoeTopKRouter", "a router"]),
    ],
)
def test_what_is_no_layer_is_named(model: str, target: str, error: type[LoRAError], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        asked(build(model, num_local_experts=2), [target])
    for word in words:
        assert word in str(caught.value)


def test_multihead_attention_is_explained_and_skipped() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    with pytest.raises(LoRAUnsupportedError, match="never calls it"):
        asked(model, ["out_proj"])
    resolution = asked(model, "all-linear")
    assert [target.path for target in resolution.targets] == ["fc"]
    assert any("attention.out_proj" in line and "never calls it" in line for line in resolution.skipped)


def test_a_name_that_also_matches_something_else_says_so() -> None:
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"proj": nn.Linear(4, 4)}), "b": nn.ModuleDict({"proj": nn.ConvTranspose2d(3, 4, 1)})}
    )
    resolution = asked(model, ["proj"])
    assert [target.path for target in resolution.targets] == ["a.proj"]
    assert any("b.proj (ConvTranspose2d)" in line for line in resolution.skipped)


def test_unknown_architectures_are_read_by_structure() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.proj = (nn.Linear(4, 4) for _ in range(4))

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

    model = nn.ModuleDict({"attention": Attention(), "proj": nn.Linear(4, 4)})
    assert paths(model, ["attention"]) == [f"attention.{name}" for name in ("q_proj", "k_proj", "v_proj", "proj")]
    assert asked(model, ["q"]).architecture is None
    with pytest.raises(LoRAUnsupportedError, match="rows for the role 'q' are not known") as caught:
        asked(Fused(), ["q"])
    assert "qkv" in caught.value.remedy
    assert paths(Fused(), ["qkv"]) == ["qkv"]


def test_a_part_of_unknown_type_is_told_apart() -> None:
    config = transformers.LlavaConfig(
        text_config={**SMALL, "model_type": "llama"},
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "model_type": "pixtral",
            "image_size": 16,
            "patch_size": 4,
        },
    )
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(config)
    resolution = asked(model, ["q"])
    assert len(resolution.targets) == 4
    assert resolution.architecture == "llava"
    assert any("pixtral" in line and "structure" in line for line in resolution.skipped)
    assert not any("pixtral" in line for line in asked(model, ["q_proj"]).skipped)


# -- defaults, heads --------------------------------------------------------------------------------------------------


def test_defaults(llama: nn.Module, gpt2: nn.Module) -> None:
    assert paths(llama, None) == paths(llama, ["q_proj", "v_proj"])
    assert paths(gpt2, None) == paths(gpt2, ["c_attn"])
    with pytest.raises(LoRATargetError, match="no default for model_type 'vit'") as caught:
        asked(build("ViTModel", image_size=16, patch_size=4), None)
    assert "all-linear" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        ("LlamaForSequenceClassification", ("score",)),
        ("LlamaForTokenClassification", ("score",)),
        ("GPT2ForTokenClassification", ("classifier",)),
        ("BertForSequenceClassification", ("classifier",)),
        ("RobertaForSequenceClassification", ("classifier",)),
        ("DistilBertForSequenceClassification", ("pre_classifier", "classifier")),
        ("DebertaV2ForSequenceClassification", ("pooler", "classifier")),
        ("ModernBertForSequenceClassification", ("classifier",)),
        ("BertForQuestionAnswering", ("qa_outputs",)),
        ("BartForSequenceClassification", ("classification_head",)),
        ("ViTForImageClassification", ("classifier",)),
        ("Wav2Vec2ForSequenceClassification", ("projector", "classifier")),
        ("T5ForQuestionAnswering", ("qa_outputs",)),
        ("LlamaForCausalLM", ()),
        ("BertForMaskedLM", ()),
    ],
)
def test_a_new_head_is_kept_without_being_told(model: str, heads: tuple[str, ...]) -> None:
    values = {"image_size": 16, "patch_size": 4} if "ViT" in model else {}
    if model.startswith("Wav2Vec2"):
        values = {"conv_dim": [8], "conv_kernel": [3], "conv_stride": [2], "num_feat_extract_layers": 1}
        values |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    base = build(model, **values)
    resolution = asked(base, "all-linear")
    assert set(resolution.heads) == set(heads)
    for target in resolution.targets:
        assert not any(f"{target.path}.".startswith(f"{head}.") for head in heads)
    assert asked(base, "all-linear", from_file=True).heads == ()
    assert asked(base, "all-linear", modules_to_save=[]).heads == ()


def test_heads_that_the_config_names(llama: nn.Module) -> None:
    resolution = asked(llama, ["q"], modules_to_save=["lm_head", "embed_tokens"])
    assert resolution.heads == ("lm_head", "model.embed_tokens")
    with pytest.raises(LoRATargetError, match="modules_to_save: 'lm_haed' matches no module") as caught:
        asked(llama, ["q"], modules_to_save=["lm_haed"])
    assert "lm_head" in caught.value.remedy
    with pytest.raises(LoRATargetError, match="matches only what modules_to_save trains whole"):
        asked(llama, ["q", "lm_head"], modules_to_save=["lm_head"])
    resolution = asked(llama, ["q", "up_proj"], modules_to_save=["layers.0.mlp"])
    assert "model.layers.0.mlp.up_proj" not in {target.path for target in resolution.targets}
    assert any("layers.0.mlp.up_proj" in line and "saved whole" in line for line in resolution.skipped)


def test_task_type_keeps_pefts_heads_even_from_a_file() -> None:
    model = build("DistilBertForSequenceClassification")
    for from_file in (False, True):
        resolution = asked(model, ["q_lin"], task_type="SEQ_CLS", from_file=from_file)
        assert set(resolution.heads) == {"pre_classifier", "classifier"}
    with pytest.raises(LoRATargetError, match="trains whole"):
        asked(model, ["q_lin", "pre_classifier"], task_type="SEQ_CLS")
    assert "pre_classifier" in paths(model, ["q_lin", "pre_classifier"])  # not named: the target wins


def test_a_name_that_reaches_into_the_new_head_stays_out_of_it() -> None:
    resolution = asked(build("RobertaForSequenceClassification"), ["dense"])
    assert len(resolution.targets) == 6
    assert resolution.heads == ("classifier",)
    assert any("classifier.dense" in line for line in resolution.skipped)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_file_names_modules_not_roles() -> None:
    class Block(nn.Module):  # a module called `up` that is no Transformer's W_up
        def __init__(self) -> None:
            super().__init__()
            self.up, self.up_proj, self.gate_proj = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    model = nn.ModuleDict({"block": Block()})
    assert paths(model, ["up"], from_file=True) == ["block.up"]
    assert paths(model, ["up"]) == ["block.up_proj"]


def test_a_file_may_name_more_than_there_is(llama: nn.Module) -> None:
    resolution = asked(
        llama,
        ["q_proj", "query"],
        from_file=True,
        exclude_modules=["absent"],
        rank_pattern={"absent": 3},
        modules_to_save=["absent"],
        layers_to_transform=[0, 9],
    )
    assert [target.path for target in resolution.targets] == ["model.layers.0.self_attn.q_proj"]
    assert len(resolution.skipped) == 4
    with pytest.raises(LoRATargetError, match="no target of"):
        asked(llama, ["query", "value"], from_file=True)
    with pytest.raises(LoRAUnsupportedError, match="transposed"):
        asked(nn.ModuleDict({"up": nn.ConvTranspose2d(3, 4, 1), "fc": nn.Linear(4, 4)}), ["up"], from_file=True)


# -- PEFT -------------------------------------------------------------------------------------------------------------

PARITY: list[tuple[str, dict[str, Any]]] = [
    ("LlamaForCausalLM", {"target_modules": "all-linear"}),
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    ("LlamaForCausalLM", {"target_modules": r".*\.(q|k)_proj", "exclude_modules": r".*\.0\..*"}),
    ("LlamaForCausalLM", {"target_modules": "all-linear", "exclude_modules": ["o_proj", "1.mlp.up_proj"]}),
    ("LlamaForCausalLM", {"target_modules": ["self_attn.v_proj", "embed_tokens", "lm_head"]}),
    (
        "LlamaForCausalLM",
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
    ),
    ("LlamaForCausalLM", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.1.mlp", "lm_head"]}),
    ("LlamaForSequenceClassification", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("LlamaForTokenClassification", {"target_modules": ["q_proj"], "task_type": "TOKEN_CLS"}),
    ("BertForMaskedLM", {"target_modules": "all-linear"}),
    ("BertForQuestionAnswering", {"target_modules": ["dense"], "task_type": "QUESTION_ANS"}),
    ("RobertaForSequenceClassification", {"target_modules": ["dense"], "task_type": "SEQ_CLS"}),
    ("DistilBertForSequenceClassification", {"target_modules": ["q_lin", "lin1"], "task_type": "SEQ_CLS"}),
    ("GPT2LMHeadModel", {"target_modules": "all-linear"}),
    ("GPT2LMHeadModel", {"target_modules": ["c_proj", "wte"]}),
    ("T5ForConditionalGeneration", {"target_modules": "all-linear"}),
    ("T5ForConditionalGeneration", {}),
    ("BartForConditionalGeneration", {"target_modules": "all-linear"}),
    ("WhisperForConditionalGeneration", {"target_modules": "all-linear", "exclude_modules": ["fc1"]}),
    ("AlbertForMaskedLM", {"target_modules": "all-linear"}),
    ("ModernBertForSequenceClassification", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("MixtralForCausalLM", {"target_modules": "all-linear"}),
    ("FalconForCausalLM", {}),
]


@pytest.mark.parametrize(("name", "values"), PARITY, ids=[f"{i}-{name}" for i, (name, _) in enumerate(PARITY)])
def test_the_same_modules_as_peft(name: str, values: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    extra: dict[str, Any] = {"attn_implementation": "eager"}
    if name.startswith("Bart"):
        extra |= {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
        extra |= {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("ffn_dim", 48),)}
    if name.startswith("T5"):
        extra |= {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    if name.startswith("Whisper"):
        extra |= {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        extra |= {"decoder_attention_heads": 4, "num_mel_bins": 8, "max_target_positions": 16}
    model = build(name, **extra)
    config = LoRAConfig(r=2, **values)
    ours = resolve(model, config, from_file=True)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **values))
    theirs = set(wrapped.base_model.targeted_module_names)
    saved = {
        path.removeprefix("base_model.model.")
        for path, module in wrapped.named_modules()
        if isinstance(module, peft.utils.ModulesToSaveWrapper)
    }
    assert {target.path for target in ours.targets} == theirs
    assert set(ours.heads) == saved


# -- speed ------------------------------------------------------------------------------------------------------------


def test_the_work_of_resolving_grows_with_the_layers_and_not_with_their_square() -> None:
    config = LoRAConfig(r=2, target_modules="all-linear", rank_pattern={r"layers\.\d\..*": 4})

    def calls(layers: int) -> int:
        model, count = build("LlamaForCausalLM", num_hidden_layers=layers), 0

        def seen(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event == "call"

        resolve(model, config)  # what is remembered for good is not counted
        before = sys.getprofile()
        sys.setprofile(seen)
        try:
            resolve(model, config)
        finally:
            sys.setprofile(before)
        return count

    few, twice = calls(15), calls(30)
    assert few > 100
    assert twice < 2.2 * few
