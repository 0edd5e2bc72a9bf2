"""Bases that libraries quantised, for the tests: a table of what runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def _bitsandbytes(**settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(**settings)

    return make


def _four(kind: str, **more: Any) -> Callable[[], Any]:
    return _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type=kind, **more)


def _torchao(name: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        from torchao import quantization
        from transformers import TorchAoConfig

        if name == "IntxWeightOnlyConfig":
            from torchao.quantization.granularity import PerGroup

            settings.update(weight_dtype=torch.int4, granularity=PerGroup(32))
        return TorchAoConfig(getattr(quantization, name)(**settings))

    return make


def _quanto(weights: str) -> Callable[[], Any]:
    def make() -> Any:
        from transformers import QuantoConfig

        return QuantoConfig(weights=weights)

    return make


# name -> the configuration that transformers quantises by while it loads; None: by hand, see `load`
BASES: dict[str, Callable[[], Any] | None] = {
    "nf4": _four("nf4"),
    "nf4 twice": _four("nf4", bnb_4bit_use_double_quant=True),
    "fp4": _four("fp4"),
    "int8": _bitsandbytes(load_in_8bit=True),
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao fp8": _torchao("Float8WeightOnlyConfig"),
    "torchao int4": _torchao("IntxWeightOnlyConfig"),
    "quanto int8": _quanto("int8"),
    "quanto int4": _quanto("int4"),
    "quanto fp8": _quanto("float8"),
    "HQQ": None,
}


def save_dense(folder: Path) -> Path:
    """A small random model, as files; its sizes suit every library's groups and blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load(folder: Path, name: str, dtype: torch.dtype | None = None, *, still: bool = True) -> Any:
    """The model of `save_dense`, quantised in one of the ways of `BASES`.

    still: bitsandbytes may not rearrange 4-bit weights when the model runs in eval mode, as it does on some CPUs.
    """
    from transformers import AutoModelForCausalLM

    make = BASES[name]
    dtype = dtype or (torch.float32 if name in ("nf4", "nf4 twice", "fp4") else torch.bfloat16)
    if make is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=make(), dtype=dtype).eval()
        for module in model.modules() if still else ():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model
    return hqq(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


def hqq(model: Any) -> Any:
    """Let HQQ quantise every linear layer but the head, in place: transformers 5.23 does not do it."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            parent = model.get_submodule(path.rpartition(".")[0])
            config = BaseQuantizeConfig(nbits=4, group_size=32)
            made = HQQLinear(module, config, compute_dtype=module.weight.dtype, device="cpu")
            setattr(parent, path.rpartition(".")[2], made)
    return model
