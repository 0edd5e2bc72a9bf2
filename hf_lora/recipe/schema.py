"""A recipe: what to train, on what, how and where to, as frozen data that checks itself.

Knows nothing of files but their names and loads no model; `hf_lora.recipe.run` carries it out.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..config import LoRAConfig
from ..errors import LoRAConfigError
from ..fields import FrozenMapping
from . import document, shapes
from .document import Document, Keys
from .problems import RecipeError, near, quoted, wrong
from .template import Template

__all__ = ["FORMATS", "Base", "Data", "Push", "Recipe", "Source", "training_fields"]

# A file's ending -> its format.
FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "txt",
}
Format = Literal["csv", "tsv", "json", "jsonl", "parquet", "txt"]
Task = Literal["causal-lm", "seq2seq", "classification"]

# Fields of TrainingArguments that a recipe says elsewhere, or that would break what `train` promises.
_ELSEWHERE: dict[str, str] = {
    "output_dir": "Write `out:`; checkpoints go into its folder checkpoints.",
    "seed": "Write `seed:` beside `training:`.",
    "resume_from_checkpoint": "Use --resume.",
    "save_only_model": "Leave it out: --resume needs the optimizer's state too.",
    "do_train": "Leave it out: a recipe trains.",
    "do_eval": "Leave it out: a recipe with `data.eval` or `data.eval_fraction` evaluates.",
    "do_predict": "Leave it out.",
    "remove_unused_columns": "Leave it out: only what the model takes is given to it.",
    "label_names": "Leave it out.",
    "fsdp": "Write a training script for several processes.",
    "fsdp_config": "Write a training script for several processes.",
    "deepspeed": "Write a training script for several processes.",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        "Write a section `push:`, and log in with `hf auth login` or HF_TOKEN.",
    ),
}
# (field, least value, whether the least itself is allowed)
_LEAST: tuple[tuple[str, float, bool], ...] = (
    ("num_train_epochs", 0, False),
    ("learning_rate", 0, False),
    ("per_device_train_batch_size", 1, True),
    ("per_device_eval_batch_size", 1, True),
    ("gradient_accumulation_steps", 1, True),
    ("logging_steps", 0, False),
    ("save_steps", 0, False),
    ("save_total_limit", 1, True),
    ("warmup_steps", 0, True),
    ("weight_decay", 0, True),
    ("max_grad_norm", 0, True),
)


_IN_QUOTES = 'Put a text that begins with { or [ in quotes: "{column}".'


class _Section:
    """Checks the type of every field by its annotation, and puts it into its normal form."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value, hint = getattr(self, field.name), hints[field.name]
            if not shapes.fits(value, hint):
                template = isinstance(value, (Mapping, list)) and shapes.fits("", hint)  # prompt: {question}
                raise wrong(field.name, value, shapes.described(hint), _IN_QUOTES if template else None)
            object.__setattr__(self, field.name, shapes.normal(value, hint))
        self._check()

    def _check(self) -> None:
        """What the types do not say."""

    def to_dict(self) -> dict[str, Any]:
        """As a recipe's file says it: plain values, and only what is not the default."""
        return _plain_fields(self)


def _plain_fields(section: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if value != default:
            found[field.name] = _plain(value)
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return _plain_fields(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True, kw_only=True)
class Base(_Section):
    """The model that the adapter is for.

    Args:
        model: a folder (wins), or a model's id on the Hub.
        revision: branch, tag or commit of the id.
        id: of a folder: the id on the Hub of the model that it is a copy of, which the adapter then names as its base.
        dtype: of the base's weights; "auto" is what its files say.
        task: None tells it: classification if `data.label` is there, seq2seq for an encoder-decoder, else causal-lm.
    """

    model: str
    revision: str | None = None
    id: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    task: Task | None = None

    def _check(self) -> None:
        if not self.model.strip():
            raise wrong("model", self.model, "a folder or a model's id on the Hub")


@dataclass(frozen=True, kw_only=True)
class Source(_Section):
    """Where examples are: a file, or a data set on the Hub.

    Args:
        file: CSV, TSV, JSON (a list of objects), JSON lines, Parquet, or text (each line that is not empty is a row
            with one column, text). UTF-8.
        format: of the file; None tells it by the ending.
        columns: names for a CSV's or TSV's columns where the file has no header row.
        quoting: of a CSV or TSV: whether quotes enclose fields; None means true for CSV, false for TSV.
        dataset: a data set's id on the Hub. config, split, revision: of it; the split is "train" (or, for `eval`,
            "validation") unless given.
    """

    file: str | None = None
    format: Format | None = None
    columns: tuple[str, ...] | None = None
    quoting: bool | None = None
    dataset: str | None = None
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    _OF_FILES: ClassVar[tuple[str, ...]] = ("format", "columns", "quoting")
    _OF_SETS: ClassVar[tuple[str, ...]] = ("config", "split", "revision")

    @classmethod
    def of(cls, text: str) -> Source:
        """A path, by its ending, or else a data set's id."""
        if Path(text).suffix.lower() in FORMATS:
            return cls(file=text)
        if not re.fullmatch(r"[\w-]+|\w[\w.-]*/[\w.-]+", text):
            raise RecipeError(
                f"{text!r} is neither a file with an ending that is known nor a data set's id.",
                value=text,
                expected=tuple(FORMATS),
                remedy=f"The endings are {', '.join(FORMATS)}; for another write {{file: …, format: csv}}.",
            )
        return cls(dataset=text)

    def _check(self) -> None:
        if (self.file is None) == (self.dataset is None):
            raise RecipeError("file, dataset: one of the two is needed.", name="file", remedy="Give file or dataset.")
        ours, not_ours = ("file", self._OF_SETS) if self.file is not None else ("dataset", self._OF_FILES)
        for name in not_ours:
            if getattr(self, name) is not None:
                raise RecipeError(
                    f"{name}: {quoted(getattr(self, name))} means nothing for a {ours}.",
                    name=name,
                    remedy=f"Leave {name} out.",
                )
        if self.file is not None and self.kind is None:
            raise wrong("file", self.file, f"a file with one of the endings {', '.join(FORMATS)}", "Give its format.")
        if self.kind not in ("csv", "tsv"):
            for name in ("columns", "quoting"):
                if getattr(self, name) is not None:
                    raise RecipeError(
                        f"{name}: it is for CSV and TSV, and this is {self.kind}.",
                        name=name,
                        remedy=f"Leave {name} out.",
                    )
        if self.columns is not None and (not self.columns or len(set(self.columns)) < len(self.columns)):
            raise wrong("columns", list(self.columns), "a list of different names")

    @property
    def kind(self) -> str | None:
        """The file's format."""
        return self.format or FORMATS.get(Path(self.file or "").suffix.lower())

    @property
    def title(self) -> str:
        """What errors and tables call it."""
        parts = [self.dataset, self.config, self.split, self.revision]
        return self.file if self.file is not None else " ".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Data(_Section):
    """The examples, and what of them is learned. Texts are templates over columns: "{question} {answer}".

    One of four forms: `text` (every token is learned), `prompt` and `completion` (only the completion is),
    `messages` (a column with a chat; only what the assistant says is), or `text` (`pair`) and `label`.

    Args:
        train: where the examples are. eval: where those to evaluate on are.
        eval_fraction: hold out this share of `train` instead. eval_group: rows with the same value of this column
            are held out together. seed: of what is held out and sampled; other than the recipe's, so that runs with
            different seeds are measured on the same examples.
        text, pair, prompt, completion, system: templates. system: with `chat`, what the system says.
        chat: write prompt and completion in the tokenizer's chat format.
        messages: the column of a list of {role, content}.
        label: the column of the class: an index, or one of `labels`.
        labels: the names of the classes, in order; None takes those of the data.
        max_length: tokens of an example; None is 512, or what the base takes if that is less. Longer ones are cut: of
            prompt and completion first the longer, a prompt at its beginning and all else at its end.
        max_train, max_eval: at most so many examples, sampled.
    """

    train: Source
    eval: Source | None = None
    eval_fraction: float | None = None
    eval_group: str | None = None
    seed: int = 0
    text: str | None = None
    pair: str | None = None
    prompt: str | None = None
    completion: str | None = None
    chat: bool = False
    system: str | None = None
    messages: str | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    max_length: int | None = None
    max_train: int | None = None
    max_eval: int | None = None

    _TEMPLATES: ClassVar[tuple[str, ...]] = ("text", "pair", "prompt", "completion")

    def _check(self) -> None:
        if self.eval is not None and self.eval_fraction is not None:
            raise RecipeError(
                "eval_fraction: not together with eval, which names the examples to evaluate on.",
                name="eval_fraction",
                value=self.eval_fraction,
                remedy="Leave one of the two out.",
            )
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise wrong("eval_fraction", self.eval_fraction, "a number between 0 and 1")
        for name in ("max_length", "max_train", "max_eval"):
            value = getattr(self, name)
            least = 8 if name == "max_length" else 1
            if value is not None and value < least:
                raise wrong(name, value, f"an integer of at least {least}")
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise wrong("labels", list(self.labels), "a list of at least two different names")
        self._check_form()
        for name, needed in (
            ("eval_group", "eval_fraction"),
            ("max_eval", "eval_fraction"),
            ("chat", "prompt"),
            ("system", "chat"),
            ("pair", "label"),
            ("labels", "label"),
        ):
            met = getattr(self, needed) or (name == "max_eval" and self.eval is not None)
            if getattr(self, name) and not met:
                raise RecipeError(
                    f"{name}: it means nothing without {needed}.",
                    name=name,
                    value=getattr(self, name),
                    remedy=f"Give {needed}, or leave {name} out.",
                )
        for name in self._TEMPLATES:
            if getattr(self, name) is not None:
                Template.parse(name, getattr(self, name))

    def _check_form(self) -> None:
        given = {name for name in ("text", "prompt", "completion", "messages", "label") if getattr(self, name)}
        forms = {
            "text": {"text"},
            "completion": {"prompt", "completion"},
            "messages": {"messages"},
            "label": {"text", "label"},
        }
        if given not in forms.values():
            raise RecipeError(
                f"{', '.join(sorted(given))} together are no form of example."
                if given
                else "nothing says what an example is.",
                value=sorted(given),
                expected=[sorted(form) for form in forms.values()],
                remedy="Give text, or prompt and completion, or messages, or text and label.",
            )

    @property
    def form(self) -> Literal["text", "completion", "messages", "label"]:
        """What an example is."""
        if self.label is not None:
            return "label"
        if self.messages is not None:
            return "messages"
        return "text" if self.text is not None else "completion"

    def template(self, name: str) -> Template:
        """One of the templates, parsed."""
        return Template.parse(name, getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Push(_Section):
    """Where the adapter is published when it is trained.

    Args:
        repo: "user/name". private, revision, subfolder, message: of the repo and its commit.
    """

    repo: str
    private: bool | None = None
    revision: str | None = None
    subfolder: str | None = None
    message: str | None = None

    def _check(self) -> None:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.repo):
            raise wrong("repo", self.repo, "a repo's id", 'Write "user/name".')


@dataclass(frozen=True, kw_only=True)
class Recipe(_Section):
    """One training run.

    Args:
        base: the model. lora: the adapter. data: the examples. out: the folder that the run writes to.
        training: fields of `transformers.TrainingArguments` by name; what is not said has the defaults of
            `hf_lora.recipe.run.DEFAULTS`, then TrainingArguments' own.
        push: publish the adapter at the end.
        seed: of the adapter's start, the order of the examples and dropout.

    Raises:
        RecipeError: a value that is impossible, or of the wrong type; it quotes the value.
    """

    base: Base
    data: Data
    out: str
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)
    training: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    push: Push | None = None
    seed: int = 0

    def _check(self) -> None:
        if not self.out.strip():
            raise wrong("out", self.out, "a folder")
        if not 0 <= self.seed < 2**32:
            raise wrong("seed", self.seed, "an integer from 0 to 4294967295")
        for name in ("base_model", "revision"):
            if getattr(self.lora, name) is not None:
                raise RecipeError(
                    f"lora.{name}: the base is said in the section base.",
                    name=f"lora.{name}",
                    value=getattr(self.lora, name),
                    remedy=f"Leave lora.{name} out.",
                )
        if self.base.task is not None and (self.base.task == "classification") != (self.data.form == "label"):
            raise RecipeError(
                f"base.task: {self.base.task!r} and the form of the data ({self.data.form}) exclude each other.",
                name="base.task",
                value=self.base.task,
                remedy="Classification needs data.label, and only classification has one.",
            )
        object.__setattr__(self, "training", FrozenMapping(_checked_training(self.training)))

    # ---- reading -----------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike[str] | None, changes: Mapping[Keys, tuple[Any, str]] | None = None) -> Recipe:
        """The recipe in a YAML file, with values of flags put in.

        Files that the recipe names are looked up from its own folder, those of `changes` and `out` from the working
        directory.

        Args:
            path: the file; None for a recipe of `changes` alone.
            changes: keys -> (value, how the flag was written); they win.

        Raises:
            RecipeError: what is wrong, quoting the value, with the line.
        """
        read = Document({}) if path is None else document.read(Path(path))
        if path is not None:
            _anchor(read.content, Path(path).parent)
        return cls.from_document(document.overridden(read, changes or {}))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Recipe:
        """The recipe in plain values, as a file says it. Raises `RecipeError`."""
        return cls.from_document(Document(dict(content)))

    @classmethod
    def from_document(cls, read: Document) -> Recipe:
        """The recipe in a document; errors say where in it. Raises `RecipeError`."""
        content = read.content
        _known(content, cls, (), read)
        for name in ("base", "data", "out"):
            if content.get(name) is None:
                raise RecipeError(
                    f"{name}: it is missing.",
                    name=name,
                    expected=_HINTS[name],
                    remedy=f"Add `{name}:` with {_HINTS[name]}.",
                )
        built: dict[str, Any] = {}
        for name, value in content.items():
            section = _SECTIONS.get(name)
            if value is None:
                continue
            built[name] = value if section is None else _build(section, value, (name,), read)
        return _located(lambda: cls(**built), (), read)


_HINTS = {"base": "the key model", "data": "the keys train and text (or prompt and completion)", "out": "a folder"}
_SECTIONS: dict[str, type] = {"base": Base, "lora": LoRAConfig, "data": Data, "push": Push}


def _build(cls: type, value: Any, keys: Keys, read: Document) -> Any:
    """A section from plain values."""
    if cls is Source and isinstance(value, str):
        return _located(lambda: Source.of(value), keys, read)
    if not isinstance(value, Mapping):
        what = "a mapping" if cls is not Source else "a file, a data set's id, or a mapping"
        raise _at(wrong(keys[-1], value, what, f"Its keys are {', '.join(_names(cls))}."), keys[:-1], read)
    if cls is not LoRAConfig:  # which names PEFT's words for its fields too
        _known(value, cls, keys, read)
    given = {name: item for name, item in value.items() if item is not None}
    if cls is Data:
        given |= {name: _build(Source, given[name], (*keys, name), read) for name in ("train", "eval") if name in given}
    missing = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in given
    ]
    if missing:
        raise _at(
            RecipeError(f"{missing[0]}: it is missing.", name=missing[0], remedy=f"Add `{missing[0]}:`."), keys, read
        )
    return _located(lambda: cls(**given), keys, read)


def _names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _known(content: Mapping[str, Any], cls: type, keys: Keys, read: Document) -> None:
    names = _names(cls)
    for key in content:
        if key not in names:
            section = ".".join(keys) or "a recipe"
            raise _at(
                RecipeError(
                    f"{key}: {section} has no such key.",
                    name=str(key),
                    value=content[key],
                    expected=names,
                    remedy=near(str(key), names),
                ),
                keys,
                read,
            )


def _located(make: Any, keys: Keys, read: Document) -> Any:
    try:
        return make()
    except (RecipeError, LoRAConfigError) as error:
        raise _at(error, keys, read) from None


def _at(error: RecipeError | LoRAConfigError, keys: Keys, read: Document) -> RecipeError:
    """The same error with the section's name and the place put before it. An error's message begins with the key."""
    name = error.name or ""
    place = read.place((*keys, *name.split("."))) if name else read.place(keys)
    dotted = ".".join(keys)
    joint = "." if name and error.message.startswith(name) else ": "
    message = f"{dotted}{joint}{error.message}" if dotted else error.message
    return RecipeError(
        f"{place}: {message}" if place else message,
        name=".".join((*keys, name)) if name else dotted,
        value=error.value,
        expected=error.expected,
        remedy=error.remedy,
        facts=error.facts,
    )


def _anchor(content: dict[str, Any], folder: Path) -> None:
    """Make files relative to the recipe's folder. What has another type is left for the checks to refuse."""
    data, base = content.get("data"), content.get("base")
    if isinstance(data, dict):
        for name in ("train", "eval"):
            source = data.get(name)
            if isinstance(source, str) and Path(source).suffix.lower() in FORMATS:
                data[name] = os.path.normpath(folder / Path(source).expanduser())
            elif isinstance(source, dict) and isinstance(source.get("file"), str):
                source["file"] = os.path.normpath(folder / Path(source["file"]).expanduser())
    if isinstance(base, dict) and isinstance(base.get("model"), str) and base["model"].startswith((".", "~")):
        base["model"] = os.path.normpath(folder / Path(base["model"]).expanduser())


@functools.cache
def training_fields() -> Mapping[str, Any]:
    """The fields of `TrainingArguments` with their types."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}


def _checked_training(given: Mapping[str, Any]) -> dict[str, Any]:
    known = training_fields() if given else {}
    allowed = [name for name in known if name not in _ELSEWHERE]
    for name, value in given.items():
        if not isinstance(name, str):
            raise wrong("training", dict(given), "a mapping from names")
        at = f"training.{name}"
        if name in _ELSEWHERE:
            raise RecipeError(f"{at}: it is not said here.", name=at, value=value, remedy=_ELSEWHERE[name])
        if name not in known:
            remedy = near(name, allowed, listed="The keys are the fields of transformers.TrainingArguments")
            raise RecipeError(
                f"{at}: TrainingArguments has no such field.", name=at, value=value, expected=allowed, remedy=remedy
            )
        if not shapes.fits(value, known[name]):
            raise wrong(at, value, shapes.described(known[name]))
    for name, least, inclusive in _LEAST:
        value = given.get(name)
        if value is not None and not (value >= least if inclusive else value > least):
            raise wrong(f"training.{name}", value, f"{'at least' if inclusive else 'more than'} {least}")
    steps = given.get("max_steps", -1)
    if steps == 0 or steps < -1:
        raise wrong("training.max_steps", steps, "at least 1", "Leave it out to train by epochs.")
    # max_steps: -1 is "by epochs", the default: as if it was not said.
    return {name: _plain(value) for name, value in given.items() if (name, value) != ("max_steps", -1)}
