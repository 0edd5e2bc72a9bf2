"""Features of the stock Trainer × three ways to train a LoRA with it, each cell from a run.

    python recipes/compatibility/trainer_features.py [--write docs/pages/trainer-features.md] [--only WORD]

The ways: hf_lora's `model.add_lora`, peft's `get_peft_model`, transformers' `model.add_adapter(peft.LoraConfig)`. Each
cell trains a random Llama of two layers (width 32; BERT and T5 where a row says so) for a few steps on the CPU, and
checks the result against something that no way computed: an uninterrupted run, a file's tensors, or a run with other
settings. Needs hf_lora[test] (peft, accelerate).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


# ---- models and runs -------------------------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "pad_token_id": 0}
MODELS: dict[str, tuple[str, str, dict[str, Any], list[str]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_SIZES, "num_key_value_heads": 2}, ["q_proj", "v_proj"]),
    "bert": ("BertConfig", "BertForSequenceClassification", {**_SIZES, "num_labels": 3}, ["query", "value"]),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}, ["q", "v"]),
}


@dataclass(frozen=True)
class Setup:
    """A model and the adapters on it."""

    family: str = "llama"
    config: dict[str, Any] = field(default_factory=dict)
    trained: tuple[str, ...] = ("default",)
    frozen: tuple[str, ...] = ()
    over: bool = False  # the frozen ones are active too
    dtype: torch.dtype = torch.float32

    def base(self) -> Any:
        """The model without a LoRA; the same weights each time."""
        import transformers

        config, model, fields, _ = MODELS[self.family]
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**fields)).to(self.dtype)

    @property
    def fields(self) -> dict[str, Any]:
        """The LoRA's config, in words that all three ways share."""
        return {"r": 4, "target_modules": MODELS[self.family][3], **self.config}


class HfLora:
    """hf_lora: `model.add_lora(LoRAConfig(...))`."""

    title = "hf_lora"

    def build(self, setup: Setup, seed: int) -> Any:
        import hf_lora

        model = setup.base()
        for i, name in enumerate((*setup.frozen, *setup.trained)):
            torch.manual_seed(100 + i if name in setup.frozen else seed + i)
            model.add_lora(hf_lora.LoRAConfig(**setup.fields, alpha=8), name)
            _fill(model, name in setup.frozen)
        model.train_lora(setup.trained)
        model.set_lora([*setup.trained, *(setup.frozen if setup.over else ())])
        return model

    def tensors(self, model: Any, name: str) -> Tensors:
        return dict(model.lora_state_dict(name))


class Peft:
    """peft: `get_peft_model(model, LoraConfig(...))`; a second adapter by `add_adapter`, several by `set_adapter`."""

    title = "PeftModel"

    def build(self, setup: Setup, seed: int) -> Any:
        import peft

        model: Any = setup.base()
        for i, name in enumerate((*setup.frozen, *setup.trained)):
            torch.manual_seed(100 + i if name in setup.frozen else seed + i)
            config = peft.LoraConfig(**setup.fields, lora_alpha=8)
            if isinstance(model, peft.PeftModel):
                model.add_adapter(name, config)
            else:
                model = peft.get_peft_model(model, config, adapter_name=name)
            model.set_adapter(name)
            _fill(model, name in setup.frozen)
        active = [*setup.trained, *(setup.frozen if setup.over else ())]
        if len(active) > 1:
            model.base_model.set_adapter(active)
        for path, parameter in model.named_parameters():
            if any(f".{name}." in path or path.endswith(f".{name}") for name in setup.frozen):
                parameter.requires_grad_(False)
        return model

    def tensors(self, model: Any, name: str) -> Tensors:
        import peft

        return dict(peft.get_peft_model_state_dict(model, adapter_name=name))


class AddAdapter:
    """transformers: `model.add_adapter(peft.LoraConfig(...), name)`, `set_adapter`."""

    title = "add_adapter"

    def build(self, setup: Setup, seed: int) -> Any:
        import peft

        model = setup.base()
        for i, name in enumerate((*setup.frozen, *setup.trained)):
            torch.manual_seed(100 + i if name in setup.frozen else seed + i)
            model.add_adapter(peft.LoraConfig(**setup.fields, lora_alpha=8), name)
            model.set_adapter(name)
            _fill(model, name in setup.frozen)
        model.set_adapter([*setup.trained, *(setup.frozen if setup.over else ())])
        for path, parameter in model.named_parameters():
            if any(f".{name}." in path for name in setup.frozen):
                parameter.requires_grad_(False)
            elif any(f".{name}." in path for name in setup.trained):
                parameter.requires_grad_(True)
        return model

    def tensors(self, model: Any, name: str) -> Tensors:
        return dict(model.get_adapter_state_dict(name))


WAYS: dict[str, Any] = {way.title: way for way in (HfLora(), Peft(), AddAdapter())}


def _fill(model: Any, frozen: bool) -> None:
    """Give a frozen adapter values that matter; B is zero in a new one."""
    for path, parameter in model.named_parameters():
        if frozen and parameter.requires_grad and "lora" in path:
            parameter.data.normal_(0, 0.1)


def rows(setup: Setup, n: int = 20) -> list[dict[str, torch.Tensor]]:
    """Random tokens; the labels are the tokens, or one of three classes."""
    ids = torch.randint(3, 64, (n, 9), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row.sum() % 3 if setup.family == "bert" else row} for row in ids]


STEPS = 6


class Run:
    """One model, one Trainer."""

    def __init__(self, way: Any, setup: Setup, folder: Path, *, seed: int = 3, **options: Any) -> None:
        import transformers

        self.way, self.setup, self.folder = way, setup, folder
        self.model = way.build(setup, seed)
        seq2seq = setup.family == "t5"
        arguments = transformers.Seq2SeqTrainingArguments if seq2seq else transformers.TrainingArguments
        fixed: dict[str, Any] = {
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 5,
            "label_names": ["labels"],
        }
        callbacks = options.pop("callbacks", None)
        given = arguments(str(folder), **{**fixed, **options})
        trainer = transformers.Seq2SeqTrainer if seq2seq else transformers.Trainer
        data = rows(setup)
        self.trainer = trainer(self.model, given, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks)

    def train(self, resume: Any = None) -> Run:
        """Train; the run itself."""
        self.trainer.train(resume_from_checkpoint=resume)
        return self

    @property
    def losses(self) -> list[float]:
        """What was logged, step by step."""
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]

    def adapter(self, name: str | None = None) -> Tensors:
        """The adapter's tensors, under names that the three ways and their files share."""
        return plain(self.way.tensors(self.model, name or self.setup.trained[0]))

    def adapters(self) -> dict[str, Tensors]:
        """All adapters."""
        return {name: self.adapter(name) for name in (*self.setup.frozen, *self.setup.trained)}

    def base(self) -> str:
        """A digest of every tensor that belongs to no adapter."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.model.state_dict().items()):
            trained = self.setup.config.get("bias") and key.endswith("bias")  # peft trains these in place
            if "lora_" not in key and "modules_to_save" not in key and not trained:
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def plain(tensors: Tensors) -> Tensors:
    """Without a prefix and a part that names the adapter; detached copies."""
    return {re.sub(r"^base_model\.model\.", "", key): t.detach().clone() for key, t in tensors.items()}


def files(checkpoint: Path) -> list[Tensors]:
    """Every adapter in a checkpoint, as safetensors alone reads it."""
    return [plain(load_file(path)) for path in sorted(checkpoint.rglob("adapter_model.safetensors"))]


def same(mine: Any, other: Any) -> bool:
    """Tensors equal bit by bit, under the same names."""
    if isinstance(mine, torch.Tensor):
        return torch.equal(mine, other)
    return mine.keys() == other.keys() and all(same(mine[key], other[key]) for key in mine)


def require(condition: bool, otherwise: str) -> None:
    """Fail the cell unless `condition`."""
    if not condition:
        raise AssertionError(otherwise)


# ---- features --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Feature:
    """A row of the table."""

    name: str
    check: str  # what the cell was compared with
    play: Callable[[Any, Path], None]
    group: str = ""


FEATURES: list[Feature] = []


def feature(group: str, name: str, check: str) -> Callable[[Callable[[Any, Path], None]], Callable[[Any, Path], None]]:
    """Add a row."""

    def add(play: Callable[[Any, Path], None]) -> Callable[[Any, Path], None]:
        FEATURES.append(Feature(name, check, play, group))
        return play

    return add


def resumes(way: Any, folder: Path, setup: Setup, resume: Any = None, **options: Any) -> Run:
    """Stop at step 4 of 6 and resume in a model with other first values: as if never stopped, bit by bit."""
    whole = Run(way, setup, folder / "whole", **options).train()
    again = Run(way, setup, folder / "again", seed=30, **options)
    base = again.base()
    again.train(str(folder / "whole" / "checkpoint-4"))
    require(again.losses == whole.losses, f"losses {again.losses[4:]} after resuming, {whole.losses[4:]} uninterrupted")
    require(same(again.adapters(), whole.adapters()), "the adapter differs from the uninterrupted run's")
    require(again.base() == base, "the base has changed")
    return whole


@feature("Basics", "train", "the adapter moved, the base did not (digest of all its bits)")
def _trains(way: Any, folder: Path) -> None:
    run = Run(way, Setup(), folder)
    base, before = run.base(), run.adapter()
    run.train()
    after = run.adapter()
    require(run.base() == base, "the base has changed")
    require(all(not torch.equal(after[key], before[key]) for key in after), "a factor has not moved")


@feature("Basics", "checkpoints hold the adapter alone", "their files; the tensors in them are the model's")
def _adapter_alone(way: Any, folder: Path) -> None:
    run = Run(way, Setup(), folder).train()
    found = {path.name for path in (folder / "checkpoint-6").iterdir() if path.suffix in (".safetensors", ".index")}
    require(found == {"adapter_model.safetensors"}, f"it holds {sorted(found)}")
    require(same(files(folder / "checkpoint-6")[0], run.adapter()), "the file differs from the model")


@feature("Basics", "evaluate and predict", "the loss and logits of the model itself")
def _evaluates(way: Any, folder: Path) -> None:
    run = Run(way, Setup(), folder).train()
    data = rows(run.setup)[:8]
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    run.model.eval()
    with torch.no_grad():
        expected = run.model(**batch)
    require(abs(run.trainer.evaluate()["eval_loss"] - float(expected.loss)) < 1e-5, "another loss")
    found = torch.as_tensor(run.trainer.predict(data).predictions)
    require(bool((found - expected.logits).abs().max() < 1e-5), "other logits")


RESUMED: dict[str, tuple[Setup, dict[str, Any]]] = {
    "resume": (Setup(), {}),
    "resume, dropout in the adapter": (Setup(config={"lora_dropout": 0.1}), {}),
    "resume, a head trained whole (modules_to_save)": (Setup(config={"modules_to_save": ["lm_head"]}), {}),
    "resume, biases trained": (Setup("bert", {"bias": "lora_only"}), {}),
    "resume, an embedding as target": (Setup(config={"target_modules": ["embed_tokens", "q_proj"]}), {}),
    "resume, a classifier with a new head": (Setup("bert", {"task_type": "SEQ_CLS"}), {}),
    "resume, a frozen adapter resident": (Setup(frozen=("other",)), {}),
    "resume, training over an active frozen adapter": (Setup(frozen=("other",), over=True), {}),
    "resume, two adapters train": (Setup(trained=("first", "second")), {}),
    "resume, a bf16 base": (Setup(dtype=torch.bfloat16), {}),
    "resume, bf16=True (autocast)": (Setup(), {"bf16": True}),
    "resume, gradient accumulation": (Setup(), {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}),
    "resume, cosine schedule with warmup, weight decay": (
        Setup(),
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
    ),
    "resume, tight max_grad_norm": (Setup(), {"max_grad_norm": 1e-3}),
    "resume, NEFTune": (Setup(), {"neftune_noise_alpha": 5.0}),
    "resume, label smoothing": (Setup(), {"label_smoothing_factor": 0.1}),
    "resume, torch_compile": (Setup(), {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    "resume, checkpoints at the ends of epochs": (
        Setup(),
        {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch", "per_device_train_batch_size": 10},
    ),
}


def _resuming(setup: Setup, options: dict[str, Any]) -> Callable[[Any, Path], None]:
    def play(way: Any, folder: Path) -> None:
        own = dict(setup.config)
        if "lora_dropout" in own and way.title == "hf_lora":  # the one word that differs
            own["dropout"] = own.pop("lora_dropout")
        resumes(way, folder, Setup(**{**vars(setup), "config": own}), **options)

    return play


for _name, (_setup, _options) in RESUMED.items():
    feature("Resume", _name, "losses and adapter equal those of an uninterrupted run, bit by bit")(
        _resuming(_setup, _options)
    )


@feature("Resume", "resume_from_checkpoint=True", "equal to an uninterrupted run, bit by bit")
def _resumes_newest(way: Any, folder: Path) -> None:
    whole = Run(way, Setup(), folder / "whole").train()
    shutil.copytree(folder / "whole", folder / "run", ignore=shutil.ignore_patterns("checkpoint-6"))
    again = Run(way, Setup(), folder / "run", seed=30).train(True)
    require(again.losses == whole.losses and same(again.adapter(), whole.adapter()), "differs")


@feature("Resume", "the newest checkpoint is half written, resume_from_checkpoint=True", "ends as an uninterrupted run")
def _half_written(way: Any, folder: Path) -> None:
    whole = Run(way, Setup(), folder / "whole").train()
    shutil.copytree(folder / "whole", folder / "run", ignore=shutil.ignore_patterns("checkpoint-6"))
    for name in ("trainer_state.json", "rng_state.pth", "scheduler.pt"):  # killed while optimizer.pt was written
        (folder / "run" / "checkpoint-4" / name).unlink()
    optimizer = folder / "run" / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    again = Run(way, Setup(), folder / "run", seed=30).train(True)
    require(again.losses == whole.losses and same(again.adapter(), whole.adapter()), "differs")


@feature("Resume", "optimizer.pt is missing", "refused; not a new optimizer without a word")
def _no_optimizer(way: Any, folder: Path) -> None:
    Run(way, Setup(), folder / "whole").train()
    (folder / "whole" / "checkpoint-4" / "optimizer.pt").unlink()
    again = Run(way, Setup(), folder / "again", seed=30)
    try:
        again.train(str(folder / "whole" / "checkpoint-4"))
    except (ValueError, OSError) as error:
        if "optimizer.pt" not in str(error):
            raise
        return
    raise AssertionError("it trains on, with a new optimizer")


@feature("Resume", "auto_find_batch_size, out of memory at step 3", "equal to a run that began with the smaller batch")
def _out_of_memory(way: Any, folder: Path) -> None:
    small = Run(way, Setup(), folder / "small", per_device_train_batch_size=3, auto_find_batch_size=True).train()
    run = Run(way, Setup(), folder / "run", auto_find_batch_size=True)
    seen = 0

    def needs(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal seen
        seen += 1
        if len(kwargs["input_ids"]) > 3 and seen > 2:
            torch.empty(1 << 60)

    run.model.register_forward_pre_hook(needs, with_kwargs=True)
    run.train()
    require(run.trainer._train_batch_size == 3, "another batch size")
    require(run.losses == small.losses and same(run.adapter(), small.adapter()), "it goes on with half-trained weights")


WORST_IS_BEST = {  # the loss falls, so the first checkpoint is the "best"
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}


def _best(way: Any, folder: Path, setup: Setup) -> None:
    run = Run(way, setup, folder, **WORST_IS_BEST).train()
    best = folder / "checkpoint-2"
    require(Path(run.trainer.state.best_model_checkpoint) == best, "the best is not checkpoint-2")
    found = [run.adapter(name) for name in sorted(setup.trained)]
    expected = files(best)
    require(len(expected) == len(found), f"the checkpoint holds {len(expected)} adapter(s)")
    require(all(map(same, found, expected)), "the weights are not the best checkpoint's")
    require(not same(found[0], files(folder / "checkpoint-6")[0]), "best and last are the same")


@feature("Checkpoints", "load_best_model_at_end, best ≠ last", "the weights are those in the best checkpoint's file")
def _best_of_one(way: Any, folder: Path) -> None:
    _best(way, folder, Setup())


@feature("Checkpoints", "load_best_model_at_end, two adapters train", "both are those in the best checkpoint's files")
def _best_of_two(way: Any, folder: Path) -> None:
    _best(way, folder, Setup(trained=("first", "second")))


@feature("Checkpoints", "save_total_limit with the best kept", "the folders that are left")
def _limit(way: Any, folder: Path) -> None:
    Run(way, Setup(), folder, max_steps=8, save_total_limit=2, **WORST_IS_BEST).train()
    left = sorted(path.name for path in folder.glob("checkpoint-*"))
    require(left == ["checkpoint-2", "checkpoint-8"], f"left: {left}")


@feature("Checkpoints", "save_only_model", "the files; the adapter in them is the model's")
def _only_model(way: Any, folder: Path) -> None:
    run = Run(way, Setup(), folder, save_only_model=True).train()
    found = {path.name for path in (folder / "checkpoint-6").iterdir()}
    require(not found & {"optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"}, f"{sorted(found)}")
    require(same(files(folder / "checkpoint-6")[0], run.adapter()), "the file differs from the model")


@feature("Checkpoints", "a checkpoint loads with peft", "its logits on the base are the trained model's")
def _peft_reads(way: Any, folder: Path) -> None:
    import peft

    run = Run(way, Setup(), folder).train()
    batch = torch.stack([row["input_ids"] for row in rows(run.setup)[:4]])
    run.model.eval()
    again = peft.PeftModel.from_pretrained(Setup().base(), folder / "checkpoint-6").eval()
    with torch.no_grad():
        apart = (again(input_ids=batch).logits - run.model(input_ids=batch).logits).abs().max()
    require(bool(apart < 1e-5), f"logits {float(apart):.1e} apart")


def _checkpointing(reentrant: bool) -> Callable[[Any, Path], None]:
    def play(way: Any, folder: Path) -> None:
        import transformers

        word = "activation" if hasattr(transformers.TrainingArguments, "activation_checkpointing") else "gradient"
        options = {f"{word}_checkpointing": True, f"{word}_checkpointing_kwargs": {"use_reentrant": reentrant}}
        with_it = resumes(way, folder, Setup(), **options)
        without = Run(way, Setup(), folder / "without").train()
        require(with_it.losses == without.losses, f"losses {with_it.losses}, {without.losses} without it")

    return play


for _kind in (False, True):
    feature("Memory", f"activation checkpointing, use_reentrant={_kind}", "losses equal to a run without it; resumes")(
        _checkpointing(_kind)
    )


@feature("Memory", "a bf16 base has float32 trainable weights", "the dtype of every trainable Parameter")
def _masters(way: Any, folder: Path) -> None:
    model = way.build(Setup(dtype=torch.bfloat16), 3)
    found = {str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad}
    require(found == {"torch.float32"}, f"{', '.join(sorted(found))}: steps below a 256th of a weight are lost")


@feature("Other models", "Seq2SeqTrainer, predict_with_generate", "generated tokens are the model's own; resumes")
def _generates(way: Any, folder: Path) -> None:
    options = {"predict_with_generate": True, "generation_max_length": 6, "eval_strategy": "steps", "eval_steps": 2}
    run = resumes(way, folder, Setup("t5"), **options)
    data = rows(run.setup)[:4]
    found = torch.as_tensor(run.trainer.predict(data).predictions)
    expected = run.model.eval().generate(
        input_ids=torch.stack([row["input_ids"] for row in data]), max_length=6, num_beams=1
    )
    require(torch.equal(found[:, : expected.shape[1]], expected), "other tokens")


# ---- the table -------------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    """The first line of an error's message, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def cell(row: Feature, way: Any) -> tuple[str, str]:
    """Run one cell: ("pass", ""), or ("fail" or "error", why). A wrong result is a fail, an exception an error."""
    folder = Path(tempfile.mkdtemp())
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            row.play(way, folder)
    except AssertionError as error:
        return "fail", str(error).splitlines()[0]
    except Exception as error:  # noqa: BLE001  # what a user would see is the cell
        return "error", first_line(error).replace(f"{folder}{os.sep}", "")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
    return "pass", ""


def table(only: str = "") -> Iterator[tuple[Feature, dict[str, tuple[str, str]]]]:
    """Every row with its cells."""
    for row in FEATURES:
        if only in row.name:
            yield row, {title: cell(row, way) for title, way in WAYS.items()}


def page(found: list[tuple[Feature, dict[str, tuple[str, str]]]]) -> str:
    """The page's generated part."""
    import accelerate
    import peft
    import transformers

    notes: list[str] = []
    lines: list[str] = []
    group = ""
    for row, cells in found:
        if row.group != group:
            group = row.group
            lines += ["", f"### {group}", "", "| | " + " | ".join(WAYS) + " | compared with |", "|---|" + "---|" * 4]
        shown = []
        for title in WAYS:
            outcome, why = cells[title]
            if why and why not in notes:
                notes.append(why)
            shown.append(f"{outcome} [{notes.index(why) + 1}](#what-was-said)" if why else outcome)
        lines.append(f"| {row.name} | " + " | ".join(shown) + f" | {row.check} |")
    counts = {title: sum(cells[title][0] == "pass" for _, cells in found) for title in WAYS}
    lines += ["", "Passed: " + ", ".join(f"{title} {n} of {len(found)}" for title, n in counts.items()) + "."]
    lines += ["", "### What was said", ""] + [f"{i}. `{note.replace('`', chr(39))}`" for i, note in enumerate(notes, 1)]
    versions = {m.__name__: m.__version__ for m in (transformers, torch, accelerate, peft)}
    head = [
        f"Run on {datetime.date.today().isoformat()}, CPU, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ":",
        "",
        "```text",
        "python recipes/compatibility/trainer_features.py --write docs/pages/trainer-features.md",
        "```",
    ]
    return "\n".join([*head, *lines]) + "\n"


BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def main() -> None:
    """Run all cells; print them, and write the page if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page, in which the part between the two marks is replaced")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    found = []
    for row, cells in table(given.only):
        found.append((row, cells))
        print(json.dumps({"feature": row.name, **{title: list(value) for title, value in cells.items()}}), flush=True)
    text = page(found)
    print(text)
    if given.write:
        before, _, rest = given.write.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        given.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
    if any(cells["hf_lora"][0] != "pass" for _, cells in found):
        sys.exit("a cell of hf_lora did not pass")


if __name__ == "__main__":
    main()
