"""DeepSpeed's ZeRO-3 under the stock Trainer, in two processes; started only where DeepSpeed is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp2 import CASES, TASK, equal, fresh, rank, same_everywhere
from harness import HERE, collect, main
from oracles import build
from trainer_fsdp2 import losses, trainer

from hf_lora import LoRAConfig, LoRAStateError, store
from hf_lora.loading import load_checkpoint


def configured() -> dict[str, Any]:
    """The page's configuration, with room for an optimizer of torch's own, and nothing left unsplit for being small."""
    import json
    import re

    page = (HERE.parents[1] / "docs" / "pages" / "distributed.md").read_text(encoding="utf-8")
    config = json.loads(re.findall(r"^```json\n(.*?)^```$", page, re.M | re.S)[0])
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return {**config, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def check_train_save_and_resume(scratch: Path) -> None:
    options = {"fsdp": False, "deepspeed": configured()}
    ddp = trainer(fresh(*CASES["uneven"]), scratch / "ddp", fsdp=False)
    ddp.train()
    ddp.accelerator.free_memory()
    forget()
    run = trainer(fresh(*CASES["uneven"]), scratch / "whole", **options)
    run.train()
    model = run.accelerator.unwrap_model(run.model)
    assert all(hasattr(p, "ds_id") for p in model.parameters())
    assert losses(run) == pytest.approx(losses(ddp), rel=1e-5)
    tensors = model.lora_state_dict(TASK)
    same_everywhere(tensors)
    equal(store.to_state_dict(store.read_adapter(scratch / "whole" / "checkpoint-4")), tensors)
    model.save_lora(scratch / "own", TASK)
    equal(store.to_state_dict(store.read_adapter(scratch / "own")), tensors)
    with pytest.raises(LoRAStateError, match="ZeRO-3"):
        model.eval().merge_lora()
    with pytest.raises(LoRAStateError, match="ZeRO-3 manages"):
        load_checkpoint(model, scratch / "own")
    resumed = trainer(fresh(*CASES["uneven"]), scratch / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(scratch / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(run)
    equal(resumed.accelerator.unwrap_model(resumed.model).lora_state_dict(TASK), tensors)


def forget() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def check_a_base_that_is_split_while_it_loads(scratch: Path) -> None:
    from transformers import LlamaForCausalLM, TrainingArguments

    if rank() == 0:
        build("llama").save_pretrained(scratch / "base")
    dist.barrier()
    keep = TrainingArguments(str(scratch / "unused"), use_cpu=True, report_to=[], deepspeed=configured())
    model = LlamaForCausalLM.from_pretrained(scratch / "base")
    assert keep.deepspeed
    assert model.lm_head.weight.shape == torch.Size([0])
    torch.manual_seed(3)
    model.add_lora(LoRAConfig(r=3, target_modules=["q", "v", "embed_tokens"]), TASK)
    before = model.lora_state_dict(TASK)
    run = trainer(model, scratch / "out", fsdp=False, deepspeed=configured())
    run.train()
    tensors = run.accelerator.unwrap_model(run.model).lora_state_dict(TASK)
    assert all(not torch.equal(tensors[key], before[key]) for key in before)
    equal(store.to_state_dict(store.read_adapter(scratch / "out" / "checkpoint-4")), tensors)


if __name__ == "__main__":
    main(collect(dict(globals())))
