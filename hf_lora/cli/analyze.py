"""`hf-lora analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .output import Json, emit, stderr, stdout, stdout_is_ours
from .push import TokenFromEnv, token_of

__all__ = ["analyze"]


@app.command(no_args_is_help=True)
def analyze(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter: a folder, or a repo's id.")],
    other: Annotated[
        str | None, typer.Argument(metavar="OTHER", help="Another of the same base, to compare with.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="ID_OR_FOLDER", help="The base model, for amplification and intruder dimensions."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="REPORT.html", help='Write a page with the figures. Needs "hf_lora[analysis]".'),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="ROLE|PATH", help="Only these layers; may be given several times.")
    ] = None,
    energy: Annotated[float, typer.Option(help="The share of Σσ² that the suggested rank keeps.")] = 0.9,
    top: Annotated[int, typer.Option(min=1, help="How many directions of W + ΔW are looked at for intruders.")] = 10,
    threshold: Annotated[float, typer.Option(help="The cosine below which one is an intruder.")] = 0.5,
    base_revision: Annotated[str | None, typer.Option(help="The base's revision on the Hub.")] = None,
    revision: Annotated[str | None, typer.Option(help="ADAPTER's branch, tag or commit on the Hub.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Where in the folder or repo ADAPTER is.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read an adapter_model.bin (tensors only, no code is run).")
    ] = False,
    token_from_env: TokenFromEnv = None,
    as_json: Json = False,
) -> None:
    """Say what an adapter learned: its spectrum, the rank that it needs, and how it stands to another and to its base.

    Example: `hf-lora analyze task other-seed --base HuggingFaceTB/SmolLM2-135M-Instruct --out report.html`
    """
    from ..adapter import LoRAAdapter
    from ..analysis import report
    from ..analysis.figures import require_matplotlib
    from ..analysis.reports import check_target
    from ..export.base import open_base

    if out is not None:  # before the work
        require_matplotlib()
        check_target(out)
    token = token_of(token_from_env)
    with stdout_is_ours():
        first = LoRAAdapter.load(
            adapter, revision=revision, subfolder=subfolder, allow_pickle=allow_pickle, token=token
        )
        second = None if other is None else LoRAAdapter.load(other, allow_pickle=allow_pickle, token=token)
        found = report(
            first,
            second,
            None if base is None else open_base(base, revision=base_revision, token=token),
            only=only or None,
            energy=energy,
            k=top,
            threshold=threshold,
            names=(adapter, other or "", base or ""),
        )
        if out is not None:
            found.save(out)
    if as_json:
        emit({**found.summary(), "out": out})
    else:
        _print(found, out)


def _print(found: Any, out: Path | None) -> None:
    from rich.table import Table
    from rich.text import Text

    from ..cardtext import clean

    console = stdout()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    say(found.adapter + (f" and {found.other}" if found.other else "") + (f" on {found.base}" if found.base else ""))
    rows = found.rows()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "role" else "right")
    for row in rows:
        table.add_row(*(Text(clean(cell)) for cell in row.values()))
    console.print(table)
    say(f"rank {found.suggested.rank} keeps {found.suggested.energy:.0%} of the energy in every layer")
    if found.overlap is not None:
        say(f"the cosine of the two adapters is {found.overlap.cosine:.4f}")
    if found.intruders is not None:
        of = found.intruders
        say(f"{of.count} intruder dimensions among the top {of.k} of each layer (cosine below {of.threshold:g})")
    if out is not None:
        say(f"report: {out}")
    for note in found.notes:
        stderr().print(f"note: {clean(note)}", soft_wrap=True, highlight=False, markup=False)
