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

__all__ = ["ALL_LINEAR", "Asked", "Matcher", "last", "listed", "on_side", "some", "within"]

ALL_LINEAR = "all-linear"

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

    def is_role(self, item: str) -> bool:
        """Whether a word is a role here, alone or of one side ("vision.q", "language.all-linear")."""
        return item in self.roles or self.side_of(item) is not None

    def side_of(self, item: str) -> tuple[str, str] | None:
        """The side and the role of "language.q"; None if it is none, or if a module has that very name."""
        side, _, word = item.partition(".")
        if self.from_file or (word not in self.roles and word != ALL_LINEAR) or side not in arch.SIDES:
            return None
        named = any(name == item or name.endswith(f".{item}") for name in self.seen.modules)
        return None if named or not any(on_side(path, side) for path in self.seen.layers) else (side, word)

    def match(self, item: str, field: str, *, regex: bool, as_role: bool = True, strict: bool = True) -> Asked:
        """Layers that one word, name or regular expression names; raises if there is none (with `strict`)."""
        if as_role and not regex and item in self.roles:
            return self._by_role(item, field)
        if as_role and not regex and (sided := self.side_of(item)) is not None:
            return self._by_side(item, field, *sided)
        modules = self.seen.modules
        if regex:
            names: Iterable[str] = fullmatching(item, [name for name in modules if name], field=field)
        else:
            ending = f".{item}"
            names = [name for name in modules if name == item or name.endswith(ending)]
        paths = list(dict.fromkeys(self.seen.canonical[name] for name in names))
        layers = self.seen.layers
        found: Asked = {path: None for path in paths if path in layers and not layers[path].out_of}
        found |= {path: None for path, layer in layers.items() if layer.out_of in found and layer.out_of}
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

    def _by_side(self, item: str, field: str, side: str, word: str) -> Asked:
        """Layers of one side of a model of several (its vision tower, say)."""
        if word == ALL_LINEAR:
            kinds = ("linear", "conv1d")
            found: Asked = {path: None for path, layer in self.seen.layers.items() if layer.info.kind in kinds}
            found.pop(self.seen.output_embeddings or "", None)
            unable = [path for path, module in self.seen.modules.items() if isinstance(module, nn.Linear)]
            unable = [path for path in (*unable, *self.seen.experts) if path not in self.seen.layers]
            self._note_others(item, field, [path for path in unable if on_side(path, side)])
            found = {path: None for path in found if on_side(path, side)}
        else:
            found = self._by_role(word, field, side)
        if not found:
            raise LoRATargetError(
                f"{field}: {item!r} matches no layer of {type(self.model).__name__}: no layer of its {side} side has "
                f"the role {word!r}",
                name=field,
                value=item,
                remedy=self.near(item),
            )
        return found

    def _by_role(self, word: str, field: str, side: str | None = None) -> Asked:
        self.used_roles = True
        if word == "head":
            return dict.fromkeys(path for path in self.seen.head_layers() if on_side(path, side))
        roles = frozenset(arch.ROLE_GROUPS[word])
        found: Asked = {}
        unknown: list[str] = []
        for path, layer in self.seen.layers.items():
            mine = roles.intersection(layer.roles)
            if not mine or not on_side(path, side):
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
                raise LoRAUnsupportedError(
                    note,
                    name=field,
                    value=word,
                    remedy=f"Name them whole: {some(names)}. Or say the order of their rows on the class that holds "
                    'them: lora_roles = {"' + names[0] + '": ("q", "k", "v")}, if they are equal parts in that order.',
                )
            self.note(note)
        held_by = self.seen.experts.items()
        experts = [path for path, held in held_by if roles.intersection(held) and on_side(path, side)]
        if experts and not excluding:
            name = type(self.seen.modules[experts[0]]).__name__
            note = f"{some(experts)} ({name}): the role {word!r} in experts' 3-D parameters; "
            note += f"name them: target_parameters={self._parameters(experts[0], roles)}"
            if not found:
                raise LoRAUnsupportedError(
                    note,
                    name=field,
                    value=word,
                    remedy=f"Set target_parameters={self._parameters(experts[0], roles)}.",
                )
            self.note(note)
        return found

    def _parameters(self, path: str, roles: frozenset[str]) -> list[str]:
        """Names for `target_parameters` of a module's parameters that compute a role."""
        end = ".".join(path.split(".")[-2:])
        own = [name for name, p in self.seen.modules[path]._parameters.items() if p is not None and p.ndim == 3]
        return [f"{end}.{name}" for name in own if roles.intersection(arch.EXPERT_PARAMETERS.get(name, ()))]

    def note(self, line: str) -> None:
        """Remember, once, something that was left out."""
        if line not in self.skipped:
            self.skipped.append(line)

    def near(self, item: str) -> str:
        """A remedy that names what is like `item`, or else what there is."""
        names = {part for name in self.seen.layers for part in name.split(".") if not part.isdigit()}
        close = difflib.get_close_matches(last(item), sorted(names | self.roles), n=5, cutoff=0.5)
        # Numbers alone say nothing (the children of an nn.Sequential): whole paths then.
        layers = sorted({last(path) for path in self.seen.layers} - {"", *map(str, range(100))})
        layers = layers or [path for path in self.seen.layers if path]
        side, _, word = item.partition(".")
        if side in arch.SIDES and word:
            inside = [path for path in self.seen.layers if path != self.seen.output_embeddings]
            sides = [side for side in arch.SIDES if any(on_side(path, side) for path in inside)]
            if not sides:
                return f"This model has no sides: write {word!r}. Roles here: {listed(self.roles) or 'none'}."
            return f"Sides here: {some(sides)}. Roles here: {listed(self.roles)}."
        if close:
            return f"Did you mean {some(close)}? Roles here: {listed(self.roles)}."
        return f"Layers here: {some(layers)}. Roles here: {listed(self.roles) or 'none'}."


def on_side(path: str, side: str | None) -> bool:
    """Whether a layer lies on one side of its model; None is all of it."""
    return side is None or not arch.SIDES[side].isdisjoint(path.split("."))


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
