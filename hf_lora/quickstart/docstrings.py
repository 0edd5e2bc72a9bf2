"""The default task's data: the one-line docstring of a Python function, from the standard library on this machine.

Nothing is imported or executed: every file is read as text and parsed. Whole modules are held out, so that no
function of a held-out module is ever trained on.
"""

from __future__ import annotations

import ast
import inspect
import random
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .data import Example, TaskData
from .problems import DataError

__all__ = [
    "Function",
    "collect",
    "docstring_task",
    "documented_functions",
    "module_of",
    "stdlib_folder",
    "words_of_name",
]

# Folders without library code of their own: tests, a GUI's insides, tables, bundled third-party packages.
_SKIPPED = frozenset(
    [
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "idlelib",
        "lib2to3",
        "site-packages",
        "dist-packages",
        "ensurepip",
        "turtledemo",
        "pydoc_data",
        "encodings",
        "msilib",
        "lib-dynload",
        "__phello__",
    ]
)
_WORDS = (3, 16)  # a docstring shorter than this says nothing, a longer one does not fit a line
_BODY_CHARS = 2000  # longer functions say more than the prompt can hold
_PER_MODULE = 4  # held-out functions of one module, so that no single module decides the result
_ENOUGH = 64  # fewer training functions than this teach nothing


@dataclass(frozen=True)
class Function:
    """One documented function: where it stands, its source without docstrings, and the docstring's first line."""

    module: str
    name: str
    source: str
    summary: str


def stdlib_folder() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def module_of(path: Path, root: Path) -> str:
    """The top-level module a file belongs to; `_pydecimal.py` and `_decimal` count as `decimal`, its twin."""
    top = path.relative_to(root).parts[0].removesuffix(".py")
    return re.sub(r"^_(py(?=[a-z]))?", "", top) or top


def collect(root: Path | None = None) -> list[Function]:
    """Every function under `root` (default: the standard library) with a usable one-line docstring, without repeats.

    Two functions never share their source or their summary: a copy in another module cannot leak across the split.
    """
    root = stdlib_folder() if root is None else root
    seen_sources: set[str] = set()
    seen_summaries: set[str] = set()
    functions = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(p in _SKIPPED or p.startswith("config-") for p in parts) or parts[-1].startswith("_sysconfigdata"):
            continue
        for function in documented_functions(_read(path), module_of(path, root)):
            source, summary = _bare(function.source), _bare(function.summary)
            if source in seen_sources or summary in seen_summaries:
                continue
            seen_sources.add(source)
            seen_summaries.add(summary)
            functions.append(function)
    return functions


def documented_functions(text: str, module: str) -> Iterator[Function]:
    """The functions and methods of one file's text, in order; a file that does not parse has none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old library code
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        summary = _summary(node)
        if summary is None or _is_stub(node) or (node.name.startswith("__") and node.name.endswith("__")):
            continue
        source = ast.unparse(_without_docstrings(node))
        if len(source) <= _BODY_CHARS:
            yield Function(module, node.name, source, summary)


def docstring_task(*, seed: int = 0, train: int = 640, heldout: int = 96, root: Path | None = None) -> TaskData:
    """The task from the functions of `root`: up to `train` examples to learn from, `heldout` from other modules."""
    functions = collect(root)
    by_module: dict[str, list[Function]] = {}
    for function in functions:
        by_module.setdefault(function.module, []).append(function)
    rng = random.Random(f"hf_lora docstrings {seed}")
    order = sorted(by_module)
    rng.shuffle(order)
    # At most a quarter of the functions may leave for the evaluation.
    wanted = min(heldout, len(functions) // 4)
    measured: list[Function] = []
    held_modules: list[str] = []
    for module in order:
        if len(measured) >= wanted:
            break
        if len(by_module[module]) > len(functions) // 10:
            continue  # holding out one of the largest modules would cost the training more than it tells
        chosen = rng.sample(by_module[module], min(_PER_MODULE, len(by_module[module])))
        measured += chosen[: wanted - len(measured)]
        held_modules.append(module)
    held = set(held_modules)
    learned = [function for function in functions if function.module not in held]
    rng.shuffle(learned)
    learned = learned[:train]
    if len(learned) < _ENOUGH or not measured:
        raise DataError(
            f"{root or stdlib_folder()} holds {len(functions)} functions with a one-line docstring; "
            f"at least {_ENOUGH + _ENOUGH // 3} are needed.",
            name="standard library",
            value=len(functions),
            remedy="This Python ships its library without sources. Use another Python, or `--task e2e --data FOLDER`.",
        )
    return TaskData(
        name="docstrings",
        title="one-line docstrings of Python functions",
        question="In one short sentence, what does this Python function do?",
        unit="module",
        train=tuple(_example(f) for f in learned),
        heldout=tuple(_example(f) for f in measured),
        facts=(
            f"{len(functions)} documented functions of this Python's standard library, parsed, never executed",
            f"held out: {len(measured)} functions of {len(held)} whole modules ({_some(sorted(held))})",
        ),
        copying="the function's name in words",
        prompt_tokens=64,
        answer_tokens=24,
    )


def words_of_name(name: str) -> str:
    """`getFileName` and `get_file_name` → "Get file name.": what the name alone gives away."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name) or [name]
    return " ".join(words).capitalize() + "."


def _example(function: Function) -> Example:
    return Example(
        prompt=function.source,
        target=function.summary,
        references=(function.summary,),
        group=function.module,
        copied=words_of_name(function.name),
    )


def _read(path: Path) -> str:
    try:
        with tokenize.open(path) as file:  # honours the file's own encoding line
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return ""


def _summary(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str | None:
    """The docstring's first line where it is a sentence of its own (PEP 257), else None."""
    docstring = ast.get_docstring(node, clean=False)
    if not docstring:
        return None
    lines = inspect.cleandoc(docstring).splitlines()
    summary = lines[0].strip() if lines else ""
    continues = len(lines) > 1 and lines[1].strip() != ""
    if continues or not summary.isascii() or not _WORDS[0] <= len(summary.split()) <= _WORDS[1]:
        return None
    if re.match(r"\W*[\w.]+\(", summary) or ">>>" in summary or summary.endswith(":"):
        return None  # a signature, an example, the head of a list
    return summary


def _is_stub(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Nothing behind the docstring but `pass`, `...` or `raise`: the name would be all there is to go by."""
    return all(
        isinstance(statement, ast.Pass | ast.Raise)
        or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in node.body[1:]
    )


class _Strip(ast.NodeTransformer):
    """Removes every docstring, nested ones too: none of them may give the answer away."""

    def _strip(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _strip


def _without_docstrings(node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
    copy = ast.parse(ast.unparse(node)).body[0]  # a copy: `ast.walk` is still on its way through the original
    stripped: ast.AST = _Strip().visit(copy)
    return stripped


def _bare(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().lower()


def _some(names: list[str], shown: int = 6) -> str:
    return ", ".join(names[:shown]) + (", …" if len(names) > shown else "")
