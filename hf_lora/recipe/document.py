"""YAML, read strictly: plain values, each with the line it stands on.

Beyond `yaml.safe_load`: a key that occurs twice is refused, and so are anchors (a file of a few lines can expand to
gigabytes), tags and other documents. Scalars are those of YAML 1.2's core: `1e-4` is a number, `no` and `on` are words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .problems import RecipeError, quoted

__all__ = ["Document", "Keys", "overridden", "parse", "parse_value", "read"]

Keys = tuple[str, ...]

_LARGEST = 1 << 20  # bytes of a recipe
_DEEPEST = 20  # mappings and lists inside each other


@dataclass
class Document:
    """The content of a recipe's file, and for each key where it was said: "recipe.yaml, line 3", or a flag."""

    content: dict[str, Any]
    where: dict[Keys, str] = field(default_factory=dict)

    def place(self, keys: Keys) -> str:
        """Where the key, or the nearest section around it, was said."""
        while keys and keys not in self.where:
            keys = keys[:-1]
        return self.where.get(keys, "")


_PREFIX = "tag:yaml.org,2002:"
_PATTERNS: dict[str, tuple[str, list[str]]] = {
    "null": (r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
_READ: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's core scalars."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # as the class above has it


for _tag, (_pattern, _first) in _PATTERNS.items():
    _Loader.add_implicit_resolver(_PREFIX + _tag, re.compile(rf"(?:{_pattern})\Z"), _first)


def read(path: Path) -> Document:
    """The file's content. Raises `RecipeError`."""
    try:
        if path.stat().st_size > _LARGEST:
            raise RecipeError(f"{path} has more than {_LARGEST >> 20} MiB: no recipe.", name="recipe", value=str(path))
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise RecipeError(
            f"The recipe {str(path)!r} cannot be read ({error.strerror}).",
            name="recipe",
            value=str(path),
            remedy="Check the path.",
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path} is not UTF-8 (byte {error.start}).",
            name="recipe",
            value=str(path),
            remedy="Save it as UTF-8.",
        ) from error
    return parse(text, path.name)


def parse(text: str, name: str = "recipe") -> Document:
    """The content of a recipe's text. `name` is what errors call it. Raises `RecipeError`."""
    node = _compose(text, name)
    if not isinstance(node, yaml.MappingNode):
        what = "is empty" if node is None or node.value == "" else "is not a mapping"
        raise RecipeError(
            f"{name} {what}.",
            name="recipe",
            value=text[:100],
            expected="a mapping",
            remedy="Begin with the sections `base:`, `data:` and `out:`.",
        )
    document = Document({})
    document.content = _plain(node, (), name, document.where)
    return document


def parse_value(text: str, name: str) -> Any:
    """One value of a flag, read as a recipe's value is. Raises `RecipeError`."""
    node = _compose(text, name)
    return None if node is None else _plain(node, (), name, {})


def overridden(document: Document, changes: Mapping[Keys, tuple[Any, str]]) -> Document:
    """The document with values put in at their keys; each comes with where it was said."""
    content, where = _copied(document.content), dict(document.where)
    for keys, (value, place) in changes.items():
        section: Any = content
        for depth, key in enumerate(keys[:-1], 1):
            if section.get(key) is None:
                section[key] = {}
            section = section[key]
            if not isinstance(section, dict):
                raise RecipeError(
                    f"{place}: {'.'.join(keys[:depth])} is {quoted(section)}, and has no {keys[depth]!r}.",
                    name=".".join(keys),
                    value=value,
                    remedy=f"Set {'.'.join(keys[:depth])} as a whole.",
                )
        section[keys[-1]] = value
        where = {at: said for at, said in where.items() if at[: len(keys)] != keys}
        where[keys] = place
    return Document(content, where)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _compose(text: str, name: str) -> yaml.Node | None:
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_Loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST + 1:  # here already: the reader's time grows with the square of what is open
                place = f"{name}, line {event.start_mark.line + 1}"
                raise RecipeError(f"{place}: more than {_DEEPEST} levels inside each other.", name="recipe")
            if getattr(event, "anchor", None):  # an alias names one too
                line = event.start_mark.line + 1
                raise RecipeError(
                    f"{name}, line {line}: anchors and aliases (&, *) are not read in a recipe.",
                    name="recipe",
                    remedy="Write the value out, or put a word that begins with & or * in quotes.",
                )
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise RecipeError(
            f"{name}{at}: this is no YAML: {problem}.",
            name="recipe",
            remedy="Put text that holds one of {}[]:#,&*!|>'\"%@` in quotes.",
        ) from error
    except RecursionError as error:
        raise RecipeError(f"{name} cannot be read as YAML: {type(error).__name__}.", name="recipe") from error


def _plain(node: yaml.Node, keys: Keys, name: str, where: dict[Keys, str], depth: int = 0) -> Any:
    place = f"{name}, line {node.start_mark.line + 1}"
    where.setdefault(keys, place)
    kind = node.tag.removeprefix(_PREFIX)
    if depth > _DEEPEST:
        raise RecipeError(f"{place}: more than {_DEEPEST} levels inside each other.", name=".".join(keys))
    if isinstance(node, yaml.MappingNode) and kind == "map":
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node, name)
            at = f"{name}, line {key_node.start_mark.line + 1}"
            if key in found:
                raise RecipeError(
                    f"{at}: {key!r} occurs twice in {'.'.join(keys) or 'the recipe'} (first: {where[(*keys, key)]}).",
                    name=".".join((*keys, key)),
                    value=key,
                    remedy="Keep one of them.",
                )
            where[(*keys, key)] = at
            found[key] = _plain(value_node, (*keys, key), name, where, depth + 1)
        return found
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_plain(item, keys, name, where, depth + 1) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and kind in _READ:
        try:
            return _READ[kind](node.value)
        except ValueError as error:
            raise RecipeError(
                f"{place}: {quoted(node.value)} cannot be read as {kind}.", name=".".join(keys)
            ) from error
    raise RecipeError(
        f"{place}: the tag {node.tag!r} is not read in a recipe.",
        name=".".join(keys),
        value=node.tag,
        remedy="Write a plain value, a list or a mapping; put text that begins with ! in quotes.",
    )


def _key(node: yaml.Node, name: str) -> str:
    if isinstance(node, yaml.ScalarNode) and node.tag == f"{_PREFIX}str":
        return str(node.value)
    raise RecipeError(
        f"{name}, line {node.start_mark.line + 1}: a key is {quoted(node.value)}, which is not a word.",
        name="recipe",
        value=node.value if isinstance(node, yaml.ScalarNode) else None,
        remedy="Write keys as plain words, or in quotes.",
    )
