"""What is on a model: adapters, targets by role, trainable share, bytes, and what did not match."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from .backends import sizes_of
from .extras import EXTRAS
from .layerinfo import modules_of
from .model import read, require
from .quantised import described as described_quantisation
from .slots import LoRASlots
from .state import Entry
from .switching import described
from .targeting import roles_of
from .tokens import rows_of

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
    quantised: str | None = None  # how the base is

    @property
    def trainable_share(self) -> float:
        """Trainable parameters ÷ the base's."""
        return self.trainable / max(self.base_parameters, 1)

    def __str__(self) -> str:
        share = f"{self.trainable:,} trainable ({self.trainable_share:.3%})"
        how = f", {self.quantised}" if self.quantised else ""
        lines = [
            f"{self.model}: {self.base_parameters:,} base parameters ({_size(self.base_nbytes)}{how}), {share}",
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
    base = base_sizes(model)
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
            blocks = () if slots.kernel else slot.blocks  # a convolution's groups are no roles
            names = [role for role, _ in blocks] or roles.get(path) or (path.rpartition(".")[2],)
            for role in names if blocks else ["+".join(names)]:
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
                tuple(_head(model, path, entry.slot) for path in resident.heads),
                len(resident.biases),
                resident.architecture,
                resident.skipped,
                anchored,
            )
        )
    return Summary(
        type(model).__name__,
        sum(count for count, _ in base),
        sum(nbytes for _, nbytes in base),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        described(state.default),
        None if state.merged is None else described(state.merged.active),
        tuple(adapters),
        described_quantisation(model),
    )


def base_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Numbers and bytes of the Parameters of each of the base's modules; what is tied counts once."""
    seen, found = set[int](), []
    for module in dict.fromkeys(modules_of(model).values()):
        own = {name: p for name, p in module._parameters.items() if p is not None and id(p) not in seen}
        seen |= {id(p) for p in own.values()}
        if own:
            found.append(sizes_of(module, own))
    return found


def _head(model: nn.Module, path: str, slot: int) -> str:
    """What trains in place of the base's: a module, or rows of it."""
    rows = rows_of(model.get_submodule(path), slot)
    return path if rows is None else f"{path} ({len(rows.ids)} rows)"


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
