"""Point the unmodified huggingface_hub of this process at another hub, for as long as a test runs.

The client reads its environment once, at import. What it read is put into its modules instead: `constants`, and the few
places that copied a value from there. `tests/test_local_hub.py` looks for copies that are not in this list.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import pytest

# Imported before the change, so that a module which a test loads first does not keep the test's values for ever.
COPIES = {
    "huggingface_hub.utils._git_credential": {"ENDPOINT": "ENDPOINT"},
    "huggingface_hub.utils._cache_manager": {"HF_HUB_CACHE": "HF_HUB_CACHE"},
    "huggingface_hub.utils._cache_assets": {"HF_ASSETS_CACHE": "HF_ASSETS_CACHE"},
    "huggingface_hub": {"HUGGINGFACE_CO_URL_TEMPLATE": "HUGGINGFACE_CO_URL_TEMPLATE"},
}


def environment(url: str, home: Path, token: str | None) -> dict[str, str]:
    """What a child process needs to use the hub at `url` with a cache of its own in `home`."""
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN": token or "",
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }


def redirect(patch: pytest.MonkeyPatch, url: str, home: Path, token: str | None) -> list[float]:
    """Make this process's client use the hub at `url`; `patch` undoes it.

    The client's waits between retries are noted instead of waited for.

    Returns:
        the waits, in seconds, as they happen.
    """
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http
    from transformers.utils import hub

    values: dict[str, Any] = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "default_cache_path": str(home / "hub"),
        "default_assets_cache_path": str(home / "assets"),
        "default_xet_cache_path": str(home / "xet"),
        "HF_ASSETS_CACHE": str(home / "assets"),
        "HUGGINGFACE_ASSETS_CACHE": str(home / "assets"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "CHECK_FOR_UPDATE_DONE_PATH": str(home / ".check_for_update_done"),
        "CHECK_FOR_SKILL_UPDATE_DONE_PATH": str(home / ".check_for_skill_update_done"),
    }
    if hasattr(constants, "HF_URL_HOSTS"):
        values["HF_URL_HOSTS"] = constants.HF_URL_HOSTS | {urlsplit(url).hostname}
    modules = {name: importlib.import_module(name) for name in COPIES}
    for name, value in values.items():
        patch.setattr(constants, name, value, raising=False)
    for name, copies in COPIES.items():
        for theirs, ours in copies.items():
            patch.setattr(modules[name], theirs, values[ours], raising=False)
    patch.setattr(hf_api.api, "endpoint", url)
    if hasattr(_http, "_HUB_ORIGINS"):
        patch.setattr(_http, "_HUB_ORIGINS", _http._HUB_ORIGINS | {_http._url_origin(url)})

    waits: list[float] = []
    for module in (_http, file_download):
        clock = SimpleNamespace(**{**vars(module.time), "sleep": waits.append})
        patch.setattr(module, "time", clock)

    for name, text in environment(url, home, token).items():
        patch.setenv(name, text)
    if token is None:
        patch.delenv("HF_TOKEN")
    _http.close_session()
    if hasattr(hub, "_hf_api"):  # transformers keeps the client that it made first, with the endpoint of that time
        patch.setattr(hub, "_hf_api", None)
    return waits


def release() -> None:
    """Close the connections that the client keeps open."""
    from huggingface_hub.utils import _http

    _http.close_session()
