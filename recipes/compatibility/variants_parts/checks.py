"""The checks of the matrix: what each does with a trained adapter, and what it is held against."""

from __future__ import annotations

import re
import unittest.mock
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import hf_lora
from hf_lora.errors import LoRAConfigError, LoRAError, LoRAFileError, LoRAStateError, LoRAUnsupportedError

from .scenes import ROWS, Scene, agree, bits, logits, loss, require, same_bits, task, text

__all__ = ["CHECKS", "Check", "PeftCannot", "said"]


_FOLDER = r"/\S*/(?=[\w.]+\.(?:safetensors|json)\b)"  # a run's own


class PeftCannot(Exception):
    """The cell passed, against the float64 formula, because PEFT has no answer; says what PEFT said."""


@dataclass(frozen=True)
class Check:
    """A column of a table: its name, what it is compared with, and the run."""

    name: str
    against: str
    play: Callable[[Scene], None]
    refusals: tuple[type[LoRAError], ...] = (LoRAConfigError, LoRAUnsupportedError)


CHECKS: dict[str, Check] = {}


def check(
    name: str, against: str, *refusals: type[LoRAError]
) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Add a column."""

    def add(play: Callable[[Scene], None]) -> Callable[[Scene], None]:
        CHECKS[name] = Check(name, against, play, (*Check.refusals, *refusals))
        return play

    return add


@check("train", "the base at step 0, its loss, its bits; the float64 formula at the end")
def _train(scene: Scene) -> None:
    model = scene.base()
    before, start, at_base = bits(model), logits(model, scene.inputs), loss(model, torch.cat(task()))
    scene.add(model)
    if scene.variant.begins == "bits":
        require(torch.equal(logits(model, scene.inputs), start), "step 0 is not the base, bit for bit")
    elif scene.variant.begins == "rounding":
        agree(logits(model, scene.inputs), start, "step 0", 1e-6)
    values = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    scene.train(model)
    fell = at_base - loss(model, torch.cat(task()))
    require(fell > scene.variant.fell, f"the loss fell by {fell:.3f} only")
    still = [k for k, v in values.items() if torch.equal(model.get_parameter(k), v)]
    require(not still, f"{still} has not moved")
    model.save_lora(scene.folder / "train")
    now = logits(model, scene.inputs)
    require(bool((now - start).abs().max() > 1e-3 * start.abs().max()), "the adapter changes nothing")
    agree(now, scene.formula([scene.folder / "train"]), "the formula")
    model.remove_lora()
    require(same_bits(model, before), "remove_lora has not given every bit back")


@check("save → PEFT", "PEFT's logits on our file, and the float64 formula's")
def _save(scene: Scene) -> None:
    ours = logits(scene.live(), scene.inputs)
    agree(ours, scene.formula([scene.trained]), "the formula")
    try:
        theirs = scene.peft_loads(scene.trained)
    except Exception as error:  # whatever PEFT cannot do
        raise PeftCannot(said(error)) from error
    agree(ours, theirs, "PEFT")


@check("PEFT → load", "PEFT's logits, of what it began, trained and saved, and the float64 formula's", LoRAFileError)
def _load(scene: Scene) -> None:
    cannot = None
    try:
        folder, theirs = scene.peft_trains()
    except Exception as error:  # noqa: BLE001  # whatever PEFT cannot do
        cannot = said(error)
        folder, theirs = scene.trained, scene.formula([scene.trained])
    agree(theirs, scene.formula([folder]), "PEFT and the formula")
    model = scene.base()
    require(bool((theirs - logits(model, scene.inputs)).abs().max() > 1e-3), "the adapter changes nothing")
    for name, trainable in (("frozen", False), ("trainable", True)):
        model.load_lora(folder, name=name, trainable=trainable)
        model.set_lora(name)
        agree(logits(model, scene.inputs), theirs, name)
    if cannot:
        raise PeftCannot(cannot)


@check("merge", "the float64 formula; the base's bits after unmerging, twice")
def _merge(scene: Scene) -> None:
    model = scene.live()
    model.train_lora([])
    before = bits(scene.base())
    expected = scene.formula([scene.trained])
    for _ in range(2):
        model.merge_lora()
        require(not same_bits(model, before), "the merge has changed nothing")
        agree(logits(model, scene.inputs), expected, "merged")
        model.unmerge_lora()
        require(same_bits(model, before), "unmerge_lora has not given every bit back")
        agree(logits(model, scene.inputs), expected, "unmerged")


@check("route", "row by row: the float64 formula, the base, a plain adapter's formula", LoRAStateError)
def _route(scene: Scene) -> None:
    of = {
        "a": scene.formula([scene.trained]),
        "plain": scene.formula([scene.plain]),
        None: scene.formula([]),
    }
    names = (["a", None, "plain", "a"] * ROWS)[:ROWS]
    for trainable in (False, True):
        model = scene.base()
        model.load_lora(scene.plain, name="plain")
        model.load_lora(scene.trained, name="a", trainable=trainable)
        with model.route_lora(names):
            found = logits(model, scene.inputs)
        for row, name in enumerate(names):
            agree(found[row], of[name][row], f"row {row}, {name}")


@check("mix", "the float64 formula of 0.5 ΔW + 0.25 ΔW'", LoRAStateError)
def _mix(scene: Scene) -> None:
    model = scene.base()
    model.load_lora(scene.plain, name="plain")
    model.load_lora(scene.trained, name="a")
    model.set_lora({"a": 0.5, "plain": 0.25})
    agree(logits(model, scene.inputs), scene.formula({scene.trained: 0.5, scene.plain: 0.25}), "the formula")


@check("compile", "one graph (fullgraph=True) for the adapter, None and a route: the float64 formula", LoRAStateError)
def _compile(scene: Scene) -> None:
    torch.compiler.reset()
    model = scene.live()
    model.load_lora(scene.plain, name="plain")
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    formulas = {
        "default": scene.formula([scene.trained]),
        "plain": scene.formula([scene.plain]),
        None: scene.formula([]),
    }
    for name in ("default", None, "plain"):
        model.set_lora(name)
        agree(logits(compiled, scene.inputs), formulas[name], f"compiled, {name}")
    names = (["plain", None, "default"] * ROWS)[:ROWS]
    with model.route_lora(names):
        found = logits(compiled, scene.inputs)
    for row, name in enumerate(names):
        agree(found[row], formulas[name][row], f"compiled, routed, row {row}")
    require(len(graphs) == 1, f"{len(graphs)} graphs")


@check("checkpointing", "the gradients without it, both kinds")
def _checkpointing(scene: Scene) -> None:
    found = []
    for kind in (None, True, False):
        model = scene.live().train()
        if kind is not None:
            model.gradient_checkpointing_enable({"use_reentrant": kind})
            model.enable_input_require_grads()
        batch = task()[0]
        torch.manual_seed(7)  # for what is drawn
        with model.use_lora("default"):
            value = model(input_ids=batch, labels=batch).loss
        value.backward()
        found.append({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
    for other in found[1:]:
        for key, grad in found[0].items():
            require(grad is not None and bool(grad.any()), f"{key} has no gradient")
            require(other.get(key) is not None, f"{key} has no gradient with checkpointing")
            agree(other[key], grad, key)


@check("resume", "the run that was not stopped: adapter and losses, bit by bit")
def _resume(scene: Scene) -> None:
    whole, losses = _trainer(scene, "whole", seed=3)
    again, later = _trainer(scene, "again", seed=3 if _needs_same_start(scene) else 30, resume="whole/checkpoint-2")
    require(whole.keys() == again.keys(), "other tensors")
    apart = [k for k, v in whole.items() if not torch.equal(again[k], v)]
    require(not apart, f"{apart} differs from the uninterrupted run's")
    require(losses == later, f"losses {later}, {losses} uninterrupted")


def _needs_same_start(scene: Scene) -> bool:
    """What the data gave (EVA's ranks) is part of the model that is built again."""
    return scene.variant.fields.get("init") in hf_lora.initnames.NEED_DATA


def _trainer(scene: Scene, name: str, *, seed: int, resume: str | None = None) -> tuple[Mapping[str, Any], list[float]]:
    from transformers import Trainer, TrainingArguments

    model = scene.add(scene.base(), seed=seed)
    rows = [{"input_ids": row, "labels": row} for row in text()[200:216]]
    options: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    options |= {"save_steps": 2, "logging_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 5}
    arguments = TrainingArguments(str(scene.folder / name), **options)
    optimizers = (None, None) if scene.variant.b_lr_ratio == 1 else (scene.optimizer(model), None)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[hf_lora.LoRACallback()], optimizers=optimizers)
    with unittest.mock.patch("gc.collect"):  # each end of a training looks through all that was imported
        trainer.train(resume_from_checkpoint=None if resume is None else str(scene.folder / resume))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {k: v.detach().clone() for k, v in model.lora_state_dict().items()}, logged


def said(error: BaseException) -> str:
    """The first line of an error's message that says something, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    shown = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return f"{type(error).__name__}: {re.sub(_FOLDER, '', shown)}"
