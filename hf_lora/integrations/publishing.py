"""What Trainer pushes for a model with our LoRA: the adapter's files every time, and a card that says it is one.

`Trainer._push_from_checkpoint` copies what it is going to push out of the checkpoint: a whole model's weights, an
adapter's only where peft is installed, and never folders, which is where several adapters lie. The cards of Trainer and
of TRL's trainers say `library_name: transformers`; where a README says peft, Trainer calls a method of PEFT's models.
For a model without our LoRA every method is called through.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from .. import card as cards
from ..bases import hub_id
from ..errors import LoRAError
from ..facts import RunFacts
from ..frontmatter import FrontMatter, split
from ..loading import checkpoint_folders, read_adapter_of
from ..model import require, state_of
from ..quantised import described
from ..sharding import is_sharded
from ..store import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from ..values import AdapterValue
from .importing import when_imported
from .patching import Registry

__all__ = ["install"]

logger = logging.getLogger(__name__)

Method = Callable[..., Any]

_README = "README.md"
# In a README that Trainer wrote and nobody has taken over: the comment asks to remove it when proofread.
_DRAFT = "generated automatically according to the information the Trainer had access to"


def install(registry: Registry) -> None:
    """Wrap the methods once their modules are imported; none is imported here."""
    for name in _WRAPPED:
        when_imported(name, lambda module: _wrap(registry, module))


def _wrap(registry: Registry, module: ModuleType) -> None:
    class_name, wrappers = _WRAPPED[module.__name__]
    trainer = getattr(module, class_name, None)
    for name, wrapper in wrappers.items():
        stock = vars(trainer).get(name) if trainer is not None else None
        if stock is None:  # another release; contract tests say what the tested one has
            logger.warning("%s has no %s.%s. Without it: %s", module.__name__, class_name, name, wrapper.__doc__)
        else:
            registry.set(trainer, name, functools.wraps(stock)(wrapper(stock)))


def _own(trainer: Any) -> Any:
    """The model inside what Trainer holds, if it has our LoRA and this process is the one that pushes."""
    if not trainer.is_world_process_zero():
        return None
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    state = state_of(model)
    return model if state is not None and state.merged is None else None  # a merged model is saved and pushed whole


# ---- between checkpoints and the Hub ---------------------------------------------------------------------------------


def _push_from_checkpoint(stock: Method) -> Method:
    """Pushes while training lack the adapter."""

    def push(self: Any, checkpoint_folder: str) -> Any:
        own = _own(self)
        if own is None or self.args.hub_strategy == "end":
            return stock(self, checkpoint_folder)
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return None  # as stock: this checkpoint is skipped
            self._finish_current_push()  # it reads the files that are about to be replaced
        _copy(own, Path(checkpoint_folder), Path(self.args.output_dir))
        with _secret_token(self.args):  # it saves its arguments once more
            return stock(self, checkpoint_folder)

    return push


def _copy(model: Any, checkpoint: Path, output: Path) -> None:
    """Copy the adapters of a checkpoint to where Trainer pushes from, each file in one step."""
    for folder in checkpoint_folders(model, checkpoint).values():
        target = output / folder.relative_to(checkpoint)
        target.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            if (folder / name).is_file():
                shutil.copy(folder / name, target / f"_{name}.tmp")  # Trainer does not push names that begin so
                os.replace(target / f"_{name}.tmp", target / name)


def _push_to_hub(stock: Method) -> Method:
    """trainer.push_to_hub() writes the adapter anew while a push before it may still read it."""

    def push(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _own(self) is not None:
            self._finish_current_push()  # stock waits too, but only after it has written
        return stock(self, *args, **kwargs)

    return push


def _save(stock: Method) -> Method:
    """training_args.bin, which Trainer pushes, holds the hub_token in clear."""

    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        if state_of(self.accelerator.unwrap_model(self.model, keep_torch_compile=False)) is None:
            return stock(self, *args, **kwargs)
        with _secret_token(self.args):
            return stock(self, *args, **kwargs)

    return save


class _Secret(str):
    """A text that a pickle does not hold: it reads back as an empty one."""

    __slots__ = ()

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, ("",)


@contextlib.contextmanager
def _secret_token(arguments: Any) -> Iterator[None]:
    """Within the block, what is saved of Trainer's arguments lacks the token that they are still used with."""
    token = arguments.hub_token
    if token is not None:
        arguments.hub_token = _Secret(token)
    try:
        yield
    finally:
        arguments.hub_token = token


# ---- the card --------------------------------------------------------------------------------------------------------


def _create_model_card(stock: Method) -> Method:
    """Trainer's card of a LoRA says `library_name: transformers` and nothing of the adapter."""
    signature = inspect.signature(stock)

    def create(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = _own(self)
        if own is None:
            return stock(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        path = Path(self.args.output_dir) / _README
        before = path.read_bytes() if path.is_file() else None
        try:
            old = None if before is None else _neutral(before.decode("utf-8-sig"))
            if old is not None:
                _write(path, old)
            result = stock(self, *args, **kwargs)
            written = path.read_text(encoding="utf-8")
            _write(path, _completed(self, own, old, written, given.get("finetuned_from")))
        except BaseException as error:
            if before is not None:  # somebody's words may stand in it
                path.write_bytes(before)
            if not isinstance(error, (LoRAError, UnicodeDecodeError)) or not getattr(self, "is_in_train", False):
                raise
            logger.warning("The model card %s was not written: %s", path, error)  # no reason to end a training
            return None
        return result

    return create


def _neutral(text: str) -> str:
    """A README for stock Trainer to take up: one that says peft makes it call a method that only PEFT's models have."""
    yaml, body = split(text)
    front = FrontMatter(yaml)
    if front.get("library_name") != "peft":
        return text
    front.set("library_name", "transformers")
    return _joined(front, body)


def _completed(trainer: Any, model: Any, old: str | None, written: str, finetuned_from: str | None) -> str:
    """What Trainer wrote, or what somebody made of it, with the metadata and section of each adapter.

    A README without Trainer's own comment is somebody's text: it stays, and Trainer's metadata fills in what it lacks.
    """
    yaml, body = split(written)
    front = FrontMatter(yaml)
    if old is not None and _DRAFT not in old:
        own_yaml, body = split(old)
        front = FrontMatter(own_yaml).over(front)
    if front.get("library_name") in (None, "transformers"):
        front.set("library_name", "peft")
    text = _joined(front, body)
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    for folder, value, run in _adapters(trainer, model):
        base = finetuned_from or hub_id(value.config.base_model) or hub_id(name)
        if base is None:
            logger.warning(
                "The model card does not name the base model: %r is no id on the Hub, so nobody could find the base of "
                'this adapter. Pass finetuned_from="org/base" to trainer.push_to_hub() or create_model_card().',
                name,
            )
            return text
        text = cards.update(
            text,
            value,
            run=run,
            base_model=base,
            repo_id=trainer.hub_model_id or trainer.args.hub_model_id,
            subfolder=folder,
            architecture=_architecture(model),
            quantised=described(model),
        )
    return text


def _adapters(trainer: Any, model: Any) -> Iterator[tuple[str | None, AdapterValue, RunFacts | None]]:
    """The folder in the repo, the value, and the run of each adapter that Trainer saves."""
    output = Path(trainer.args.output_dir)
    run = RunFacts.from_log(vars(trainer.state)) if trainer.state.global_step else None
    for name, folder in checkpoint_folders(model, output).items():
        where = folder.relative_to(output).as_posix()
        # Of a sharded model only all processes together could gather the values, and this one is alone here.
        value = read_adapter(folder) if is_sharded(model) else read_adapter_of(model, name)
        yield None if where == "." else where, value, require(model).entry(name).record.run or run


def _architecture(model: Any) -> str | None:
    return next((c.__name__ for c in type(model).__mro__ if c.__module__.startswith("transformers.models.")), None)


def _joined(front: FrontMatter, body: str) -> str:
    return f"---\n{front.text()}---\n{body}"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"_{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# module -> its class, and the methods wrapped there. A wrapper's docstring is what is lost without the method.
_WRAPPED: dict[str, tuple[str, dict[str, Callable[[Method], Method]]]] = {
    "transformers.trainer": (
        "Trainer",
        {
            "_push_from_checkpoint": _push_from_checkpoint,
            "push_to_hub": _push_to_hub,
            "_save": _save,
            "create_model_card": _create_model_card,
        },
    ),
    "trl.trainer.base_trainer": ("_BaseTrainer", {"create_model_card": _create_model_card}),
}
