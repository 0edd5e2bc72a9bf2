"""From a base and a folder of adapters to a page that runs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..errors import LoRAUnsupportedError
from .dispatch import Dispatcher, Stream
from .engine import Engine
from .library import Library, adapters_in
from .problems import DemoError
from .session import Demo
from .settings import Settings

__all__ = ["base_of", "launch_options", "make", "make_demo", "require_gradio"]

_ZERO = "SPACES_ZERO_GPU"  # set on a Space whose GPU is lent for a call at a time
_SECONDS = 120  # of such a call, at most


def require_gradio() -> None:
    """`LoRAUnsupportedError` naming what is not installed."""
    import importlib.util

    missing = [name for name in ("gradio", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise LoRAUnsupportedError(
            f"The demo needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed.",
            name="demo",
            value=missing,
            remedy='Type: pip install "hf_lora[demo]"',
        )


def base_of(adapters: Path | None) -> str:
    """The base that the adapters of a folder name. Raises `DemoError` if they name none, or several."""
    named: dict[str, list[str]] = {}
    for folder in adapters_in(adapters) if adapters is not None else ():
        try:
            text = (folder / "adapter_config.json").read_text(encoding="utf-8")
            base = json.loads(text).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # the library says what is wrong with it
        if isinstance(base, str) and base:
            named.setdefault(base, []).append(folder.name)
    if len(named) != 1:
        facts = [f"{base}: {', '.join(names)}" for base, names in named.items()]
        raise DemoError(
            "The adapters name different bases." if named else "No base is given, and no adapter names one.",
            name="base",
            facts=facts,
            remedy="Give --base, and a folder with adapters of that base alone.",
        )
    return next(iter(named))


def make_demo(
    base: str | None, adapters: Path | None, settings: Settings | None = None, *, base_id: str | None = None
) -> Demo:
    """Load the base, on a GPU if there is one, look at the adapters, and start what makes batches.

    Args:
        base: an id on the Hub or a folder; None takes the one that the adapters name.
        adapters: a folder of adapters' folders; None has none, and visitors load theirs.
        base_id: of a folder: the id on the Hub of what it is a copy of.

    Raises:
        DemoError: no base is named, or no adapters are there. LoRAError: an adapter is broken or of another base.
    """
    from ..recipe import Base, Data, Source
    from ..recipe.base import find

    settings = settings or Settings()
    found = find(
        Base(model=base or base_of(adapters), id=base_id, task="causal-lm"),
        Data(train=Source(dataset="none"), text="{text}"),
    )
    model, tokenizer = found.model(), found.tokenizer
    zero = bool(os.environ.get(_ZERO))
    device = "cuda" if zero or torch.cuda.is_available() else "cpu"
    model = model.to(device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    library = Library(model, adapters, settings)
    engine = Engine(model, tokenizer, library.places, settings)
    stream = _on_zero_gpu(engine) if zero else None
    return Demo(engine, library, Dispatcher(engine, settings, stream), settings, base_name=found.name)


def _on_zero_gpu(engine: Engine) -> Stream:
    """Batches in a process that has the GPU for as long as the batch runs. Nothing can be told to it meanwhile."""
    import spaces  # type: ignore[import-untyped,import-not-found,unused-ignore]

    def seconds(rows: Any, places: Any) -> int:
        return min(_SECONDS, 20 + max(row.max_tokens for row in rows) // 8)

    @spaces.GPU(duration=seconds)  # type: ignore[untyped-decorator,unused-ignore]
    def batch(rows: Any, places: Any) -> Any:
        yield from engine.stream(rows, None, places)

    def stream(rows: Any, ended: Any) -> Any:
        places = {name: engine.places[name] for row in rows for name in row.adapters if name in engine.places}
        return batch(rows, places)

    return stream


def make(demo: Demo, **options: Any) -> Any:
    """The page of a demo, to be launched with `launch_options()`."""
    require_gradio()
    from .page import build

    return build(demo, **options)


def launch_options() -> dict[str, Any]:
    """What `launch` is given: the look, and that neither errors nor files of this machine reach a visitor."""
    from .page import CSS, theme

    return {
        "theme": theme(),
        "css": CSS,
        "show_error": False,
        "ssr_mode": False,
        "footer_links": ["api", "settings"],
        "max_file_size": "1kb",
        "allowed_paths": [],
    }
