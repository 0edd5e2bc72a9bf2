"""Rows in a process of their own, which is started again when one crashes, hangs or eats too much."""

from __future__ import annotations

import json
import os
import resource
import selectors
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Pool", "row", "work"]

SECONDS, MEMORY, ROWS = 60, 8 << 30, 150  # of a row, of a process; rows of a process
Row = dict[str, Any]


def row(model_type: str, columns: Sequence[str], tell: bool = False) -> Row:
    """A model_type's row: what was built, or why it was not, and its cells."""

    from .build import CannotBuild, build
    from .chain import chain

    began = time.perf_counter()
    found: Row = {"model_type": model_type}
    try:
        built = build(model_type, (lambda line, error: print(line)) if tell else None)
    except CannotBuild as error:
        return {**found, "not_built": error.args[0]}
    found |= {
        "class": type(built.model).__name__,
        "way": built.way,
        "parameters": sum(p.numel() for p in built.model.parameters()),
        "given": sorted(built.given),
    }
    for column in columns:
        found[column] = chain(built, column)
    return {**found, "seconds": round(time.perf_counter() - began, 2)}


class Pool:
    """One long-lived process that makes rows."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = columns
        self.process: subprocess.Popen[str] | None = None
        self.made = 0

    def rows(self, model_types: Sequence[str]) -> Iterator[Row]:
        """Their rows, in order."""
        try:
            for name in model_types:
                yield self.one(name)
        finally:
            self.stop()

    def one(self, name: str) -> Row:
        """A row, or what became of the process that was to make it."""
        if self.process is None or self.made >= ROWS:
            self.start()
        process = self.process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([name, list(self.columns)]) + "\n")
        process.stdin.flush()
        self.made += 1
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            ready = selector.select(SECONDS)
        line = process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        self.stop()
        why = f"it took more than {SECONDS} seconds" if not ready else f"its process ended ({process.returncode})"
        return {"model_type": name, "not_built": why}

    def start(self) -> None:
        self.stop()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "architectures.py"), "--work"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.made = 0

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.process = None


def work() -> None:
    """Read names of model_types, write rows."""
    import logging

    import torch

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a model prints is no row
    for line in sys.stdin:
        try:
            found = row(*json.loads(line))
        except Exception as error:  # noqa: BLE001  # a row says what came of it
            found = {"model_type": json.loads(line)[0], "not_built": f"{type(error).__name__}: {str(error)[:200]}"}
        answers.write(json.dumps(found, ensure_ascii=False) + "\n")
        answers.flush()
