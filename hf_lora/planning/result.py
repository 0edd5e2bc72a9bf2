"""What `plan` gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..config import LoRAConfig

__all__ = ["Proposal", "TrainingPlan", "size"]


@dataclass(frozen=True)
class Proposal:
    """A set of matrices, and the largest rank that a budget allows them.

    Attributes:
        targets: roles, or "all-linear".
        r: the rank.
        parameters: what then trains, at most the budget.
        lora_config: to give to `add_lora`.
    """

    targets: tuple[str, ...] | str
    r: int
    parameters: int
    lora_config: LoRAConfig

    def __str__(self) -> str:
        names = self.targets if isinstance(self.targets, str) else ", ".join(self.targets)
        return f"{names}: r={self.r}, {self.parameters:,} parameters"


@dataclass(frozen=True)
class TrainingPlan:
    """What training a LoRA takes. Bytes, in one process on one device.

    Attributes:
        model: class of the model.
        lora_config: the adapter, to give to `add_lora`.
        targets: role or layer name → number of layers.
        trainable_parameters: what trains: factors, and heads and biases that the config trains.
        base_parameters: of the base, tied weights once.
        adapter_bytes: of the file adapter_model.safetensors.
        base_bytes: the base's weights and buffers in memory.
        trainable_bytes: what trains, in memory.
        gradient_bytes: its gradients.
        optimizer_bytes: the optimizer's state.
        activation_bytes: what the forward keeps for the backward, the loss included. None: see `notes`.
        loss_bytes: the part of it that the output head and the loss keep.
        peak_bytes: the most that is held at any time of a training step: base, what trains, optimizer state and, as the
            step goes, activations, gradients and temporary tensors. None: see `notes`.
        batch, length: rows, and tokens of a row.
        dtype: of the base.
        optimizer: its name.
        device: whose kernels are assumed, "cpu" or "cuda".
        gradient_checkpointing: whether activations are computed again in the backward.
        proposals: with a budget, every set of matrices that fits; the first is this plan's.
        notes: what was assumed, or left out.
    """

    model: str
    lora_config: LoRAConfig
    targets: Mapping[str, int]
    trainable_parameters: int
    base_parameters: int
    adapter_bytes: int
    base_bytes: int
    trainable_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None
    loss_bytes: int | None
    peak_bytes: int | None
    batch: int
    length: int
    dtype: str
    optimizer: str
    device: str
    gradient_checkpointing: bool = False
    proposals: tuple[Proposal, ...] = field(default=())
    notes: tuple[str, ...] = ()

    @property
    def trainable_share(self) -> float:
        """Trainable parameters ÷ the base's."""
        return self.trainable_parameters / max(self.base_parameters, 1)

    def __str__(self) -> str:
        targets = ", ".join(f"{name} × {n}" for name, n in self.targets.items())
        share = f"{self.trainable_parameters:,} trainable ({self.trainable_share:.3%})"
        lines = [
            f"{self.model}: {self.base_parameters:,} parameters in {self.dtype}, {share}",
            f"  r={self.lora_config.r}: {targets}",
            *(f"  {label:<18}{size(nbytes):>10}" for label, nbytes in self.rows()),
            f"  a step of {self.batch} × {self.length} with {self.optimizer} on {self.device}"
            + (", activations computed again" if self.gradient_checkpointing else ""),
        ]
        if self.proposals:
            lines += ["  within the budget:", *(f"    {proposal}" for proposal in self.proposals)]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def rows(self) -> list[tuple[str, int | None]]:
        """Label and bytes of each line of a table."""
        return [
            ("adapter file", self.adapter_bytes),
            ("base", self.base_bytes),
            ("adapter", self.trainable_bytes),
            ("gradients", self.gradient_bytes),
            ("optimizer state", self.optimizer_bytes),
            ("activations", self.activation_bytes),
            ("  of them loss", self.loss_bytes),
            ("peak of a step", self.peak_bytes),
        ]


def size(nbytes: int | None) -> str:
    """Bytes for people, in powers of 1000."""
    if nbytes is None:
        return "unknown"
    amount, unit = float(nbytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} B" if unit == "B" else f"{amount:.1f} {unit}"
