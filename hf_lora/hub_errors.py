"""What can go wrong between here and the Hub, one row a failure: its kind, a message and a remedy."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LoRAError, LoRAHubError

__all__ = ["failure", "known_tokens", "redacted", "strange_answer", "token_in", "translated"]

_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")
_TOKEN_LIKE = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}|(?<=Bearer )\S+")


# ---- tokens ----------------------------------------------------------------------------------------------------------


def known_tokens(token: str | bool | None) -> tuple[str, ...]:
    """The tokens that a call may use: the one given, else this machine's."""
    if isinstance(token, str):
        return (token,) if token else ()
    if token is False:
        return ()
    from huggingface_hub import get_token

    found = get_token()
    return (found,) if found else ()


def token_in(text: str, tokens: tuple[str, ...]) -> bool:
    """Whether `text` holds one of these tokens, or something that looks like a token of the Hub."""
    return bool(_TOKEN.search(text)) or any(token in text for token in tokens if len(token) >= 12)


def redacted(text: str, tokens: tuple[str, ...]) -> str:
    """`text` without these tokens and without what looks like one."""
    for token in sorted(tokens, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", "hf_…", text)
    return _TOKEN_LIKE.sub("hf_…", text)


# ---- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Facts:
    """What is known of one failure."""

    error: BaseException
    pushing: bool
    authenticated: bool
    create_pr: bool
    fetching: bool  # a file, which could be in the cache

    @property
    def status(self) -> int | None:
        status = getattr(getattr(self.error, "response", None), "status_code", None)
        return status if isinstance(status, int) else None

    @property
    def said(self) -> str:
        """What the Hub said, on one line."""
        headers = getattr(getattr(self.error, "response", None), "headers", {})
        said = getattr(self.error, "server_message", None) or headers.get("X-Error-Message")
        return " ".join(str(said or self.error or type(self.error).__name__).split())[:300]

    @property
    def url(self) -> str:
        """What was asked for; empty if the answer does not know."""
        try:
            return str(getattr(self.error, "response").url)  # noqa: B009  (no class of its own says that it has one)
        except (AttributeError, RuntimeError):
            return ""

    @property
    def from_the_client(self) -> bool:
        """Whether huggingface_hub met something that it did not expect (a body of another form, endless redirects)."""
        if isinstance(self.error, TypeError) and "keyword argument" in str(self.error):
            return False  # the caller's mistake
        frames = traceback.extract_tb(self.error.__traceback__)
        return any("huggingface_hub" in Path(frame.filename).parts for frame in frames)

    def is_a(self, *names: str) -> bool:
        """Whether the error's class, or one it derives from, has one of these names.

        By name: the client's HTTP library (httpx, httpx2) is its own affair.
        """
        return any(cls.__name__ in names for cls in type(self.error).__mro__)


@dataclass(frozen=True)
class _Case:
    kind: str
    meets: Callable[[_Facts], bool]
    message: str  # of {repo}, {where}, {file}, {revision}, {said}, {wait}, {verb}
    remedy: str


def _status(*statuses: int) -> Callable[[_Facts], bool]:
    return lambda facts: facts.status in statuses


def _class(*names: str) -> Callable[[_Facts], bool]:
    return lambda facts: facts.is_a(*names)


_LOGIN = "Run `hf auth login`, set HF_TOKEN, or pass token=."

# The first row that meets a failure names it.
_CASES = (
    _Case(
        "invalid id",
        _class("HFValidationError"),
        "{repo!r} is neither a folder here nor the id of a repo.",
        'Check the path, or give an id such as "user/name".',
    ),
    _Case(
        "wrong token",
        lambda f: f.status == 401 and "invalid credentials" in f.said.lower(),
        "The Hub does not know the token that was sent for {repo!r} (expired, revoked or mistyped).",
        "Make a new token at https://huggingface.co/settings/tokens, then run `hf auth login` or pass token=.",
    ),
    _Case(
        "no token",
        lambda f: f.is_a("LocalTokenNotFoundError") or (f.pushing and not f.authenticated and f.status in (401, 403)),
        "There is no token, and the Hub wants one to {verb} {repo!r}.",
        _LOGIN,
    ),
    _Case(
        "gated",
        _class("GatedRepoError"),
        "{repo!r} is gated: its owner has to grant access first.",
        "Ask for access at https://huggingface.co/{repo}, and use the token of the account that was granted it.",
    ),
    _Case("disabled", _class("DisabledRepoError"), "The Hub has disabled {repo!r}.", "Write to its owner."),
    _Case(
        "missing revision",
        _class("RevisionNotFoundError"),
        "{repo!r} has no revision {revision!r}.",
        "Name a branch, a tag or a full commit hash of that repo.",
    ),
    _Case(
        "missing file",
        lambda f: f.is_a("EntryNotFoundError") and not f.is_a("LocalEntryNotFoundError"),
        "The repo {repo!r} has no {file}{where}.",
        "Name a repo, subfolder and revision that hold an adapter; an adapter_model.bin needs allow_pickle=True.",
    ),
    _Case(
        "missing repo",
        lambda f: f.is_a("RepositoryNotFoundError") and f.authenticated,
        "There is no repo {repo!r}, or it is private and this token may not see it.",
        "Check the id; for a private repo use a token of an account with access.",
    ),
    _Case(
        "missing repo",
        lambda f: f.is_a("RepositoryNotFoundError") or f.status == 401,
        "There is no repo {repo!r} that can be seen without a token.",
        f"Check the id. If it is private: {_LOGIN[0].lower()}{_LOGIN[1:]}",
    ),
    _Case(
        "no pull request",
        lambda f: f.create_pr and f.status in (400, 403, 404, 405, 501),
        "The Hub refused to open a pull request on {repo!r}: {said}",
        "Check that its discussions are enabled, or push to a branch: revision=, without create_pr.",
    ),
    _Case(
        "forbidden",
        lambda f: f.status == 403,
        "This token may not {verb} {repo!r}: {said}",
        "Use a token with that permission, or, to suggest a change to another's repo, create_pr=True.",
    ),
    _Case(
        "conflict",
        _status(409),
        "Another change of {repo!r} was under way: {said}",
        "Try again in a moment.",
    ),
    _Case(
        "changed",
        _status(412),
        "Somebody else pushed to {repo!r}{where} since its README was read: nothing was pushed.",
        "Push again: it then starts from what is there now.",
    ),
    _Case(
        "rate limited",
        _status(429),
        "The Hub says that there were too many requests from here ({repo!r}).{wait}",
        "Try again later; with a token the limits are higher.",
    ),
    _Case(
        "server",
        lambda f: f.status is not None and f.status >= 500,
        "The Hub failed ({said}) while asked for {repo!r}.",
        "Try again later; https://status.huggingface.co says how it is.",
    ),
    _Case(
        "card",
        lambda f: f.status == 400 and f.url.endswith("/api/validate-yaml"),
        "The Hub does not take the metadata of the README of {repo!r}: {said}",
        "Correct the lines between the two --- at its top (or in card=); nothing was pushed.",
    ),
    _Case(
        "refused", lambda f: f.status is not None, "The Hub refused to {verb} {repo!r}: {said}", "Correct what it says."
    ),
    _Case(
        "offline",
        lambda f: f.is_a("OfflineModeIsEnabled") and not f.fetching,
        "The Hub has to be asked for {repo!r}, and may not be (HF_HUB_OFFLINE).",
        "Unset HF_HUB_OFFLINE.",
    ),
    _Case(
        "offline",
        _class("OfflineModeIsEnabled"),
        "{repo!r} is neither a folder here nor whole in the cache, and the Hub may not be asked "
        "(HF_HUB_OFFLINE or local_files_only).",
        "Check the path, or allow the connection once: the files are then in the cache.",
    ),
    _Case(
        "stalled",
        lambda f: f.is_a("TimeoutException", "TimeoutError") and not f.fetching,
        "The Hub stopped answering while asked for {repo!r}.",
        "Try again: pushing what was pushed all the same changes nothing.",
    ),
    _Case(
        "stalled",
        _class("TimeoutException", "TimeoutError"),
        "The Hub stopped answering while asked for {repo!r}, and {file} is not in the cache.",
        "Try again; HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT (seconds) say how long to wait.",
    ),
    _Case(
        "unreachable",
        lambda f: f.is_a("ConnectError", "ProxyError", "UnsupportedProtocol") and not f.fetching,
        "The Hub cannot be reached, and has to be asked for {repo!r}.",
        "Check the connection and the proxy.",
    ),
    _Case(
        "unreachable",
        _class("ConnectError", "ProxyError", "UnsupportedProtocol"),
        "{repo!r} is neither a folder here nor in the cache, and the Hub cannot be reached.",
        "Check the path, the connection and the proxy.",
    ),
    _Case(
        "cut",
        lambda f: f.pushing and f.is_a("TransportError", "ConnectionError"),
        "The connection broke off during the push to {repo!r}: {said}",
        "Push again: if the commit was made all the same, that changes nothing.",
    ),
    _Case(
        "cut",
        lambda f: f.is_a("TransportError", "ConnectionError") or "Consistency check failed" in str(f.error),
        "The connection broke off while {file} of {repo!r} was fetched: {said}",
        "Try again; nothing of the broken file was kept.",
    ),
    _Case(
        "no hub",
        _class("FileMetadataError"),
        "What answered for {repo!r} is not the Hub: {said}",
        "Check HF_ENDPOINT and the proxy.",
    ),
    _Case(
        "not cached",
        _class("LocalEntryNotFoundError"),
        "{repo!r} is neither a folder here nor whole in the cache, and the Hub did not give {file}: {said}",
        "Check the path and the connection (HF_HUB_OFFLINE?).",
    ),
    _Case("failed", _class("RuntimeError"), "The transfer of {repo!r} failed: {said}", "Try again."),
    _Case(
        "disk",
        _class("OSError"),
        "The files of {repo!r} cannot be written here: {said}",
        "Free some space, or choose a folder that you may write to: cache_dir= or HF_HUB_CACHE.",
    ),
    _Case(
        "strange answer",
        lambda f: f.from_the_client,
        "What answered for {repo!r} is not the Hub, or not as the client knows it: {said}",
        "Check HF_ENDPOINT and the proxy; another version of huggingface_hub may understand it.",
    ),
)


def failure(
    error: BaseException,
    repo_id: str,
    *,
    pushing: bool = False,
    file: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
) -> LoRAHubError | None:
    """The typed error for what huggingface_hub raised; None if that says nothing of the Hub."""
    tokens = known_tokens(token)
    error = _root(error)
    facts = _Facts(error, pushing, bool(tokens), create_pr, file is not None)
    case = next((case for case in _CASES if case.meets(facts)), None)
    if case is None:
        return None
    retry_after = _retry_after(error) if facts.status == 429 else None
    place = [f"in {subfolder}" if subfolder else "", f"at {revision}" if revision else ""]
    words = {
        "repo": repo_id,
        "file": file or "a file",
        "revision": revision or "main",
        "where": "".join(f" {part}" for part in place if part),
        "said": facts.said,
        "wait": "" if retry_after is None else f" It says to wait {retry_after:g} s.",
        "verb": "push to" if pushing else "read",
    }
    found = LoRAHubError(
        redacted(case.message.format(**words), tokens),
        name=file if case.kind == "missing file" else repo_id,
        value=repo_id,
        remedy=case.remedy.replace("{repo}", repo_id),
    )
    found.kind, found.status, found.retry_after = case.kind, facts.status, retry_after
    return found


def strange_answer(repo_id: str, said: str) -> LoRAHubError:
    """The error for an answer that is well-formed and says something impossible."""
    case = next(case for case in _CASES if case.kind == "strange answer")
    message = case.message.format(repo=repo_id, said=said[:300])
    error = LoRAHubError(message, name=repo_id, value=repo_id, remedy=case.remedy)
    error.kind = case.kind
    return error


def _root(error: BaseException) -> BaseException:
    """What is behind the client's "not in the cache either"."""
    generic = ("LocalEntryNotFoundError", "ValueError", "RuntimeError")
    while error.__cause__ is not None and type(error).__name__ in generic:
        error = error.__cause__
    if type(error).__name__ == "LocalEntryNotFoundError" and "outgoing traffic has been disabled" in str(error):
        from huggingface_hub.errors import OfflineModeIsEnabled

        return OfflineModeIsEnabled(str(error))
    return error


def _retry_after(error: BaseException) -> float | None:
    headers: Any = getattr(getattr(error, "response", None), "headers", {})
    try:
        return max(float(headers.get("Retry-After")), 0.0)
    except (TypeError, ValueError):
        return None


@contextlib.contextmanager
def translated(repo_id: str, **context: Any) -> Iterator[None]:
    """Within the block, what huggingface_hub raises becomes a `LoRAHubError`. `context` as of `failure`."""
    try:
        yield
    except LoRAError:
        raise
    except Exception as error:  # the client's parsing of an answer raises anything
        found = failure(error, repo_id, **context)
        if found is None:
            raise
        leaks = redacted(_told(error), known_tokens(context.get("token"))) != _told(error)
        raise found from (None if leaks else error)


def _told(error: BaseException | None) -> str:
    """All that a traceback of this error would print of messages."""
    texts, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)
