"""`hf-lora demo`: the page, here or as a Space."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .output import Json, emit, stderr, stdout, stdout_is_ours
from .push import TokenFromEnv, token_of

__all__ = ["demo"]

_HERE = ("base", "base_id", "host", "port", "share", "batch_rows", "timeout")  # what only a run here takes
_SHIPPED = Path(__file__).resolve().parents[2] / "spaces_demo" / "adapters"  # of a checkout


@app.command()
def demo(
    context: typer.Context,
    base: Annotated[
        str | None, typer.Option(help="An id on the Hub, or a folder. Default: the base that the adapters name.")
    ] = None,
    base_id: Annotated[str | None, typer.Option(help="The id on the Hub of a base that is a folder.")] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="A folder with adapters' folders in it. Default: those of hf_lora."),
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first that is free from 7860.")
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="A public address for a few days, through gradio.")] = False,
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows of one batch.")] = 32,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that an answer may take.")] = 120.0,
    push: Annotated[
        str | None, typer.Option(metavar="USER/SPACE", help="Publish it as a Space instead of running it here.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new Space. Default: as the account is set.")
    ] = None,
    token_from_env: TokenFromEnv = None,
    as_json: Json = False,
) -> None:
    """A page on one base model whose tasks, LoRA adapters, are switched live. Needs `pip install "hf_lora[demo]"`.

    Example: `hf-lora demo --adapters adapters/` and `hf-lora demo --adapters adapters/ --push me/space`

    An adapter's folder may hold a task.yaml, which gives it a form of its own. With a batch each row may name another
    adapter, so many visitors share one base.
    """
    from ..demo import DemoError, Settings, launch_options, make, make_demo, require_gradio
    from ..demo.space import TITLE, push_space

    if adapters is None and _SHIPPED.is_dir():
        adapters = _SHIPPED
    require_gradio()
    if push is not None:
        unused = [f"--{name.replace('_', '-')}" for name in _HERE if _given(context, name)]
        if unused:
            raise typer.BadParameter(f"{', '.join(unused)}: a Space is not told that. Leave it out, or --push.")
        if adapters is None:
            raise DemoError("There are no adapters to publish.", name="--adapters", remedy="Give --adapters DIR.")
        with stdout_is_ours():
            commit = push_space(push, adapters, title=title or TITLE, private=private, token=token_of(token_from_env))
        result = {"space": push, "commit": commit.oid, "url": commit.commit_url}
        if as_json:
            emit(result)
        else:
            stdout().print(f"Pushed: {commit.commit_url}", markup=False, highlight=False, soft_wrap=True)
        return
    notes = stderr()
    notes.print("Loading the base…", markup=False)
    settings = Settings(batch_rows=batch_rows, device_slots=max(32, batch_rows), timeout=timeout)
    made = make_demo(base, adapters, settings, base_id=base_id)
    page = make(made, title=title or TITLE)
    try:
        _, local, public = page.launch(
            server_name=host, server_port=port, share=share, prevent_thread_lock=True, quiet=True, **launch_options()
        )
        if as_json:
            emit({"url": local, "public": public})
        else:
            shown = f"{local}  {public or ''}".strip()
            stdout().print(f"Open {shown} (Ctrl-C ends it)", markup=False, highlight=False, soft_wrap=True)
        page.block_thread()
    except OSError as error:
        raise DemoError(
            f"The page cannot listen on {host}:{port or 7860}: {error}.",
            name="--port",
            value=port,
            remedy="Choose another --port, or leave it out for the first that is free.",
        ) from error
    except KeyboardInterrupt:
        pass  # how it is ended
    finally:
        page.close(verbose=False)
        made.close()


def _given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
