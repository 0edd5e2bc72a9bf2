"""A README's front matter: changed key by key, so that what nobody asked to change stays as it was typed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import LoRAFileError

__all__ = ["FrontMatter", "split"]

# As the Hub itself finds the block.
_BLOCK = re.compile(r"^\s*---(?:\r\n|\r|\n)(?P<yaml>[\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)")
_LARGEST = 2**20  # characters
_MOST_BRACKETS = 2000  # the reader takes time quadratic in open ones
_MOST_ALIASES = 30  # more could be a bomb: ten levels of ten references are 10^10 values


def split(text: str) -> tuple[str | None, str]:
    """The YAML of a README (None if it has none), and what follows it."""
    text = text.removeprefix("\ufeff")
    match = _BLOCK.match(text)
    return (None, text) if match is None else (match["yaml"], text[match.end() :])


class FrontMatter:
    """The metadata of a README, as text per key.

    Args:
        yaml: the text between the dashes; None or empty for no metadata.
        source: what to call it in an error.

    Raises:
        LoRAFileError: it is no YAML mapping, or has a key twice.
    """

    def __init__(self, yaml: str | None, source: str = "README.md") -> None:
        self.source = source
        self.comment = ""  # what stands before the first key
        self.texts: dict[str, str] = {}  # key → its lines, each ended by \n
        self.data: dict[Any, Any] = {}
        if yaml:
            self._parse(yaml.replace("\r\n", "\n").replace("\r", "\n"))

    def _parse(self, text: str) -> None:
        import yaml

        if len(text) > _LARGEST or len(re.findall(r"[\[{]", text)) > _MOST_BRACKETS:
            raise self._error(f"has more than {_LARGEST} characters, or {_MOST_BRACKETS} brackets")
        try:
            if sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, yaml.SafeLoader)) > _MOST_ALIASES:
                raise self._error(f"has more than {_MOST_ALIASES} aliases")
            root, data = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 2}" if mark is not None else ""  # the dashes are line 1
            raise self._error(
                f"cannot be read{where}: {getattr(error, 'problem', None) or type(error).__name__}"
            ) from error
        if data is None:
            self.comment = text.rstrip("\n") + "\n"
            return
        if not isinstance(data, dict) or not isinstance(root, yaml.MappingNode):
            raise self._error(f"is a {type(data).__name__}, not a mapping")
        self.data = data
        if root.flow_style:
            self.texts = {str(key): _dumped(key, value) for key, value in data.items()}
            return
        text = text if text.endswith("\n") else f"{text}\n"
        # By index and not by line: YAML ends lines at more characters than \n.
        starts = [key.start_mark.index for key, _ in root.value]
        self.comment = text[: starts[0]]
        for (key, _), start, end in zip(root.value, starts, [*starts[1:], len(text)], strict=True):
            name = key.value if isinstance(key, yaml.ScalarNode) else f"at {start}"
            if name in self.texts:
                raise self._error(f"has the key {name!r} twice")
            self.texts[name] = text[start:end]

    def _error(self, problem: str) -> LoRAFileError:
        return LoRAFileError(
            f"The metadata of {self.source} {problem}.",
            name=self.source,
            remedy="Correct the lines between the two --- at its top; nothing was pushed.",
        )

    def get(self, key: str) -> Any:
        """The key's value; None if it is missing."""
        return self.data.get(key)

    def set(self, key: str, value: Any) -> None:
        """Give a key another value, or take it out (None); the text of an equal value stays as it is."""
        if value is None:
            self.data.pop(key, None)
            self.texts.pop(key, None)
        elif key not in self.data or self.data[key] != value:
            # Comments and blank lines after the old value belong to the next key.
            rest = re.search(r"(?:^[ \t]*(?:#.*)?\n)+\Z", self.texts.get(key, ""), re.M)
            self.data[key] = value
            self.texts[key] = _dumped(key, value) + (rest[0] if rest else "")

    def over(self, other: FrontMatter) -> FrontMatter:
        """This metadata with the other's keys that it lacks."""
        joined = FrontMatter(None, self.source)
        joined.comment = self.comment or other.comment
        joined.texts = {**self.texts, **{k: text for k, text in other.texts.items() if k not in self.texts}}
        joined.data = {**other.data, **self.data}
        return joined

    def text(self) -> str:
        """The YAML, which reads back as the same values; ends with a newline unless empty."""
        import yaml

        text = self.comment + "".join(self.texts.values())
        try:
            same = (yaml.safe_load(text) or {}) == self.data
        except (yaml.YAMLError, ValueError):
            same = False
        # An anchor whose definition was replaced, say: then all of it is written anew.
        return text if same else "".join(_dumped(key, value) for key, value in self.data.items())


def _dumped(key: Any, value: Mapping[str, Any] | Any) -> str:
    import yaml

    text: str = yaml.safe_dump({key: value}, allow_unicode=True, sort_keys=False, width=float("inf"))
    return text
