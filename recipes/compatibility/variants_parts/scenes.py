"""A row on a column: a small model that has read a text, an adapter that was trained on more of it, its files."""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import hf_lora

from . import formula, peftways
from .table import Kind, Variant

__all__ = ["MODELS", "SHARED", "Scene", "agree", "bits", "logits", "require", "same_bits"]

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_SIZES |= {"num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 64}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64, "vocab_size": 256}
_GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SIZES),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _SIZES),  # its projections have biases
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
}
SHARED = {"r": 4, "alpha": 6.0}
LENGTH, ROWS = 24, 8
_STEPS, _RATE = 12, 2e-2
_READ, _READING = 25, 100  # batches that the base has read, and in how many steps

_TEXT = Path(__file__).resolve().parents[3] / "LICENSE"


@functools.cache
def text() -> torch.Tensor:
    """The bytes of the project's licence, (rows, LENGTH)."""
    found = torch.tensor(list(_TEXT.read_bytes()))
    return found[: len(found) // LENGTH * LENGTH].view(-1, LENGTH)


def batches(start: int, count: int) -> list[torch.Tensor]:
    """Batches of ROWS lines of the text."""
    return [text()[(start + i) * ROWS : (start + i + 1) * ROWS] for i in range(count)]


def task() -> list[torch.Tensor]:
    """Batches that the base has not read, for the adapters."""
    return batches(_READ + 1, 3)


@functools.cache
def _base(family: str) -> Any:
    """A model that has read the first half of the text: its weights are no noise any more."""
    import transformers

    config, model, sizes = MODELS[family]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):  # they begin at zero
                parameter.normal_(std=0.05)
    optimizer = torch.optim.AdamW(made.parameters(), 1e-2)
    for batch in itertools.islice(itertools.cycle(batches(0, _READ)), _READING):
        made(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made.eval()


class Scene:
    """One row on one column. What several cells need is made once, at the first that asks."""

    def __init__(self, variant: Variant, kind: Kind) -> None:
        self.variant, self.kind = variant, kind
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)

    def close(self) -> None:
        """Remove its files."""
        self._folder.cleanup()

    # ---- ours --------------------------------------------------------------------------------------------------------

    def base(self) -> Any:
        """The model without a LoRA; the same weights each time."""
        return copy.deepcopy(_base(self.kind.family))

    @property
    def inputs(self) -> torch.Tensor:
        """Text that no training saw, (ROWS, LENGTH)."""
        return text()[-ROWS:]

    def add(self, model: Any, seed: int = 3, **changes: Any) -> Any:
        """The row's adapter, new, on a model."""
        torch.manual_seed(seed)
        fields = {**SHARED, "target_modules": list(self.kind.targets), **self.kind.fields, **self.variant.fields}
        config = hf_lora.LoRAConfig(**{**fields, **changes})
        seen = [{"input_ids": b, "labels": b} for b in batches(30, 3)]
        model.add_lora(config, data=seen if config.init in hf_lora.initnames.NEED_DATA else None)
        return model

    def optimizer(self, model: Any) -> Any:
        """AdamW over what trains."""
        groups: Any = [p for p in model.parameters() if p.requires_grad]
        if self.variant.b_lr_ratio != 1:
            groups = hf_lora.optimizer_groups(model, _RATE / 2, b_lr_ratio=self.variant.b_lr_ratio)
        return torch.optim.AdamW(groups, _RATE)

    def train(self, model: Any) -> None:
        """Some steps on the task."""
        _steps(model, self.optimizer(model))

    @functools.cached_property
    def trained(self) -> Path:
        """The folder of an adapter that was trained and saved."""
        model = self.add(self.base())
        self.train(model)
        model.save_lora(self.folder / "trained")
        self._live = model
        return self.folder / "trained"

    def live(self) -> Any:
        """The model with the adapter that was trained, its Parameters still there: a copy."""
        self.trained  # noqa: B018
        return copy.deepcopy(self._live)

    @functools.cached_property
    def plain(self) -> Path:
        """The folder of a plain adapter that was trained, on the same kind of layer."""
        scene = Scene(Variant("plain", {}, ""), Kind(self.kind.name, self.kind.family, self.kind.targets))
        model = scene.add(scene.base(), seed=11)
        scene.train(model)
        model.save_lora(self.folder / "plain")
        scene.close()
        return self.folder / "plain"

    # ---- others ------------------------------------------------------------------------------------------------------

    def formula(self, adapters: Any) -> torch.Tensor:
        """The logits of W' and b' in float64, from the files."""
        return logits(formula.written_out(self.base(), adapters), self.inputs)

    def peft_loads(self, folder: Path) -> torch.Tensor:
        """PEFT's logits on our file. Raises what PEFT raises."""
        import peft

        return logits(peft.PeftModel.from_pretrained(self.base(), str(folder)).eval(), self.inputs)

    def peft_trains(self) -> tuple[Path, torch.Tensor]:
        """A file that PEFT began, trained and saved, and PEFT's logits. Raises what PEFT raises."""
        torch.manual_seed(5)
        model = peftways.begin(self.base(), self.variant, self.kind, SHARED, batches(30, 3))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], _RATE)
        peftways.save(model, self.folder / "peft", lambda: _steps(model, optimizer))
        folder, found = self.folder / "peft" / "end", logits(model, self.inputs)
        apart = float((self.peft_loads(folder) - found).abs().max() / found.abs().max())
        if apart > 1e-5:
            raise RuntimeError(f"PEFT's file does not give PEFT itself what it computed: {apart:.0e} apart")
        return folder, found


def _steps(model: Any, optimizer: Any) -> None:
    model.train()
    for batch in itertools.islice(itertools.cycle(task()), _STEPS):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# ---- comparisons -----------------------------------------------------------------------------------------------------


def logits(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    """(ROWS, LENGTH, vocabulary)."""
    with torch.no_grad():
        return model(input_ids=inputs).logits.detach()


def loss(model: Any, inputs: torch.Tensor) -> float:
    """Of a batch."""
    with torch.no_grad():
        return float(model(input_ids=inputs, labels=inputs).loss)


def bits(model: Any) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the base."""
    return {k: v.detach().clone() for k, v in model.state_dict().items() if "lora_" not in k}


def same_bits(model: Any, before: dict[str, torch.Tensor]) -> bool:
    """Whether the base's tensors are those, as integers (−0.0 is not 0.0)."""
    now = bits(model)
    return now.keys() == before.keys() and all(
        torch.equal(now[k].contiguous().view(torch.uint8), v.contiguous().view(torch.uint8)) for k, v in before.items()
    )


def require(condition: bool, otherwise: str | Callable[[], str]) -> None:
    """Fail the cell unless `condition`."""
    if not condition:
        raise AssertionError(otherwise if isinstance(otherwise, str) else otherwise())


def agree(ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Fail the cell unless max|difference| ≤ tolerance · max|theirs|."""
    apart = float((ours.double() - theirs.double()).abs().max() / theirs.abs().max())
    require(apart <= tolerance, f"{what}: {apart:.1e} of the largest logit apart, more than {tolerance:.0e}")
