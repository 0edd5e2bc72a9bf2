"""`hf-lora extract`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .import_ import refuse_adapter_in
from .output import Json, emit, stderr, stdout, stdout_is_ours

__all__ = ["extract"]


@app.command(no_args_is_help=True)
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model: a folder, or an id.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The fine-tuned model: a folder, or an id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter's folder; made if need be.")],
    rank: Annotated[int | None, typer.Option(help="Of each layer. Default: 16.", show_default=False)] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the share of Σσ² to keep in each layer.", show_default=False)
    ] = None,
    targets: Annotated[
        str, typer.Option(metavar="NAMES", help="Roles or modules, with commas; or all-linear.")
    ] = "all-linear",
    bias: Annotated[str, typer.Option(metavar="none|lora_only|all", help="Biases to take whole.")] = "none",
    modules_to_save: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A module to take whole. May be repeated.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail if something changed that the adapter does not hold.")
    ] = False,
    device: Annotated[str, typer.Option(help="Where the SVDs are computed, such as cuda.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is in OUT.")] = False,
    as_json: Json = False,
) -> None:
    """A LoRA out of a fully fine-tuned model: the best that each layer's change has at a rank.

    Says what is lost at each rank, and what the adapter does not hold.

    Example: `hf-lora extract HuggingFaceTB/SmolLM2-135M ./tuned task --rank 32`
    """
    from ..importers import extract_lora

    refuse_adapter_in(out, force)
    named = [name.strip() for name in targets.split(",")]
    with stdout_is_ours(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*changed that the adapter does not hold")  # said below, in full
        adapter = extract_lora(
            base,
            tuned,
            16 if rank is None and energy is None else rank,
            energy=energy,
            target_modules="all-linear" if named == ["all-linear"] else named,
            bias=bias,  # type: ignore[arg-type]  # it is checked there
            modules_to_save=modules_to_save or None,
            strict=strict,
            device=device,
        )
        adapter.save(out)
    if as_json:
        emit(_result(adapter, out))
    else:
        _print(adapter, out)


def _result(adapter: Any, out: Path) -> dict[str, Any]:
    report = adapter.report
    layers = [
        {"path": layer.path, "role": layer.role, "rank": layer.rank, "relative": layer.relative, "error": layer.error()}
        for layer in report.layers
    ]
    return {
        "folder": out,
        "parameters": adapter.num_parameters,
        "error": report.error(),
        "error_by_rank": report.error_by_rank(),
        "layers": layers,
        "unchanged": report.unchanged,
        "whole": report.whole,
        "left_out": report.left_out,
    }


def _print(adapter: Any, out: Path) -> None:
    from rich.table import Table

    report = adapter.report
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("rank", "‖ΔW − ΔW'‖ / ‖ΔW‖"):
        table.add_column(heading, justify="right")
    for rank, error in report.error_by_rank().items():
        table.add_row(str(rank), f"{error:.4f}")
    said = f"{out}: {len(adapter.factors)} layers, {adapter.num_parameters:,} parameters, error {report.error():.4f}"
    stdout().print(said, markup=False, highlight=False, soft_wrap=True)
    stdout().print(table)
    for key, relative in report.left_out.items():
        stderr().print(
            f"not in the adapter: {key}, changed by {relative:.2e} of its norm", soft_wrap=True, markup=False
        )
    if report.unchanged:
        stderr().print(f"{len(report.unchanged)} targets did not change", markup=False)
