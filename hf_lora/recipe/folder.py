"""The folder that a run writes to: whose run is in it, which checkpoints are whole, and what may be deleted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..facts import TRAINER_STATE
from ..quickstart.files import read_json, write_json
from ..store import CONFIG_NAME, WEIGHTS_NAME
from .problems import RunFolderError, quoted
from .schema import Recipe

__all__ = ["CARD", "CHECKPOINTS", "RECORD", "RunFolder"]

RECORD, CHECKPOINTS, CARD = "recipe.json", "checkpoints", "README.md"
_FORMAT = "hf_lora train 1"
_LISTED = 10  # files that an error names


class RunFolder:
    """A folder with one run.

    Args:
        out: the folder; `open` makes it.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.path = Path(out).expanduser()

    @property
    def checkpoints(self) -> Path:
        """Where the Trainer writes."""
        return self.path / CHECKPOINTS

    # ---- what is there -----------------------------------------------------------------------------------------------

    def open(self, recipe: Recipe, *, resume: bool, fresh: bool) -> dict[str, Any] | None:
        """The record of an earlier run of the same recipe; None for a new run.

        Raises:
            RunFolderError: it cannot be written, holds other things, another recipe's run, or checkpoints of an
                unfinished one while neither `resume` nor `fresh` is asked for.
        """
        record = self.look()
        if record is not None and fresh:
            return None
        if record is None:
            return None
        changed = _differences(record["recipe"], identity(recipe))
        if changed:
            raise RunFolderError(
                f"{self.path} holds a run of another recipe:",
                name="out",
                value=str(self.path),
                facts=changed,
                remedy="Choose another `out`, or start over with --fresh, which deletes that run.",
            )
        latest = self.latest()
        if record["state"] == "finished" or latest is None or resume:
            return record
        raise RunFolderError(
            f"{self.path} holds an unfinished run of this recipe, at {latest.name}.",
            name="out",
            value=str(self.path),
            remedy="Go on from there with --resume, or start over with --fresh.",
        )

    def look(self) -> dict[str, Any] | None:
        """The record in the folder, whatever recipe it is of. Writes nothing. Raises `RunFolderError`."""
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise self._unusable("is a file")
        if not os.path.exists(self.path):
            return None
        try:
            record = read_json(self.path / RECORD)
            if record is not None:
                if record["format"] != _FORMAT:
                    raise ValueError(f"its format is {quoted(record['format'])}")
                record["recipe"], record["state"], record["data"]  # they have to be there
                if not all((self.path / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME)):
                    record["state"] = "begun"  # the adapter was deleted, by --fresh or by hand
                return dict(record)
        except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
            raise self._unusable(f"has a {RECORD} that is not of a run: {error}") from error
        strangers = sorted(entry.name for entry in self.path.iterdir() if entry.name != CARD)
        if strangers:
            raise RunFolderError(
                f"{self.path} is not empty and holds no run of `hf-lora train`.",
                name="out",
                value=str(self.path),
                facts=strangers[:_LISTED],
                remedy="Choose another `out`: nothing of yours is overwritten.",
            )
        return None

    def latest(self) -> Path | None:
        """The last checkpoint that was written to its end."""
        whole = [(step, path) for step, path in self._saved() if _is_whole(path, step)]
        return max(whole)[1] if whole else None

    def _saved(self) -> Iterator[tuple[int, Path]]:
        for path in self.checkpoints.glob("checkpoint-*"):
            number = path.name.rpartition("-")[2]
            if number.isdecimal():
                yield int(number), path

    # ---- what is done to it ------------------------------------------------------------------------------------------

    def begin(self, recipe: Recipe, *, fresh: bool) -> None:
        """Make the folder, delete an earlier run if `fresh`, and check that it can be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
            if fresh:
                self._clear()
        except OSError as error:
            raise self._unusable(f"cannot be written to ({error.strerror})") from error

    def write(self, recipe: Recipe, state: str, data: str, **more: Any) -> None:
        """Replace the record."""
        content = {"format": _FORMAT, "state": state, "recipe": identity(recipe), "data": data, **more}
        write_json(self.path / RECORD, content)

    def remove_incomplete(self) -> None:
        """Delete what a kill in the middle of a save left behind."""
        for step, path in list(self._saved()):
            if not _is_whole(path, step):
                shutil.rmtree(path, ignore_errors=True)

    def require_same_data(self, record: Mapping[str, Any], fingerprint: str) -> None:
        """Raise `RunFolderError` if a run that goes on would do so with other examples."""
        if record["data"] != fingerprint:
            raise RunFolderError(
                f"The examples are not those that the run in {self.path} began with.",
                name="data",
                value=fingerprint,
                expected=record["data"],
                remedy="Bring back the data (and tokenizer) of then, or start over with --fresh.",
            )

    def _clear(self) -> None:
        """Delete a run and nothing else. README.md stays, for what a user wrote there; the record goes last."""
        if self.checkpoints.exists():
            shutil.rmtree(self.checkpoints)
        for name in (CONFIG_NAME, WEIGHTS_NAME, TRAINER_STATE, RECORD):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path / name)

    def _unusable(self, why: str) -> RunFolderError:
        return RunFolderError(
            f"out: {str(self.path)!r} {why}.", name="out", value=str(self.path), remedy="Choose another `out`."
        )


def _is_whole(checkpoint: Path, step: int) -> bool:
    """Trainer writes its state last of all."""
    try:
        return bool(json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"] == step)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def identity(recipe: Recipe) -> dict[str, Any]:
    """What makes it the same run: all but where the result goes, and where the files lie (their content counts)."""
    content = recipe.to_dict()
    content.pop("out")
    content.pop("push", None)
    for name in ("train", "eval"):
        source = content["data"].get(name)
        if source and "file" in source:
            content["data"][name] = {**source, "file": Path(source["file"]).name}
    return content


def _differences(before: Any, now: Any) -> list[str]:
    old, new = dict(_flat(before)), dict(_flat(now))
    keys = dict.fromkeys([*old, *new])
    return [
        f"{key} was {quoted(old[key]) if key in old else 'not given'} "
        f"and is {quoted(new[key]) if key in new else 'not given'} now"
        for key in keys
        if old.get(key) != new.get(key) or (key in old) != (key in new)
    ]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value
