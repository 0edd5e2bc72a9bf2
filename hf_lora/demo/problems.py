"""What a visitor may read of a failure: our own words, without paths, addresses of this machine, or tokens."""

from __future__ import annotations

import logging
import re

from ..errors import LoRAError, LoRAHubError
from ..hub_errors import known_tokens, redacted

__all__ = ["DemoError", "said"]

_log = logging.getLogger("hf_lora.demo")

# Absolute paths of any kind, in quotes up to the quote's end, and file URLs; an address on the Hub stays readable.
_QUOTED = re.compile(r"""(['"])(?:file://|~?/(?!/)|[A-Za-z]:\\|\\\\)[^'"]*\1""")
_PATHS = re.compile(r"""(?<![\w/.])(?:file://|~?/(?!/)|[A-Za-z]:\\|\\\\)[^\s'",;]+""")
_ADDRESSES = re.compile(r"\b(?:https?://)(?!(?:www\.)?(?:huggingface\.co|hf\.co)\b)[^\s'\",;]+")
_MOST = 400  # characters of a message

# A kind of `LoRAHubError` -> what a visitor can do about it; the errors' own remedies are for who runs the Space.
_HUB = {
    "invalid id": "{id} is not the id of a repo. An id looks like user/name.",
    "missing repo": "There is no public repo {id} on the Hub.",
    "no token": "There is no public repo {id} on the Hub.",
    "wrong token": "There is no public repo {id} on the Hub.",
    "forbidden": "{id} is not public, so it cannot be loaded here.",
    "gated": "{id} is gated, so it cannot be loaded here.",
    "missing file": "{id} holds no LoRA as safetensors (adapter_config.json and adapter_model.safetensors).",
    "rate limited": "The Hub asks this page to wait. Try again in a minute.",
    "offline": "This page runs without a connection to the Hub, so it cannot load {id}.",
    "not cached": "This page runs without a connection to the Hub, so it cannot load {id}.",
}
_NOT_NOW = "The Hub did not give {id}. Try again in a moment."


class DemoError(LoRAError):
    """What a visitor asked for cannot be done; the message is made for the page."""


def said(error: BaseException, what: str = "") -> str:
    """The failure in a sentence or two for the page. What is not ours is logged, and only said to have happened.

    Args:
        what: the adapter concerned, where one is.
    """
    if isinstance(error, DemoError):
        return error.message
    if isinstance(error, LoRAHubError):
        return _HUB.get(error.kind, _NOT_NOW).format(id=what or error.name or "the adapter")
    if type(error).__module__.partition(".")[0] == "gradio":  # ZeroGPU says so that a visitor's share is used up
        return clean(str(getattr(error, "message", error)))
    if isinstance(error, LoRAError):
        facts = "".join(f" {fact}." for fact in error.facts[:3])
        return clean(error.message + facts)
    _log.error("A request failed", exc_info=error)
    return "Something went wrong here, and it was noted. Nothing of yours was changed; try again."


def clean(text: str) -> str:
    """Text without local paths, other machines' addresses and tokens, cut to a length that a page can show."""
    text = redacted(text, known_tokens(None))
    text = _ADDRESSES.sub("…", _PATHS.sub("…", _QUOTED.sub("…", " ".join(text.split()))))
    return text if len(text) <= _MOST else text[:_MOST] + " …"
