"""What is measured: models, adapters as files of PEFT's format, and the same adapters on hf_lora's and PEFT's model.

The files are written here, by neither of the two, so that both read the same.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = [
    "ALL",
    "DEEP",
    "QV",
    "ROWS",
    "SMOLLM2",
    "TINY",
    "ByHand",
    "adapters",
    "by_hand",
    "llama",
    "ours",
    "sharing",
    "smollm2",
    "theirs",
    "write_adapter",
]

QV = ("q_proj", "v_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# 12 layers, h256, 84 targets: the shape of the design's table.
ROWS: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "intermediate_size": 688,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
}
# SmolLM2-135M's own shape: 30 layers, 210 targets; at rank 16 a file of 420 tensors and 19.6 MB.
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
# As many targets as SmolLM2-135M, but small enough for a thousand adapters.
DEEP: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 30,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def llama(shape: Mapping[str, Any], seed: int = 0) -> Any:
    """A Llama with random weights, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def smollm2() -> tuple[Any, Any, str]:
    """SmolLM2-135M-Instruct, its tokenizer, and where they were found."""
    from hf_lora.quickstart.base import find_base, load_model, load_tokenizer

    base = find_base()
    model = load_model(base)
    model.name_or_path = model.config._name_or_path = ""
    return model, load_tokenizer(base), base.origin


def sharing(model: Any) -> Any:
    """Another model over the same weights. For what does not change them."""
    return copy.deepcopy(model, {id(p): p for p in [*model.parameters(), *model.buffers()]})


# ---- adapters --------------------------------------------------------------------------------------------------------


def write_adapter(
    folder: Path, model: nn.Module, targets: Sequence[str], rank: int, *, seed: int, size: float = 0.2
) -> Path:
    """An adapter in PEFT's format with random factors, alpha = 2·rank and ‖ΔW‖/‖W‖ about `size`."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in targets:
            (n, d), spread = module.weight.shape, float(module.weight.float().std())
            # Entries of (alpha/r)·B·A spread by 2·√r·σ_A·σ_B; σ_A = 1/√d.
            sigma = size * spread * math.sqrt(d) / (2 * math.sqrt(rank))
            name = f"base_model.model.{path}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, d, generator=generator) / math.sqrt(d)
            tensors[f"{name}.lora_B.weight"] = torch.randn(n, rank, generator=generator) * sigma
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    return folder


def adapters(
    root: Path, model: nn.Module, count: int, targets: Sequence[str], rank: int, size: float = 0.2
) -> list[Path]:
    """`count` folders, each with another adapter."""
    return [write_adapter(root / f"a{i}", model, targets, rank, seed=i, size=size) for i in range(count)]


def ours(model: Any, folders: Sequence[Path], count: int | None = None) -> tuple[Any, list[float]]:
    """The model with hf_lora's adapters "a0", "a1", … ("a0" active), and the seconds that each load took.

    Args:
        count: how many; the folders come round again.
    """
    import hf_lora  # noqa: F401  # gives the model its verbs

    took = []
    for i in range(len(folders) if count is None else count):
        start = time.perf_counter()
        model.load_lora(folders[i % len(folders)], name=f"a{i}")
        took.append(time.perf_counter() - start)
    return model.eval(), took


def theirs(model: Any, folders: Sequence[Path], count: int | None = None) -> tuple[Any, list[float]]:
    """The model inside a PeftModel with the same adapters, and the seconds that each load took."""
    from peft import PeftModel

    took = []
    wrapped: Any = None
    with quiet():
        for i in range(len(folders) if count is None else count):
            folder = str(folders[i % len(folders)])
            start = time.perf_counter()
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, folder, adapter_name="a0")
            else:
                wrapped.load_adapter(folder, adapter_name=f"a{i}")
            took.append(time.perf_counter() - start)
    return wrapped.eval(), took


@contextlib.contextmanager
def quiet() -> Any:
    """Without PEFT's warnings and progress."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# ---- the same maths, by hand -----------------------------------------------------------------------------------------


class ByHand(nn.Linear):
    """x Wᵀ + (x Aᵀ) Bᵀ for each row, gathered beforehand and nothing else: what not being general saves."""

    At: Tensor  # (N, in, r)
    Bt: Tensor  # (N, r, out), scaled

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # nn.Linear's own name
        return super().forward(input).baddbmm_(torch.bmm(input, self.At), self.Bt)


def by_hand(model: Any, folders: Sequence[Path], rows: Sequence[int]) -> Any:
    """The model with `ByHand` layers for these rows: row i takes the adapter of folder `rows[i]`."""
    from safetensors.torch import load_file

    files = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    config = json.loads((folders[0] / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    for path, module in model.named_modules():
        key = f"base_model.model.{path}"
        if f"{key}.lora_A.weight" in files[0]:
            module.__class__ = ByHand
            module.At = torch.stack([files[i][f"{key}.lora_A.weight"].T for i in rows])
            module.Bt = torch.stack([files[i][f"{key}.lora_B.weight"].T * scaling for i in rows])
    return model
