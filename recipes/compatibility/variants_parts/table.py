"""The rows and columns of the matrix, as data: variants and starts, kinds of layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["KINDS", "VARIANTS", "Kind", "Variant"]


@dataclass(frozen=True)
class Variant:
    """A row: what is asked for in `LoRAConfig`'s words.

    Attributes:
        name: as the page calls it.
        fields: keywords of `LoRAConfig`.
        group: its heading.
        b_lr_ratio: LoRA+'s ratio of learning rates.
        begins: whether the model computes at step 0 what the base does: "bits"; "rounding", where products cancel
            (B·A is not zero); or "apart".
        fell: by how much the loss has to fall in training; less where it acts on a few positions only.
    """

    name: str
    fields: Mapping[str, Any]
    group: str
    b_lr_ratio: float = 1.0
    begins: str = "bits"
    fell: float = 0.01


@dataclass(frozen=True)
class Kind:
    """A column: a family of models (see `scenes.MODELS`), the layers that are adapted, and further keywords."""

    name: str
    family: str
    targets: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("Linear", "llama", ("q_proj", "v_proj", "down_proj")),
        Kind("Linear, biases trained", "qwen2", ("q_proj", "v_proj"), {"bias": "lora_only"}),
        Kind("Conv1D", "gpt2", ("c_attn", "c_fc")),
        Kind("roles of a fused layer", "gpt2", ("q", "v")),
        Kind("Embedding", "llama", ("embed_tokens",)),
    )
}

_BLOCKS = {
    "nblocks": 2,
    "target_modules_bd_a": ["q_proj", "c_attn"],
    "target_modules_bd_b": ["v_proj", "down_proj", "c_fc"],
}
_ALONE, _START, _BOTH = "Variants", "Initialisations", "Together"

VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("LoRA", {}, _ALONE),
        Variant("rsLoRA", {"use_rslora": True}, _ALONE),
        Variant("DoRA", {"use_dora": True}, _ALONE),
        Variant("lora_bias", {"lora_bias": True}, _ALONE),
        Variant("LoRA-FA", {"freeze_a": True}, _ALONE),
        Variant("LoRA+", {}, _ALONE, b_lr_ratio=4.0),
        Variant("KaSA", {"kasa_config": {}}, _ALONE, begins="apart"),
        Variant("aLoRA", {"alora_invocation_tokens": [32], "task_type": "CAUSAL_LM"}, _ALONE, fell=0.002),  # a space
        Variant("BD-LoRA", {"use_bdlora": _BLOCKS}, _ALONE),
        Variant("QA-LoRA", {"use_qalora": True, "qalora_group_size": 4}, _ALONE),
        Variant("VeLoRA", {"velora_config": {"num_groups": 4}}, _ALONE),
        Variant("MonteCLoRA", {"monteclora_config": {}}, _ALONE),
        Variant("layers repeated", {"layer_replication": [[0, 2], [1, 2]]}, _ALONE, begins="apart"),
        Variant("gaussian", {"init": "gaussian"}, _START),
        Variant("orthogonal", {"init": "orthogonal"}, _START, begins="rounding"),
        Variant("PiSSA", {"init": "pissa"}, _START),
        Variant("PiSSA, fast", {"init": "pissa_niter_4"}, _START),
        Variant("OLoRA", {"init": "olora"}, _START),
        Variant("MiCA", {"init": "mica"}, _START),
        Variant("EVA", {"init": "eva"}, _START),
        Variant("LoRA-GA", {"init": "lora_ga"}, _START),
        Variant("CorDA", {"init": "corda"}, _START),
        Variant("LoftQ", {"init": "loftq"}, _START, begins="apart"),
        Variant("DoRA + rsLoRA", {"use_dora": True, "use_rslora": True}, _BOTH),
        Variant("DoRA + lora_bias", {"use_dora": True, "lora_bias": True}, _BOTH),
        Variant("DoRA + LoRA-FA", {"use_dora": True, "freeze_a": True}, _BOTH),
        Variant("DoRA + LoRA+", {"use_dora": True}, _BOTH, b_lr_ratio=4.0),
        Variant("DoRA + PiSSA", {"use_dora": True, "init": "pissa"}, _BOTH),
        Variant("DoRA + EVA", {"use_dora": True, "init": "eva"}, _BOTH),
        Variant("DoRA + LoRA-GA", {"use_dora": True, "init": "lora_ga"}, _BOTH),
        Variant("LoRA-FA + EVA", {"freeze_a": True, "init": "eva"}, _BOTH),
        Variant("rsLoRA + PiSSA", {"use_rslora": True, "init": "pissa"}, _BOTH),
        Variant("lora_bias + OLoRA", {"lora_bias": True, "init": "olora"}, _BOTH),
        Variant(
            "KaSA + rsLoRA + lora_bias",
            {"kasa_config": {}, "use_rslora": True, "lora_bias": True},
            _BOTH,
            begins="apart",
        ),
        Variant("DoRA + BD-LoRA", {"use_dora": True, "use_bdlora": _BLOCKS}, _BOTH),
        Variant("VeLoRA + PiSSA", {"velora_config": {"num_groups": 4}, "init": "pissa"}, _BOTH),
        Variant("KaSA + DoRA", {"kasa_config": {}, "use_dora": True}, _BOTH, begins="apart"),
    )
}
