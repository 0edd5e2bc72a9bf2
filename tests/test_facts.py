"""Run facts from trainer_state.json: a real one, and files that mean harm or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lora import LoRAFileError
from hf_lora.facts import TRAINER_STATE, RunFacts

LOG = [
    {"step": 5, "loss": 2.5, "learning_rate": 1e-3, "grad_norm": 1.0, "epoch": 0.5},
    {"step": 5, "eval_loss": 2.25, "eval_runtime": 1.5, "eval_samples_per_second": 9.0, "eval_steps_per_second": 2.0},
    {"step": 10, "loss": 1.5},
    {"step": 10, "eval_loss": 2.0, "eval_accuracy": 0.5, "eval_model_preparation_time": 0.1, "eval_runtime": 1.0},
    {"step": 10, "train_runtime": 12.5, "train_loss": 2.0, "total_flos": 1.0},
]
STATE = {"global_step": 10, "epoch": 1.0, "log_history": LOG, "best_metric": 2.0, "best_global_step": 10}


def test_what_a_log_says() -> None:
    assert RunFacts.from_log(STATE) == RunFacts(
        steps=10,
        epochs=1.0,
        seconds=12.5,
        losses=((5, 2.5), (10, 1.5)),
        evaluations=((5, {"eval_loss": 2.25}), (10, {"eval_loss": 2.0, "eval_accuracy": 0.5})),
        best=("eval_loss", 2.0, 10),
    )


def test_known_fields_go_first() -> None:
    facts = RunFacts.from_log(STATE, seconds=99.0, trainable=7, settings={"seed": 0})
    assert (facts.seconds, facts.trainable, facts.settings, facts.steps) == (99.0, 7, {"seed": 0}, 10)


def test_the_file_that_trainer_writes(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    data = [{"input_ids": torch.arange(3, 9), "labels": torch.arange(3, 9)}] * 8
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    facts = RunFacts.read(tmp_path / "checkpoint-4")
    assert facts is not None
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert facts.steps == 4
    assert facts.losses == tuple((entry["step"], entry["loss"]) for entry in logged)
    assert [step for step, _ in facts.evaluations] == [2, 4]
    assert all(set(metrics) == {"eval_loss"} for _, metrics in facts.evaluations)
    best = min(facts.evaluations, key=lambda entry: entry[1]["eval_loss"])
    assert facts.best == ("eval_loss", best[1]["eval_loss"], best[0])
    whole = RunFacts.from_log(vars(trainer.state))
    assert whole.seconds is not None
    assert whole.seconds > 0
    assert whole.losses == facts.losses


# ---- hostile files ---------------------------------------------------------------------------------------------------


def write(folder: Path, text: str | bytes) -> Path:
    (folder / TRAINER_STATE).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def test_no_file_is_no_facts(tmp_path: Path) -> None:
    assert RunFacts.read(tmp_path) is None
    (tmp_path / TRAINER_STATE).mkdir()
    assert RunFacts.read(tmp_path) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / TRAINER_STATE)
    assert RunFacts.read(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"text"',
        b"\xff\xfe\x00",
        "[" * 200_000,
        '{"a":' * 200_000,
        "9" * 5000,
        '{"global_step": ' + "9" * 5000 + "}",
    ],
    ids=["empty", "torn", "list", "null", "number", "text", "no utf-8", "deep", "deep objects", "long", "long number"],
)
def test_what_is_no_state_is_refused(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(LoRAFileError, match=TRAINER_STATE) as caught:
        RunFacts.read(write(tmp_path, text))
    assert "Delete it" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / TRAINER_STATE, "wb") as file:
        file.truncate(200 * 2**30)  # sparse
    with pytest.raises(LoRAFileError, match="64 MiB"):
        RunFacts.read(tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"global_step": True},
        {"global_step": -5},
        {"global_step": 2.5},
        {"global_step": "10"},
        {"global_step": 10**30},
        {"global_step": None, "epoch": None, "log_history": None},
        {"log_history": "a text that is long"},
        {"log_history": {"step": 1, "loss": 1.0}},
        {"log_history": [None, 3, "x", [], {}, {"step": None, "loss": 1.0}, {"loss": 1.0}]},
        {"log_history": [{"step": True, "loss": 1.0}, {"step": "1", "loss": 1.0}, {"step": 1.0, "loss": 1.0}]},
        {"log_history": [{"step": 1, "loss": "1.0"}, {"step": 1, "loss": None}, {"step": 1, "loss": [1]}]},
        {"log_history": [{"step": 1, "loss": True, "eval_loss": False, "train_runtime": True}]},
        {"log_history": [{"step": 1, "eval_loss": "low", "eval_x": {"a": 1}}]},
        {"epoch": "one", "best_metric": "low", "best_global_step": "one"},
        {"best_metric": 2.0, "best_global_step": True},
        {"best_metric": 2.0, "best_global_step": 7, "log_history": [{"step": 7, "eval_loss": 3.0}][:0]},
    ],
)
def test_fields_of_another_kind_are_left_out(state: dict[str, Any], tmp_path: Path) -> None:
    facts = RunFacts.read(write(tmp_path, json.dumps(state)))
    assert facts == RunFacts(steps=0)


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    """NaN and infinity, which Python's json writes and reads, and whole numbers that no float can hold."""
    huge = "1" + "0" * 400
    entries = [
        f'{{"step": 1, "loss": {n}, "eval_loss": {n}, "train_runtime": {n}}}' for n in ("NaN", "-Infinity", huge)
    ]
    text = f'{{"global_step": 3, "epoch": {huge}, "best_metric": {huge}, "best_global_step": 1, '
    text += f'"log_history": [{",".join(entries)}]}}'
    assert RunFacts.read(write(tmp_path, text)) == RunFacts(steps=3)


def test_entries_out_of_order_are_put_in_order() -> None:
    facts = RunFacts.from_log({"log_history": [{"step": 9, "loss": 1.0}, {"step": 3, "loss": 2.0}]})
    assert facts.losses == ((3, 2.0), (9, 1.0))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ENTRY = st.dictionaries(st.sampled_from(["step", "loss", "eval_loss", "eval_", "eval_runtime", "train_runtime"]), JSON)


@settings(max_examples=150, deadline=None)
@given(
    state=st.dictionaries(st.sampled_from(["global_step", "epoch", "best_metric", "best_global_step"]), JSON),
    log=st.lists(ENTRY | JSON, max_size=5) | JSON,
)
def test_nothing_in_it_breaks_the_reader(state: dict[str, Any], log: Any) -> None:
    facts = RunFacts.from_log({**state, "log_history": log})
    json.dumps([facts.steps, facts.epochs, facts.seconds, facts.losses, facts.best], allow_nan=False)
    for _, metrics in facts.evaluations:
        assert all(name.startswith("eval_") and isinstance(number, float) for name, number in metrics.items())
        json.dumps(metrics, allow_nan=False)
