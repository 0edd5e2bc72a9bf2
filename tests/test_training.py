"""`optimizer_groups`, and what `LoRACallback` records, merges and pushes."""

from __future__ import annotations

import copy
import html
import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import bits, logits, randomise

import hf_lora
from hf_lora import (
    LoRACallback,
    LoRAConfig,
    LoRAConfigError,
    LoRAMismatchError,
    LoRANameError,
    LoRAStateError,
    LoRAUnsupportedError,
    optimizer_groups,
)

pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")


def rows(n: int = 16) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 64, (n, 9), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model: Any, folder: Path, *callbacks: Any, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    given = {k: options.pop(k) for k in ("optimizer_cls_and_kwargs", "processing_class") if k in options}
    fixed: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    arguments = TrainingArguments(str(folder), **{**fixed, **options})
    data = {"train_dataset": rows(), "eval_dataset": rows(8)}
    return Trainer(model, arguments, callbacks=list(callbacks), **data, **given)


def with_lora(tiny: Any, name: str = "task", **options: Any) -> Any:
    model = tiny("llama")
    model.config._name_or_path = "org/base"
    torch.manual_seed(3)
    model.add_lora(LoRAConfig(**{"r": 4, "target_modules": ["q", "v"], "alpha": 8, **options}), name)
    return model


# ---- optimizer_groups ------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {"target_modules": ["q", "down"], "bias": "all", "modules_to_save": ["classifier"]}


def kinds(model: Any, **options: Any) -> dict[str, tuple[float, float]]:
    """Parameter's path → (rate, weight decay)."""
    paths = {id(p): path for path, p in model.named_parameters()}
    groups = optimizer_groups(model, 1e-3, b_lr_ratio=16, weight_decay=0.1, **options)
    found = {paths[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    return found


@pytest.mark.parametrize("name", ["default", "unbiased", "layernorm", "B0", "norm.bias"])
def test_groups_go_by_what_a_parameter_is_whatever_the_adapter_is_called(tiny: Any, name: str) -> None:
    model = tiny("bert-cls")
    model.add_lora(LoRAConfig(r=4, **EVERYTHING), name)
    found = kinds(model)
    assert found.keys() == {path for path, p in model.named_parameters() if p.requires_grad}
    for path, pair in found.items():
        last, shape = path.rpartition(".")[2], model.get_parameter(path).shape
        if ".lora_slots." in path and len(shape) == 2:
            assert pair == ((1e-3, 0.1) if last.startswith("A") else (0.016, 0.1)), path
        elif len(shape) == 2:
            assert path.endswith("weight")
            assert pair == (1e-3, 0.1), path
        else:
            assert pair == (0.016, 0.0), path
    assert set(found.values()) == {(1e-3, 0.1), (0.016, 0.1), (0.016, 0.0)}


def test_norms_of_a_head_get_no_decay(tiny: Any) -> None:
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=4, target_modules=["q"], modules_to_save=["norm", "lm_head"]))
    found = kinds(model)
    decay = {path.rpartition("copies.0.")[0]: pair[1] for path, pair in found.items() if ".lora_heads." in path}
    assert decay.pop("lm_head.lora_heads.") == 0.1
    assert "model.norm.lora_heads." in decay
    assert set(decay.values()) == {0.0}


def test_embeddings_may_have_a_rate_of_their_own(tiny: Any) -> None:
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=4, target_modules=["q", "embed_tokens"]))
    apart = {path: pair[0] for path, pair in kinds(model, embedding_lr=1e-6).items()}
    assert {rate for path, rate in apart.items() if "embed_tokens" in path} == {1e-6}
    assert {rate for path, rate in apart.items() if "q_proj" in path} == {1e-3, 0.016}
    together = {path: pair[0] for path, pair in kinds(model).items()}
    assert {rate for path, rate in together.items() if "embed_tokens" in path} == {1e-3, 0.016}


def test_what_trains_outside_of_adapters_is_not_forgotten(tiny: Any) -> None:
    model = with_lora(tiny)
    model.model.norm.weight.requires_grad_(True)
    assert kinds(model)["model.norm.weight"] == (0.016, 0.0)


def test_only_what_trains_is_given(tiny: Any) -> None:
    model = with_lora(tiny, "first")
    model.add_lora(LoRAConfig(r=2, target_modules=["k"]), "second")  # the first is frozen now
    assert all("k_proj" in path for path in kinds(model))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": 0},
        {"lr": -1e-3},
        {"lr": math.nan},
        {"lr": math.inf},
        {"lr": True},
        {"lr": "1e-3"},
        {"b_lr_ratio": 0},
        {"b_lr_ratio": -2},
        {"b_lr_ratio": math.nan},
        {"weight_decay": -0.1},
        {"weight_decay": math.nan},
        {"embedding_lr": 0.0},
    ],
    ids=str,
)
def test_groups_refuse_rates_that_are_none(tiny: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(LoRAConfigError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))!r}"):
        optimizer_groups(with_lora(tiny), **{"lr": 1e-3, **wrong})


def test_groups_refuse_a_model_on_which_no_adapter_trains(tiny: Any) -> None:
    with pytest.raises(LoRAStateError, match="has no LoRA"):
        optimizer_groups(tiny("llama"), 1e-3)
    model = with_lora(tiny)
    model.train_lora([])
    with pytest.raises(LoRAStateError, match="No adapter on this LlamaForCausalLM trains"):
        optimizer_groups(model, 1e-3)
    model.model.norm.weight.requires_grad_(True)  # this alone would be a mistake
    with pytest.raises(LoRAStateError, match="No adapter"):
        optimizer_groups(model, 1e-3)


def test_groups_are_those_of_pefts_loraplus(tiny: Any, peft: Any) -> None:
    from peft.optimizers import create_loraplus_optimizer

    theirs = peft.get_peft_model(
        tiny("bert-cls"),
        peft.LoraConfig(
            r=4, target_modules=["query", "output.dense", "word_embeddings"], modules_to_save=["classifier"], bias="all"
        ),
    )
    optimizer = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, loraplus_lr_embedding=5e-5
    )
    names = {id(p): name for name, p in theirs.named_parameters()}
    expected = sorted(
        (tuple(p.shape), group["lr"], group["weight_decay"], "word_embeddings" in names[id(p)])
        for group in optimizer.param_groups
        for p in group["params"]
    )
    model = tiny("bert-cls")
    config = LoRAConfig(
        r=4,
        target_modules=["query", "output.dense", "word_embeddings"],
        modules_to_save=["classifier"],
        bias="all",
    )
    model.add_lora(config)
    paths = {id(p): path for path, p in model.named_parameters()}
    groups = optimizer_groups(model, 1e-3, b_lr_ratio=16, weight_decay=0.1, embedding_lr=5e-5)
    found = sorted(
        (tuple(p.shape), group["lr"], group["weight_decay"], "word_embeddings" in paths[id(p)])
        for group in groups
        for p in group["params"]
    )
    assert found == expected


def test_groups_in_a_plain_loop_move_by_their_rates(tiny: Any) -> None:
    """One step of SGD: the change of a factor is rate × gradient."""
    model = with_lora(tiny)
    randomise(model)
    optimizer = torch.optim.SGD(optimizer_groups(model, 1e-2, b_lr_ratio=8))
    model(**{k: v[None] for k, v in rows(1)[0].items()}).loss.backward()
    before = {path: p.detach().clone() for path, p in model.named_parameters() if p.requires_grad}
    grads = {path: p.grad.clone() for path, p in model.named_parameters() if p.requires_grad}
    optimizer.step()
    for path, old in before.items():
        rate = 8e-2 if path.rpartition(".")[2].startswith("B") else 1e-2
        torch.testing.assert_close(model.get_parameter(path).detach(), old - rate * grads[path])


def test_trainer_takes_the_groups_and_resumes_with_both_rates(tiny: Any, tmp_path: Path) -> None:
    def run(model: Any, folder: Path, **options: Any) -> Any:
        groups = optimizer_groups(model, 1e-2, b_lr_ratio=4, weight_decay=0.1)
        kind = (torch.optim.AdamW, {"params": groups, "lr": 1e-2})
        return trainer(model, folder, optimizer_cls_and_kwargs=kind, lr_scheduler_type="linear", max_steps=6, **options)

    model = with_lora(tiny)
    whole = run(model, tmp_path / "whole")
    rates = []
    whole.add_callback(_Rates(rates))
    whole.train()
    assert [round(b / a, 9) for a, b in rates[:-1]] == [4.0] * 5  # the schedule scales both
    assert [a for a, _ in rates] == pytest.approx([1e-2 * (6 - k) / 6 for k in range(1, 7)])
    again = with_lora(tiny)
    resumed = run(again, tmp_path / "again")
    later: list[tuple[float, float]] = []
    resumed.add_callback(_Rates(later))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert later == rates[2:]
    assert bits(again) == bits(model)


def _Rates(into: list[tuple[float, float]]) -> Any:
    from transformers import TrainerCallback

    class Rates(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            into.append(tuple(group["lr"] for group in kwargs["optimizer"].param_groups))

    return Rates()


# ---- what the callback refuses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"push_best": "a/b/c"},
        {"push_best": "me/ta sk"},
        {"push_best": ""},
        {"push_best": 3},
        {"push_best": "me/task", "push_options": {"privat": True}},
        {"push_options": {"private": True}},
        {"merge_at_end": ""},
        {"merge_at_end": 3},
        {"datasets": "not an id"},
    ],
    ids=str,
)
def test_arguments_that_could_not_work_are_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(LoRAConfigError):
        LoRACallback(**wrong)


def test_folders_that_cannot_take_a_merged_model_are_refused(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoRAConfigError, match="is a file"):
        LoRACallback(merge_at_end=tmp_path / "file")
    with_lora(tiny).save_lora(tmp_path / "adapter")
    with pytest.raises(LoRAConfigError, match="take it for an adapter"):
        LoRACallback(merge_at_end=tmp_path / "adapter")
    run = trainer(with_lora(tiny), tmp_path / "out", LoRACallback(merge_at_end=tmp_path / "out"))
    with pytest.raises(LoRAConfigError, match="output_dir"):
        run.train()


def test_push_options_are_what_the_verb_takes() -> None:
    from hf_lora.training import _PUSH_OPTIONS

    verb = inspect.signature(hf_lora.push_adapter_to_hub)
    assert set(verb.parameters) - {"model", "repo_id"} == _PUSH_OPTIONS


def test_a_model_on_which_nothing_trains_is_refused_before_the_first_step(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(LoRAStateError, match="no adapter on this LlamaForCausalLM trains"):
        trainer(model, tmp_path, LoRACallback()).train()


def test_merging_what_cannot_be_merged_is_refused_before_the_first_step(tiny: Any, tmp_path: Path) -> None:
    model = with_lora(tiny)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    run = trainer(model, tmp_path / "out", LoRACallback(merge_at_end=tmp_path / "merged"))
    with pytest.raises(LoRAUnsupportedError, match="cannot merge into"):
        run.train()
    model = with_lora(tiny)
    model.set_lora(None)
    run = trainer(model, tmp_path / "out", LoRACallback(merge_at_end=tmp_path / "merged"))
    with pytest.raises(LoRAStateError, match="no adapter is active"):
        run.train()


def test_merging_a_tied_weight_is_refused_before_the_first_step(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama-tied")
    model.add_lora(LoRAConfig(r=2, target_modules=["q", "embed_tokens"]))
    run = trainer(model, tmp_path / "out", LoRACallback(merge_at_end=tmp_path / "merged"))
    with pytest.raises(LoRAUnsupportedError, match="tied to lm_head"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize("end", [{"push_best": "me/task"}, {"merge_at_end": "merged"}], ids=str)
def test_a_search_would_leave_its_last_trial_and_is_refused(tiny: Any, tmp_path: Path, end: dict[str, Any]) -> None:
    """`Trainer.hyperparameter_search` needs a backend, which is not installed; its trials say so in the state."""
    from transformers import TrainerControl, TrainerState

    callback, run = LoRACallback(**end), trainer(with_lora(tiny), tmp_path)
    callback.on_train_begin(run.args, TrainerState(), TrainerControl(), model=run.model)
    with pytest.raises(LoRAUnsupportedError, match="hyperparameter search"):
        callback.on_train_begin(run.args, TrainerState(is_hyper_param_search=True), TrainerControl(), model=run.model)


# ---- facts -----------------------------------------------------------------------------------------------------------


def test_the_facts_of_a_run_are_kept_on_what_trained(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=2, target_modules=["down"]), "frozen")
    model.add_lora(LoRAConfig(r=4, target_modules=["q", "v"]), "task")
    options = {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2, "warmup_steps": 1}
    run = trainer(
        model,
        tmp_path,
        LoRACallback(datasets=["me/data"]),
        **options,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    run.train()
    facts = model._lora_state.entry("task").record.run
    assert model._lora_state.entry("frozen").record.run is None
    history = run.state.log_history
    assert facts.steps == 4
    assert facts.losses == tuple((e["step"], e["loss"]) for e in history if "loss" in e)
    assert [step for step, _ in facts.evaluations] == [2, 4]
    assert facts.best == (
        "eval_loss",
        next(e["eval_loss"] for e in history if e.get("step") == 2 and "eval_loss" in e),
        2,
    )
    assert facts.seconds == next(e["train_runtime"] for e in history if "train_runtime" in e)
    assert facts.trainable == 2 * (4 * (32 + 32) + 4 * (32 + 16))  # q: 32 → 32, v: 32 → 16, two layers
    assert facts.total == sum(p.numel() for p in tiny("llama").parameters())
    expected = {"learning_rate": 1e-2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "seed": 5}
    assert {key: facts.settings[key] for key in expected} == expected
    assert facts.settings["optim"] == "AdamW"
    assert (
        facts.versions["torch"] == torch.__version__.partition("+")[0] or facts.versions["torch"] == torch.__version__
    )
    assert facts.datasets == ("me/data",)
    json.dumps(vars(facts), default=dict)
    assert str(tmp_path) not in str(facts)


def test_facts_are_there_at_every_save_too(tiny: Any, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    seen = []

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(kwargs["model"]._lora_state.entry("task").record.run.steps)

    trainer(with_lora(tiny), tmp_path, LoRACallback(), Look()).train()
    assert seen == [2, 4]


def test_the_rates_are_the_optimizers_own(tiny: Any, tmp_path: Path) -> None:
    model = with_lora(tiny)
    kind = (torch.optim.AdamW, {"params": optimizer_groups(model, 2e-3, b_lr_ratio=16, weight_decay=0.1), "lr": 2e-3})
    trainer(model, tmp_path, LoRACallback(), optimizer_cls_and_kwargs=kind, max_steps=1).train()
    settings = model._lora_state.entry("task").record.run.settings
    assert settings["learning_rate"] == "0.002, 0.032"
    assert settings["weight_decay"] == 0.1


def test_a_resumed_run_does_not_call_its_second_half_its_time(tiny: Any, tmp_path: Path) -> None:
    trainer(with_lora(tiny), tmp_path, LoRACallback()).train()
    model = with_lora(tiny)
    trainer(model, tmp_path / "again", LoRACallback()).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    facts = model._lora_state.entry("task").record.run
    assert facts.seconds is None
    assert [step for step, _ in facts.losses] == [1, 2, 3, 4]


def test_datasets_that_were_loaded_from_the_hub_are_found(tiny: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    url = "hf://datasets/stanfordnlp/imdb@e6281661ce1c48d982bc483cf8a173c1bbeb5d31/plain_text/train.parquet"
    info = datasets.DatasetInfo(download_checksums={url: {"num_bytes": 1, "checksum": None}})
    data = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in rows()])
    data._info.update(info)
    model = with_lora(tiny)
    run = trainer(model, tmp_path, LoRACallback(), max_steps=1)
    run.train_dataset = data.with_format("torch")
    run.train()
    assert model._lora_state.entry("task").record.run.datasets == ("stanfordnlp/imdb",)


# ---- the end ---------------------------------------------------------------------------------------------------------


def test_merge_at_end_writes_a_standalone_model_and_leaves_the_adapter_as_it_was(tiny: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the first is "best"
    plain = with_lora(tiny)
    trainer(plain, tmp_path / "plain", **best).train()
    model = with_lora(tiny)
    callback = LoRACallback(merge_at_end=tmp_path / "merged")
    trainer(model, tmp_path / "out", callback, processing_class=tokenizer(), **best).train()
    assert bits(model) == bits(plain)
    assert [m.training for m in model.modules()] == [m.training for m in plain.modules()]
    assert model.active_lora == "task"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not hasattr(merged, "_lora_state")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    inputs = {"input_ids": rows(1)[0]["input_ids"][None]}
    model.eval()
    # the oracle: W + ΔW by hand, of the adapter that is best and not last
    other = tiny("llama")
    for path, factors in _factors(model):
        other.get_submodule(path).weight.data += factors.delta()
    torch.testing.assert_close(logits(merged, inputs), logits(other, inputs))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "w0"
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def _factors(model: Any) -> Any:
    from hf_lora.model import read

    return read(model, "task").factors.items()


def tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")


class Pushed:
    """Stands in for the push verb: what it was called with, and the adapter's tensors at that time."""

    def __init__(self, monkeypatch: Any, error: Exception | None = None) -> None:
        from transformers import PreTrainedModel

        self.calls: list[tuple[str, dict[str, Any], dict[str, torch.Tensor]]] = []
        pushed = self

        def push_adapter_to_hub(self: Any, repo_id: str, **options: Any) -> None:
            if error is not None:
                raise error
            pushed.calls.append((repo_id, options, self.lora_state_dict(options["adapter"])))

        monkeypatch.setattr(PreTrainedModel, "push_adapter_to_hub", push_adapter_to_hub, raising=False)


@pytest.mark.parametrize("loads_best", [True, False])
def test_push_best_pushes_the_best_and_not_the_last(
    tiny: Any, tmp_path: Path, monkeypatch: Any, loads_best: bool
) -> None:
    from safetensors.torch import load_file

    pushed = Pushed(monkeypatch)
    model = with_lora(tiny)
    run = trainer(
        model,
        tmp_path,
        LoRACallback(push_best="me/task", push_options={"private": True}),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=loads_best,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls, so the first is "best"
    )
    run.train()
    ((repo_id, options, tensors),) = pushed.calls
    assert (repo_id, options) == ("me/task", {"adapter": "task", "private": True})
    best, last = (load_file(tmp_path / f"checkpoint-{k}" / "adapter_model.safetensors") for k in (2, 4))
    assert all(torch.equal(tensors[key], best[key]) for key in best)
    assert not all(torch.equal(best[key], last[key]) for key in best)
    after = model.lora_state_dict("task")
    assert all(torch.equal(after[key], (best if loads_best else last)[key]) for key in best)


def test_push_best_without_evaluation_pushes_the_last(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pushed = Pushed(monkeypatch)
    model = with_lora(tiny)
    trainer(model, tmp_path, LoRACallback(push_best="me/task")).train()
    ((_, _, tensors),) = pushed.calls
    after = model.lora_state_dict("task")
    assert all(torch.equal(tensors[key], after[key]) for key in after)


STALE = "pushes checkpoint-2: the best evaluation was at step 3"  # which is not among those saved, 2 and 4


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2}, "will push the last"),
        ({"metric_for_best_model": "eval_loss", "eval_strategy": "steps", "save_strategy": "no"}, "will push the last"),
        ({"metric_for_best_model": "eval_loss", "eval_strategy": "steps", "eval_steps": 1}, STALE),
        ({"metric_for_best_model": "eval_loss", "eval_strategy": "steps", "eval_steps": 2}, ""),
        ({}, ""),
    ],
)
def test_where_what_is_pushed_is_not_the_best_it_says_so(
    tiny: Any, tmp_path: Path, monkeypatch: Any, caplog: Any, options: dict[str, Any], warned: str
) -> None:
    pushed = Pushed(monkeypatch)
    run = trainer(with_lora(tiny), tmp_path, LoRACallback(push_best="me/task"), greater_is_better=False, **options)
    if warned == STALE:
        monkeypatch.setattr(run, "evaluate", lambda **_: _evaluated(run, {1: 4.0, 2: 3.0, 3: 1.0, 4: 2.0}))
    run.train()
    assert len(pushed.calls) == 1
    messages = [record.getMessage() for record in caplog.records if record.name == "hf_lora.training"]
    assert [warned in message for message in messages] == ([True] if warned else [])


def _evaluated(run: Any, losses: dict[int, float]) -> dict[str, float]:
    metrics = {"eval_loss": losses[run.state.global_step]}
    run.log(metrics)
    return metrics


def test_no_adapter_named_means_the_one_that_trains(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pushed = Pushed(monkeypatch)
    model = with_lora(tiny)
    model.add_lora(LoRAConfig(r=2, target_modules=["k"]), "second")
    model.set_lora(["task", "second"])
    trainer(model, tmp_path, LoRACallback(push_best="me/x", push_options={"adapter": None}), max_steps=1).train()
    assert pushed.calls[0][1]["adapter"] == "second"


def test_an_interrupted_merge_publishes_nothing(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pushed = Pushed(monkeypatch)
    model = with_lora(tiny)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    callback = LoRACallback(push_best="me/task", merge_at_end=tmp_path / "merged")
    monkeypatch.setattr(callback, "_merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path / "out", callback, max_steps=1).train()
    assert not pushed.calls


def test_a_callback_lets_go_of_its_model(tiny: Any, tmp_path: Path) -> None:
    import gc
    import weakref

    callback = LoRACallback()
    run = trainer(with_lora(tiny), tmp_path, callback, max_steps=1)
    run.train()
    model = weakref.ref(run.model)
    del run
    gc.collect()
    assert model() is None


def test_of_several_adapters_push_best_needs_a_name(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pushed = Pushed(monkeypatch)
    model = with_lora(tiny)
    model.add_lora(LoRAConfig(r=2, target_modules=["k"]), "second")
    model.train_lora(["task", "second"])
    with pytest.raises(LoRANameError, match="2 adapters train"):
        trainer(copy.deepcopy(model), tmp_path, LoRACallback(push_best="me/x")).train()
    with pytest.raises(LoRANameError, match="No adapter 'third'"):
        trainer(
            copy.deepcopy(model), tmp_path, LoRACallback(push_best="me/x", push_options={"adapter": "third"})
        ).train()
    trainer(model, tmp_path, LoRACallback(push_best="me/x", push_options={"adapter": "second"})).train()
    assert [options["adapter"] for _, options, _ in pushed.calls] == ["second"]


def test_a_run_pushed_to_a_hub_loads_elsewhere_and_its_card_tells_of_the_run(
    tiny: Any, tmp_path: Path, request: Any
) -> None:
    pytest.importorskip("uvicorn", reason="uvicorn is not installed: install hf_lora[test]")
    hub = request.getfixturevalue("hub")
    model = with_lora(tiny)
    callback = LoRACallback(push_best="me/task", datasets=["lab/corpus"])
    run = trainer(model, tmp_path / "out", callback, save_strategy="no")
    run.train()
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} == set(hub.files("me/task"))
    card = hub.files("me/task")["README.md"].decode()
    assert "lab/corpus" in card
    assert "| learning_rate | `0.01` |" in html.unescape(card)
    assert str(tmp_path) not in card
    other = tiny("llama")
    other.config._name_or_path = "org/base"
    other.load_lora("me/task")
    found, expected = other.lora_state_dict(), model.lora_state_dict("task")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_base_without_an_id_is_asked_for_before_the_first_step(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pushed = Pushed(monkeypatch)
    model = tiny("llama")
    model.config._name_or_path = str(tmp_path)
    model.add_lora(LoRAConfig(r=4, target_modules=["q"]), "task")
    with pytest.raises(LoRAMismatchError, match="base_model="):
        trainer(model, tmp_path, LoRACallback(push_best="me/task")).train()
    named = LoRACallback(push_best="me/task", push_options={"base_model": "org/base"})
    trainer(model, tmp_path, named, max_steps=1).train()
    assert pushed.calls[0][1] == {"adapter": "task", "base_model": "org/base"}


def test_a_failure_at_the_end_loses_nothing_and_says_where_the_adapter_is(
    tiny: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    pushed = Pushed(monkeypatch, error=ConnectionError("no route to host"))
    model = with_lora(tiny)
    callback = LoRACallback(push_best="me/task", merge_at_end=tmp_path / "merged")
    with pytest.raises(LoRAStateError, match=r"(?s)adapter is saved in .*no route to host.*load_lora") as caught:
        trainer(model, tmp_path / "out", callback, save_strategy="no").train()
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert not pushed.calls
    assert (tmp_path / "merged" / "model.safetensors").exists()  # the other step was done
    other = tiny("llama")
    other.load_lora(tmp_path / "out", name="task")
    found, expected = other.lora_state_dict("task"), model.lora_state_dict("task")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_if_merging_fails_it_still_pushes_and_the_model_is_whole(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pushed = Pushed(monkeypatch)
    model = with_lora(tiny)
    callback = LoRACallback(push_best="me/task", merge_at_end=tmp_path / "merged")
    run = trainer(model, tmp_path / "out", callback)
    (tmp_path / "merged").write_text("in the way since")
    with pytest.raises(LoRAStateError, match="merging it failed"):
        run.train()
    assert len(pushed.calls) == 1
    plain = with_lora(tiny)
    trainer(plain, tmp_path / "plain").train()
    assert bits(model) == bits(plain)
    assert model._lora_state.merged is None


def test_only_the_first_process_writes(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pushed = Pushed(monkeypatch)
    model = with_lora(tiny)
    run = trainer(model, tmp_path / "out", LoRACallback(push_best="me/x", merge_at_end=tmp_path / "merged"))
    run.state.is_world_process_zero = False
    run.is_world_process_zero = lambda: False
    run.train()
    assert not pushed.calls
    assert not (tmp_path / "merged").exists()
    assert model._lora_state.entry("task").record.run.steps == 4
