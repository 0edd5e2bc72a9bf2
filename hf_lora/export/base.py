"""The base model's files: where they are, and what tensors they hold. Reads headers, no weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import safefile
from ..errors import LoRAFileError, LoRAHubError, LoRAUnsupportedError
from ..hub_errors import translated

__all__ = ["BaseFiles", "Stored", "config_of", "open_base"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_JSON = 256 * 2**20  # bytes; the index of a model with 10⁵ experts has about 20 MiB
_ABSENT = ("missing file", "offline", "not cached", "unreachable")  # a cache does not say what a repo lacks
_OTHER_FORMATS = ("pytorch_model*.bin", "*.gguf", "tf_model.h5", "flax_model.msgpack", "*.pth")

# What goes with a model beside config.json and its weights: how it generates, how its inputs are made, its licence.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "spiece.model",
    "source.spm",
    "target.spm",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class Stored:
    """One tensor in one of the base's files."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    at: int  # bytes from the file's beginning
    nbytes: int

    def chunks(self, most: int) -> Iterator[Tensor]:
        """The tensor's values in order, as flat tensors of at most about `most` bytes each."""
        size = self.dtype.itemsize
        step, left = max(most // size, 1) * size, self.nbytes
        with safefile.reading(self.file) as file:
            file.seek(self.at)
            while left:
                yield _filled(file, self.file, min(step, left)).view(self.dtype)
                left -= min(step, left)

    def read(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        with safefile.reading(self.file) as file:
            file.seek(self.at)
            return _filled(file, self.file, self.nbytes).view(self.dtype).view(self.shape)


def _filled(file: Any, path: Path, nbytes: int) -> Tensor:
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    view, done = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
    while done < nbytes:
        count = file.readinto(view[done:])
        if not count:
            raise LoRAFileError(f"{path} ended while it was read.", name=path.name, value=str(path))
        done += count
    return buffer


@dataclass(frozen=True)
class BaseFiles:
    """A base model on disk.

    Args:
        name: as it was given, a folder or an id.
        folder: holds config.json.
        config: config.json as it stands.
        tensors: by the files' names.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]

    def companions(self) -> list[Path]:
        """The files to copy, relative to the folder: an allow list, so that nothing else ever comes along."""
        found = {path for pattern in COMPANIONS for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path.relative_to(self.folder) for path in found)


def open_base(name: str, *, revision: str | None = None, **options: Any) -> BaseFiles:
    """Find a base in a folder or on the Hub (an existing folder wins), and read its headers.

    Args:
        name: a folder, or an id.
        revision: on the Hub.
        options: token, cache_dir, local_files_only.

    Raises:
        LoRAFileError: it is not there, or a file is missing or damaged.
        LoRAUnsupportedError: its weights are quantised, or in no safetensors file.
    """
    folder, fetch = _here(Path(name)) if os.path.isdir(name) else _on_the_hub(name, revision, options)
    path = folder / "config.json"
    if not path.is_file():
        what = "an adapter, not a model" if (folder / "adapter_config.json").is_file() else "no model: no config.json"
        raise LoRAFileError(
            f"{name!r} is {what}.",
            name="config.json",
            value=name,
            remedy="Give the base model's folder or id (--base).",
        )
    config = safefile.load_json(safefile.read_bytes(path, most=_LARGEST_JSON), str(path))
    _refuse_quantised(name, config)
    files, named = _shards(name, folder, fetch)
    tensors = _tensors([fetch(file) for file in files])
    missing = sorted(named - tensors.keys())
    if missing:
        raise LoRAFileError(
            f"{folder / INDEX} names {len(missing)} tensors that none of its files has: {', '.join(missing[:5])}.",
            name=INDEX,
            value=missing,
            remedy="Download the base again: one of its files is another version's.",
        )
    return BaseFiles(name, folder, config, tensors)


def config_of(name: str) -> Any:
    """Transformers' config of a base in a folder or on the Hub (an existing folder wins); fetches no weights.

    Raises:
        LoRAFileError, LoRAHubError: there is none, or transformers does not know it.
    """
    from transformers import AutoConfig

    around: Any = contextlib.nullcontext() if os.path.isdir(name) else translated(name, file="config.json")
    try:
        with around:
            return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, LoRAFileError):
            raise
        raise LoRAFileError(
            f"transformers cannot read the config of {name!r}: {str(error).splitlines()[0]}",
            name="config.json",
            value=name,
            remedy="Give the base model's folder or id (--base).",
        ) from error


def _refuse_quantised(name: str, config: dict[str, Any]) -> None:
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    found = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise LoRAUnsupportedError(
            f"The base {name!r} is quantised ({method}), so its weights take no ΔW.",
            name="quantization_config",
            value=found,
            expected="dense float weights",
            remedy="Give the base that it was quantised from (--base with force), or dequantise it first.",
        )


def _shards(name: str, folder: Path, fetch: Callable[[str], Path]) -> tuple[list[str], set[str]]:
    """The files of the weights, and the tensors that an index says are in them (none where there is no index)."""
    if (folder / SINGLE).is_file():
        return [SINGLE], set()
    if not (folder / INDEX).is_file():
        others = sorted({path.name for pattern in _OTHER_FORMATS for path in folder.glob(pattern)})
        raise LoRAUnsupportedError(
            f"The base {name!r} has neither {SINGLE} nor {INDEX}"
            + (f", only {', '.join(others[:5])}, which is not read tensor by tensor." if others else "."),
            name=SINGLE,
            value=others,
            remedy="Load it with from_pretrained() and save it once, which writes safetensors; or load it and "
            "the adapter, merge_lora() and save_pretrained().",
        )
    path = folder / INDEX
    weight_map = safefile.load_json(safefile.read_bytes(path, most=_LARGEST_JSON), str(path)).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(
        isinstance(shard, str) and shard == os.path.basename(shard) and shard.endswith(".safetensors")
        for shard in names
    ):
        raise LoRAFileError(f"{path} does not map tensors to safetensors files beside it.", name=INDEX, value=names[:3])
    return sorted(set(names)), set(weight_map or ())


def _tensors(files: list[Path]) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for path in files:
        with safefile.reading(path) as file:
            header = safefile.read_header(file, path)
        for key, entry in header.entries.items():
            if key in found:
                raise LoRAFileError(
                    f"{key!r} stands in {found[key].file.name} and in {path.name}.",
                    name=key,
                    value=str(path),
                    remedy="Save the base again.",
                )
            at = header.data_start + entry.start
            found[key] = Stored(path, entry.dtype, entry.shape, at, entry.stop - entry.start)
    return found


def _here(folder: Path) -> tuple[Path, Callable[[str], Path]]:
    return folder, lambda wanted: folder / wanted


def _on_the_hub(name: str, revision: str | None, options: dict[str, Any]) -> tuple[Path, Callable[[str], Path]]:
    """The folder of the small files in the Hub's cache, and what fetches one more file into it."""
    from huggingface_hub import hf_hub_download, snapshot_download

    def asked(fetch: Callable[..., Any], *arguments: Any, **more: Any) -> Path:
        file = arguments[0] if arguments else "config.json"
        try:
            with translated(name, file=file, revision=revision, token=options.get("token")):
                return Path(fetch(name, *arguments, revision=revision, **options, **more))
        except LoRAHubError as error:
            error.remedy = f"{error.remedy or ''} The base can be a folder, too: --base (base=).".strip()
            raise

    folder = asked(snapshot_download, allow_patterns=["config.json", INDEX, *COMPANIONS])
    asked(hf_hub_download, "config.json")
    try:
        asked(hf_hub_download, INDEX)
    except LoRAHubError as error:
        if error.kind not in _ABSENT:
            raise
        try:
            asked(hf_hub_download, SINGLE)
        except LoRAHubError as second:
            if second.kind != "missing file":  # then it has another format, which is said better elsewhere
                raise
    return folder, lambda wanted: asked(hf_hub_download, wanted)
