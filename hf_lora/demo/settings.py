"""What a demo allows: sizes, lengths, times and how much of it one visitor gets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ..errors import LoRAConfigError

__all__ = ["Settings"]

_SECONDS = ("gather", "timeout")


@dataclass(frozen=True)
class Settings:
    """Limits of a demo.

    Args:
        batch_rows: rows of one `generate`.
        gather: seconds that a batch waits for others to join it, once there is a first.
        queue: actions that wait at most, of all visitors together.
        per_visitor: actions of one visitor that wait or run.
        timeout: seconds from the click to the answer; what is written until then is kept.
        prompt_chars: characters of one field. prompt_tokens: of the whole prompt.
        new_tokens: of one answer, at most.
        device_slots: adapters on the model at a time; at least `batch_rows`, so that every row may name another.
        adapter_bytes, adapter_rank: of an adapter that a visitor loads.
        adapters_per_visitor: that a visitor has loaded at a time.
        visitors: that have adapters of their own at a time; of more, who came first loses theirs.
        host_bytes: of adapters in host memory.
    """

    batch_rows: int = 32
    gather: float = 0.02
    queue: int = 256
    per_visitor: int = 64
    timeout: float = 120.0
    prompt_chars: int = 4000
    prompt_tokens: int = 1024
    new_tokens: int = 512
    device_slots: int = 32
    adapter_bytes: int = 128 * 2**20
    adapter_rank: int = 128
    adapters_per_visitor: int = 4
    visitors: int = 256
    host_bytes: int = 2**30

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            kinds = (int, float) if field.name in _SECONDS else (int,)
            least = {"gather": 0, "timeout": 0.1}.get(field.name, 1)
            if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
                raise _impossible(field.name, value, f"at least {least}")
        if self.device_slots < self.batch_rows:
            raise _impossible("device_slots", self.device_slots, f"at least batch_rows ({self.batch_rows})")


def _impossible(name: str, value: object, expected: str) -> LoRAConfigError:
    return LoRAConfigError(
        f"{name}={value!r} is impossible for a demo.",
        name=name,
        value=value,
        expected=expected,
        remedy=f"Give another {name}.",
    )
