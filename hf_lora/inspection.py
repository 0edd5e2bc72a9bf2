"""What an adapter is, read from its files alone: also of one that hf_lora cannot load, as far as its files say."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import architectures as arch
from . import hub, safefile, store
from .errors import LoRAError, LoRAFileError, LoRAHubError
from .facts import TRAINER_STATE, RunFacts
from .health import Finding, examine, parts_of
from .hub_errors import translated
from .spectrum import delta_norm, effective_rank, singular_values
from .values import AdapterValue

__all__ = ["AdapterInfo", "inspect", "roles_of_path"]

PathLike = str | os.PathLike[str]

_TOP = 8  # singular values that are told
_LARGEST_CONFIG = 16 * 2**20
_CHUNK = 2**20
_WEIGHTS = (store.WEIGHTS_NAME, store.PICKLE_NAME, "model.safetensors")


@dataclass(frozen=True)
class Problem:
    """Why the adapter cannot be loaded: an error's class, what it says, and what to do."""

    type: str
    message: str
    remedy: str | None
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scale:
    """Layers of one rank and alpha."""

    rank: int
    alpha: float
    scaling: float
    layers: int


@dataclass(frozen=True)
class Spectrum:
    """ΔW of the layers of one role.

    Args:
        delta_norm: √Σ‖ΔW‖² (Frobenius) over the layers.
        effective_rank: exp(entropy of the normalised singular values), the mean over the layers.
        smallest_rank, largest_rank: of the layers, the same.
        singular_values: the largest eight, each the mean over the layers.
    """

    delta_norm: float
    effective_rank: float
    smallest_rank: float
    largest_rank: float
    singular_values: tuple[float, ...]


@dataclass(frozen=True)
class Target:
    """The layers that play one role.

    Args:
        role: "q", "down", …; several for a fused layer ("q+k+v"); the modules' name where names do not tell.
        modules: last components of their paths.
        layers: how many.
        parameters: numbers in their factors.
        spectrum: None if it was not asked for.
    """

    role: str
    modules: tuple[str, ...]
    layers: int
    parameters: int
    spectrum: Spectrum | None = None


@dataclass(frozen=True)
class Head:
    """A module that the adapter holds whole."""

    path: str
    parameters: int


@dataclass(frozen=True)
class File:
    """One of the adapter's files."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter is.

    Args:
        format: of this record; a later one may have more fields.
        source: as it was given.
        subfolder, commit: where the adapter is in it; the commit of one from the Hub.
        loadable: whether hf_lora can load it.
        problem: why not.
        peft_type, task_type, base, base_revision: what its config says.
        config: adapter_config.json as it stands, {} if there is none.
        use_rslora: whether scaling is alpha/√rank rather than alpha/rank.
        scales: rank, alpha and scaling, the commonest first.
        targets: by role.
        heads: modules held whole.
        biases: how many trained biases.
        layers: how many layers have factors.
        parameters: numbers that were trained; of an adapter that cannot be loaded, all that are in the file.
        nbytes: bytes of the tensors.
        dtypes: dtype → how many tensors.
        health: what is odd about it.
        run: the training, from trainer_state.json beside it.
        files: with their digests.
        notes: what could not be read.
    """

    source: str
    subfolder: str | None
    commit: str | None
    loadable: bool
    problem: Problem | None
    peft_type: str | None
    task_type: str | None
    base: str | None
    base_revision: str | None
    config: Mapping[str, Any]
    use_rslora: bool | None
    scales: tuple[Scale, ...]
    targets: tuple[Target, ...]
    heads: tuple[Head, ...]
    biases: int
    layers: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    health: tuple[Finding, ...]
    run: RunFacts | None
    files: tuple[File, ...]
    notes: tuple[str, ...]
    format: int = 1


def inspect(
    source: PathLike,
    *,
    spectrum: bool = True,
    subfolder: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    **options: Any,
) -> AdapterInfo:
    """Look at an adapter in a folder (an existing one wins) or on the Hub.

    Args:
        source: a folder, or "user/name".
        spectrum: also compute the singular values of ΔW, and with them whether it has collapsed.
        subfolder: where in it the adapter is.
        revision: on the Hub.
        allow_pickle: read an adapter_model.bin (weights only, never code) where there are no safetensors.
        options: token, cache_dir, local_files_only.

    Raises:
        LoRAFileError: there is no adapter of any kind, or the Hub did not give it.
    """
    folder, commit = _folder(source, subfolder, revision, allow_pickle, options)
    notes: list[str] = []
    config = _config(folder, notes)
    value, problem = None, None
    try:
        value = store.read_adapter(folder, allow_pickle=allow_pickle)
    except LoRAError as error:
        problem = Problem(type(error).__name__, error.message, error.remedy, error.facts)
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if not config and (weights is None or weights.name not in (store.WEIGHTS_NAME, store.PICKLE_NAME)):
        assert problem is not None
        raise LoRAFileError(
            f"{os.fspath(source)!r} holds no adapter: {problem.message}",
            name=store.CONFIG_NAME,
            value=os.fspath(source),
            remedy=f"Give the folder or repo (and --subfolder) that holds {store.CONFIG_NAME}.",
        )
    contents = _of_header(weights) if value is None else _of_value(value, spectrum)
    return AdapterInfo(
        source=os.fspath(source),
        subfolder=subfolder or None,
        commit=commit,
        loadable=value is not None,
        problem=problem,
        peft_type=_text(config, "peft_type"),
        task_type=_text(config, "task_type"),
        base=_text(config, "base_model_name_or_path"),
        base_revision=_text(config, "revision"),
        config=config,
        run=_run(folder, notes),
        files=tuple(_file(path) for path in (folder / store.CONFIG_NAME, weights, folder / TRAINER_STATE) if _is(path)),
        notes=tuple(notes),
        **contents,
    )


# ---- the files -------------------------------------------------------------------------------------------------------


def _folder(
    source: PathLike, subfolder: str | None, revision: str | None, allow_pickle: bool, options: Mapping[str, Any]
) -> tuple[Path, str | None]:
    name, options = os.fspath(source), {key: value for key, value in options.items() if value is not None}
    if os.path.isdir(name):
        folder = Path(name) / (hub.checked_subfolder(subfolder) or "")
        if not os.path.isdir(folder):
            raise LoRAFileError(
                f"{folder} does not exist.",
                name=str(folder),
                value=subfolder,
                remedy="Check --subfolder.",
            )
        return folder, None
    if os.path.exists(name):
        raise LoRAFileError(
            f"{name!r} is a file; an adapter is a folder with {store.CONFIG_NAME}.",
            name=name,
            value=name,
            remedy="Give the folder.",
        )
    where = {"subfolder": subfolder, "revision": revision, **options}
    try:
        folder = hub.fetch(name, allow_pickle=allow_pickle, **where)
    except LoRAHubError as error:
        if error.kind != "missing file" or error.name == store.CONFIG_NAME:
            raise
        folder = _config_alone(name, where)
    depth = len((subfolder or "").strip("/").split("/")) if subfolder else 0
    return folder, [folder, *folder.parents][depth].name


def _config_alone(name: str, where: Mapping[str, Any]) -> Path:
    """The folder of a config whose weights are not there, or not as safetensors."""
    from huggingface_hub import hf_hub_download

    with translated(name, file=store.CONFIG_NAME):
        return Path(hf_hub_download(name, store.CONFIG_NAME, **where)).parent


def _config(folder: Path, notes: list[str]) -> dict[str, Any]:
    path = folder / store.CONFIG_NAME
    try:
        return safefile.load_json(safefile.read_bytes(path, most=_LARGEST_CONFIG), str(path))
    except LoRAFileError as error:
        notes.append(error.message)
        return {}


def _text(config: Mapping[str, Any], name: str) -> str | None:
    value = config.get(name)
    return value if isinstance(value, str) else None


def _is(path: Path | None) -> bool:
    return path is not None and path.is_file()


def _file(path: Path | None) -> File:
    assert path is not None
    digest, size = hashlib.sha256(), 0
    with safefile.reading(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return File(path.name, size, digest.hexdigest())


def _run(folder: Path, notes: list[str]) -> RunFacts | None:
    try:
        return RunFacts.read(folder)
    except LoRAFileError as error:
        notes.append(error.message)
        return None


# ---- what is in them -------------------------------------------------------------------------------------------------


def _of_header(weights: Path | None) -> dict[str, Any]:
    """What names and shapes say of a file that cannot be loaded."""
    entries: Mapping[str, safefile.Entry] = {}
    if weights is not None and weights.suffix == ".safetensors":
        try:
            with safefile.reading(weights) as file:
                entries = safefile.read_header(file, weights).entries
        except LoRAFileError:
            pass  # the problem says so already
    return {
        "use_rslora": None,
        "scales": (),
        "targets": (),
        "heads": (),
        "biases": 0,
        "layers": 0,
        "parameters": sum(math.prod(entry.shape) for entry in entries.values()),
        "nbytes": sum(entry.stop - entry.start for entry in entries.values()),
        "dtypes": _counted(str(entry.dtype) for entry in entries.values()),
        "health": (),
    }


def _of_value(value: AdapterValue, spectrum: bool) -> dict[str, Any]:
    found = parts_of(value)
    finite = not any(finding.kind == "non-finite" for finding in examine(value, _no_collapse(found)))
    spectra = {key: singular_values(part) for key, part in found.items()} if spectrum and finite else {}
    ranks = Counter((f.rank // max(len(f.blocks), 1), f.alpha * _share(f), f.scaling) for f in value.factors.values())
    by_role: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path, role in found:
        by_role[role or roles_of_path(path)].append((path, role))
    return {
        "use_rslora": any(factors.use_rslora for factors in value.factors.values()),
        "scales": tuple(Scale(r, a, s, n) for (r, a, s), n in ranks.most_common()),
        "targets": tuple(
            Target(
                role,
                tuple(dict.fromkeys(path.rpartition(".")[2] for path, _ in keys)),
                len(keys),
                sum(found[key].num_parameters for key in keys),
                _spectrum(found, spectra, keys) if spectra else None,
            )
            for role, keys in sorted(by_role.items(), key=lambda item: _place(item[0]))
        ),
        "heads": tuple(Head(p, sum(t.numel() for t in state.values())) for p, state in value.modules.items()),
        "biases": len(value.biases),
        "layers": len(value.factors),
        "parameters": value.num_parameters,
        "nbytes": value.nbytes,
        "dtypes": _counted(str(tensor.dtype) for tensor in value.tensors()),
        "health": examine(value, spectra or _no_collapse(found)),
    }


def _no_collapse(found: Mapping[tuple[str, str], Any]) -> dict[tuple[str, str], Tensor]:
    """Spectra that stand for "not looked at": flat ones."""
    import torch

    return dict.fromkeys(found, torch.ones(2, dtype=torch.float64))


def _share(factors: Any) -> float:
    """Of PEFT's alpha for all of a fused layer's factors, the part of one role."""
    n = max(len(factors.blocks), 1)
    return 1 / (math.sqrt(n) if factors.use_rslora else n)


def _spectrum(found: Mapping[Any, Any], spectra: Mapping[Any, Tensor], keys: list[tuple[str, str]]) -> Spectrum:
    effective = [effective_rank(spectra[key]) for key in keys]
    top = [spectra[key][:_TOP].tolist() for key in keys]
    longest = max(map(len, top))
    return Spectrum(
        math.sqrt(sum(delta_norm(found[key]) ** 2 for key in keys)),
        sum(effective) / len(effective),
        min(effective),
        max(effective),
        tuple(sum(values[i] for values in top if i < len(values)) / len(keys) for i in range(longest)),
    )


def _place(role: str) -> int:
    """Roles in the order of the Transformer's equations, other names after them."""
    first = role.partition("+")[0]
    return arch.ROLES.index(first) if first in arch.ROLES else len(arch.ROLES)


def _counted(names: Any) -> dict[str, int]:
    return {name.removeprefix("torch."): n for name, n in Counter(names).most_common()}


# ---- roles from names ------------------------------------------------------------------------------------------------


def roles_of_path(path: str) -> str:
    """The role that a module's name means wherever it has one ("q", "q+k+v"), or else the name itself.

    Without the model its type is not known: of all architectures in the table the longest ending counts, and only if
    they agree on it.
    """
    parts = path.split(".")
    for start in range(len(parts)):
        ending = ".".join(parts[start:])
        if ending in _ENDINGS:
            roles = _ENDINGS[ending]
            return next(iter(roles)) if len(roles) == 1 else parts[-1]
    return parts[-1]


def _endings() -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for family in (*arch.ARCHITECTURES.values(), arch.STRUCTURE):
        for ending, roles in family.items():
            several = (roles,) if isinstance(roles, str) else sorted(roles.roles, key=arch.ROLES.index)
            found[ending].add("+".join(several))
    return {ending: frozenset(roles) for ending, roles in found.items()}


_ENDINGS = _endings()
