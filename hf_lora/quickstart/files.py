"""Writing so that an interruption leaves the old file or the new one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..scratch import beside

__all__ = ["folder_bytes", "read_json", "write_json"]


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON: to a temporary file beside `path`, flushed to the disk, then renamed."""
    with beside(path) as temporary:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def folder_bytes(folder: Path) -> int:
    """The size of all files under `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
