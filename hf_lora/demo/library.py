"""The adapters that a demo has: those it ships, and those that a visitor loaded from the Hub for themselves."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import hub, store
from ..bases import is_hub_id
from ..errors import LoRAError
from ..fitting import make_plan
from ..hub_errors import strange_answer, translated
from ..inspection import AdapterInfo, inspect
from ..loading import require_same_base
from ..pool.sources import Source
from .problems import DemoError
from .settings import Settings
from .tasks import FREE, Task, read_task

__all__ = ["Adapter", "Library", "adapters_in"]

_MOST_CARD = 2**18
_HEADERS = 2**20  # bytes of a config, and of what a weights' file has beside its tensors


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
        cache: where files from the Hub go; None makes a folder that is deleted with this. Never the user's own cache,
            which may hold what only they may see.

    Attributes:
        forgotten: is told the key of an adapter that nobody may name any more.

    Raises:
        LoRAError: a shipped adapter is broken or of another base; it says which. DemoError: the folder holds none.
    """

    def __init__(self, model: Any, folder: Path | None, settings: Settings, cache: Path | None = None) -> None:
        self.model, self.settings = model, settings
        self._own_cache = None if cache is not None else tempfile.TemporaryDirectory(prefix="hf-lora-demo-")
        self.cache = cache or Path(self._own_cache.name if self._own_cache else "")
        self.forgotten: Callable[[str], None] = lambda key: None
        self.places: dict[str, Path] = {}  # what the engine reads
        self.shipped: dict[str, Adapter] = {}
        self._found: dict[str, Adapter] = {}  # of the Hub, by key
        self._visitors: OrderedDict[str, dict[str, Adapter]] = OrderedDict()  # visitor → name → adapter
        self._loading: dict[str, object] = {}  # visitor → the load that is under way
        self._infos: dict[str, AdapterInfo] = {}
        self._lock = threading.Lock()
        found = adapters_in(folder) if folder is not None else []
        adapters = [self._look(path.name, path.name, path, shipped=True) for path in found]
        for adapter in sorted(adapters, key=_order):
            self.shipped[adapter.key] = adapter
            self.places[adapter.key] = adapter.folder

    def of(self, visitor: str) -> dict[str, Adapter]:
        """Name → adapter, of all that this visitor may use: the shipped ones first."""
        with self._lock:
            return {**self.shipped, **self._visitors.get(visitor, {})}

    def get(self, visitor: str, name: str) -> Adapter:
        """One of them. Raises `DemoError`."""
        found = self.of(visitor)
        adapter = found.get(name) if isinstance(name, str) else None
        if adapter is None:
            raise DemoError(f"There is no adapter {str(name)[:100]!r} here. There are: {', '.join(found)}.")
        return adapter

    def info(self, adapter: Adapter) -> AdapterInfo:
        """What its files say, and its spectrum; computed once."""
        found = self._infos.get(adapter.key)
        if found is None:
            found = self._infos[adapter.key] = inspect(adapter.folder)
        return found

    # ---- from the Hub ------------------------------------------------------------------------------------------------

    def load(self, visitor: str, repo_id: str) -> Adapter:
        """Fetch an adapter from the Hub for this visitor: public, safetensors, of this base, not too large.

        Raises:
            DemoError, LoRAError: why not. Nothing changed then.
        """
        repo_id = repo_id.strip() if isinstance(repo_id, str) else ""
        if not is_hub_id(repo_id) or "/" not in repo_id:
            raise DemoError(f"{repo_id[:100]!r} is not the id of a repo. An id looks like user/name.")
        this = object()
        with self._lock:
            mine = self._visitors.get(visitor, {})
            if visitor in self._loading:
                raise DemoError("You are loading an adapter already. Wait for it.")
            if len(mine) >= self.settings.adapters_per_visitor and repo_id not in mine:
                raise DemoError(f"You have loaded {len(mine)} adapters. Remove one of them first.")
            self._loading[visitor] = this
        try:
            adapter = self._fetched(repo_id)
            with self._lock:
                if self._loading.get(visitor) is not this:
                    raise DemoError("The page was closed meanwhile.")
                self._found[adapter.key], self.places[adapter.key] = adapter, adapter.folder
                self._visitors.setdefault(visitor, {})[repo_id] = adapter
                self._visitors.move_to_end(visitor)
                while len(self._visitors) > self.settings.visitors:
                    self._visitors.popitem(last=False)
            return adapter
        finally:
            with self._lock:
                if self._loading.get(visitor) is this:
                    del self._loading[visitor]
            self._forget_unused()

    def _fetched(self, repo_id: str) -> Adapter:
        """Everything is asked for without a token: what only the demo's owner may see is not for its visitors."""
        commit, sizes = _at(repo_id)
        largest = {store.WEIGHTS_NAME: self.settings.adapter_bytes + _HEADERS, store.CONFIG_NAME: _HEADERS}
        for name, most in largest.items():
            if sizes.get(name, 0) > most:
                has, may = f"{sizes[name] / 1e6:,.0f} MB", f"{most / 1e6:,.0f} MB"
                raise DemoError(f"{name} of {repo_id} has {has}; at most {may} are loaded here.")
        key = f"{repo_id}@{commit}"
        with self._lock:
            known = self._found.get(key)
        if known is not None:
            return known
        options: dict[str, Any] = {"revision": commit, "token": False, "cache_dir": self.cache}
        folder = hub.fetch(repo_id, **options)
        if 0 < sizes.get(hub.CARD_NAME, 0) <= _MOST_CARD:
            with contextlib.suppress(LoRAError):  # it is for reading only
                hub.fetch_card(repo_id, most=_MOST_CARD, **options)
        return self._look(key, repo_id, folder, shipped=False, commit=commit)

    def remove(self, visitor: str, name: str) -> None:
        """Take away what this visitor loaded. Raises `DemoError` for one that the demo ships."""
        with self._lock:
            mine = self._visitors.get(visitor, {})
            if not isinstance(name, str) or name not in mine:
                what = "comes with this demo and stays" if name in self.shipped else "is not loaded"
                raise DemoError(f"{str(name)[:100]!r} {what}.")
            del mine[name]
        self._forget_unused()

    def leave(self, visitor: str) -> None:
        """The visitor is gone, and so is what they were loading."""
        with self._lock:
            self._visitors.pop(visitor, None)
            self._loading.pop(visitor, None)
        self._forget_unused()

    def _forget_unused(self) -> None:
        """Free what nobody may name: its slot, its memory, and its files."""
        with self._lock:
            self._visitors = OrderedDict((visitor, mine) for visitor, mine in self._visitors.items() if mine)
            used = {adapter.key for mine in self._visitors.values() for adapter in mine.values()}
            gone = [adapter for key, adapter in self._found.items() if key not in used]
            for adapter in gone:
                del self._found[adapter.key]
                self.places.pop(adapter.key, None)
                self._infos.pop(adapter.key, None)
            idle = not self._loading
            repos = {_cached(adapter.name) for adapter in self._found.values()}
        for adapter in gone:
            self.forgotten(adapter.key)
        if idle:  # also what was fetched and refused
            for path in self.cache.glob("models--*"):
                if path.name not in repos:
                    shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Delete what was fetched."""
        if self._own_cache is not None:
            self._own_cache.cleanup()

    def _look(self, key: str, name: str, folder: Path, *, shipped: bool, commit: str | None = None) -> Adapter:
        """Read an adapter and see that it is one of this base."""
        limits: Mapping[str, int | None] = {
            "max_rank": None if shipped else self.settings.adapter_rank,
            "max_bytes": None if shipped else self.settings.adapter_bytes,
        }
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


def _at(repo_id: str) -> tuple[str, dict[str, int]]:
    """The commit of a public repo's main, and the sizes of its files in it. Raises `LoRAHubError`, `DemoError`."""
    from huggingface_hub import HfApi

    with translated(repo_id, token=False):
        info = HfApi(token=False).model_info(repo_id, files_metadata=True)
    if info.gated or info.private or info.sha is None:
        raise DemoError(f"{repo_id} is gated, so it cannot be loaded here.")
    sizes = [(sibling.rfilename, sibling.size or 0) for sibling in info.siblings or ()]
    commit = isinstance(info.sha, str) and re.fullmatch(r"[0-9a-f]{40}", info.sha) is not None
    if not commit or not all(isinstance(name, str) and type(size) is int and size >= 0 for name, size in sizes):
        raise strange_answer(repo_id, f"the commit {info.sha!r} with files {sizes!r}")
    return info.sha, dict(sizes)


def _cached(repo_id: str) -> str:
    """Its folder's name in a cache of the Hub's files."""
    return "models--" + repo_id.replace("/", "--")


def _order(adapter: Adapter) -> tuple[int, str]:
    """Those with a form of their own first, and of them those with most to fill in."""
    return (-len(adapter.task.fields) if adapter.task is not FREE else 0, adapter.key)


def adapters_in(folder: Path) -> list[Path]:
    """The folders in it that hold an adapter. Raises `DemoError` if there are none."""
    if not os.path.isdir(folder):
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
