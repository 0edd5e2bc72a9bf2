"""aLoRA: where it acts, held against PEFT and a scan in plain Python before the formula of a layer; and every verb."""

from __future__ import annotations

import copy

import pytest
import torch
from loras import logits, randomise
from oracles import Snapshot

import hf_lora
from hf_lora import LoRAConfig
from hf_lora.errors import (
    LoRAConfigError,
    LoRAMismatchError,
    LoRARouteError,
    LoRAStateError,
    LoRAUnsupportedError,
)

TOKENS, OTHER = (5, 6), (7, 8, 7)
NEVER = 1 << 20
FAMILIES = {"llama": "all-linear", "gpt2": ["q", "v", "c_fc"], "bert": ["query", "value", "output.dense"]}


def prompts(rows=4, length=9, seed=0):
    """One row invoked in the middle, one twice, one at its very end, one never."""
    ids = torch.randint(10, 60, (rows, length), generator=torch.Generator().manual_seed(seed))
    for row, start in ((0, 4), (1, 1), (1, 6), (2, length - 2)):
        ids[row, start : start + 2] = torch.tensor(TOKENS)
    return ids


def made(model, name="default", seed=0, tokens=TOKENS, **changes):
    config = {"r": 4, "alpha": 6, "target_modules": "all-linear", "alora_invocation_tokens": tokens, **changes}
    model.add_lora(LoRAConfig(task_type="CAUSAL_LM", **config), name)
    magnitudes = {k: p.detach().clone() for k, p in model.named_parameters() if ".magnitude" in k}
    randomise(model, seed)
    for key, norm in magnitudes.items():
        if model.get_parameter(key).requires_grad:
            model.get_parameter(key).data.add_(norm)
    return model


def starts_in(ids, tokens=TOKENS):
    """The first position of the last occurrence in each row, or NEVER."""
    found = []
    for row in ids.tolist():
        places = [i for i in range(len(row)) if tuple(row[i : i + len(tokens)]) == tuple(tokens)]
        found.append(places[-1] if places else NEVER)
    return found


def written_out(base, value, starts, weight=1.0):
    """The base with the layers' formula in float64 behind hooks; `starts` are of the sequence, which is given whole."""

    def hook(path, f):
        module = base.get_submodule(path)
        W = module.weight.detach().double()
        W = W.T if type(module).__name__ == "Conv1D" else W
        V = W + f.scaling * f.B.double() @ f.A.double()
        if "diagonal" in f.extras:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
            kept = len(S) - f.rank
            V = (U[:, :kept] * S[:kept]) @ Vh[:kept]
            V = V + f.scaling * f.B.double() @ torch.diag(f.extras["diagonal"].double()) @ f.A.double()
        if "magnitude" in f.extras:
            V = f.extras["magnitude"].double()[:, None] * V / torch.linalg.vector_norm(V, dim=1, keepdim=True)
        shift = f.scaling * f.extras["offset"].double() if "offset" in f.extras else 0

        def changed(_, args, output):
            first = torch.tensor([s for s in starts for _ in range(len(output) // len(starts))])  # beams
            acts = torch.arange(output.shape[1]) >= first[:, None]
            delta = weight * (args[0].double() @ (V - W).T + shift)
            return output + torch.where(acts[..., None], delta, 0).to(output.dtype)

        return module.register_forward_hook(changed)

    for path, f in value.factors.items():
        hook(path, f)
    return base


def agrees(ours, theirs, tolerance=1e-5):
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


# ---- forward and backward --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trainable", [True, False])
def test_it_acts_from_the_last_invocation_on_and_is_the_base_before(tiny, family, trainable):
    base, model, ids = tiny(family), tiny(family), prompts()
    made(model, target_modules=FAMILIES[family])
    model.train_lora("default" if trainable else [])
    ours, plain = logits(model, {"input_ids": ids}), logits(base, {"input_ids": ids})
    agrees(ours, logits(written_out(tiny(family), model.lora_adapter("default"), starts_in(ids)), {"input_ids": ids}))
    apart = [(ours[i] != plain[i]).any(-1).tolist() for i in range(len(ids))]
    if family == "bert":  # attends both ways
        assert [any(row) for row in apart] == [True, True, True, False]
    else:
        assert apart == [[t >= start for t in range(9)] for start in starts_in(ids)]  # not one bit before
    with model.no_lora():
        assert torch.equal(logits(model, {"input_ids": ids}), plain)


def test_padding_on_either_side(tiny):
    model, short = made(tiny("llama")), torch.tensor([[12, 5, 6, 20]])
    alone = logits(model, {"input_ids": short})[0]
    for pads, at in (((3, 0), slice(3, 7)), ((0, 3), slice(0, 4))):
        ids, mask = (torch.nn.functional.pad(t, pads) for t in (short, torch.ones_like(short)))
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        agrees(logits(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})[0, at], alone)


def test_forward_gradients_and_files_are_pefts(tiny, peft, tmp_path):
    model, ids = made(tiny("llama")), prompts()
    model.save_lora(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "ours"), is_trainable=True)
    grads = []
    for each in (model, theirs):
        each(input_ids=ids, labels=ids).loss.backward()
        grads.append({k.replace(".lora_slots.A0", ".A").replace(".lora_slots.B0", ".B"): p.grad
                      for k, p in each.named_parameters() if p.grad is not None})  # fmt: skip
    renamed = {k.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".A")
               .replace(".lora_B.default.weight", ".B"): g for k, g in grads[1].items()}  # fmt: skip
    assert grads[0].keys() == renamed.keys()
    for key, grad in grads[0].items():
        agrees(grad, renamed[key])
    agrees(logits(model, {"input_ids": ids}), logits(theirs, {"input_ids": ids}))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.1)
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny("llama")
    again.load_lora(tmp_path / "theirs")
    agrees(logits(again, {"input_ids": ids}), logits(theirs, {"input_ids": ids}))
    assert again.lora_adapter("theirs").config.to_peft()["alora_invocation_tokens"] == [5, 6]
    prompt = {"input_ids": ids[:, :7], "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(again.generate(**prompt), theirs.generate(**prompt))


def test_a_batch_without_an_invocation_trains_nothing_and_misses_no_gradient(tiny):
    model, ids = made(tiny("llama")).train(), prompts()[3:]
    loss = model(input_ids=ids, labels=ids).loss
    assert loss == tiny("llama")(input_ids=ids, labels=ids).loss
    loss.backward()  # DDP waits for every Parameter's gradient
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in grads)


EXTRA = {"dora": {"use_dora": True}, "kasa": {"kasa_config": {}}, "bias": {"lora_bias": True}}


@pytest.mark.parametrize("variant", EXTRA)
def test_another_variant_acts_there_too(tiny, variant):
    model, ids = made(tiny("llama"), **EXTRA[variant]), prompts()
    plain = logits(tiny("llama"), {"input_ids": ids})
    expected = logits(written_out(tiny("llama"), model.lora_adapter("default"), starts_in(ids)), {"input_ids": ids})
    for trained in ("default", []):
        model.train_lora(trained)
        ours = logits(model, {"input_ids": ids})
        agrees(ours, expected, 2e-5)
        assert all(torch.equal(ours[i, :s], plain[i, :s]) for i, s in enumerate(starts_in(ids)))


# ---- the base's cache ------------------------------------------------------------------------------------------------


def test_the_bases_cache_serves_before_the_invocation(tiny):
    model, base, ids = made(tiny("llama")), tiny("llama"), prompts()[:1].expand(2, -1)
    whole = model(input_ids=ids, use_cache=True)
    plain = base(input_ids=ids, use_cache=True)
    for mine, theirs in zip(whole.past_key_values.layers, plain.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys[:, :, :4], theirs.keys[:, :, :4])
        assert torch.equal(mine.values[:, :, :4], theirs.values[:, :, :4])
        assert not torch.equal(mine.keys[:, :, 4:], theirs.keys[:, :, 4:])
    with model.no_lora():
        cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    agrees(logits(model, {"input_ids": ids[:, 3:], "past_key_values": cache}), whole.logits[:, 3:])


@pytest.mark.parametrize("seen", [0, 3], ids=["the whole prompt", "the rest of the prompt"])
def test_generate_goes_on_from_the_bases_cache(tiny, seen):
    model, ids = made(tiny("llama")), prompts()[:1].expand(2, -1)
    with model.no_lora():
        cache = model(input_ids=ids[:, :3], use_cache=True).past_key_values
    expected = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    out = model.generate(
        input_ids=ids[:, seen:], attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(out[:, -4:], expected[:, -4:])


# ---- generate --------------------------------------------------------------------------------------------------------

GENERATING = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 2},
    "beams": {"num_beams": 3},
    "several sequences": {"num_beams": 4, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("how", GENERATING)
def test_the_prompt_says_where_every_step_acts(tiny, how):
    model, ids = made(tiny("llama"), seed=1), prompts()
    ids = ids[:1] if how == "prompt lookup" else ids
    model.train_lora([])
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    oracle = written_out(tiny("llama"), model.lora_adapter("default"), starts_in(ids))
    like = {k: v for k, v in GENERATING[how].items() if k.startswith("num")}
    expected = oracle.generate(input_ids=ids, use_cache=False, **settings, **like)
    assert torch.equal(model.generate(input_ids=ids, **settings, **GENERATING[how]), expected)
    if how == "greedy":
        assert torch.equal(model.generate(ids, **settings), expected)
        assert not torch.equal(tiny("llama").generate(input_ids=ids, **settings)[:3], expected[:3])
    route = ["default", None, "default", "default"][: len(ids)]
    with model.route_lora(route):
        routed = model.generate(input_ids=ids, **settings, **GENERATING[how])
    plain = tiny("llama").generate(input_ids=ids, **settings, **like)
    each = len(routed) // len(ids)
    wanted = torch.cat(
        [(plain if name is None else expected)[i * each : (i + 1) * each] for i, name in enumerate(route)]
    )
    assert torch.equal(routed, wanted)


def test_what_the_model_writes_invokes_nothing(tiny):
    from transformers import LogitsProcessor

    class Says(LogitsProcessor):
        def __call__(self, ids, scores):
            if ids.shape[1] - 9 < 2:
                scores = torch.full_like(scores, -1e9)
                scores[:, TOKENS[ids.shape[1] - 9]] = 0
            return scores

    model, ids = made(tiny("llama"), seed=1), prompts()[3:]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "logits_processor": [Says()]}
    for cached in (True, False):
        out = model.generate(input_ids=ids, use_cache=cached, **settings)
        assert out[0, 9:11].tolist() == list(TOKENS)
        assert torch.equal(out, tiny("llama").generate(input_ids=ids, **settings))


def test_a_state_without_a_length(tiny):
    """Mamba's cache does not say how many tokens it has seen."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2, initializer_range=0.5)
    config.tie_word_embeddings, config.pad_token_id = False, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = MambaForCausalLM(config).eval()
    model, ids = made(copy.deepcopy(base), target_modules=["in_proj", "x_proj"]), prompts()
    settings = {"input_ids": ids, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = base.generate(**settings)
    expected = written_out(base, model.lora_adapter("default"), starts_in(ids)).generate(use_cache=False, **settings)
    assert not torch.equal(plain, expected)
    for cached in (True, False):
        assert torch.equal(model.generate(use_cache=cached, **settings), expected)


def test_offsets_say_it_where_tokens_do_not(tiny):
    """A decoding loop of one's own, and embeddings instead of tokens."""
    model, ids = made(tiny("llama"), seed=1), prompts()
    offsets = [9 - start if start < NEVER else None for start in starts_in(ids)]
    whole = model(input_ids=ids)
    assert torch.equal(model(input_ids=ids, alora_offsets=offsets).logits, whole.logits)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds, alora_offsets=torch.tensor([5, 3, 2, 0])).logits, whole.logits)
    out = model(input_ids=ids[:, :-1], alora_offsets=[4, 2, 1, 0], use_cache=True)
    last = model(input_ids=ids[:, -1:], past_key_values=out.past_key_values, alora_offsets=[1, 1, 1, None])
    agrees(last.logits[:, 0], whole.logits[:, -1])
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=ids, **settings)
    assert torch.equal(model.generate(inputs_embeds=embeds, alora_offsets=offsets, **settings), expected[:, 9:])
    with model.no_lora():  # and it is in nobody's way
        agrees(model(input_ids=ids, alora_offsets=offsets).logits, logits(tiny("llama"), {"input_ids": ids}))


def test_a_head_on_the_last_positions(tiny):
    model, ids = made(tiny("llama"), target_modules=["q_proj", "lm_head"]), prompts()
    for frozen in (False, True):
        model.train_lora([] if frozen else "default")
        whole = logits(model, {"input_ids": ids})
        agrees(model(input_ids=ids, logits_to_keep=4).logits, whole[:, -4:])
        with pytest.raises(LoRARouteError, match="nothing says which"):
            model(input_ids=ids, logits_to_keep=torch.tensor([1, 5]))


# ---- switch, route, mix ----------------------------------------------------------------------------------------------


def zoo(model, **changes):
    """Two aLoRAs, one of them a DoRA, and two plain adapters, of which one trains."""
    made(model, "one", 0, **changes)
    made(model, "two", 1, OTHER, r=2, use_dora=True, **changes)
    made(model, "plain", 2, None, r=3, **changes)
    made(model, "trained", 3, None, r=2, **changes)
    return model


def mixed_prompts():
    ids = prompts(7)
    ids[:, 2:5] = torch.where(torch.tensor([0, 1, 0, 0, 1, 0, 0])[:, None] == 1, torch.tensor(OTHER), ids[:, 2:5])
    return ids


ROUTE = ["one", "two", "plain", None, "two", "trained", "one"]


@pytest.mark.parametrize("trained", [["trained"], ["one", "two"], []])
def test_each_row_of_a_route_is_that_row_alone(tiny, trained):
    model, ids = zoo(tiny("llama"), target_modules=["q", "v", "down", "lm_head"]), mixed_prompts()
    model.train_lora(trained)
    with model.route_lora(ROUTE):
        routed = logits(model, {"input_ids": ids})
    for i, name in enumerate(ROUTE):
        with model.use_lora(name):
            agrees(routed[i], logits(model, {"input_ids": ids[i : i + 1]})[0])
    assert torch.equal(routed[6], logits(tiny("llama"), {"input_ids": ids})[6])  # "one", not invoked
    with model.route_lora(["one"] * 7):
        uniform = logits(model, {"input_ids": ids})
    model.set_lora("one")
    agrees(uniform, logits(model, {"input_ids": ids}))
    with pytest.raises(LoRARouteError), model.route_lora(["one", "plain"]):
        model(input_ids=ids)


def test_beside_an_adapter_of_a_vision_tower():
    from rowscenes import llava

    scene = llava()
    model, route = scene.model, ["eyes", "judge", "judge"]
    made(model, "eyes", 0, None, target_modules=r".*vision_tower.*q_proj")
    made(model, "judge", 1, target_modules=r".*language_model.*\.[qv]_proj")
    scene.batch["input_ids"][1:, -3:-1] = torch.tensor(TOKENS)  # the rows alone are views of it
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with model.route_lora(route):
        routed, written = logits(model, scene.batch), model.generate(**scene.batch, **settings)
    for i, name in enumerate(route):
        with model.use_lora(name):
            agrees(routed[i], logits(model, scene.alone[i])[0])
            assert torch.equal(written[i], model.generate(**scene.alone[i], **settings)[0])


def test_a_pool_and_a_copy_in_memory_carry_it(tiny, tmp_path):
    import pickle

    model, ids = zoo(tiny("llama"), target_modules=["q", "v"]), mixed_prompts()
    model.train_lora([])
    for name in model.lora_names:
        model.save_lora(tmp_path / name, name)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with model.route_lora(ROUTE):
        expected = model.generate(ids, **settings)
    with pickle.loads(pickle.dumps(model)).route_lora(ROUTE) as twin:
        assert torch.equal(twin.generate(ids, **settings), expected)
    base = tiny("llama")
    with (
        hf_lora.LoRAPool(base, source={name: tmp_path / name for name in model.lora_names}, device_slots=4) as pool,
        pool.acquire([name for name in ROUTE if name]) as lease,
        lease.route(ROUTE),
    ):
        assert torch.equal(base.generate(ids, **settings), expected)


def test_mixtures_add_up(tiny):
    model, ids = zoo(tiny("llama"), target_modules=["q_proj", "down_proj"]), mixed_prompts()
    one, two, plain = (model.lora_adapter(name) for name in ("one", "two", "plain"))
    for trained in (["one"], ["two"], ["plain"], []):
        model.train_lora(trained)
        model.set_lora({"one": 0.5, "two": -0.25, "plain": 1.0})
        oracle = written_out(tiny("llama"), one, starts_in(ids), 0.5)
        oracle = written_out(oracle, two, starts_in(ids, OTHER), -0.25)
        oracle = written_out(oracle, plain, [0] * 7)
        agrees(logits(model, {"input_ids": ids}), logits(oracle, {"input_ids": ids}), 2e-5)


def test_nothing_is_left_behind(tiny):
    model, ids = tiny("llama"), prompts()
    before = Snapshot(model)
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    made(model)
    twin = copy.deepcopy(model)
    model(input_ids=ids)
    with pytest.raises(ValueError, match="batch_size"):
        model(input_ids=ids, labels=ids[:2])
    expected = logits(model, {"input_ids": ids})
    model.remove_lora()
    before.assert_same(model)
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(logits(twin, {"input_ids": ids}), expected)  # a copy has hooks and a state of its own


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_region_sees_where_it_acts(tiny, reentrant):
    found, ids = [], prompts()
    for checkpointed in (False, True):
        model = made(tiny("llama"), use_dora=True, dropout=0.2).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(1)
        with model.use_lora("default"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append({k: p.grad for k, p in model.named_parameters() if p.requires_grad})
    for key, grad in found[0].items():
        assert grad.any()
        agrees(found[1][key], grad)


def test_resume_in_trainer_is_the_run_without_a_break(tiny, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": ids, "labels": ids} for ids in torch.cat([prompts(seed=i) for i in range(2)])]

    def run(steps, resume=None):
        model = tiny("llama")
        torch.manual_seed(0)
        model.add_lora(LoRAConfig(r=4, target_modules=["q", "v"], alora_invocation_tokens=TOKENS))
        args = TrainingArguments(
            tmp_path / "run", max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=2, seed=1,
            report_to=[], disable_tqdm=True, lr_scheduler_type="constant", use_cpu=True, logging_steps=1,
        )  # fmt: skip
        Trainer(model, args, train_dataset=rows, callbacks=[hf_lora.LoRACallback()]).train(
            resume_from_checkpoint=resume
        )
        return model.lora_adapter("default")

    whole = run(4)
    assert any(f.B.any() for f in whole.factors.values())
    assert whole.equal(run(4, str(tmp_path / "run" / "checkpoint-2")))


# ---- compiled --------------------------------------------------------------------------------------------------------


def test_one_graph_serves_every_switch_route_and_prompt(tiny):
    torch.compiler.reset()
    model, ids = zoo(tiny("llama"), target_modules=["q", "down", "lm_head"]), mixed_prompts()
    model.train_lora(["one", "trained"])
    choices = [{"one": 0.5, "two": -0.5, "plain": 1.0}, "one", "two", None, "plain"]
    given = [ids, ids.flip(0)]
    model.set_lora(choices[0])
    expected = []
    for which in choices:
        model.set_lora(which)
        expected += [logits(model, {"input_ids": each}) for each in given]
    with model.route_lora(ROUTE):
        routed = logits(model, {"input_ids": ids})
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled, wanted = torch.compile(model, fullgraph=True, backend=backend), iter(expected)
    for which in choices:
        model.set_lora(which)
        for each in given:
            agrees(logits(compiled, {"input_ids": each}), next(wanted), 2e-5)
    with model.route_lora(ROUTE):
        agrees(logits(compiled, {"input_ids": ids}), routed, 2e-5)
    model.set_lora("one")
    offsets = [9 - start if start < NEVER else 0 for start in starts_in(ids)]
    agrees(logits(compiled, {"input_ids": ids, "alora_offsets": offsets}), expected[2], 2e-5)
    assert len(graphs) == 1
    with pytest.raises(LoRAStateError, match="input_ids"):
        compiled(inputs_embeds=model.get_input_embeddings()(ids))


def test_a_compiled_step_has_the_gradients_of_the_eager_one(tiny):
    """The model's hooks are within the graph."""
    torch.compiler.reset()
    model, ids = made(tiny("llama"), use_dora=True, target_modules=["q"]).train(), prompts()

    def run(ids, **given):
        return model(input_ids=ids, labels=ids, **given).loss

    found, compiled = [], torch.compile(run, fullgraph=True, backend="aot_eager")
    for each in (run, compiled):
        model.zero_grad()
        each(ids).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for mine, theirs in zip(*found, strict=True):
        agrees(mine, theirs, 2e-5)
    assert model._lora_state.traced_reach is None
    with pytest.raises(Exception, match="alora_offsets cannot be given"):
        compiled(ids, alora_offsets=[1] * 4)


def test_compiled_inside_generate(tiny):
    """Each layer alone, or the whole model: they see what the prompt says."""
    torch.compiler.reset()
    ids = prompts()
    settings = {"input_ids": ids, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model = made(tiny("llama"), seed=1, target_modules=["q"])
    model.train_lora([])
    expected = model.generate(**settings)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="eager")
    assert torch.equal(model.generate(**settings), expected)
    model = made(tiny("llama"), seed=1, target_modules=["q"])
    model.train_lora([])
    model.compile(fullgraph=True, backend="eager")
    assert torch.equal(model.generate(**settings, cache_implementation="static", disable_compile=True), expected)


# ---- values and files ------------------------------------------------------------------------------------------------


def test_arithmetic_keeps_the_invocation(tiny, tmp_path):
    model, ids = tiny("llama"), prompts()
    for seed, name in enumerate("ab"):
        made(model, name, seed)
    made(model, "other", 2, OTHER)
    made(model, "plain", 3, None)
    a, b, other, plain = (model.lora_adapter(name) for name in ("a", "b", "other", "plain"))
    both = hf_lora.combine([a, b], [0.5, -1.0])
    for value in (both, a.truncate(rank=2), a.negate()):
        assert value.config.alora_invocation_tokens == TOKENS
    model.train_lora([])
    model.set_lora({"a": 0.5, "b": -1.0})
    expected = logits(model, {"input_ids": ids})
    model.load_lora(both, name="both")
    model.set_lora("both")
    agrees(logits(model, {"input_ids": ids}), expected)
    for wrong in (other, plain):
        with pytest.raises(LoRAMismatchError, match="acts from the tokens"):
            hf_lora.combine([a, wrong], [1.0, 1.0], force=True)


def test_the_gguf_and_the_card_say_it(tiny, tmp_path):
    gguf = pytest.importorskip("gguf")
    from hf_lora import card
    from hf_lora.export import to_gguf

    value = made(tiny("llama"), target_modules=["q", "v"]).lora_adapter("default")
    to_gguf(value, tmp_path / "a.gguf", base=tiny("llama").config)
    field = gguf.GGUFReader(tmp_path / "a.gguf").fields["adapter.alora.invocation_tokens"]
    assert field.contents() == [5, 6]
    text = card.update(None, value, repo_id="user/a", base_model="user/base")
    assert "[5, 6]" in text
    assert "vllm serve" not in text


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [[], "56", [5, -1], [5, 1.0], [True], 5, {5: 6}])
def test_impossible_tokens(tokens):
    with pytest.raises(LoRAConfigError, match="alora_invocation_tokens"):
        LoRAConfig(alora_invocation_tokens=tokens)
    with pytest.raises(LoRAConfigError, match="alora_invocation_tokens"):
        LoRAConfig.from_peft({"peft_type": "LORA", "alora_invocation_tokens": tokens})


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens: an embedding"),
        ("gpt2", {"target_modules": ["c_attn"], "bias": "all"}, "trained whole"),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head: it is trained whole"),
        ("t5", {"target_modules": ["q"]}, "an encoder and a decoder"),
    ],
)
def test_models_and_layers_on_which_it_is_not_defined(tiny, family, changes, match):
    model = tiny(family)
    before = Snapshot(model)
    with pytest.raises(LoRAUnsupportedError, match=match) as caught:
        made(model, **changes)
    assert caught.value.name == "alora_invocation_tokens"
    before.assert_same(model)


def test_calls_that_do_not_say_where(tiny):
    model, ids = made(tiny("llama"), target_modules=["q", "lm_head"]).eval(), prompts()
    embeds = model.get_input_embeddings()(ids)
    for call in (model, model.generate):
        with pytest.raises(LoRAStateError, match="alora_offsets"):
            call(inputs_embeds=embeds)
    for offsets in ([1], [1, 2, -1, 0], [1, 2, "3", 0], "1234", 3, [True] * 4):
        with pytest.raises(LoRARouteError, match="does not say where"):
            model(input_ids=ids, alora_offsets=offsets)
    with pytest.raises(LoRAStateError, match="outside the forward"):
        model.lm_head(torch.zeros(1, 3, model.config.hidden_size))
    with pytest.raises(LoRARouteError, match="DataParallel"):
        model._lora_state.pinned()
    with pytest.raises(LoRAUnsupportedError, match="exported"):
        torch.export.export(model, (), {"input_ids": ids})
    assert model.model(input_ids=ids).last_hidden_state.shape[1] == 9  # a model inside looks for itself
    assert model._lora_state.current.reach is None


def test_it_cannot_be_merged(tiny, tmp_path):
    from hf_lora.export import merge_to_folder

    model = made(tiny("llama"))
    model.train_lora([])
    made(model, "plain", 1, None)
    model.eval()
    before = Snapshot(model)
    for which in ("default", {"default": 0.5, "plain": 1.0}):
        with pytest.raises(LoRAUnsupportedError, match="aLoRA cannot be merged"):
            model.merge_lora(which)
    before.assert_same(model)
    model.save_lora(tmp_path / "adapter", "default")
    tiny("llama").save_pretrained(tmp_path / "base")
    with pytest.raises(LoRAUnsupportedError, match="aLoRA cannot be merged"):
        merge_to_folder(hf_lora.LoRAAdapter.load(tmp_path / "adapter"), tmp_path / "out", base=tmp_path / "base")
    model.merge_lora("plain")  # what is beside it can
    model.unmerge_lora()
