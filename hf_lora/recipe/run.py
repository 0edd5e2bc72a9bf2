"""Carry a recipe out: the stock Trainer with `LoRACallback`, and a folder that an interruption leaves resumable."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bases import hub_id, require_hub_id
from ..errors import LoRAError, LoRAMismatchError
from ..facts import TRAINER_STATE, RunFacts
from ..quickstart.run import quiet
from ..quickstart.train import deferred_interrupt
from ..scratch import beside
from ..summary import Summary
from .folder import CARD, CHECKPOINTS, RunFolder
from .problems import MissingExtraError, RecipeError
from .schema import Recipe

if TYPE_CHECKING:
    from .base import Found
    from .features import Prepared, SplitFacts

__all__ = ["DEFAULTS", "Interrupted", "Plan", "Result", "check", "train"]

# Where a recipe says nothing; below them come the defaults of `TrainingArguments`. Numbers below 1 are shares of the
# run's steps.
DEFAULTS: Mapping[str, Any] = {
    "learning_rate": 2e-4,
    "logging_steps": 0.02,
    "save_steps": 0.1,
    "save_total_limit": 2,
    "report_to": "none",
}
_NAME = "default"  # of the adapter on the model
# What training needs that `pip install hf_lora` alone does not bring, by import name, and when.
_EXTRAS: tuple[tuple[str, Callable[[Recipe], bool]], ...] = (
    ("accelerate", lambda recipe: True),
    ("datasets", lambda recipe: any(s and s.dataset for s in (recipe.data.train, recipe.data.eval))),
    ("pyarrow", lambda recipe: any(s and s.kind == "parquet" for s in (recipe.data.train, recipe.data.eval))),
)

# Steps done, steps in all, and the last loss: for a progress bar.
Step = Callable[[int, int, float | None], None]
Note = Callable[[str], None]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a message about what was kept."""


@dataclass(frozen=True)
class Plan:
    """What a recipe comes to, before any training.

    Args:
        base, revision, task: the base and what the adapter is for.
        summary: the adapter on the base: targets by role, trainable share.
        train, eval: the examples in numbers. labels: names of the classes. max_length: the one used.
        steps: optimizer steps of the whole run.
    """

    base: str
    revision: str | None
    task: str
    summary: Summary
    train: SplitFacts
    eval: SplitFacts | None
    labels: tuple[str, ...] | None
    max_length: int
    steps: int


@dataclass(frozen=True)
class Result:
    """A finished run.

    Args:
        out: the adapter's folder. base: what it is for.
        steps, epochs, seconds: seconds are those of this call, without what an earlier one did.
        trainable, total: parameters that trained, and of the base. share: their ratio.
        train, eval: the examples in numbers. labels: names of the classes.
        loss_before, loss_after: the first and the last training loss that was logged.
        eval_before, eval_after: measured on the examples to evaluate on, before training and at its end.
        resumed_from: the step that it went on from. already_finished: it was found finished, and nothing was done.
        card: whether a README.md was written. pushed: the commit's address.
    """

    out: str
    base: str
    steps: int
    epochs: float | None
    seconds: float
    trainable: int
    total: int
    share: float
    train: Mapping[str, Any]
    eval: Mapping[str, Any] | None
    labels: tuple[str, ...] | None
    loss_before: float | None
    loss_after: float | None
    eval_before: Mapping[str, float] = field(default_factory=dict)
    eval_after: Mapping[str, float] = field(default_factory=dict)
    resumed_from: int | None = None
    already_finished: bool = False
    card: bool = False
    pushed: str | None = None


# ---- without training ------------------------------------------------------------------------------------------------


def check(recipe: Recipe, *, note: Note = lambda text: None) -> Plan:
    """All that can be checked without weights: data, columns, lengths, targets, and the Trainer's arguments.

    Nothing is written.

    Raises:
        RecipeError, DataError, BaseNotFoundError, LoRATargetError, …: the first thing that would stop the run.
    """
    _require_extras(recipe)
    RunFolder(recipe.out).look()
    with quiet():
        found, data = _prepared(recipe, note)
        model = found.skeleton(data.labels)
        _add_lora(model, recipe, found)
        arguments = _arguments(recipe, Path(recipe.out) / CHECKPOINTS, evaluates=data.eval is not None)
        return Plan(
            found.name,
            found.revision,
            found.task,
            model.lora_summary(),
            data.train.facts,
            None if data.eval is None else data.eval.facts,
            data.labels,
            data.max_length,
            _steps(arguments, len(data.train)),
        )


def _steps(arguments: Any, examples: int) -> int:
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batches = examples / arguments.train_batch_size
    batches = math.floor(batches) if arguments.dataloader_drop_last else math.ceil(batches)
    each = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    return math.ceil(arguments.num_train_epochs * each)


# ---- training --------------------------------------------------------------------------------------------------------


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    fresh: bool = False,
    note: Note = lambda text: None,
    step: Step = lambda done, steps, loss: None,
) -> Result:
    """Train what a recipe says, and write adapter, card and the Trainer's state into its folder.

    Args:
        resume: go on from the last checkpoint of an unfinished run, if there is one.
        fresh: delete an earlier run in the folder first.
        note: is told what is under way. step: is told the progress.

    Returns:
        the result; that of then if the folder holds this run, finished.

    Raises:
        RecipeError, DataError, BaseNotFoundError, MissingExtraError, RunFolderError: with what to do about it.
        Interrupted: Ctrl-C; the folder holds only whole checkpoints, and `resume` goes on.
    """
    _require_extras(recipe)
    folder = RunFolder(recipe.out)
    record = folder.open(recipe, resume=resume, fresh=fresh)
    if record is not None and record["state"] == "finished":
        note(f"{folder.path} holds this run, finished; its data were not read again. --fresh starts over.")
        result = Result(**{**record["result"], "out": str(folder.path), "already_finished": True})
        if recipe.push is None or result.pushed is not None:
            return result
        return _pushed(recipe, folder, result, RunFacts.read(folder.path), record["data"], note)
    try:
        with quiet():
            return _train(recipe, folder, record, fresh=fresh, note=note, step=step)
    except KeyboardInterrupt:
        if recipe.push is not None and (folder.look() or {}).get("state") == "finished" and not fresh:
            raise Interrupted(f"Interrupted. {folder.path} holds the trained adapter; run it again to push.") from None
        folder.remove_incomplete()
        latest = folder.latest()
        kept = f"Kept: {latest.name} in {folder.checkpoints}. --resume goes on from there." if latest else ""
        raise Interrupted(f"Interrupted. {kept or 'No step was saved yet.'}") from None


def _train(
    recipe: Recipe, folder: RunFolder, record: dict[str, Any] | None, *, fresh: bool, note: Note, step: Step
) -> Result:
    from transformers import Trainer, set_seed
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from ..training import LoRACallback
    from .features import collator

    started = time.perf_counter()
    found, data = _prepared(recipe, note)
    fingerprint = data.fingerprint()
    start = None if record is None else folder.latest()
    if record is not None and start is not None:
        folder.require_same_data(record, fingerprint)
    arguments = _arguments(recipe, folder.checkpoints, evaluates=data.eval is not None, resumed=start is not None)
    _add_lora(found.skeleton(data.labels), recipe, found)  # a mistake shows before anything is loaded or written
    folder.begin(recipe, fresh=fresh)
    folder.remove_incomplete()
    note(f"loading {found.name} from {found.origin}")
    set_seed(recipe.seed)  # for A, and for a new classifier
    model = found.model(data.labels)
    _add_lora(model, recipe, found)
    if start is None:
        folder.write(recipe, "begun", fingerprint)
    else:
        note(f"going on from {start.name}")
    datasets = tuple(dict.fromkeys(s.dataset for s in (recipe.data.train, recipe.data.eval) if s and s.dataset))
    with deferred_interrupt() as interrupted:
        with _refused("the Trainer", recipe):
            trainer = Trainer(
                model,
                arguments,
                train_dataset=data.train,
                eval_dataset=data.eval,
                data_collator=collator(found.pad),
                compute_metrics=_accuracy if found.task == "classification" else None,
                preprocess_logits_for_metrics=_classes if found.task == "classification" else None,
                callbacks=[_progress(step, interrupted), LoRACallback(datasets=datasets)],
            )
        trainer.remove_callback(PrinterCallback)  # they print on stdout; `step` says it
        trainer.remove_callback(ProgressCallback)
        if start is not None and _had_all_steps(start):
            _finish_training(trainer, start)
        else:
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
        if not interrupted.is_set() and data.eval is not None and not _evaluated(trainer):
            trainer.evaluate()
        if interrupted.is_set():
            raise KeyboardInterrupt
        run = _facts(model, trainer)
        result = _finish(folder, found, data, trainer, run)
    result = dataclasses.replace(
        result,
        seconds=round(time.perf_counter() - started, 1),
        resumed_from=None if start is None else int(start.name.rpartition("-")[2]),
    )
    folder.write(recipe, "finished", fingerprint, result=_as_json(result))
    return result if recipe.push is None else _pushed(recipe, folder, result, run, fingerprint, note)


def _had_all_steps(checkpoint: Path) -> bool:
    state = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    return bool(state["global_step"] >= state["max_steps"])


def _finish_training(trainer: Any, checkpoint: Path) -> None:
    """The end of `Trainer.train` for a run that was stopped after its last step: stock Trainer would take one more."""
    from transformers import TrainerState

    from ..loading import load_checkpoint

    trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    load_checkpoint(trainer.model, checkpoint if best is None else checkpoint.parent / Path(best).name)
    for event in (trainer.callback_handler.on_train_begin, trainer.callback_handler.on_train_end):
        trainer.control = event(trainer.args, trainer.state, trainer.control)


def _pushed(
    recipe: Recipe, folder: RunFolder, result: Result, run: RunFacts | None, fingerprint: str, note: Note
) -> Result:
    """Push the finished run, and put the commit's address into its record."""
    assert recipe.push is not None
    note(f"pushing to {recipe.push.repo}")
    result = dataclasses.replace(result, pushed=_push(recipe, folder, result.base, run))
    folder.write(recipe, "finished", fingerprint, result=_as_json(result))
    return result


def _as_json(result: Result) -> dict[str, Any]:
    content = dataclasses.asdict(result)
    content["labels"] = None if result.labels is None else list(result.labels)
    return content


def _prepared(recipe: Recipe, note: Note) -> tuple[Found, Prepared]:
    from .base import find
    from .features import prepare

    note(f"finding the base {recipe.base.model}")
    found = find(recipe.base, recipe.data)
    if recipe.push is not None:
        try:
            require_hub_id(found.name)  # it would be missed only when all is trained
        except LoRAMismatchError as error:
            error.remedy = "Give base.id (--base-id), the base's id on the Hub."
            raise
    note("reading and tokenising the data")
    return found, prepare(recipe.data, found.tokenizer, found.config, seq2seq=found.task == "seq2seq")


def _add_lora(model: Any, recipe: Recipe, found: Found) -> None:
    config = recipe.lora.replace(base_model=found.name, revision=found.revision)
    if config.task_type is None:
        config = config.replace(task_type=found.task_type)
    model.add_lora(config, _NAME)


def _arguments(recipe: Recipe, folder: Path, *, evaluates: bool, resumed: bool = False) -> Any:
    from transformers import TrainingArguments

    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise RecipeError(
            f"This is one of {processes} processes, and a recipe runs in one.",
            name="WORLD_SIZE",
            value=processes,
            remedy="Write a training script for several processes, or start `hf-lora train` without a launcher.",
        )
    # Before training, but not again where a run goes on: its log has it already.
    defaults = {**DEFAULTS, "eval_on_start": evaluates and not resumed}
    given = {**defaults, **recipe.training, "output_dir": str(folder), "seed": recipe.seed, "disable_tqdm": True}
    if resumed:
        given["eval_on_start"] = False
    if not evaluates and (recipe.training.get("eval_strategy", "no") != "no" or given["eval_on_start"]):
        raise RecipeError(
            "training.eval_strategy: there is nothing to evaluate on.",
            name="training.eval_strategy",
            value=recipe.training.get("eval_strategy"),
            remedy="Give data.eval or data.eval_fraction, or leave eval_strategy and eval_on_start out.",
        )
    with _refused("TrainingArguments", recipe):
        arguments = TrainingArguments(**given)
    arguments.dataloader_pin_memory &= arguments.device.type == "cuda"
    return arguments


@contextlib.contextmanager
def _refused(who: str, recipe: Recipe) -> Iterator[None]:
    """Values that only transformers judges, and what it lacks for them."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        if isinstance(error, LoRAError):
            raise
        raise RecipeError(
            f"training: {who} refuses this: {error}", name="training", value=dict(recipe.training)
        ) from error


def _progress(step: Step, interrupted: Any) -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step(state.global_step, state.max_steps, None)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
        ) -> None:
            step(state.global_step, state.max_steps, (logs or {}).get("loss"))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step(state.global_step, state.max_steps, None)
            if interrupted.is_set():
                control.should_save = control.should_training_stop = True

    return Progress()


def _evaluated(trainer: Any) -> bool:
    """Whether the model as it is now was evaluated: not if the best was loaded in its place."""
    log, now = trainer.state.log_history, trainer.state.global_step
    done = any(entry.get("step") == now and "eval_loss" in entry for entry in log)
    return done and not trainer.args.load_best_model_at_end


def _classes(logits: Any, labels: Any) -> Any:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


# ---- the end ---------------------------------------------------------------------------------------------------------


def _finish(folder: RunFolder, found: Found, data: Prepared, trainer: Any, run: RunFacts) -> Result:
    """Write adapter, Trainer's state and card; each replaces its file at once."""
    model = trainer.model
    model.save_lora(folder.path, _NAME)
    with beside(folder.path / TRAINER_STATE) as temporary:
        trainer.state.save_to_json(str(temporary))
        os.replace(temporary, folder.path / TRAINER_STATE)
    summary = model.lora_summary()
    losses = [loss for _, loss in run.losses]
    measured = [dict(metrics) for _, metrics in run.evaluations]
    return Result(
        out=str(folder.path),
        base=found.name,
        steps=run.steps,
        epochs=run.epochs,
        seconds=0.0,
        trainable=summary.trainable,
        total=summary.base_parameters,
        share=summary.trainable_share,
        train=dataclasses.asdict(data.train.facts),
        eval=None if data.eval is None else dataclasses.asdict(data.eval.facts),
        labels=data.labels,
        loss_before=losses[0] if losses else None,
        loss_after=losses[-1] if losses else None,
        eval_before=measured[0] if len(measured) > 1 and run.evaluations[0][0] == 0 else {},
        eval_after=measured[-1] if measured else {},
        card=_write_card(folder, found, model, run),
    )


def _facts(model: Any, trainer: Any) -> RunFacts:
    """What `LoRACallback` kept of the run, with the evaluation that came after it."""
    from ..model import require

    kept = require(model).entry(_NAME).record.run
    latest = RunFacts.from_log(vars(trainer.state))
    if kept is None:
        return latest
    return dataclasses.replace(kept, evaluations=latest.evaluations, best=latest.best)


def _write_card(folder: RunFolder, found: Found, model: Any, run: RunFacts) -> bool:
    """The README, around what a user wrote in it. A base without an id on the Hub cannot be named in one."""
    from .. import card

    base = hub_id(found.name)
    if base is None:
        return False
    path = folder.path / CARD
    existing = path.read_text(encoding="utf-8") if path.is_file() else None
    text = card.update(existing, model.lora_adapter(_NAME), run=run, base_model=base)
    with beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    return True


def _push(recipe: Recipe, folder: RunFolder, base: str, run: RunFacts | None) -> str:
    from ..adapter import LoRAAdapter

    push = recipe.push
    assert push is not None
    card = folder.path / CARD
    try:
        commit = LoRAAdapter.load(folder.path).push(
            push.repo,
            private=push.private,
            revision=push.revision,
            subfolder=push.subfolder,
            commit_message=push.message,
            card=card if card.is_file() else None,
            base_model=hub_id(base),
            run=run,
        )
    except LoRAError as error:
        again = f"The trained adapter is in {folder.path}; the same recipe again, without --fresh, only pushes it."
        error.remedy = f"{error.remedy or ''} {again}".strip()
        raise
    return str(getattr(commit, "commit_url", commit))


# ---- surroundings ----------------------------------------------------------------------------------------------------


def _require_extras(recipe: Recipe) -> None:
    missing = [module for module, needed in _EXTRAS if needed(recipe) and importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(
            f"`hf-lora train` needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            name="train",
            value=missing,
            remedy='Type: pip install "hf_lora[train]"',
        )
