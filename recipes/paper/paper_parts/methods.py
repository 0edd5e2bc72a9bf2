"""Every system that the paper compares, by name: what of a model trains, and how many parameters that is.

A method takes a model whose weights are loaded and gives the one to train. In classification the new head trains with
each; it is counted apart, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_lora import LoRAConfig

from . import adapters

__all__ = ["METHODS", "Method", "Size", "apply", "is_head", "trainable"]

_HEADS = ("classifier", "score", "classification_head", "pooler")


@dataclass(frozen=True)
class Size:
    """How large a method is made; each reads its own field.

    Args:
        lora: rank, alpha and targets. bottleneck: r of an adapter. dropped: lower layers without adapters, as a share.
        tokens: l_p + l_i, the tokens of a prefix. batches: what an initialisation of a LoRA looks at.
    """

    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(target_modules=["q", "v"]))
    bottleneck: int = 8
    dropped: float = 0.0
    tokens: int = 16
    batches: tuple[Mapping[str, Any], ...] | None = None


@dataclass(frozen=True)
class Method:
    """A system.

    Args:
        title: as the paper's tables call it. apply: makes it of a model and a size.
        count: trainable parameters, by the paper's formula, of a model not yet changed; None where it has none.
        group: its line in a figure. trains: False for what only prompts.
    """

    title: str
    apply: Callable[[Any, Size], Any]
    count: Callable[[Any, Size], int] | None = None
    group: str = ""
    trains: bool = True


def apply(name: str, model: Any, size: Size) -> Any:
    """The model, ready to train with the method."""
    return METHODS[name].apply(model, size)


def is_head(name: str) -> bool:
    """Whether a parameter is of the head: the classifier, and the pooler before it, as RoBERTa's head has both."""
    return any(part in _HEADS for part in name.split("."))


def trainable(model: Any) -> tuple[int, int]:
    """Parameters that train: the method's own, and the head's."""
    counts = [0, 0]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[is_head(name)] += parameter.numel()
    return counts[0], counts[1]


# ---- what they do ----------------------------------------------------------------------------------------------------


def _only(model: Any, chosen: Callable[[str, Any], bool]) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_head(name) or chosen(name, parameter))
    return model


def _everything(model: Any, size: Size) -> Any:
    return _only(model, lambda name, parameter: True)


def _top2(model: Any, size: Size) -> Any:
    top = tuple(f"{path}." for path in adapters.layer_paths(model)[-2:])
    return _only(model, lambda name, parameter: name.startswith(top))


def _biases(model: Any, size: Size) -> Any:
    model = _only(model, lambda name, parameter: name.endswith("bias"))
    if not trainable(model)[0]:
        raise ValueError(f"bitfit: {type(model).__name__} has no bias vectors to train. Take a base that has some.")
    return model


def _head(model: Any, size: Size) -> Any:
    return _only(model, lambda name, parameter: False)


def _adapter(kind: str) -> Callable[[Any, Size], Any]:
    def put(model: Any, size: Size) -> Any:
        _head(model, size)
        adapters.insert(model, kind, size.bottleneck, dropped=_dropped(kind, model, size))
        return model

    return put


def _dropped(kind: str, model: Any, size: Size) -> int:
    return int(size.dropped * len(adapters.layer_paths(model))) if kind == "adapter-d" else 0


def _lora(model: Any, size: Size) -> Any:
    classifies = "SequenceClassification" in type(model).__name__
    whole = (
        ("pooler",) if classifies and any("pooler" in name.split(".") for name, _ in model.named_modules()) else None
    )
    model.add_lora(
        size.lora.replace(task_type="SEQ_CLS" if classifies else None, modules_to_save=whole), data=size.batches
    )
    return model


def _prefix(kind: str, *, with_lora: bool = False) -> Callable[[Any, Size], Any]:
    """peft's prompt tuning (embeddings before the text) or prefix tuning (keys and values in every layer)."""

    def put(model: Any, size: Size) -> Any:
        import peft

        if with_lora:
            model.add_lora(size.lora.replace(modules_to_save=()))  # the head is peft's
        task = "SEQ_CLS" if "SequenceClassification" in type(model).__name__ else "CAUSAL_LM"
        made = {"embed": peft.PromptTuningConfig, "layer": peft.PrefixTuningConfig}[kind]
        wrapped = peft.get_peft_model(model, made(task_type=task, num_virtual_tokens=_virtual(kind, size)))
        for name, parameter in wrapped.named_parameters():  # peft froze all that is not its own
            if "lora_slots" in name or "pooler" in name.split("."):
                parameter.requires_grad_(True)
        return wrapped

    return put


def _virtual(kind: str, size: Size) -> int:
    """PreLayer trains a vector for each token and layer, peft's prefix two (key and value): half as many tokens."""
    return size.tokens if kind == "embed" else max(1, size.tokens // 2)


def _nothing(model: Any, size: Size) -> Any:
    return _only(model, lambda name, parameter: False)


# ---- how many parameters that is -------------------------------------------------------------------------------------


def _d(model: Any) -> int:
    return int(model.config.get_text_config().hidden_size)


def _count_lora(model: Any, size: Size) -> int:
    """Σ r (d_in + d_out) over the targets; 2 L_LoRA d r where they are square."""
    from hf_lora.targeting import resolve

    found = resolve(model, size.lora.replace(task_type=None))
    total = 0
    for target in found.targets:
        if target.blocks:
            total += sum(target.rank * (target.info.in_features + sum(map(len, rows))) for _, rows in target.blocks)
        else:
            total += target.rank * (target.info.in_features + target.info.out_features)
    return total


def _count_adapter(kind: str) -> Callable[[Any, Size], int]:
    """L_adpt (2 d r + r + d) + 2 L_LN d."""

    def count(model: Any, size: Size) -> int:
        layers = len(adapters.layer_paths(model)) - _dropped(kind, model, size)
        placed, d, r = layers * len(adapters.KINDS[kind].roles), _d(model), size.bottleneck
        return placed * (2 * d * r + r + d) + (2 * placed * d if adapters.KINDS[kind].norm else 0)

    return count


def _count_embed(model: Any, size: Size) -> int:
    """d (l_p + l_i)."""
    return _d(model) * size.tokens


def _count_layer(model: Any, size: Size) -> int:
    """L d (l_p + l_i), with d the width of keys and values: they are narrower in grouped-query attention."""
    config = model.config.get_text_config()
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    groups = getattr(config, "num_key_value_heads", None) or heads
    return layers * 2 * (_d(model) // heads * groups) * _virtual("layer", size)


def _count_top2(model: Any, size: Size) -> int:
    return sum(p.numel() for path in adapters.layer_paths(model)[-2:] for p in model.get_submodule(path).parameters())


def _count_all(model: Any, size: Size) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if not is_head(name))


def _count_biases(model: Any, size: Size) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias") and not is_head(name))


def _sum(*counts: Callable[[Any, Size], int]) -> Callable[[Any, Size], int]:
    return lambda model, size: sum(count(model, size) for count in counts)


METHODS: Mapping[str, Method] = {
    "ft": Method("FT", _everything, _count_all, "FT"),
    "ft-top2": Method("FT-Top2", _top2, _count_top2, "FT-Top2"),
    "head": Method("head only", _head, lambda model, size: 0, "head only"),
    "bitfit": Method("BitFit", _biases, _count_biases, "BitFit"),
    "preembed": Method("PreEmbed", _prefix("embed"), _count_embed, "PreEmbed"),
    "prelayer": Method("PreLayer", _prefix("layer"), _count_layer, "PreLayer"),
    **{
        kind: Method(f"Adapter {kind[-1].upper()}", _adapter(kind), _count_adapter(kind), f"Adapter {kind[-1].upper()}")
        for kind in adapters.KINDS
    },
    "lora": Method("LoRA", _lora, _count_lora, "LoRA"),
    "lora+pe": Method("LoRA+PE", _prefix("embed", with_lora=True), _sum(_count_lora, _count_embed), "LoRA+PE"),
    "lora+pl": Method("LoRA+PL", _prefix("layer", with_lora=True), _sum(_count_lora, _count_layer), "LoRA+PL"),
    "few-shot": Method("few-shot", _nothing, lambda model, size: 0, "few-shot", trains=False),
}
