"""Adapters to and from the Hub: fetch two files of one commit, push three in one commit, find others."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import card as cards
from . import scratch
from .bases import is_local_path, require_hub_id
from .errors import LoRAFileError, LoRAHubError
from .facts import RunFacts
from .health import require_publishable
from .hub_errors import known_tokens, strange_answer, token_in, translated
from .store import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, write_adapter
from .values import AdapterValue

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi, ModelCard

__all__ = ["HubAdapter", "fetch", "fetch_card", "is_whole", "list_adapters", "push", "weights_size"]

CARD_NAME = "README.md"


# ---- pulling ---------------------------------------------------------------------------------------------------------


def fetch(
    repo_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    allow_pickle: bool = False,
    **options: Any,
) -> Path:
    """The folder, in the Hub's cache, that holds the adapter's two files, both of one commit and whole.

    Nothing else of the repo is asked for. The bytes are compared with the hash that the Hub gives for them: a damaged
    file is thrown away and fetched once more.

    Args:
        repo_id: "user/name".
        subfolder: where in the repo the adapter is.
        revision: a branch, tag or commit; None is main.
        token: as of huggingface_hub.
        allow_pickle: take adapter_model.bin where there are no safetensors.
        options: as of `huggingface_hub.hf_hub_download`: cache_dir, local_files_only, force_download.

    Raises:
        LoRAHubError: no such repo, revision or file, no access, no connection, or damaged bytes; `kind` says which.
    """
    options |= {"token": token}
    subfolder = checked_subfolder(subfolder)
    config = _get(repo_id, CONFIG_NAME, subfolder, revision, options)
    depth = len(subfolder.split("/")) if subfolder else 0
    commit = config.parents[depth].name  # …/snapshots/<commit>/[subfolder/]adapter_config.json
    try:
        _get(repo_id, WEIGHTS_NAME, subfolder, commit, options, asked=revision)
    except LoRAHubError as error:
        if error.kind != "missing file" or not allow_pickle:
            raise
        _get(repo_id, PICKLE_NAME, subfolder, commit, options, asked=revision)
    return config.parent


def fetch_card(
    repo_id: str, *, most: int, revision: str | None = None, token: str | bool | None = None, **options: Any
) -> Path | None:
    """The repo's README.md in the Hub's cache; None if there is none, or it has more than `most` bytes.

    Raises:
        LoRAHubError: as `fetch`, but for a missing file.
    """
    size = weights_size(repo_id, name=CARD_NAME, revision=revision, token=token, **options)
    if size is not None and size > most:
        return None
    try:
        return _get(repo_id, CARD_NAME, None, revision, options | {"token": token})
    except LoRAHubError as error:
        if error.kind in ("missing file", "not cached"):
            return None
        raise


def weights_size(
    repo_id: str,
    *,
    name: str = WEIGHTS_NAME,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **_: Any,
) -> int | None:
    """Bytes of the weights (or another file) as the Hub gives them, before any is fetched; None if it cannot say."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if local_files_only or _offline():
        return None
    with contextlib.suppress(LoRAHubError), translated(repo_id, token=token):  # `fetch` will say what is wrong
        url = hf_hub_url(repo_id, name, subfolder=checked_subfolder(subfolder), revision=revision)
        return get_hf_file_metadata(url, token=token).size
    return None


def _get(
    repo_id: str,
    name: str,
    subfolder: str | None,
    revision: str | None,
    options: Mapping[str, Any],
    asked: str | None = None,
) -> Path:
    from huggingface_hub import hf_hub_download

    context: dict[str, Any] = {"file": name, "revision": asked or revision, "subfolder": subfolder}
    with translated(repo_id, token=options["token"], **context):
        for again in (False, True):
            path = Path(hf_hub_download(repo_id, name, subfolder=subfolder, revision=revision, **options))
            if _as_promised(path):
                return path
            offline = options.get("local_files_only") or _offline()
            if not offline:
                _forget(path)
            if again or offline:
                break
    error = LoRAHubError(
        f"The bytes of {name} from {repo_id!r} are not those that the Hub's hash promises.",
        name=repo_id,
        value=repo_id,
        remedy="Load it once with a connection, which fetches it anew." if offline else "Try again: nothing was kept.",
    )
    error.kind = "corrupted"
    raise error


def _offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _as_promised(path: Path) -> bool:
    """Whether a file of the cache has the hash that names its blob: sha256 for LFS, else git's sha1."""
    blob = Path(os.path.realpath(path))
    promised = blob.name
    if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", promised):
        return True  # a file system without links, or a server with other ETags
    lfs = len(promised) == 64
    hashes = [hashlib.sha256()] if lfs else [hashlib.sha1(usedforsecurity=False) for _ in range(2)]
    if not lfs:  # some mirrors give the sha1 of the bytes alone
        hashes[0].update(f"blob {blob.stat().st_size}\0".encode())
    with open(blob, "rb") as file:
        while chunk := file.read(2**20):
            for hashed in hashes:
                hashed.update(chunk)
    return promised in {hashed.hexdigest() for hashed in hashes}


def is_whole(path: str | os.PathLike[str]) -> bool:
    """Whether a file that others fetched is as the Hub promised; one that is not is thrown away, to be fetched anew."""
    if _as_promised(Path(path)) or _offline():
        return True
    _forget(Path(path))
    return False


def _forget(path: Path) -> None:
    """Take a damaged file out of the cache, so that nobody else meets it."""
    blob = os.path.realpath(path)
    for name in (path, blob):
        with contextlib.suppress(OSError):
            os.unlink(name)


def checked_subfolder(subfolder: str | None) -> str | None:
    """A folder inside a repo, as "a/b"; None for the root. Raises `LoRAFileError` for what leaves the repo."""
    if subfolder is None:
        return None
    parts = subfolder.strip("/").split("/") if subfolder.strip("/") else []
    if any(part in (".", "..", ".git", "") or re.search(r"[\\\x00-\x1f\x7f\ud800-\udfff]", part) for part in parts):
        raise LoRAFileError(
            f"subfolder={subfolder!r} is no folder inside a repo.",
            name="subfolder",
            value=subfolder,
            expected='such as "task" or "tasks/one"',
        )
    return "/".join(parts) or None


# ---- pushing ---------------------------------------------------------------------------------------------------------


def push(
    value: AdapterValue,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    card: str | Path | ModelCard | None = None,
    subfolder: str | None = None,
    base_model: str | None = None,
    force: bool = False,
    run: RunFacts | None = None,
    architecture: type[Any] | None = None,
    quantised: str | None = None,
) -> CommitInfo:
    """Push an adapter as one commit of adapter_config.json, adapter_model.safetensors and README.md.

    The repo is made if it is missing, and so is the branch. The commit names the one whose README was read as its
    parent, so that a push of somebody else in between is an error and is not overwritten.

    Args:
        value: the adapter.
        repo_id: "user/name", or "name" for the token's own user.
        private: visibility of a new repo; an existing one must have it already.
        token: as of huggingface_hub.
        revision: the branch; None is main.
        create_pr: open a pull request instead of committing.
        commit_message: None says what is pushed.
        card: words for the README: text, the path of a README.md, or a `huggingface_hub.ModelCard`. None keeps what
            stands there.
        subfolder: a folder for this adapter, in a repo of several.
        base_model: the base's id on the Hub; None takes the config's.
        force: push an adapter that is not finite or was never trained.
        run: how it was trained, for the card.
        architecture: the base's class, for the card and for those who load it.
        quantised: how the base was quantised while the adapter trained, for the card.

    Raises:
        LoRAHubError: the Hub refused or failed; `kind` says how. Nothing was pushed.
        LoRAMismatchError: the adapter is not finite, was never trained, or its base has no id on the Hub.
        LoRAFileError: the README's metadata is damaged, or a token or local path would be published.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not force:
        require_publishable(value)
    base = require_hub_id(value.config.base_model) if base_model is None else require_hub_id(base_model, given=True)
    subfolder = checked_subfolder(subfolder)
    value = _public(value, base, architecture)
    words = _words(card)
    tokens = known_tokens(token)
    context: dict[str, Any] = {"pushing": True, "token": token, "revision": revision, "create_pr": create_pr}
    message = commit_message or f"Push the adapter {f'{subfolder} ' if subfolder else ''}of {base}"
    with scratch.folder("push") as temporary:
        folder = write_adapter(value, temporary / "adapter")

        def checked_card(existing: str | None) -> str:
            text = cards.update(
                existing,
                value,
                run=run,
                base_model=base,
                repo_id=repo_id,
                subfolder=subfolder,
                architecture=_name_in_transformers(architecture),
                quantised=quantised,
                words=words,
            )
            _refuse_secrets(folder, {CARD_NAME: text, "the commit's message": message}, tokens)
            return text

        checked_card(None)  # what is wrong on this side is said before a repo is made
        with translated(repo_id, **context):
            api = HfApi(token=token)
            repo_id = _repo(api, repo_id, private)
            parent = _head(api, repo_id, revision, create_pr)
            existing = _readme(api, repo_id, parent, temporary / "cache")
        text = checked_card(existing)
        prefix = f"{subfolder}/" if subfolder else ""
        operations = [
            CommitOperationAdd(prefix + CONFIG_NAME, str(folder / CONFIG_NAME)),
            CommitOperationAdd(prefix + WEIGHTS_NAME, str(folder / WEIGHTS_NAME)),
            CommitOperationAdd(CARD_NAME, text.encode("utf-8")),
        ]
        with translated(repo_id, **context):
            return api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=parent,
            )


def _repo(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Make the repo if it is missing; its whole id."""
    made = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private is not None and bool(api.repo_info(made).private) != private:
        is_, asked = ("public", "private") if private else ("private", "public")
        error = LoRAHubError(
            f"{made!r} exists and is {is_}, not {asked}: nothing was pushed.",
            name="private",
            value=private,
            remedy="Change its visibility in the repo's settings, or leave private= out.",
        )
        error.kind = "visibility"
        raise error
    return made


def _head(api: HfApi, repo_id: str, revision: str | None, create_pr: bool) -> str | None:
    """The commit that the push starts from; a branch that is missing is made."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        return api.repo_info(repo_id, revision=revision).sha
    except RevisionNotFoundError:
        if revision is None or create_pr or revision.startswith("refs/"):
            raise
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.repo_info(repo_id, revision=revision).sha


def _readme(api: HfApi, repo_id: str, commit: str | None, cache: Path) -> str | None:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        path = api.hf_hub_download(repo_id, CARD_NAME, revision=commit, cache_dir=cache)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LoRAFileError(
            f"The {CARD_NAME} of {repo_id!r} is no UTF-8: {error}.",
            name=CARD_NAME,
            remedy="Save it as UTF-8; nothing was pushed.",
        ) from error


def _words(card: str | Path | ModelCard | None) -> str | None:
    """The user's words for the README."""
    if isinstance(card, str) and (re.fullmatch(r"\S+\.md", card) or ("\n" not in card and os.path.isfile(card))):
        card = Path(card)  # no README has these words
    if card is None or isinstance(card, str):
        return card
    if not isinstance(card, os.PathLike):
        return str(card)
    try:
        return Path(card).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LoRAFileError(
            f"The card {os.fspath(card)!r} cannot be read: {error}.",
            name="card",
            value=os.fspath(card),
            remedy="Give a README.md in UTF-8, or the text itself.",
        ) from error


# ---- what is not for the public --------------------------------------------------------------------------------------


def _public(value: AdapterValue, base: str, architecture: type[Any] | None) -> AdapterValue:
    """The adapter with its base's id and class, and without fields that name folders of this machine."""
    kept = {name: item for name, item in value.config.peft_fields.items() if not any(map(is_local_path, _texts(item)))}
    if architecture is not None and architecture.__module__ != "__main__":
        # Where PEFT writes it; `load_lora` compares it with the model that it is put on.
        mapping = {"base_model_class": architecture.__name__, "parent_library": architecture.__module__}
        kept.setdefault("auto_mapping", mapping)
    config = value.config.replace(base_model=base, peft_fields=kept)
    config.require_supported()
    for name, item in config.to_peft().items():
        if any(map(is_local_path, _texts(item))) and name != "target_modules":
            raise LoRAFileError(
                f"The config's {name}={item!r} is a path of this machine, which is not for publication.",
                name=name,
                value=item,
                remedy=f"Set another {name}, or none.",
            )
    return dataclasses.replace(value, config=config)


def _name_in_transformers(architecture: type[Any] | None) -> str | None:
    """The name of a class of transformers, which a card can load the base by."""
    ours = architecture is not None and architecture.__module__.startswith("transformers.")
    return architecture.__name__ if architecture is not None and ours else None


def _texts(item: Any) -> Iterator[str]:
    if isinstance(item, str):
        yield item
    elif isinstance(item, Mapping):
        for key, inner in item.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(item, (list, tuple)):
        for inner in item:
            yield from _texts(inner)


def _refuse_secrets(folder: Path, texts: Mapping[str, str], tokens: tuple[str, ...]) -> None:
    """Raise if what is to be pushed holds a token of the Hub. The token is not quoted."""
    with open(folder / WEIGHTS_NAME, "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little")).decode()
    found = {CONFIG_NAME: (folder / CONFIG_NAME).read_text(encoding="utf-8"), WEIGHTS_NAME: header, **texts}
    for name, text in found.items():
        if token_in(text, tokens):
            raise LoRAFileError(
                f"{name} holds what looks like a token of the Hub (hf_…): nothing was pushed.",
                name=name,
                remedy="Take it out, and revoke it at https://huggingface.co/settings/tokens if it is a real one.",
            )


# ---- finding ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubAdapter:
    """A repo on the Hub that says it holds an adapter of a base.

    Args:
        repo_id: "user/name".
        tags: as the Hub shows them.
        private: only for those with access.
        gated: its owner grants access first.
        downloads: in the last 30 days.
        likes: so far.
        last_modified: of the repo; None if the Hub does not say.
    """

    repo_id: str
    tags: tuple[str, ...] = ()
    private: bool = False
    gated: bool = False
    downloads: int = 0
    likes: int = 0
    last_modified: datetime | None = None


def list_adapters(
    base_model: str,
    *,
    author: str | None = None,
    search: str | None = None,
    limit: int | None = None,
    token: str | bool | None = None,
) -> list[HubAdapter]:
    """The adapters of a base on the Hub, by the base_model of their cards, most downloaded first.

    Args:
        base_model: the base's id, "org/name".
        author: only of this user or organisation.
        search: only with this in their id.
        limit: at most so many; None is all.
        token: as of huggingface_hub.

    Raises:
        LoRAMismatchError: `base_model` is no id. LoRAHubError: the Hub refused or failed; `kind` says how.
    """
    from huggingface_hub import HfApi

    base = require_hub_id(base_model, given=True)
    with translated(base, token=token):
        found = HfApi(token=token).list_models(
            filter=f"base_model:adapter:{base}", author=author, search=search, limit=limit, sort="downloads", full=True
        )
        return [_listed(model, base) for model in found]


def _listed(model: Any, base: str) -> HubAdapter:
    """One of the Hub's answer. Raises `LoRAHubError` for what is no description of a repo."""
    tags, counts = model.tags or [], (model.downloads or 0, model.likes or 0)
    texts = [model.id, *tags] if isinstance(tags, list) else [None]
    if not all(isinstance(text, str) for text in texts) or not all(type(count) is int for count in counts):
        raise strange_answer(base, f"a repo with id={model.id!r}, tags={tags!r}, downloads and likes {counts!r}")
    return HubAdapter(model.id, tuple(tags), bool(model.private), bool(model.gated), *counts, model.last_modified)
