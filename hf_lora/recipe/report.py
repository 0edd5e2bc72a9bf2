"""What a person sees of a plan and of a result, on a rich Console."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .run import Plan, Result, Step

__all__ = ["progress", "show_plan", "show_result"]


def show_plan(console: Console, plan: Plan) -> None:
    """The base, the adapter, the examples, and how many of them are cut."""
    base = escape(plan.base) + (f" at {plan.revision[:12]}" if plan.revision else "")
    table = _table("Nothing was trained: this is what the recipe comes to")
    table.add_row("base", f"{base}, {plan.task}")
    (adapter,) = plan.summary.adapters
    targets = ", ".join(f"{role} × {count}" for role, count in adapter.targets.items())
    table.add_row("targets", escape(targets))
    if adapter.heads:
        table.add_row("trained whole", escape(", ".join(adapter.heads)))
    table.add_row("rank", adapter.rank)
    table.add_row("trainable", _trainable(plan.summary.trainable, plan.summary.base_parameters))
    if plan.labels:
        table.add_row("classes", escape(", ".join(plan.labels)))
    for name, facts in (("train", plan.train), ("eval", plan.eval)):
        if facts is not None:
            table.add_row(name, _examples(vars(facts), plan.max_length))
    table.add_row("steps", str(plan.steps))
    console.print(table)


def show_result(console: Console, result: Result) -> None:
    """One row a fact, and what can be done next."""
    table = _table("Trained" if not result.already_finished else "Trained earlier")
    table.add_row("adapter", escape(result.out))
    table.add_row("base", escape(result.base))
    table.add_row("trainable", _trainable(result.trainable, result.total))
    done = f"{result.steps} steps" + (f", {result.epochs:.2f} epochs" if result.epochs is not None else "")
    since = f" since step {result.resumed_from}" if result.resumed_from is not None else ""
    table.add_row("training", f"{done}, {result.seconds:.0f} s{since}")
    for name, facts in (("train", result.train), ("eval", result.eval)):
        if facts is not None:
            table.add_row(name, _examples(facts, None))
    table.add_row("training loss", f"{_number(result.loss_before)} → {_number(result.loss_after)}")
    for metric, after in result.eval_after.items():
        before = result.eval_before.get(metric)
        table.add_row(
            escape(metric.replace("_", " ")), (f"{_number(before)} → " if before is not None else "") + _number(after)
        )
    if result.pushed:
        table.add_row("pushed", escape(result.pushed))
    console.print(table)
    if not result.pushed:
        missing = "" if result.card else " --base-model ORG/NAME"
        following = f"Publish it: hf-lora push {shlex.quote(result.out)} USER/NAME{missing}"
        console.print(following, markup=False, highlight=False, soft_wrap=True)


def _table(title: str) -> Table:
    table = Table(title=title, title_style="bold", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", overflow="fold")
    return table


def _trainable(count: int, total: int) -> str:
    return f"{count:,} parameters, {count / max(total, 1):.3%} of the base's {total:,}"


def _examples(facts: Mapping[str, Any], max_length: int | None) -> str:
    text = f"{facts['examples']:,} examples, {facts['tokens']:,} tokens, median {facts['median_tokens']:g}"
    limit = "max_length" if max_length is None else f"max_length = {max_length}"
    if facts["cut"]:
        share = facts["cut"] / facts["examples"]
        return f"{text}; [yellow]{facts['cut']:,} ({share:.1%}) are longer than {limit} and were cut[/yellow]"
    return f"{text}; none is longer than {limit}" + ("" if max_length is None else f" (longest {facts['longest']})")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


@contextmanager
def progress(console: Console) -> Iterator[Step]:
    """A progress bar on a terminal; elsewhere a line for each log."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if not console.is_terminal:

        def line(done: int, steps: int, loss: float | None) -> None:
            if loss is not None:
                console.print(f"step {done} of {steps}: loss {loss:.4f}", highlight=False)

        yield line
        return
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as bar:
        task = bar.add_task("training", total=None, loss="", visible=False)

        def update(done: int, steps: int, loss: float | None) -> None:
            said: dict[str, Any] = {} if loss is None else {"loss": f"loss {loss:.4f}"}
            bar.update(task, completed=done, total=steps, visible=True, **said)

        yield update
