"""Memory, checkpoint size and throughput of training, against full fine-tuning.

Bytes are counted, not sampled: weights, gradients, the optimizer's state after a step, and what autograd keeps for the
backward (each storage once, weights left out). Steps of all methods are timed in turn, in one process.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from hf_lora import LoRAConfig
from hf_lora.recipe.base import find
from hf_lora.recipe.schema import Base, Data, Source

from . import methods
from .methods import Size
from .sweep import Records, key_of
from .tasks import Profile

__all__ = ["counted", "measure"]


def measure(
    experiment: Mapping[str, Any], profile: Profile, records: Records, out: Path, *, run: bool = True, **chosen: Any
) -> dict[str, Any]:
    """A row for each system, and the paper's GPT-3 by its shapes alone."""
    spec = {**profile.size(experiment["sizes"]), "systems": experiment["systems"]}
    key = key_of({"study": "costs", **spec, "threads": torch.get_num_threads()})
    record = records.get(key)
    if record is None and run:
        record = records.add(key, {"rows": _measured(spec)})
    rows, length = spec["batch"]
    setting = (
        f"{spec['base']}, float32, batches of {rows} × {length} tokens, AdamW, "
        f"{'CUDA' if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'}."
    )
    return {"rows": (record or {}).get("rows", []), "gpt3": _gpt3(), "setting": setting}


def _measured(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    found = find(Base(model=spec["base"], dtype="float32"), Data(train=Source(file="none.txt"), text="{text}"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(found.config).to(device)
    rows, length = spec["batch"]
    ids = torch.randint(0, base.config.get_text_config().vocab_size, (rows, length), device=device)
    made, outcomes = [], []
    for system in spec["systems"]:
        lora = LoRAConfig(r=int(system.get("r", 4)), target_modules=["q", "v"])
        model = methods.apply(
            system["method"], copy.deepcopy(base), Size(lora=lora, bottleneck=int(system.get("bottleneck", 8)))
        ).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        activations = _step(model, optimizer, ids, count=True)
        outcomes.append(
            {
                "system": system["name"],
                "trainable": sum(p.numel() for p in trained),
                "weights": _bytes(model.parameters()),
                "gradients": _bytes(trained),
                "optimizer": _bytes(v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)),
                "activations": activations,
                "checkpoint": _checkpoint(model, system["method"], trained),
            }
        )
        made.append((model, optimizer))
    times: list[list[float]] = [[] for _ in made]
    for turn in range(spec["rounds"]):
        for at in [*range(len(made))[turn % len(made) :], *range(len(made))[: turn % len(made)]]:
            began = time.perf_counter()
            _step(*made[at], ids)
            if ids.is_cuda:
                torch.cuda.synchronize()
            times[at].append(time.perf_counter() - began)
    for outcome, took in zip(outcomes, times, strict=True):
        outcome["tokens_per_second"] = round(rows * length / median(took), 1)
        outcome["ratio"] = round(median(f / t for f, t in zip(times[0], took, strict=True)), 3)
    return outcomes


def _step(model: Any, optimizer: Any, ids: Any, *, count: bool = False) -> int:
    optimizer.zero_grad()
    if count:
        loss, kept = counted(model, {"input_ids": ids, "labels": ids})
    else:
        loss, kept = model(input_ids=ids, labels=ids).loss, 0
    loss.backward()
    optimizer.step()
    return kept


def counted(model: Any, batch: Mapping[str, Any]) -> tuple[Any, int]:
    """The loss of a batch, and the bytes that autograd keeps for its backward: each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    return loss, sum(kept.values())


def _checkpoint(model: Any, method: str, trained: list[Any]) -> int:
    """Bytes on disk of what has to be kept for the task."""
    if method != "lora":
        return _bytes(trained)
    with tempfile.TemporaryDirectory() as folder:
        model.save_lora(Path(folder) / "adapter")
        return sum(path.stat().st_size for path in (Path(folder) / "adapter").iterdir())


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _gpt3() -> dict[str, Any]:
    """The paper's GPT-3 175B without weights: r = 4 on W_q and W_v, in 16 bits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=96, n_embd=12288, n_head=96, n_positions=2048))
    total = sum(p.numel() for p in model.parameters())
    model = methods.apply("lora", model, Size(lora=LoRAConfig(r=4, target_modules=["q", "v"])))
    own, _ = methods.trainable(model)
    return {"total": total, "trainable": own, "checkpoint_ft": 2 * total, "checkpoint_lora": 2 * own}
