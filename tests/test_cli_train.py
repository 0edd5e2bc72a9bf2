"""`hf-lora train`, and what all commands share: JSON, errors, completion. Killed runs are real processes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from smallbase import save_base
from test_cli import run, said

from hf_lora import LoRAAdapter
from hf_lora.facts import RunFacts
from hf_lora.recipe.folder import RECORD

pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")

ROOT = Path(__file__).parents[1]
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def place(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, which is the working directory, with a base, data and a recipe."""
    return furnish(tiny("llama"), tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def _kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def trained(place: Path, _kept: Path) -> Any:
    """`place` after `train task.yaml --json`, and what that printed. It is run once, and its folder is copied."""
    if not _kept.exists():
        result = run("train", "task.yaml", "--json")
        assert result.exit_code == 0, result.output
        shutil.copytree(place / "out", _kept / "out")
        (_kept / "printed.json").write_text(result.stdout)
    elif not (place / "out").exists():
        shutil.copytree(_kept / "out", place / "out")
    return json.loads((_kept / "printed.json").read_text())


UNSAVED = ("--set", "training.save_strategy=no")  # a checkpoint takes longer than the steps before it


def furnish(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> Path:
    save_base(model, folder / "base", chat=True)
    lines = [f"w{3 + i % 40} w{4 + i % 7},w{10 + i % 5}" for i in range(64)]
    (folder / "data.csv").write_text("\n".join(["q,a", *lines]) + "\n")
    (folder / "task.yaml").write_text(
        "base: {model: ./base, id: org/tiny}\n"
        "lora: {r: 2, alpha: 8, dropout: 0.1, target_modules: [q, v]}\n"
        'data: {train: data.csv, prompt: "{q}", completion: "{a}", eval_fraction: 0.25}\n'
        "training: {max_steps: 6, per_device_train_batch_size: 4, learning_rate: 1e-2, save_steps: 2, use_cpu: true}\n"
        "out: out\n"
    )
    if monkeypatch is not None:
        monkeypatch.chdir(folder)
    return folder


def as_json(result: Any) -> Any:
    """What is on stdout, which has to be JSON and nothing else."""
    return json.loads(result.stdout)


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_recipe_is_trained(place: Path, trained: Any) -> None:
    found = trained
    assert (found["steps"], found["base"], found["resumed_from"]) == (6, "org/tiny", None)
    assert found["loss_after"] < found["loss_before"]
    assert found["eval_after"]["eval_loss"] < found["eval_before"]["eval_loss"]
    assert (found["train"]["examples"], found["eval"]["examples"]) == (48, 16)
    # q: 2·(32 + 32), v: 2·(32 + 16), in two layers
    assert found["trainable"] == 2 * (2 * 64 + 2 * 48)
    out = place / "out"
    assert {path.name for path in out.iterdir()} == {*ADAPTER, "README.md", "trainer_state.json", "checkpoints", RECORD}
    config = LoRAAdapter.load(out).config
    assert (config.r, config.alpha, config.task_type, config.base_model) == (2, 8, "CAUSAL_LM", "org/tiny")
    facts = RunFacts.read(out)
    assert facts is not None
    assert [step for step, _ in facts.evaluations] == [0, 6]
    card = (out / "README.md").read_text()
    assert "base_model: org/tiny" in card
    assert str(place.parent) not in card


def test_the_adapter_is_the_one_that_a_plain_trainer_trains(place: Path, tiny: Any) -> None:
    """The same steps with transformers alone, written out: data, order, padding, loss, saving."""
    from transformers import Trainer, TrainingArguments, set_seed

    from hf_lora import LoRAConfig

    assert run("train", "task.yaml", "--set", "data.eval_fraction=null").exit_code == 0
    rows = [line.split(",") for line in (place / "data.csv").read_text().splitlines()[1:]]
    features = []
    for question, answer in rows:
        prompt = [int(word[1:]) for word in question.split()]
        completion = [int(answer[1:]), 2]
        features.append({"input_ids": torch.tensor(prompt + completion), "labels": torch.tensor([-100] * len(prompt) + completion)})  # fmt: skip  # noqa: E501
    set_seed(0)
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=2, alpha=8, dropout=0.1, target_modules=["q", "v"]))
    arguments = TrainingArguments(
        "plain",
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        seed=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=features).train()  # all rows have the same length: nothing to pad
    expected, found = model.lora_adapter().factors, LoRAAdapter.load("out").factors
    assert expected.keys() == found.keys()
    for path in expected:
        assert torch.equal(expected[path].A, found[path].A)
        assert torch.equal(expected[path].B, found[path].B)


def test_flags_alone_are_enough(place: Path) -> None:
    result = run(
        *("train", "--base", "base", "--data", "data.csv", "--prompt", "{q}", "--completion", "{a}", "--r", "4"),
        *("--targets", "q,v,down", "--out", "its folder", "--steps", "2", "--lr", "0.01", "--batch-size", "4"),
        *("--set", "training.logging_steps=1", "--set", "training.use_cpu=true", "--seed", "3"),
    )
    assert result.exit_code == 0, result.output
    config = LoRAAdapter.load("its folder").config
    assert (config.r, config.target_modules) == (4, ("down_proj", "q_proj", "v_proj"))
    assert "hf-lora push 'its folder' USER/NAME --base-model ORG/NAME" in said(result)
    assert not (place / "its folder" / "README.md").exists(), "a card names the base, and this one has no id"


def test_flags_change_a_recipe(place: Path) -> None:
    result = run("train", "task.yaml", "--r", "3", "--steps", "1", "--out", "other", "--targets", "all-linear", "--json")  # fmt: skip  # noqa: E501
    assert as_json(result)["steps"] == 1
    assert LoRAAdapter.load("other").config.r == 3
    assert not (place / "out").exists()


def test_epochs_by_a_flag_win_over_steps_in_the_recipe(place: Path) -> None:
    plan = as_json(run("train", "task.yaml", "--epochs", "3", "--dry-run", "--json"))
    assert plan["steps"] == 3 * 48 // 4
    both = run("train", "task.yaml", "--epochs", "3", "--steps", "2")
    assert both.exit_code == 2
    assert "--steps and --epochs exclude each other" in said(both)


def test_examples_to_evaluate_on_by_a_flag_win_over_a_fraction_in_the_recipe(place: Path) -> None:
    plan = as_json(run("train", "task.yaml", "--eval", "data.csv", "--dry-run", "--json"))
    assert (plan["train"]["examples"], plan["eval"]["examples"]) == (64, 64)
    both = run("train", "task.yaml", "--eval", "data.csv", "--eval-fraction", "0.5")
    assert both.exit_code == 2
    assert "not together with eval" in said(both)


def test_a_classifier(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_base(tiny("bert"), tmp_path / "base")
    rows = [{"a": f"w{3 + i % 5}", "b": f"w{20 + i % 3}", "y": ["no", "yes"][i % 5 > 2]} for i in range(60)]
    Path("d.json").write_text(json.dumps(rows))
    result = run(
        *("train", "--base", "base", "--base-id", "org/bert", "--data", "d.json", "--text", "{a}", "--pair", "{b}"),
        *("--label", "y", "--eval-fraction", "0.3", "--out", "out", "--steps", "25", "--lr", "0.05", "--json"),
        *("--targets", "q,v", "--set", "training.use_cpu=true", *UNSAVED),
    )
    assert result.exit_code == 0, result.output
    found = as_json(result)
    assert found["labels"] == ["no", "yes"]
    assert found["eval_after"]["eval_accuracy"] == 1.0  # the class is a function of the first word
    assert found["eval_before"]["eval_accuracy"] < 1.0
    adapter = LoRAAdapter.load("out")
    assert adapter.config.task_type == "SEQ_CLS"
    assert list(adapter.modules) == ["classifier"]


def test_an_encoder_decoder(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    furnish(tiny("t5"), tmp_path, monkeypatch)
    result = run("train", "task.yaml", "--steps", "30", *UNSAVED, "--json")
    assert result.exit_code == 0, result.output
    assert LoRAAdapter.load("out").config.task_type == "SEQ_2_SEQ_LM"
    assert as_json(result)["loss_after"] < as_json(result)["loss_before"]


def test_chats(place: Path) -> None:
    turns = [[("user", f"w{3 + i % 9}"), ("assistant", "w40 w41")] for i in range(12)]
    rows = [{"chat": [{"role": role, "content": text} for role, text in chat]} for chat in turns]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ("train", "--base", "base", "--out", "out", "--steps", "2", "--set", "training.use_cpu=true", "--json")
    found = as_json(run(*base, "--data", "chats.jsonl", "--messages", "chat"))
    assert found["train"]["learned"] == 12 * 3  # two words and the end


def test_a_long_example_is_said_to_be_cut(place: Path) -> None:
    with (place / "data.csv").open("a") as file:
        file.write("w3 " * 30 + ",w4\n")
    result = run("train", "task.yaml", "--dry-run", "--max-length", "16", "--set", "data.eval_fraction=null")
    assert "1 (1.5%) are longer than max_length = 16 and were cut" in said(result)
    result = run("train", "task.yaml", "--max-length", "16", "--set", "data.eval_fraction=null", *UNSAVED)
    assert "1 (1.5%) are longer than max_length and were cut" in said(result)


def test_a_dry_run_counts_the_steps_of_the_run_and_writes_nothing(place: Path) -> None:
    before = sorted(place.iterdir())
    epochs = (
        "--set",
        "training.max_steps=-1",
        "--epochs",
        "1.5",
        "--set",
        "training.gradient_accumulation_steps=5",
        *UNSAVED,
    )
    plan = as_json(run("train", "task.yaml", *epochs, "--dry-run", "--json"))
    assert sorted(place.iterdir()) == before
    assert plan["summary"]["adapters"][0]["targets"] == {"q": 2, "v": 2}
    assert plan["steps"] == as_json(run("train", "task.yaml", *epochs, "--json"))["steps"]


# ---- once more in the same folder ------------------------------------------------------------------------------------


def test_a_finished_run_is_said_to_be_so(place: Path, trained: Any) -> None:
    stamp = (place / "out" / ADAPTER[1]).stat().st_mtime_ns
    again = run("train", "task.yaml", "--json")
    assert as_json(again) == {**trained, "already_finished": True}
    assert "its data were not read again. --fresh starts over" in again.stderr
    assert (place / "out" / ADAPTER[1]).stat().st_mtime_ns == stamp


def test_another_recipe_in_the_same_folder_is_refused_unless_fresh(place: Path, trained: Any) -> None:
    (place / "out" / "README.md").write_text("My words.\n")
    result = run("train", "task.yaml", "--r", "4", "--lr", "0.02")
    assert result.exit_code == 2
    assert "lora.r was 2 and is 4 now" in said(result)
    assert "training.learning_rate was 0.01 and is 0.02 now" in said(result)
    assert LoRAAdapter.load("out").config.r == 2
    assert run("train", "task.yaml", "--r", "4", "--fresh").exit_code == 0
    assert LoRAAdapter.load("out").config.r == 4
    assert "My words." in (place / "out" / "README.md").read_text()


def unfinished(place: Path, *, step: int = 4) -> None:
    """Make the finished run in `out` one that was killed after a checkpoint."""
    out = place / "out"
    record = json.loads((out / RECORD).read_text())
    (out / RECORD).write_text(json.dumps({key: record[key] for key in ("format", "recipe", "data")} | {"state": "begun"}))  # fmt: skip  # noqa: E501
    if step < 6:
        shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    for name in (*ADAPTER, "trainer_state.json", "README.md"):
        (out / name).unlink()


def test_an_unfinished_run_asks_for_resume_or_fresh(place: Path, trained: Any) -> None:
    expected = [(place / "out" / name).read_bytes() for name in ADAPTER]
    unfinished(place)
    result = run("train", "task.yaml")
    assert result.exit_code == 2
    assert "at checkpoint-4" in said(result)
    assert "--resume" in said(result)
    resumed = run("train", "task.yaml", "--resume", "--json")
    assert as_json(resumed)["resumed_from"] == 4
    assert [(place / "out" / name).read_bytes() for name in ADAPTER] == expected


def test_a_run_that_was_stopped_after_its_last_step_takes_no_further_one(place: Path) -> None:
    # Of a constant rate a further step would show. Evaluation each step, the best loaded at the end: 6 or another.
    best = ("training.load_best_model_at_end=true", "training.eval_strategy=steps", "training.eval_steps=2")
    flags = [part for value in ("training.lr_scheduler_type=constant", *best) for part in ("--set", value)]
    first = as_json(run("train", "task.yaml", *flags, "--json"))
    expected = [(place / "out" / name).read_bytes() for name in ADAPTER]
    unfinished(place, step=6)
    resumed = as_json(run("train", "task.yaml", *flags, "--resume", "--json"))
    assert resumed == {**first, "resumed_from": 6, "seconds": resumed["seconds"]}
    assert [(place / "out" / name).read_bytes() for name in ADAPTER] == expected


def test_a_finished_run_without_its_adapter_is_not_finished(place: Path, trained: Any) -> None:
    expected = (place / "out" / ADAPTER[1]).read_bytes()
    (place / "out" / ADAPTER[1]).unlink()
    assert "unfinished run of this recipe, at checkpoint-6" in said(run("train", "task.yaml"))
    assert run("train", "task.yaml", "--resume").exit_code == 0
    assert (place / "out" / ADAPTER[1]).read_bytes() == expected


def test_a_run_whose_push_failed_is_only_pushed_by_the_same_command(hub: Any, place: Path, trained: Any) -> None:
    asked = ("train", "task.yaml", "--push", "me/task", "--set", "push.private=true", "--json")
    hub.faults.status(503, "*/commit/*", times=None)
    failed = run(*asked)
    assert failed.exit_code == 2
    assert "the same recipe again, without --fresh, only pushes it" in as_json(failed)["error"]["remedy"]
    hub.faults.clear()
    stamp = (place / "out" / ADAPTER[1]).stat().st_mtime_ns
    found = as_json(run(*asked))
    (commit,) = hub.history("me/task")
    assert found == {**trained, "already_finished": True, "pushed": found["pushed"]}
    assert commit.oid in found["pushed"]
    assert hub.repo("me/task").private
    files = hub.files("me/task")
    assert set(files) == {*ADAPTER, "README.md"}
    assert files[ADAPTER[1]] == (place / "out" / ADAPTER[1]).read_bytes()
    assert all(str(place.parent).encode() not in content for content in files.values())
    assert as_json(run(*asked)) == found
    assert len(hub.history("me/task")) == 1
    assert (place / "out" / ADAPTER[1]).stat().st_mtime_ns == stamp


def test_resuming_with_other_data_is_refused(place: Path, trained: Any) -> None:
    unfinished(place)
    (place / "data.csv").write_text((place / "data.csv").read_text().replace("w10", "w11"))
    result = run("train", "task.yaml", "--resume")
    assert result.exit_code == 2
    assert "not those that the run in out began with" in said(result)


def test_resume_begins_where_there_is_nothing_to_resume(place: Path) -> None:
    assert as_json(run("train", "task.yaml", "--resume", "--json"))["resumed_from"] is None


def test_resume_and_fresh_exclude_each_other(place: Path) -> None:
    result = run("train", "task.yaml", "--resume", "--fresh")
    assert result.exit_code == 2
    assert "exclude each other" in said(result)


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere.yaml",), "cannot be read"),
        (("task.yaml", "--set", "lora.rr=3"), "--set lora.rr=3: lora: LoRAConfig has no field 'rr'"),
        (("task.yaml", "--set", "lora.r"), "is not KEY=VALUE"),
        (("task.yaml", "--set", "lora.r=[1"), "this is no YAML"),
        (("task.yaml", "--r", "0"), "--r: lora.r=0 is not a positive integer"),
        (("task.yaml", "--targets", "q,valeu"), "valeu"),
        (("task.yaml", "--prompt", "{question}"), "no column 'question'"),
        (("task.yaml", "--data", "nowhere.csv"), "cannot be read"),
        (("task.yaml", "--steps", "-3"), "--steps: training.max_steps: -3 is not at least 1"),
        (("task.yaml", "--base", "./nowhere", "--set", "base.id=null"), "is no folder"),
        (("task.yaml", "--out", "data.csv"), "is a file"),
        (("task.yaml", "--out", "base"), "not empty"),
        (("--data", "data.csv"), "base: it is missing"),
        (("task.yaml", "--task", "poetry"), "--task"),
        (("task.yaml", "surplus"), "surplus"),
    ],
)
def test_a_mistake_ends_with_2_without_traceback_and_trains_nothing(
    arguments: tuple[str, ...], says: str, place: Path
) -> None:
    before = sorted(place.rglob("*"))
    result = run("train", *arguments)
    assert result.exit_code == 2
    assert says in said(result)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert sorted(place.rglob("*")) == before
    answered = run("train", *arguments, "--json")
    assert answered.exit_code == 2
    error = as_json(answered)["error"]
    assert set(error) == {"type", "message", "remedy"}
    assert says in " ".join(error["message"].split())


def test_what_only_the_trainer_can_refuse_is_a_mistake_too(place: Path) -> None:
    result = run("train", "task.yaml", "--set", "training.report_to=nonsense", "--json")
    assert result.exit_code == 2
    assert "training: the Trainer refuses this: nonsense is not supported" in as_json(result)["error"]["message"]


def test_an_unexpected_error_in_json(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_lora.recipe.train", lambda *a, **k: 1 / 0)
    result = run("train", "task.yaml", "--json")
    assert result.exit_code == 1
    assert as_json(result)["error"]["message"].startswith("ZeroDivisionError: division by zero")
    monkeypatch.setattr("hf_lora.recipe.train", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
    result = run("train", "task.yaml", "--json")
    assert result.exit_code == 130
    assert as_json(result)["error"]["type"] == "KeyboardInterrupt"


def test_what_a_library_prints_is_not_in_the_json(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(recipe: Any, **options: Any) -> Any:
        print("noise of a library")
        return {"steps": 3}

    monkeypatch.setattr("hf_lora.recipe.check", noisy)
    result = run("train", "task.yaml", "--dry-run", "--json")
    assert as_json(result) == {"steps": 3}
    assert "noise of a library" in result.stderr


@pytest.mark.parametrize("module", ["accelerate", "datasets", "pyarrow"])
def test_what_is_missing_is_named_with_the_line_to_type(
    module: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == module else real(name, *a))
    data = {"accelerate": "data.csv", "datasets": "me/data", "pyarrow": "data.parquet"}[module]
    result = run("train", "task.yaml", "--data", data)
    assert result.exit_code == 2
    assert f"needs {module}, which is not installed" in said(result)
    assert 'pip install "hf_lora[train]"' in said(result)


# ---- real processes --------------------------------------------------------------------------------------------------


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "hf_lora", "train", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


LONG = ("task.yaml", "--steps", "60", "--set", "training.save_steps=10", "--set", "training.logging_steps=1")


def stopped(folder: Path, out: str, with_signal: int) -> tuple[int, str]:
    """Start the long run, and send the signal when its first checkpoint appears. Returns exit code and stderr."""
    process = start(folder, *LONG, "--out", out)
    try:
        while not (folder / out / "checkpoints" / "checkpoint-10" / "trainer_state.json").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        process.send_signal(with_signal)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.communicate()
    return process.returncode, errors


@pytest.mark.slow
def test_a_run_that_was_killed_or_interrupted_goes_on_to_the_same_bits(tiny: Any, tmp_path: Path) -> None:
    furnish(tiny("llama"), tmp_path)
    whole = start(tmp_path, *LONG, "--out", "whole", "--json")
    output, notes = whole.communicate(timeout=300)
    assert whole.returncode == 0, notes
    assert json.loads(output)["steps"] == 60  # stdout carries the JSON alone
    assert "step 60 of 60: loss" in notes
    expected = (tmp_path / "whole" / ADAPTER[1]).read_bytes()

    code, _ = stopped(tmp_path, "killed", signal.SIGKILL)
    assert code == -signal.SIGKILL
    # As if the kill had come in the middle of a save.
    torn = tmp_path / "killed" / "checkpoints" / "checkpoint-59"
    torn.mkdir()
    (torn / "adapter_model.safetensors").write_bytes(b"half")

    code, notes = stopped(tmp_path, "interrupted", signal.SIGINT)
    assert code == 130, notes
    assert "Interrupted. Kept: checkpoint-" in notes
    assert "--resume goes on from there" in notes
    assert "Traceback" not in notes

    for out in ("killed", "interrupted"):
        assert not (tmp_path / out / ADAPTER[1]).exists()
        again = start(tmp_path, *LONG, "--out", out, "--resume", "--json")
        output, notes = again.communicate(timeout=300)
        assert again.returncode == 0, notes
        found = json.loads(output)
        assert 10 <= found["resumed_from"] < 59
        assert (tmp_path / out / ADAPTER[1]).read_bytes() == expected
        assert not torn.exists() or out != "killed"
        log = [
            json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("whole", out)
        ]
        losses = [[(e["step"], e["loss"]) for e in entries if "loss" in e] for entries in log]
        evaluations = [[(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e] for entries in log]
        assert losses[0] == losses[1]
        assert evaluations[0] == evaluations[1]


# ---- completion and help ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_generated(shell: str) -> None:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", "from hf_lora.cli import main; main()", "--show-completion", shell],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "complete" in done.stdout.lower()


def test_completion_completes() -> None:
    environment = {**os.environ, "_HF_LORA_COMPLETE": "complete_bash", "COMP_WORDS": "hf-lora tr", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv[0] = 'hf-lora'; from hf_lora.cli import main; main()"],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == ["train"]


@pytest.mark.parametrize("command", ["train", "push", "pull", "list"])
def test_every_help_has_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: hf-lora {command} " in said(result)
    assert "--json" in said(result)


def test_every_flag_of_a_recipe_has_a_key_that_exists() -> None:
    import dataclasses

    from hf_lora import LoRAConfig
    from hf_lora.cli.train import _KEYS
    from hf_lora.recipe import Base, Data, Push, Recipe
    from hf_lora.recipe.schema import training_fields

    names = {section: {f.name for f in dataclasses.fields(cls)} for section, cls in {"base": Base, "data": Data, "lora": LoRAConfig, "push": Push}.items()}  # fmt: skip  # noqa: E501
    names |= {"training": set(training_fields())}
    for flag, key in _KEYS.items():
        section, _, name = key.partition(".")
        assert name in names[section] if name else section in {f.name for f in dataclasses.fields(Recipe)}, flag
