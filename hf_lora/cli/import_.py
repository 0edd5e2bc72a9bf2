"""`hf-lora import`: a command for each format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import app
from .output import Json, emit, stdout, stdout_is_ours

__all__ = ["import_app"]

import_app = typer.Typer(help="Make an adapter out of another format.", no_args_is_help=True)
app.add_typer(import_app, name="import")

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The adapter's folder; made if need be.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an adapter that is in OUT.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read a pickle (tensors only, no code is run).")]
BaseModel = Annotated[
    str | None, typer.Option(metavar="ORG/NAME", help="The base's id, for the adapter's config.", show_default=False)
]


@import_app.command(no_args_is_help=True)
def loralib(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The checkpoint: .pt, .bin or .safetensors.")],
    out: Out,
    alpha: Annotated[
        float | None, typer.Option(help="lora_alpha, which no checkpoint says: always needed.", show_default=False)
    ] = None,
    enable_lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]BITS",
            help="Of MergedLinear layers: 1,0,1, or c_attn=0,0,1 for those whose path ends so. May be repeated.",
        ),
    ] = None,
    embedding: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="The end of an Embedding's path. May be repeated.")
    ] = None,
    modules_to_save: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A module that it holds whole. May be repeated.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="ID_OR_FOLDER", help="Check names, kinds and sizes against this model.")
    ] = None,
    base_model: BaseModel = None,
    task_type: Annotated[str | None, typer.Option(help="PEFT's task type, such as SEQ_CLS.")] = None,
    allow_pickle: Pickle = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """A checkpoint of loralib (microsoft/LoRA).

    Example: `hf-lora import loralib gpt2_md_lora_e2e.pt e2e --alpha 32 --enable-lora 1,0,1 --allow-pickle`
    """
    from ..importers import from_loralib
    from ..importers.sides import model_of

    refuse_adapter_in(out, force)
    with stdout_is_ours():
        adapter = from_loralib(
            source,
            alpha=alpha,
            enable_lora=_enabled(enable_lora or []),
            embeddings=embedding or (),
            modules_to_save=modules_to_save or (),
            base=None if base is None else model_of(base),
            base_model=base_model or base,
            task_type=task_type,
            allow_pickle=allow_pickle,
        )
    _save(adapter, source, out, as_json)


@import_app.command(no_args_is_help=True)
def mlx(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The folder with adapters.safetensors.")],
    out: Out,
    scale: Annotated[
        float | None, typer.Option(help="The scaling, where the config leaves it open.", show_default=False)
    ] = None,
    base_model: BaseModel = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """An adapter of mlx-lm.

    Example: `hf-lora import mlx adapters task --base-model Qwen/Qwen3-0.6B`
    """
    from ..importers import from_mlx

    refuse_adapter_in(out, force)
    with stdout_is_ours():
        adapter = from_mlx(source, scale=scale, base_model=base_model)
    _save(adapter, source, out, as_json)


@import_app.command(no_args_is_help=True)
def adalora(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The AdaLoRA adapter's folder, as PEFT wrote it.")],
    out: Out,
    allow_pickle: Pickle = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """An AdaLoRA adapter of PEFT, as a plain LoRA.

    Example: `hf-lora import adalora adalora-task task`
    """
    from ..importers import from_adalora

    refuse_adapter_in(out, force)
    with stdout_is_ours():
        adapter = from_adalora(source, allow_pickle=allow_pickle)
    _save(adapter, source, out, as_json)


@import_app.command(no_args_is_help=True)
def diffusion(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="The file: .safetensors, .pt or .bin.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder, in which each component gets its adapter's.")],
    base_model: BaseModel = None,
    allow_pickle: Pickle = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """A LoRA of a diffusion model, as kohya-ss or diffusers wrote it: an adapter for each component.

    Example: `hf-lora import diffusion style.safetensors style --base-model stabilityai/stable-diffusion-xl-base-1.0`
    """
    from ..importers import from_diffusion

    with stdout_is_ours():
        found = from_diffusion(source, base_model=base_model, allow_pickle=allow_pickle)
    for component in found:
        refuse_adapter_in(out / component, force)
    results = [_saved(found[component], source, out / component) for component in found]
    if as_json:
        emit({"source": source, "folder": out, "components": dict(zip(found, results, strict=True))})
        return
    for result in results:
        _say(result)


def _enabled(given: list[str]) -> Any:
    """enable_lora from "1,0,1", or from several "name=1,0,1"; None if nothing was given."""
    lists: dict[str, list[bool]] = {}
    for text in given:
        name, equals, bits = text.rpartition("=")
        flags = [bit.strip() for bit in bits.split(",")]
        if not set(flags) <= {"0", "1"} or bool(equals) != bool(name) or name in lists:
            raise typer.BadParameter(f"--enable-lora {text!r} is not BITS, as 1,0,1, or NAME=BITS, each name once.")
        lists[name] = [bit == "1" for bit in flags]
    if "" in lists and len(lists) > 1:
        raise typer.BadParameter("--enable-lora: give one list for all layers, or a name with each.")
    return lists.get("", lists or None)


def refuse_adapter_in(folder: Path, force: bool) -> None:
    """Raise if `folder` holds an adapter that was not asked to be replaced."""
    from ..errors import LoRAFileError
    from ..store import CONFIG_NAME

    if os.path.exists(folder / CONFIG_NAME) and not force:
        raise LoRAFileError(
            f"{str(folder)!r} holds an adapter.",
            name="OUT",
            value=str(folder),
            remedy="Choose another folder, or replace it with --force.",
        )


def _save(adapter: Any, source: Path, out: Path, as_json: bool) -> None:
    result = _saved(adapter, source, out)
    if as_json:
        emit(result)
    else:
        _say(result)


def _saved(adapter: Any, source: Path, out: Path) -> dict[str, Any]:
    adapter.save(out)
    return {
        "source": source,
        "folder": out,
        "base_model": adapter.config.base_model,
        "layers": len(adapter.factors),
        "ranks": sorted({factors.rank for factors in adapter.factors.values()}),
        "parameters": adapter.num_parameters,
    }


def _say(result: dict[str, Any]) -> None:
    said = f"{result['folder']}: {result['layers']} layers, rank {', '.join(map(str, result['ranks']))}"
    said += f", {result['parameters']:,} parameters"
    stdout().print(said, markup=False, highlight=False, soft_wrap=True)
