"""Runs as records, one JSON line each: what is there is not run again, and a killed sweep goes on where it was.

A record's key is a digest of everything that its numbers depend on. A changed setting gives another key, so old records
are never taken for new ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Records", "key_of"]

_FORMAT = 3


def key_of(settings: Mapping[str, Any]) -> str:
    """The digest of a run's settings."""
    text = json.dumps({"format": _FORMAT, **settings}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Records:
    """The records of a file, by key. A line that a kill tore is cut off; a damaged line elsewhere is refused."""

    path: Path
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole, _, torn = content.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                record = json.loads(line)
                self.found[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(f"{self.path}, line {number} is no record ({error}). Mend or remove it.") from error
        if torn:
            with self.path.open("rb+") as stream:
                stream.truncate(len(content) - len(torn))

    def __contains__(self, key: str) -> bool:
        return key in self.found

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.found[key]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.found.values())

    def get(self, key: str) -> dict[str, Any] | None:
        """The record, if it is there."""
        return self.found.get(key)

    def add(self, key: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Write a record; when this returns it is on the disk."""
        record = {"key": key, **content}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as stream:
            stream.write(json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.found[key] = record
        return record
