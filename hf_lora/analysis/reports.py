"""Everything that can be said of an adapter, of a second one and of their base, gathered once: as data, as HTML."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import scratch
from ..bases import hub_id, same_base
from ..errors import LoRAFileError
from ..values import AdapterValue
from .amplification import Amplification, amplified
from .base import Base, BaseWeights
from .intruders import Intruders, check_options, looked_at
from .places import Place, names_of, paired, places
from .ranks import Spectra, SuggestedRank, spectrum, suggested_rank
from .subspaces import AdapterOverlap, SubspaceSimilarity, compared, cosine, overlap

__all__ = ["Report", "report"]


@dataclass(frozen=True, eq=False)
class Report:
    """What an adapter learned.

    Args:
        adapter, other, base: what they are called; None where there is none.
        spectra, suggested: of the adapter.
        overlap: of the two adapters.
        similarity: φ on the sides "A" and "B", on the layers that both adapters have and where no factor is zero.
        amplification, intruders: against the base; the first where ΔW is not zero.
        notes: what was left out, and why.
    """

    adapter: str
    other: str | None
    base: str | None
    spectra: Spectra
    suggested: SuggestedRank
    overlap: AdapterOverlap | None
    similarity: tuple[SubspaceSimilarity, ...]
    amplification: Amplification | None
    intruders: Intruders | None
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """All of it as plain values: what `hf-lora analyze --json` prints."""
        extra: dict[tuple[str, str], dict[str, Any]] = {}
        for layer in self.overlap or ():
            extra.setdefault((layer.path, layer.role), {})["overlap"] = {
                name: getattr(layer, name) for name in ("cosine", "input", "output", "norm_a", "norm_b")
            }
        for row in self.amplification or ():
            names = ("factor", "delta_norm", "base_norm", "projected", "own", "random")
            extra.setdefault((row.path, row.role), {})["amplification"] = {n: getattr(row, n) for n in names}
        for found in self.intruders or ():
            extra.setdefault((found.path, found.role), {})["intruders"] = {
                "count": len(found.intruders),
                "similarity": found.similarity.tolist(),
            }
        return {
            "format": 1,
            "adapter": self.adapter,
            "other": self.other,
            "base": self.base,
            "energy": self.suggested.energy,
            "suggested_rank": self.suggested.rank,
            "overlap": None if self.overlap is None else self.overlap.cosine,
            "intruders": None
            if self.intruders is None
            else {"count": self.intruders.count, "k": self.intruders.k, "threshold": self.intruders.threshold},
            "similarity": {
                each.side: {role: each.mean(role).tolist() for role in each.by_role} for each in self.similarity
            },
            "layers": [
                {
                    "path": layer.path,
                    "role": layer.role,
                    "rank": layer.rank,
                    "norm": layer.norm,
                    "effective_rank": layer.effective_rank,
                    "suggested_rank": self.suggested.layers[layer.path, layer.role],
                    "singular_values": layer.values.tolist(),
                    "overlap": None,
                    "amplification": None,
                    "intruders": None,
                    **extra.get((layer.path, layer.role), {}),
                }
                for layer in self.spectra
            ],
            "notes": list(self.notes),
        }

    def rows(self) -> list[dict[str, str]]:
        """By role, heading → text: the table that `hf-lora analyze` prints."""
        rows = []
        for role, layers in self.spectra.by_role.items():
            row = {
                "role": role,
                "layers": str(len(layers)),
                "‖ΔW‖": f"{np.sqrt(sum(layer.norm**2 for layer in layers)):.3g}",
                "effective rank": f"{np.mean([layer.effective_rank for layer in layers]):.1f}",
                f"rank for {self.suggested.energy:.0%}": str(max(self.suggested.layers[x.path, role] for x in layers)),
            }
            if self.overlap is not None:
                row["cosine"] = f"{cosine(self.overlap.by_role[role]):.3f}"
            for each in self.similarity:
                row[f"φ(1, 1) {each.side}"] = f"{each.mean(role)[0, 0]:.2f}" if role in each.by_role else ""
            if self.amplification is not None:
                row["amplification"] = _median(x.factor for x in self.amplification.by_role.get(role, ()))
            if self.intruders is not None:
                row["intruders"] = str(sum(len(x.intruders) for x in self.intruders.by_role.get(role, ())))
            rows.append(row)
        return rows

    def html(self) -> str:
        """A page of its own, with the figures in it. Needs matplotlib (`hf_lora[analysis]`)."""
        from .page import page

        return page(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `html()` to a file; one that is there is replaced. Raises `LoRAFileError` where that is impossible."""
        target = Path(path)
        check_target(target)
        text = self.html()
        try:
            with scratch.beside(target) as temporary:
                temporary.write_text(text, encoding="utf-8")
                os.replace(temporary, target)
        except OSError as error:
            raise _unwritable(target, str(error)) from error
        return target


def report(
    adapter: AdapterValue,
    other: AdapterValue | None = None,
    base: Base | None = None,
    *,
    only: Iterable[str] | None = None,
    energy: float = 0.9,
    k: int = 10,
    threshold: float = 0.5,
    names: tuple[str, str, str] = ("a", "b", "base"),
) -> Report:
    """Everything that can be said of an adapter, of another beside it, and of their base.

    Of the adapter its spectrum; of the two overlap and φ; on the base amplification and intruder dimensions.
    Layers where ΔW is zero, or that only one adapter has, are left out where they have no answer, and noted;
    so is another base than the one that an adapter names.

    Args:
        adapter: a `LoRAAdapter`.
        other: another of the same base.
        base: what they were trained on: a model, the folder or id of one, or module path → W (out, in).
        only: roles, module paths or their endings; None is all.
        energy: as in `suggested_rank`.
        k, threshold: as in `intruder_dimensions`.
        names: what adapter, other and base are called in it.

    Raises:
        as `suggested_rank`, `overlap`, `amplification_factor` and `intruder_dimensions`.
    """
    check_options(k, threshold)
    only = names_of(only)
    suggested, spectra = suggested_rank(adapter, energy, only=only), spectrum(adapter, only=only)
    found, notes = places(adapter, only), []
    live = tuple(place for place in found if suggested.layers[place.path, place.role])
    if len(live) < len(found):
        still = [str(place) for place in found if place not in live]
        notes.append(f"ΔW is zero in {len(still)} of {len(found)} places: {_some(still)}")
    alike: AdapterOverlap | None = None
    similarity: tuple[SubspaceSimilarity, ...] = ()
    if other is not None:
        alike = overlap(adapter, other, only=only)
        pairs = paired(adapter, other, only, missing=True)
        both = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
        fit = [pair for pair in both if all(_trained(place) for place in pair)]
        if len(fit) < len(pairs):
            notes.append(
                f"φ is of {len(fit)} of {len(pairs)} places: "
                "the others are in one adapter only, or a factor is zero there"
            )
        similarity = tuple(compared(fit, side, "factors", 0) for side in ("A", "B")) if fit else ()
        if _another(adapter.config.base_model, other.config.base_model):
            notes.append(f"the adapters name two bases: {adapter.config.base_model} and {other.config.base_model}")
    amplification = intruders = None
    if base is not None:
        if _another(adapter.config.base_model, _called(base)):
            notes.append(f"the adapter was made on {adapter.config.base_model}, the base is {_called(base)}")
        weights = BaseWeights(base, adapter, found)
        amplification = Amplification(tuple(amplified(live, weights)))
        intruders = Intruders(tuple(looked_at(live, weights, k, threshold, "B")), k, float(threshold), "B")
    return Report(
        names[0],
        None if other is None else names[1],
        None if base is None else names[2],
        spectra,
        suggested,
        alike,
        similarity,
        amplification,
        intruders,
        tuple(notes),
    )


def _called(base: Any) -> str | None:
    """What a base says that it is."""
    config: Any = getattr(base, "config", None)
    named = config.get("_name_or_path") if isinstance(config, dict) else getattr(config, "_name_or_path", None)
    given = getattr(base, "name", None) if not isinstance(base, str | os.PathLike) else os.fspath(base)
    return next((name for name in (given, named) if isinstance(name, str) and hub_id(name)), None)


def _another(one: str | None, other: str | None) -> bool:
    """Whether two names are ids of different bases; a folder says nothing."""
    ids = hub_id(one), hub_id(other)
    return ids[0] is not None and ids[1] is not None and not same_base(ids[0], ids[1])


def check_target(target: Path) -> None:
    """Raise `LoRAFileError` where no file can be written: a folder, or in no folder."""
    if os.path.isdir(target):
        raise _unwritable(target, "it is a folder")
    if not os.path.isdir(target.parent):
        raise _unwritable(target, f"{target.parent} is no folder")


def _unwritable(target: Path, why: str) -> LoRAFileError:
    return LoRAFileError(
        f"The report cannot be written to {target}: {why}.",
        name=str(target),
        value=str(target),
        remedy="Give a file in a folder that you may write to.",
    )


def _trained(place: Place) -> bool:
    return bool(place.factors.A.any()) and bool(place.factors.B.any())


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _median(values: Any) -> str:
    found = list(values)
    return f"{np.median(found):.3g}" if found else ""
