"""An adapter's files: PEFT's format, read strictly and written atomically.

`adapter_config.json` and `adapter_model.safetensors` are a pair. The weights' metadata holds a digest of what the
config computes (rank, alpha, bias, …; not the base's name), so that a pair torn apart is seen while a config whose base
path was corrected by hand still loads. A write puts both files beside the old ones first, the config under the name
`.adapter_config.json.pending`, then renames the weights, then the config. Killed between the two renames, it leaves new
weights whose metadata holds the pending config's digest: readers take that one, and the next write completes the
rename. So at every instant `read_adapter` gives the old adapter or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from . import layout, safefile
from .config import LoRAConfig
from .errors import LoRAError, LoRAFileError
from .extras import asked_for
from .forms import forms_asked
from .layout import from_state_dict, to_state_dict
from .values import AdapterValue

__all__ = [
    "CONFIG_NAME",
    "PICKLE_NAME",
    "WEIGHTS_NAME",
    "from_state_dict",
    "read_adapter",
    "read_config",
    "to_state_dict",
    "weights_nbytes",
    "write_adapter",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
_MISNAMED = "model.safetensors"  # what some trainers call an adapter's weights
_PENDING = f".{CONFIG_NAME}.pending"
_TEMPORARY = ".hf_lora-"  # the temporary files' prefix

_DIGEST = "hf_lora.config_sha256"  # of what the config computes
_FILE_DIGEST = "hf_lora.config_file_sha256"  # of the config file's bytes, to recognise a pending one
_BLOCKS = "hf_lora.blocks"

_LARGEST_CONFIG = 16 * 2**20  # bytes; a config that lists every expert of a large model has about 2 MiB
_ATTEMPTS = 5  # a reader may meet a writer between its two renames


# -- reading ---------------------------------------------------------------------------------------------------------


def read_config(directory: str | os.PathLike[str]) -> LoRAConfig:
    """The config of the adapter in `directory`; reads no weights.

    Raises:
        LoRAFileError: the file is missing or malformed.
        LoRAConfigError: it is no PEFT config, or has an impossible value.
        LoRAUnsupportedError: another type of adapter, which is named.
    """
    folder = _folder(directory)
    metadata: Mapping[str, str] = {}
    if (folder / _PENDING).exists() and (folder / WEIGHTS_NAME).is_file():
        with safefile.reading(folder / WEIGHTS_NAME) as file:
            metadata = safefile.read_header(file, folder / WEIGHTS_NAME).metadata
    return _config(folder, metadata)


def read_adapter(directory: str | os.PathLike[str], *, allow_pickle: bool = False) -> AdapterValue:
    """Read the adapter in `directory`, all of it or nothing.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors (or .bin).
        allow_pickle: read adapter_model.bin where there is no safetensors file, with torch.load(weights_only=True).

    Raises:
        LoRAFileError: a file is missing, truncated, malformed, not finite, or the two do not fit.
        LoRAConfigError: the config is no PEFT config, or has an impossible value.
        LoRAUnsupportedError: a type, field or tensor that hf_lora does not compute.
    """
    folder = _folder(directory)
    for attempt in range(_ATTEMPTS):
        try:
            return _read(folder, allow_pickle)
        except _Torn:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.01)
    raise AssertionError("unreachable")


class _Torn(LoRAFileError):
    """Weights and config that were not written together."""


def _read(folder: Path, allow_pickle: bool) -> AdapterValue:
    weights = _weights_file(folder)
    if weights is None or weights.name == PICKLE_NAME:
        config = read_config(folder)  # first: another type of adapter is a better answer than a missing file
        config.require_supported()
        if weights is None:
            raise LoRAFileError(
                f"{folder} has no {WEIGHTS_NAME}.",
                name=WEIGHTS_NAME,
                value=_listed(folder),
                remedy=f"Put the adapter's weights there as {WEIGHTS_NAME}.",
            )
        return from_state_dict(config, safefile.read_pickle(weights, allow=allow_pickle), source=str(weights))
    if not (folder / _PENDING).exists():
        _config(folder, {}).require_supported()  # before the weights, for the same reason
    with safefile.reading(weights) as file:
        header = safefile.read_header(file, weights)
        config = _config(folder, header.metadata)
        config.require_supported()
        specs = {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}
        plan = layout.make_plan(config, specs, str(weights))
        tensors, together = safefile.read_tensors(file, weights, header)
        if not weights.exists() or not os.path.samestat(os.fstat(file.fileno()), weights.stat()):
            raise _Torn(f"{weights} was replaced while it was read.", name=weights.name, value=str(weights))
    blocks: Mapping[str, Any] = {}
    if _BLOCKS in header.metadata:
        blocks = safefile.load_json(header.metadata[_BLOCKS].encode(), f"{_BLOCKS} in {weights}")
    return layout.assemble(config, plan, tensors, layout.parse_blocks(blocks), str(weights), together)


def _folder(directory: str | os.PathLike[str]) -> Path:
    folder = Path(directory)
    if not os.path.isdir(folder):
        what = "is a file" if os.path.exists(folder) else "does not exist"
        raise LoRAFileError(
            f"{folder} {what}; an adapter is a folder.",
            name=str(folder),
            value=str(folder),
            remedy=f"Give the folder that holds {CONFIG_NAME}.",
        )
    return folder


def _listed(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):  # it may be gone by now
        return sorted(entry.name for entry in folder.iterdir())[:20]
    return []


def _weights_file(folder: Path) -> Path | None:
    for name in (WEIGHTS_NAME, PICKLE_NAME, _MISNAMED):
        if (folder / name).exists() or (folder / name).is_symlink():
            return folder / name
    return None


def _config(folder: Path, metadata: Mapping[str, str]) -> LoRAConfig:
    """The config that belongs to weights with this metadata: the pending one if they were written with it."""
    path = folder / CONFIG_NAME
    pending = folder / _PENDING
    if _FILE_DIGEST in metadata and pending.is_file():
        with contextlib.suppress(LoRAFileError):  # a writer may just have renamed it
            data = safefile.read_bytes(pending, most=_LARGEST_CONFIG)
            if hashlib.sha256(data).hexdigest() == metadata[_FILE_DIGEST]:
                return _parse(data, pending)
    config = _parse(safefile.read_bytes(path, most=_LARGEST_CONFIG), path)
    if metadata.get(_DIGEST, _digest(config)) != _digest(config):
        raise _Torn(
            f"{path} and the weights beside it were not saved together: the rank, alpha, bias or another field that "
            "changes what the adapter computes differs from the config that the weights were saved with.",
            name=CONFIG_NAME,
            value=_digest(config),
            expected=metadata[_DIGEST],
            remedy="Fetch both files from one commit, or save the adapter again.",
        )
    return config


def _parse(data: bytes, path: Path) -> LoRAConfig:
    fields = safefile.load_json(data, str(path))
    try:
        return LoRAConfig.from_peft(fields)
    except LoRAError as error:
        error.message = f"{path}: {error.message}"
        error.args = (error.message,)
        raise


def _digest(config: LoRAConfig) -> str:
    """Digest of what the config makes the tensors compute; a base's name, dropout or targets do not change that."""
    computed = {
        "r": config.r,
        "alpha": float(config.r) if config.alpha is None else config.alpha,
        "use_rslora": config.use_rslora,
        "rank_pattern": list(config.rank_pattern.items()),  # in order: the first match wins
        "alpha_pattern": list(config.alpha_pattern.items()),
        "bias": config.bias,
        "other": config.unsupported(),
    }
    extras = asked_for(config)
    if extras:  # a plain adapter's digest stays what it was
        computed["extras"] = extras
    forms = forms_asked(config)
    if forms:
        written = config.to_peft()
        computed["forms"] = {name: written[name] for name in (*forms, "qalora_group_size")}
    if config.target_parameters is not None:
        computed["target_parameters"] = config.target_parameters
    if config.layer_replication is not None:
        computed["layer_replication"] = config.layer_replication
    return hashlib.sha256(json.dumps(computed, sort_keys=True).encode()).hexdigest()


# -- writing ---------------------------------------------------------------------------------------------------------


def write_adapter(value: AdapterValue, directory: str | os.PathLike[str]) -> Path:
    """Write the two files of an adapter into `directory`, which is made if need be; returns it.

    A kill at any point leaves the old adapter or the new one, as `read_adapter` sees it. Other files stay.

    Raises:
        LoRAFileError: the files cannot be written (permission, full disk); the old ones are as before.
    """
    folder = Path(directory)
    text, tensors, metadata = _contents(value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if (folder / name).is_dir():
                raise IsADirectoryError(f"{folder / name} is a folder")
        with _locked(folder):
            _finish_and_clean(folder)
            _replace_pair(folder, text, tensors, metadata)
    except OSError as error:
        raise LoRAFileError(
            f"The adapter cannot be saved to {folder}: {error}.",
            name=str(folder),
            value=str(folder),
            remedy="Free some space or choose a folder that you may write to; what was there is unchanged.",
        ) from error
    return folder


def weights_nbytes(value: AdapterValue) -> int:
    """Bytes of the adapter_model.safetensors that `write_adapter` would write; the factors may be on meta."""
    _, tensors, metadata = _contents(value)
    return safefile.written_nbytes(tensors, metadata)


def _contents(value: AdapterValue) -> tuple[bytes, dict[str, Tensor], dict[str, str]]:
    """The text of the config, and tensors and metadata of the weights."""
    config = layout.disk_config(value)
    if not safefile.is_text([config.to_peft(), list(to_state_dict(value))]):
        raise LoRAFileError(
            "A text of the config, or a module's path, holds half of a character, which no file can.",
            name=CONFIG_NAME,
            value=config.base_model,
            remedy="Set base_model, task_type, the targets and what else is text to text.",
        )
    text = (json.dumps(config.to_peft(), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    config = LoRAConfig.from_peft(json.loads(text))  # sort_keys may reorder patterns; what counts is what is read back
    metadata = {
        "format": "pt",
        _DIGEST: _digest(config),
        _FILE_DIGEST: hashlib.sha256(text).hexdigest(),
    }
    blocks = layout.blocks_json(value)
    if blocks is not None:
        metadata[_BLOCKS] = blocks
    return text, to_state_dict(value), metadata


def _replace_pair(folder: Path, text: bytes, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    weights = folder / f"{_TEMPORARY}{os.getpid()}.safetensors"
    config = folder / f"{_TEMPORARY}{os.getpid()}.json"
    pending = folder / _PENDING
    try:
        with open(weights, "wb") as file:
            safefile.write_tensors(file, tensors, metadata)
            _flush(file)
        with open(config, "wb") as file:
            file.write(text)
            _flush(file)
        os.replace(config, pending)
        safefile.fsync_directory(folder)  # the pending config is there before the weights that need it
        os.replace(weights, folder / WEIGHTS_NAME)
    except BaseException:
        # Once the weights have their name, the pending config is theirs: the next reader or writer needs it.
        torn = not weights.exists() and not config.exists()
        for path in (weights, config) if torn else (weights, config, pending):
            with contextlib.suppress(OSError):
                path.unlink()
        raise
    safefile.fsync_directory(folder)
    try:
        os.replace(pending, folder / CONFIG_NAME)
    except OSError as error:
        raise LoRAFileError(
            f"The adapter is saved to {folder}, but its {CONFIG_NAME} could not take the old one's place: {error}.",
            name=CONFIG_NAME,
            value=str(folder),
            remedy=f"Save it again, or rename {_PENDING} to {CONFIG_NAME}: until then only hf_lora reads it.",
        ) from error
    safefile.fsync_directory(folder)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _finish_and_clean(folder: Path) -> None:
    """Complete a write that was killed between its renames; remove what others left behind."""
    pending, weights = folder / _PENDING, folder / WEIGHTS_NAME
    if pending.is_file():
        written_with = None
        with contextlib.suppress(LoRAFileError), safefile.reading(weights) as file:
            written_with = safefile.read_header(file, weights).metadata.get(_FILE_DIGEST)
        if written_with == hashlib.sha256(pending.read_bytes()).hexdigest():
            os.replace(pending, folder / CONFIG_NAME)
            safefile.fsync_directory(folder)
        else:
            pending.unlink()
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time, where the system can lock a folder; a killed writer's lock is gone with it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
