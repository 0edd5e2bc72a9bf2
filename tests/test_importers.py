"""Adapters out of other formats, against those formats' own code: loralib, PEFT's AdaLoRA, mlx-lm's formula, an SVD."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import bits, logits
from safetensors.torch import load_file, save_file

import hf_lora
from hf_lora import LoRAAdapter, LoRAConfigError, LoRAFileError, LoRAMismatchError, LoRAUnsupportedError
from hf_lora.importers import extract_lora, from_adalora, from_loralib, from_mlx

loralib = pytest.importorskip("loralib", reason="loralib is not installed: install hf_lora[test]")


# ---- loralib ---------------------------------------------------------------------------------------------------------


def with_loralib(model: Any, replace: dict[str, Any], bias: str = "none") -> Any:
    """A copy of `model` with loralib's layers in place of its own, by the end of their path."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        make = next((make for end, make in replace.items() if path.endswith(end)), None)
        if make is None:
            continue
        new = make(module).to(next(model.parameters()).dtype)
        new.load_state_dict(module.state_dict(), strict=False)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new)
    loralib.mark_only_lora_as_trainable(model, bias)
    return model


def train(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    """A few steps by the gradient's sign, so that neither A nor B is what it began as."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    for _ in range(3):
        output = model(**inputs)
        (output.logits if hasattr(output, "logits") else output.last_hidden_state).square().mean().backward()
        for parameter in trained:
            parameter.data.sub_(0.05 * parameter.grad.sign())
            parameter.grad = None
    return model.eval()


def merged(enabled: list[bool], alpha: int = 16, r: int = 3) -> Any:
    """loralib's MergedLinear for a Conv1D, as the paper's GPT-2."""
    return lambda m: loralib.MergedLinear(
        m.nx, m.nf, r=r, lora_alpha=alpha, enable_lora=enabled, fan_in_fan_out=True, merge_weights=False
    )


def linear(alpha: int = 16, r: int = 3) -> Any:
    return lambda m: loralib.Linear(m.in_features, m.out_features, r=r, lora_alpha=alpha, merge_weights=False)


def embedding(alpha: int = 16, r: int = 3) -> Any:
    return lambda m: loralib.Embedding(m.num_embeddings, m.embedding_dim, r=r, lora_alpha=alpha, merge_weights=False)


def agree(model: Any, adapter: Any, theirs: Any, inputs: dict[str, torch.Tensor]) -> None:
    """The base with the adapter computes what `theirs` does, which is not what the base does; float64."""
    want, base = logits(theirs, inputs), logits(model, inputs)
    assert not torch.allclose(want, base, atol=1e-4)
    model.load_lora(adapter, name="imported")
    torch.testing.assert_close(logits(model, inputs), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("enabled", [[True, False, True], [True, True, True], [False, False, True]], ids=str)
def test_loralib_merged_linear_of_gpt2(tiny, batch, tmp_path, enabled):
    model = tiny("gpt2", dtype=torch.float64)
    theirs = train(with_loralib(model, {"attn.c_attn": merged(enabled)}), batch(model))
    torch.save({"model_state_dict": loralib.lora_state_dict(theirs)}, tmp_path / "gpt2.pt")
    adapter = from_loralib(tmp_path / "gpt2.pt", alpha=16, enable_lora={"c_attn": enabled}, allow_pickle=True)
    roles = [role for role, on in zip("qkv", enabled, strict=True) if on]
    assert [block.role for block in adapter.factors["transformer.h.0.attn.c_attn"].blocks] == roles
    with_base = from_loralib(
        tmp_path / "gpt2.pt", alpha=16, enable_lora=enabled, base=tiny("gpt2").to("meta"), allow_pickle=True
    )
    assert all(f.equal(with_base.factors[path]) for path, f in adapter.factors.items())
    agree(model, adapter, theirs, batch(model))


def test_loralib_linear_and_bias_of_bert_survive_our_files_and_peft(tiny, batch, tmp_path, peft):
    model = tiny("bert-cls", dtype=torch.float64)
    replace = {"self.query": linear(), "self.value": linear(), "classifier": copy.deepcopy}
    theirs = with_loralib(model, replace, "lora_only")
    theirs.classifier.requires_grad_(True)
    train(theirs, batch(model))
    state = loralib.lora_state_dict(theirs, "lora_only") | {
        f"classifier.{name}": tensor for name, tensor in theirs.classifier.state_dict().items()
    }
    torch.save(state, tmp_path / "bert.bin")
    adapter = from_loralib(
        tmp_path / "bert.bin", alpha=16, modules_to_save=["classifier"], task_type="SEQ_CLS", allow_pickle=True
    )
    assert adapter.config.bias == "lora_only"
    adapter.save(tmp_path / "ours")
    with_peft = peft.PeftModel.from_pretrained(tiny("bert-cls", dtype=torch.float64), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(with_peft, batch(model)), logits(theirs, batch(model)), rtol=1e-6, atol=1e-6)
    agree(model, LoRAAdapter.load(tmp_path / "ours"), theirs, batch(model))


def test_loralib_all_biases(tiny, batch):
    model = tiny("gpt2", dtype=torch.float64)
    theirs = train(with_loralib(model, {"attn.c_attn": merged([True, False, True])}, "all"), batch(model))
    adapter = from_loralib(loralib.lora_state_dict(theirs, "all"), alpha=16, enable_lora=[True, False, True])
    assert adapter.config.bias == "all"
    agree(model, adapter, theirs, batch(model))


def test_loralib_embedding(tiny, batch):
    model = tiny("llama", dtype=torch.float64)
    theirs = train(with_loralib(model, {"embed_tokens": embedding()}), batch(model))
    state = loralib.lora_state_dict(theirs)
    one = from_loralib(state, alpha=16, embeddings=["embed_tokens"])
    two = from_loralib({f"module.{k}": v for k, v in state.items()}, alpha=16, base=model)
    assert one.factors["model.embed_tokens"].equal(two.factors["model.embed_tokens"])
    agree(model, one, theirs, batch(model))


@pytest.mark.parametrize("name", ["roberta", "deberta-v2"])
def test_loralib_in_the_papers_encoders(name, batch):
    """The layers that microsoft/LoRA adapts there, under the names that its checkpoints have."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.AutoConfig.for_model(name, vocab_size=64, max_position_embeddings=32, **sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config).double().eval()
    ends = {"roberta": ("self.query", "self.value"), "deberta-v2": ("query_proj", "value_proj")}[name]
    theirs = train(with_loralib(model, dict.fromkeys(ends, linear(alpha=8))), batch(model))
    adapter = from_loralib(loralib.lora_state_dict(theirs), alpha=8, base=model)
    assert len(adapter.factors) == 4
    agree(model, adapter, theirs, batch(model))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=5).filter(any), st.integers(1, 3), st.integers(1, 4), st.booleans())
def test_any_merged_linear(enabled, r, size, transposed):
    layer = loralib.MergedLinear(
        *(7, size * len(enabled)), r=r, lora_alpha=5, enable_lora=enabled, fan_in_fan_out=transposed
    )
    torch.nn.init.normal_(layer.lora_B)
    state = {f"x.{name}": tensor for name, tensor in loralib.lora_state_dict(layer).items()}
    factors = from_loralib(state, alpha=5, enable_lora={"x": enabled}).factors["x"]
    want = (layer.merge_AB().T if transposed else layer.merge_AB()) * layer.scaling
    torch.testing.assert_close(factors.delta(), want.detach())
    assert factors.num_parameters == layer.lora_A.numel() + layer.lora_B.numel()


def test_loralib_refuses_what_it_does_not_know(tiny, tmp_path):
    model = tiny("gpt2")
    state = loralib.lora_state_dict(with_loralib(model, {"attn.c_attn": merged([True, False, True])}))
    first = "transformer.h.0.attn.c_attn"
    with pytest.raises(LoRAConfigError, match="alpha was not given"):
        from_loralib(state)
    with pytest.raises(LoRAConfigError, match="alpha=0"):
        from_loralib(state, alpha=0)
    with pytest.raises(LoRAFileError, match="2 enabled parts, and no enable_lora"):
        from_loralib(state, alpha=1)
    with pytest.raises(LoRAFileError, match="enable_lora says"):
        from_loralib(state, alpha=1, enable_lora=[True, False, False])
    with pytest.raises(LoRAConfigError, match="list of booleans"):
        from_loralib(state, alpha=1, enable_lora=[1, 0, 1])
    with pytest.raises(LoRAConfigError, match="fits no layer"):
        from_loralib(state, alpha=1, enable_lora=[True, False, True], embeddings=["wte"])
    with pytest.raises(LoRAFileError, match="the factors are"):
        from_loralib(state, alpha=1, enable_lora=[True, False, True, False], base=model)
    with pytest.raises(LoRAFileError) as caught:
        bad = {**state, "transformer.wte.weight": torch.ones(2), f"{first}.weight": torch.ones(2)}
        from_loralib(bad, alpha=1, enable_lora=[True, False, True])
    assert len(caught.value.facts) == 2
    with pytest.raises(LoRAFileError, match="lora_A is alone"):
        from_loralib({f"{first}.lora_A": torch.ones(2, 4)}, alpha=1)
    with pytest.raises(LoRAFileError, match="not finite"):
        nan = {**state, f"{first}.lora_B": torch.full((64, 3), float("nan"))}
        from_loralib(nan, alpha=1, enable_lora=[True, False, True])
    with pytest.raises(LoRAFileError, match="there is none"):
        from_loralib({}, alpha=1)
    with pytest.raises(LoRAFileError, match="no tensor but int"):
        from_loralib({"model": 3}, alpha=1)
    plain = {"x.lora_A": torch.ones(2, 8), "x.lora_B": torch.ones(8, 2)}
    with pytest.raises(LoRAConfigError, match="fits no layer"):  # it might be a MergedLinear, and is not guessed to be
        from_loralib(plain, alpha=1, enable_lora=[False, True])
    with pytest.raises(LoRAFileError, match="no such layer"):
        from_loralib(plain, alpha=1, base=model)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("was-executed"),))


def test_loralib_files_that_are_hostile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = {"x.lora_A": torch.ones(2, 8), "x.lora_B": torch.ones(8, 2)}
    torch.save(state, "good.pt")
    with pytest.raises(LoRAFileError, match="not read unless asked"):
        from_loralib("good.pt", alpha=1)
    assert from_loralib("good.pt", alpha=4, allow_pickle=True).factors["x"].scaling == 2
    whole = Path("good.pt").read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        Path("short.pt").write_bytes(whole[:size])
        with pytest.raises(LoRAFileError):
            from_loralib("short.pt", alpha=1, allow_pickle=True)
    Path("evil.bin").write_bytes(pickle.dumps({"x.lora_A": Evil()}))
    torch.save({"x.lora_A": Evil()}, "evil.pt")
    for name in ("evil.bin", "evil.pt"):
        with pytest.raises(LoRAFileError):
            from_loralib(name, alpha=1, allow_pickle=True)
    assert not Path("was-executed").exists()
    save_file({f"../{k}": v for k, v in state.items()}, "path.safetensors")
    with pytest.raises(LoRAFileError, match="no module path"):
        from_loralib("path.safetensors", alpha=1)
    with pytest.raises(LoRAFileError, match="does not exist"):
        from_loralib("missing.safetensors", alpha=1)


# ---- mlx-lm ----------------------------------------------------------------------------------------------------------

MLX = {
    "fine_tune_type": "lora",
    "lora_parameters": {"rank": 4, "scale": 2.5, "dropout": 0.1, "keys": ["self_attn.q_proj"]},
    "model": "org/base",
    "num_layers": 1,
}


def mlx_folder(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    return folder


def mlx_tensors(model: Any, rank: int = 4) -> dict[str, torch.Tensor]:
    found = {}
    for path, module in model.named_modules():
        if path.endswith(("q_proj", "down_proj")):
            found[f"{path}.lora_a"] = torch.randn(module.in_features, rank, dtype=torch.float64)
            found[f"{path}.lora_b"] = torch.randn(rank, module.out_features, dtype=torch.float64)
    return found


def test_mlx_adds_scale_times_x_a_b(tiny, batch, tmp_path):
    model = tiny("llama", dtype=torch.float64)
    tensors = mlx_tensors(model)
    adapter = from_mlx(mlx_folder(tmp_path, MLX, tensors))
    assert (adapter.config.r, adapter.config.alpha, adapter.config.dropout) == (4, 10.0, 0.1)
    assert adapter.config.base_model == "org/base"
    theirs = copy.deepcopy(model)
    for path, module in theirs.named_modules():
        if f"{path}.lora_a" in tensors:
            a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
            module.register_forward_hook(lambda m, args, y, a=a, b=b: y + 2.5 * ((args[0] @ a) @ b))
    agree(model, adapter, theirs, batch(model))


def test_mlx_refuses_what_it_cannot_be_sure_of(tiny, tmp_path):
    tensors = mlx_tensors(tiny("llama"))
    parameters = MLX["lora_parameters"]

    def importing(config: Any = MLX, more: dict[str, torch.Tensor] | None = None, **options: Any) -> Any:
        return from_mlx(mlx_folder(tmp_path / "x", config, {**tensors, **(more or {})}), **options)

    with_alpha = {**MLX, "lora_parameters": {**parameters, "alpha": 16}}
    with pytest.raises(LoRAConfigError, match="scaling is not certain"):
        importing(with_alpha)
    assert importing(with_alpha, scale=3.0).config.alpha == 12
    with pytest.raises(LoRAConfigError, match="no scale"):
        importing({**MLX, "lora_parameters": {"rank": 4}})
    with pytest.raises(LoRAConfigError, match="scale=-1"):
        importing(scale=-1.0)
    with pytest.raises(LoRAConfigError, match="no lora_parameters"):
        importing({"num_layers": 4})
    with pytest.raises(LoRAUnsupportedError, match="dora"):
        importing({**MLX, "fine_tune_type": "dora"})
    with pytest.raises(LoRAUnsupportedError, match="use_x"):
        importing({**MLX, "lora_parameters": {**parameters, "use_x": True}})
    with pytest.raises(LoRAFileError, match="config's rank is 5"):
        importing({**MLX, "lora_parameters": {**parameters, "rank": 5}})
    with pytest.raises(LoRAFileError, match="PEFT's config"):
        importing({"peft_type": "LORA"})
    for name, tensor in {
        "x.m": torch.ones(3),
        "x.lora_a": torch.ones(2, 4, 8),
        "x.lora_a_scales": torch.ones(2),
        "model.embed_tokens.lora_a": torch.ones(64, 4),
    }.items():
        with pytest.raises(LoRAUnsupportedError, match="not imported"):
            importing(more={name: tensor})
    with pytest.raises(LoRAFileError, match="neither lora_a nor lora_b"):
        importing(more={"x.weight": torch.ones(3)})
    with pytest.raises(LoRAFileError, match="alone"):
        importing(more={"x.lora_b": torch.ones(4, 3)})
    with pytest.raises(LoRAFileError, match="not finite"):
        importing(more={"x.lora_b": torch.full((4, 3), torch.inf), "x.lora_a": torch.ones(3, 4)})
    with pytest.raises(LoRAFileError, match="not exist"):
        from_mlx(tmp_path / "missing")


# ---- AdaLoRA ---------------------------------------------------------------------------------------------------------


def adalora(peft: Any, model: Any, **options: Any) -> Any:
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, total_step=10, lora_alpha=7, target_modules=["q_proj", "v_proj", "up_proj"], **options
    )
    theirs = peft.get_peft_model(model, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    return theirs


@pytest.mark.parametrize("pruned", [False, True])
def test_adalora_computes_what_pefts_does(tiny, batch, tmp_path, peft, pruned):
    model = tiny("llama", dtype=torch.float64)
    theirs = adalora(peft, tiny("llama", dtype=torch.float64), modules_to_save=["lm_head"])
    if pruned:  # as the rank allocator leaves it: singular values set to zero, and a mask in the config
        pattern = {}
        for i, (name, parameter) in enumerate(p for p in theirs.named_parameters() if ".lora_E." in p[0]):
            mask = [(j * 7 + i) % 3 == 0 and i != 2 for j in range(6)]
            parameter.data[[not bit for bit in mask]] = 0
            pattern[name.removeprefix("base_model.model.")] = mask
        theirs.peft_config["default"].rank_pattern = pattern
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = from_adalora(tmp_path / "theirs")
    assert len(adapter.factors) == (5 if pruned else 6)
    assert {f.rank for f in adapter.factors.values()} == ({2} if pruned else {6})
    adapter.save(tmp_path / "ours")
    model.load_lora(tmp_path / "ours", name="imported")  # which refuses what its config names and it does not hold
    want = logits(theirs, batch(model))
    torch.testing.assert_close(logits(model, batch(model)), want, rtol=1e-6, atol=1e-6)
    with_peft = peft.PeftModel.from_pretrained(tiny("llama", dtype=torch.float64), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(with_peft, batch(model)), want, rtol=1e-4, atol=1e-4)


def test_adalora_refuses(tiny, tmp_path, peft):
    folder = tmp_path / "x"
    adalora(peft, tiny("llama")).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())

    def importing(**changes: Any) -> Any:
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        return from_adalora(folder)

    assert importing().config.use_rslora is False
    with pytest.raises(LoRAFileError, match="not 'ADALORA'"):
        importing(peft_type="LORA")
    with pytest.raises(LoRAFileError, match="config says rank 5") as caught:
        importing(init_r=5)
    assert len(caught.value.facts) == 6
    with pytest.raises(LoRAConfigError, match="lora_alpha=0"):
        importing(lora_alpha=0)
    path = "model.layers.0.self_attn.q_proj.lora_E"
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(LoRAFileError, match="no tensor of an AdaLoRA"):
        importing()
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(LoRAFileError, match="config says rank 1"):
        importing(rank_pattern={path: [True, False]})
    with pytest.raises(LoRAFileError, match="without tensors"):
        importing(rank_pattern={"model.layers.9.self_attn.q_proj.lora_E": [True]})
    with pytest.raises(LoRAFileError, match="no list of booleans"):
        importing(rank_pattern={path: "all"})
    with pytest.raises(LoRAUnsupportedError, match="something"):
        importing(something=3)
    with pytest.raises(LoRAUnsupportedError, match="from_adalora"):
        importing()
        LoRAAdapter.load(folder)


# ---- a fully fine-tuned model ----------------------------------------------------------------------------------------


def tuned(model: Any, change: Any, seed: int = 1) -> Any:
    """A copy with `change(name, parameter, generator)` added to every parameter."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            added = change(name, parameter, generator)
            if added is not None:
                parameter.add_(added)
    return model


def noise(of: tuple[str, ...], scale: float = 0.05) -> Any:
    def change(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
        if not any(part in name for part in of):
            return None
        return scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)

    return change


def low_rank(rank: int) -> Any:
    def change(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
        if not name.endswith("_proj.weight"):
            return None
        out, inside = parameter.shape
        a = torch.randn(rank, inside, generator=generator, dtype=torch.float64)
        return (0.02 * torch.randn(out, rank, generator=generator, dtype=torch.float64) @ a).to(parameter)

    return change


def test_what_a_lora_changed_is_extracted_whole(tiny, batch, recwarn):
    model = tiny("llama", dtype=torch.float64)
    after = tuned(model, low_rank(3))
    adapter = hf_lora.extract_lora(model, after, rank=3)
    assert isinstance(adapter, LoRAAdapter)
    assert adapter.report.error() < 1e-12
    assert not adapter.report.left_out
    assert not [w for w in recwarn if "does not hold" in str(w.message)]
    model.load_lora(adapter, name="x")
    torch.testing.assert_close(logits(model, batch(model)), logits(after, batch(model)), rtol=1e-9, atol=1e-9)


def test_the_error_is_that_of_the_best_approximation(tiny, tmp_path):
    model = tiny("llama", dtype=torch.float64)
    after = tuned(model, noise(("_proj.weight",)))
    adapter = extract_lora(model, after, rank=5)
    lost = total = 0.0
    for layer in adapter.report.layers:
        delta = (after.get_parameter(f"{layer.path}.weight") - model.get_parameter(f"{layer.path}.weight")).detach()
        made = adapter.factors[layer.path].delta()
        values = torch.linalg.svdvals(delta)
        torch.testing.assert_close(torch.linalg.matrix_norm(delta - made), values[5:].norm(), rtol=1e-9, atol=0)
        assert layer.error() == pytest.approx(float(values[5:].norm() / values.norm()))
        assert layer.error(9) == pytest.approx(float(values[9:].norm() / values.norm()))
        lost, total = lost + float(values[5:].square().sum()), total + float(values.square().sum())
    assert len(adapter.report.layers) == 14
    assert adapter.report.error() == pytest.approx((lost / total) ** 0.5)
    table = adapter.report.error_by_rank()
    assert list(table) == [1, 2, 4, 8, 16, 32]
    assert list(table.values()) == sorted(table.values(), reverse=True)
    assert table[32] == 0
    enough = extract_lora(model, after, None, energy=0.9)
    for layer in enough.report.layers:
        held = [1 - layer.error(k) ** 2 for k in range(40)]
        assert held[layer.rank] >= 0.9 > held[layer.rank - 1]
    adapter.save(tmp_path / "x")
    assert LoRAAdapter.load(tmp_path / "x").equal(LoRAAdapter.of(adapter))


def test_roles_of_a_fused_layer_and_rows_that_are_no_target(tiny):
    model = tiny("gpt2")
    after = tuned(model, noise(("attn.c_attn.weight",)))
    with pytest.warns(UserWarning, match="2 tensors changed"):
        adapter = extract_lora(model, after, rank=4, target_modules=["q", "v"])
    layer = adapter.factors["transformer.h.0.attn.c_attn"]
    assert [block.role for block in layer.blocks] == ["q", "v"]
    delta = (after.transformer.h[0].attn.c_attn.weight - model.transformer.h[0].attn.c_attn.weight).T
    for rows in (slice(0, 32), slice(64, 96)):
        values = torch.linalg.svdvals(delta[rows])
        gone = torch.linalg.matrix_norm((delta - layer.delta())[rows])
        torch.testing.assert_close(gone, values[4:].norm(), rtol=1e-4, atol=1e-6)
    assert list(adapter.report.left_out) == [
        f"transformer.h.{i}.attn.c_attn.weight (rows beside q, v)" for i in range(2)
    ]


def test_everything_that_changed_is_taken_or_named(tiny, batch):
    model = tiny("bert-cls", dtype=torch.float64)
    after = tuned(model, noise(("layer.0.attention.self.query", "LayerNorm", "classifier", "word_embeddings")))
    with pytest.warns(UserWarning, match="tensors changed that the adapter does not hold"):
        adapter = extract_lora(model, after, rank=64, target_modules=["q"])
    assert adapter.report.unchanged == ("bert.encoder.layer.1.attention.self.query",)
    left = adapter.report.left_out
    assert adapter.report.whole == ("classifier.weight", "classifier.bias")  # as add_lora trains it
    bias = "bert.encoder.layer.0.attention.self.query.bias"
    assert {bias, "bert.embeddings.word_embeddings.weight"} <= left.keys()
    assert len(left) == 1 + 1 + 2 * 5
    change = after.get_parameter(bias) - model.get_parameter(bias)
    assert left[bias] == pytest.approx(float((change.norm() / model.get_parameter(bias).norm()).detach()))
    with pytest.raises(LoRAMismatchError, match="12 tensors changed"):
        extract_lora(model, after, rank=64, target_modules=["q"], strict=True)
    whole = extract_lora(
        *(model, after, 64),
        target_modules=["q", "word_embeddings"],
        bias="all",
        modules_to_save=["LayerNorm"],
        strict=True,
    )
    model.load_lora(whole, name="x")
    torch.testing.assert_close(logits(model, batch(model)), logits(after, batch(model)), rtol=1e-9, atol=1e-9)


def test_folders_and_state_dicts_give_what_models_give(tiny, tmp_path):
    model = tiny("llama-tied")
    after = tuned(model, noise(("_proj.weight", "embed_tokens")))
    model.save_pretrained(tmp_path / "base")
    after.save_pretrained(tmp_path / "tuned", max_shard_size="20KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    with pytest.warns(UserWarning, match="does not hold"):
        one = extract_lora(model, after, rank=4)
    with pytest.warns(UserWarning, match="does not hold"):
        two = extract_lora(tmp_path / "base", tmp_path / "tuned", rank=4)
    with pytest.warns(UserWarning, match="does not hold"):
        three = extract_lora(model, after.state_dict(), rank=4)
    for other in (two, three):
        assert all(f.equal(one.factors[path]) for path, f in other.factors.items())
        assert other.report == one.report
    assert list(one.report.left_out) == ["model.embed_tokens.weight"]
    assert two.config.base_model == str(tmp_path / "base")


def test_extraction_refuses(tiny, tmp_path):
    model = tiny("llama")
    before = bits(model)
    for options in ({"rank": 0}, {"rank": None}, {"rank": 3, "energy": 0.5}, {"rank": None, "energy": 1.5}):
        with pytest.raises(LoRAConfigError):
            extract_lora(model, model, **options)
    with pytest.raises(LoRAMismatchError, match="No target's weight differs"):
        extract_lora(model, model)
    with pytest.raises(LoRAMismatchError, match="do not have the same tensors"):
        extract_lora(model, tiny("llama-cls"))
    with pytest.raises(LoRAMismatchError, match="no place for"):
        extract_lora(model, {"x": torch.ones(1)})
    with pytest.raises(LoRAMismatchError, match="only in the base"):
        extract_lora(model, {"lm_head.weight": torch.ones(1)})
    shorter = copy.deepcopy(model)
    shorter.resize_token_embeddings(60)
    with pytest.raises(LoRAMismatchError, match=r"\[64, 32\] in the base and \[60, 32\]"):
        extract_lora(model, shorter)
    nan = tuned(model, lambda name, p, g: torch.full_like(p, torch.nan) if "q_proj" in name else None)
    with pytest.raises(LoRAMismatchError, match="NaN"):
        extract_lora(model, nan)
    whole = tuned(model, lambda name, p, g: torch.ones_like(p))
    whole.model.layers[0].self_attn.q_proj.weight.data = whole.model.layers[0].self_attn.q_proj.weight.data.to(
        torch.float8_e4m3fn
    )
    with pytest.raises(LoRAUnsupportedError, match="quantised"):
        extract_lora(model, whole)
    with pytest.raises(LoRAUnsupportedError, match="meta"):
        extract_lora(copy.deepcopy(model).to("meta"), whole)
    with pytest.raises(LoRAFileError):
        extract_lora(tmp_path, tmp_path)
    assert bits(model) == before
