"""The demo as a Space: its files, and the push. The package's own code goes along: what ran here runs there."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..bases import require_hub_id
from ..errors import LoRAHubError
from ..hub_errors import known_tokens, token_in, translated
from ..store import read_adapter
from .launch import base_of
from .library import adapters_in
from .problems import DemoError
from .tasks import TASK_FILE, read_task

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

__all__ = ["TITLE", "app", "push_space", "readme", "requirements", "space_files"]

TITLE = "One base model, tasks switched live"

_APP = '''"""One base model, many LoRA adapters, switched live. All of it is in hf_lora.demo."""

from pathlib import Path

from hf_lora.demo import launch_options, make, make_demo

demo = make(make_demo(None, Path(__file__).parent / "adapters"), title={title!r})

if __name__ == "__main__":
    demo.launch(**launch_options())
'''

_README = """---
{metadata}---

# {title}

One base model, `{base}`, and {count} LoRA adapters, each a task. Switching changes one pointer, a batch may take
another adapter for each row, and any public adapter of this base can be loaded from the Hub by its id.

Made with [hf_lora](https://pypi.org/project/hf_lora). `hf-lora demo` runs it on your machine, with any base and any
folder of adapters; `hf-lora demo --push user/space` makes a Space of it. It runs on ZeroGPU, on any other GPU, or on a
CPU.

| task | adapter | on held-out data | base | best without training | with the adapter |
|---|---|---|---|---|---|
{rows}
"""

_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", TASK_FILE)
_OWN = ("adapters/", "hf_lora/")  # of a Space: what a push replaces
_SUFFIXES = (".py", ".css", ".typed")


def app(title: str = TITLE) -> str:
    """The Space's app.py."""
    return _APP.format(title=title)


def requirements() -> str:
    """What the Space installs: what hf_lora and its demo need."""
    found = [text for text in importlib.metadata.requires("hf_lora") or () if _wanted(text)]
    return "".join(f"{text.partition(';')[0].strip()}\n" for text in sorted(found))


def _wanted(requirement: str) -> bool:
    extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", requirement)
    return extra is None or (extra[1] == "demo" and "hf_lora" not in requirement.partition(";")[0])


def readme(adapters: Path, title: str = TITLE) -> str:
    """The Space's README.md, with its metadata and the adapters' scores."""
    rows = []
    for path in adapters_in(adapters):
        task = read_task(path)
        score = None if task is None else task.score
        cells = (
            [score.metric, f"{score.base:g}", f"{score.best_trivial:g}", f"{score.adapter:g} (gain ± {score.error:g})"]
            if score is not None
            else ["", "", "", ""]
        )
        rows.append("| " + " | ".join([task.title if task else path.name, path.name, *cells]) + " |")
    base = require_hub_id(base_of(adapters))  # a folder of this machine is no base for a Space
    metadata = {
        "title": title,
        "emoji": "🎛️",
        "colorFrom": "indigo",
        "colorTo": "purple",
        "sdk": "gradio",
        "sdk_version": importlib.metadata.version("gradio"),
        "app_file": "app.py",
        "license": "apache-2.0",
        "short_description": "Many LoRA adapters on one base, switched live",
        "models": [base],
        "tags": ["lora", "hf_lora"],
    }
    return _README.format(
        metadata=yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True),
        title=" ".join(title.split()),
        base=base,
        count=len(rows),
        rows="\n".join(rows),
    )


def space_files(adapters: Path, title: str = TITLE) -> dict[str, bytes]:
    """Path in the Space → content.

    Raises:
        DemoError: no adapters, or of several bases. LoRAError: one of them is broken.
    """
    found: dict[str, bytes] = {
        "README.md": readme(adapters, title).encode(),
        "app.py": app(title).encode(),
        "requirements.txt": requirements().encode(),
    }
    for path in adapters_in(adapters):
        read_adapter(path)  # a broken one would stop the whole Space
        found |= {
            f"adapters/{path.name}/{name}": (path / name).read_bytes() for name in _FILES if (path / name).is_file()
        }
    package = Path(__file__).resolve().parents[1]
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.suffix in _SUFFIXES:
            found[f"hf_lora/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    return found


def push_space(
    repo_id: str,
    adapters: Path,
    *,
    title: str = TITLE,
    private: bool | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Publish the demo of these adapters as one commit; the Space is made if it is missing.

    A README.md that stands there is kept, and so is every file that is not the demo's own.

    Raises:
        LoRAHubError: the Hub refused; `kind` says why. Nothing was pushed. DemoError: a file would publish a token.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = space_files(adapters, title)
    _refuse_tokens(files, known_tokens(token))
    context: dict[str, Any] = {"pushing": True, "token": token}
    with translated(repo_id, **context):
        api = HfApi(token=token)
        made = api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True).repo_id
        info = api.space_info(made)
        there = {sibling.rfilename for sibling in info.siblings or ()}
    _require_visibility(api, made, private, info)
    if "README.md" in there:
        del files["README.md"]
    stale = sorted(path for path in there if path.startswith(_OWN) and path not in files)
    operations: list[Any] = [CommitOperationAdd(path, content) for path, content in files.items()]
    operations += [CommitOperationDelete(path) for path in stale]
    with translated(repo_id, **context):
        return api.create_commit(
            made,
            operations,
            commit_message=f"Push the demo of {len(adapters_in(adapters))} adapters",
            repo_type="space",
            parent_commit=info.sha,
        )


def _require_visibility(api: HfApi, repo_id: str, private: bool | None, info: Any) -> None:
    if private is not None and bool(info.private) != private:
        is_, asked = ("public", "private") if private else ("private", "public")
        error = LoRAHubError(
            f"{repo_id!r} exists and is {is_}, not {asked}: nothing was pushed.",
            name="private",
            value=private,
            remedy="Change its visibility in the Space's settings, or leave the option out.",
        )
        error.kind = "visibility"
        raise error


def _refuse_tokens(files: Mapping[str, bytes], tokens: tuple[str, ...]) -> None:
    for path, text in _texts(files):
        if token_in(text, tokens):
            raise DemoError(f"{path} holds a token of the Hub: nothing was pushed.", name=path, remedy="Take it out.")


def _texts(files: Mapping[str, bytes]) -> Iterator[tuple[str, str]]:
    for path, content in files.items():
        if not path.endswith(".safetensors") and not path.startswith("hf_lora/"):
            yield path, content.decode("utf-8", "replace")
