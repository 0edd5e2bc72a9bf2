"""The adapters that the Space ships, the recipes that made them, and the command that runs those."""

from __future__ import annotations

import json
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import hf_lora  # noqa: F401  # the methods on models
from hf_lora.health import examine
from hf_lora.recipe import Recipe, Source
from hf_lora.recipe.features import prepare
from hf_lora.store import read_adapter

ROOT = Path(__file__).resolve().parents[1]
RECIPES, ADAPTERS = ROOT / "recipes" / "space", ROOT / "spaces_demo" / "adapters"
PAGE = ROOT / "docs" / "pages" / "space-adapters.md"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TASKS = ("restaurants", "sentiment", "docstrings")  # grammar has a recipe, and no adapter that beats trivial answers
# the form's placeholder -> the recipe's column
COLUMNS = {"restaurants": ("attributes", "mr"), "docstrings": ("code", "code")}
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md", "task.yaml"}
HELD = {
    "restaurants": ["e2e/testset_w_refs.csv"],
    "sentiment": ["sst2/stsa.binary.dev"],
}

task = pytest.mark.parametrize("name", TASKS)


def form(name: str) -> dict[str, Any]:
    return yaml.safe_load((ADAPTERS / name / "task.yaml").read_text(encoding="utf-8"))


def recipe(name: str) -> Recipe:
    return Recipe.load(RECIPES / f"{name}.yaml")


@pytest.fixture(scope="module")
def skeleton() -> Any:
    """SmolLM2-135M without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


# ---- the adapters ----------------------------------------------------------------------------------------------------


def test_the_tasks_are_there_and_nothing_else() -> None:
    assert {path.name for path in ADAPTERS.iterdir()} == set(TASKS)
    for name in TASKS:
        assert {path.name for path in (ADAPTERS / name).iterdir()} == FILES


@task
def test_an_adapter_fits_the_base_and_its_recipe(name: str, skeleton: Any) -> None:
    value, made_by = read_adapter(ADAPTERS / name), recipe(name)
    linear = {path for path, layer in skeleton.named_modules() if isinstance(layer, torch.nn.Linear)} - {"lm_head"}
    named = made_by.lora.target_modules
    roles = tuple(f".{role}_proj" for role in named) if named != "all-linear" else ("",)
    assert set(value.factors) == {path for path in linear if path.endswith(roles)}
    skeleton.load_lora(ADAPTERS / name, name=name)
    assert list(skeleton.lora_names) == [name]
    skeleton.remove_lora()
    for path, factors in value.factors.items():
        layer = skeleton.get_submodule(path)
        assert tuple(factors.A.shape) == (made_by.lora.r, layer.in_features)
        assert tuple(factors.B.shape) == (layer.out_features, made_by.lora.r)
        assert factors.scaling == made_by.lora.alpha / made_by.lora.r
    assert not value.biases
    assert not value.modules
    assert made_by.base.model == value.config.base_model == BASE
    assert value.config.task_type == "CAUSAL_LM"
    assert (ADAPTERS / name / "adapter_model.safetensors").stat().st_size < 4 * 2**20


@task
def test_an_adapter_is_healthy(name: str) -> None:
    value = read_adapter(ADAPTERS / name)
    assert not examine(value)
    assert all(float((f.B @ f.A).norm()) > 0 for f in value.factors.values())


@task
def test_no_file_tells_of_the_machine_it_was_made_on(name: str) -> None:
    for file in (ADAPTERS / name).iterdir():
        text = file.read_bytes().decode("utf-8", "replace")
        if file.suffix == ".safetensors":
            text = text[: 8 + int.from_bytes(file.read_bytes()[:8], "little")]
        assert not re.search(
            r"(?<![\w:/.])/(?:tmp|home|root|usr|opt|var|mnt|work|Users)\b|[A-Z]:\\|site-packages", text
        )
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == BASE


# ---- the forms -------------------------------------------------------------------------------------------------------


def text_of(content: dict[str, Any], values: dict[str, str]) -> str:
    """The prompt of a form by what its format says, apart from the code that reads it."""
    joined = ""
    if "attributes" in content:
        how = content["attributes"]
        given = [(how["keys"].get(f["name"], f["name"]), values[f["name"]]) for f in content["fields"]]
        joined = how["joint"].join(
            how["pair"].replace("{key}", key).replace("{value}", value) for key, value in given if value
        )
    text = content["prompt"].replace("{attributes}", joined)
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def bytes_tokenizer() -> Any:
    """Each byte is a token, so that prompts are compared in full; the chat format is ChatML, as the base's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<|im_start|>", "<|im_end|>"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


@task
def test_a_forms_prompt_is_the_one_that_was_trained_on(name: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    content, data, tokenizer = form(name), recipe(name).data, bytes_tokenizer()
    placeholder, column = COLUMNS.get(name, ("sentence", "sentence"))
    assert 3 <= len(content["examples"]) <= 5
    rows = []
    for values in content["examples"]:
        alone = {**content, "prompt": f"{{{placeholder}}}"}
        answers = dict.fromkeys(data.template("completion").columns, "yes")
        rows.append({column: text_of(alone, values), **answers})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = replace(data, train=Source(file=str(file)), eval=None, max_eval=None, max_length=4096)
    trained = prepare(again, tokenizer, LlamaConfig(max_position_embeddings=8192), seq2seq=False).train
    assert content["chat"] is data.chat
    for values, example in zip(content["examples"], trained.examples, strict=True):
        text = text_of(content, values)
        if content["chat"]:
            turns = [{"role": "system", "content": content["system"]}, {"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompt = example["input_ids"][example["labels"] == -100]
        assert tokenizer.decode(prompt) == text
        assert prompt.tolist() == ids


@pytest.mark.parametrize("name", sorted(HELD))
def test_a_forms_examples_are_held_out(name: str, shared: Path) -> None:
    """Each stands in the file that was measured on."""
    content = form(name)
    held = "\n".join((shared / "data" / file).read_text(encoding="utf-8") for file in HELD[name])
    placeholder, _ = COLUMNS.get(name, ("sentence", "sentence"))
    for values in content["examples"]:
        assert text_of({**content, "prompt": f"{{{placeholder}}}"}, values) in held


@task
def test_a_form_is_complete(name: str) -> None:
    content = form(name)
    fields = [field["name"] for field in content["fields"]]
    assert all(list(values) == fields for values in content["examples"])
    assert content["stop"] == ["\n"]
    score = content["score"]
    assert set(score) == {"metric", "base", "best_trivial", "adapter", "error", "on", "better"}
    assert score["adapter"] > max(score["base"], score["best_trivial"]) + score["error"]


def test_the_space_reads_the_forms() -> None:
    tasks = pytest.importorskip("hf_lora.demo.tasks", reason="the Space's own code")
    for name in TASKS:
        content, read = form(name), tasks.read_task(ADAPTERS / name)
        for values in content["examples"]:
            assert read.text(values) == text_of(content, values)


# ---- the scores ------------------------------------------------------------------------------------------------------


def table(name: str) -> dict[str, list[str]]:
    """The card's scores: contestant -> cells."""
    card = (ADAPTERS / name / "README.md").read_text(encoding="utf-8")
    lines = card.partition("## Scores")[2].partition("## Data")[0].strip().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


@task
def test_the_card_says_what_the_form_says(name: str) -> None:
    score, rows = form(name)["score"], table(name)
    names = list(rows)
    assert names[:2] == ["adapter", "base"]
    assert re.fullmatch(r"base, \d examples shown", names[2])
    assert float(rows["adapter"][0]) == score["adapter"]
    assert float(rows["base"][0]) == score["base"]
    others = {other: float(rows[other][0]) for other in names[2:]}  # with examples, and without a model
    assert max(others.values()) == score["best_trivial"]
    best = max(others, key=others.__getitem__)
    against = "base" if score["base"] >= others[best] else best
    assert rows[against][1].endswith(f"± {score['error']}")
    card = (ADAPTERS / name / "README.md").read_text(encoding="utf-8")
    assert f"python recipes/space/make.py --only {name}" in card
    assert score["on"] in card


@task
def test_the_page_says_what_the_card_says(name: str) -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name}")]
    score, rows = form(name)["score"], table(name)
    value = read_adapter(ADAPTERS / name)
    (line,) = lines
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    shown = next(row for other, row in rows.items() if "examples shown" in other)
    trivial = max((row[0] for row in list(rows.values())[3:]), key=float)
    expected = [score["metric"], f"{score['base']}", shown[0], trivial]
    expected += [f"**{score['adapter']}** ± {score['error']}", f"{value.num_parameters:,}"]
    assert cells[2:8] == expected


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_prefix", [0, 5])
def test_answers_are_those_of_generate(shared_prefix: int, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES))
    from smallbase import tokenizer as words
    from space_parts.answering import answers

    model, tokenizer = tiny("llama"), words()
    rng = np.random.default_rng(0)
    start = rng.integers(3, 60, shared_prefix).tolist()
    prompts = [start + rng.integers(3, 60, length).tolist() for length in (1, 3, 3, 7)]
    found = answers(model, tokenizer, prompts, 6)
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 2, "pad_token_id": 0}
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]
        assert text == tokenizer.decode(made, skip_special_tokens=True)


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(RECIPES))
    import space_parts.scoring

    return space_parts.scoring


def test_the_error_of_a_difference_of_correlations(scoring: Any) -> None:
    rng = np.random.default_rng(3)
    truth = (rng.random(400) < 0.3).astype(int)
    mine = np.where(rng.random(400) < 0.8, truth, 1 - truth)
    theirs = np.where(rng.random(400) < 0.6, truth, 1 - truth)

    def phi(index: Any, said: Any) -> float:
        return 100 * float(np.corrcoef(truth[index], said[index])[0, 1])

    everything = np.arange(400)
    mean, error = scoring.error(truth, mine, theirs)
    assert mean == pytest.approx(phi(everything, mine) - phi(everything, theirs))
    picked = [rng.integers(0, 400, 400) for _ in range(2000)]
    spread = np.std([phi(index, mine) - phi(index, theirs) for index in picked])
    assert error == pytest.approx(1.96 * spread, rel=0.1)
    assert scoring.error(truth, mine, mine) == (0.0, 0.0)
    assert scoring.error(truth, np.zeros_like(truth), np.zeros_like(truth)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("positive", "positive"), (" Negative. It is", "negative"), ("not positive", None), ("", None), ("neutral", None)],
)
def test_which_class_an_answer_names(scoring: Any, text: str, expected: str | None) -> None:
    assert scoring.said(text, ("positive", "negative")) == expected


def test_the_command_from_data_to_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps on a tiny base: files, card and form are there, and speak of what was measured."""
    from smallbase import save_base
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    base = save_base(LlamaForCausalLM(config), tmp_path / "base", chat=True)
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    lines = [f"{i % 2} w{3 + i} w{4 + i} it was the longest of all the films\n" for i in range(40)]
    (data / "stsa.binary.train").write_text("".join(lines))
    (data / "stsa.binary.dev").write_text("".join(lines[:12]))
    monkeypatch.setattr(sys, "path", [str(RECIPES), *sys.path])  # the command puts itself there too
    main = runpy.run_path(str(RECIPES / "make.py"))["main"]
    command = ["--only", "sentiment", "--data", str(data.parent)]
    command += ["--base", str(base), "--steps", "2", "--heldout", "8", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    out = tmp_path / "out" / "sentiment"
    assert {path.name for path in out.iterdir()} == FILES
    content = yaml.safe_load((out / "task.yaml").read_text(encoding="utf-8"))
    assert content["score"]["on"] == "8 held-out rows"
    assert content["score"]["best_trivial"] == 50.0
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| adapter | " in card
    assert "results -->" not in card
    assert str(tmp_path) not in card + json.dumps(content)
    assert read_adapter(out).config.base_model == BASE
    assert main(["--only", "sentiment", "--data", str(tmp_path)]) == 1
    assert "sst2 is not in" in capsys.readouterr().err
