"""Fetch an adapter's files from the Hub: the config and the weights, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import LoRAFileError
from .store import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME

__all__ = ["fetch"]


def fetch(repo_id: str, *, subfolder: str | None = None, allow_pickle: bool = False, **options: Any) -> Path:
    """The folder, in the Hub's cache, that holds the adapter's files.

    Args:
        repo_id: "user/name".
        subfolder: where in the repo the adapter is.
        allow_pickle: take adapter_model.bin where there are no safetensors.
        options: as of `huggingface_hub.hf_hub_download` (revision, token, cache_dir, local_files_only).

    Raises:
        LoRAFileError: no such repo, revision or file, no access, or no connection; the Hub's own error is its cause.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def get(name: str) -> Path:
        return Path(hf_hub_download(repo_id, name, subfolder=subfolder, **options))

    wanted = CONFIG_NAME
    try:
        config = get(wanted)
        wanted = WEIGHTS_NAME
        try:
            get(wanted)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            if not allow_pickle:
                raise
            wanted = PICKLE_NAME
            get(wanted)
        return config.parent
    except LocalEntryNotFoundError as error:
        raise LoRAFileError(
            f"{repo_id!r} is neither a folder here nor in the cache, and the Hub cannot be reached.",
            name=repo_id,
            value=repo_id,
            remedy="Check the path, or the connection (HF_HUB_OFFLINE?).",
        ) from error
    except EntryNotFoundError as error:
        raise LoRAFileError(
            f"The repo {repo_id!r} has no {wanted}.",
            name=wanted,
            value=repo_id,
            remedy="Name a repo (and subfolder) that holds an adapter; an adapter_model.bin needs allow_pickle=True.",
        ) from error
    except HFValidationError as error:
        raise LoRAFileError(
            f"{repo_id!r} is neither a folder here nor the id of a repo.",
            name=repo_id,
            value=repo_id,
            expected="a folder, or 'user/name'",
            remedy="Check the path.",
        ) from error
    except HfHubHTTPError as error:
        raise LoRAFileError(
            f"The Hub did not give {repo_id!r}: {type(error).__name__}: {str(error).splitlines()[0]}",
            name=repo_id,
            value=repo_id,
            remedy="Check the id and revision, and for a private or gated repo the token.",
        ) from error
