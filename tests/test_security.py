"""docs/SECURITY.md: every promise names tests, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "SECURITY.md"


def rows() -> list[tuple[str, list[str]]]:
    """The promises, and the tests named beside each."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| promise"):
            promise, held = (part.strip() for part in line.strip("| ").split(" | "))
            found.append((promise, re.findall(r"`([^`]+)`", held)))
    return found


def defined(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def test_every_promise_names_a_test() -> None:
    assert len(rows()) > 20
    assert [promise for promise, held in rows() if not held] == []
    assert all(re.fullmatch(r"tests/test_\w+\.py::test_\w+", name) for _, held in rows() for name in held)


def test_every_test_that_is_named_exists() -> None:
    named = {tuple(name.split("::")) for _, held in rows() for name in held}
    missing = [f"{file}::{test}" for file, test in sorted(named) if test not in defined(file)]
    assert not missing


def test_it_is_linked() -> None:
    assert "docs/SECURITY.md" in (ROOT / "README.md").read_text(encoding="utf-8")
