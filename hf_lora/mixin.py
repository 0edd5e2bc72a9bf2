"""The verbs as methods of every transformers model."""

from __future__ import annotations

from . import verbs
from .integrations import auto, encoding, generation, pretrained, publishing, reporting, trainer, trl
from .integrations.patching import Registry

__all__ = ["LoRAMixin", "install"]


class LoRAMixin:
    """What `import hf_lora` adds to `PreTrainedModel`: the functions of `verbs`, with the model as self."""

    add_lora = verbs.add_lora
    prepare_lora = verbs.prepare_lora
    load_lora = verbs.load_lora
    save_lora = verbs.save_lora
    push_adapter_to_hub = verbs.push_adapter_to_hub
    set_lora = verbs.set_lora
    use_lora = verbs.use_lora
    no_lora = verbs.no_lora
    route_lora = verbs.route_lora
    train_lora = verbs.train_lora
    reserve_lora = verbs.reserve_lora
    merge_lora = verbs.merge_lora
    unmerge_lora = verbs.unmerge_lora
    merge_and_save = verbs.merge_and_save
    remove_lora = verbs.remove_lora
    lora_adapter = verbs.lora_adapter
    lora_state_dict = verbs.lora_state_dict
    base_state_dict = verbs.base_state_dict
    lora_summary = verbs.lora_summary
    print_lora_summary = verbs.print_lora_summary
    lora_names = property(verbs.lora_names)
    active_lora = property(verbs.active_lora)


def install(registry: Registry) -> None:
    """Make the verbs methods of `PreTrainedModel`, and wrap what transformers does with adapters."""
    from transformers import PreTrainedModel

    for name, verb in vars(LoRAMixin).items():
        if not name.startswith("_"):
            registry.set(PreTrainedModel, name, verb)
    pretrained.install(registry, PreTrainedModel)
    generation.install(registry)
    encoding.install(registry)
    trainer.install(registry)
    publishing.install(registry)
    reporting.install(registry)
    trl.install(registry)
    auto.install(registry)
