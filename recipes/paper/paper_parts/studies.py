"""From an experiment's YAML to its page: run what is missing, then write table and figure."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_lora.quickstart.run import quiet

from . import costs, latency, learned, pages
from .grid import Grid
from .sweep import Records
from .tasks import Profile

__all__ = ["carry_out"]


def carry_out(
    name: str,
    experiment: Mapping[str, Any],
    profile: Profile,
    records: Records,
    out: Path,
    *,
    command: str,
    run: bool = True,
    **chosen: Any,
) -> dict[str, Any]:
    """Run an experiment and write its files. Returns its results."""
    study = _KINDS[experiment.get("kind", "grid")]
    with quiet():
        results = study(experiment, profile, records, out, run=run, **chosen)
    results = {
        "experiment": name,
        "title": experiment["title"],
        "profile": profile.name,
        "command": command,
        "kind": experiment.get("kind", "grid"),
        **results,
    }
    out.mkdir(parents=True, exist_ok=True)
    figure = pages.figure(experiment, results, out / f"{name}.svg")
    _write(out / f"{name}.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    _write(out / f"{name}.md", pages.page(experiment, results, f"{name}.svg" if figure else None))
    return results


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _grid(
    experiment: Mapping[str, Any], profile: Profile, records: Records, out: Path, *, run: bool, **chosen: Any
) -> dict[str, Any]:
    grid = Grid(experiment, profile, records, **chosen)
    if run:
        cells = list(grid.cells())
        with Progress(len(cells)) as (begin, step):
            for cell in cells:
                begin(cell.title)
                grid.run(cell, step)
    return grid.results()


class Progress:
    """Two bars: all runs, and the steps of this one. On a pipe, a line for each run."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self.total = total
        self.console = Console(stderr=True)
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.done = -1

    def __enter__(self) -> tuple[Callable[[str], None], Callable[[int, int], None]]:
        self.bars.start()
        self.all = self.bars.add_task("runs", total=self.total)
        self.one = self.bars.add_task("", total=None)
        return self.begin, self.step

    def begin(self, title: str) -> None:
        self.done += 1
        self.bars.update(self.all, completed=self.done)
        self.bars.reset(self.one, description=title, total=None)
        if not self.console.is_terminal:
            self.console.print(f"[{self.done + 1}/{self.total}] {title}", markup=False, highlight=False)

    def step(self, done: int, total: int) -> None:
        self.bars.update(self.one, completed=done, total=total)

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self.bars.update(self.all, completed=self.total)
        self.bars.stop()


_KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "grid": _grid,
    "compared": _grid,
    "latency": latency.measure,
    "costs": costs.measure,
    "similarity": functools.partial(learned.similarity, show=Progress),
    "amplification": functools.partial(learned.amplification, show=Progress),
}
