"""LoRA files of diffusion models: which layer each key means, ΔW by the formula, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import hf_lora
from hf_lora import LoRAAdapter, LoRAConfigError, LoRAFileError, LoRAUnsupportedError
from hf_lora.cli import app
from hf_lora.importers import from_diffusion, kohyanames

RANK = 2
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = {  # path in diffusers' U-Net → (out, in)
    f"{BLOCK}.attn1.to_q": (8, 8),
    f"{BLOCK}.attn1.to_out.0": (8, 8),
    f"{BLOCK}.attn2.to_k": (8, 6),
    f"{BLOCK}.ff.net.0.proj": (32, 8),
    f"{BLOCK}.ff.net.2": (8, 16),
    "mid_block.attentions.0.proj_in": (8, 8),
    "up_blocks.1.resnets.2.time_emb_proj": (8, 4),
    "time_embedding.linear_1": (8, 4),
}
TEXT = {
    "text_model.encoder.layers.0.self_attn.q_proj": (6, 6),
    "text_model.encoder.layers.0.self_attn.out_proj": (6, 6),
    "text_model.encoder.layers.11.mlp.fc1": (12, 6),
}


def pair(path: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(path))
    out, inner = size
    return torch.randn(RANK, inner, generator=generator), torch.randn(out, RANK, generator=generator)


def kohya(prefix: str, layers: dict[str, tuple[int, int]], alpha: float | None = 1.0) -> dict[str, Tensor]:
    tensors = {}
    for path, size in layers.items():
        name = f"{prefix}_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = pair(path, size)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


def dotted(component: str, layers: dict[str, tuple[int, int]], down: str, up: str) -> dict[str, Tensor]:
    tensors = {}
    for path, size in layers.items():
        tensors[f"{component}.{path}.{down}"], tensors[f"{component}.{path}.{up}"] = pair(path, size)
    return tensors


def old(component: str, layers: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """diffusers before 0.17: LoRAs of attention processors."""
    names = {"to_q": "to_q", "to_k": "to_k", "to_out.0": "to_out", "q_proj": "to_q", "out_proj": "to_out"}
    tensors = {}
    for path, size in layers.items():
        end = next((end for end in names if path.endswith(f".{end}")), None)
        if end is None:
            continue
        above = path.removesuffix(end) + ("processor." if component == "unet" else "")
        name = f"{component}.{above}{names[end]}_lora"
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = pair(path, size)
    return tensors


def check(adapter: LoRAAdapter, layers: dict[str, tuple[int, int]], scaling: float) -> None:
    assert set(adapter.factors) == set(layers)
    for path, size in layers.items():
        a, b = pair(path, size)
        torch.testing.assert_close(adapter.factors[path].delta(), scaling * (b @ a))


@pytest.mark.parametrize(("alpha", "scaling"), [(1.0, 0.5), (8.0, 4.0), (None, 1.0)])
def test_kohyas_keys(alpha: float | None, scaling: float, tmp_path: Path) -> None:
    tensors = {
        **kohya("lora_unet", UNET, alpha),
        **kohya("lora_te1", TEXT, alpha),
        **kohya("lora_te2", TEXT, alpha),
    }
    metadata = {"ss_network_dim": "128", "ss_network_alpha": "64", "ss_output_name": "style"}  # not what it is
    save_file(tensors, tmp_path / "style.safetensors", metadata=metadata)
    found = from_diffusion(tmp_path / "style.safetensors", base_model="org/sdxl")
    assert list(found) == ["unet", "text_encoder", "text_encoder_2"]
    assert found.metadata == metadata
    check(found["unet"], UNET, scaling)
    check(found["text_encoder"], TEXT, scaling)
    check(found["text_encoder_2"], TEXT, scaling)
    assert found["unet"].config.base_model == "org/sdxl"
    assert set(from_diffusion(kohya("lora_te", TEXT)).components) == {"text_encoder"}


T = "transformer_blocks"


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("input_blocks_4_1_transformer_blocks_1_attn2_to_v", f"down_blocks.1.attentions.0.{T}.1.attn2.to_v"),
        ("input_blocks_8_1_proj_out", "down_blocks.2.attentions.1.proj_out"),
        ("middle_block_1_transformer_blocks_9_ff_net_2", "mid_block.attentions.0.transformer_blocks.9.ff.net.2"),
        ("output_blocks_5_1_transformer_blocks_0_attn1_to_out_0", f"up_blocks.1.attentions.2.{T}.0.attn1.to_out.0"),
        ("input_blocks_2_0_emb_layers_1", "down_blocks.0.resnets.1.time_emb_proj"),
        ("middle_block_2_emb_layers_1", "mid_block.resnets.1.time_emb_proj"),
        ("output_blocks_0_0_emb_layers_1", "up_blocks.0.resnets.0.time_emb_proj"),
        ("time_embed_0", "time_embedding.linear_1"),
        ("label_emb_0_2", "add_embedding.linear_2"),
    ],
)  # fmt: skip
def test_the_original_unets_names_of_sdxl(name: str, path: str) -> None:
    a, b = torch.randn(2, 4), torch.randn(8, 2)
    found = from_diffusion({f"lora_unet_{name}.lora_down.weight": a, f"lora_unet_{name}.lora_up.weight": b})
    assert list(found["unet"].factors) == [path]


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("lora_down.weight", "lora_up.weight"),
    ],
)
def test_diffusers_keys(down: str, up: str) -> None:
    blocks = {"transformer_blocks.3.attn.add_q_proj": (4, 4), "single_transformer_blocks.0.proj_mlp": (8, 4)}
    parts = {"unet": UNET, "text_encoder": TEXT, "transformer": blocks}
    found = from_diffusion({k: t for part, layers in parts.items() for k, t in dotted(part, layers, down, up).items()})
    check(found["unet"], UNET, 1.0)
    check(found["text_encoder"], TEXT, 1.0)
    check(found["transformer"], blocks, 1.0)


def test_diffusers_old_keys_of_attention_processors() -> None:
    found = from_diffusion({**old("unet", UNET), **old("text_encoder", TEXT)})
    check(found["unet"], {path: UNET[path] for path in list(UNET)[:3]}, 1.0)
    check(found["text_encoder"], {path: TEXT[path] for path in list(TEXT)[:2]}, 1.0)


def test_diffusers_own_config_in_the_metadata_says_alpha(tmp_path: Path) -> None:
    tensors = dotted("unet", UNET, "lora_A.weight", "lora_B.weight")
    config = {"r": RANK, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"time_embedding.linear_1": 10}}
    said = json.dumps({f"unet.{key}": value for key, value in config.items()})
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": said, "format": "pt"})
    found = from_diffusion(tmp_path / "x.safetensors")
    others = {path: size for path, size in UNET.items() if path != "time_embedding.linear_1"}
    for path, size in UNET.items():
        a, b = pair(path, size)
        alpha = 6 if path in others else 10
        torch.testing.assert_close(found["unet"].factors[path].delta(), alpha / RANK**0.5 * (b @ a))


def test_dora(tmp_path: Path) -> None:
    layers = {path: size for path, size in UNET.items() if "attn" in path}
    tensors, plain = kohya("lora_unet", layers, 3.0), dotted("unet", layers, "lora_A.weight", "lora_B.weight")
    for path, (out, _) in layers.items():
        magnitude = torch.rand(out, 1) + 1
        tensors[f"lora_unet_{path.replace('.', '_')}.dora_scale"] = magnitude
        plain[f"unet.{path.removesuffix('.0')}.lora_magnitude_vector"] = magnitude[:, 0]  # to_out: as diffusers does
    for found in (from_diffusion(tensors)["unet"], from_diffusion(plain)["unet"]):
        assert found.config.use_dora
        for path in layers:
            expected = tensors[f"lora_unet_{path.replace('.', '_')}.dora_scale"][:, 0]
            assert torch.equal(found.factors[path].extras["magnitude"], expected)
        found.save(tmp_path / "dora")
        assert LoRAAdapter.load(tmp_path / "dora").config.use_dora
    name = f"lora_unet_{BLOCK.replace('.', '_')}_attn2_to_k.dora_scale"
    with pytest.raises(LoRAFileError, match=r"magnitude is \[1, 6\].*8 outputs"):
        from_diffusion({**tensors, name: torch.ones(1, 6)})
    square = f"lora_unet_{BLOCK.replace('.', '_')}_attn1_to_q.dora_scale"
    with pytest.raises(LoRAFileError, match=r"magnitude is \[1, 8\]"):  # of the inputs, though the numbers fit
        from_diffusion({**tensors, square: torch.ones(1, 8)})


class Attention(nn.Module):
    """As diffusers' Attention."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, width, bias=False) for n in (width, context, context))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        weights = (self.to_q(x) @ self.to_k(context).mT).softmax(-1)
        return self.to_out[0](weights @ self.to_v(context))


class UNet(nn.Module):
    """A stack with a name that an underscore makes ambiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList([nn.Module()])
        self.down_blocks[0].attn1 = Attention(8, 8)
        self.down_blocks[0].my_odd_layer = nn.Linear(8, 8)
        self.a = nn.ModuleDict({"b_c": nn.Linear(8, 8)})
        self.a_b = nn.ModuleDict({"c": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.down_blocks[0].my_odd_layer(self.down_blocks[0].attn1(x))
        return self.a["b_c"](x) + self.a_b["c"](x)


def test_a_model_tells_names_that_no_vocabulary_knows_and_the_result_runs(tmp_path: Path, peft: Any) -> None:
    torch.manual_seed(0)
    model, x = UNet(), torch.randn(2, 3, 8)
    layers = {"down_blocks.0.attn1.to_q": (8, 8), "down_blocks.0.my_odd_layer": (8, 8)}
    tensors = kohya("lora_unet", layers, 1.0)
    with pytest.raises(LoRAFileError, match="my_odd_layer: underscores stand for dots, and its words are not known"):
        from_diffusion(tensors)
    adapter = from_diffusion(tensors, base={"unet": model})["unet"]
    check(adapter, layers, 0.5)
    expected = UNet()
    expected.load_state_dict(model.state_dict())
    for path, size in layers.items():
        a, b = pair(path, size)
        expected.get_submodule(path).weight.data += 0.5 * b @ a
    hf_lora.load_lora(model, adapter, name="style")
    torch.testing.assert_close(model(x), expected(x))
    hf_lora.save_lora(model, tmp_path / "out")
    hf_lora.remove_lora(model)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "out")
    torch.testing.assert_close(theirs(x), expected(x))

    with pytest.raises(LoRAFileError, match=r"a_b_c may be a\.b_c or a_b\.c"):
        from_diffusion(kohya("lora_unet", {"a.b.c": (8, 8)}), base={"unet": UNet()})
    with pytest.raises(LoRAFileError, match="is no layer of the base"):
        from_diffusion(kohya("lora_unet", UNET), base={"unet": UNet()})
    with pytest.raises(LoRAFileError, match="the factors are 4 -> 8, the layer 8 -> 8"):
        from_diffusion(kohya("lora_unet", {"down_blocks.0.attn1.to_q": (8, 4)}), base={"unet": UNet()})
    with pytest.raises(LoRAConfigError, match="vae"):
        from_diffusion(tensors, base={"vae": UNet()})


def test_a_text_encoder_of_transformers_takes_them(tiny: Any) -> None:
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=6, intermediate_size=12, num_hidden_layers=12, num_attention_heads=2, vocab_size=16
    )
    model = transformers.CLIPTextModel(config).eval()
    adapter = from_diffusion(kohya("lora_te", TEXT), base={"text_encoder": model})["text_encoder"]
    ids = torch.arange(5)[None]
    before = model(ids).last_hidden_state
    model.load_lora(adapter)
    assert (model(ids).last_hidden_state - before).abs().max() > 1e-3
    assert len(adapter.factors) == len(TEXT)
    dots = dotted("text_encoder", TEXT, "lora_A.weight", "lora_B.weight")
    assert set(from_diffusion(dots, base={"text_encoder": model})["text_encoder"].factors) == set(adapter.factors)


def test_convolutions() -> None:
    path = "down_blocks_0_resnets_0_conv1"
    down, up = torch.randn(2, 4, 3, 3), torch.randn(8, 2, 1, 1)
    tensors = {f"lora_unet_{path}.lora_down.weight": down, f"lora_unet_{path}.lora_up.weight": up}
    found = from_diffusion(tensors)["unet"].factors["down_blocks.0.resnets.0.conv1"]
    assert (found.kind, found.kernel) == ("conv", (3, 3))
    assert torch.equal(found.A, down.flatten(1))
    assert torch.equal(found.B, up.flatten(1))
    x = torch.randn(1, 4, 5, 5)
    expected = nn.functional.conv2d(nn.functional.conv2d(x, down), up)
    torch.testing.assert_close(nn.functional.conv2d(x, found.delta().view(8, 4, 3, 3)), expected)


def test_a_convolution_of_one_by_one_on_a_linear_layer() -> None:
    (a, b), path = pair("x", (8, 8)), "down_blocks.0.attn1.to_q"
    name = f"lora_unet_{path.replace('.', '_')}"
    tensors = {f"{name}.lora_down.weight": a[..., None, None], f"{name}.lora_up.weight": b[..., None, None]}
    found = from_diffusion(tensors, base={"unet": UNet()})["unet"].factors[path]
    assert found.kind == "linear"
    torch.testing.assert_close(found.delta(), b @ a)


NAME = "lora_unet_mid_block_attentions_0_proj_in"


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ((f"{NAME}.hada_w1_a", f"{NAME}.hada_w2_b"), "LoHa"),
        ((f"{NAME}.lokr_w1", f"{NAME}.lokr_w2_a"), "LoKr"),
        ((f"{NAME}.lora_mid.weight",), "middle"),
        ((f"{NAME}.oft_blocks",), "OFT"),
        ((f"{NAME}.diff",), "whole difference"),
        ((f"{NAME}.bias",), "biases"),
    ],
)
def test_other_methods_are_refused_by_name(keys: tuple[str, ...], what: str) -> None:
    tensors = {**kohya("lora_unet", UNET), **{key: torch.ones(2, 2) for key in keys}}
    with pytest.raises(LoRAUnsupportedError, match=what) as caught:
        from_diffusion(tensors)
    assert all(key in str(caught.value) for key in keys)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({f"{NAME}.lora_up.weight": None}, "only A, alpha: a LoRA is a pair"),
        ({f"{NAME}.lora_up.weight": torch.ones(8, 3)}, "their ranks are not the same"),
        ({f"{NAME}.lora_up.weight": torch.ones(8, 2, 1)}, "no pair of a Linear"),
        ({f"{NAME}.alpha": torch.tensor(0.0)}, "alpha=0.0 is not a positive number"),
        ({f"{NAME}.alpha": torch.ones(2)}, "alpha has 2 numbers"),
        ({f"{NAME}.lora_up.weight": torch.full((8, 2), torch.nan)}, "finite"),
        ({f"{NAME}.weight": torch.ones(8, 8)}, "no part of a LoRA that is known"),
        ({f"{NAME}.lora_A.weight": torch.ones(2, 8)}, "has this twice"),
        ({"lora_xyz_mid.lora_down.weight": torch.ones(2, 8)}, "its prefix is of no component"),
        ({"unet.a.odd_lora.down.weight": torch.ones(2, 8)}, "no layer of an attention processor"),
        ({"base_model.model.a.lora_A.weight": torch.ones(2, 8)}, "'base_model' is no component"),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 8)}, "its words are not known"),
        ({"lora_unet_middle_block_7_emb_layers_1.alpha": torch.tensor(1.0)}, "its words are not known"),
    ],
)
def test_what_is_not_understood_is_listed_with_the_reason(changes: dict[str, Tensor | None], what: str) -> None:
    tensors = {key: value for key, value in {**kohya("lora_unet", UNET), **changes}.items() if value is not None}
    with pytest.raises(hf_lora.LoRAError) as caught:
        from_diffusion(tensors)
    assert what in str(caught.value)
    with pytest.raises(LoRAFileError, match="there is none"):
        from_diffusion({})


def test_a_name_that_can_be_cut_in_two_ways_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kohyanames, "_WORDS", kohyanames._WORDS | {"in"})
    with pytest.raises(LoRAFileError, match=r"may be .*proj_in or .*proj\.in"):
        from_diffusion(kohya("lora_unet", UNET))


def test_pickles_only_on_request(tmp_path: Path) -> None:
    torch.save(kohya("lora_unet", UNET), tmp_path / "x.pt")
    with pytest.raises(LoRAFileError, match="pickle"):
        from_diffusion(tmp_path / "x.pt")
    check(from_diffusion(tmp_path / "x.pt", allow_pickle=True)["unet"], UNET, 0.5)


def test_the_command(tmp_path: Path) -> None:
    save_file({**kohya("lora_unet", UNET), **kohya("lora_te1", TEXT)}, tmp_path / "style.safetensors")
    command = ["import", "diffusion", str(tmp_path / "style.safetensors"), str(tmp_path / "out")]
    told = CliRunner().invoke(app, [*command, "--json"])
    assert told.exit_code == 0, told.output
    result = json.loads(told.output)
    assert result["components"]["unet"]["layers"] == len(UNET)
    check(LoRAAdapter.load(tmp_path / "out" / "unet"), UNET, 0.5)
    check(LoRAAdapter.load(tmp_path / "out" / "text_encoder"), TEXT, 0.5)
    again = CliRunner().invoke(app, command)
    assert again.exit_code != 0
    assert "holds an adapter" in again.output
    told = CliRunner().invoke(app, [*command, "--force"])
    assert told.exit_code == 0
    assert f"unet: {len(UNET)} layers, rank 2" in told.output
