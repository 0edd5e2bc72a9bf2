"""The model card as a pure function: what it says, and that it changes nothing that its owner wrote."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lora import LoRAConfig, LoRAFileError, LoRAMismatchError, card, cardtext
from hf_lora.facts import RunFacts
from hf_lora.values import AdapterValue, Factors

BASE = "org/base"
MARK = re.compile(r"^<!-- hf_lora:(?:begin .*|end) -->$", re.M)


def adapter(**config: Any) -> AdapterValue:
    fields = {"r": 4, "alpha": 8, "target_modules": ["q_proj"], "base_model": BASE, "task_type": "CAUSAL_LM"}
    config = LoRAConfig(**{**fields, **config})
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(config.r, 16, generator=generator), torch.randn(8, config.r, generator=generator)
    return AdapterValue(config, {"layers.0.q_proj": Factors("linear", a, b, config.alpha)})


def run(**fields: Any) -> RunFacts:
    known: dict[str, Any] = {
        "epochs": 2.0,
        "trainable": 96,
        "total": 9600,
        "settings": {"learning_rate": 1e-4, "seed": 7},
        "losses": tuple((step, 100.0 / step) for step in range(1, 101)),
        "evaluations": (
            (50, {"eval_loss": 2.25, "eval_accuracy": 0.5}),
            (100, {"eval_loss": 2.5, "eval_accuracy": 0.75}),
        ),
        "best": ("eval_loss", 2.25, 50),
        "datasets": ("org/data",),
        "versions": {"torch": "2.13.0"},
    }
    return RunFacts(100, **{**known, **fields})


def data(text: str) -> dict[str, Any]:
    """The metadata, read by huggingface_hub."""
    return ModelCard(text).data.to_dict()


def outside(text: str) -> str:
    """What stands outside of the metadata and the generated sections."""
    body = re.sub(r"\A---\n[\S\s]*?\n---\n", "", text)
    return re.sub(r"^<!-- hf_lora:begin .*\n[\S\s]*?^<!-- hf_lora:end -->$", "", body, flags=re.M)


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_the_metadata():
    said = data(card.update(None, adapter(), run=run(), repo_id="me/task"))
    assert said.pop("model-index") == [
        {
            "name": "task",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": "org/data", "type": "org/data"},
                    "metrics": [
                        {"type": "loss", "value": 2.25, "name": "loss"},  # of the best step, not of the last
                        {"type": "accuracy", "value": 0.5, "name": "accuracy"},
                    ],
                }
            ],
        }
    ]
    assert said == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "hf_lora", "text-generation"],
        "datasets": ["org/data"],
    }


def test_the_tables():
    text = card.update(None, adapter(use_rslora=False, dropout=0.1), run=run(), repo_id="me/task")
    for row in (
        "| base model | `org/base` |",
        "| rank | 4 |",
        "| alpha | 8 |",
        "| scaling | 2 (α/r) |",
        "| target modules | `q_proj` |",
        "| dropout | 0.1 |",
        "| parameters | 96 |",
        "| size | 384 bytes |",
        "| dtype | float32 |",
        "| steps | 100 |",
        "| trainable | 96 of 9,600 (1.000%) |",
        "| learning&#95;rate | `0.0001` |",
        "| 50 | 2 | 2.25 | 0.5 |",
        "| 100 | 1 | 2.5 | 0.75 |",
        "Best: `eval_loss` 2.25 at step 50.",
        "| torch | `2.13.0` |",
    ):
        assert row in text.splitlines(), row
    assert text.startswith("---\n")
    assert "\n# task\n" in text
    only_losses = card.update(None, adapter(), run=run(evaluations=(), best=None))
    points = re.findall(r"^\| (\d+) \| [\d.]+ \|$", only_losses, re.M)
    assert (len(points), points[0], points[-1]) == (8, "1", "100")
    assert "### Training" not in card.update(None, adapter())


@pytest.mark.parametrize(
    ("config", "architecture", "auto", "tag"),
    [
        ({"task_type": "SEQ_CLS"}, None, "AutoModelForSequenceClassification", "text-classification"),
        ({"task_type": None}, "ViTForImageClassification", "AutoModelForImageClassification", "image-classification"),
        ({"task_type": None}, "GPT2LMHeadModel", "AutoModelForCausalLM", "text-generation"),
        ({"task_type": None}, None, "AutoModel", None),
        (
            {"task_type": None, "peft_fields": {"auto_mapping": {"base_model_class": "BertForTokenClassification"}}},
            None,
            "AutoModelForTokenClassification",
            "token-classification",
        ),
    ],
)
def test_the_task(config, architecture, auto, tag):
    text = card.update(None, adapter(**config), repo_id="me/task", architecture=architecture)
    assert data(text).get("pipeline_tag") == tag
    assert f'{auto}.from_pretrained("org/base")' in text
    assert ("vllm serve" in text) == (tag == "text-generation")


@pytest.mark.parametrize(
    ("config", "architecture", "shown", "tag"),
    [
        ({"task_type": None}, "LEDForConditionalGeneration", "LEDForConditionalGeneration", None),
        ({"task_type": "SEQ_2_SEQ_LM"}, "MarianMTModel", "MarianMTModel", "text2text-generation"),
        ({}, "Qwen2VLForConditionalGeneration", "Qwen2VLForConditionalGeneration", "text-generation"),
        (
            {"task_type": "SEQ_CLS"},
            "Wav2Vec2ForSequenceClassification",
            "AutoModelForAudioClassification",
            "audio-classification",
        ),
        ({"task_type": None}, "Evil()", "AutoModel", None),
    ],
)
def test_a_class_that_the_tasks_auto_class_does_not_load_is_named_itself(config, architecture, shown, tag):
    text = card.update(None, adapter(**config), repo_id="me/task", architecture=architecture)
    assert text.count(f"from transformers import {shown}\n") == 2
    assert text.count(f'model = {shown}.from_pretrained("org/base")\n') == 2
    assert data(text).get("pipeline_tag") == tag
    for library, found in (("transformers.models.led.modeling_led", shown), ("mine", None)):
        mapping = {"auto_mapping": {"base_model_class": architecture, "parent_library": library}}
        text = card.update(None, adapter(**config, peft_fields=mapping), repo_id="me/task")
        assert found is None or f"import {found}\n" in text
        assert (f"import {architecture}\n" in text) == (shown == architecture and found is not None)


@pytest.mark.parametrize("key", ["weight", "out_proj.weight"])
def test_the_number_of_labels_is_shown_where_the_adapter_brings_the_classifier(key):
    head = {"classifier": {key: torch.zeros(5, 8), key.replace("weight", "bias"): torch.zeros(5)}}
    value = dataclasses.replace(adapter(task_type="SEQ_CLS", modules_to_save=["classifier"]), modules=head)
    text = card.update(None, value, repo_id="me/task")
    assert text.count('.from_pretrained("org/base", num_labels=5, ignore_mismatched_sizes=True)\n') == 2
    assert "num_labels" not in card.update(None, adapter(task_type="SEQ_CLS"), repo_id="me/task")
    causal = dataclasses.replace(value, config=value.config.replace(task_type="CAUSAL_LM"))
    assert "num_labels" not in card.update(None, causal, repo_id="me/task")


def test_a_folder_with_the_name_of_the_base_changes_nothing(tmp_path, monkeypatch):
    text = card.update(None, adapter(), repo_id="me/task")
    (tmp_path / BASE).mkdir(parents=True)
    (tmp_path / "other" / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert card.update(text, adapter(), base_model=BASE, repo_id="me/task") == text
    with pytest.raises(LoRAMismatchError, match="says base_model: other/one"):
        card.update("---\nbase_model: other/one\n---\n", adapter(), base_model=BASE)


def test_the_code_it_shows_is_code():
    text = card.update(None, adapter(r=20), repo_id="me/task", subfolder='a "b"')
    blocks = re.findall(r"```python\n(.*?)\n```", text, re.S)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "card", "exec")
    assert '--max-lora-rank 32 --lora-modules \'a "b"=adapters/a "b"\'' in text


# ---- again, and what survives ----------------------------------------------------------------------------------------

OWN = """---
# mine
license: mit   # as the base
language: [en, no]
tags:
- mine
- lora

# about data
datasets: org/other
co2: {emissions: 1.5e+3}
---
# My title

Some *words*.

```python
x = 1
```
"""


def test_what_others_wrote_stays():
    text = card.update(OWN, adapter(), run=run(), repo_id="me/task")
    for line in (
        "# mine",
        "license: mit   # as the base",
        "language: [en, no]",
        "# about data",
        "co2: {emissions: 1.5e+3}",
    ):
        assert line in text.split("\n---\n")[0].splitlines()
    assert outside(text).strip() == OWN.split("---\n", 2)[2].strip()
    said = data(text)
    assert said["tags"] == ["mine", "lora", "hf_lora", "text-generation"]
    assert said["datasets"] == ["org/other", "org/data"]
    again = card.update(text, adapter(r=2, alpha=2), run=run(datasets=()), repo_id="me/task")
    assert data(again)["datasets"] == ["org/other"]  # ours is gone, theirs is not
    assert "| rank | 2 |" in again
    assert outside(again) == outside(text)
    assert len(MARK.findall(again)) == 2


def test_what_was_taken_out_by_hand_stays_out():
    text = (
        card.update(None, adapter(), repo_id="me/task")
        .replace("- hf_lora\n", "")
        .replace("pipeline_tag: text-generation", "pipeline_tag: summarization", 1)
    )
    said = data(card.update(text, adapter(), run=run(), repo_id="me/task"))
    assert said["tags"] == ["lora", "text-generation"]
    assert said["pipeline_tag"] == "summarization"


def test_an_entry_without_results_as_trainer_writes_it_gets_ours():
    stock = "---\nmodel-index:\n- name: task\n  results: []\n---\nx\n"
    text = card.update(stock, adapter(), run=run(), repo_id="me/task")
    (entry,) = data(text)["model-index"]
    assert [metric["type"] for metric in entry["results"][0]["metrics"]] == ["loss", "accuracy"]
    assert card.update(text, adapter(), run=run(), repo_id="me/task") == text
    theirs = "results:\n  - task: {type: x}\n    metrics:\n    - {type: f1, value: 1}\n    dataset: {type: y, name: y}"
    own = stock.replace("results: []", theirs)
    text = card.update(own, adapter(), run=run(), repo_id="me/task")
    assert theirs in text
    assert len(data(text)["model-index"]) == 1
    other = stock.replace("name: task", "name: else")
    assert [
        entry["name"]
        for entry in yaml.safe_load(card.update(other, adapter(), run=run(), repo_id="me/task").split("---")[1])[
            "model-index"
        ]
    ] == ["else", "task"]


def test_the_library():
    stock = "---\nlibrary_name: transformers\n---\n# x\n"
    assert data(card.update(stock, adapter()))["library_name"] == "peft"
    assert data(card.update(stock, adapter(), subfolder="a"))["library_name"] == "transformers"
    assert data(card.update("---\nlibrary_name: mine\n---\n", adapter()))["library_name"] == "mine"


def test_another_base():
    for own in ("base_model: other/one", "base_model: [other/one, other/two]"):
        with pytest.raises(LoRAMismatchError, match="other/one"):
            card.update(f"---\n{own}\n---\n", adapter())
    for own in ("base_model: mirror/base", "base_model: [mirror/base, other/one]"):
        text = card.update(f"---\n{own}\n---\n", adapter())
        assert f"\n{own}\n" in text
    for own in ("base_model: ''", "base_model: /tmp/base", "base_model:"):
        assert data(card.update(f"---\n{own}\n---\n", adapter()))["base_model"] == BASE
    text = card.update(card.update(None, adapter()), adapter(base_model="org/new"))
    assert data(text)["base_model"] == "org/new"
    with pytest.raises(LoRAMismatchError, match="org/name"):
        card.update(None, adapter(base_model=None))


def test_several_adapters():
    text = card.update(OWN, adapter(), repo_id="me/many", subfolder="a")
    text = card.update(text, adapter(base_model="org/second", r=2), repo_id="me/many", subfolder="b|c", run=run())
    assert data(text)["base_model"] == [BASE, "org/second"]
    assert data(text)["model-index"][0]["name"] == "many/b|c"
    assert "| a | `org/base` | 4 | 96 |" in text
    assert "| b&#124;c | `org/second` | 2 | 48 |" in text
    section = text[text.index('"subfolder": "b|c"') :]
    again = card.update(text, adapter(r=3, alpha=3), repo_id="me/many", subfolder="a")
    assert section in again
    assert "| a | `org/base` | 3 | 72 |" in again
    assert len(MARK.findall(again)) == 6
    root = card.update(again, adapter(), repo_id="me/many")
    assert "| (root) | `org/base` | 4 | 96 |" in root


def test_words_of_ones_own():
    first = card.update(None, adapter(), repo_id="me/task")
    text = card.update(first, adapter(), repo_id="me/task", words="---\nlicense: mit\ntags: [mine]\n---\nNew words.\n")
    assert outside(text).strip() == "New words."
    assert data(text)["license"] == "mit"
    assert data(text)["tags"] == ["mine", "lora", "hf_lora", "text-generation"]
    plain = card.update(text, adapter(), repo_id="me/task", words="Newer words.")
    assert outside(plain).strip() == "Newer words."
    assert data(plain)["license"] == "mit"
    many = card.update(plain, adapter(), repo_id="me/task", subfolder="a")
    rewritten = card.update(many, adapter(), repo_id="me/task", subfolder="a", words="Other words.")
    assert rewritten.count("hf_lora:begin") == 3
    assert card.update(rewritten, adapter(), repo_id="me/task", subfolder="a", words="Other words.") == rewritten


def test_line_ends_stay():
    text = card.update(OWN.replace("\n", "\r\n"), adapter(), repo_id="me/task")
    assert "\n" not in text.replace("\r\n", "")
    assert text.replace("\r\n", "\n") == card.update(OWN, adapter(), repo_id="me/task")
    assert card.update(text, adapter(), repo_id="me/task") == text


@pytest.mark.parametrize(
    "readme",
    [
        "---\na: [1\n---\n",
        "---\n- a\n---\n",
        "---\njust words\n---\n",
        "---\na: 1\na: 2\n---\n",
        "---\na: !!python/object:os.system x\n---\n",
        "---\n" + "a: " + "[" * 5000 + "\n---\n",
        "---\na: &a [x]\n" + "".join(f"k{i}: [*a, *a, *a, *a]\n" for i in range(20)) + "---\n",
        "words\n<!-- hf_lora:begin {} -->\nno end\n",
        "words\n<!-- hf_lora:end -->\n",
        "<!-- hf_lora:begin {} -->\n<!-- hf_lora:begin {} -->\nx\n<!-- hf_lora:end -->\n",
        "<!-- hf_lora:begin broken -->\nx\n<!-- hf_lora:end -->\n",
        "<!-- hf_lora:begin {} -->\n<!-- hf_lora:end -->\n<!-- hf_lora:begin {} -->\n<!-- hf_lora:end -->\n",
    ],
)
def test_a_damaged_readme_is_an_error(readme):
    with pytest.raises(LoRAFileError) as caught:
        card.update(readme, adapter())
    assert "README" in str(caught.value)
    assert caught.value.remedy


def test_what_looks_like_metadata_and_is_not():
    for readme in ("", "\n", "---\n", "---\n---\nx\n", "a\n---\nb: 1\n---\n", "---\n# nothing but this\n---\nx\n"):
        text = card.update(readme, adapter(), repo_id="me/task")
        assert data(text)["base_model"] == BASE
        assert card.update(text, adapter(), repo_id="me/task") == text


# ---- hostile text ----------------------------------------------------------------------------------------------------

NASTY = [
    "a|b",
    "x --> <!-- hf_lora:end --> y",
    "\n<!-- hf_lora:end -->\n",
    "<script>alert(1)</script>",
    "![x](http://evil/x.png)",
    "[x](javascript:x)",
    "`` ` ``` ~~~",
    "\n---\nlicense: evil\n---\n",
    "\n```\nrm -rf /\n```\n",
    "# head\u2028\x85\x0b\x00\ud800",
    "*b* _i_ **x** \\| \\",
    "&lt;b&gt; &#60;",
    "x" * 5000,
]
TEXT = st.one_of(st.sampled_from(NASTY), st.text(max_size=60))


def cells(text: str) -> list[int]:
    """How many columns each row of a table has."""
    return [len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")]


@settings(max_examples=150, deadline=None)
@given(TEXT, TEXT, TEXT, TEXT)
def test_nothing_from_a_file_becomes_markup(one, two, three, four):
    value = adapter(task_type=one or None, target_modules=[two if two.strip() else "q"], revision=three)
    facts = run(
        settings={one: two, four: 1},
        datasets=(three, "org/data"),
        versions={two: three},
        evaluations=((100, {"eval_" + four: 1.0, three: 2.0}),),
        best=(four, 1.0, 100),
    )
    text = card.update(OWN, value, run=facts, repo_id="me/task")
    text.encode()
    assert len(MARK.findall(text)) == 2
    assert MARK.findall(text)[0].count("<") == MARK.findall(text)[0].count(">") == 1  # one comment, to its end
    assert outside(text).strip() == OWN.split("---\n", 2)[2].strip()
    said = data(text)
    assert said["license"] == "mit"
    assert said["base_model"] == BASE
    assert said["datasets"] == ["org/other", "org/data"] or cardtext.is_hub_id(three)
    generated = text[text.index("### Configuration") : text.index("<!-- hf_lora:end -->")]
    assert not re.search(r"[<>\[\]*\\~]|javascript:|http:", re.sub(r"`[^`\n]*`", "", generated))
    assert "```" not in generated
    assert not set(generated) & set("\x00\x0b\x85\u2028\ud800")
    assert set(cells(generated)) <= {3, 5}
    assert card.update(text, value, run=facts, repo_id="me/task") == text


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(TEXT, st.one_of(TEXT, st.lists(TEXT), st.none(), st.booleans(), st.integers())), TEXT, st.booleans()
)
def test_any_readme_keeps_its_words_and_values(values, words, flow):
    values = {clean(key): plain(item) for key, item in values.items()}
    words = MARK.sub("", clean(words).replace("\r", "")).rstrip()
    front = yaml.safe_dump(values, allow_unicode=True, default_flow_style=flow, sort_keys=False) if values else ""
    values = yaml.safe_load(front) or {}  # PyYAML itself does not keep every string
    readme = f"---\n{front}---\n# T\n{words}\n" if values else f"# T\n{words}\n"
    text = card.update(readme, adapter(), run=run(), repo_id="me/task")
    found = yaml.safe_load(re.match(r"---\n([\S\s]*?)\n---\n", text)[1])
    for key, item in values.items():
        if key not in ("datasets", "model-index", "library_name", "pipeline_tag", "base_model_relation"):
            assert found[key] == item
    assert text.count("# T\n" + words) >= 1
    assert card.update(text, adapter(), run=run(), repo_id="me/task") == text


def clean(text: str) -> str:
    """Without half characters and line ends that YAML or UTF-8 cannot hold in a file."""
    return re.sub(r"[\ud800-\udfff\r]", "", text)


def plain(item: Any) -> Any:
    return clean(item) if isinstance(item, str) else [clean(x) for x in item] if isinstance(item, list) else item


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words, 1.5 (x)", "plain words, 1.5 (x)"),
        ("a_b", "a&#95;b"),
        ("a|b*c`d", "a&#124;b&#42;c&#96;d"),
        ("<b>&amp;", "&#60;b&#62;&#38;amp;"),
        ("http://x", "http&#58;//x"),
        ("- item", "&#45; item"),
        ("=====", "&#61;===="),
        ("a -- b", "a -&#45; b"),
        ("1. one", "1&#46; one"),
        ("2) two", "2&#41; two"),
        ("3.", "3&#46;"),
        ("a\n\u2028\x00b\ud800", "a b"),
        ("x" * 301, "x" * 299 + "…"),
    ],
)
def test_an_escaped_text_reads_as_it_is(text, shown):
    assert cardtext.escape(text) == shown


def test_a_scalar_of_the_metadata_follows_the_adapter_unless_somebody_set_it():
    def updated(text: str | None, task: str, **options: Any) -> str:
        return card.update(text, adapter(task_type=task), repo_id="me/task", **options)

    first = updated(None, "CAUSAL_LM")
    assert data(updated(first, "SEQ_CLS"))["pipeline_tag"] == "text-classification"  # ours follows
    line = "pipeline_tag: text-generation\n"
    assert line in first
    assert "pipeline_tag" not in data(updated(first.replace(line, ""), "SEQ_CLS"))  # taken out: it stays out
    assert data(updated(first.replace(line, "pipeline_tag: mine\n"), "SEQ_CLS"))["pipeline_tag"] == "mine"
    # in the user's own card it is the user's, even if it says what ours said
    words = f"---\n{line}---\nwords\n"
    assert data(updated(first, "SEQ_CLS", words=words))["pipeline_tag"] == "text-generation"
    # adapters of two tasks in one repo have no task in common; with one of them it comes back
    several = updated(updated(None, "CAUSAL_LM", subfolder="a"), "SEQ_CLS", subfolder="b")
    assert "pipeline_tag" not in data(several)
    # a list that ends up empty is taken out
    trained = card.update("---\nlicense: mit\n---\nx\n", adapter(), run=run(), repo_id="me/task")
    assert "datasets:" in trained
    assert "datasets:" not in card.update(trained, adapter(), run=run(datasets=()), repo_id="me/task")


@pytest.mark.parametrize(
    "front",
    [
        "tags: &a [one]\nother: *a\n",  # the anchor goes with the text that is replaced
        "tags: &a [one]\nother: {x: *a}\nwhen: 2024-01-02\n",
        "d: &d {license: mit}\n<<: *d\n",
        "{license: mit, tags: [one]}\n",
        "about: |\n  one\n  # two\n\n  three\ntags: [one]\n# the end\n",
    ],
)
def test_metadata_that_cannot_be_changed_line_by_line_keeps_its_values(front):
    before = yaml.safe_load(front)
    text = card.update(f"---\n{front}---\nwords\n", adapter(), repo_id="me/task")
    after = yaml.safe_load(re.match(r"---\n([\S\s]*?)\n---\n", text)[1])
    assert {key: after[key] for key in before if key != "tags"} == {k: v for k, v in before.items() if k != "tags"}
    assert after["tags"] == [*before.get("tags", []), "lora", "hf_lora", "text-generation"]
    assert after["base_model"] == BASE
    assert ("# the end\n" in text) == ("# the end\n" in front)
    assert card.update(text, adapter(), repo_id="me/task") == text


def test_a_path_of_this_machine_is_not_shown():
    facts = run(
        settings={"output_dir": "/home/me/out", "home": "~/x", "drive": "C:\\x", "lr": 1}, datasets=("/data/x", "./y")
    )
    text = card.update(None, adapter(), run=facts, repo_id="me/task")
    for secret in ("/home/me", "~/x", "C:", "/data/x", "./y"):
        assert secret not in text
    assert "| lr | `1` |" in text
