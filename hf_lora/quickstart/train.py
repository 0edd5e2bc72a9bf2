"""The stock Trainer under a progress bar, with checkpoints that survive an interruption."""

from __future__ import annotations

import contextlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .data import Prompter, TaskData
from .evaluate import collate

__all__ = ["Recipe", "complete_checkpoint", "deferred_interrupt", "remove_incomplete", "train"]

_AT_ONCE = 4  # examples of a step whose activations are in memory together
_COMPLETE = "complete"  # this file in a checkpoint says that all others are written


@dataclass(frozen=True)
class Recipe:
    """How the adapter is trained. `targets` are roles, so the recipe holds for other architectures too."""

    steps: int = 40
    seed: int = 0
    batch_size: int = 8
    learning_rate: float = 2e-3
    warmup: int = 4
    rank: int = 8
    alpha: float = 16
    targets: tuple[str, ...] = ("attention", "mlp")
    save_steps: int = 10

    def as_dict(self) -> dict[str, Any]:
        """As JSON gives it back."""
        return {**asdict(self), "targets": list(self.targets)}


def complete_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint that was written to its end."""
    found = [
        (int(path.parent.name.rpartition("-")[2]), path.parent) for path in folder.glob(f"checkpoint-*/{_COMPLETE}")
    ]
    return max(found)[1] if found else None


def remove_incomplete(folder: Path) -> None:
    """Delete what a kill in the middle of a save left behind."""
    for path in folder.glob("checkpoint-*"):
        if not (path / _COMPLETE).exists():
            shutil.rmtree(path, ignore_errors=True)


def train(
    model: Any,
    prompter: Prompter,
    data: TaskData,
    recipe: Recipe,
    folder: Path,
    step: Callable[[int, float | None], None],
) -> list[dict[str, float]]:
    """Train to `recipe.steps` from the latest complete checkpoint in `folder`, if any; returns the loss by step.

    `step` is told the steps done and the last loss. Ctrl-C ends the training after the present step with a checkpoint
    and then raises KeyboardInterrupt; a second one raises at once, and what it left half-written is deleted.
    """
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step(state.global_step, None)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
        ) -> None:
            step(state.global_step, (logs or {}).get("loss"))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step(state.global_step, None)
            if interrupted.is_set():
                control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (folder / f"checkpoint-{state.global_step}" / _COMPLETE).touch()

    remove_incomplete(folder)
    start = complete_checkpoint(folder)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=min(_AT_ONCE, recipe.batch_size),
        gradient_accumulation_steps=max(1, recipe.batch_size // _AT_ONCE),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=min(recipe.warmup, recipe.steps // 2),
        train_sampling_strategy="group_by_length",
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=2,
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=model.device.type == "cpu",  # train where the base was measured, on a Mac too
        seed=recipe.seed,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[prompter.features(example) for example in data.train],
        data_collator=lambda features: collate(features, prompter.tokenizer.pad_token_id),
        callbacks=[Progress()],
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar says it
    try:
        with deferred_interrupt() as interrupted:
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    except BaseException:
        remove_incomplete(folder)
        raise
    if interrupted.is_set():
        raise KeyboardInterrupt
    model.eval()
    return [{"step": log["step"], "loss": log["loss"]} for log in trainer.state.log_history if "loss" in log]


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Within, the first Ctrl-C only sets the event; the second is a KeyboardInterrupt as ever."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals belong to the main thread
        return

    def note(signum: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
