"""Which base model is meant: an id on the Hub, told from a folder; and whether two names mean the same base."""

from __future__ import annotations

import os
import re

from .errors import LoRAMismatchError

__all__ = ["hub_id", "is_hub_id", "is_local_path", "require_hub_id", "same_base"]

# What the Hub accepts: one or two components of at most 96 characters, no "--" or "..", no "." or "-" at an end.
_COMPONENT = r"(?![.-])[\w.-]{1,96}(?<![.-])"
_ID = re.compile(rf"(?!.*(?:--|\.\.))(?:{_COMPONENT}/)?{_COMPONENT}", re.ASCII)
_URL = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[\w.-]+(?:/[\w.-]+)?)/?", re.ASCII)
# The Hub's cache: …/models--org--name/snapshots/<commit>[/…]
_SNAPSHOT = re.compile(r"(?:^|[\\/])models--(?P<id>[^\\/]+)[\\/]snapshots[\\/][0-9a-f]{40}(?:[\\/].*)?$")
_LOCAL = re.compile(r"[\\/~]|\.{1,2}(?:[\\/]|$)|[A-Za-z]:[\\/]|file:", re.IGNORECASE)

# The same weights, quantised or republished: what stands around the name then. Compared in lower case.
_SUFFIXES = re.compile(r"(?:-unsloth)?(?:-(?:bnb|gptq|awq|gguf|fp8|nf4|int4|int8|4-?bit|8-?bit|dynamic|hf))+$")
_PREFIXES = re.compile(r"^meta-(?=llama)")


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form of a model's id on the Hub ("org/name", or an old one such as "gpt2")."""
    return bool(_ID.fullmatch(name)) and not name.endswith(".git")


def is_local_path(name: str) -> bool:
    """Whether `name` can only be a path on some machine: absolute, relative to "." or "~", a drive, a file URL."""
    return bool(_LOCAL.match(name))


def hub_id(name: str | None, *, folders: bool = True) -> str | None:
    """The id on the Hub that a base's name or path stands for; None if it is a folder, empty, or no id.

    Args:
        name: as `config._name_or_path` or base_model_name_or_path: an id, its URL, a snapshot in the Hub's cache
            (which yields the id), or a folder.
        folders: a folder of that name here is what is meant, as in from_pretrained(); False for what can only be an id.
    """
    name = (name or "").strip()
    if (cached := _SNAPSHOT.search(name)) is not None:
        name = cached["id"].replace("--", "/", 1)
        return name if is_hub_id(name) else None
    if (url := _URL.fullmatch(name)) is not None:
        name = url["id"]
    return name if is_hub_id(name) and not (folders and os.path.isdir(name)) else None


def require_hub_id(name: str | None, *, given: bool = False) -> str:
    """`hub_id`, or a `LoRAMismatchError` that asks for an id. `given`: as an id, so that no folder is meant."""
    found = hub_id(name, folders=not given)
    if found is None:
        what = f"{name!r} is a folder or no id on the Hub" if name else "The adapter does not say its base model"
        what += ": who pulls the adapter could not find its base"
        raise LoRAMismatchError(
            f"base_model={name!r} is no id on the Hub." if given else f"{what}.",
            name="base_model_name_or_path",
            value=name,
            expected='"org/name"',
            remedy='Pass base_model="org/name", the base\'s id on the Hub.',
        )
    return found


def same_base(one: str, other: str) -> bool:
    """Whether two ids mean one base: mirrors, quantised copies and another case of letters do.

    "NousResearch/Llama-2-7b-hf" is "meta-llama/Llama-2-7b-hf", and "unsloth/llama-3.2-3b-bnb-4bit" is
    "meta-llama/Llama-3.2-3B": only the last component counts, without the marks of a quantisation.
    """
    return _core(one) == _core(other)


def _core(name: str) -> str:
    last = name.rpartition("/")[2].lower()
    return _PREFIXES.sub("", _SUFFIXES.sub("", last) or last)
