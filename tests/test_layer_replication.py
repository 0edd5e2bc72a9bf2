"""`layer_replication`: the model's layers repeated, as PEFT repeats them, on shared weights; and put back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from loras import bits, logits, randomise
from oracles import build

from hf_lora import LoRAConfig, combine
from hf_lora.errors import LoRAConfigError, LoRAMismatchError, LoRAStateError, LoRAUnsupportedError

SPANS = [[0, 2], [0, 2], [1, 2]]
FAMILIES = {  # model -> targets, and where its layers are
    "llama": (["q_proj", "down_proj"], "model.layers"),
    "qwen2": (["v_proj"], "model.layers"),
    "bert": (["query", "output.dense"], "encoder.layer"),
    "gpt2": (["c_attn"], "h"),
}


def base(tiny, family):
    model = build(family) if family == "gemma3" else tiny(family)
    return model.transformer if family == "gpt2" else model  # where PEFT finds the list


def made(tiny, family="llama", *, seed=0, name="default", model=None, **changes):
    model = base(tiny, family) if model is None else model
    fields = {"r": 4, "alpha": 6, "target_modules": FAMILIES[family][0], "layer_replication": SPANS, **changes}
    model.add_lora(LoRAConfig(**fields), name)
    randomise(model, seed)
    return model


def agrees(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def state_of(model, family):
    layers = model.get_submodule(FAMILIES[family][1])
    return bits(model), [id(m) for m in layers.modules()], [id(p) for p in model.parameters()], model.config.to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_base_with_layers_repeated_and_goes_back(tiny, batch, family):
    model = base(tiny, family)
    inputs = batch(model)
    before, output = state_of(model, family), logits(model, inputs)
    expected = base(tiny, family)  # the layers by hand: copies in their places
    owner, _, name = FAMILIES[family][1].rpartition(".")
    own = expected.get_submodule(FAMILIES[family][1])
    setattr(expected.get_submodule(owner), name, type(own)(copy.deepcopy(own[i]) for i in (0, 1, 0, 1, 1)))
    expected.config.num_hidden_layers = 5
    if getattr(expected.config, "layer_types", None):
        expected.config.layer_types = expected.config.layer_types[:1] * 5
    model.add_lora(LoRAConfig(r=2, target_modules=FAMILIES[family][0], layer_replication=SPANS))
    assert torch.equal(logits(model, inputs, use_cache=False), logits(expected, inputs, use_cache=False))
    shared = {id(p) for n, p in model.named_parameters() if "lora_slots" not in n}
    assert shared == set(before[2])  # no weight was copied
    model.remove_lora()
    assert state_of(model, family) == before
    assert torch.equal(logits(model, inputs), output)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2"])  # PEFT forgets its layer_types
def test_peft_loads_ours_and_we_load_peft(tiny, batch, peft, tmp_path, family):
    model = made(tiny, family)
    inputs = batch(model)
    ours = logits(model, inputs)
    model.save_lora(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base(tiny, family), str(tmp_path / "ours")).eval()
    agrees(ours, logits(theirs, inputs))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.1)
    theirs.save_pretrained(tmp_path / "theirs")
    for trainable in (False, True):
        again = base(tiny, family)
        before = state_of(again, family)
        again.load_lora(tmp_path / "theirs", name="x", trainable=trainable)
        agrees(logits(again, inputs), logits(theirs, inputs))
        again.remove_lora()
        assert state_of(again, family) == before


def test_generation_with_a_cache_is_pefts_and_the_uncached(tiny, batch, peft, tmp_path):
    model = made(tiny)
    model.save_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()
    how = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    inputs = batch(model)
    found = model.generate(**inputs, **how)
    for other in (theirs.generate(**inputs, **how), model.generate(**inputs, **how, use_cache=False)):
        assert torch.equal(found.sequences, other.sequences)
        agrees(torch.stack(found.logits), torch.stack(other.logits))
    assert len(model(**inputs, use_cache=True).past_key_values) == 5


def test_each_replica_trains_its_own_factors(tiny, batch):
    model = made(tiny, target_modules=["q_proj"]).train()
    inputs, found = batch(model), []
    for reentrant in (None, True, False):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) == 2 * 5
    norms = [float(grad.norm()) for name, grad in found[0].items() if ".B" in name]
    assert len(set(norms)) == 5
    for other in found[1:]:
        for name, grad in found[0].items():
            agrees(other[name], grad)
    model.remove_lora()
    assert model.is_gradient_checkpointing
    assert all(layer.gradient_checkpointing and layer.training for layer in model.model.layers)


def test_resume_in_trainer_is_the_run_without_a_break(tiny, tmp_path):
    from transformers import Trainer, TrainingArguments

    from hf_lora import LoRACallback

    def run(steps, resume=None):
        torch.manual_seed(0)
        model = tiny("llama")
        model.add_lora(LoRAConfig(r=2, target_modules=["q_proj"], dropout=0.1, layer_replication=SPANS))
        args = TrainingArguments(
            tmp_path / "run", max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=1, seed=1,
            report_to=[], disable_tqdm=True, lr_scheduler_type="constant", use_cpu=True,
        )  # fmt: skip
        rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i} for i in range(8)]
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[LoRACallback()])
        trainer.train(resume_from_checkpoint=resume)
        return model.lora_adapter("default")

    assert run(2).equal(run(2, str(tmp_path / "run" / "checkpoint-1")))


def test_several_adapters_of_the_same_layers(tiny, batch, tmp_path):
    model = made(tiny, name="a")
    made(tiny, name="b", seed=1, model=model, target_modules=["v_proj"])
    model.train_lora([])
    names = ["a", None, "b"]
    inputs, alone = batch(model, rows=3), []
    for name in names:
        model.set_lora(name)
        alone.append(logits(model, inputs))
    model.set_lora(None)
    with model.route_lora(names):
        routed = logits(model, inputs)
    for row in range(3):
        agrees(routed[row], alone[row][row])
    model.set_lora({"a": 0.5, "b": -1.0})
    mixed = logits(model, inputs)
    together = combine([model.lora_adapter("a"), model.lora_adapter("b")], [0.5, -1.0])
    fresh = tiny("llama")
    fresh.load_lora(together.save(tmp_path), name="x")
    agrees(logits(fresh, inputs), mixed)
    half = logits(model.half(), inputs)
    assert torch.isfinite(half).all()
    model.remove_lora("a")
    assert len(model.model.layers) == 5
    model.remove_lora("b")
    assert len(model.model.layers) == model.config.num_hidden_layers == 2
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert torch.isfinite(logits(model, inputs)).all()


def test_a_layer_that_was_left_out_moves_with_the_model(tiny, batch):
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=2, target_modules=["q_proj"], layer_replication=[[1, 2]]))
    model.to(torch.bfloat16)
    model.remove_lora()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    logits(model, batch(model))


def test_copies_pickles_and_new_tokens(tiny, batch):
    model = made(tiny, target_modules=["q_proj", "embed_tokens"])
    inputs = batch(model)
    expected = logits(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, inputs), expected)
        twin.remove_lora()
        assert bits(twin) == bits(tiny("llama"))
        assert len(model.model.layers) == 5
    model.resize_token_embeddings(70, mean_resizing=False)
    assert len(model.model.layers) == model.config.num_hidden_layers == 5
    agrees(logits(model, inputs)[..., :64], expected)


def test_a_pool_and_an_offloaded_base_refuse_it(tiny, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from hf_lora import LoRAPool
    from hf_lora.errors import LoRAPoolError

    made(tiny).save_lora(tmp_path)
    model = tiny("llama")
    with LoRAPool(model) as pool, pytest.raises(LoRAPoolError, match="layer_replication"), pool.use(str(tmp_path)):
        pass
    assert len(model.model.layers) == 2
    accelerate.cpu_offload(model)
    with pytest.raises(LoRAUnsupportedError, match="while layers are offloaded"):
        model.load_lora(tmp_path, name="x")


def test_what_cannot_be_is_refused_and_nothing_changes(tiny, batch, tmp_path):
    from hf_lora.export import merge_to_folder

    model = made(tiny)
    model.save_lora(tmp_path / "adapter")
    value = model.lora_adapter("default")
    model.eval()
    for verb in (model.merge_lora, lambda: model.merge_lora(untie=True), lambda: model.merge_and_save(tmp_path / "m")):
        with pytest.raises(LoRAUnsupportedError, match="layer_replication") as caught:
            verb()
        assert caught.value.name == "layer_replication"
    for spans in (None, [[0, 2]]):
        with pytest.raises(LoRAStateError, match="layer_replication") as caught:
            made(tiny, name="other", model=model, layer_replication=spans)
        assert caught.value.name == "layer_replication"
    assert len(model.model.layers) == 5
    with pytest.raises(LoRAUnsupportedError, match="layer_replication"):
        merge_to_folder(value, tmp_path / "merged", tmp_path / "base")
    plain = tiny("llama")
    plain.add_lora(LoRAConfig(r=2, target_modules=["q_proj"]))
    before = bits(plain)
    with pytest.raises(LoRAStateError, match="layer_replication"):
        plain.load_lora(tmp_path / "adapter", name="x")
    with pytest.raises(LoRAMismatchError, match="layer_replication"):
        combine([value, plain.lora_adapter("default")], [1, 1])
    assert bits(plain) == before
    for family, changes, error, match in (
        ("llama", {"layer_replication": [[0, 3]]}, LoRAConfigError, "beyond the model's 2 layers"),
        ("llama", {"target_modules": ["nothing"]}, ValueError, "nothing"),
        ("gemma3", {"target_modules": ["q_proj"]}, LoRAUnsupportedError, "layers of one kind"),
        ("vit-cls", {"target_modules": ["query"]}, LoRAUnsupportedError, "no list of layers"),
    ):
        fresh = base(tiny, family)
        if family == "gemma3":
            fresh.config.layer_types = ["sliding_attention", "full_attention"]
        state, settings = bits(fresh), fresh.config.to_dict()
        with pytest.raises(error, match=match):
            made(tiny, model=fresh, **changes)
        assert bits(fresh) == state
        assert fresh.config.to_dict() == settings
        assert not hasattr(fresh, "_lora_state")
    for bad in ([[0, 0]], [[2, 1]], [[0]], "0-2", 3, [[0, True]], [[-1, 2]]):
        with pytest.raises(LoRAConfigError, match="layer_replication"):
            LoRAConfig(layer_replication=bad)
    assert LoRAConfig(layer_replication=[]).layer_replication is None
    for bias in ("all", "lora_only"):
        with pytest.raises(LoRAConfigError, match="layer_replication cannot be combined with bias"):
            LoRAConfig(layer_replication=SPANS, bias=bias)
