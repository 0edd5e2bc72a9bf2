"""Regular expressions that come from a file, matched against module names under a hard limit.

A pattern whose worst case is provably small runs in this process. Any other (nested repeats, long runs of `.*`,
back-references) runs in a child interpreter that is killed when its time is up, because Python's `re` holds the GIL
and cannot be interrupted from another thread.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import LoRAConfigError

__all__ = ["compile_pattern", "fullmatching", "is_literal", "suffix_regex_lookup"]

_LONGEST_PATTERN = 10_000  # characters; the longest pattern found in a public adapter has about 600
_LONGEST_NAME = 1_000  # characters
_STEPS = 20_000_000  # worst-case backtracking steps, all names together, that may run in this process (0.3 s)
_SECONDS = 5.0  # time limit of the child process
_MOST_KEYS = 2_000  # different regular expressions in one pattern map
_SHOWN = 200  # characters of a pattern that an error quotes

_CHILD = (
    "import json,re,sys,warnings\n"
    "warnings.simplefilter('ignore')\n"
    "patterns,names=json.load(sys.stdin)\n"
    "json.dump([[bool(re.fullmatch(p,n)) for n in names] for p in patterns],sys.stdout)"
)


def _quote(pattern: str) -> str:
    return repr(pattern if len(pattern) <= _SHOWN else pattern[:_SHOWN] + "…")


def compile_pattern(pattern: str, *, field: str = "target_modules") -> re.Pattern[str]:
    """Compile `pattern`, or raise `LoRAConfigError` that quotes it and says what is wrong with it."""
    if len(pattern) > _LONGEST_PATTERN:
        raise LoRAConfigError(
            f"{field} is a regular expression of {len(pattern)} characters; at most {_LONGEST_PATTERN} are accepted.",
            name=field,
            value=pattern[:_SHOWN],
            expected=f"at most {_LONGEST_PATTERN} characters",
            remedy="List the module names instead.",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FutureWarning on '[[': the pattern is the file's, not the caller's
            return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise LoRAConfigError(
            f"{field}={_quote(pattern)} is not a regular expression: {error}.",
            name=field,
            value=pattern,
            expected="a regular expression that Python's re accepts, or a list of module names",
            remedy="Correct the expression, or give the module names as a list.",
        ) from error


def fullmatching(pattern: str, names: Iterable[str], *, field: str = "target_modules") -> list[str]:
    """Return those of `names`, in their order, that `pattern` matches from end to end (`re.fullmatch`).

    Raises:
        LoRAConfigError: the pattern does not compile, is too long, or did not finish within its time limit.
    """
    names = list(names)
    return [name for name, found in zip(names, _match([pattern], names, field)[0], strict=True) if found]


def suffix_regex_lookup(keys: Sequence[str], paths: Iterable[str], *, field: str = "rank_pattern") -> dict[str, str]:
    r"""Map each of `paths` to the first of `keys` that matches it, as PEFT does: `re.match(rf"(.*\.)?({key})$", path)`.

    A path that no key matches is left out. `$` also accepts a newline at the end in PEFT; module names have none.

    Raises:
        LoRAConfigError: a key does not compile, is too long, or did not finish within its time limit.
    """
    keys, paths = tuple(keys), list(paths)
    table = _table(keys, field)
    regexes = [rf"(.*\.)?({keys[index]})" for index in table.others]
    matches = _match(regexes, paths, field) if regexes else []
    found: dict[str, str] = {}
    for column, path in enumerate(paths):
        hits = [index for row, index in enumerate(table.others) if matches[row][column]]
        if path in table.whole:
            hits.append(table.whole[path])
        start = 0
        while True:
            tail = path[start:]
            for holes, texts in table.ends.get(len(tail), ()):
                hit = texts.get(_masked(tail, holes))
                if hit is not None:
                    hits.append(hit)
            start = path.find(".", start) + 1
            if not start:
                break
        if hits:
            found[path] = keys[min(hits)]
    return found


@dataclass(frozen=True)
class _Table:
    """Keys of a pattern map, sorted by how they are looked up; the numbers are places in the map, the first wins."""

    whole: dict[str, int]  # "^literal": the whole path
    ends: dict[int, list[tuple[tuple[int, ...], dict[str, int]]]]  # length -> (places of a bare ".", masked text -> …)
    others: list[int]  # matched as regular expressions


@functools.lru_cache(maxsize=64)
def _table(keys: tuple[str, ...], field: str) -> _Table:
    whole: dict[str, int] = {}
    ends: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
    others: list[int] = []
    for index, key in enumerate(keys):
        text, holes = _literal(key.removeprefix("^"))
        if text is None or (holes and key.startswith("^")):
            others.append(index)
        elif key.startswith("^"):
            whole.setdefault(text, index)
        else:
            ends.setdefault((len(text), holes), {}).setdefault(_masked(text, holes), index)
    if len(others) > _MOST_KEYS or len(ends) > _MOST_KEYS:
        raise LoRAConfigError(
            f"{field} has {len(keys)} keys, {max(len(others), len(ends))} of them different regular expressions; at "
            f"most {_MOST_KEYS} are accepted.",
            name=field,
            value=len(keys),
            remedy=r"Write literal module paths with escaped dots: '^model\.layers\.0\.q_proj'.",
        )
    by_length: dict[int, list[tuple[tuple[int, ...], dict[str, int]]]] = {}
    for (length, holes), texts in ends.items():
        by_length.setdefault(length, []).append((holes, texts))
    return _Table(whole, by_length, others)


def is_literal(pattern: str) -> bool:
    r"""Whether a pattern is only word characters, dots and escaped punctuation, so that it needs no compiling."""
    return _literal(pattern.removeprefix("^"))[0] is not None


def _literal(pattern: str) -> tuple[str | None, tuple[int, ...]]:
    r"""The text of a pattern of word characters, dots and escaped punctuation (`\.`), and where its bare dots stand.

    A bare dot matches any character. Anything else: (None, ()).
    """
    if re.fullmatch(r"(?:[\w.\-]|\\[^\w\s])+", pattern, re.ASCII) is None:
        return None, ()
    pieces = re.findall(r"\\?.", pattern)
    return "".join(piece[-1] for piece in pieces), tuple(i for i, piece in enumerate(pieces) if piece == ".")


def _masked(text: str, holes: tuple[int, ...]) -> str:
    if not holes:
        return text
    letters = list(text)
    for hole in holes:
        letters[hole] = "\0"
    return "".join(letters)


def _match(patterns: Sequence[str], names: list[str], field: str) -> list[list[bool]]:
    for name in names:
        if len(name) > _LONGEST_NAME:
            raise LoRAConfigError(
                f"The module name {name[:80]!r}… has {len(name)} characters; at most {_LONGEST_NAME} are matched.",
                name=field,
                value=name,
            )
    compiled = [compile_pattern(pattern, field=field) for pattern in patterns]
    longest = max(map(len, names), default=0)
    if sum(_choices(_parse(pattern), longest) for pattern in patterns) * len(names) * max(longest, 1) <= _STEPS:
        return [[expression.fullmatch(name) is not None for name in names] for expression in compiled]
    return _match_in_child(patterns, names, field)


def _match_in_child(patterns: Sequence[str], names: list[str], field: str) -> list[list[bool]]:
    import json
    import subprocess
    import sys

    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired:
        worst = max(patterns, key=lambda pattern: _choices(_parse(pattern), 100))
        raise LoRAConfigError(
            f"{field}={_quote(worst)} did not finish within {_SECONDS:g} s on {len(names)} module names.",
            name=field,
            value=worst,
            expected="an expression without nested repeats such as (a+)+",
            remedy="Simplify the expression, or list the module names instead.",
        ) from None
    except (subprocess.CalledProcessError, OSError) as error:
        raise LoRAConfigError(
            f"{field}={_quote(patterns[0])} could not be matched in a child process: {error}.",
            name=field,
            value=patterns[0],
            remedy="List the module names instead.",
        ) from error
    answer: list[list[bool]] = json.loads(done.stdout)
    return answer


def _parse(pattern: str) -> Any:
    try:
        parser: Any = importlib.import_module("re._parser")  # Python ≥ 3.11
    except ImportError:
        parser = importlib.import_module("sre_parse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parser.parse(pattern)


def _choices(node: Any, length: int) -> float:
    """An upper bound on the ways in which `node` can match prefixes of a string of `length` (inf: not bounded here).

    A sequence multiplies, a branch adds, a repeat of something with one way adds one way per count. A repeat of
    anything with several ways is exponential, so it is not bounded.
    """
    ways = 1.0
    for operator, argument in node:
        kind = str(operator)
        if kind in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "RANGE", "AT", "CATEGORY"):
            continue
        if kind == "SUBPATTERN":
            ways *= _choices(argument[-1], length)
        elif kind == "BRANCH":
            ways *= sum(_choices(branch, length) for branch in argument[1])
        elif kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, body = argument
            if _choices(body, length) > 1 and int(most) > 1:
                return float("inf")
            ways *= max(1, min(int(most), max(length, 1)) - int(least) + 1) * _choices(body, length)
        else:  # look-around, back-reference, conditional, atomic group, possessive repeat
            return float("inf")
    return ways
