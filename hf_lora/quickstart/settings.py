"""What the user asked for, and what is already in the output folder."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .data import TaskData
from .docstrings import docstring_task
from .e2e import e2e_task
from .files import read_json
from .problems import MissingExtraError, SettingsError
from .train import Recipe

__all__ = ["ADAPTER", "CHECKPOINTS", "RECORD", "TASKS", "Settings", "clear", "earlier_run", "require_extras"]

RECORD, ADAPTER, CHECKPOINTS = "results.json", "adapter", "checkpoints"
FORMAT = "hf_lora quickstart 1"
TASKS = ("docstrings", "e2e")
# What the journey imports that `pip install hf_lora` alone does not bring, by import name.
_EXTRAS = {"rich": "rich", "rouge_score": "rouge-score", "accelerate": "accelerate"}


@dataclass(frozen=True)
class Settings:
    """One run of the quickstart; `data` is the folder of a task that reads one."""

    task: str = "docstrings"
    data: Path | None = None
    out: Path = Path("hf-lora-quickstart")
    recipe: Recipe = field(default_factory=Recipe)

    def asked(self) -> dict[str, Any]:
        """What a second run must ask for too, to go on with this one."""
        data = None if self.data is None else str(self.data.resolve())
        return {"task": self.task, "data": data, "steps": self.recipe.steps, "seed": self.recipe.seed}

    def load_data(self) -> TaskData:
        """The task's examples, or a typed error that says what is wrong with the request."""
        if self.task == "e2e":
            return e2e_task(self.data, seed=self.recipe.seed)
        return docstring_task(seed=self.recipe.seed)

    def checked(self) -> Settings:
        """These settings, or `SettingsError`; `DataError` for a folder that is not the task's. Writes nothing."""
        if self.task not in TASKS:
            raise SettingsError(
                f"There is no task {self.task!r}.",
                name="--task",
                value=self.task,
                expected=TASKS,
                remedy=f"Choose one of {', '.join(TASKS)}.",
            )
        if self.task == "docstrings" and self.data is not None:
            raise SettingsError(
                f"The task docstrings takes no data folder, and --data is {str(self.data)!r}.",
                name="--data",
                value=str(self.data),
                remedy="Leave --data out, or choose `--task e2e`.",
            )
        if self.recipe.steps < 1:
            raise SettingsError(
                f"--steps {self.recipe.steps} would train nothing.",
                name="--steps",
                value=self.recipe.steps,
                expected="at least 1",
                remedy="Leave --steps out for the default.",
            )
        if self.task == "e2e":
            self.load_data()  # a fraction of a second, and a mistake shows before anything else is done
        return self


def require_extras() -> None:
    """`MissingExtraError` naming every package that the quickstart needs and does not find."""
    missing = [name for module, name in _EXTRAS.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(
            f"The quickstart needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            name="quickstart",
            value=missing,
            remedy='Type: pip install "hf_lora[quickstart]"',
        )


def earlier_run(settings: Settings, *, fresh: bool) -> dict[str, Any] | None:
    """The record in the output folder, once that folder is known to be usable; None for a new run.

    Raises `SettingsError` for a folder that cannot be written, holds other things, or a run with other settings.
    """
    out = settings.out
    _require_writable(out)
    try:
        record = read_json(out / RECORD)
        if record is not None and record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']!r}")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SettingsError(
            f"{out / RECORD} is not a record of this quickstart: {error}.",
            name="--out",
            value=str(out),
            remedy="Choose another --out.",
        ) from error
    if record is None:
        strangers = sorted(path.name for path in out.iterdir())
        if strangers:
            raise SettingsError(
                f"{out} is not empty and holds no quickstart run.",
                name="--out",
                value=str(out),
                facts=strangers,
                remedy="Choose another --out: nothing of yours is overwritten.",
            )
        return None
    if fresh:
        clear(out)
        return None
    _refuse_changes(record["asked"], settings)
    return dict(record)


def _refuse_changes(before: dict[str, Any], settings: Settings) -> None:
    changed = [
        f"--{name} was {before.get(name)} and is now {value}"
        for name, value in settings.asked().items()
        if before.get(name) != value
    ]
    if changed:
        raise SettingsError(
            f"{settings.out} holds a run with other settings:",
            name="--out",
            value=str(settings.out),
            facts=changed,
            remedy="Give the earlier options again, start over with --fresh, or choose another --out.",
        )


def _require_writable(out: Path) -> None:
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise SettingsError(
            f"--out {str(out)!r} cannot be written to ({error.strerror}).",
            name="--out",
            value=str(out),
            expected="a folder, or a path where one can be made",
            remedy="Choose another --out.",
        ) from error


def clear(out: Path) -> None:
    """Delete a run, and nothing that is not its own. The record goes last: until then the folder is known as ours."""
    for name in (ADAPTER, CHECKPOINTS):
        shutil.rmtree(out / name, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(out / RECORD)
