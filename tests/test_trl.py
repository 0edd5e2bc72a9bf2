"""TRL's SFTTrainer and DPOTrainer, stock and unsubclassed, given a model with our LoRA."""

from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import bits, randomise
from torch.nn.functional import log_softmax

import hf_lora
from hf_lora import LoRAConfig, LoRANameError, LoRAStateError, LoRAUnsupportedError
from hf_lora.integrations import trl as integration
from hf_lora.reference import ReferenceModel

pytest.importorskip("trl", reason="trl is not installed: install hf_lora[test]")

TEXTS = [f"w{i} w{i + 3} w{2 * i} w{i + 7} w{i + 11} w5 w6" for i in range(3, 19)]
FIXED: dict[str, Any] = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_steps": 2,
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "seed": 5,
    "max_length": 16,
}


def tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")


def with_lora(tiny: Any, **options: Any) -> Any:
    model = tiny("llama")
    torch.manual_seed(3)
    model.add_lora(LoRAConfig(**{"r": 4, "target_modules": ["q", "v"], "alpha": 8, **options}), "task")
    return model


def sft(model: Any, folder: Path, data: Any = None, **options: Any) -> Any:
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = data or [{"text": text} for text in TEXTS]
    return SFTTrainer(
        model,
        args=SFTConfig(str(folder), **{**FIXED, **options}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def dpo(model: Any, folder: Path, ref_model: Any = None, **options: Any) -> Any:
    import datasets
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w{i + 3}", "rejected": f" w{i + 9} w4 w{i + 5}"}
        for i in range(3, 19)
    ]
    return DPOTrainer(
        model,
        ref_model,
        args=DPOConfig(str(folder), **{**FIXED, **options}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


# ---- SFT -------------------------------------------------------------------------------------------------------------


def test_sft_trains_the_adapter_alone_and_resumes_bit_by_bit(tiny: Any, tmp_path: Path) -> None:
    base = bits(tiny("llama"))
    model = with_lora(tiny, dropout=0.1)
    whole = sft(model, tmp_path / "whole")
    whole.train()
    assert len(set(losses(whole))) == 4
    assert {key: value for key, value in bits(model).items() if "lora_" not in key} == base
    folder = tmp_path / "whole" / "checkpoint-2"
    assert {p.name for p in folder.iterdir() if "model" in p.name} == {"adapter_model.safetensors"}
    again = with_lora(tiny, dropout=0.1)
    resumed = sft(again, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(folder))
    assert losses(resumed) == losses(whole)
    assert bits(again) == bits(model)


def test_sfts_first_loss_is_that_of_the_model(tiny: Any, tmp_path: Path) -> None:
    """TRL computes the loss with a head of its own: it must see the adapter."""
    model = with_lora(tiny)
    randomise(model)
    other = copy.deepcopy(model)  # before TRL puts a forward of its own on the model
    run = sft(model, tmp_path, data=[{"text": TEXTS[0]}] * 4, max_steps=1)
    run.train()
    ids = torch.tensor([run.train_dataset[0]["input_ids"]])
    with torch.no_grad():
        expected = float(other(input_ids=ids, labels=ids).loss)
        with other.no_lora():
            without = float(other(input_ids=ids, labels=ids).loss)
    assert losses(run)[0] == pytest.approx(expected, rel=1e-5)
    assert losses(run)[0] != pytest.approx(without, rel=1e-3)


def test_only_completions_count_where_trl_says_so(tiny: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "w3 w4 w5", "completion": " w6 w7"}] * 4
    model = with_lora(tiny)
    randomise(model)
    other = copy.deepcopy(model)
    run = sft(model, tmp_path, data=rows, max_steps=1)
    run.train()
    ids = torch.tensor([[3, 4, 5, 6, 7, 2]])
    labels = torch.tensor([[-100, -100, -100, 6, 7, 2]])
    with torch.no_grad():
        assert losses(run)[0] == pytest.approx(float(other(input_ids=ids, labels=labels).loss), rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"packing": True, "packing_strategy": "wrapped"},
        {"neftune_noise_alpha": 5.0},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": False},
        {"bf16": True},
    ],
    ids=str,
)
def test_sfts_options_reach_every_factor(tiny: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    model = with_lora(tiny)
    before = model.lora_state_dict("task")
    run = sft(model, tmp_path, **options)
    run.train()
    after = model.lora_state_dict("task")
    assert all(not torch.equal(after[key], before[key]) for key in after)
    assert all(map(math.isfinite, losses(run)))


def test_neftune_changes_the_loss_and_is_gone_afterwards(tiny: Any, tmp_path: Path) -> None:
    plain, noisy = with_lora(tiny), with_lora(tiny)
    run, noise = (
        sft(plain, tmp_path / "a", max_steps=1),
        sft(noisy, tmp_path / "b", max_steps=1, neftune_noise_alpha=50.0),
    )
    run.train()
    noise.train()
    assert losses(run) != losses(noise)
    hooks = [len(model.get_input_embeddings()._forward_hooks) for model in (plain, noisy)]
    assert hooks[0] == hooks[1]


def test_the_callbacks_numbers_reach_trls_log(tiny: Any, tmp_path: Path) -> None:
    model = with_lora(tiny)
    run = sft(model, tmp_path, max_steps=1)
    run.add_callback(hf_lora.LoRACallback())
    run.train()
    log = run.state.log_history[0]
    assert {"lora/delta_norm/q", "lora/effective_rank/v", "lora/grad_norm", "mean_token_accuracy"} <= log.keys()
    assert log["lora/grad_norm"] == log["grad_norm"]


@pytest.mark.parametrize("options", [{"target_modules": ["q", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_an_adapter_on_the_head_that_trl_would_bypass_is_refused(tiny: Any, tmp_path: Path, options: Any) -> None:
    for trainer in (sft, dpo):
        with pytest.raises(LoRAUnsupportedError, match="lm_head: TRL multiplies by its weight"):
            trainer(with_lora(tiny, **options), tmp_path)


# ---- DPO -------------------------------------------------------------------------------------------------------------


def logp(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """log p(completion | prompt), (rows,), by the definition."""
    ids, mask = batch["input_ids"], batch["completion_mask"]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    each = log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
    return (each * mask[:, 1:]).sum(1)


def dpo_loss(policy: Any, base: Any, batch: dict[str, torch.Tensor], beta: float = 0.1) -> float:
    """−log σ(β(Δ_policy − Δ_base)), Rafailov et al. 2023, equation 7."""
    with torch.no_grad():
        (pc, pr), (rc, rr) = logp(policy, batch).chunk(2), logp(base, batch).chunk(2)
        return float(-torch.nn.functional.logsigmoid(beta * ((pc - pr) - (rc - rr))).mean())


def batches(run: Any) -> list[dict[str, torch.Tensor]]:
    return [dict(batch) for batch in run.get_train_dataloader()]


@pytest.mark.parametrize("precompute", [False, True])
def test_dpos_reference_is_the_same_base_without_the_adapter(tiny: Any, tmp_path: Path, precompute: bool) -> None:
    """The adapter is not zero at the start, so that a reference with it would give ln 2."""
    model = with_lora(tiny)
    randomise(model)
    start = copy.deepcopy(model)
    run = dpo(model, tmp_path, precompute_ref_log_probs=precompute, max_steps=1, beta=0.5)
    assert isinstance(run.ref_model, ReferenceModel)
    assert run.ref_model.model is model
    seen: list[Any] = []
    collate = run.data_collator
    run.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    run.train()
    expected = dpo_loss(start, tiny("llama"), seen[0], beta=0.5)
    assert losses(run)[0] == pytest.approx(expected, rel=1e-5)
    assert abs(expected - math.log(2)) > 1e-2


def test_dpo_equals_dpo_with_a_real_second_copy_step_by_step(tiny: Any, tmp_path: Path) -> None:
    shared, copied = with_lora(tiny), with_lora(tiny)
    one, two = dpo(shared, tmp_path / "one"), dpo(copied, tmp_path / "two", ref_model=tiny("llama"))
    assert not isinstance(two.ref_model, ReferenceModel)
    one.train()
    two.train()
    assert losses(one) == losses(two)
    assert bits(shared) == bits(copied)
    ours, theirs = ([entry for entry in run.state.log_history if "loss" in entry][-1] for run in (one, two))
    assert ours["rewards/margins"] == theirs["rewards/margins"]


def test_kto_equals_kto_with_a_real_second_copy_and_holds_none(tiny: Any, tmp_path: Path) -> None:
    import datasets
    from trl import KTOConfig, KTOTrainer

    rows = [{"prompt": f"w{i}", "completion": f" w{i + 2} w{i + 3}", "label": i % 2 == 0} for i in range(3, 19)]
    found = []
    for reference in (None, tiny("llama")):
        run = KTOTrainer(
            model := with_lora(tiny),
            reference,
            args=KTOConfig(str(tmp_path), **FIXED),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer(),
        )
        run.train()
        found.append((losses(run), bits(model)))
        assert isinstance(run.ref_model, ReferenceModel) == (reference is None)
    assert found[0] == found[1]
    assert found[0][0][-1] != found[0][0][0]


def test_dpo_holds_no_second_copy(tiny: Any, tmp_path: Path) -> None:
    model = with_lora(tiny)
    run = dpo(model, tmp_path)
    assert {id(p) for p in run.ref_model.parameters()} == {id(p) for p in model.parameters()}


def test_dpo_checkpoints_hold_the_adapter_alone_and_resume_bit_by_bit(tiny: Any, tmp_path: Path) -> None:
    model = with_lora(tiny)
    whole = dpo(model, tmp_path / "whole")
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-2"
    assert {p.name for p in folder.iterdir() if "model" in p.name} == {"adapter_model.safetensors"}
    again = with_lora(tiny)
    resumed = dpo(again, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(folder))
    assert losses(resumed) == losses(whole)
    assert bits(again) == bits(model)


def test_dpo_can_compare_with_a_frozen_adapter(tiny: Any, tmp_path: Path) -> None:
    """DPO after SFT: the policy starts from the adapter, and so does the reference, which stays."""
    model = with_lora(tiny)
    randomise(model)
    model.load_lora(model.lora_adapter("task"), name="before")
    start = copy.deepcopy(model)
    run = dpo(model, tmp_path, ReferenceModel(model, "before"), max_steps=1)
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), rel=1e-5)
    before, after = model.lora_state_dict("before"), model.lora_state_dict("task")
    begun = start.lora_state_dict("task")
    assert all(torch.equal(before[key], begun[key]) and not torch.equal(after[key], begun[key]) for key in begun)


def test_trls_disable_dropout_means_the_adapters_too(tiny: Any, tmp_path: Path) -> None:
    model = with_lora(tiny, dropout=0.5)
    randomise(model)
    without = copy.deepcopy(model).eval()
    run = dpo(model, tmp_path, max_steps=1)
    seen: list[Any] = []
    collate = run.data_collator
    run.data_collator = lambda rows: seen.append(collate(rows)) or seen[-1]
    run.train()
    assert losses(run)[0] == pytest.approx(dpo_loss(without, tiny("llama"), seen[0]), rel=1e-5)


def test_the_reference_is_in_eval_mode_and_the_model_as_before(tiny: Any) -> None:
    model = with_lora(tiny, dropout=0.5)
    model.config.attention_dropout = 0.0
    randomise(model)
    model.train()
    model.lm_head.eval()
    modes = [m.training for m in model.modules()]
    seen: list[bool] = []
    hook = model.model.norm.register_forward_hook(lambda m, a, o: seen.append(m.training))
    ids = torch.randint(3, 64, (2, 5))
    with torch.no_grad():
        found = ReferenceModel(model)(input_ids=ids).logits
    hook.remove()
    assert seen == [False]
    assert [m.training for m in model.modules()] == modes
    torch.testing.assert_close(found, tiny("llama")(input_ids=ids).logits.detach())
    assert model.active_lora == "task"


def test_a_reference_names_what_is_there(tiny: Any) -> None:
    with pytest.raises(LoRAStateError):
        ReferenceModel(tiny("llama"))
    with pytest.raises(LoRANameError, match="'before'"):
        ReferenceModel(with_lora(tiny), "before")


def test_peft_beside_an_adapter_that_trains_is_refused(tiny: Any, tmp_path: Path) -> None:
    import datasets
    from peft import LoraConfig, PeftModel
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    model = with_lora(tiny)
    for trainer, config in ((SFTTrainer, SFTConfig), (DPOTrainer, DPOConfig)):
        with pytest.raises(LoRAUnsupportedError, match=r"adapter 'task' trains: PEFT's.*(?s:.)*train_lora\(\[\]\)"):
            trainer(
                model,
                args=config(str(tmp_path), **FIXED),
                train_dataset=datasets.Dataset.from_list([{"text": text} for text in TEXTS]),
                processing_class=tokenizer(),
                peft_config=LoraConfig(r=2, target_modules=["k_proj"]),
            )
    model.train_lora([])  # over a frozen one PEFT may train
    from trl.trainer import sft_trainer

    assert isinstance(sft_trainer.get_peft_model(model, LoraConfig(r=2, target_modules=["k_proj"])), PeftModel)


def test_what_moves_the_reference_is_refused(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(LoRAUnsupportedError, match="sync_ref_model"):
        dpo(with_lora(tiny), tmp_path, sync_ref_model=True)
    reference = ReferenceModel(with_lora(tiny))
    module = __import__("trl.trainer.dpo_trainer", fromlist=["x"])
    for name in ("prepare_deepspeed", "prepare_fsdp"):
        with pytest.raises(LoRAUnsupportedError, match="the policy's own base"):
            getattr(module, name)(reference, None)


def test_a_model_without_a_lora_is_trls_own_affair(tiny: Any, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    tiny("llama").save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    run = dpo(model, tmp_path / "out", max_steps=1)
    assert isinstance(run.ref_model, LlamaForCausalLM)
    run.train()
    assert losses(run)[0] == pytest.approx(math.log(2), rel=1e-5)


# ---- what is touched of TRL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", integration._WRAPPED)
def test_trl_has_the_functions_that_are_wrapped(name: str) -> None:
    """If this fails, TRL changed: hf_lora.integrations.trl needs another hook."""
    module = __import__(name, fromlist=["x"])
    for function in integration._WRAPPED[name]:
        wrapped = getattr(module, function, None)
        assert wrapped is not None, f"{name} has no {function} any more"
        first = next(iter(inspect.signature(inspect.unwrap(wrapped)).parameters))
        assert first == "model", f"the first parameter of {name}.{function} is {first} now"
        assert f"{function}(" in inspect.getsource(module), f"{name} does not call {function} any more"


@pytest.mark.parametrize("name", integration._REFERENCED)
def test_constructors_take_the_reference_that_is_given_to_them(name: str) -> None:
    """If this fails, TRL changed its trainer: the reference model for a LoRA needs another hook."""
    trainer = getattr(__import__(name, fromlist=["x"]), integration._REFERENCED[name])
    names = list(inspect.signature(inspect.unwrap(trainer.__init__)).parameters)
    assert names[:3] == ["self", "model", "ref_model"]
    assert {"args", "peft_config"} <= set(names)


def test_unregister_gives_trl_back() -> None:
    from trl.trainer import dpo_trainer, utils

    ours = dpo_trainer.add_fused_lm_head
    assert ours is not utils.add_fused_lm_head
    init = dpo_trainer.DPOTrainer.__init__
    hf_lora.unregister()
    try:
        assert dpo_trainer.add_fused_lm_head is utils.add_fused_lm_head
        assert dpo_trainer.DPOTrainer.__init__ is inspect.unwrap(init)
    finally:
        hf_lora.register()
    assert dpo_trainer.add_fused_lm_head is not utils.add_fused_lm_head
