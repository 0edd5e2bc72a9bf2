"""`plan`: the paper's counts, what autograd and the allocator then hold, files to the byte, budgets, and mistakes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import hf_lora
from hf_lora import LoRAConfig, LoRAConfigError, LoRAStateError, LoRATargetError
from hf_lora.cli import app
from hf_lora.model import add
from hf_lora.planning import TrainingPlan, core, plan
from hf_lora.planning.optimizers import NAMES
from hf_lora.planning.step import example

QV = LoRAConfig(r=4, target_modules=["q", "v"])
GPT3 = {
    "hidden_size": 12288,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "ffn_dim": 49152,
    "vocab_size": 50257,
    "word_embed_proj_dim": 12288,
    "max_position_embeddings": 2048,
}


def gpt3(**fields: Any) -> Any:
    return transformers.OPTConfig(**GPT3 | fields)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainingPlan]:
    """`plan` without its step, which takes a second on 96 layers."""
    monkeypatch.setattr(core, "_step", lambda *_: None)
    return plan


def real_batch(model: Any, rows: int, length: int) -> dict[str, Any]:
    """A batch of numbers where `example` has none."""
    labels = getattr(model.config, "num_labels", 3) if "Classification" in type(model).__name__ else 64
    made: dict[str, Any] = {}
    for name, value in example(model, rows, length).items():
        if isinstance(value, torch.Tensor):
            whole = not value.is_floating_point()
            value = torch.randint(0, labels, value.shape) if name == "labels" else value
            value = torch.randint(3, 64, value.shape) if name != "labels" and whole else value
            value = torch.randn(value.shape, dtype=value.dtype) if value.is_meta else value
        made[name] = value
    return made


def saved_nbytes(model: Any, batch: dict[str, Any]) -> int:
    """Bytes of the storages that autograd saves in a forward, each once, less parameters and inputs."""
    there = [*model.parameters(), *model.buffers(), *(t for t in batch.values() if isinstance(t, torch.Tensor))]
    own, found = {t.untyped_storage()._cdata for t in there}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(storage.nbytes() for storage in found.values())
    del loss
    return total


def allocated(step: Callable[[], None]) -> tuple[int, int]:
    """The most that `step` holds at once, and all that it asks for, as torch's profiler sees allocations."""
    from torch._C._profiler import _EventType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events, changes = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    live = most = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        live += nbytes
        most = max(most, live)
    return most, sum(nbytes for _, nbytes in changes if nbytes > 0)


# ---- the paper's counts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "r", "parameters"),
    [
        (("q", "v"), 1, 4_718_592),
        (("q", "v"), 2, 9_437_184),
        (("q", "v"), 4, 18_874_368),
        (("q", "v"), 8, 37_748_736),
        (("q", "v"), 64, 301_989_888),
        (("q",), 1, 2_359_296),
    ],
)
def test_gpt3(counted, targets, r, parameters):
    found = counted(gpt3(), LoRAConfig(r=r, target_modules=targets))
    assert found.trainable_parameters == parameters == 2 * 96 * len(targets) * 12288 * r
    assert found.targets == dict.fromkeys(targets, 96)
    assert found.base_parameters == pytest.approx(175e9, rel=0.01)


_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514}


@pytest.mark.parametrize(
    ("config", "r", "parameters"),
    [
        (transformers.RobertaConfig(**_ROBERTA), 8, 294_912),
        (
            transformers.RobertaConfig(
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, **_ROBERTA
            ),
            8,
            786_432,
        ),
        (
            transformers.DebertaV2Config(
                hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144
            ),
            16,
            4_718_592,
        ),
        (transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16), 4, 393_216),
        (transformers.GPT2Config(n_embd=1280, n_layer=36, n_head=20), 4, 737_280),
    ],
    ids=["roberta-base", "roberta-large", "deberta-v2-xxl", "gpt2-medium", "gpt2-large"],
)
def test_the_papers_other_models(counted, config, r, parameters):
    assert counted(config, LoRAConfig(r=r, target_modules=["q", "v"])).trainable_parameters == parameters


# ---- what is then measured -------------------------------------------------------------------------------------------

MIXTRAL = ("MixtralConfig", "MixtralForCausalLM", {**TINY["llama"][2], "num_local_experts": 4})
MEASURED = {
    **{name: (TINY[name], QV) for name in ("llama", "gpt2", "bert-cls", "opt", "t5", "phi3", "llama-cls")},
    "mixtral": (MIXTRAL, QV),
    "vit-cls, all-linear": (TINY["vit-cls"], LoRAConfig(r=2, target_modules="all-linear")),
    "phi3, mlp and o": (TINY["phi3"], LoRAConfig(r=2, target_modules=["mlp", "o"], dropout=0.05)),
    "llama, dropout": (TINY["llama"], LoRAConfig(r=2, target_modules="all-linear", dropout=0.05)),
    "bert, biases": (TINY["bert-cls"], LoRAConfig(r=2, target_modules=["q"], bias="all")),
}


def built(spec: tuple[str, str, dict[str, Any]], **fields: Any) -> Any:
    config = getattr(transformers, spec[0])(**spec[2] | fields)
    return getattr(transformers, spec[1])(config)


@pytest.mark.parametrize("name", MEASURED)
def test_activations_are_what_autograd_saves(name):
    spec, config = MEASURED[name]
    model = built(spec)
    found = plan(model, config, batch=3, length=16)
    model.train().add_lora(config)
    assert found.device == "cpu"
    assert found.activation_bytes == saved_nbytes(model, real_batch(model, 3, 16))
    assert found.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_in_bfloat16_they_are_too():
    model = built(TINY["llama"]).to(torch.bfloat16)
    found = plan(model, QV, batch=3, length=16)
    again = plan(model.config, QV, batch=3, length=16, dtype="bfloat16", device="cpu")
    model.train().add_lora(QV)
    assert found.dtype == again.dtype == "bfloat16"
    assert found.activation_bytes == again.activation_bytes == saved_nbytes(model, real_batch(model, 3, 16))
    # Of head and loss: the logarithms of the probabilities in float32, the labels moved by one, and their weight's sum.
    assert found.loss_bytes == 3 * 16 * (64 * 4 + 8) + 4


@pytest.mark.parametrize(
    ("again", "optimizer", "make"),
    [
        (False, "adamw", torch.optim.AdamW),
        (False, "sgd", torch.optim.SGD),
        (True, torch.optim.Adagrad, torch.optim.Adagrad),
    ],
)
def test_the_peak_is_the_allocators(again, optimizer, make):
    model = built(TINY["llama"], num_hidden_layers=4)
    config = LoRAConfig(r=4, target_modules="all-linear")
    found = plan(model, config, batch=3, length=48, optimizer=optimizer, gradient_checkpointing=again)
    base = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    model.train()
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    model.add_lora(config)
    trained, batch = [p for p in model.parameters() if p.requires_grad], real_batch(model, 3, 48)
    stepper = make(trained, foreach=False)

    def step() -> None:
        model(**batch).loss.backward()
        stepper.step()
        stepper.zero_grad(set_to_none=True)

    step()
    state = sum(t.nbytes for kept in stepper.state.values() for t in kept.values() if isinstance(t, torch.Tensor))
    assert (found.base_bytes, found.optimizer_bytes) == (base, state)
    assert found.trainable_bytes == found.gradient_bytes == sum(p.nbytes for p in trained)
    most, _ = allocated(step)
    assert found.peak_bytes - base - state - found.trainable_bytes == pytest.approx(most, rel=0.01)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_optimizers_state_is_that_of_a_real_one(name):
    net, config = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), LoRAConfig(r=2, target_modules=["0", "1"])
    found = plan(net, config, optimizer=name, inputs={"input": torch.zeros(2, 8)})
    assert found.peak_bytes is not None
    add(net, config)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = NAMES[name](trained)
    net(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert found.optimizer_bytes == sum(t.nbytes for t in kept)


def test_checkpointing_is_cheaper_and_deeper_is_dearer():
    config = transformers.LlamaConfig(**{**TINY["llama"][2], "num_hidden_layers": 4})
    plain, again = (plan(config, QV, length=64, gradient_checkpointing=on) for on in (False, True))
    assert again.activation_bytes < 0.5 * plain.activation_bytes
    assert again.peak_bytes < plain.peak_bytes
    kept = [
        plan(transformers.LlamaConfig(**{**TINY["llama"][2], "num_hidden_layers": n}), QV, length=64).activation_bytes
        for n in (2, 3, 4)
    ]
    assert kept[2] - kept[1] == kept[1] - kept[0] > 0  # each layer keeps the same


def test_an_adapters_dropout_keeps_no_mask_on_any_device():
    config = transformers.OPTConfig(**{**TINY["opt"][2], "dropout": 0.0})
    found = [
        plan(
            config, LoRAConfig(r=2, target_modules=["q", "v"], dropout=p), batch=2, length=32, device=device
        ).activation_bytes
        for p in (0.0, 0.1)
        for device in ("cpu", "cuda")
    ]
    assert found == [pytest.approx(found[0], abs=100)] * 4


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("phi3", QV),
        ("gpt2", LoRAConfig(r=3, target_modules=["q", "v", "mlp"])),
        ("bert-cls", LoRAConfig(r=3, target_modules=["q"], bias="lora_only", task_type="SEQ_CLS")),
        ("llama", LoRAConfig(r=2, target_modules=["embed_tokens", "down"], rank_pattern={"down_proj": 5})),
    ],
)
def test_the_file_to_the_byte(tiny, tmp_path, name, config):
    model = tiny(name)
    found = plan(model, config)
    model.add_lora(config)
    model.save_lora(tmp_path)
    assert found.adapter_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size


# ---- nothing is touched ----------------------------------------------------------------------------------------------


def test_the_model_is_left_alone(tiny):
    model = tiny("llama")
    model.add_lora(QV, "one")
    model.add_lora(LoRAConfig(r=2, target_modules="all-linear"), "two")
    before = {name: (t.clone(), t.requires_grad) for name, t in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    found = plan(model, QV)
    assert found == plan(tiny("llama"), QV)
    assert model.lora_names == ["one", "two"] or tuple(model.lora_names) == ("one", "two")
    assert not model.training
    assert [type(module) for module in model.modules()] == classes
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(t, after[n]) and after[n].requires_grad == on for n, (t, on) in before.items())


def test_nothing_is_allocated():
    config = gpt3(num_hidden_layers=2)
    found = []
    _, asked = allocated(lambda: found.append(plan(config, QV, batch=1, length=2048, dtype="float16")))
    assert found[0].base_bytes > 8e9
    assert found[0].activation_bytes > 5e8
    assert asked < 2**20


def test_a_meta_model_and_its_config_are_the_same_plan():
    config = transformers.GPT2Config(**TINY["gpt2"][2])
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    assert plan(model, QV) == plan(transformers.GPT2Config(**TINY["gpt2"][2], architectures=["GPT2LMHeadModel"]), QV)


def test_any_module_with_a_batch():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor, say: bool = False) -> torch.Tensor:
            if say and float(x.sum()) > 0:
                return x
            return self.second(torch.relu(self.first(x)))

    config = LoRAConfig(r=2, target_modules=["first", "second"])
    inputs = {"x": torch.zeros(5, 8)}
    found = plan(Net(), config, inputs=inputs)
    # The first layer's h, relu's output, the second layer's h. The sum keeps nothing.
    assert found.activation_bytes == 4 * 5 * (2 + 16 + 2)
    assert (found.batch, found.length) == (5, 8)
    with pytest.raises(LoRAConfigError, match="no tensor"):
        plan(Net(), config, inputs={"say": True})
    unknown = plan(Net(), config, inputs={**inputs, "say": True})
    assert (unknown.activation_bytes, unknown.loss_bytes, unknown.peak_bytes) == (None, None, None)
    assert "needs values" in unknown.notes[0]
    assert unknown.trainable_parameters == found.trainable_parameters == 2 * (8 + 16) + 2 * (16 + 4)
    assert "unknown" in str(unknown)


# ---- a budget --------------------------------------------------------------------------------------------------------


def test_table_5(counted):
    """The paper's 18M is that of r=8 on one matrix of each layer."""
    found = counted(gpt3(), budget=18_874_368)
    ranks = {proposal.targets: proposal.r for proposal in found.proposals}
    assert ranks == {
        **{(role,): 8 for role in "qkvo"},
        ("q", "k"): 4,
        ("q", "v"): 4,
        ("q", "k", "v", "o"): 2,
    }
    assert {proposal.parameters for proposal in found.proposals} == {18_874_368}
    assert found.proposals[0].targets == ("q", "k", "v", "o")  # what it finds best
    assert found.lora_config == found.proposals[0].lora_config
    assert found.trainable_parameters == 18_874_368
    smaller = counted(gpt3(), budget=18_000_000)
    assert {p.targets: p.r for p in smaller.proposals}[("q", "v")] == 3
    assert smaller.lora_config.target_modules == ("q", "v")  # all four would have r=1


@pytest.mark.parametrize("name", ["llama", "phi3"])
@settings(max_examples=4, deadline=None)
@given(budget=st.integers(50, 60_000))
def test_a_proposal_is_the_largest_within_the_budget(name, budget):
    spec = TINY[name]
    with torch.device("meta"):
        model = built(spec)
    with torch.device("meta"):
        least = core.propose(built(spec), None, 10**9)
    one = min(proposal.parameters // proposal.r for proposal in least)
    if budget < one:
        with pytest.raises(LoRAConfigError, match=f"{one:,} parameters"):
            core.propose(model, None, budget)
        return
    for proposal in core.propose(model, None, budget):
        assert proposal.parameters <= budget
        assert proposal.parameters == _trained(spec, proposal.lora_config)
        with contextlib.suppress(LoRAConfigError):  # no layer can have more
            assert _trained(spec, proposal.lora_config.replace(r=proposal.r + 1)) > budget


def _trained(spec: Any, config: LoRAConfig) -> int:
    with torch.device("meta"):
        model = built(spec)
    model.add_lora(config)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_budget_keeps_what_the_config_says(tiny):
    model = tiny("bert-cls")
    config = LoRAConfig(target_modules=["v"], layers_to_transform=[1], dropout=0.1, task_type="SEQ_CLS")
    found = plan(model, config, budget=1000)
    head = 32 * 3 + 3
    assert [p.targets for p in found.proposals] == [("v",)]
    assert found.lora_config == config.replace(r=(1000 - head) // 64)
    assert found.trainable_parameters == head + 64 * found.lora_config.r


def test_a_budget_that_is_too_small_says_the_least(tiny):
    with pytest.raises(LoRAConfigError, match="budget=10 is too small: the least that trains here is 96 ") as caught:
        plan(tiny("llama"), budget=10)  # k has 16 rows
    assert caught.value.name == "budget"
    assert plan(tiny("llama"), budget=96).trainable_parameters == 96


def test_a_budget_where_nothing_has_a_role():
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    (only,) = plan(net, budget=200, inputs={"input": torch.zeros(2, 8)}).proposals
    assert (only.targets, only.r, only.parameters) == ("all-linear", 4, 4 * (24 + 20))  # the second layer has 4 rows
    (only,) = core.propose(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 1)), None, 200)
    assert (only.r, only.parameters) == (7, 7 * 24 + 17)  # a layer of one row has the rank that it can


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch": 0}, "batch=0"),
        ({"batch": -2}, "batch=-2"),
        ({"batch": 1.5}, "batch=1.5"),
        ({"length": 0}, "length=0"),
        ({"length": 65}, "more than the 64 positions"),
        ({"optimizer": "adamx"}, "optimizer='adamx' is not known"),
        ({"optimizer": 3}, "optimizer=3"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"dtype": "float33"}, "dtype='float33'"),
        ({"dtype": torch.int64}, "torch.int64"),
        ({"budget": True}, "budget=True"),
        ({"budget": -1}, "budget=-1"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"gradient_checkpointing": 1}, "gradient_checkpointing=1"),
    ],
)
def test_mistakes(arguments, said):
    with pytest.raises(LoRAConfigError) as caught:
        plan(transformers.GPT2Config(**TINY["gpt2"][2]), QV, **arguments)
    assert said in str(caught.value)
    assert caught.value.name == next(iter(arguments))


@pytest.mark.parametrize("source", [3, None, {"hidden_size": 4}, "./no/such/folder"])
def test_what_is_no_model(source):
    with pytest.raises(LoRAConfigError) as caught:
        plan(source, QV)
    assert caught.value.name == "model_or_config"


def test_other_refusals(tiny):
    with pytest.raises(LoRATargetError, match="qq"):
        plan(tiny("llama"), LoRAConfig(target_modules=["qq"]))
    with pytest.raises(LoRATargetError, match="qq"):
        plan(tiny("llama"), LoRAConfig(target_modules=["qq"]), budget=1000)
    model = tiny("llama")
    model.add_lora(QV)
    model.merge_lora()
    with pytest.raises(LoRAStateError, match="merged"):
        plan(model, QV)


def test_longer_than_it_was_made_for(tiny):
    assert plan(tiny("llama"), QV).length == 64  # not 512
    assert "made for" in plan(tiny("llama"), QV, length=80).notes[0]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    config = transformers.GPT2Config(**TINY["gpt2"][2], architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path)
    return tmp_path / "config.json"


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_the_command_reads_a_config_alone(config_file):
    asked = ("--targets", "q,v", "--r", 4, "--batch", 2, "--length", 16, "--optimizer", "sgd", "--dtype", "bfloat16")
    told = run(config_file, *asked, "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    expected = plan(str(config_file.parent), QV, batch=2, length=16, optimizer="sgd", dtype="bfloat16")
    assert set(found) == {"format", *TrainingPlan.__dataclass_fields__}
    for name in ("trainable_parameters", "adapter_bytes", "activation_bytes", "peak_bytes", "dtype", "targets"):
        assert found[name] == getattr(expected, name)
    assert LoRAConfig.from_peft(found["lora_config"]).r == 4
    said = run(config_file.parent, *asked)
    assert said.exit_code == 0, said.output
    assert f"{expected.peak_bytes:,} bytes" in said.output


def test_the_command_with_a_budget(config_file):
    told = run(config_file, "--budget", 3000, "--length", 8, "--json")
    found = json.loads(told.stdout)
    assert found["trainable_parameters"] == found["proposals"][0]["parameters"] <= 3000
    assert "within the budget" in run(config_file, "--budget", 3000, "--length", 8).output
    for arguments in (("--budget", 10), ("--budget", 3000, "--r", 4), ("--optimizer", "adamx"), ("--device", "tpu")):
        assert run(config_file, *arguments).exit_code == 2
    assert run(config_file.parent / "nothing.json").exit_code == 2


def test_what_the_page_says_was_measured():
    data = json.loads(
        (Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "planning.json").read_text("utf-8")
    )
    assert data["rows"]
    for row in data["rows"]:
        predicted, measured = row["predicted"], row["measured"]
        for name in ("trainable parameters", "adapter file", "base", "optimizer state"):
            assert predicted[name] == measured[name]
        for name in ("activations", "peak", "peak, process"):
            assert measured[name] is None or predicted[name] == pytest.approx(measured[name], rel=0.1)
    assert data["gpt3"]["seconds"] < 5
    assert data["gpt3"]["process"] < 2e9


def test_it_is_exported_late():
    assert hf_lora.plan is plan
