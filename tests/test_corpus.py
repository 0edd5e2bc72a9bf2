"""Adapters as they are found in public repositories: every one loads and computes what PEFT computes, or is refused
by name.
"""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracles import Snapshot, assert_apart, assert_close, build, inputs, logits, roughen, same_bits
from safetensors.torch import load_file

from hf_lora import LoRAAdapter, LoRAConfig, LoRAConfigError, LoRAError, LoRAFileError, LoRAUnsupportedError

# The published hyper-parameters of each base. Vocabulary, positions and inner MLP size are cut where no tensor of the
# adapter has their size.
_GPT2 = {"vocab_size": 600, "n_positions": 32, "n_inner": 96, "pad_token_id": 0}
_DISTILBERT = {"vocab_size": 600, "max_position_embeddings": 32, "hidden_dim": 96, "num_labels": 2}
_GEMMA3_270M = {
    "vocab_size": 600,
    "hidden_size": 640,
    "intermediate_size": 96,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "sliding_window": 512,
    "pad_token_id": 0,
}
_WHISPER_SMALL = {
    "vocab_size": 600,
    "d_model": 768,
    "encoder_layers": 12,
    "decoder_layers": 12,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_BERT_TINY = {
    "vocab_size": 600,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "num_labels": 3,
}
# folder -> (config, model, its fields, the file that PEFT calls adapter_model.safetensors or .bin)
LORA: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "0112LY__logo-gemma-lora": ("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA3_270M, "adapter_model.safetensors"),
    "D-Trifonova__FMI-ChatBot": ("GPT2Config", "GPT2LMHeadModel", _GPT2, "model.safetensors"),
    "RifqiCah__Adalora_indonesiaDataset": (
        "BertConfig",
        "BertForSequenceClassification",
        _BERT_TINY,
        "adapter_model.safetensors",
    ),
    "deepbiolab__gpt2-classification-peft": (
        "GPT2Config",
        "GPT2ForSequenceClassification",
        {**_GPT2, "n_inner": 3072},
        "adapter_model.safetensors",
    ),
    "erika0915__Speech-AI": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        _WHISPER_SMALL,
        "adapter_model.safetensors",
    ),
    "rkarnwal__udacity": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        _DISTILBERT,
        "adapter_model.safetensors",
    ),
    "sdtrklse__lightweight-fine-tuning": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        _DISTILBERT,
        "adapter_model.bin",
    ),
    "ybriz__generative-ai": ("GPT2Config", "GPT2ForSequenceClassification", _GPT2, "adapter_model.safetensors"),
}
ADALORA = "RifqiCah__Adalora_indonesiaDataset__adalora"


@pytest.fixture(scope="session")
def corpus(shared: Path) -> Path:
    return shared / "peft-corpus"


def index(corpus: Path) -> list[dict[str, str]]:
    with open(corpus / "INDEX.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


# ---- configs ---------------------------------------------------------------------------------------------------------


def test_every_lora_config_parses_and_says_what_it_said(corpus: Path) -> None:
    parsed = 0
    for row in index(corpus):
        fields = json.loads((corpus / "configs" / row["file"]).read_text(encoding="utf-8-sig"))
        if row["kind"] != "peft-lora":
            continue
        config = LoRAConfig.from_peft(fields)
        assert config.r == fields.get("r", 8), row["file"]
        assert config.alpha == fields.get("lora_alpha", 8), row["file"]
        assert config.use_rslora == bool(fields.get("use_rslora")), row["file"]
        assert config.unsupported().keys() <= fields.keys(), row["file"]
        assert LoRAConfig.from_peft(config.to_peft()) == config, row["file"]
        written = config.to_peft()
        for name, value in fields.items():  # nothing that says something is lost on the way
            if value not in (None, [], {}, "", False) and name not in (
                "inference_mode",
                "peft_version",
                "runtime_config",
            ):
                mine = written[name]
                same = (
                    sorted(map(str, mine)) == sorted(set(map(str, value))) if isinstance(value, list) else mine == value
                )
                assert same, f"{row['file']}: {name} was {value!r}, is {mine!r}"
        parsed += 1
    assert parsed == 59


def test_every_other_config_is_refused_by_its_type(corpus: Path, tmp_path: Path) -> None:
    model, refused = build("bert-cls"), {"peft-nonlora": 0, "mlx-lm": 0, "foreign": 0, "adapterhub": 0}
    before = Snapshot(model)
    named = {"mlx-lm": "mlx-lm", "adapterhub": "AdapterHub", "foreign": "no peft_type"}
    for row in index(corpus):
        if row["kind"] == "peft-lora":
            continue
        folder = tmp_path / row["file"]
        folder.mkdir()
        shutil.copy(corpus / "configs" / row["file"], folder / "adapter_config.json")
        with pytest.raises((LoRAUnsupportedError, LoRAConfigError)) as caught:
            model.load_lora(folder)
        assert named.get(row["kind"], repr(row["peft_type"])) in str(caught.value), (row["file"], str(caught.value))
        refused[row["kind"]] += 1
    assert refused == {"peft-nonlora": 33, "mlx-lm": 4, "foreign": 2, "adapterhub": 1}
    before.assert_same(model)


def test_a_lora_config_that_asks_for_more_than_plain_lora_names_the_field(corpus: Path) -> None:
    named: dict[str, set[str]] = {}
    for row in index(corpus):
        if row["kind"] != "peft-lora":
            continue
        config = LoRAConfig.from_peft(json.loads((corpus / "configs" / row["file"]).read_text(encoding="utf-8-sig")))
        for field in config.unsupported():
            with pytest.raises(LoRAUnsupportedError, match=field):
                config.require_supported()
            named.setdefault(field, set()).add(row["file"])


# ---- adapters --------------------------------------------------------------------------------------------------------


def base_of(name: str) -> Any:
    config, model, fields, _ = LORA[name]
    torch.manual_seed(0)
    base = getattr(transformers, model)(getattr(transformers, config)(**fields))
    roughen(base)
    return base.eval()


def test_the_folder_holds_what_these_tests_know(corpus: Path) -> None:
    assert {folder.name for folder in (corpus / "adapters").iterdir()} == {*LORA, ADALORA}


@pytest.mark.parametrize("name", LORA)
def test_a_published_adapter_gives_pefts_logits(name: str, corpus: Path, tmp_path: Path, peft: Any) -> None:
    folder, weights = corpus / "adapters" / name, LORA[name][3]
    model = base_of(name)
    before, batch = Snapshot(model), inputs(model, rows=2, length=9)
    plain = logits(model, batch)

    pickled = weights.endswith(".bin")
    if pickled:
        with pytest.raises(LoRAFileError, match="allow_pickle=True"):
            model.load_lora(folder)
        before.assert_same(model)
    assert model.load_lora(folder, allow_pickle=pickled) == name
    assert model.active_lora == name
    mine = logits(model, batch)
    assert_apart(mine, plain, what="the adapter's effect")
    model.save_lora(tmp_path / "saved")
    model.remove_lora()
    before.assert_same(model)

    standard = tmp_path / "standard"
    standard.mkdir()
    shutil.copy(folder / "adapter_config.json", standard)
    shutil.copy(folder / weights, standard / ("adapter_model.bin" if pickled else "adapter_model.safetensors"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected).*")
        theirs = peft.PeftModel.from_pretrained(model, str(standard)).eval()
    assert_close(mine, logits(theirs.get_base_model(), batch), what=name)

    # What we save again holds the same bits under the same names, with the same scaling.
    if not pickled:
        original, again = (
            load_file(str(folder / weights)),
            load_file(str(tmp_path / "saved" / "adapter_model.safetensors")),
        )
        assert original.keys() == again.keys()
        assert all(same_bits(original[key], again[key]) for key in original)
    one, other = LoRAAdapter.load(folder, allow_pickle=pickled), LoRAAdapter.load(tmp_path / "saved")
    assert {path: pair.scaling for path, pair in one.factors.items()} == {
        p: f.scaling for p, f in other.factors.items()
    }
    assert {path: set(state) for path, state in one.modules.items()} == {p: set(s) for p, s in other.modules.items()}


def test_adalora_weights_are_refused_by_type(corpus: Path, tmp_path: Path) -> None:
    model = base_of("RifqiCah__Adalora_indonesiaDataset")
    before = Snapshot(model)
    with pytest.raises(LoRAUnsupportedError, match="ADALORA"):
        model.load_lora(corpus / "adapters" / ADALORA)
    # … and by their tensors, should the config call itself LoRA
    fields = json.loads((corpus / "adapters" / ADALORA / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "peft_type": "LORA", "rank_pattern": {}}))
    shutil.copy(corpus / "adapters" / ADALORA / "adapter_model.safetensors", tmp_path)
    with pytest.raises(LoRAUnsupportedError) as caught:
        model.load_lora(tmp_path)
    assert "ADALORA" in str(caught.value) or "target_r" in str(caught.value)
    before.assert_same(model)


def test_an_adapter_on_another_base_changes_nothing(corpus: Path) -> None:
    model = build("gpt2")
    before = Snapshot(model)
    for name in LORA:
        with pytest.raises(LoRAError) as caught:
            model.load_lora(corpus / "adapters" / name, allow_pickle=True)
        base = json.loads((corpus / "adapters" / name / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert base in str(caught.value)
        before.assert_same(model)
