"""Vision, speech and multimodal models of transformers: "all-linear", roles, and the roles of one side."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loras import bits, randomise
from rowscenes import Scene, built, by_row, grids, llava, noise, plain
from torch import Tensor, nn

from hf_lora import LoRAConfig, LoRATargetError, LoRAUnsupportedError
from hf_lora.targeting import resolve


def sam() -> Scene:
    """Windows in the first layer of its vision tower, all of the image in the second; a decoder that takes points."""
    vision = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 2,
        "output_channels": 16, "mlp_dim": 48, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8,
    }  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": 16, "patch_size": 2, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
    }  # fmt: skip
    config = transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    model = built(config, "SamModel")
    points = torch.tensor([[[[3.0, 4.0]]], [[[9.0, 2.0]]], [[[12.0, 15.0]]]], dtype=torch.float64)
    batch = {"pixel_values": noise(3, 3, 16, 16), "input_points": points}
    return Scene(model, batch, by_row(batch))


SCENES = {
    "vit": functools.partial(plain, "vit"),
    "clip": functools.partial(plain, "clip"),
    "sam": sam,
    "whisper": functools.partial(plain, "whisper"),
    "wav2vec2": functools.partial(plain, "wav2vec2"),
    "llava": llava,
    "qwen2_vl": functools.partial(grids, "qwen2_vl"),
}

# what is asked → (how many layers, what stands in the path of each, what in none)
ASKED: dict[str, dict[str, tuple[int, str, str]]] = {
    "vit": {"q": (2, "q_proj", ""), "attention": (8, "attention", "mlp"), "mlp": (4, "mlp", "attention")},
    "clip": {
        "q": (4, "q_proj", ""),
        "language.q": (2, "text_model", "vision_model"),
        "vision.q": (2, "vision_model", "text_model"),
        "vision.all-linear": (12, "vision_model", "text_model"),
        "projector.all-linear": (2, "_projection", "model"),
    },
    "sam": {
        "q": (6, "", "mlp"),
        "vision.q": (2, "vision_encoder", "mask_decoder"),
        "decoder.mlp": (2, "mask_decoder", "vision_encoder"),
        "vision.mlp": (4, "vision_encoder", "mask_decoder"),
    },
    "whisper": {
        "q": (6, "q_proj", ""),
        "encoder.q": (2, ".encoder.", ".decoder."),
        "decoder.q": (4, ".decoder.", ".encoder."),
    },
    "wav2vec2": {"q": (2, "q_proj", ""), "mlp": (4, "_dense", "attention"), "head": (1, "lm_head", "")},
    "llava": {
        "q": (4, "q_proj", ""),
        "language.q": (2, "language_model", "vision_tower"),
        "vision.q": (2, "vision_tower", "language_model"),
        "language.mlp": (6, "language_model", "vision_tower"),
        "vision.all-linear": (12, "vision_tower", "language_model"),
        "projector.all-linear": (2, "multi_modal_projector", "tower"),
    },
    "qwen2_vl": {
        "language.attention": (8, "language_model", "visual"),
        "vision.q": (2, "visual", "language_model"),
        "projector.all-linear": (2, "merger", "language_model"),
    },
}


@functools.lru_cache(maxsize=len(SCENES))
def scene(name: str) -> Scene:
    return SCENES[name]()


@pytest.fixture(params=SCENES)
def at(request: pytest.FixtureRequest) -> Any:
    """A scene, whose model is given back without an adapter."""
    found = scene(request.param)
    found.model.eval()
    yield request.param, found.model, found.batch, found.alone
    if found.model.lora_names:
        found.model.remove_lora()


def output(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    found = model(**batch)
    for name in ("logits", "logits_per_image", "pred_masks", "last_hidden_state"):
        if name in found:
            result: Tensor = found[name]
            return result
    raise AssertionError(list(found))


def both_sides(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """What the rows alone decide: CLIP's logits compare each row with every other."""
    found = model(**batch)
    if "text_embeds" in found:
        return torch.cat([found["text_embeds"], found["image_embeds"]], -1)
    return output(model, batch)


def paths(model: nn.Module, *words: str, **fields: Any) -> list[str]:
    return [target.path for target in resolve(model, LoRAConfig(r=1, target_modules=list(words), **fields)).targets]


def test_roles_and_sides_give_these_layers(at: Any) -> None:
    name, model, _, _ = at
    for word, (count, inside, outside) in ASKED[name].items():
        found = paths(model, word)
        assert len(found) == count, (word, found)
        assert all(inside in path for path in found), (word, found)
        assert not outside or not any(outside in path for path in found), (word, found)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings() if name not in ("sam", "vit", "wav2vec2", "clip") else None
    linears -= {path for path, module in model.named_modules() if module is head}
    targets = resolve(model, LoRAConfig(r=1, target_modules="all-linear")).targets
    assert linears <= {target.path for target in targets} | ({"lm_head"} if name == "wav2vec2" else set())


def test_all_linear_is_pefts(at: Any, peft: Any) -> None:
    name, model, _, _ = at
    ours = {t.path for t in resolve(model, LoRAConfig(r=1, target_modules="all-linear")).targets}
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules="all-linear"))
    found = set(theirs.targeted_module_names)
    theirs.unload()
    vars(model).pop("peft_config", None)
    assert ours == found, name


WORDS = {
    "vit": ["q", "v", "mlp"],
    "clip": ["language.q", "vision.attention"],
    "sam": ["vision.q", "vision.v", "vision.mlp", "decoder.attention"],
    "whisper": ["encoder.q", "decoder.attention"],
    "wav2vec2": ["q", "mlp"],
    "llava": ["language.attention", "vision.q", "projector.all-linear"],
    "qwen2_vl": ["language.q", "vision.q", "vision.mlp"],
}


def test_train_save_merge_and_remove(at: Any, tmp_path: Path, peft: Any) -> None:
    name, model, batch, _ = at
    before, base = bits(model), output(model, batch)
    model.add_lora(LoRAConfig(r=2, alpha=4, target_modules=WORDS[name]), "a")
    assert torch.equal(output(model, batch), base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    both_sides(model, batch).square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    unused = "vision_tower.encoder.layers.1." if name == "llava" else "-"  # LLaVA reads the layer before the last
    without = [path for path, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert trained
    assert all(unused in path for path in without), without
    optimizer.step()
    randomise(model)
    with torch.no_grad():
        tuned = output(model, batch)
    scale = float(tuned.abs().max())
    assert (tuned - base).abs().max() > 1e-3 * scale
    model.save_lora(tmp_path / "a")

    model.merge_lora()
    torch.testing.assert_close(output(model, batch), tuned, rtol=0, atol=1e-5 * scale)
    model.unmerge_lora()
    model.remove_lora()
    assert bits(model) == before
    model.load_lora(tmp_path / "a")
    loaded = output(model, batch)
    torch.testing.assert_close(loaded, tuned, rtol=0, atol=1e-5 * scale)
    model.remove_lora()

    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
    torch.testing.assert_close(output(theirs, batch), tuned, rtol=0, atol=1e-5 * scale)
    theirs.unload()
    vars(model).pop("peft_config", None)
    assert bits(model) == before


def test_rows_take_adapters_of_their_own_on_both_sides(at: Any) -> None:
    name, model, batch, alone = at
    for adapter, seed in (("a", 1), ("b", 2)):
        model.add_lora(LoRAConfig(r=2, target_modules=WORDS[name]), adapter)
        randomise(model, seed=seed)
    names = ["b", None, "a"]
    with model.route_lora(names), torch.no_grad():
        routed = both_sides(model, batch)
    for row, which in enumerate(names):
        with model.use_lora(which), torch.no_grad():
            expected = both_sides(model, alone[row])[0]
        torch.testing.assert_close(routed[row], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


# ---- the notation ----------------------------------------------------------------------------------------------------


def test_a_side_narrows_and_a_plain_role_means_all_of_them() -> None:
    model = scene("llava").model
    q = set(paths(model, "q"))
    assert set(paths(model, "language.q")) | set(paths(model, "vision.q")) == q
    assert set(paths(model, "q", exclude_modules=["vision.q"])) == set(paths(model, "language.q"))
    everything = resolve(model, LoRAConfig(r=1, target_modules="all-linear", exclude_modules=["vision.all-linear"]))
    assert not any("vision_tower" in target.path for target in everything.targets)
    assert len(everything.targets) == 16
    one = resolve(model, LoRAConfig(r=1, target_modules="vision.mlp"))  # as a string, it is no regular expression
    assert len(one.targets) == 4


@pytest.mark.parametrize(
    ("model", "word", "what"),
    [
        ("llava", "audio.q", r"Sides here: language, vision, projector, encoder\."),
        ("llava", "vision.gate", "no layer of its vision side has the role 'gate'"),
        ("llava", "vision.head", "no layer of its vision side"),
        ("vit", "language.q", "matches no module"),
        ("llava", "vision.nonsense", "Sides here"),
    ],
)
def test_a_side_or_a_role_that_is_not_there_is_refused(model: str, word: str, what: str) -> None:
    for config in (
        LoRAConfig(target_modules=[word]),
        LoRAConfig(target_modules=["q"], exclude_modules=[word]),
    ):
        with pytest.raises(LoRATargetError, match=what):
            resolve(scene(model).model, config)


def test_a_module_of_that_very_name_wins() -> None:
    """`encoder.q` was a name before it was a role of a side."""
    model = nn.ModuleDict({
        "encoder": nn.ModuleDict({"q": nn.Linear(4, 4), "inner": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    })  # fmt: skip
    assert paths(model, "encoder.q") == ["encoder.q"]
    assert paths(model, "encoder.all-linear") == ["encoder.q", "encoder.inner.q"]
    file = LoRAConfig(target_modules=["encoder.attention"])  # in a file words are names
    with pytest.raises((LoRATargetError, LoRAUnsupportedError)):
        resolve(model, file, from_file=True)
    assert paths(model, "encoder.attention") == ["encoder.q", "encoder.inner.q"]
