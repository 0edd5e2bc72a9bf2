"""`hf-lora train`: a recipe, or flags."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .output import Json, emit, stderr, stdout, stdout_is_ours

__all__ = ["DType", "targets_of", "train"]


class Task(str, enum.Enum):
    """What the adapter is for."""

    causal_lm = "causal-lm"
    seq2seq = "seq2seq"
    classification = "classification"


class DType(str, enum.Enum):
    """Of the base's weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


# A flag -> the recipe's key that it sets.
_KEYS = {
    "--base": "base.model",
    "--revision": "base.revision",
    "--base-id": "base.id",
    "--dtype": "base.dtype",
    "--task": "base.task",
    "--data": "data.train",
    "--eval": "data.eval",
    "--eval-fraction": "data.eval_fraction",
    "--text": "data.text",
    "--pair": "data.pair",
    "--prompt": "data.prompt",
    "--completion": "data.completion",
    "--messages": "data.messages",
    "--label": "data.label",
    "--max-length": "data.max_length",
    "--r": "lora.r",
    "--alpha": "lora.alpha",
    "--dropout": "lora.dropout",
    "--targets": "lora.target_modules",
    "--epochs": "training.num_train_epochs",
    "--steps": "training.max_steps",
    "--batch-size": "training.per_device_train_batch_size",
    "--lr": "training.learning_rate",
    "--seed": "seed",
    "--push": "push.repo",
    "--out": "out",
}
_PANEL = {key: f"Recipe: {key}" for key in ("base", "data", "lora", "training")}


def _flag(name: str, text: str, **options: Any) -> Any:
    key = _KEYS[name]
    return typer.Option(
        name, help=text, rich_help_panel=_PANEL.get(key.partition(".")[0], "Recipe"), show_default=False, **options
    )


@app.command(no_args_is_help=True)
def train(
    context: typer.Context,
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE.yaml", help="The recipe; flags change what it says.")
    ] = None,
    base: Annotated[str | None, _flag("--base", "A model's id on the Hub, or a folder.")] = None,
    revision: Annotated[str | None, _flag("--revision", "The base's branch, tag or commit.")] = None,
    base_id: Annotated[str | None, _flag("--base-id", "The id on the Hub of a base that is a folder.")] = None,
    dtype: Annotated[DType | None, _flag("--dtype", "Of the base's weights; auto: as its files say.")] = None,
    task: Annotated[
        Task | None, _flag("--task", "What the adapter is for; told from data and base if left out.")
    ] = None,
    data: Annotated[
        str | None, _flag("--data", "Examples: a csv, tsv, json, jsonl, parquet or txt file, or a data set on the Hub.")
    ] = None,
    eval_: Annotated[str | None, _flag("--eval", "Examples to evaluate on, likewise.")] = None,
    eval_fraction: Annotated[float | None, _flag("--eval-fraction", "Hold out this share instead.")] = None,
    text: Annotated[str | None, _flag("--text", 'A template over columns, such as "{sentence}".')] = None,
    pair: Annotated[str | None, _flag("--pair", "For pairs of texts: the second one's template.")] = None,
    prompt: Annotated[str | None, _flag("--prompt", "The template of what is given.")] = None,
    completion: Annotated[str | None, _flag("--completion", "The template of what is learned.")] = None,
    messages: Annotated[str | None, _flag("--messages", "The column of chats.")] = None,
    label: Annotated[str | None, _flag("--label", "The column of the class.")] = None,
    max_length: Annotated[int | None, _flag("--max-length", "Tokens of an example; longer ones are cut.")] = None,
    r: Annotated[int | None, _flag("--r", "The rank.")] = None,
    alpha: Annotated[float | None, _flag("--alpha", "The scaling is alpha/r; alpha = r if left out.")] = None,
    dropout: Annotated[float | None, _flag("--dropout", "On the adapter's input, while training.")] = None,
    targets: Annotated[
        str | None, _flag("--targets", "Roles or module names with commas between (q,v), or all-linear.")
    ] = None,
    epochs: Annotated[float | None, _flag("--epochs", "Passes over the examples.")] = None,
    steps: Annotated[int | None, _flag("--steps", "Optimizer steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, _flag("--batch-size", "Examples at once on a device.")] = None,
    lr: Annotated[float | None, _flag("--lr", "The learning rate.")] = None,
    seed: Annotated[int | None, _flag("--seed", "Of the adapter's start and the order of the examples.")] = None,
    push: Annotated[str | None, _flag("--push", "Publish it as USER/NAME when it is trained.")] = None,
    out: Annotated[str | None, _flag("--out", "The folder that the run writes to.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the recipe: --set training.warmup_steps=10."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, if there is one.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete an earlier run in the folder first.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check recipe, data, lengths and targets, and train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a LoRA with the stock Trainer, from a recipe or from flags. Needs `pip install "hf_lora[train]"`.

    Example: `hf-lora train --base HuggingFaceTB/SmolLM2-135M-Instruct --data train.csv --prompt "{question}"
    --completion " {answer}" --r 8 --targets q,v --out task`

    The folder gets the adapter, its card (README.md), trainer_state.json and the checkpoints. Ctrl-C and even a kill
    are safe: `--resume` goes on from the last checkpoint, to the same bits as without the stop.
    """
    from ..recipe import Recipe, check
    from ..recipe import train as run
    from ..recipe.report import progress, show_plan, show_result

    if resume and fresh:
        raise typer.BadParameter("--resume and --fresh exclude each other.")
    notes = stderr()

    def note(said: str) -> None:
        notes.print(said, markup=False, highlight=False, soft_wrap=True)

    with stdout_is_ours():
        wanted = Recipe.load(recipe, _changes(context, set_ or []))
        if dry_run:
            plan = check(wanted, note=note)
        else:
            with progress(notes) as step:
                result = run(wanted, resume=resume, fresh=fresh, note=note, step=step)
    if as_json:
        emit(plan if dry_run else result)
    elif dry_run:
        show_plan(stdout(), plan)
    else:
        show_result(stdout(), result)


def _changes(context: typer.Context, assignments: list[str]) -> dict[tuple[str, ...], tuple[Any, str]]:
    """What flags and --set change of the recipe: keys -> (value, how it was written)."""
    from ..recipe.document import parse_value

    found: dict[tuple[str, ...], tuple[Any, str]] = {}
    for parameter in context.command.params:
        flag = parameter.opts[0]
        value = context.params.get(parameter.name or "")
        if flag in _KEYS and value is not None:
            value = value.value if isinstance(value, enum.Enum) else value
            found[tuple(_KEYS[flag].split("."))] = (targets_of(value) if flag == "--targets" else value, flag)
    if ("training", "num_train_epochs") in found:
        if ("training", "max_steps") in found:
            raise typer.BadParameter("--steps and --epochs exclude each other.")
        found["training", "max_steps"] = (-1, "--epochs")  # steps win in TrainingArguments, and a flag over the recipe
    for given, other in (("eval", "eval_fraction"), ("eval_fraction", "eval")):
        if ("data", given) in found:
            found.setdefault(("data", other), (None, f"--{given}"))  # instead of what the recipe says
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not all(key.split(".")):
            raise typer.BadParameter(f"--set {assignment!r} is not KEY=VALUE, such as training.learning_rate=1e-4.")
        found[tuple(key.split("."))] = (parse_value(value, f"--set {key}"), f"--set {assignment}")
    return found


def targets_of(value: str) -> str | list[str]:
    """Names with commas between; what holds anything else is a regular expression, and "all-linear" is itself."""
    names = [name.strip() for name in value.split(",")]
    plain = all(name.replace("_", "").replace(".", "").replace("-", "").isalnum() for name in names)
    return names if plain and value != "all-linear" else value
