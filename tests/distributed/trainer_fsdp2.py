"""The stock Trainer with accelerate's FSDP2, in two processes.

accelerate takes FSDP up on accelerators only; on the CPU it runs DDP and says nothing. So this one decision is made
here as it is made there for a GPU. What follows from it (sharding, gathering, checkpoints) is accelerate's and
Trainer's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from fsdp2 import CASES, TASK, equal, fresh, same_everywhere
from harness import collect, main
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from hf_lora import store

STEPS = 4


def as_on_a_gpu() -> None:
    ordinary = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        ordinary(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def trainer(model: Any, folder: Path, **options: Any) -> Any:
    ids = torch.randint(3, 64, (32, 9), generator=torch.Generator().manual_seed(7))
    data = [{"input_ids": row, "labels": row} for row in ids]
    fixed: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            **options.pop("fsdp_options", {}),
        },
    }
    arguments = TrainingArguments(str(folder), **{**fixed, **options})
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8])


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def prepared(run: Any) -> Any:
    """The model that Trainer trained, which it must have sharded."""
    assert any(isinstance(p, DTensor) for p in run.model.parameters())
    return run.accelerator.unwrap_model(run.model)


def forget_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def check_the_same_as_ddp_and_resumed_bit_for_bit(scratch: Path) -> None:
    ddp = trainer(fresh(*CASES["uneven"]), scratch / "ddp", fsdp=False)
    ddp.train()
    for ram_efficient in (False, True):
        forget_accelerate()
        folder = scratch / f"whole-{ram_efficient}"
        options = {"fsdp_options": {"cpu_ram_efficient_loading": ram_efficient}}
        run = trainer(fresh(*CASES["uneven"]), folder, **options)
        run.train()
        assert losses(run) == pytest.approx(losses(ddp), rel=1e-5)
        tensors = prepared(run).lora_state_dict(TASK)
        same_everywhere(tensors)
        for key, tensor in ddp.accelerator.unwrap_model(ddp.model).lora_state_dict(TASK).items():
            torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=1e-4 * float(tensor.abs().max()))
        written = store.to_state_dict(store.read_adapter(folder / f"checkpoint-{STEPS}"))
        equal(written, tensors)
        resumed = trainer(fresh(*CASES["uneven"]), scratch / f"resumed-{ram_efficient}", **options)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert losses(resumed) == losses(run)
        equal(prepared(resumed).lora_state_dict(TASK), tensors)


def check_the_best_is_loaded(scratch: Path) -> None:
    forget_accelerate()
    run = trainer(
        fresh(*CASES["uneven"]),
        scratch,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls, so the first checkpoint is "best"
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    equal(prepared(run).lora_state_dict(TASK), store.to_state_dict(store.read_adapter(scratch / "checkpoint-2")))


def check_a_sharded_checkpoint_and_save_model(scratch: Path) -> None:
    """With SHARDED_STATE_DICT Trainer's checkpoint is accelerate's alone; save_lora gathers at the end."""
    forget_accelerate()
    options = {"fsdp_options": {"state_dict_type": "SHARDED_STATE_DICT"}, "bf16": True}
    run = trainer(fresh(*CASES["uneven"]), scratch / "whole", **options)
    run.train()
    names = {path.name for path in (scratch / "whole" / "checkpoint-2").iterdir()}
    assert "pytorch_model_fsdp_0" in names
    assert "adapter_model.safetensors" not in names
    model = prepared(run)
    model.save_lora(scratch / "adapter", TASK)
    tensors = store.to_state_dict(store.read_adapter(scratch / "adapter"))
    equal(tensors, model.lora_state_dict(TASK))
    assert all(t.dtype == torch.float32 for t in tensors.values())
    resumed = trainer(fresh(*CASES["uneven"]), scratch / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(scratch / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(run)
    equal(prepared(resumed).lora_state_dict(TASK), tensors)


if __name__ == "__main__":
    as_on_a_gpu()
    main(collect(dict(globals())))
