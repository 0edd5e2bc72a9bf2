"""Which checkpoint of a run is whole, and which files a run replaces.

Trainer writes the files of a checkpoint one after the other, trainer_state.json last, and resumes from the newest
folder whether its files are there or not. A run that was killed while it wrote `checkpoint-6` leaves such a folder.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import re
import shutil
import traceback
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRAFileError, LoRAMismatchError
from ..loading import read_checkpoint

__all__ = ["Start", "faults", "newest_whole", "recover", "require_whole", "writing"]

_STATE = "trainer_state.json"
_NEEDED = ("optimizer.pt", "scheduler.pt")  # without both, Trainer starts the optimizer anew and says nothing
_OTHERS = ("rng_state*.pth", "scaler.pt")
_ASIDE = "_replaced-"  # Trainer does not take such a folder for a checkpoint, nor pushes it
_NAME = re.compile(rf"({_ASIDE})?checkpoint-(\d+)")


def faults(model: nn.Module, folder: Path, *, weights_only: bool = False) -> list[str]:
    """Why training cannot go on from a checkpoint, one line a reason; empty if it can.

    Args:
        weights_only: the optimizer, scheduler and generators may be missing (`save_only_model`).

    Raises:
        LoRAMismatchError: the checkpoint is of other adapters than those that train on the model.
    """
    if not folder.is_dir():
        return [f"{folder} is not a folder"]
    found: list[str] = []
    try:
        read_checkpoint(model, folder)
    except LoRAFileError as error:
        found.append(error.message.rstrip("."))
    if not _state_is_whole(folder):
        found.append(f"{_STATE} is missing or cut short, so the checkpoint was not written to its end")
    for name in _NEEDED:
        if not (folder / name).is_file() and not weights_only:
            found.append(f"{name} is missing")
    others = [path for pattern in _OTHERS for path in sorted(folder.glob(pattern))]
    if not weights_only and not any(path.suffix == ".pth" for path in others):
        found.append("rng_state.pth is missing")
    for path in [*(folder / name for name in _NEEDED), *others]:
        if path.exists() and not _is_whole(path):
            found.append(f"{path.name} is damaged or cut short")
    return found


def _state_is_whole(folder: Path) -> bool:
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    step = state.get("global_step") if isinstance(state, dict) else None
    return isinstance(step, int) and not isinstance(step, bool) and step >= 0


def _is_whole(path: Path) -> bool:
    """Whether a file of torch.save ends where it should and every byte of it has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, ValueError, NotImplementedError):
        return False


def _checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first; one that was being replaced comes after the new one of its step."""
    if not run.is_dir():
        return []
    found = [(match, path) for path in run.iterdir() if path.is_dir() and (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda each: (-int(each[0][2]), each[0][1] is not None))]


def newest_whole(model: nn.Module, run: Path, **options: Any) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest checkpoint in `run` that training can go on from, and what is wrong with those newer than it."""
    damaged: dict[Path, list[str]] = {}
    for path in _checkpoints(run):
        wrong = faults(model, path, **options)
        if not wrong:
            return path, damaged
        damaged[path] = wrong
    return None, damaged


def _other_to_name(model: nn.Module, run: Path, **options: Any) -> Path | None:
    """The newest whole checkpoint, for a message: those of other adapters do not count."""
    for path in _checkpoints(run):
        with contextlib.suppress(LoRAMismatchError):
            if not faults(model, path, **options):
                return path
    return None


def require_whole(model: nn.Module, folder: Path, **options: Any) -> None:
    """Raise unless training can go on from `folder`; the error names the newest checkpoint from which it can.

    Raises:
        LoRAFileError: it cannot. LoRAMismatchError: it is of other adapters.
    """
    wrong = faults(model, folder, **options)
    if not wrong:
        return
    run = folder.resolve().parent
    whole = _other_to_name(model, run, **options)
    remedy = (
        f"Resume with trainer.train(resume_from_checkpoint={str(whole)!r})."
        if whole is not None
        else f"No checkpoint in {run} is complete: train without resume_from_checkpoint."
    )
    if (folder / _STATE).is_file() and not any(_STATE in line for line in wrong):
        remedy += " To go on from the weights alone, with a new optimizer, set save_only_model=True."
    raise LoRAFileError(
        f"Training cannot go on from {folder}: the checkpoint is not complete.",
        name=folder.name,
        value=str(folder),
        expected=None if whole is None else str(whole),
        facts=wrong,
        remedy=remedy,
    )


def _from_torch_save(error: BaseException) -> bool:
    """Whether it is what torch.save raises where a file cannot be written: a RuntimeError with any of many texts."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    memory = any(text in str(error) for text in ("out of memory", "allocate memory"))  # auto_find_batch_size's own
    return isinstance(error, RuntimeError) and not memory and any(Path(f).name == "serialization.py" for f in frames)


def _is_usable(model: nn.Module, folder: Path, **options: Any) -> bool:
    try:
        return not faults(model, folder, **options)
    except LoRAMismatchError:  # of another run's adapters: not ours to judge
        return True


def recover(model: nn.Module, run: Path, **options: Any) -> None:
    """Bring back the checkpoints that a killed run had put aside and not replaced."""
    for aside in run.glob(f"{_ASIDE}*"):
        folder = run / aside.name.removeprefix(_ASIDE)
        if not _is_usable(model, folder, **options):
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(aside, folder)
        else:
            shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def writing(model: nn.Module, folder: Path, **options: Any) -> Iterator[None]:
    """While the block writes the checkpoint `folder`, keep what stood there; bring it back if the block fails.

    A second run in the same output_dir writes over the first one's checkpoints. Half new and half old, all files would
    be there and none would fit another.

    Raises:
        LoRAFileError: it cannot be written (full disk, permission); says which checkpoint is the newest one now.
    """
    aside, begun = folder.with_name(_ASIDE + folder.name), False
    try:
        if folder.is_dir():
            if aside.is_dir() and not _is_usable(model, folder, **options):
                shutil.rmtree(folder)  # what a killed run left; the whole one was put aside by it
            else:
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(folder, aside)
        begun = True
        yield
    except BaseException as error:
        if begun and _state_is_whole(folder):  # it was written; what failed came later (a push, say)
            shutil.rmtree(aside, ignore_errors=True)
            raise
        if begun and aside.is_dir():
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(aside, folder)
        if isinstance(error, (OSError, LoRAFileError)) or _from_torch_save(error):
            raise _unwritable(error, model, folder, **options) from error
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _unwritable(error: BaseException, model: nn.Module, folder: Path, **options: Any) -> LoRAFileError:
    whole = _other_to_name(model, folder.parent, **options)
    kept = f"{whole} is complete and unchanged" if whole is not None else "no earlier checkpoint is there"
    why = str(error).splitlines()[0] if str(error) else repr(error)
    return LoRAFileError(
        f"The checkpoint {folder} cannot be written: {why}",
        name=folder.name,
        value=str(folder),
        facts=[kept],
        remedy="Free some space or choose an output_dir that you may write to, then resume.",
    )


@dataclass
class Start:
    """Where a run began: what trains, the optimizer, the generators.

    `auto_find_batch_size` begins again after running out of memory. Stock Trainer then keeps the weights and the
    optimizer of the steps that it has done, and counts from 0.
    """

    trained: dict[str, Tensor]
    parts: dict[str, Any]  # optimizer and scheduler of the caller's: their states; None: Trainer makes them
    generators: tuple[Any, ...]

    @classmethod
    def of(cls, trainer: Any, model: nn.Module) -> Start:
        """What `trainer` and `model` are now."""
        trained = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}
        parts = {name: getattr(trainer, name) for name in ("optimizer", "lr_scheduler")}
        states = {name: None if part is None else copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        return cls(trained, states, _generators())

    def restore(self, trainer: Any, model: nn.Module) -> None:
        """Make them that again, in place."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in self.trained:
                    parameter.copy_(self.trained[name])
                    parameter.grad = None
        for name, state in self.parts.items():
            if state is None:
                setattr(trainer, name, None)
            else:
                getattr(trainer, name).load_state_dict(copy.deepcopy(state))
        _set_generators(self.generators)


def _generators() -> tuple[Any, ...]:
    import numpy as np

    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def _set_generators(states: tuple[Any, ...]) -> None:
    import numpy as np

    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])
