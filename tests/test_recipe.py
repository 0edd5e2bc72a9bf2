"""Recipes: the schema and its mistakes, rows from files, rows to tokens, and what a folder may hold."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from smallbase import save_base, tokenizer

from hf_lora import LoRAError, LoRATargetError
from hf_lora.recipe import Base, Data, Recipe, RecipeError, RunFolderError, Source, check, document, shapes, sources
from hf_lora.recipe.base import find
from hf_lora.recipe.features import IGNORED, _kept, collator, prepare
from hf_lora.recipe.folder import RECORD, RunFolder, identity
from hf_lora.recipe.problems import BaseNotFoundError, DataError
from hf_lora.recipe.template import Template

GOOD = """\
base:
  model: org/base
lora:
  r: 4
  target_modules: [q, v]
data:
  train: train.csv
  prompt: "{question}"
  completion: " {answer}"
training:
  learning_rate: 1e-4
  num_train_epochs: 2
out: task
"""


def load(text: str) -> Recipe:
    return Recipe.from_document(document.parse(text, "r.yaml"))


# ---- the schema ------------------------------------------------------------------------------------------------------


def test_a_recipe_says_what_it_says() -> None:
    recipe = load(GOOD)
    assert recipe.base == Base(model="org/base")
    assert (recipe.lora.r, recipe.lora.target_modules) == (4, ("q", "v"))
    assert recipe.data == Data(train=Source(file="train.csv"), prompt="{question}", completion=" {answer}")
    assert dict(recipe.training) == {"learning_rate": 1e-4, "num_train_epochs": 2}
    assert (recipe.out, recipe.push, recipe.seed) == ("task", None, 0)


def test_it_is_frozen_and_survives_its_own_plain_form() -> None:
    recipe = load(GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.out = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        recipe.training["learning_rate"] = 1  # type: ignore[index]
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert load(yaml.safe_dump(recipe.to_dict())) == recipe


MISTAKES: dict[str, tuple[str, str, str]] = {
    "a mis-spelt section": ("out: task", "output: task", r"line 13: output: a recipe has no such key.*mean out\?"),
    "a mis-spelt key": ("  model:", "  modle:", r"line 2: base\.modle: base has no such key.*mean model\?.*revision"),
    "a missing section": ("out: task\n", "", r"out: it is missing.*Add `out:`"),
    "a missing key": ("  model: org/base", "  dtype: auto", r"line 1: base\.model: it is missing"),
    "a wrong type": (
        "num_train_epochs: 2",
        "num_train_epochs: many",
        r"line 12: training\.num_train_epochs: 'many'.*a number",
    ),
    "true is no number": ("num_train_epochs: 2", "num_train_epochs: true", r"num_train_epochs: True is not a number"),
    "a section that is a word": ("  model: org/base", "  - org/base", r"line 1: base: \['org/base'\] is not a mapping"),
    "a wrong choice": ("model: org/base", "model: org/base\n  dtype: fp8", r"line 3: base\.dtype: 'fp8'.*'bfloat16'"),
    "a rank of zero": ("r: 4", "r: 0", r"line 4: lora\.r=0 is not a positive integer"),
    "PEFT's word": ("r: 4", "lora_alpha: 4", r"line 4: lora: .*called alpha here"),
    "the base in lora": ("r: 4", "base_model: x/y", r"line 4: lora\.base_model: .*section base"),
    "no such argument": (
        "learning_rate",
        "lerning_rate",
        r"line 11: training\.lerning_rate: .*no such field.*learning_rate",
    ),
    "an argument said elsewhere": (
        "learning_rate: 1e-4",
        "seed: 3",
        r"line 11: training\.seed: .*Write `seed:` beside",
    ),
    "the Hub's arguments": ("learning_rate: 1e-4", "hub_token: x", r"training\.hub_token: .*section `push:`.*HF_TOKEN"),
    "several processes": ("learning_rate: 1e-4", "deepspeed: x.json", r"training\.deepspeed: .*training script"),
    "an impossible rate": ("1e-4", "-1e-4", r"training\.learning_rate: -0\.0001 is not more than 0"),
    "no epochs": ("num_train_epochs: 2", "num_train_epochs: 0", r"num_train_epochs: 0 is not more than 0"),
    "a scheduler's name": (
        "learning_rate: 1e-4",
        "lr_scheduler_type: lineer",
        r"lr_scheduler_type: 'lineer'.*'linear'",
    ),
    "a file's ending": ("train.csv", "train.xlsx", r"line 7: data\.train: 'train\.xlsx'.*\.parquet"),
    "a list of files": ("train.csv", "[a.csv]", r"line 7: data\.train: \['a\.csv'\] is not a file"),
    "a file and a data set": (
        "train: train.csv",
        "train: {file: a.csv, dataset: x/y}",
        r"line 7: data\.train\.file, dataset: one of",
    ),
    "a split of a file": (
        "train: train.csv",
        "train: {file: a.csv, split: dev}",
        r"data\.train\.split: 'dev' means nothing for a file",
    ),
    "attribute access": (
        '"{question}"',
        '"{question!r}"',
        r"line 8: data\.prompt: .*braces hold a column's name and nothing else",
    ),
    "a format": ('"{question}"', '"{question:>9}"', r"data\.prompt: .*nothing else"),
    "an open brace": ('"{question}"', '"{question"', r"data\.prompt: .*is no template"),
    "a column without braces": ('"{question}"', "question", r'data\.prompt: .*Write "\{question\}"'),
    "a column without quotes": (
        '"{question}"',
        "{question}",
        r'line 8: data\.prompt: .*not a string.*in quotes: "{column}"',
    ),
    "two forms": (
        "  prompt:",
        '  text: "{a}"\n  prompt:',
        r"line 6: data: completion, prompt, text together are no form",
    ),
    "half a form": ('  completion: " {answer}"\n', "", r"data: prompt together are no form"),
    "a fraction of two": (
        "  prompt:",
        "  eval_fraction: 2\n  prompt:",
        r"data\.eval_fraction: 2\.0 is not a number between 0 and 1",
    ),
    "eval twice": (
        "  prompt:",
        "  eval: e.csv\n  eval_fraction: 0.1\n  prompt:",
        r"data\.eval_fraction: not together with eval",
    ),
    "a system without chat": (
        "  prompt:",
        "  system: be kind\n  prompt:",
        r"line 8: data\.system: .*nothing without chat",
    ),
    "a tiny length": (
        "  prompt:",
        "  max_length: 4\n  prompt:",
        r"data\.max_length: 4 is not an integer of at least 8",
    ),
    "a task and its data": (
        "  model: org/base",
        "  model: org/base\n  task: classification",
        r"line 3: base\.task: .*needs data\.label",
    ),
    "a negative seed": ("out: task", "out: task\nseed: -1", r"line 14: seed: -1 is not an integer from 0"),
    "a repo's id": ("out: task", "out: task\npush: {repo: a/b/c}", r"line 14: push\.repo: 'a/b/c' is not a repo's id"),
    "a key twice": (
        "out: task",
        "out: task\nout: other",
        r"line 14: 'out' occurs twice in the recipe \(first: r\.yaml, line 13\)",
    ),
    "a nested key twice": ("r: 4", "r: 4\n  r: 8", r"line 5: 'r' occurs twice in lora"),
    "an anchor": ("out: task", "out: &a task", r"line 13: anchors and aliases"),
    "an object": ("out: task", "out: !!python/object/apply:os.system [x]", r"line 13: the tag .* is not read"),
    "no YAML": ("out: task", "out: [task", r"line 14: this is no YAML"),
    "a number as a key": ("out: task", "out: task\n3: x", r"line 14: a key is '3'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named_with_its_line(case: str) -> None:
    before, after, says = MISTAKES[case]
    assert before in GOOD
    with pytest.raises(RecipeError, match=rf"(?s){says}") as caught:
        load(GOOD.replace(before, after))
    assert "r.yaml" in str(caught.value) or case == "a missing section"


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "is empty"), ("# nothing", "is empty"), ("[1]", "not a mapping"), ("a: 1\n---\nb: 2", "no YAML")],
)
def test_what_is_no_recipe_at_all(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        load(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.5e3", 1500.0),
        ("010", 10),
        ("1:30", "1:30"),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("2026-11-22", "2026-11-22"),
        ("~", None),
        ("", None),
        (".inf", float("inf")),
        ("1_000", "1_000"),
        ("'3'", "3"),
        ("[q, v]", ["q", "v"]),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: Any) -> None:
    """YAML 1.1, and so `yaml.safe_load`, reads 1e-4 as a word, no as false, 010 as 8 and 1:30 as 90."""
    found = document.parse_value(text, "--set x")
    assert found == value
    assert type(found) is type(value)


def test_flags_win_and_say_where_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD)
    changes = {("lora", "r"): (16, "--r"), ("training", "warmup_steps"): (3, "--set training.warmup_steps=3")}
    recipe = Recipe.load(path, changes)
    assert recipe.lora.r == 16
    assert dict(recipe.training) == {"learning_rate": 1e-4, "num_train_epochs": 2, "warmup_steps": 3}
    with pytest.raises(RecipeError, match=r"^--r: lora\.r=0"):
        Recipe.load(path, {("lora", "r"): (0, "--r")})
    with pytest.raises(RecipeError, match=r"--set out\.x=1: out is 'task', and has no 'x'"):
        Recipe.load(path, {("out", "x"): (1, "--set out.x=1")})


def test_files_are_looked_up_from_the_recipe_and_those_of_flags_from_here(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "r.yaml"
    path.write_text(GOOD.replace("train.csv", "../train.csv").replace("org/base", "./base"))
    recipe = Recipe.load(path, {("data", "eval"): ("eval.csv", "--eval")})
    assert recipe.data.train.file == str(tmp_path / "train.csv")
    assert recipe.data.eval == Source(file="eval.csv")
    assert recipe.base.model == str(tmp_path / "deep" / "base")
    assert recipe.out == "task"


def test_a_file_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "task.yaml").write_text(
        "base: {model: ~/base}\ndata: {train: ~/a.csv, eval: {file: ~/b.csv}, text: '{t}'}\nout: o\n"
    )
    recipe = Recipe.load(tmp_path / "task.yaml")
    found = (recipe.base.model, recipe.data.train.file, recipe.data.eval and recipe.data.eval.file)
    assert found == tuple(str(tmp_path / "home" / name) for name in ("base", "a.csv", "b.csv"))


def test_a_recipe_that_is_not_there_or_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read \(No such file"):
        Recipe.load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("out: caf\xe9".encode("latin1"))
    with pytest.raises(RecipeError, match=r"not UTF-8 \(byte 8\)"):
        Recipe.load(tmp_path / "latin.yaml")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
_PATHS = [
    (section, *([key] if key else []))
    for section, keys in {
        "base": ["", "model", "revision", "id", "dtype", "task"],
        "lora": ["", "r", "alpha", "dropout", "target_modules", "rank_pattern", "bias", "peft_fields"],
        "data": ["", *(field.name for field in dataclasses.fields(Data))],
        "training": [
            "",
            "learning_rate",
            "max_steps",
            "save_steps",
            "optim",
            "lr_scheduler_kwargs",
            "accelerator_config",
        ],
        "push": ["", "repo", "private"],
        "out": [""],
        "seed": [""],
    }.items()
    for key in keys
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.sampled_from(_PATHS), _VALUES), max_size=3))
def test_any_values_give_a_recipe_or_a_typed_error(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    content = yaml.safe_load(GOOD.replace("1e-4", "1.0e-4"))
    for path, value in changes:
        section = content
        for key in path[:-1]:
            section = section.setdefault(key, {}) if isinstance(section, dict) else {}
        if isinstance(section, dict):
            section[path[-1]] = value
    try:
        recipe = Recipe.from_dict(content)
    except LoRAError:
        return  # any other error fails the test
    assert Recipe.from_dict(recipe.to_dict()) == recipe or "nan" in repr(recipe)


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60) | st.text(alphabet="ab:{}[]&*!|>'\"- \n#%@`?,1", max_size=60))
def test_any_text_gives_a_recipe_or_a_typed_error(text: str) -> None:
    with pytest.raises(RecipeError):
        load(text)  # none of these has what a recipe needs
    with pytest.raises(RecipeError):
        load(GOOD.replace("task", f"{text}\n&a x"))


# ---- types and templates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "hint", "fit"),
    [
        (3, int, True),
        (True, int, False),
        (3, float, True),
        ("3", float, False),
        (None, int | None, True),
        (["a"], tuple[str, ...], True),
        ("a", tuple[str, ...], False),
        ([1], list[str], False),
        ({"a": 1}, dict[str, int], True),
        ({"a": "b"}, dict[str, int], False),
        (1, Any, True),
    ],
)
def test_a_value_fits_its_annotation(value: Any, hint: Any, fit: bool) -> None:
    assert shapes.fits(value, hint) is fit


def test_a_template_looks_nothing_up() -> None:
    class Trap:
        secret = "secret"

    template = Template.parse("text", "{{{a.secret}}} {b}")
    assert template.columns == ("a.secret", "b")  # a column's name, dots and all
    assert template.render({"a.secret": "x", "b": "{a}", "a": Trap()}) == "{x} {a}"


# ---- rows ------------------------------------------------------------------------------------------------------------

ROWS = [{"q": "w3 w4", "a": "w5"}, {"q": 'say "hi", you', "a": "two\nlines"}]


def written(folder: Path, ending: str) -> Path:
    path = folder / f"data.{ending}"
    if ending in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["q", "a"], delimiter="\t" if ending == "tsv" else ",")
            writer.writeheader()
            writer.writerows(ROWS if ending == "csv" else ROWS[:1])
    elif ending == "json":
        path.write_text(json.dumps(ROWS))
    elif ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif ending == "parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(ROWS), path)
    else:
        path.write_text("one\n\n two\r\n")
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet", "txt"])
def test_every_format_gives_its_rows(ending: str, tmp_path: Path) -> None:
    rows = sources.read(Source.of(str(written(tmp_path, ending))), split="train")
    expected = {"tsv": ROWS[:1], "txt": [{"text": "one"}, {"text": " two"}]}.get(ending, ROWS)
    assert [dict(row) for row in rows.rows] == expected
    assert rows.columns == tuple(expected[0])


def test_a_table_without_a_header_and_with_plain_quotes(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_bytes(b'\xef\xbb\xbf1\tan "odd quote\n0\tthe other\n')
    rows = sources.read(Source(file=str(tmp_path / "d.tsv"), columns=("label", "text")), split="train")
    assert [dict(row) for row in rows.rows] == [
        {"label": "1", "text": 'an "odd quote'},
        {"label": "0", "text": "the other"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.csv", b"", r"d\.csv holds no rows"),
        ("d.csv", b"q,a\n", r"d\.csv holds no rows"),
        ("d.csv", b"q,a\n1,2\n\n1,2,3\n", r"d\.csv, line 4: 3 fields, and the columns are 2: q, a"),
        ("d.csv", b'q,a\n"1\n2",x\n1\n', r"d\.csv, line 4: 1 fields"),
        ("d.csv", b"q,q\n1,2\n", r"the column 'q' twice"),
        ("d.csv", b'q,a\n1,"2\n', r"d\.csv, line 2: unexpected end of data"),
        ("d.csv", b"q,a\ncaf\xe9,2\n", r"not UTF-8: byte 0xe9 in line 2.*iconv"),
        ("d.json", b"{}", r"holds an object, not a list of objects"),
        ("d.json", b"[1]", r"row 1: a number, not an object"),
        ("d.json", b"[", r"d\.json: this is no JSON"),
        ("d.json", b"[" * 100_000, r"d\.json: this is no JSON"),
        ("d.jsonl", b'{"a": 1}\n{"a": 2\n', r"d\.jsonl, line 2: this is no JSON"),
        ("d.jsonl", b'\n{"a": 1}\n"x"\n', r"d\.jsonl, line 3: a string, not an object"),
        ("d.txt", b"\n \n", r"d\.txt holds no rows"),
        ("d.parquet", b"PAR1", r"no Parquet file"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"(?s){says}"):
        sources.read(Source.of(str(tmp_path / name)), split="train")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such file[\s\S]*relative to the recipe"):
        sources.read(Source.of(str(tmp_path / "d.csv")), split="train")


def test_a_field_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("a,b\n" + "x" * 200_000 + ",y\n")
    before = csv.field_size_limit()
    assert len(sources.read(Source.of(str(tmp_path / "d.csv")), split="train").rows[0]["a"]) == 200_000
    assert csv.field_size_limit() == before


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real `Dataset`; only the download is left out."""
    import datasets

    asked = []
    features = datasets.Features({"t": datasets.Value("string"), "y": datasets.ClassLabel(names=["bad", "good"])})
    found = datasets.Dataset.from_list([{"t": f"w{3 + i}", "y": i % 2} for i in range(6)], features=features)

    def load_dataset(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments, options))
        return found

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = Source(dataset="me/set", config="small", revision="v1")
    prepared = prepare(Data(train=source, text="{t}", label="y"), tokenizer(), type("C", (), {})(), seq2seq=False)
    assert asked == [(("me/set", "small"), {"split": "train", "revision": "v1"})]
    assert prepared.labels == ("bad", "good")
    assert [int(e["labels"]) for e in prepared.train.examples] == [0, 1] * 3
    assert prepared.train.facts.source == "me/set small v1 (train)"
    with pytest.raises(RecipeError, match=r"no column 'x'[\s\S]*t, y"):
        prepare(Data(train=source, text="{x}"), tokenizer(), type("C", (), {})(), seq2seq=False)


def test_a_data_set_of_the_hub_offline() -> None:
    pytest.importorskip("datasets", reason="datasets is not installed: install hf_lora[test]")
    with pytest.raises(DataError, match=r"'me/no-such-set' \(validation\) cannot be had"):
        sources.read(Source.of("me/no-such-set"), split="validation")


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny: Any) -> Any:
    return tiny("llama").config


def rows_file(folder: Path, rows: list[dict[str, Any]], name: str = "d.jsonl") -> Source:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(file=str(path))


def one(prepared: Any, index: int = 0) -> tuple[list[int], Any]:
    example = prepared.train[index]
    return example["input_ids"].tolist(), example["labels"].tolist()


def test_only_the_completion_is_learned(tmp_path: Path, config: Any) -> None:
    data = Data(train=rows_file(tmp_path, [{"q": "w3 w4", "a": "w5 w6"}]), prompt="w9 {q}", completion="{a}")
    prepared = prepare(data, tokenizer(), config, seq2seq=False)
    assert one(prepared) == ([9, 3, 4, 5, 6, 2], [IGNORED] * 3 + [5, 6, 2])
    facts = prepared.train.facts
    assert (facts.examples, facts.cut, facts.tokens, facts.learned, facts.longest) == (1, 0, 6, 3, 6)


def test_of_a_text_everything_is_learned_and_it_begins_as_the_tokenizer_says(tmp_path: Path, config: Any) -> None:
    from tokenizers import processors

    data = Data(train=rows_file(tmp_path, [{"t": "w3 w4"}]), text="{t}")
    assert one(prepare(data, tokenizer(), config, seq2seq=False)) == ([3, 4, 2], [3, 4, 2])
    beginning = tokenizer(bos_token="<bos>")
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    assert one(prepare(data, beginning, config, seq2seq=False)) == ([1, 3, 4, 2], [IGNORED, 3, 4, 2])


def test_of_a_chat_what_the_assistant_says_is_learned(tmp_path: Path, config: Any) -> None:
    turns = [("system", "w3"), ("user", "w4"), ("assistant", "w5 w6"), ("user", "w7"), ("assistant", "w8")]
    chat = [{"role": role, "content": content} for role, content in turns]
    data = Data(train=rows_file(tmp_path, [{"chat": chat}]), messages="chat")
    ids, labels = one(prepare(data, tokenizer(chat=True), config, seq2seq=False))
    assert ids == [1, 60, 3, 2, 61, 4, 2, 62, 5, 6, 2, 61, 7, 2, 62, 8, 2]
    assert [label for label in labels if label != IGNORED] == [5, 6, 2, 8, 2]
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))


def test_prompt_and_completion_in_the_chat_format(tmp_path: Path, config: Any) -> None:
    data = Data(
        train=rows_file(tmp_path, [{"q": "w4", "a": "w5"}]), prompt="{q}", completion="{a}", chat=True, system="w3"
    )
    ids, labels = one(prepare(data, tokenizer(chat=True), config, seq2seq=False))
    assert ids == [1, 60, 3, 2, 61, 4, 2, 62, 5, 2]
    assert labels == [IGNORED] * 8 + [5, 2]


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ([{"role": "user", "content": "w3"}], r"line 1: nothing of this example is learned"),
        ("w3", r"line 1: the column 'm' holds 'w3', which is no chat"),
        ([{"role": "user"}], r"which is no chat"),
        ([{"role": "assistant", "content": 3}], r"which is no chat"),
        ([], r"nothing of this example"),
    ],
)
def test_what_is_no_chat(chat: Any, says: str, tmp_path: Path, config: Any) -> None:
    data = Data(train=rows_file(tmp_path, [{"m": chat}]), messages="m")
    with pytest.raises(DataError, match=says):
        prepare(data, tokenizer(chat=True), config, seq2seq=False)


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path, config: Any) -> None:
    forgetful = tokenizer()
    forgetful.chat_template = "{{ messages[-1]['content'] }}"
    chat = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    with pytest.raises(DataError, match="rewrites earlier turns"):
        prepare(Data(train=rows_file(tmp_path, [{"m": chat}]), messages="m"), forgetful, config, seq2seq=False)


def test_a_base_without_a_chat_template(tmp_path: Path, config: Any) -> None:
    with pytest.raises(RecipeError, match=r"data\.messages: .*no chat template"):
        prepare(Data(train=rows_file(tmp_path, [{"m": []}]), messages="m"), tokenizer(), config, seq2seq=False)


@pytest.mark.parametrize(
    ("length", "first", "maximum", "kept"),
    [
        (10, 4, 10, (0, 10)),
        (12, 4, 10, (0, 10)),
        (20, 12, 10, (7, 17)),
        (20, 18, 10, (10, 20)),
        (20, 1, 10, (0, 10)),
        (9, 9, 8, (1, 9)),
    ],
)
def test_what_is_kept_of_a_long_example(length: int, first: int, maximum: int, kept: tuple[int, int]) -> None:
    """By hand. (20, 12): 8 learned tokens do not fit beside half of 10, so 5 of each side: 7..12 and 12..17."""
    if (length, first) == (20, 18):
        kept = (10, 20)  # two learned tokens, and the eight of the prompt before them
    found = _kept(length, first, maximum)
    assert (found.start, found.stop) == kept


def test_long_examples_are_cut_counted_and_none_is_dropped(tmp_path: Path, config: Any) -> None:
    rows = [{"q": "w3 " * n, "a": "w4 " * m} for n, m in [(2, 2), (20, 3), (3, 20), (20, 20)]]
    data = Data(train=rows_file(tmp_path, rows), prompt="{q}", completion="{a}", max_length=10)
    prepared = prepare(data, tokenizer(), config, seq2seq=False)
    facts = prepared.train.facts
    assert (facts.examples, facts.cut, facts.longest) == (4, 3, 41)
    assert [len(prepared.train[i]["input_ids"]) for i in range(4)] == [5, 10, 10, 10]
    learned = [sum(label != IGNORED for label in prepared.train[i]["labels"].tolist()) for i in range(4)]
    assert learned == [3, 4, 7, 5]  # with the end token, where it was not cut off


def test_max_length_is_what_the_base_takes(tmp_path: Path, config: Any) -> None:
    source = rows_file(tmp_path, [{"t": "w3"}])
    assert prepare(Data(train=source, text="{t}"), tokenizer(), config, seq2seq=False).max_length == 64
    with pytest.raises(RecipeError, match=r"max_length: 65 is more than the 64 tokens"):
        prepare(Data(train=source, text="{t}", max_length=65), tokenizer(), config, seq2seq=False)


def test_an_encoder_decoder_gets_both_sides(tmp_path: Path, tiny: Any) -> None:
    rows = [{"q": "w3 w4", "a": "w5"}, {"q": "w3 " * 20, "a": "w6"}]
    data = Data(train=rows_file(tmp_path, rows), prompt="{q}", completion="{a}", max_length=8)
    prepared = prepare(data, tokenizer(), tiny("t5").config, seq2seq=True)
    assert one(prepared) == ([3, 4], [5])
    assert prepared.train.facts.cut == 1
    with pytest.raises(RecipeError, match="learns a completion from a prompt"):
        prepare(Data(train=rows_file(tmp_path, rows), text="{q}"), tokenizer(), tiny("t5").config, seq2seq=True)


def test_a_missing_column_names_those_there_are(tmp_path: Path, config: Any) -> None:
    data = Data(train=rows_file(tmp_path, [{"question": "w3", "a": "w4"}]), prompt="{questoin}", completion="{a}")
    with pytest.raises(RecipeError, match=r"data\.prompt: .*no column 'questoin'[\s\S]*mean question\?.*question, a"):
        prepare(data, tokenizer(), config, seq2seq=False)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"q": "w3", "a": "w4"}, {"q": "w3"}], r"line 2: there is no value in the column 'a'"),
        ([{"q": "w3", "a": ""}], r"line 1: there is no value"),
        ([{"q": "w3", "a": None}], r"line 1: there is no value"),
        ([{"q": ["w3"], "a": "w4"}], r"line 1: the column 'q' holds \['w3'\], which is no text"),
    ],
)
def test_a_row_without_a_value(rows: list[dict[str, Any]], says: str, tmp_path: Path, config: Any) -> None:
    with pytest.raises(DataError, match=says):
        prepare(
            Data(train=rows_file(tmp_path, rows), prompt="{q}", completion="{a}"), tokenizer(), config, seq2seq=False
        )


# ---- classes ---------------------------------------------------------------------------------------------------------


def classified(tmp_path: Path, values: list[Any], **options: Any) -> Any:
    rows = [{"t": f"w{3 + i % 9}", "y": value} for i, value in enumerate(values)]
    data = Data(train=rows_file(tmp_path, rows), text="{t}", label="y", **options)
    return prepare(data, tokenizer(), type("C", (), {})(), seq2seq=False)


@pytest.mark.parametrize(
    ("values", "given_labels", "labels", "classes"),
    [
        (["no", "yes", "no", "no"], None, ("no", "yes"), [0, 1, 0, 0]),
        (["no", "yes", "no", "no"], ("yes", "no"), ("yes", "no"), [1, 0, 1, 1]),
        ([1, 0, 2, 0, 1, 0], None, ("0", "1", "2"), [1, 0, 2, 0, 1, 0]),
        (["1", "0"] * 3, ("bad", "good"), ("bad", "good"), [1, 0] * 3),
        ([0, 2, 0, 0, 0, 0], None, ("0", "1", "2"), [0, 2, 0, 0, 0, 0]),
    ],
)
def test_labels(values: list[Any], given_labels: Any, labels: Any, classes: list[int], tmp_path: Path) -> None:
    prepared = classified(tmp_path, values, labels=given_labels)
    assert prepared.labels == labels
    assert [int(prepared.train[i]["labels"]) for i in range(len(values))] == classes


@pytest.mark.parametrize(
    ("values", "given_labels", "says"),
    [
        (
            [0, 1, 2],
            ("bad", "good"),
            r"line 3: the label 2 is none of the 2 classes[\s\S]*bad, good, or their indices 0 to 1",
        ),
        (["bad", "goood"], ("bad", "good"), r"line 2: the label 'goood' is none"),
        ([0, -1], ("bad", "good"), r"line 2: the label -1 is none"),
        (["a"] * 4, None, r"holds 1 different classes in 4 examples \('a'\)"),
        ([f"text {i}" for i in range(9)], None, r"9 different classes in 9 examples"),
        ([0, 123456], None, r"holds 123456, which is no index"),
        (["9" * 5000, 1], ("bad", "good"), r"line 1: the label '9{199}… is none"),
        ([0, None], None, r"line 2: there is no value in the column 'y'"),
    ],
)
def test_labels_that_cannot_be(values: list[Any], given_labels: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says):
        classified(tmp_path, values, labels=given_labels)


def test_pairs_are_cut_as_the_tokenizer_cuts(tmp_path: Path) -> None:
    rows = [{"a": "w3 " * 9, "b": "w4 " * 3, "y": i % 2} for i in range(4)]
    data = Data(train=rows_file(tmp_path, rows), text="{a}", pair="{b}", label="y", max_length=8)
    prepared = prepare(data, tokenizer(), type("C", (), {})(), seq2seq=False)
    assert prepared.train[0]["input_ids"].tolist() == [3] * 5 + [4] * 3
    assert prepared.train.facts.cut == 4


# ---- splits ----------------------------------------------------------------------------------------------------------


def split(tmp_path: Path, **options: Any) -> tuple[list[int], list[int], Any]:
    rows = [{"t": f"w{3 + i}", "g": i // 4} for i in range(40)]  # w3 to w42
    prepared = prepare(
        Data(train=rows_file(tmp_path, rows), text="{t}", **options), tokenizer(), type("C", (), {})(), seq2seq=False
    )
    train, held = ([int(e["input_ids"][0]) - 3 for e in part.examples] for part in (prepared.train, prepared.eval))
    return train, held, prepared


def test_holding_out_depends_on_the_seed_alone(tmp_path: Path) -> None:
    train, held, prepared = split(tmp_path, eval_fraction=0.25)
    assert len(held) == 10
    assert sorted(train + held) == list(range(40))
    random.seed(9)
    np.random.seed(9)
    assert split(tmp_path, eval_fraction=0.25)[:2] == (train, held)
    assert split(tmp_path, eval_fraction=0.25)[2].fingerprint() == prepared.fingerprint()
    other = split(tmp_path, eval_fraction=0.25, seed=1)
    assert other[1] != held
    assert other[2].fingerprint() != prepared.fingerprint()


def test_groups_are_held_out_together(tmp_path: Path) -> None:
    train, held, _ = split(tmp_path, eval_fraction=0.25, eval_group="g")
    assert len(held) == 12  # whole groups of four, until at least ten
    assert not {i // 4 for i in train} & {i // 4 for i in held}


def test_sampling(tmp_path: Path) -> None:
    train, held, _ = split(tmp_path, eval_fraction=0.25, max_train=7, max_eval=3)
    assert (len(train), len(held)) == (7, 3)
    assert not set(train) & set(held)
    assert train == sorted(train)


def test_nothing_left_to_train_on(tmp_path: Path) -> None:
    data = Data(train=rows_file(tmp_path, [{"t": "w3", "g": 1}] * 3), text="{t}", eval_fraction=0.5, eval_group="g")
    with pytest.raises(DataError, match="leaves none to train on"):
        prepare(data, tokenizer(), type("C", (), {})(), seq2seq=False)


def test_a_batch_is_padded_where_nobody_looks() -> None:
    examples = [
        {
            "input_ids": np.array(ids, np.int32),
            "labels": np.array(labels, np.int32),
            "token_type_ids": np.array([1] * len(ids)),
        }
        for ids, labels in [([5, 6, 7], [-100, 6, 7]), ([8], [8])]
    ]
    batch = collator(9)(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


# ---- checking a whole recipe -----------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tiny: Any, tmp_path: Path) -> dict[str, Any]:
    """A recipe in plain values that can be carried out."""
    save_base(tiny("llama"), tmp_path / "base")
    rows_file(tmp_path, [{"q": f"w{3 + i % 40}", "a": f"w{4 + i % 7}"} for i in range(20)])
    return {
        "base": {"model": str(tmp_path / "base")},
        "lora": {"r": 2, "target_modules": ["q", "v"]},
        "data": {"train": str(tmp_path / "d.jsonl"), "prompt": "{q}", "completion": "{a}", "eval_fraction": 0.2},
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 5, "use_cpu": True},
        "out": str(tmp_path / "out"),
    }


def test_a_check_says_what_it_comes_to_and_writes_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    plan = check(Recipe.from_dict(recipe))
    assert (plan.task, plan.train.examples, plan.eval.examples) == ("causal-lm", 16, 4)
    assert plan.steps == 2 * 4  # 16 examples, 5 at once, the last batch smaller
    (adapter,) = plan.summary.adapters
    assert adapter.targets == {"q": 2, "v": 2}
    # q: 2·(32 + 32), v: 2·(32 + 16), in two layers
    assert plan.summary.trainable == 2 * (2 * 64 + 2 * 48)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("section", "key", "value", "error", "says"),
    [
        ("lora", "target_modules", ["q", "valeu"], LoRATargetError, "valeu"),
        ("lora", "r", 900, LoRAError, "900"),
        ("base", "model", "./nowhere", BaseNotFoundError, "is no folder"),
        ("base", "model", "no/such-model", BaseNotFoundError, "cannot be loaded"),
        ("base", "revision", "main", RecipeError, "means nothing for a folder"),
        ("base", "task", "seq2seq", RecipeError, "is no encoder-decoder"),
        ("training", "eval_strategy", "never", RecipeError, "'never' is not"),
        ("training", "load_best_model_at_end", True, RecipeError, "TrainingArguments refuses this"),
        ("data", "max_length", 100, RecipeError, "64 tokens that the base takes"),
    ],
)
def test_a_check_finds_it(
    section: str, key: str, value: Any, error: type[LoRAError], says: str, recipe: dict[str, Any]
) -> None:
    recipe[section][key] = value
    with pytest.raises(error, match=says):
        check(Recipe.from_dict(recipe))


def test_evaluating_without_examples_is_refused(recipe: dict[str, Any]) -> None:
    del recipe["data"]["eval_fraction"]
    recipe["training"]["eval_strategy"] = "epoch"
    with pytest.raises(RecipeError, match="nothing to evaluate on"):
        check(Recipe.from_dict(recipe))


def test_a_repo_needs_a_base_with_an_id(recipe: dict[str, Any]) -> None:
    recipe["push"] = {"repo": "me/task"}
    with pytest.raises(LoRAError, match=r"is a folder or no id on the Hub[\s\S]*Give base\.id \(--base-id\)"):
        check(Recipe.from_dict(recipe))
    recipe["base"]["id"] = "org/tiny"
    assert check(Recipe.from_dict(recipe)).base == "org/tiny"


def test_a_decoder_classifies_an_example_alike_alone_and_in_a_batch(tiny: Any, tmp_path: Path) -> None:
    """Its classifier looks at the last token before the padding, whatever the config says that padding is."""
    model = tiny("llama")
    model.config.pad_token_id = 7  # the tokenizer's is 0
    save_base(model, tmp_path)
    data = rows_file(tmp_path, [{"t": "w3", "y": 0}, {"t": "w4 w5 w6", "y": 1}])
    recipe = Recipe(base=Base(model=str(tmp_path)), data=Data(train=data, text="{t}", label="y"), out="o")
    found = find(recipe.base, recipe.data)
    examples = prepare(recipe.data, found.tokenizer, found.config, seq2seq=False).train
    model, collate = found.model(("no", "yes")).eval(), collator(found.pad)
    with torch.no_grad():
        alone, together = (model(**collate([examples[i] for i in which])).logits[0] for which in ([0], [0, 1]))
    torch.testing.assert_close(alone, together)


def test_several_processes_are_refused(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("hf_lora.recipe.run._require_extras", lambda recipe: None)
    with pytest.raises(RecipeError, match="one of 2 processes"):
        check(Recipe.from_dict(recipe))


# ---- the recipes of the repository -----------------------------------------------------------------------------------

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize("name", ["e2e", "sst2"])
def test_a_recipe_of_the_repository_fits_its_data(name: str, tiny: Any, tmp_path: Path, shared: Path) -> None:
    """With a tiny base in place of its own, and the files as their publishers have them."""
    as_it_is = Recipe.load(RECIPES / f"{name}.yaml").data
    assert as_it_is.eval is not None
    assert all(Path(str(source.file)).is_relative_to(RECIPES / "data") for source in (as_it_is.train, as_it_is.eval))
    if name == "e2e":
        model, files = "llama", [shared / "data" / "e2e" / Path(str(as_it_is.eval.file)).name] * 2
        examples = 64
    else:
        model, files = "bert", [tmp_path / "dev.tsv"] * 2
        lines = (shared / "data" / "sst2" / "stsa.binary.dev").read_text().splitlines()
        files[0].write_text("\n".join(["label\tsentence", *(line.replace(" ", "\t", 1) for line in lines)]) + "\n")
        examples = 872
    changes = {"base.model": str(save_base(tiny(model), tmp_path / "base", chat=True)), "data.max_length": 64}
    changes |= {"data.train": str(files[0]), "data.eval": str(files[1])}
    plan = check(
        Recipe.load(RECIPES / f"{name}.yaml", {tuple(key.split(".")): (value, "") for key, value in changes.items()})
    )
    assert plan.eval is not None
    assert plan.eval.examples == examples
    assert plan.labels == (("negative", "positive") if name == "sst2" else None)


# ---- the folder ------------------------------------------------------------------------------------------------------


def test_the_same_run_wherever_it_lies(tmp_path: Path) -> None:
    one = load(GOOD)
    moved = load(
        GOOD.replace("train.csv", "/elsewhere/train.csv").replace("out: task", "out: other\npush: {repo: me/x}")
    )
    assert identity(one) == identity(moved)
    assert identity(load(GOOD.replace("r: 4", "r: 5"))) != identity(one)


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    (tmp_path / "README.md").write_text("my words")
    assert folder.look() is None
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match=r"not empty[\s\S]*thesis\.tex[\s\S]*nothing of yours"):
        folder.look()


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"format": "another"}', '{"format": "hf_lora train 1"}', "null", "[" * 99999]
)
def test_a_record_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(content)
    if content == "null":
        (tmp_path / "x").write_text("")
    with pytest.raises(RunFolderError):
        RunFolder(tmp_path).look()


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for name, state in {
        "checkpoint-2": '{"global_step": 2}',
        "checkpoint-10": '{"global_step": 10}',
        "checkpoint-12": '{"glob',
        "checkpoint-14": None,
        "checkpoint-16": '{"global_step": 2}',
    }.items():
        (folder.checkpoints / name).mkdir(parents=True)
        if state is not None:
            (folder.checkpoints / name / "trainer_state.json").write_text(state)
    latest = folder.latest()
    assert latest is not None
    assert latest.name == "checkpoint-10"
    folder.remove_incomplete()
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-2"]
