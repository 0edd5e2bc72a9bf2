"""The adapters that a demo has: those it ships, and those that a visitor loaded from the Hub for themselves."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import hub
from ..bases import is_hub_id
from ..errors import LoRAError
from ..fitting import make_plan
from ..loading import require_same_base
from ..pool.sources import Source
from ..values import AdapterValue
from .problems import DemoError
from .settings import Settings
from .tasks import FREE, Task, read_task

__all__ = ["Adapter", "Library", "adapters_in"]

_MOST_CARD = 2**18


@dataclass(frozen=True)
class Adapter:
    """One adapter of the demo.

    Args:
        key: what the engine knows it by: its folder's name, or "user/name@commit".
        name: for the reader.
        folder: where its files are.
        task: its form.
        rank: the largest. nbytes: of its tensors. parameters: numbers in them.
        commit: on the Hub; None for one that the demo ships.
    """

    key: str
    name: str
    folder: Path
    task: Task
    rank: int
    nbytes: int
    parameters: int
    commit: str | None = None

    @property
    def title(self) -> str:
        """The task's, or the adapter's name where it has no task of its own."""
        return self.name if self.task is FREE else self.task.title

    def card(self) -> str:
        """Its README.md without the front matter; "" if there is none."""
        try:
            with (self.folder / hub.CARD_NAME).open("rb") as file:
                text = file.read(_MOST_CARD).decode("utf-8", "replace")
        except OSError:
            return ""
        if text.startswith("---"):
            _, found, rest = text[3:].partition("\n---")
            text = rest if found else text
        return text.strip()


class Library:
    """Adapters by key, and who may use which.

    Args:
        model: the base; only looked at.
        folder: each folder in it that holds an adapter is shipped; None ships none.
        options: of the Hub: cache_dir, local_files_only.

    Raises:
        LoRAError: a shipped adapter is broken or of another base; it says which. DemoError: the folder holds none.
    """

    def __init__(self, model: Any, folder: Path | None, settings: Settings, **options: Any) -> None:
        self.model, self.settings, self._options = model, settings, options
        self.places: dict[str, Path] = {}  # what the engine reads
        self.shipped: dict[str, Adapter] = {}
        self._found: dict[str, Adapter] = {}  # of the Hub, by key
        self._visitors: dict[str, dict[str, Adapter]] = {}  # visitor → name → adapter
        self._lock = threading.Lock()
        found = adapters_in(folder) if folder is not None else []
        adapters = [self._look(path.name, path.name, path, shipped=True) for path in found]
        for adapter in sorted(adapters, key=lambda each: (each.task is FREE, each.key)):  # forms first
            self.shipped[adapter.key] = adapter
            self.places[adapter.key] = adapter.folder

    def of(self, visitor: str) -> dict[str, Adapter]:
        """Name → adapter, of all that this visitor may use: the shipped ones first."""
        with self._lock:
            return {**self.shipped, **self._visitors.get(visitor, {})}

    def get(self, visitor: str, name: str) -> Adapter:
        """One of them. Raises `DemoError`."""
        found = self.of(visitor)
        if name not in found:
            raise DemoError(f"There is no adapter {str(name)[:100]!r} here. There are: {', '.join(found)}.")
        return found[name]

    def load(self, visitor: str, repo_id: str) -> Adapter:
        """Fetch an adapter from the Hub for this visitor: public, safetensors, of this base, not too large.

        Raises:
            DemoError, LoRAError: why not. Nothing changed then.
        """
        repo_id = repo_id.strip()
        if not is_hub_id(repo_id) or "/" not in repo_id:
            raise DemoError(f"{repo_id[:100]!r} is not the id of a repo. An id looks like user/name.")
        with self._lock:
            mine = self._visitors.get(visitor, {})
            if len(mine) >= self.settings.adapters_per_visitor and repo_id not in mine:
                raise DemoError(f"You have loaded {len(mine)} adapters. Remove one of them first.")
        # token=False: what only the demo's owner can see is not for its visitors.
        size = hub.weights_size(repo_id, token=False, **self._options)
        if size is not None and size > self.settings.adapter_bytes + 2**20:
            raise self._too_large(repo_id, size)
        folder = hub.fetch(repo_id, token=False, **self._options)
        commit = folder.name
        with contextlib.suppress(LoRAError):  # it is for reading only
            hub.fetch_card(repo_id, revision=commit, token=False, most=_MOST_CARD, **self._options)
        key = f"{repo_id}@{commit}"
        with self._lock:
            known = self._found.get(key)
        adapter = known or self._look(key, repo_id, folder, shipped=False, commit=commit)
        with self._lock:
            self._found[key], self.places[key] = adapter, folder
            self._visitors.setdefault(visitor, {})[repo_id] = adapter
            self._forget_unused()
        return adapter

    def remove(self, visitor: str, name: str) -> None:
        """Take away what this visitor loaded. Raises `DemoError` for one that the demo ships."""
        with self._lock:
            mine = self._visitors.get(visitor, {})
            if name not in mine:
                what = "comes with this demo and stays" if name in self.shipped else "is not loaded"
                raise DemoError(f"{str(name)[:100]!r} {what}.")
            del mine[name]
            self._forget_unused()

    def leave(self, visitor: str) -> None:
        """The visitor is gone."""
        with self._lock:
            self._visitors.pop(visitor, None)
            self._forget_unused()

    def value(self, adapter: Adapter) -> AdapterValue:
        """The adapter's tensors, read and checked."""
        limits = Source({adapter.key: adapter.folder}, **self._limits, allow_pickle=False, options={})
        return limits.read(adapter.key)[0]

    def _forget_unused(self) -> None:
        used = {adapter.key for mine in self._visitors.values() for adapter in mine.values()}
        for key in [key for key in self._found if key not in used]:
            del self._found[key]
            self.places.pop(key, None)

    @property
    def _limits(self) -> dict[str, int]:
        return {"max_rank": self.settings.adapter_rank, "max_bytes": self.settings.adapter_bytes}

    def _too_large(self, name: str, size: int) -> DemoError:
        most = self.settings.adapter_bytes
        return DemoError(f"{name} has {size / 1e6:,.0f} MB; at most {most / 1e6:,.0f} MB are loaded here.")

    def _look(self, key: str, name: str, folder: Path, *, shipped: bool, commit: str | None = None) -> Adapter:
        """Read an adapter and see that it is one of this base."""
        limits: Mapping[str, int | None] = {"max_rank": None, "max_bytes": None} if shipped else self._limits
        value, _ = Source({key: folder}, **limits, allow_pickle=False, options={}).read(key)
        require_same_base(self.model, value)
        make_plan(self.model, value, None, complete=True)
        try:
            task = read_task(folder) if shipped else None  # a stranger's form would be a stranger's words on our page
        except LoRAError as error:
            raise DemoError(f"{name}: {error.message}", remedy=error.remedy) from error
        return Adapter(
            key,
            name,
            folder,
            task or FREE,
            max(factors.rank for factors in value.factors.values()),
            value.nbytes,
            sum(f.A.numel() + f.B.numel() for f in value.factors.values()),
            commit,
        )


def adapters_in(folder: Path) -> list[Path]:
    """The folders in it that hold an adapter. Raises `DemoError` if there are none."""
    if not folder.is_dir():
        raise DemoError(f"{str(folder)!r} is no folder.", name="adapters", value=str(folder))
    found = sorted(path for path in folder.iterdir() if (path / "adapter_config.json").is_file())
    if not found:
        raise DemoError(
            f"{str(folder)!r} holds no adapters.",
            name="adapters",
            value=str(folder),
            expected="folders, each with adapter_config.json and adapter_model.safetensors",
            remedy="Give the folder that holds the adapters' folders; `hf-lora pull` makes one of a repo.",
        )
    return found
