"""What a model card says of one adapter: its metadata, its row in the list, and its Markdown.

Whatever comes from a file, a config or a log is escaped: in Markdown by `escape` or `code`, in code by `quoted`.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .bases import is_hub_id, is_local_path
from .extras import EXTRAS, asked_for
from .facts import RunFacts
from .forms import forms_asked
from .tokenfields import ROWS
from .values import AdapterValue

__all__ = ["AdapterFacts", "escape", "facts_of", "index"]

# task type of PEFT → the Auto class that loads the base, the Hub's pipeline tag
_TASKS: dict[str, tuple[str, str | None]] = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
_AUDIO = ("AutoModelForAudioClassification", "audio-classification")
# how the base's class ends → the same; the first that fits
_CLASSES: dict[str, tuple[str, str | None]] = {
    "Wav2Vec2ForSequenceClassification": _AUDIO,
    "HubertForSequenceClassification": _AUDIO,
    "WavLMForSequenceClassification": _AUDIO,
    "Data2VecAudioForSequenceClassification": _AUDIO,
    "ForCausalLM": _TASKS["CAUSAL_LM"],
    "LMHeadModel": _TASKS["CAUSAL_LM"],
    "ForSequenceClassification": _TASKS["SEQ_CLS"],
    "ForTokenClassification": _TASKS["TOKEN_CLS"],
    "ForQuestionAnswering": _TASKS["QUESTION_ANS"],
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "ForAudioClassification": _AUDIO,
    "ForObjectDetection": ("AutoModelForObjectDetection", "object-detection"),
    "ForSemanticSegmentation": ("AutoModelForSemanticSegmentation", "image-segmentation"),
    "ForCTC": ("AutoModelForCTC", "automatic-speech-recognition"),
    "T5ForConditionalGeneration": _TASKS["SEQ_2_SEQ_LM"],
    "BartForConditionalGeneration": _TASKS["SEQ_2_SEQ_LM"],
    "WhisperForConditionalGeneration": ("AutoModelForSpeechSeq2Seq", "automatic-speech-recognition"),
}
_UNKNOWN: tuple[str, str | None] = ("AutoModel", None)

_HEADS = ("score", "classifier", "classification_head")
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
_POINTS = 8  # of a curve
_LONGEST = 300  # characters of one value in a table

# ---- escaping --------------------------------------------------------------------------------------------------------


def clean(text: object) -> str:
    """One line of printable text, not too long, without half characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    line = line.encode("utf-8", "replace").decode()
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 1]}…"


def escape(text: object) -> str:
    """`text` as it reads, in a line or table of Markdown: no markup, HTML, cell or comment begins in it."""
    return re.sub(
        r"[^\w .,;%()/=…·√→–-]|_|^[-=. ]|(?<=-)-|(?<=\d)[.)](?= |$)", lambda m: f"&#{ord(m[0])};", clean(text)
    )


def code(text: object) -> str:
    """`text` as code where that needs no escape, else as `escape`."""
    line = clean(text)
    return f"`{line}`" if re.fullmatch(r"[\w.:/+=,@()\[\] -]*\w[\w.:/+=,@()\[\] -]*", line) else escape(line)


def quoted(text: str) -> str:
    """`text` as a string of Python, on one line."""
    return json.dumps(text)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _range(values: Iterable[float]) -> str:
    found = sorted(set(values))
    return _number(found[0]) if len(found) == 1 else f"{_number(found[0])} to {_number(found[-1])}"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


# ---- the facts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterFacts:
    """What the card says of one adapter."""

    value: AdapterValue
    run: RunFacts | None
    base: str
    repo_id: str
    subfolder: str
    task: tuple[str, str | None]
    quantised: str | None = None
    outside: str | None = None  # the base's class, module and all, where it is none of transformers

    @property
    def name(self) -> str:
        """What a server may call it."""
        return (self.subfolder or self.repo_id).rpartition("/")[2]

    def metadata(self) -> dict[str, Any]:
        """What it puts into the README's metadata, as `huggingface_hub.ModelCardData` writes it."""
        from huggingface_hub import EvalResult, ModelCardData

        pipeline = self.task[1]
        datasets = [clean(name) for name in (self.run.datasets if self.run else ()) if is_hub_id(name)]
        dataset = datasets[0] if len(datasets) == 1 else "unknown"
        results = [
            EvalResult(
                task_type=pipeline or "other",
                dataset_type=dataset,
                dataset_name=dataset,
                metric_type=clean(metric),
                metric_name=clean(metric),
                metric_value=value,
            )
            for metric, value in self._metrics().items()
        ]
        name = f"{self.repo_id.rpartition('/')[2]}{f'/{self.subfolder}' if self.subfolder else ''}"
        data = ModelCardData(
            base_model=self.base,
            base_model_relation="adapter",
            library_name="peft",
            tags=["lora", "hf_lora", *([pipeline] if pipeline else [])],
            pipeline_tag=pipeline,
            datasets=datasets or None,
            model_name=clean(name) if results else None,
            eval_results=results or None,
        )
        return {key: item for key, item in data.to_dict().items() if item is not None}

    def _metrics(self) -> dict[str, float]:
        """The measurements at the best evaluation, or at the last one: names without Trainer's "eval_"."""
        if self.run is None or not self.run.evaluations:
            return {}
        step = self.run.best[2] if self.run.best else self.run.evaluations[-1][0]
        found = [metrics for at, metrics in self.run.evaluations if at == step] or [self.run.evaluations[-1][1]]
        named = {name.removeprefix("eval_"): float(value) for name, value in found[-1].items()}
        return {name: value for name, value in named.items() if math.isfinite(value) and name != "epoch"}

    def listed(self) -> dict[str, Any]:
        """What the list of a repo's adapters says of it."""
        return {"base": self.base, "rank": self.value.config.r, "parameters": self.value.num_parameters}

    # -- Markdown --

    def text(self) -> str:
        """The section, less its markers."""
        title = f"Adapter {escape(self.subfolder)}" if self.subfolder else "LoRA adapter"
        parts = [f"## {title}", self._intro(), "### How to use it", self._use(), "### Configuration", self._config()]
        if self.run is not None:
            parts += ["### Training", *self._training(self.run)]
        if self.run is not None and self.run.versions:
            rows = [[escape(name), code(version)] for name, version in sorted(self.run.versions.items())]
            parts += ["### Versions", _table(["package", "version"], rows)]
        return "\n\n".join(parts)

    def _intro(self) -> str:
        count = len(self.value.factors)
        layers = f"{count} layer{'' if count == 1 else 's'}"
        return (
            f"A LoRA of rank {self.value.config.r} for [{escape(self.base)}](https://huggingface.co/{self.base}): "
            f"{self.value.num_parameters:,} parameters in {layers}, in PEFT's format."
        )

    def _use(self) -> str:
        auto = self.task[0]
        where = f", subfolder={quoted(self.subfolder)}" if self.subfolder else ""
        labels = f", num_labels={self._labels()}, ignore_mismatched_sizes=True" if self._labels() else ""
        load = f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({quoted(self.base)}{labels})"
        ours = f"import hf_lora\n{load}\nmodel.load_lora({quoted(self.repo_id)}{where})"
        if self.outside:
            load = f"\nmodel = ...  # {self.outside}, with the weights of {self.base}"
            ours = f"import hf_lora\n{load}\nhf_lora.load_lora(model, {quoted(self.repo_id)}{where})"
        pull = f"PeftModel.from_pretrained(model, {quoted(self.repo_id)}{where})"
        theirs = f"from peft import PeftModel\n{load}\nmodel = {pull}"
        parts = ["With hf_lora:", _fenced("python", ours), "With PEFT:", _fenced("python", theirs)]
        return "\n\n".join([*parts, *self._vllm()])

    def _labels(self) -> int | None:
        """How many labels the classifier has that the adapter brings: the base has none, or one of another size."""
        if not self.task[0].endswith("Classification"):
            return None
        heads = [s for path, s in self.value.modules.items() if path.rpartition(".")[2] in _HEADS]
        weights = [head.get("out_proj.weight", head.get("weight")) for head in heads]
        return len(weights[0]) if len(weights) == 1 and weights[0] is not None else None

    def _vllm(self) -> list[str]:
        """How vLLM serves it; nothing for what vLLM does not serve as a LoRA."""
        value = self.value
        rank = max(factors.rank for factors in value.factors.values())
        fits = next((most for most in _VLLM_RANKS if most >= rank), None)
        if self.task[1] != "text-generation":
            return []
        if value.config.alora_invocation_tokens is not None:
            return ["vLLM does not serve it: its LoRA acts on every token, this one from its invocation tokens on."]
        if value.biases or value.modules or asked_for(value.config) or forms_asked(value.config) or fits is None:
            return ["vLLM does not serve it as a LoRA: it holds more than factors of up to rank 512. Merge it first."]
        where, fetch = self.repo_id, ""
        if self.subfolder:
            where = "adapters/" + self.subfolder
            fetch = f"hf download {self.repo_id} --include {shlex.quote(self.subfolder + '/*')} --local-dir adapters\n"
        lora = shlex.quote(f"{self.name}={where}")
        serve = f"vllm serve {self.base} --enable-lora --max-lora-rank {fits} --lora-modules {lora}"
        return ["With vLLM:", _fenced("bash", fetch + serve)]

    def _config(self) -> str:
        value, config = self.value, self.value.config
        factors = list(value.factors.values())
        tokens = {f"{len(state[ROWS])} rows of {path}" for path, state in value.modules.items() if ROWS in state}
        whole = [path for path, state in value.modules.items() if ROWS not in state]
        targets = config.target_modules
        variants = [*(EXTRAS[name].field for name in asked_for(config)), *forms_asked(config)]
        shown = ", ".join(map(code, targets)) if isinstance(targets, (list, tuple)) else code(targets or "by default")
        ranks = set(config.resolve(value.factors).values()) or {(config.r, config.alpha or config.r)}
        rows = [
            ["base model", code(self.base)],
            *([["base quantised", code(self.quantised)]] if self.quantised else []),
            ["rank", _range(r for r, _ in ranks)],
            ["alpha", _range(alpha for _, alpha in ranks)],
            ["scaling", f"{_range(f.scaling for f in factors)} ({'α/√r' if config.use_rslora else 'α/r'})"],
            ["target modules", shown],
            ["layers", str(len(factors))],
            *([["variants", ", ".join(map(code, variants))]] if variants else []),
            *(
                [["acts from", f"the token ids {code(list(config.alora_invocation_tokens))} on (aLoRA)"]]
                if config.alora_invocation_tokens
                else []
            ),
            ["dropout", _number(config.dropout)],
            ["biases trained", code(config.bias)],
            ["modules trained whole", ", ".join(map(code, sorted(whole))) or "none"],
            *([["tokens that train", ", ".join(map(code, sorted(tokens)))]] if tokens else []),
            ["parameters", f"{value.num_parameters:,}"],
            ["size", _bytes(value.nbytes)],
            ["dtype", ", ".join(sorted({str(f.A.dtype).removeprefix("torch.") for f in factors}))],
        ]
        if config.task_type:
            rows.insert(1, ["task type", code(config.task_type)])
        return _table(["", ""], rows)

    def _training(self, run: RunFacts) -> list[str]:
        rows = [["steps", f"{run.steps:,}"]]
        rows += [["epochs", _number(run.epochs)]] if run.epochs is not None else []
        rows += [["wall time", f"{run.seconds:,.0f} s"]] if run.seconds is not None else []
        if run.trainable and run.total:
            rows.append(["trainable", f"{run.trainable:,} of {run.total:,} ({run.trainable / run.total:.3%})"])
        settings = {clean(name): item for name, item in run.settings.items() if not is_local_path(str(item).strip())}
        rows += [[escape(name), code(item)] for name, item in sorted(settings.items())]
        rows += (
            [["data sets", ", ".join(code(name) for name in run.datasets if is_hub_id(name))]] if run.datasets else []
        )
        parts = [_table(["", ""], rows)]
        curve = self._curve(run)
        parts += [curve] if curve else []
        if run.best is not None:
            metric, best, step = run.best
            parts.append(f"Best: {code(metric)} {_number(best)} at step {step:,}.")
        return parts

    def _curve(self, run: RunFacts) -> str:
        """A few points of the losses: training loss where it was logged last before the step."""
        metrics = list(dict.fromkeys(name for _, found in run.evaluations for name in found))[:4]
        measured = dict(run.evaluations)
        losses = dict(run.losses)
        if not losses and not measured:
            return ""
        steps = _spread(sorted(measured or losses))
        rows = []
        for step in steps:
            before = [at for at in losses if at <= step]
            loss = _number(losses[max(before)]) if before else "–"
            found = measured.get(step, {})
            rows.append([f"{step:,}", loss, *(_number(found[m]) if m in found else "–" for m in metrics)])
        return _table(["step", "training loss", *map(code, metrics)], rows)


def _spread(steps: Sequence[int]) -> list[int]:
    """At most `_POINTS` of the steps, evenly, the first and the last among them."""
    if len(steps) <= _POINTS:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (_POINTS - 1))] for i in range(_POINTS)]


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def facts_of(
    value: AdapterValue,
    run: RunFacts | None,
    base: str,
    repo_id: str | None,
    subfolder: str,
    architecture: str | None,
    quantised: str | None = None,
) -> AdapterFacts:
    """Gather what the card says. `architecture`: a class of transformers; None takes what the config says of it.

    The class decides, for a task type such as CAUSAL_LM is also given to models that its Auto class does not know.
    """
    found = value.config.peft_fields.get("auto_mapping")
    mapping = found if isinstance(found, Mapping) else {}
    said = architecture or str(mapping.get("base_model_class") or "")
    by_task = _TASKS.get(value.config.task_type or "")
    task = next((found for end, found in _CLASSES.items() if said.endswith(end)), by_task or _UNKNOWN)
    stock = architecture is not None or str(mapping.get("parent_library")).startswith("transformers.models.")
    if stock and said.isidentifier() and not said.endswith(tuple(_CLASSES)):
        task = (said, task[1])
    outside = None if stock else _outside(mapping)
    return AdapterFacts(value, run, base, repo_id or "user/name", subfolder, task, quantised, outside)


def _outside(mapping: Mapping[str, Any]) -> str | None:
    """The class that an adapter's config names, if it is of another library than transformers."""
    names = [mapping.get("parent_library"), mapping.get("base_model_class")]
    path = ".".join(name for name in names if isinstance(name, str))
    named = all(isinstance(name, str) and name for name in names) and all(map(str.isidentifier, path.split(".")))
    return path if named and not path.startswith("transformers") and len(path) < _LONGEST else None


def index(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """The list of a repo's adapters: (folder, what `listed` gave)."""
    lines = [
        [
            escape(folder) if folder else "(root)",
            code(facts.get("base", "")),
            escape(facts.get("rank", "")),
            f"{facts['parameters']:,}" if isinstance(facts.get("parameters"), int) else "",
        ]
        for folder, facts in rows
    ]
    return "## Adapters in this repository\n\n" + _table(["folder", "base model", "rank", "parameters"], lines)
