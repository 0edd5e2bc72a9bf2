"""What the reader sees: tables, examples, and what to type next. All of it comes from a run's record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .verdict import METRICS, Comparison

__all__ = ["show_before_after", "show_next", "show_proofs", "show_results", "show_sizes", "size"]


def show_results(console: Console, record: Mapping[str, Any], comparisons: list[Comparison]) -> None:
    """One row a contestant: its numbers, and how much better the adapter is, with the paired error."""
    unit, count = record["task"]["unit"], len(record["examples"])
    groups = len({example["group"] for example in record["examples"]})
    table = Table(title=f"{count} held-out examples of {groups} {unit}s", title_style="bold", caption_justify="left")
    table.add_column("")
    for metric in METRICS.values():
        table.add_column(metric.label, justify="right")
        table.add_column("LoRA is better by", justify="right")
    by_name = {(c.name, c.metric): c for c in comparisons}
    for contestant in record["contestants"]:
        cells = []
        for key in METRICS:
            values = contestant.get(key)
            cells.append("–" if not values else f"{sum(values) / len(values):.{METRICS[key].digits}f}")
            comparison = by_name.get((contestant["name"], key))
            cells.append("" if comparison is None else _difference(comparison))
        ours = contestant["name"] == "LoRA"
        table.add_row(escape(contestant["name"]), *cells, style="bold green" if ours else None, end_section=ours)
    console.print(table)
    notes = [f"{c['name']}: {c['note']}" for c in record["contestants"] if c.get("note")]
    for note in notes:
        console.print(f"  {escape(note)}", style="dim")
    console.print(
        f"  ± is the 95 % error of the paired difference, whole {unit}s being the independent units; a higher ROUGE-L "
        "and a lower loss are better.",
        style="dim",
    )


def _difference(comparison: Comparison) -> str:
    digits = METRICS[comparison.metric].digits
    text = f"{comparison.mean:+.{digits}f} ± {comparison.error:.{digits}f}"
    return text if comparison.better else f"[red]{text} ✗[/red]"


def show_sizes(console: Console, record: Mapping[str, Any], place: str) -> None:
    """The adapter's size beside the base's."""
    adapter, base = record["sizes"]["adapter"], record["sizes"]["base"]
    console.print(
        f"The adapter: [bold]{size(adapter)}[/bold] in {escape(place)}, beside {size(base)} of base weights "
        f"({100 * adapter / base:.1f} %)."
    )


def show_proofs(console: Console, record: Mapping[str, Any]) -> None:
    """One row a claim about the saved adapter's outputs."""
    table = Table(title="The same outputs as the model just trained?", title_style="bold")
    table.add_column("")
    table.add_column("")
    table.add_column("max |difference|", justify="right")
    table.add_column("")
    for proof in record["proofs"]:
        difference = proof["difference"]
        table.add_row(
            escape(proof["claim"]),
            "[green]✓[/green]" if proof["held"] else "[red]✗[/red]",
            "" if difference is None else f"{difference:.2g}",
            escape(proof["detail"]),
        )
    console.print(table)


def show_before_after(console: Console, record: Mapping[str, Any], count: int = 3) -> None:
    """The first held-out examples of different groups: not picked by how they came out."""
    texts = {c["name"]: c["texts"] for c in record["contestants"] if c.get("texts")}
    first: dict[str, int] = {}
    for index, example in enumerate(record["examples"]):
        first.setdefault(example["group"], index)
    table = Table(title=f"The first {count} held-out examples", title_style="bold", show_lines=True)
    for heading in (record["task"]["unit"], "before (base)", "after (LoRA)", "what a person wrote"):
        table.add_column(heading, overflow="fold")
    for index in list(first.values())[:count]:
        example = record["examples"][index]
        cells = (example["prompt"].splitlines()[0][:60], texts["base"][index], texts["LoRA"][index], example["target"])
        table.add_row(*map(escape, cells))
    console.print(table)


def show_next(console: Console, record: Mapping[str, Any], command: str) -> None:
    """What the user can type from here."""
    console.print("[bold]What to type next[/bold]: use the adapter in Python,")
    console.print(snippet(record), markup=False, highlight=False, style="cyan", soft_wrap=True)
    console.print("\nor at the shell,")
    console.print(command, markup=False, highlight=False, style="cyan", soft_wrap=True)


def snippet(record: Mapping[str, Any]) -> str:
    """A program that loads the base and the adapter and answers the first held-out example."""
    loading, chat = record["base"]["loading"], record["task"]["chat"]
    tokenizer = loading.replace(', dtype="float32"', "")
    lines = [
        "    import hf_lora",
        "    from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"    model = AutoModelForCausalLM.from_pretrained({loading})",
        f"    tokenizer = AutoTokenizer.from_pretrained({tokenizer})",
        f"    model.load_lora({record['adapter']!r})",
        f"    text = {record['try']!r}",
    ]
    if chat:
        lines += [
            '    chat = [{"role": "system", "content": ""}, {"role": "user", "content": text}]',
            (
                '    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", '
                "return_dict=True)"
            ),
        ]
    else:
        lines.append('    batch = tokenizer(text + "\\n\\n", return_tensors="pt", add_special_tokens=False)')
    lines += [
        f"    written = model.generate(**batch, max_new_tokens={record['task']['answer_tokens']}, do_sample=False)",
        '    print(tokenizer.decode(written[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes for people: 538.1 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
