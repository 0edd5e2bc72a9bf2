"""What every importer does with a foreign file: read it strictly, refuse all that is wrong at once, make the value."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import safefile
from ..adapter import LoRAAdapter
from ..agreement import described
from ..config import LoRAConfig
from ..errors import LoRAError, LoRAFileError
from ..layout import is_module_path, refuse_non_finite
from ..values import AdapterValue, Factors

__all__ = ["adapter_of", "checked", "file_in", "read_config", "read_tensors", "refuse_problems"]

_LARGEST_CONFIG = 16 * 2**20  # bytes, as of an adapter's own config


def file_in(source: str | os.PathLike[str], *names: str) -> Path:
    """The first of `names` that the folder `source` has."""
    folder = Path(source)
    if not os.path.isdir(folder):
        raise LoRAFileError(
            f"{folder} {'is a file' if os.path.exists(folder) else 'does not exist'}; a folder is wanted.",
            name=str(folder),
            value=str(folder),
            remedy=f"Give the folder that holds {names[0]}.",
        )
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise LoRAFileError(
        f"{folder} has no {' or '.join(names)}.",
        name=names[0],
        value=sorted(entry.name for entry in folder.iterdir())[:20],
        remedy=f"Put it there as {names[0]}.",
    )


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size."""
    return safefile.load_json(safefile.read_bytes(path, most=_LARGEST_CONFIG), str(path))


def read_tensors(path: Path, *, allow_pickle: bool, within: Sequence[str] = ()) -> dict[str, Tensor]:
    """Every tensor of a safetensors or torch.save file (told by the name's end); names are checked.

    Raises:
        LoRAFileError: damaged, a pickle that was not asked for, names that are no module's.
    """
    if path.suffix == ".safetensors":
        with safefile.reading(path) as file:
            tensors, _ = safefile.read_tensors(file, path, safefile.read_header(file, path))
    else:
        tensors = safefile.read_pickle(path, allow=allow_pickle, within=within)
    return checked(tensors, str(path))


def checked(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors, if each has a module's name and is one."""
    problems = [f"{str(name)[:200]!r} is no module path" for name in tensors if not is_module_path(str(name))]
    problems += [
        f"{name}: no tensor but {type(t).__name__}" for name, t in tensors.items() if not isinstance(t, Tensor)
    ]
    refuse_problems(source, problems)
    return dict(tensors)


def refuse_problems(source: str, problems: Sequence[str], remedy: str | None = None) -> None:
    """Raise `LoRAFileError` that lists every problem, if there is one."""
    if problems:
        raise LoRAFileError(
            f"{source} cannot be imported: {len(problems)} problem(s).",
            name=problems[0].partition(":")[0],
            value=list(problems),
            facts=problems,
            remedy=remedy or "Save it again, or leave out what is listed.",
        )


def adapter_of(
    source: str,
    config: LoRAConfig,
    factors: Mapping[str, Factors],
    biases: Mapping[str, Tensor] | None = None,
    modules: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> LoRAAdapter:
    """The adapter, with a config that says ranks, alphas and targets as its files will; all of it finite."""
    tensors = {f"{path}.{side}": t for path, pair in factors.items() for side, t in (("A", pair.A), ("B", pair.B))}
    tensors |= biases or {}
    for path, state in (modules or {}).items():
        tensors |= {f"{path}.{key}": tensor for key, tensor in state.items()}
    refuse_non_finite({name: t for name, t in tensors.items() if t.is_floating_point()}, source)
    try:
        value = AdapterValue(config, factors, biases or {}, modules or {})
        return LoRAAdapter.of(described(value))
    except LoRAError as error:
        error.message = f"{source}: {error.message}"
        error.args = (error.message,)
        raise
