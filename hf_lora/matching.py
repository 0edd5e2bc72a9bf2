"""One word of a config (a name, a regular expression, a role) to the layers and rows of a surveyed model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import nn

from . import architectures as arch
from .errors import LoRAError, LoRATargetError, LoRAUnsupportedError
from .patterns import fullmatching
from .survey import Survey

__all__ = ["Asked", "Matcher", "last", "listed", "some", "within"]

Asked = dict[str, "frozenset[str] | None"]
"""What is asked of each layer: path → None for the whole layer, else some of its roles."""


class Matcher:
    """Matches words on one model, and keeps the notes of what was left out.

    Args:
        seen: the model's layers.
        model: the model, for its name in messages.
        from_file: words are names, never roles, and may match nothing.
    """

    def __init__(self, seen: Survey, model: nn.Module, from_file: bool) -> None:
        self.seen, self.model, self.from_file = seen, model, from_file
        self.roles: frozenset[str] = frozenset() if from_file else seen.roles()
        self.used_roles = False
        self.skipped: list[str] = []

    def match(self, item: str, field: str, *, regex: bool, as_role: bool = True, strict: bool = True) -> Asked:
        """Layers that one word, name or regular expression names; raises if there is none (with `strict`)."""
        if as_role and not regex and item in self.roles:
            return self._by_role(item, field)
        modules = self.seen.modules
        if regex:
            names: Iterable[str] = fullmatching(item, [name for name in modules if name], field=field)
        else:
            ending = f".{item}"
            names = [name for name in modules if name == item or name.endswith(ending)]
        paths = list(dict.fromkeys(self.seen.canonical[name] for name in names))
        found: Asked = {path: None for path in paths if path in self.seen.layers}
        if found:
            self._note_others(item, field, [path for path in paths if path not in found])
            return found
        if not strict:
            return {}
        if self.from_file and not any(self.seen.why_not(path)[1] for path in paths):
            self.note(f"{field} {item!r}: matches no layer of this model")
            return {}
        if not paths:
            what = "the regular expression" if regex else "the name"
            raise LoRATargetError(
                f"{field}: {what} {item!r} matches no module of {type(self.model).__name__}",
                name=field,
                value=item,
                remedy=self.near(item),
            )
        raise self._no_layer(item, field, paths)

    def _note_others(self, item: str, field: str, paths: Sequence[str]) -> None:
        """Say which modules with weights of their own a name matches besides layers."""
        if field != "target_modules":
            return
        unable: dict[tuple[str, str], list[str]] = {}
        for path in paths:
            module = self.seen.modules[path]
            if next(module.parameters(recurse=False), None) is not None:
                unable.setdefault((type(module).__name__, self.seen.why_not(path)[0]), []).append(path)
        for (name, reason), which in unable.items():
            self.note(f"{some(which)} ({name}), matched by {item!r}: {reason}")

    def _no_layer(self, item: str, field: str, paths: Sequence[str]) -> LoRAError:
        module = self.seen.modules[paths[0]]
        reason, not_yet = self.seen.why_not(paths[0])
        inside = [path for path in self.seen.layers if path.startswith(f"{paths[0]}.")]
        remedy = (
            f"Name the layers in it, such as {some(inside[:3])}, or write a regular expression: "
            f'r".*\\b{re.escape(item)}\\..*".'
            if inside
            else "Name Linear layers, or use a role."
        )
        error = LoRAUnsupportedError if not_yet else LoRATargetError
        return error(
            f"{field}: {item!r} matches {some(paths)}, of class {type(module).__name__}: {reason}",
            name=field,
            value=item,
            remedy=remedy,
        )

    def _by_role(self, word: str, field: str) -> Asked:
        self.used_roles = True
        if word == "head":
            return dict.fromkeys(self.seen.head_layers())
        roles = frozenset(arch.ROLE_GROUPS[word])
        found: Asked = {}
        unknown: list[str] = []
        for path, layer in self.seen.layers.items():
            mine = roles.intersection(layer.roles)
            if not mine:
                continue
            if layer.fused and not layer.rows:
                unknown.append(path)
            else:
                found[path] = mine if layer.fused else None
        excluding = field == "exclude_modules"
        if unknown:
            note = f"{some(unknown)}: fused layers whose rows for the role {word!r} are not known"
            if excluding or not found:
                names = sorted({last(path) for path in unknown})
                raise LoRAUnsupportedError(note, name=field, value=word, remedy=f"Name them whole: {some(names)}.")
            self.note(note)
        experts = [path for path, held in self.seen.experts.items() if roles.intersection(held)]
        if experts and not excluding:
            name = type(self.seen.modules[experts[0]]).__name__
            note = f"{some(experts)} ({name}): the role {word!r} in experts' 3-D parameters (PEFT's target_parameters)"
            if not found:
                raise LoRAUnsupportedError(
                    f"{note}: not supported yet",
                    name=field,
                    value=word,
                    remedy=f"Adapt the attention instead, by the roles {listed(self.roles & set(arch.ROLES[:4]))}.",
                )
            self.note(note)
        return found

    def note(self, line: str) -> None:
        """Remember, once, something that was left out."""
        if line not in self.skipped:
            self.skipped.append(line)

    def near(self, item: str) -> str:
        """A remedy that names what is like `item`, or else what there is."""
        names = {part for name in self.seen.layers for part in name.split(".") if not part.isdigit()}
        close = difflib.get_close_matches(last(item), sorted(names | self.roles), n=5, cutoff=0.5)
        layers = sorted({last(path) for path in self.seen.layers} - {"", *map(str, range(100))})
        if close:
            return f"Did you mean {some(close)}? Roles here: {listed(self.roles)}."
        return f"Layers here: {some(layers)}. Roles here: {listed(self.roles)}."


def within(paths: Iterable[str], roots: Iterable[str]) -> list[str]:
    """Those of `paths` that are one of `roots` or lie inside one."""
    roots = tuple(roots)
    starts = tuple(f"{root}." for root in roots)
    return [path for path in paths if path in roots or path.startswith(starts)] if roots else []


def last(path: str) -> str:
    """The last component of a dotted path."""
    return path.rpartition(".")[2]


def listed(words: Iterable[str]) -> str:
    """All of them, sorted."""
    return ", ".join(sorted(words))


def some(items: Iterable[object], most: int = 6) -> str:
    """The first few, and how many there are."""
    texts = [str(item) for item in items]
    more = f", … ({len(texts)} in all)" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more
