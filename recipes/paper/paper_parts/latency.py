"""Table 1 and Figure 5 in kind: the time of a forward with adapters in it, against LoRA merged and unmerged.

All variants share one model's weights (the merged one has its own) and run in one process, each in its turn; a ratio is
of two timings of the same round. Times do not depend on what the weights are, so they are random.
"""

from __future__ import annotations

import copy
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

__all__ = ["measure"]


def measure(
    experiment: Mapping[str, Any], profile: Profile, records: Records, out: Path, *, run: bool = True, **chosen: Any
) -> dict[str, Any]:
    """Medians of every variant at every size, and their ratio to the base."""
    spec = {**profile.size(experiment["sizes"]), "variants": experiment["variants"]}
    key = key_of({"study": "latency", **spec, "threads": torch.get_num_threads()})
    record = records.get(key)
    if record is None and run:
        record = records.add(key, _measured(spec))
    where = "CUDA" if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    setting = f"{spec['base']}, float32, {where}; {spec['rounds']} rounds; one forward of the whole batch, no cache."
    return {"sizes": spec["batches"], "variants": (record or {}).get("variants", []), "setting": setting}


def _measured(spec: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    found = find(Base(model=spec["base"], dtype="float32"), Data(train=Source(file="none.txt"), text="{text}"))
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_config(found.config).to(device).eval()
    built = {"base, or LoRA merged by hand": base}
    for variant in spec["variants"]:
        built[variant["name"]] = _built(base, variant)
    vocabulary = base.config.get_text_config().vocab_size
    outcomes: dict[str, dict[str, Any]] = {name: {"name": name, "at": []} for name in built}
    with torch.inference_mode():
        for rows, length in spec["batches"]:
            ids = torch.randint(0, vocabulary, (rows, length), device=device)
            times: dict[str, list[float]] = {name: [] for name in built}
            for turn in range(spec["rounds"] + 1):
                names = list(built)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    took = _timed(built[name], ids)
                    if turn:  # the first round warms up
                        times[name].append(took)
            first = times["base, or LoRA merged by hand"]
            for name, found_times in times.items():
                ratios = sorted(a / b for a, b in zip(found_times, first, strict=True))
                outcomes[name]["at"].append(
                    {
                        "batch": [rows, length],
                        "ms": round(1000 * median(found_times), 2),
                        "ratio": round(median(ratios), 4),
                        "quartiles": [round(ratios[len(ratios) // 4], 4), round(ratios[(3 * len(ratios)) // 4], 4)],
                    }
                )
    return {"variants": list(outcomes.values())}


def _built(base: Any, variant: Mapping[str, Any]) -> Any:
    """A model with the variant in it; the base's parameters are shared unless LoRA is merged into them."""
    merged = bool(variant.get("merged"))
    shared = {} if merged else {id(p): p for p in base.parameters()}
    model = copy.deepcopy(base, shared)
    lora = LoRAConfig(r=int(variant.get("r", 8)), target_modules=["q", "v"])
    model = methods.apply(variant["method"], model, Size(lora=lora, bottleneck=int(variant.get("bottleneck", 8))))
    if variant["method"] == "lora" and merged:
        model.merge_lora()
    return model.eval()


def _timed(model: Any, ids: Any) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
