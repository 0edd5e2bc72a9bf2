"""Texts: READMEs and their metadata, recipes, forms of tasks, regular expressions."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import yaml

from hf_lora import card, frontmatter, patterns, store
from hf_lora.demo import tasks
from hf_lora.errors import LoRAConfigError, LoRAError
from hf_lora.frontmatter import FrontMatter
from hf_lora.recipe import Recipe, document

from . import good
from .core import Folder, SilentChange, Target, same
from .files import as_said

_C_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_C_BASE: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


def decoded(data: bytes) -> str:
    """As the Hub's files are read. What is no UTF-8 is refused where it is read, before these functions."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoRAError(f"no UTF-8: {error}") from error


class Metadata(Target):
    name, title, entry = "front-matter", "a README's YAML front matter", "FrontMatter"
    kinds = ("yaml",)
    inputs = 12_000
    count = 0

    def seeds(self) -> list[bytes]:
        return [text.encode() for text in good.READMES]

    def check(self, data: bytes) -> None:
        text = decoded(data)
        block, rest = frontmatter.split(text)
        if not text.endswith(rest):
            raise SilentChange("words after the metadata were changed")
        front = FrontMatter(block)
        plain = (block or "").replace("\r\n", "\n").replace("\r", "\n")
        try:
            said = yaml.load(plain, _C_LOADER)
        except yaml.YAMLError:
            pass  # libyaml and the reader in Python differ in a few places; then there is no second opinion
        else:
            same(repr(front.data), repr(said or {}), "the metadata")
        self.count += 1
        if self.count % 3:
            return
        before = dict(front.texts)
        same(repr(FrontMatter(front.text()).data), repr(front.data), "what was written and read again")
        front.set("license", "mit")
        try:
            again = yaml.load(front.text(), _C_LOADER)
        except yaml.YAMLError:  # as above
            again = FrontMatter(front.text()).data
        same(repr({**again, "license": 0}), repr({**front.data, "license": 0}), "the metadata with another licence")
        same(again["license"], "mit", "license")
        for key, lines in before.items():
            if key != "license":
                same(front.texts[key], lines, f"the text of {key!r}")


class Card(Target):
    name, title, entry = "card", "a repo's README.md, before a push", "card.update"
    kinds = ("yaml",)
    inputs = 2_000
    guided = False
    few = 25
    _OWN = ("base_model", "library_name", "tags", "datasets", "model-index", "pipeline_tag")

    def __init__(self) -> None:
        folder = Folder()
        folder.put(store.CONFIG_NAME, json.dumps(good.CONFIG).encode())
        folder.put(store.WEIGHTS_NAME, good.weights(good.ADAPTERS[0][1]))
        self.value = store.read_adapter(folder.path)
        folder.close()

    def seeds(self) -> list[bytes]:
        found = [text.encode() for text in good.READMES]
        return [*found, self._updated(good.README).encode(), self._updated("").encode()]

    def _updated(self, text: str) -> str:
        return card.update(text, self.value, base_model="org/base", repo_id="me/task")

    def check(self, data: bytes) -> None:
        text = decoded(data)
        updated = self._updated(text)
        same(self._updated(updated), updated, "doing it twice")
        old, new = (FrontMatter(frontmatter.split(_lines(each))[0]).data for each in (text, updated))
        for key, value in old.items():
            if key not in self._OWN:
                same(repr(new.get(key)), repr(value), f"the owner's {key!r}")
        words = re.sub(
            r"(?ms)^<!-- hf_lora:begin .*? -->[ \t]*\n.*?^<!-- hf_lora:end -->[ \t]*$",
            "",
            frontmatter.split(_lines(text))[1],
        )
        body = _lines(frontmatter.split(updated)[1])
        for line in words.split("\n"):
            if line.strip() and line.rstrip() not in body:
                raise SilentChange(f"the owner's line {line[:80]!r} is gone")


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").encode("utf-8", "replace").decode()


def require_scalars(found: Any, said: Any, what: str = "") -> None:
    """A document read by YAML 1.2's words, beside libyaml's reading of the same scalars as text."""
    if isinstance(found, dict):
        same(isinstance(said, dict) and list(found) == list(said), True, f"the keys of {what or 'the text'}")
        for key, item in found.items():
            require_scalars(item, said[key], f"{what}.{key}")
    elif isinstance(found, list):
        same(isinstance(said, list) and len(found) == len(said), True, f"the length of {what}")
        for item, other in zip(found, said, strict=True):
            require_scalars(item, other, what)
    elif isinstance(found, str):
        same(found, said, what)
    elif found is None:
        same(said in ("", "~", "null", "Null", "NULL"), True, what)
    elif isinstance(found, bool):
        same(str(found).lower(), str(said).lower(), what)
    else:
        same(repr(found), repr(type(found)(said.lower().replace(".inf", "inf").replace(".nan", "nan"))), what)


def require_document(data: bytes, content: Any) -> None:
    """`content` is what libyaml reads."""
    try:
        said = yaml.load(data.decode("utf-8-sig"), _C_BASE)
    except (yaml.YAMLError, ValueError):
        return
    require_scalars(content, said)


class Recipes(Target):
    name, title, entry = "recipe", "a recipe's YAML", "Recipe.load"
    kinds = ("yaml",)
    inputs = 8_000

    def __init__(self) -> None:
        self.folder = Folder()

    def seeds(self) -> list[bytes]:
        return [text.encode() for text in good.RECIPES]

    def check(self, data: bytes) -> None:
        self.folder.put("recipe.yaml", data)
        path = self.folder.path / "recipe.yaml"
        recipe = Recipe.load(path)
        content = document.read(path).content
        require_document(data, content)
        same(Recipe.from_dict(recipe.to_dict()), recipe, "what was written and read again")
        for section in ("base", "data", "push", "lora", "training"):
            for key, value in (content.get(section) or {}).items():
                if key in ("train", "eval", "model") or value is None or (key, value) == ("max_steps", -1):
                    continue
                held = getattr(recipe, section)
                held = held[key] if section == "training" else getattr(held, key)
                if not as_said(held, value):
                    raise SilentChange(f"{section}.{key}: the file says {value!r}, the recipe has {held!r}"[:300])
        for key in ("out", "seed"):
            if content.get(key) is not None:
                same(getattr(recipe, key), content[key], key)

    def close(self) -> None:
        self.folder.close()


class Tasks(Target):
    name, title, entry = "task-form", "task.yaml of an adapter that a demo ships", "demo.tasks.read_task"
    kinds = ("yaml",)
    inputs = 6_000

    def __init__(self) -> None:
        self.folder = Folder()

    def seeds(self) -> list[bytes]:
        return [text.encode() for text in good.TASKS]

    def check(self, data: bytes) -> None:
        self.folder.put(tasks.TASK_FILE, data)
        task = tasks.read_task(self.folder.path)
        assert task is not None
        content = document.read(self.folder.path / tasks.TASK_FILE).content
        require_document(data, content)
        for key, value in content.items():
            if key in ("fields", "examples"):
                same(len(getattr(task, key)), len(value or ()), f"the number of {key}")
            elif key not in ("attributes", "score") and value is not None and not as_said(getattr(task, key), value):
                raise SilentChange(f"{key}: the file says {value!r}, the task has {getattr(task, key)!r}"[:300])
        text = task.text({item.name: "@1" for item in task.fields})
        if "@1" not in text:
            raise SilentChange("the prompt holds no field")

    def close(self) -> None:
        self.folder.close()


class Patterns(Target):
    """A regular expression of a file, on module names. In one of 50 that need it the child process is asked."""

    name, title, entry = (
        "pattern",
        "a regular expression, on module names",
        "patterns.fullmatching, suffix_regex_lookup",
    )
    kinds = ("json",)
    inputs = 80_000
    _NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "h.0.q", "lm_head", "a" * 40)
    _PATTERNS = (
        *(r".*\.(q|v)_proj", "q_proj", r"^model\.layers\.0", r"model\.layers\.\d+\..*", "h.0.q", "(?i)LM_HEAD", "a*"),
        *(r"(a+)+b", r".*[02468]\..*", r"[^.]+\.\d+\.q", r"(?:h|g)\.0\.q$", "", r"\w+", r"(?P<x>l)m_head"),
    )

    def __init__(self) -> None:
        self.asked = self.apart = 0
        self._child = patterns._match_in_child
        self._seconds = patterns._SECONDS
        patterns._match_in_child = self._sometimes
        warnings.simplefilter("ignore", FutureWarning)  # Python's re, of '[['
        patterns._SECONDS = 1.0

    def _sometimes(self, regexes: Any, names: Any, field: str) -> Any:
        self.asked += 1
        self.apart = True
        if self.asked % 50:
            raise LoRAConfigError("left to the child process, which was not asked this time")
        return self._child(regexes, names, field)

    def seeds(self) -> list[bytes]:
        return good.texts([{"pattern": p, "names": list(self._NAMES)} for p in self._PATTERNS if p])

    def check(self, data: bytes) -> None:
        try:
            given = json.loads(data)
            pattern, names = given["pattern"], given["names"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LoRAError("no pattern") from error  # ours, not what is tested
        if not isinstance(pattern, str) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise LoRAError("no pattern")
        names = list(dict.fromkeys(names))
        self.apart = False
        whole = patterns.fullmatching(pattern, names)
        if not self.apart:
            same(whole, [name for name in names if re.fullmatch(pattern, name)], "what matches")
        if not pattern:
            return
        self.apart = False
        ends = patterns.suffix_regex_lookup([pattern, "q_proj"], names)
        if not self.apart:
            for name in names:
                keys = (key for key in (pattern, "q_proj") if re.match(rf"(.*\.)?({key})$", name))
                if "\n" not in name:  # `$` also stands before one
                    same(ends.get(name), next(keys, None), f"the key of {name!r}")

    def close(self) -> None:
        patterns._match_in_child, patterns._SECONDS = self._child, self._seconds


TARGETS: dict[str, Any] = {target.name: target for target in (Metadata, Card, Recipes, Tasks, Patterns)}
