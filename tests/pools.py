"""Helpers of the pool's tests: adapters made without a LoRA on any model, and what each computes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from oracles import merged
from torch import Tensor

from hf_lora import LoRAConfig
from hf_lora.store import write_adapter
from hf_lora.values import AdapterValue, Factors

QV, DOWN, MLP = ("q_proj", "v_proj"), ("down_proj",), ("gate_proj", "up_proj", "o_proj")


def random_value(
    model: Any, seed: int = 0, rank: int = 2, targets: Sequence[str] = QV, scale: float = 0.2, **fields: Any
) -> AdapterValue:
    """An adapter of the model's layers with these names; alpha is twice the rank."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        path: Factors(
            "linear",
            scale * torch.randn(rank, module.in_features, generator=generator),
            scale * torch.randn(module.out_features, rank, generator=generator),
            alpha=2.0 * rank,
        )
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in targets
    }
    config = LoRAConfig(r=rank, alpha=2.0 * rank, target_modules=list(targets), **fields)
    return AdapterValue(config, factors)


def write_folder(root: Path, model: Any, values: Mapping[str, AdapterValue]) -> dict[str, Path]:
    """One folder for each adapter."""
    return {name: write_adapter(value, root / name) for name, value in values.items()}


@torch.no_grad()
def alone(base: Any, folders: Mapping[str, Path], ids: Tensor) -> dict[str | None, Tensor]:
    """Each adapter's logits on `ids` in float64, W + scaling · B A by hand; None: the base's."""
    found: dict[str | None, Tensor] = {name: merged(base, path)(ids).logits for name, path in folders.items()}
    found[None] = merged_base(base)(ids).logits
    return found


def merged_base(base: Any) -> Any:
    """The base in float64."""
    import copy

    return copy.deepcopy(base).double().eval()


def assert_rows(found: Tensor, rows: Sequence[str | None], expected: Mapping[str | None, Tensor]) -> None:
    """Row i of `found` is row i of what `rows[i]` computes alone."""
    for i, row in enumerate(rows):
        want = expected[row][i].double()
        apart = float((found[i].double() - want).abs().max() / want.abs().max())
        assert apart <= 1e-5, f"row {i}, {row!r}: {apart:.1e} apart"
