"""The model card: a README whose generated sections are replaced, and whose every other word is its owner's.

`update` is pure: text in, text out. What it writes stands between two comments, `<!-- hf_lora:begin {…} -->` and
`<!-- hf_lora:end -->`, one such section for each adapter of the repo. The first comment holds what the section put into
the README's metadata, so that the next update can tell that from what somebody else wrote there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import cardtext
from .bases import hub_id, require_hub_id, same_base
from .errors import LoRAFileError, LoRAMismatchError
from .facts import RunFacts
from .frontmatter import FrontMatter, split
from .values import AdapterValue

__all__ = ["update"]

_BEGIN, _END = "<!-- hf_lora:begin ", "<!-- hf_lora:end -->"
_SECTION = re.compile(
    r"^<!-- hf_lora:begin (?P<facts>.*) -->[ \t]*\n(?P<text>[\S\s]*?)^<!-- hf_lora:end -->[ \t]*$", re.M
)
_MARK = re.compile(r"^<!-- hf_lora:(?:begin .*|end) -->[ \t]*$", re.M)
_NOTE = "<!-- Written by hf_lora: the next push replaces these lines. Words of your own go outside of them. -->"
_INDEX = "index"  # the section that lists the adapters of a repo with several

_LISTS = ("tags", "datasets", "model-index")


@dataclass(frozen=True)
class _Section:
    """One generated section.

    Args:
        key: the adapter's folder, "" at the root; None for the list of adapters.
        facts: what it put into the metadata, and what the list says of it.
        text: all of it, markers included.
    """

    key: str | None
    facts: Mapping[str, Any]
    text: str

    @property
    def metadata(self) -> Mapping[str, Any]:
        found = self.facts.get("metadata")
        return found if isinstance(found, Mapping) else {}


def update(
    existing: str | None,
    value: AdapterValue,
    *,
    run: RunFacts | None = None,
    base_model: str | None = None,
    repo_id: str | None = None,
    subfolder: str | None = None,
    architecture: str | None = None,
    quantised: str | None = None,
    words: str | None = None,
) -> str:
    """A repo's README after a push of `value`. Doing it again with the same arguments changes nothing.

    Everything outside of the generated sections stays as it is, and so does the metadata: keys that were set by others
    keep their value, lists (tags, datasets, model-index) gain what is missing. `library_name: transformers` alone
    becomes peft where the adapter lies at the root of the repo, for that is what stock Trainer writes there.

    Args:
        existing: the README as it is; None if there is none.
        value: the adapter.
        run: how it was trained.
        base_model: the base's id; None takes the config's.
        repo_id: where it will be, for the examples; None writes "<user>/<name>".
        subfolder: the adapter's folder in the repo; None is the root.
        architecture: the base's class, such as "LlamaForCausalLM"; None takes the config's, if it says one.
        quantised: how the base was quantised while the adapter trained; None if it was not.
        words: a README to put in place of what `existing` says outside of the generated sections. Its metadata wins
            over that of `existing`.

    Raises:
        LoRAFileError: metadata that is no YAML mapping, or a begin without an end.
        LoRAMismatchError: there is no id for the base, or the README's own base_model is another base.
    """
    base = require_hub_id(value.config.base_model) if base_model is None else require_hub_id(base_model, given=True)
    facts = cardtext.facts_of(value, run, base, repo_id, subfolder or "", architecture, quantised)
    old_yaml, old_body = split(_lines(existing or ""))
    front, body, kept = FrontMatter(old_yaml), old_body, _sections(old_body, "README.md")
    given: set[str] = set()
    own_yaml: str | None = None
    if words is not None:
        own_yaml, own_body = split(_lines(words))
        own = FrontMatter(own_yaml, "the card")
        given = set(own.texts)
        front, body = own.over(front), _carried(own_body, kept)
    elif not body.strip():
        body = f"# {cardtext.escape((repo_id or 'adapter').rpartition('/')[2])}\n"
    section = _rendered(facts.subfolder, {"listed": facts.listed(), "metadata": facts.metadata()}, facts.text())
    before = {} if existing is None else _union(kept)
    after = _union([*(s for s in kept if s.key != section.key), section])
    _merge(front, before, after, given, whole=not facts.subfolder)
    body = _placed(body, section)
    body = _listed(body)
    yaml = front.text()
    gap = "" if body.startswith("\n") or (old_yaml if words is None else own_yaml) is not None else "\n"
    text = f"---\n{yaml}---\n{gap}{body}"
    return text.replace("\n", "\r\n") if "\r\n" in (words or existing or "") else text


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").encode("utf-8", "replace").decode()


# ---- sections --------------------------------------------------------------------------------------------------------


def _sections(body: str, source: str) -> list[_Section]:
    """The generated sections, in order. Raises for markers that are no pairs: the text between is then whose?"""
    found: list[_Section] = []
    for match in _SECTION.finditer(body):
        facts = _read(match["facts"])
        if facts is None or _MARK.search(match["text"]):
            raise _damaged(source, match[0].partition("\n")[0])
        key = None if facts.get(_INDEX) is True else str(facts.get("subfolder", ""))
        if key in (section.key for section in found):
            raise _damaged(source, match[0].partition("\n")[0], "A section stands there twice.")
        found.append(_Section(key, facts, match[0]))
    single = _MARK.search(_SECTION.sub("", body))
    if single is not None:
        raise _damaged(source, single[0])
    return found


def _damaged(source: str, line: str, what: str = "A section has lost its other end.") -> LoRAFileError:
    return LoRAFileError(
        f"{source}: {what} {line[:60]!r}",
        name=source,
        value=line,
        expected=f"{_BEGIN}{{…}} --> … {_END}",
        remedy="Delete that section from the README; the next push writes it anew. Nothing was pushed.",
    )


def _read(text: str) -> dict[str, Any] | None:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return facts if isinstance(facts, dict) else None


def _rendered(key: str | None, facts: Mapping[str, Any], text: str) -> _Section:
    facts = {_INDEX: True} if key is None else {"subfolder": key, **facts}
    data = json.dumps(facts, sort_keys=True)  # ASCII, on one line
    data = data.replace("<", "\\u003c").replace(">", "\\u003e")  # so that nothing in it can end the comment
    return _Section(key, facts, f"{_BEGIN}{data} -->\n{_NOTE}\n\n{text.strip()}\n\n{_END}")


def _placed(body: str, section: _Section) -> str:
    """The body with the section in place of its predecessor, else at the end."""
    for match in _SECTION.finditer(body):
        facts = _read(match["facts"]) or {}
        if (None if facts.get(_INDEX) is True else str(facts.get("subfolder", ""))) == section.key:
            return body[: match.start()] + section.text + body[match.end() :]
    return f"{body.rstrip()}\n\n{section.text}\n"


def _carried(body: str, kept: Iterable[_Section]) -> str:
    """A user's new words with the sections that the README has: in place if the words hold them, else at the end."""
    _sections(body, "the card")
    for section in kept:
        body = _placed(body, section)
    return body


def _listed(body: str) -> str:
    """The body with the list of its adapters before the first, if any has a folder of its own."""
    sections = [section for section in _sections(body, "README.md") if section.key is not None]
    if not any(section.key for section in sections):
        return body
    rows = [section.facts.get("listed") for section in sections]
    text = cardtext.index(
        [(str(s.key), row if isinstance(row, dict) else {}) for s, row in zip(sections, rows, strict=True)]
    )
    index = _rendered(None, {}, text)
    if any(section.key is None for section in _sections(body, "README.md")):
        return _placed(body, index)
    first = body.index(sections[0].text)
    return f"{body[:first]}{index.text}\n\n{body[first:]}"


# ---- metadata --------------------------------------------------------------------------------------------------------


def _union(sections: Iterable[_Section]) -> dict[str, Any]:
    """What all sections together put into the metadata."""
    union: dict[str, Any] = {"base_model": []}
    tags: list[Any] = []
    for section in sections:
        for key, item in section.metadata.items():
            if key == "base_model":
                union[key] += [item] if isinstance(item, str) and item not in union[key] else []
            elif key in _LISTS and isinstance(item, list):
                union[key] = [*(had := union.get(key, [])), *(x for x in item if x not in had)]
            elif key == "pipeline_tag":
                tags.append(item)
            else:
                union[key] = item
    if len(set(map(str, tags))) == 1:
        union["pipeline_tag"] = tags[0]
    return union


def _merge(
    front: FrontMatter, before: Mapping[str, Any], after: Mapping[str, Any], given: set[str], whole: bool
) -> None:
    """Change what the sections wrote `before` into what they say `after`, and nothing that others wrote.

    Args:
        given: keys that the user's card sets anew, in which nothing is from `before`.
        whole: the adapter is the repo's only or main content.
    """
    _merge_base(front, before.get("base_model", []) if "base_model" not in given else [], after["base_model"])
    if whole and front.get("library_name") == "transformers":
        front.set("library_name", "peft")
    for key in sorted((before.keys() | after.keys()) - {"base_model"}):
        old, new, now = (None if key in given else before.get(key)), after.get(key), front.get(key)
        if key in _LISTS:
            now = now if isinstance(now, list) else [] if now is None else [now]
            old, new = old or [], new or []
            merged = [x for x in now if x not in old or x in new]
            fresh = [x for x in new if x not in old and x not in merged]
            ours = [x.get("name") for x in fresh if isinstance(x, dict)]
            # stock Trainer writes an entry of the model's name without results
            merged = [x for x in merged if not (isinstance(x, dict) and x.get("name") in ours and not x.get("results"))]
            names = {x.get("name") for x in merged if isinstance(x, dict)}
            merged += [x for x in fresh if not (isinstance(x, dict) and x.get("name") in names)]
            if merged != now:
                front.set(key, merged or None)
        elif now == old:
            front.set(key, new)


def _merge_base(front: FrontMatter, old: list[str], new: list[str]) -> None:
    now = front.get("base_model")
    names = [x for x in (now if isinstance(now, list) else [now]) if isinstance(x, str)]
    names = [x for x in names if hub_id(x, folders=False)]  # folders, and what PEFT leaves empty, say nothing
    own = [x for x in names if x not in old]
    fresh = [x for x in new if x not in old and not any(same_base(x, y) for y in names)]
    if own and fresh:
        raise LoRAMismatchError(
            f"The README says base_model: {', '.join(own)}, but the adapter was made on {fresh[0]}.",
            name="base_model",
            value=own,
            expected=fresh[0],
            remedy="Correct base_model in the README's metadata, or pass base_model= if that is the right one.",
        )
    merged = [x for x in names if x not in old or x in new] + fresh
    merged += [x for x in new if not any(same_base(x, y) for y in merged)]
    if merged != now:
        front.set("base_model", merged[0] if len(merged) == 1 else merged)
