"""Stop at k and resume, for every k: losses, adapters and optimizer are those of a run that nobody stopped."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import bits, with_adapters
from training import classified, logged, options, rows, same, trainer

from hf_lora import LoRAConfig

pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")

STEPS = 4
QV = {"r": 4, "target_modules": ["q", "v"], "alpha": 8}
OTHER = LoRAConfig(r=2, target_modules=["k", "down"])


@dataclass(frozen=True)
class Case:
    """A model, the adapters that train on it beside a frozen one, and what Trainer is told."""

    options: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=lambda: {"org/task": QV})
    family: str = "llama"
    dtype: torch.dtype = torch.float32
    active: Any = None  # None: all that train
    steps: int = STEPS

    def build(self, tiny: Any, seed: int = 3) -> Any:
        """The model as a script would build it; `seed` is of the adapters' first values."""
        model = with_adapters(tiny(self.family, dtype=self.dtype), {"other": OTHER})
        torch.manual_seed(seed)
        for name, config in self.configs.items():
            model.add_lora(LoRAConfig(**config), name)
        model.train_lora(list(self.configs))
        if self.active is not None or len(self.configs) > 1:
            model.set_lora(self.active if self.active is not None else list(self.configs))
        return model

    def trainer(self, model: Any, folder: Path, **more: Any) -> Any:
        """The stock Trainer for it."""
        from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

        given = {"max_steps": self.steps, "save_steps": 1, **self.options, **more}
        if self.family == "t5":
            own = Seq2SeqTrainingArguments(str(folder), **options(**given))
            return Seq2SeqTrainer(model, own, train_dataset=rows(), eval_dataset=rows(8))
        return trainer(model, folder, train_dataset=classified() if "cls" in self.family else None, **given)


HEAD = {"modules_to_save": ["lm_head"], "r": 2, "target_modules": ["q"]}
CASES: dict[str, Case] = {
    "plain": Case(),
    "dropout": Case(configs={"a": {**QV, "dropout": 0.1}}),
    "rslora, all-linear": Case(configs={"a": {"r": 3, "target_modules": "all-linear", "use_rslora": True}}),
    "two train together": Case(configs={"org/a": {**QV, "dropout": 0.1}, "b": {"r": 2, "target_modules": ["q", "up"]}}),
    "over a frozen one": Case(active={"other": 1.0, "org/task": 1.0}),
    "over a frozen one, weighted": Case(active={"other": 0.5, "org/task": 2.0}),
    "head": Case(configs={"a": HEAD}),
    "biases": Case(configs={"a": {**QV, "bias": "all"}}, family="gpt2"),
    "head, biases, dropout": Case(configs={"a": {**HEAD, "bias": "all", "dropout": 0.1}}),
    "embeddings": Case(configs={"a": {"r": 2, "target_modules": ["embed_tokens", "lm_head", "q"]}}),
    "embedding trained whole": Case(configs={"a": {**QV, "modules_to_save": ["embed_tokens"]}}),
    "roles in a fused layer": Case(family="gpt2"),
    "bf16 base": Case(dtype=torch.bfloat16, configs={"a": {**QV, "dropout": 0.1}}),
    "autocast": Case({"bf16": True}),
    "bf16 base, autocast": Case({"bf16": True}, dtype=torch.bfloat16),
    "cosine, warmup, decay": Case({"lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1}),
    "plateau": Case({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}),
    "accumulation": Case({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}),
    "checkpointed": Case({"checkpointed": {"use_reentrant": False}}, {"a": {**QV, "dropout": 0.1}}),
    "checkpointed, reentrant": Case({"checkpointed": {"use_reentrant": True}}, {"a": {**QV, "dropout": 0.1}}),
    "NEFTune": Case({"neftune_noise_alpha": 5.0}, {"a": {"r": 2, "target_modules": ["embed_tokens", "q"]}}),
    "label smoothing": Case({"label_smoothing_factor": 0.1}),
    "no clipping": Case({"max_grad_norm": 0.0}),
    "hard clipping": Case({"max_grad_norm": 1e-3}),
    "adafactor": Case({"optim": "adafactor"}),
    "SGD": Case({"optim": "sgd"}),
    "evaluation between": Case({"eval_strategy": "steps", "eval_steps": 1}),
    "new head": Case(configs={"a": {**QV, "task_type": "SEQ_CLS", "dropout": 0.1}}, family="bert-cls"),
    "encoder-decoder": Case(
        {"predict_with_generate": True, "generation_max_length": 6, "eval_strategy": "steps", "eval_steps": 2},
        family="t5",
        configs={"a": {**QV, "dropout": 0.1}},
    ),
}


def told(case: Case) -> Case:
    """The case with activation checkpointing under the name that this transformers has for it."""
    from transformers import TrainingArguments

    if "checkpointed" not in case.options:
        return case
    name = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    options = {k: v for k, v in case.options.items() if k != "checkpointed"}
    options |= {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": case.options["checkpointed"]}
    return dataclasses.replace(case, options=options)


def assert_resumes_exactly(case: Case, tiny: Any, tmp_path: Path) -> None:
    case = told(case)
    model = case.build(tiny)
    began = bits(model)
    whole = case.trainer(model, tmp_path / "whole")
    whole.train()
    expected, optimizer = bits(model), whole.optimizer.state_dict()
    moved = {key for key in expected if expected[key] != began[key]}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved
    assert moved <= trained  # the base and the adapter "other" stood still
    assert all(".lora_slots." in key or ".lora_heads." in key for key in trained)
    assert not [key for key, p in model.named_parameters() if p.grad is not None and key not in trained]
    for k in range(1, case.steps):
        folder = tmp_path / "whole" / f"checkpoint-{k}"
        assert not {p.name for p in folder.rglob("*") if p.suffix in (".safetensors", ".bin")} - {
            "adapter_model.safetensors",
            "training_args.bin",
        }  # the base is not in a checkpoint
        again = case.build(tiny, seed=40 + k)  # other first values: everything has to come from the checkpoint
        resumed = case.trainer(again, tmp_path / f"resumed-{k}")
        resumed.train(resume_from_checkpoint=str(folder))
        assert logged(resumed) == logged(whole), k
        assert bits(again) == expected, k
        assert same(resumed.optimizer.state_dict(), optimizer), k


# Each of these is near another one.
# What a release of transformers or peft's absence cannot change is not run again with them.
SLOW = {
    *("rslora, all-linear", "two train together", "over a frozen one", "over a frozen one, weighted"),
    *("head", "biases", "embeddings", "embedding trained whole", "roles in a fused layer"),
    *("autocast", "bf16 base", "bf16 base, autocast", "no clipping", "hard clipping", "SGD", "adafactor", "plateau"),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES])
def test_resuming_is_bit_exact_for_every_step(tiny: Any, tmp_path: Path, name: str) -> None:
    assert_resumes_exactly(CASES[name], tiny, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("configs", [{"a": QV}, {"a": {**QV, "dropout": 0.1}}], ids=["plain", "dropout"])
def test_resuming_a_compiled_model_is_bit_exact(tiny: Any, tmp_path: Path, configs: Any) -> None:
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    assert_resumes_exactly(Case(options, configs, steps=3), tiny, tmp_path)
