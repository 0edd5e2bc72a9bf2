"""The verbs as functions of any `nn.Module`: timm, diffusers and sentence-transformers in small, and a plain MLP."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import bits, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hf_lora
from hf_lora import (
    LoRAConfig,
    LoRAConfigError,
    LoRAMismatchError,
    LoRARouteError,
    LoRAStateError,
    LoRATargetError,
    LoRAUnsupportedError,
    verbs,
)
from hf_lora.libraries import CLASSES
from hf_lora.mixin import LoRAMixin
from hf_lora.targeting import roles_of

# ---- models outside of transformers ----------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class Attention(nn.Module):
    """timm's: W_q, W_k and W_v are the rows of one layer, one after another."""

    lora_roles = {"qkv": ("q", "k", "v"), "proj": "o"}  # noqa: RUF012  # as a user writes it

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """timm's VisionTransformer."""

    def __init__(self, width: int = 16, depth: int = 2, heads: int = 2, checkpointing: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.pos_embed = nn.Parameter(torch.randn(1, 4, width))
        self.blocks = nn.ModuleList([ViTBlock(width, heads) for _ in range(depth)])
        self.head = nn.Linear(width, 5)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).mT + self.pos_embed
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(x.mean(1))


class CrossAttention(nn.Module):
    """diffusers' Attention."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(n, width, bias=False) for n in (width, context, context))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        x = nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(context), self.to_v(context))
        return self.to_out[0](x)


class GEGLU(nn.Module):
    lora_roles = {"proj": ["up", "gate"]}  # noqa: RUF012

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, -1)
        return x * nn.functional.gelu(gate)


class FeedForward(nn.Module):
    lora_roles = {"net.2": "down"}  # noqa: RUF012

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 2 * width), nn.Dropout(0.0), nn.Linear(2 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """diffusers' BasicTransformerBlock."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(width, width), CrossAttention(width, context)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(x)
        x = x + self.attn2(x, context)
        return x + self.ff(x)


class UNet(nn.Module):
    """diffusers' UNet2DConditionModel: down, mid, up, with a step's embedding and a text."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(4, width, 3, padding=1), nn.Conv2d(width, 4, 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(1, width), "linear_2": nn.Linear(width, width)})
        self.down_blocks, self.up_blocks = (
            nn.ModuleList([nn.ModuleDict({"attentions": nn.ModuleList([TransformerBlock(width, 6)])})]) for _ in "ab"
        )

    def forward(self, x: Tensor, step: Tensor, encoder_hidden_states: Tensor) -> dict[str, Tensor]:
        x = self.conv_in(x)
        embedded = self.time_embedding["linear_2"](self.time_embedding["linear_1"](step[:, None]).relu())
        size, x = x.shape, (x + embedded[..., None, None]).flatten(2).mT
        for blocks in (self.down_blocks, self.up_blocks):
            x = blocks[0]["attentions"][0](x, encoder_hidden_states)
        return {"sample": self.conv_out(x.mT.reshape(size))}


class SentenceTransformer(nn.Sequential):
    """sentence-transformers': a model of transformers among its parts, and everything passed on in one dict."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.add_module("0", nn.Module())
        self[0].auto_model = inner

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        states = self[0].auto_model(**features).last_hidden_state
        return {**features, "sentence_embedding": states.mean(1)}


def _of(name: str) -> Tensor:
    return torch.randn(*{"x": (3, 8), "image": (3, 3, 8, 8), "latent": (3, 4, 4, 4), "text": (3, 5, 6)}[name])


def _sentences() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=32,
        max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    return SentenceTransformer(BertModel(config))


Call = Callable[[nn.Module], Tensor]


def build(name: str) -> tuple[nn.Module, Call]:
    """A model in eval mode, and a call of it with three rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = {"mlp": MLP, "vit": ViT, "unet": UNet, "sentences": _sentences}[name]()
        if name == "unet":
            x, step, text = _of("latent"), torch.tensor([0.1, 0.5, 0.9]), _of("text")
            return model.eval(), lambda m: m(x, step, encoder_hidden_states=text)["sample"]
        if name == "sentences":
            ids = torch.randint(1, 32, (3, 6))
            return model.eval(), lambda m: m({"input_ids": ids})["sentence_embedding"]
        inputs = _of("x" if name == "mlp" else "image")
        return model.eval(), lambda m: m(inputs)


MODELS = ("mlp", "vit", "unet", "sentences")
TARGETS: dict[str, list[str] | str] = {
    "mlp": ["up", "down"],
    "vit": ["q", "v", "mlp"],
    "unet": ["q", "o", "gate", "down"],
    "sentences": ["q", "v"],
}


def adapted(name: str, **fields: Any) -> tuple[nn.Module, Call]:
    model, call = build(name)
    hf_lora.add_lora(model, LoRAConfig(r=2, target_modules=TARGETS[name], alpha=4, **fields), "a")
    randomise(model)
    return model, call


# ---- one implementation ----------------------------------------------------------------------------------------------


def test_every_verb_is_a_function_and_a_method_of_the_same_code() -> None:
    methods = {name: verb for name, verb in vars(LoRAMixin).items() if not name.startswith("_")}
    assert set(methods) == set(verbs.__all__)
    for name, method in methods.items():
        function = method.fget if isinstance(method, property) else method
        assert function is getattr(hf_lora, name)
    assert isinstance(methods["lora_names"], property)
    assert isinstance(methods["active_lora"], property)


def test_the_functions_need_no_transformers() -> None:
    script = (
        "import sys, torch, hf_lora\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4))\n"
        "hf_lora.add_lora(model, hf_lora.LoRAConfig(r=2, target_modules='all-linear'))\n"
        "heavy = ('transformers', 'datasets', 'peft', 'accelerate', 'huggingface_hub')\n"
        "assert not [name for name in heavy if name in sys.modules], sys.modules.keys()\n"
        "assert hf_lora.lora_names(model) == ('default',)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


# ---- the whole way ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_way(name: str, tmp_path: Path, peft: Any) -> None:
    model, call = build(name)
    before, base = bits(model), call(model)
    hf_lora.add_lora(model, LoRAConfig(r=2, target_modules=TARGETS[name], alpha=4), "a")
    assert torch.equal(call(model), base)
    assert hf_lora.active_lora(model) == "a"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):  # an own loop in plain torch
        loss = (call(model) - 1).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    randomise(model)
    tuned = call(model).detach()
    assert (tuned - base).abs().max() > 1e-3

    hf_lora.save_lora(model, tmp_path / "a")
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] is None
    theirs = peft.PeftModel.from_pretrained(build(name)[0], tmp_path / "a").eval()
    torch.testing.assert_close(call(theirs), tuned, rtol=0, atol=1e-5 * float(tuned.abs().max()))

    hf_lora.merge_lora(model)
    merged = call(model)
    torch.testing.assert_close(merged, tuned, rtol=1e-4, atol=1e-5 * float(tuned.abs().max()))
    plain = build(name)[0]
    plain.load_state_dict(hf_lora.base_state_dict(model))
    assert torch.equal(call(plain), merged)
    hf_lora.unmerge_lora(model)
    assert torch.equal(call(model), tuned)

    other = build(name)[0]
    assert hf_lora.load_lora(other, tmp_path / "a") == "a"
    torch.testing.assert_close(call(other), tuned)
    hf_lora.load_lora(other, hf_lora.lora_adapter(model), name="b")
    hf_lora.set_lora(other, {"a": 0.5, "b": 0.5})
    torch.testing.assert_close(call(other), tuned, rtol=1e-4, atol=1e-5)
    hf_lora.set_lora(other, None)
    assert torch.equal(call(other), base)

    hf_lora.remove_lora(model)
    assert hf_lora.lora_names(model) == ()
    assert bits(model) == before
    assert torch.equal(call(model), base)


@pytest.mark.parametrize("name", MODELS)
def test_rows_take_adapters_of_their_own(name: str) -> None:
    model, call = adapted(name)
    hf_lora.add_lora(model, LoRAConfig(r=3, target_modules=TARGETS[name]), "b")
    randomise(model, seed=1)
    expected = []
    for row, which in enumerate(("b", None, "a")):
        with hf_lora.use_lora(model, which):
            expected.append(call(model)[row])
    with hf_lora.route_lora(model, ["b", None, "a"]):
        torch.testing.assert_close(call(model), torch.stack(expected))
    with hf_lora.no_lora(model):
        torch.testing.assert_close(call(model)[1], expected[1])
    with hf_lora.route_lora(model, ["a", None]), pytest.raises(LoRARouteError, match="2 rows, but the batch has 3"):
        call(model)
    hf_lora.train_lora(model, "a")
    assert {entry.name: entry.trainable for entry in hf_lora.model.require(model).entries.values()} == {
        "a": True,
        "b": False,
    }


def test_the_rows_of_a_batch_in_one_dict_are_counted_before_anything_runs() -> None:
    class Flat(nn.Sequential):
        def forward(self, features: dict[str, Tensor]) -> Tensor:
            return super().forward(features["inputs_embeds"].flatten(0, 1))

    model = Flat(nn.Linear(8, 8))
    hf_lora.add_lora(model, LoRAConfig(r=2, target_modules="all-linear"), "a")
    with hf_lora.route_lora(model, ["a", None] * 3), pytest.raises(LoRARouteError, match="6 rows, but the batch has 3"):
        model({"inputs_embeds": torch.randn(3, 2, 8)})  # six rows in the layer


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_pickles_are_models_of_their_own(name: str) -> None:
    model, call = adapted(name)
    tuned = call(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(call(other), tuned)
        hf_lora.set_lora(other, None)
        assert not torch.equal(call(other), tuned)
        assert torch.equal(call(model), tuned)
        hf_lora.remove_lora(other)
    state = model.state_dict()
    fresh = adapted(name)[0]
    randomise(fresh, seed=7)
    fresh.load_state_dict(state)  # adapters and all, into a model with the same ones
    assert torch.equal(call(fresh), tuned)


# ---- wrapped ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["DataParallel", "both"])
def test_a_wrapped_model_is_the_model_inside(wrap: str, tmp_path: Path) -> None:
    model, call = build("vit")
    wrapped: Any = model
    if wrap == "both":
        wrapped = torch.compile(wrapped, backend="eager", fullgraph=True)
    wrapped = nn.DataParallel(wrapped)
    before = bits(model)
    hf_lora.add_lora(wrapped, LoRAConfig(r=2, target_modules=["q"]))
    randomise(model)
    assert hf_lora.lora_names(model) == hf_lora.lora_names(wrapped) == ("default",)
    assert all("module" not in key and "_orig_mod" not in key for key in hf_lora.lora_state_dict(wrapped))
    tuned = call(model)
    torch.testing.assert_close(call(wrapped), tuned)
    hf_lora.set_lora(wrapped, None)
    with hf_lora.use_lora(wrapped, "default"):
        torch.testing.assert_close(call(wrapped), tuned)
    hf_lora.save_lora(wrapped, tmp_path / "x")
    hf_lora.remove_lora(wrapped)
    assert bits(model) == before
    torch.testing.assert_close(call(wrapped), call(build("vit")[0]))


def test_accelerate_prepares_a_model_with_adapters() -> None:
    from accelerate import Accelerator

    model, call = adapted("vit")
    tuned = call(model)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    torch.testing.assert_close(call(prepared), tuned)
    accelerator.backward(call(prepared).square().mean())
    optimizer.step()
    assert not torch.equal(call(prepared), tuned)
    assert hf_lora.lora_names(prepared) == ("a",)
    accelerator.free_memory()


def test_what_has_taken_the_parameters_away_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(LoRAUnsupportedError, match="flattened"):
        hf_lora.add_lora(FullyShardedDataParallel(), LoRAConfig())
    with pytest.raises(TypeError, match=r"nn\.Module"):
        hf_lora.add_lora({"a": 1}, LoRAConfig())


def test_pefts_layers_are_refused_wherever_they_are(peft: Any) -> None:
    config = peft.LoraConfig(target_modules=["query"])
    model, _ = build("sentences")
    model[0].auto_model.add_adapter(config)  # as sentence-transformers' own add_adapter does
    before = bits(model)
    for act in (
        lambda: hf_lora.add_lora(model, LoRAConfig(target_modules=["q"])),
        lambda: hf_lora.load_lora(model, hf_lora.lora_adapter(adapted("sentences")[0])),
    ):
        with pytest.raises(LoRAUnsupportedError, match="carries an adapter of PEFT already"):
            act()
    assert bits(model) == before
    with pytest.raises(LoRAUnsupportedError, match="of PEFT"):
        wrapped = peft.get_peft_model(build("mlp")[0], peft.LoraConfig(target_modules=["fc1"]))
        hf_lora.add_lora(wrapped, LoRAConfig(target_modules=["fc1"]))


def test_a_model_of_transformers_inside_is_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    model, call = adapted("sentences")
    inner: Any = model[0].auto_model
    with pytest.raises(LoRAStateError, match="added through the model around this one"):
        inner.save_pretrained(tmp_path / "x")
    with pytest.raises(LoRAStateError, match="added through another model"):
        inner.add_lora(LoRAConfig(target_modules=["q"]), "mine")
    hf_lora.merge_lora(model)
    merged = call(model)
    inner.save_pretrained(tmp_path / "merged")
    hf_lora.unmerge_lora(model)
    hf_lora.remove_lora(model)
    model[0].auto_model = type(inner).from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(call(model), merged)
    with pytest.raises(LoRAUnsupportedError, match="no model of it"):
        hf_lora.merge_and_save(adapted("mlp")[0], tmp_path / "mlp")
    assert not (tmp_path / "mlp").exists()


# ---- roles -----------------------------------------------------------------------------------------------------------


def test_roles_are_rows_of_a_fused_layer() -> None:
    """Only W_q's rows change: k and v, computed by hand, stay bit for bit."""
    model, _ = build("vit")
    attention: Any = model.blocks[0].attn
    x = torch.randn(2, 4, 16)
    base = attention.qkv(x)
    hf_lora.add_lora(model, LoRAConfig(r=2, target_modules=["q"]))
    randomise(model)
    rows = (attention.qkv(x) != base).any(0).any(0)
    assert rows.tolist() == [True] * 16 + [False] * 32
    assert roles_of(model)["blocks.1.attn.qkv"] == ("q", "k", "v")
    assert roles_of(model)["blocks.1.attn.proj"] == ("o",)


def test_a_gated_layer_has_its_gate_last() -> None:
    model, _ = build("unet")
    layer: Any = model.down_blocks[0]["attentions"][0].ff.net[0].proj
    x = torch.randn(2, 16)
    base = layer(x)
    hf_lora.add_lora(model, LoRAConfig(r=2, target_modules=["gate"]))
    randomise(model)
    assert (layer(x) != base).any(0).tolist() == [False] * 32 + [True] * 32
    assert len(hf_lora.lora_adapter(model).factors) == 2


def test_a_fused_layer_that_nobody_knows_is_not_guessed() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.ModuleDict({"qkv": nn.Linear(4, 12), "proj": nn.Linear(4, 4)})

    model = Unknown()
    with pytest.raises(LoRAUnsupportedError, match=r"attn\.qkv: fused layers") as caught:
        hf_lora.add_lora(model, LoRAConfig(r=2, target_modules=["q"]))
    assert "Name them whole: qkv" in str(caught.value)
    assert 'lora_roles = {"qkv": ("q", "k", "v")}' in str(caught.value)
    model.attn.lora_roles = {"qkv": ("v", "q", "k")}  # type: ignore[assignment]  # on the instance
    hf_lora.add_lora(model, LoRAConfig(r=2, target_modules=["q"]))
    (block,) = hf_lora.lora_adapter(model).factors["attn.qkv"].blocks
    assert block.rows == (range(4, 8),)


@pytest.mark.parametrize("said", [{"qkv": ("q", "x")}, {"qkv": ()}, {"qkv": ("q", "q")}, {1: "q"}, ["q"], {"qkv": 3}])
def test_a_word_about_roles_that_makes_no_sense_is_refused(said: Any) -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(4, 12)})
    model.lora_roles = said
    with pytest.raises(LoRAConfigError, match="lora_roles of ModuleDict"):
        hf_lora.add_lora(model, LoRAConfig(r=2, target_modules=["qkv"]))


def test_a_word_that_means_nothing_names_what_there_is() -> None:
    with pytest.raises(LoRATargetError) as caught:
        hf_lora.add_lora(build("mlp")[0], LoRAConfig(target_modules=["q"]))
    assert "Layers here: fc1, fc2" in str(caught.value)
    assert "Roles here: down, mlp, up" in str(caught.value)
    with pytest.raises(LoRATargetError, match=r"nn\.Sequential"):  # no file could name it
        hf_lora.add_lora(nn.Linear(4, 4), LoRAConfig(r=2, target_modules="all-linear"))
    with pytest.raises(LoRATargetError, match="there is no default for model_type None"):
        hf_lora.add_lora(build("mlp")[0], LoRAConfig())


@pytest.mark.parametrize(
    ("cls", "layers", "roles"),
    [
        ("timm.layers.attention.Attention", {"qkv": 24, "proj": 8}, {"qkv": ("q", "k", "v"), "proj": ("o",)}),
        ("timm.models.swin_transformer.WindowAttention", {"qkv": 24}, {"qkv": ("q", "k", "v")}),
        ("timm.layers.mlp.SwiGLU", {"fc1_g": 8, "fc1_x": 8}, {"fc1_g": ("gate",), "fc1_x": ("up",)}),
        ("diffusers.models.activations.GEGLU", {"proj": 16}, {"proj": ("up", "gate")}),
        ("diffusers.models.activations.GELU", {"proj": 16}, {"proj": ("up",)}),
        (
            "diffusers.models.attention_processor.Attention",
            {"to_q": 8, "add_k_proj": 8, "to_add_out": 8, "to_kv": 16},
            {"to_q": ("q",), "add_k_proj": ("k",), "to_add_out": ("o",), "to_kv": ("k", "v")},
        ),
    ],
)
def test_classes_of_timm_and_diffusers(cls: str, layers: dict[str, int], roles: dict[str, tuple[str, ...]]) -> None:
    module, _, name = cls.rpartition(".")
    made = type(name, (nn.Module,), {"__module__": module, "__qualname__": name})()
    for path, out in layers.items():
        made.add_module(path, nn.Linear(8, out))
    model = nn.ModuleDict({"part": made})
    assert roles_of(model) == {f"part.{path}": found for path, found in roles.items()}
    assert cls in CLASSES


# ---- how people train ------------------------------------------------------------------------------------------------


def test_activation_checkpointing_of_ones_own() -> None:
    model, call = adapted("vit")
    model.train()
    call(model).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.checkpointing = True
    call(model).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(expected) == 12
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model, _ = build("vit")
    model.to(dtype)
    hf_lora.add_lora(model, LoRAConfig(r=2, target_modules=["q", "mlp"], dropout=0.1))
    randomise(model)
    x = torch.randn(2, 3, 8, 8).to(dtype)
    output = model.train()(x)
    assert output.dtype == dtype
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    hf_lora.print_lora_summary(model)


def test_a_push_names_its_base_and_its_class(hub: Any) -> None:
    model, call = adapted("mlp")
    with pytest.raises(LoRAMismatchError, match="does not say its base model"):
        hf_lora.push_adapter_to_hub(model, "me/task")
    hf_lora.push_adapter_to_hub(model, "me/task", base_model="timm/mlp")
    readme = hub.files("me/task")["README.md"].decode()
    assert "model = ...  # test_any_module.MLP, with the weights of timm/mlp" in readme
    assert 'hf_lora.load_lora(model, "me/task")' in readme
    assert "transformers" not in readme
    named, _ = build("mlp")
    hf_lora.add_lora(named, LoRAConfig(r=2, target_modules="all-linear", base_model="timm/mlp"))
    randomise(named)
    hf_lora.push_adapter_to_hub(named, "me/other")
    other, _ = build("mlp")
    assert hf_lora.load_lora(other, "me/task", name="x") == "x"
    torch.testing.assert_close(call(other), call(model))
