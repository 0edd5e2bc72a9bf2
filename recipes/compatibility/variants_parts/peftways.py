"""The same rows in PEFT's words: its config, its own start, its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .table import Kind, Variant

__all__ = ["begin", "save"]

# Fields whose settings PEFT wants in a class of their own.
_CONFIGS = {
    "corda_config": "CordaConfig",
    "eva_config": "EvaConfig",
    "lora_ga_config": "LoraGAConfig",
    "loftq_config": "LoftQConfig",
    "kasa_config": "KasaConfig",
    "use_bdlora": "BdLoraConfig",
    "velora_config": "VeloraConfig",
    "monteclora_config": "MontecloraConfig",
}
_CHANGE_BASE = ("pissa", "olora", "corda", "lora_ga")


def _config(variant: Variant, kind: Kind, shared: Mapping[str, Any]) -> Any:
    import peft

    words: dict[str, Any] = {**shared, **kind.fields, **variant.fields}
    words["lora_alpha"] = words.pop("alpha")
    words["target_modules"] = list(kind.targets)
    words.pop("freeze_a", None)  # in PEFT a choice of the optimizer
    if "init" in words:
        init = words["init_lora_weights"] = words.pop("init")
        if f"{init}_config" in _CONFIGS:
            words[f"{init}_config"] = {**words.pop("init_options", {})}
    for field, name in _CONFIGS.items():
        if field in words:
            words[field] = getattr(peft.tuners.lora.config, name)(**words[field])
    return peft.LoraConfig(**words, fan_in_fan_out=kind.name == "Conv1D")


def begin(base: Any, variant: Variant, kind: Kind, shared: Mapping[str, Any], batches: list[Any]) -> Any:
    """PEFT's model, as PEFT begins it. Raises what PEFT raises."""
    import peft

    if kind.name.startswith("roles"):
        raise NotImplementedError("PEFT knows no roles: part of a fused layer cannot be a target")
    config = _config(variant, kind, shared)
    if config.init_lora_weights == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(base, config, run_model=lambda: [base(input_ids=row[None]) for b in batches for row in b])
    if config.init_lora_weights == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(base, config, lambda: [base(input_ids=b, labels=b).loss.backward() for b in batches])
    model = peft.get_peft_model(base, config)
    if config.init_lora_weights == "eva":
        data = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in batches]
        peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    return model


def save(model: Any, folder: Path, train: Callable[[], None]) -> None:
    """Train and save; a base that PEFT changed is put back into the file, as PEFT offers it."""
    init = model.peft_config["default"].init_lora_weights
    apart = isinstance(init, str) and init.startswith(_CHANGE_BASE)
    if apart:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "start")
        model.peft_config["default"].init_lora_weights = init
    train()
    options = {"path_initial_model_for_weight_conversion": str(folder / "start")} if apart else {}
    model.save_pretrained(folder / "end", **options)
