"""`hf-lora info`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .app import app
from .output import Json, emit, stderr, stdout, stdout_is_ours
from .push import TokenFromEnv, token_of

__all__ = ["info"]

_ASKED = ("r", "lora_alpha", "target_modules", "modules_to_save")  # told of a config that cannot be loaded
_BAR = "▁▂▃▄▅▆▇█"


@app.command(no_args_is_help=True)
def info(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter: a folder, or a repo's id.")],
    spectrum: Annotated[bool, typer.Option(help="Compute the singular values of ΔW.")] = True,
    revision: Annotated[str | None, typer.Option(help="On the Hub: a branch, tag or commit.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Where in the folder or repo the adapter is.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read an adapter_model.bin (tensors only, no code is run).")
    ] = False,
    token_from_env: TokenFromEnv = None,
    as_json: Json = False,
) -> None:
    """Say what an adapter is: config, size, base, spectrum by role, health, training.

    Needs no base model. An adapter that hf_lora cannot load is described as far as its files go, with the reason; the
    exit code is 2 only where there is nothing to describe.

    Example: `hf-lora info me/task --json`
    """
    from ..inspection import inspect

    with stdout_is_ours():
        found = inspect(
            adapter,
            spectrum=spectrum,
            revision=revision,
            subfolder=subfolder,
            allow_pickle=allow_pickle,
            token=token_of(token_from_env),
        )
    if as_json:
        emit(found)
    else:
        _print(found)


def _print(found: Any) -> None:
    from rich.table import Table

    console = stdout()

    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    say(
        found.source
        + (f" / {found.subfolder}" if found.subfolder else "")
        + (f" @ {found.commit}" if found.commit else "")
    )
    for line in _facts(found):
        say(f"  {line}")
    if found.targets:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        with_spectrum = found.targets[0].spectrum is not None
        for heading in ("role", "modules", "layers", "parameters"):
            table.add_column(heading, justify="right" if heading in ("layers", "parameters") else "left")
        for heading in ("‖ΔW‖", "effective rank", "singular values") if with_spectrum else ():
            table.add_column(heading, justify="left" if heading == "singular values" else "right")
        for target in found.targets:
            row = [target.role, ", ".join(target.modules), str(target.layers), f"{target.parameters:,}"]
            if target.spectrum is not None:
                of = target.spectrum
                row += [f"{of.delta_norm:.3g}", f"{of.effective_rank:.1f}", bar(of.singular_values)]
            table.add_row(*row)
        console.print(table)
    for finding in found.health:
        say(f"{'!!' if finding.fatal else '! '} {finding.kind}: {finding.message}")
    if found.loadable and not found.health:
        say("healthy: finite and trained" + ("" if found.targets[0].spectrum else "; spectrum not computed"))
    if found.problem is not None:
        say(f"cannot be loaded: {found.problem.message}")
        for fact in found.problem.facts[:5]:
            say(f"  - {fact}")
        if found.problem.remedy:
            say(found.problem.remedy)
    for file in found.files:
        say(f"  {file.name}  {file.nbytes:,} bytes  sha256 {file.sha256}")
    for note in found.notes:
        stderr().print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)


def _facts(found: Any) -> list[str]:
    lines = []
    kind = [found.peft_type or "no peft_type", *([found.task_type] if found.task_type else [])]
    lines.append(", ".join(kind) + (" (rsLoRA)" if found.use_rslora else ""))
    if found.base:
        lines.append(f"base: {found.base}" + (f" at {found.base_revision}" if found.base_revision else ""))
    lines += [f"rank {s.rank}, alpha {s.alpha:g}, scaling {s.scaling:.4g}: {s.layers} layers" for s in found.scales]
    if not found.loadable:
        asked = {name: found.config[name] for name in _ASKED if found.config.get(name) is not None}
        lines += [f"{name}: {', '.join(map(str, v)) if isinstance(v, list) else v}" for name, v in asked.items()]
    if found.dtypes:
        dtypes = ", ".join(f"{dtype} × {n}" for dtype, n in found.dtypes.items())
        lines.append(f"{found.parameters:,} parameters, {found.nbytes:,} bytes ({dtypes})")
    if found.heads:
        lines.append("held whole: " + ", ".join(f"{head.path} ({head.parameters:,})" for head in found.heads))
    if found.biases:
        lines.append(f"trained biases: {found.biases}")
    if found.run is not None:
        lines.append(_run(found.run))
    return lines


def _run(run: Any) -> str:
    said = [f"trained {run.steps:,} steps"]
    if run.epochs is not None:
        said.append(f"{run.epochs:.3g} epochs")
    if run.seconds is not None:
        said.append(f"{run.seconds:,.0f} s")
    if run.losses:
        said.append(f"loss {run.losses[0][1]:.4g} → {run.losses[-1][1]:.4g}")
    if run.best is not None:
        metric, value, step = run.best
        said.append(f"best {metric} {value:.4g} at step {step:,}")
    return ", ".join(said)


def bar(values: tuple[float, ...]) -> str:
    """Singular values as a row of blocks, the largest full; one that is zero is a dot."""
    largest = max(values, default=0.0)
    if not largest > 0:
        return "·" * len(values)
    return "".join(_BAR[min(int(v / largest * len(_BAR)), len(_BAR) - 1)] if v > 0 else "·" for v in values)
