"""The kinds of adapter that the format can express: on which base, with which config, written how.

A kind that hf_lora gains (a field, an initialisation) needs a row here and a run of write.py: tests/test_golden.py says
so where one is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .formula import filling

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
BASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**_SIZES, **_IDS, "vocab_size": 24, "num_key_value_heads": 1}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {**_IDS, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 24},
    ),
    "vit": (
        "ViTConfig",
        "ViTModel",
        {**_SIZES, "image_size": 8, "patch_size": 4, "num_channels": 2},
    ),
    "siglip": (
        "SiglipVisionConfig",
        "SiglipVisionModel",
        {**_SIZES, "image_size": 8, "patch_size": 4, "num_channels": 2},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_SIZES, **_IDS, "vocab_size": 24, "num_key_value_heads": 1, "num_local_experts": 3, "intermediate_size": 8},
    ),
    "bert": (
        "BertConfig",
        "BertForSequenceClassification",
        {**_SIZES, "vocab_size": 24, "max_position_embeddings": 16, "num_labels": 3, "pad_token_id": 0},
    ),
}


def base(name: str) -> Any:
    """A base whose weights follow from their names; float32."""
    import torch
    import transformers

    config, model, fields = BASES[name]
    built = getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()
    for key, parameter in built.named_parameters():
        middle = 1.0 if parameter.ndim == 1 and not key.endswith("bias") else 0.0
        values = filling(f"{name} {key}", tuple(parameter.shape), 0.5) + middle
        parameter.data.copy_(torch.from_numpy(values))
    return built


def batches() -> list[dict[str, Any]]:
    """What an initialisation from data reads."""
    import torch

    ids = torch.from_numpy((filling("ids", (4, 3, 6)) * 10 + 13).astype("int64"))
    return [{"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows} for rows in ids]


def fill(model: Any) -> None:
    """Change what trains by numbers that follow from the parameters' places, so that every part has an effect."""
    import torch

    trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    for i, (_, parameter) in enumerate(trained):
        noise = torch.from_numpy(filling(f"trained {i}", tuple(parameter.shape), 0.25))
        parameter.data.add_(noise.to(parameter.dtype))


def saved(kind: Kind, folder: Path) -> None:
    from hf_lora import LoRAConfig

    model = base(kind.base)
    given = {"data": batches()} if kind.data else {}
    model.add_lora(LoRAConfig(**{"r": 2, "alpha": 3.0, "base_model": f"golden/{kind.base}", **kind.config}), **given)
    fill(model)
    model.save_lora(folder)


def saved_bf16(kind: Kind, folder: Path) -> None:
    """A frozen adapter on a bf16 base."""
    import dataclasses

    import torch

    from hf_lora import LoRAAdapter, LoRAConfig

    model = base(kind.base)
    model.add_lora(LoRAConfig(r=2, alpha=3.0, base_model=f"golden/{kind.base}", **kind.config))
    fill(model)
    value = model.lora_adapter()
    factors = {path: pair.to(torch.bfloat16) for path, pair in value.factors.items()}
    LoRAAdapter.of(dataclasses.replace(value, factors=factors)).save(folder)


def checkpoint(kind: Kind, folder: Path) -> None:
    """What the stock Trainer writes: a folder for each of two adapters that train."""
    import shutil
    import tempfile

    import transformers

    from hf_lora import LoRAConfig

    model = base(kind.base)
    for name in ("org/a", "b"):
        model.add_lora(LoRAConfig(r=2, alpha=3.0, base_model=f"golden/{kind.base}", **kind.config), name)
    model.train_lora(["org/a", "b"])
    model.set_lora(["org/a", "b"])
    fill(model)
    rows = [{key: value[0] for key, value in batch.items()} for batch in batches()]
    with tempfile.TemporaryDirectory() as run:
        arguments = transformers.TrainingArguments(
            run, max_steps=2, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, learning_rate=1e-2
        )
        transformers.Trainer(model, arguments, train_dataset=rows).train()
        for part in sorted(Path(run, "checkpoint-2").glob("lora-*")):
            shutil.copytree(part, folder / part.name)


@dataclass(frozen=True)
class Kind:
    """One golden adapter.

    Args:
        base: of `BASES`.
        config: fields of LoRAConfig.
        write: writes it into a folder.
        data: whether its initialisation reads data.
        shown: how what it computes is compared: "layers", each by itself; "delta", its ΔW alone (aLoRA, which acts on a
            part of the tokens; repeated layers, which no single layer stands for; experts and nn.MultiheadAttention,
            whose weights are no layer's).
    """

    base: str = "llama"
    config: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[[Kind, Path], None] = saved
    data: bool = False
    shown: str = "layers"


_QV = {"target_modules": ["q", "v"]}
_BD = {"nblocks": 2, "target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"]}
KINDS: dict[str, Kind] = {
    "plain": Kind(config=_QV),
    "all-linear": Kind(config={"target_modules": "all-linear", "dropout": 0.1}),
    "regex": Kind(config={"target_modules": r".*\.(q|k)_proj", "task_type": "CAUSAL_LM"}),
    "rslora": Kind(config={**_QV, "use_rslora": True}),
    "patterns": Kind(
        config={
            "target_modules": ["q", "v", "down"],
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"down_proj": 7.5},
        }
    ),
    "biases, all": Kind("bert", {**_QV, "bias": "all"}),
    "biases, lora_only": Kind("bert", {**_QV, "bias": "lora_only"}),
    "head": Kind("bert", {**_QV, "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}),
    "embedding": Kind(config={"target_modules": ["embed_tokens", "q"]}),
    "conv1d": Kind("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "fused slices": Kind("gpt2", _QV),
    "bf16": Kind(config=_QV, write=saved_bf16),
    "repeated layers": Kind(config={**_QV, "layer_replication": [[0, 1], [0, 1]]}, shown="delta"),
    "dora": Kind(config={"target_modules": ["q", "down"], "use_dora": True}),
    "dora, embedding": Kind(config={"target_modules": ["embed_tokens", "q"], "use_dora": True}),
    "lora_bias": Kind(config={**_QV, "lora_bias": True}),
    "kasa": Kind(config={**_QV, "kasa_config": {}}),
    "velora": Kind(config={**_QV, "velora_config": {"num_groups": 4}}),
    "monteclora": Kind(config={**_QV, "monteclora_config": {"num_samples": 3}}),
    "bdlora": Kind(config={"target_modules": ["q", "o"], "use_bdlora": _BD}),
    "qalora": Kind(config={**_QV, "use_qalora": True, "qalora_group_size": 4}),
    "alora": Kind(config={**_QV, "alora_invocation_tokens": [5, 6]}, shown="delta"),
    "checkpoint": Kind(config=_QV, write=checkpoint),
    "convolution": Kind("vit", {"target_modules": ["projection"]}),
    "multihead attention": Kind("siglip", {"target_modules": ["head.attention"]}, shown="delta"),
    "experts": Kind(
        "mixtral",
        {"target_modules": ["q"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        shown="delta",
    ),
    "tokens": Kind(config={**_QV, "trainable_token_indices": [3, 7]}),
    **{
        f"init {name}": Kind(config={**_QV, "init": name}, data=name in ("eva", "lora_ga", "corda"))
        for name in (
            *("kaiming", "gaussian", "off", "orthogonal"),
            *("pissa", "olora", "mica", "loftq", "eva", "lora_ga", "corda"),
        )
    },
    "init pissa_niter_2, slices": Kind("gpt2", {**_QV, "init": "pissa_niter_2"}),
}


def adapters(folder: Path) -> list[Path]:
    """The adapters of a golden folder: itself, or those of a checkpoint."""
    return sorted(path.parent for path in folder.rglob("adapter_config.json"))
