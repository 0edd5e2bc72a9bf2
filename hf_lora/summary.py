"""What is on a model: adapters, targets by role, trainable share, bytes, and what did not match."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from .extras import EXTRAS
from .layerinfo import is_held
from .model import read, require
from .slots import LoRASlots
from .state import Entry
from .switching import described
from .targeting import roles_of

__all__ = ["AdapterSummary", "Summary", "summarise"]


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter of a `Summary`."""

    name: str
    rank: str  # "8", or "4–16" where layers differ
    parameters: int
    nbytes: int
    trainable: bool
    active: bool
    targets: dict[str, int]  # role or layer name -> number of layers
    heads: tuple[str, ...]
    biases: int
    architecture: str | None
    skipped: tuple[str, ...]
    anchored: bool = False  # half of the rank is what the adapter began as, and stays


@dataclass(frozen=True)
class Summary:
    """What `print_lora_summary` prints, as data."""

    model: str
    base_parameters: int
    base_nbytes: int
    trainable: int
    active: object
    merged: object
    adapters: tuple[AdapterSummary, ...] = field(default=())

    @property
    def trainable_share(self) -> float:
        """Trainable parameters ÷ the base's."""
        return self.trainable / max(self.base_parameters, 1)

    def __str__(self) -> str:
        share = f"{self.trainable:,} trainable ({self.trainable_share:.3%})"
        lines = [
            f"{self.model}: {self.base_parameters:,} base parameters ({_size(self.base_nbytes)}), {share}",
            f"active: {self.active!r}" + (f"   merged: {self.merged!r}" if self.merged else ""),
        ]
        for a in self.adapters:
            half = " (half of it stays as it began)" if a.anchored and a.trainable else ""
            marks = ", ".join(["active"] * a.active + ["trainable" if a.trainable else "frozen"])
            lines.append(f"  {a.name!r} ({marks}): r={a.rank}{half}, {a.parameters:,} parameters, {_size(a.nbytes)}")
            lines.append("    targets: " + ", ".join(f"{role} × {n}" for role, n in a.targets.items()))
            if a.heads:
                lines.append(f"    trained whole: {', '.join(a.heads)}")
            if a.biases:
                lines.append(f"    biases: {a.biases}")
            if a.architecture is None:
                lines.append("    roles were told from the model's structure; its architecture is not in the table")
            lines += [f"    left out: {line}" for line in a.skipped]
        return "\n".join(lines)


def summarise(model: nn.Module) -> Summary:
    """Look at a model's adapters. Raises `LoRAStateError` if it has none."""
    state = require(model)
    ours = {id(p) for path, p in model.named_parameters() if is_held(path)}
    base = [p for p in model.parameters() if id(p) not in ours]
    roles = roles_of(model)
    active = set(state.default.entries)
    adapters = []
    for entry in state.entries.values():
        resident = entry.record
        ranks, counts = set(), Counter[str]()
        sizes, anchored = _sizes(model, entry), False
        for path in resident.layers:
            slots: LoRASlots = model.get_submodule(path).lora_slots  # type: ignore[assignment]
            slot = slots.slots[entry.slot]
            anchored = anchored or slot.anchored
            ranks.add(slot.rank // max(len(slot.blocks), 1))
            names = [role for role, _ in slot.blocks] or roles.get(path) or (path.rpartition(".")[2],)
            for role in names if slot.blocks else ["+".join(names)]:
                counts[role] += 1
        for path in resident.experts:
            for name, bank in model.get_submodule(path).lora_slots.banks().items():  # type: ignore[union-attr, operator]
                if entry.slot in bank.slots:
                    ranks.add(bank.slots[entry.slot].rank // bank.experts)
                    counts[f"{name} of {bank.experts} experts"] += 1
        low, high = min(ranks, default=0), max(ranks, default=0)
        adapters.append(
            AdapterSummary(
                entry.name,
                str(low) if low == high else f"{low}–{high}",
                *sizes,
                entry.trainable,
                entry in active,
                dict(counts),
                resident.heads,
                len(resident.biases),
                resident.architecture,
                resident.skipped,
                anchored,
            )
        )
    return Summary(
        type(model).__name__,
        sum(p.numel() for p in base),
        sum(p.numel() * p.element_size() for p in base),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        described(state.default),
        None if state.merged is None else described(state.merged.active),
        tuple(adapters),
    )


def _sizes(model: nn.Module, entry: Entry) -> tuple[int, int]:
    """Parameters and bytes of an adapter."""
    slot = entry.slot
    if not entry.trainable:
        value = entry.record.value or read(model, entry.name)
        return value.num_parameters, value.nbytes
    mine = {f"{name}{slot}" for name in ("A", "B", "bias", *EXTRAS)}
    tensors = [
        p
        for path, p in model.named_parameters()
        if (".lora_slots." in path and path.rpartition(".")[2] in mine) or f".lora_heads.copies.{slot}." in path
    ]
    return sum(p.numel() for p in tensors), sum(p.numel() * p.element_size() for p in tensors)


def _size(nbytes: int) -> str:
    amount = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
