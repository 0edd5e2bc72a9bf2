"""Names of layers that kohya-ss writes with underscores for dots: back to paths, by a model or by a vocabulary.

`lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q` is
`down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q` of the component "unet". Underscores stand inside of words,
too, so a name is read with the words that diffusers' and transformers' models have, and taken only if exactly one way
of cutting it makes sense. SDXL's files name the blocks of the original (LDM) U-Net, which are diffusers' in another
order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

__all__ = ["by_underscores", "component_of", "diffusers_path", "words_of"]

# What kohya (and OneTrainer) put before the name of a layer → diffusers' name of the part of the pipeline.
_COMPONENTS: Mapping[str, str] = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_transformer": "transformer",
}
_COMPONENT = re.compile(rf"({'|'.join(sorted(_COMPONENTS, key=len, reverse=True))})_(.+)")

_TEXT = """
down_blocks up_blocks mid_block resnets attentions downsamplers upsamplers transformer_blocks
single_transformer_blocks conv conv1 conv2 conv_in conv_out conv_shortcut time_emb_proj time_embedding add_embedding
linear_1 linear_2 proj_in proj_out attn attn1 attn2 to_q to_k to_v to_out add_q_proj add_k_proj add_v_proj
to_add_out ff ff_context net proj text_model encoder layers self_attn q_proj k_proj v_proj out_proj mlp fc1 fc2
text_projection embeddings token_embedding position_embedding
input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection op time_embed label_emb
"""
_WORDS = frozenset(_TEXT.split())

_INPUT = re.compile(r"input_blocks\.(\d{1,4})\.(\d{1,4})(\..+|$)")
_MIDDLE = re.compile(r"middle_block\.(\d{1,4})(\..+|$)")
_OUTPUT = re.compile(r"output_blocks\.(\d{1,4})\.(\d{1,4})(\..+|$)")
_LDM: Mapping[str, str] = {  # what lies outside of the blocks
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_RESNET: Mapping[str, str] = {
    ".in_layers.2": ".conv1",
    ".out_layers.3": ".conv2",
    ".emb_layers.1": ".time_emb_proj",
    ".skip_connection": ".conv_shortcut",
}
_LAYERS = 2  # of ResNet blocks in each down block of Stable Diffusion 1, 2 and XL; up blocks have one more


def component_of(name: str) -> tuple[str, str] | None:
    """(component, the rest) of "lora_te1_text_model_…"; None for another prefix."""
    found = _COMPONENT.fullmatch(name)
    return (_COMPONENTS[found[1]], found[2]) if found else None


def words_of(name: str) -> list[str]:
    """Every way of cutting a name into known words and numbers, with dots between them."""
    if name == "out_2":  # LDM's; "out" is no word elsewhere
        return ["conv_out"]
    found: list[list[list[str]]] = [[[]]]
    parts = name.split("_")
    for end in range(1, len(parts) + 1):
        ways = []
        for start in range(max(0, end - 4), end):
            word = "_".join(parts[start:end])
            if word in _WORDS or word.isdecimal():
                ways += [[*way, word] for way in found[start]][:8]
        found.append(ways)
    return [".".join(way) for way in found[-1] if way]


def diffusers_path(path: str) -> str | None:
    """A path of LDM's U-Net as diffusers has it; others as they are; None if LDM has no such layer."""
    if path in _LDM:
        return _LDM[path]
    if (found := _INPUT.fullmatch(path)) is not None:
        block, inner, rest = int(found[1]), int(found[2]), found[3]
        if block == 0:
            return "conv_in" if inner == 0 and not rest else None
        at, layer = divmod(block - 1, _LAYERS + 1)
        if layer == _LAYERS:  # between the blocks
            return f"down_blocks.{at}.downsamplers.0.conv" if (inner, rest) == (0, ".op") else None
        return _inner(f"down_blocks.{at}", inner, layer, rest)
    if (found := _MIDDLE.fullmatch(path)) is not None:
        inner, rest = int(found[1]), found[2]
        if inner == 1 and rest:
            return f"mid_block.attentions.0{rest}"
        return f"mid_block.resnets.{inner // 2}{_RESNET[rest]}" if inner in (0, 2) and rest in _RESNET else None
    if (found := _OUTPUT.fullmatch(path)) is not None:
        at, layer = divmod(int(found[1]), _LAYERS + 1)
        inner, rest = int(found[2]), found[3]
        if inner and rest == ".conv":
            return f"up_blocks.{at}.upsamplers.0.conv"
        return _inner(f"up_blocks.{at}", inner, layer, rest)
    return path


def _inner(block: str, inner: int, layer: int, rest: str) -> str | None:
    if inner == 1 and rest:
        return f"{block}.attentions.{layer}{rest}"
    return f"{block}.resnets.{layer}{_RESNET[rest]}" if inner == 0 and rest in _RESNET else None


def by_underscores(paths: Iterable[str]) -> dict[str, list[str]]:
    """A model's paths by the name that kohya gives them; several of one name cannot be told apart."""
    table: dict[str, list[str]] = {}
    for path in paths:
        table.setdefault(path.replace(".", "_"), []).append(path)
    return table
