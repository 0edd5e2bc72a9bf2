"""DistributedDataParallel in two processes: the stock Trainer, and a plain loop, against one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp2 import (
    CASES,
    IDS,
    TASK,
    adamw,
    close,
    equal,
    fresh,
    logits,
    loss_of,
    mean,
    mine,
    rank,
    same_everywhere,
    steps,
    trained,
)
from harness import collect, main
from loras import bits
from oracles import build
from torch.nn.parallel import DistributedDataParallel
from trainer_fsdp2 import losses, trainer

from hf_lora import LoRAConfig, store

TRAINED = [TASK, "second"]


def several(config: LoRAConfig = CASES["uneven"][1]) -> Any:
    """Three adapters: one frozen and active, two that train and are active. A checkpoint is a folder for each."""
    model = fresh("llama", config)
    torch.manual_seed(4)
    model.add_lora(LoRAConfig(r=2, target_modules=["k"]), "second")
    model.train_lora(TRAINED)
    model.set_lora({TASK: 1.0, "second": 1.0, "other": 0.5})
    return model


def plain(model: Any) -> Any:
    """What DDP and Trainer wrapped."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def everything(model: Any) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": t for name in model.lora_names for key, t in model.lora_state_dict(name).items()}


# ---- Trainer ---------------------------------------------------------------------------------------------------------


def check_trainer_writes_once_and_resumes_bit_for_bit(scratch: Path) -> None:
    writes: list[Any] = []
    write = store.write_adapter
    store.write_adapter = lambda *args: writes.append(args) or write(*args)
    try:
        run = trainer(several(), scratch / "whole", fsdp=False)
        run.train()
        assert isinstance(run.model_wrapped, DistributedDataParallel)
        run.save_model(str(scratch / "final"))
    finally:
        store.write_adapter = write
    assert len(writes) == (3 * len(TRAINED) if rank() == 0 else 0)  # two checkpoints and the end
    dist.barrier()
    tensors = everything(plain(run.model))
    same_everywhere(tensors)
    for folder in (scratch / "whole" / "checkpoint-4", scratch / "final"):
        for name in TRAINED:
            written = store.read_adapter(folder / ("lora-" + name.replace("/", "%2F")))
            equal(store.to_state_dict(written), plain(run.model).lora_state_dict(name))
    resumed = trainer(several(), scratch / "resumed", fsdp=False)
    resumed.train(resume_from_checkpoint=str(scratch / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(run)
    equal(everything(plain(resumed.model)), tensors)
    if rank() == 0:  # for the comparison with one process, outside
        (scratch / "losses.json").write_text(json.dumps(losses(run)))


def check_trainer_with_activation_checkpointing(scratch: Path) -> None:
    run = trainer(fresh(*CASES["uneven"]), scratch / "plain", fsdp=False, save_steps=100)
    run.train()
    for reentrant in (False, True):
        options: dict[str, Any] = {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
            "save_steps": 100,
        }
        again = trainer(fresh(*CASES["uneven"]), scratch / "again", fsdp=False, **options)
        again.train()
        assert not again.model_wrapped.find_unused_parameters  # what Trainer chooses under checkpointing
        assert losses(again) == pytest.approx(losses(run), rel=1e-6)
        tensors = everything(plain(again.model))
        same_everywhere(tensors)
        for key, tensor in everything(plain(run.model)).items():
            close(tensors[key], tensor, 1e-4)


def check_trainer_loads_the_best_in_every_process(scratch: Path) -> None:
    run = trainer(
        several(),
        scratch,
        fsdp=False,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls, so the first checkpoint is "best"
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    for name in TRAINED:
        written = store.read_adapter(scratch / "checkpoint-2" / ("lora-" + name.replace("/", "%2F")))
        equal(plain(run.model).lora_state_dict(name), store.to_state_dict(written))


# ---- a plain loop ----------------------------------------------------------------------------------------------------


def check_plain_loop_equals_one_process(scratch: Path) -> None:
    for case, (family, config) in CASES.items():
        one, model = fresh(family, config), fresh(family, config)
        if rank() == 1:  # DDP begins with what the first process holds
            with torch.no_grad():
                for parameter in trained(model).values():
                    parameter.add_(1)
        two = DistributedDataParallel(model)
        base = {k: v for k, v in bits(model).items() if ".lora_" not in k}
        expected = steps(one, torch.optim.SGD(trained(one).values(), lr=0.1, momentum=0.9), 4, IDS)
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1, momentum=0.9)
        assert mean(steps(two, optimizer, 4, mine(IDS))) == pytest.approx(expected, rel=1e-5), case
        found, wanted = model.lora_state_dict(TASK), one.lora_state_dict(TASK)
        for key in wanted:
            close(found[key], wanted[key], 1e-4)
        same_everywhere(found)
        assert {k: v for k, v in bits(model).items() if ".lora_" not in k} == base


def check_frozen_banks_are_not_broadcast(scratch: Path) -> None:
    model = fresh(*CASES["uneven"])
    two = DistributedDataParallel(model)
    banks = {b.data_ptr() for name, b in model.named_buffers() if ".bank_" in name and b.numel()}
    assert banks
    assert banks.isdisjoint(b.data_ptr() for b in two.modules_buffers)
    assert len(two.modules_buffers) == len(list(build("llama").buffers()))  # the base's own still are
    # Two forwards before a backward, and an adapter that comes later: the banks are as each process loaded them.
    late = fresh("llama", LoRAConfig(r=2, target_modules=["up"]))
    model.load_lora(late.lora_adapter("other"), name="late")
    model.set_lora({TASK: 1.0, "late": 1.0})
    one = fresh(*CASES["uneven"])
    one.load_lora(late.lora_adapter("other"), name="late")
    one.set_lora({TASK: 1.0, "late": 1.0})
    for m, ids in ((one, IDS), (two, mine(IDS))):
        (loss_of(m, ids) + loss_of(m, ids.flip(1))).backward()
    for name, parameter in trained(one).items():
        close(trained(model)[name].grad, parameter.grad)
    model.remove_lora()
    assert not hasattr(model, "_ddp_params_and_buffers_to_ignore")


def check_verbs_inside_a_loop(scratch: Path) -> None:
    """Other adapters on other processes and rows: gradients are the mean over the processes of what each computed."""
    model, one = several(), several()
    two = DistributedDataParallel(model, find_unused_parameters=True)
    mine_now = TRAINED[rank()]
    with model.use_lora(mine_now):
        loss = loss_of(two, mine(IDS))
    loss.backward()
    (sum(loss_with(one, name, IDS[2 * i : 2 * i + 2]) for i, name in enumerate(TRAINED)) / 2).backward()
    for name, parameter in trained(one).items():
        close(trained(model)[name].grad, parameter.grad)

    for m in (model, one):
        m.zero_grad()
    route = [TASK, None, "second", "other"]  # each process has a row to train on
    with model.route_lora(route[2 * rank() : 2 * rank() + 2]):
        loss_of(two, mine(IDS)).backward()
    with one.route_lora(route):
        loss_of(one, IDS).backward()
    for name, parameter in trained(one).items():
        close(trained(model)[name].grad, parameter.grad)
    model.eval()
    with model.no_lora(), torch.no_grad():
        assert torch.equal(two(input_ids=IDS).logits, logits(build("llama")))


def loss_with(model: Any, name: str, ids: torch.Tensor) -> torch.Tensor:
    with model.use_lora(name):
        return loss_of(model, ids)


def check_an_adapter_that_trains_has_to_be_active(scratch: Path) -> None:
    """torch's own error where DDP does not look for unused parameters; `train_lora` of what is active ends it."""
    model = several()
    model.set_lora(TASK)
    two = DistributedDataParallel(model)
    optimizer = adamw(model)
    with pytest.raises(RuntimeError, match="Expected to have finished reduction"):
        steps(two, optimizer, 2, mine(IDS))
    model = several()
    model.set_lora(TASK)
    model.train_lora(TASK)
    two = DistributedDataParallel(model)
    steps(two, adamw(model), 2, mine(IDS))
    same_everywhere(everything(model))


def check_every_process_may_save_to_one_folder(scratch: Path) -> None:
    model = fresh(*CASES["uneven"])
    for _ in range(8):
        model.save_lora(scratch / "adapter", TASK)
        equal(store.to_state_dict(store.read_adapter(scratch / "adapter")), model.lora_state_dict(TASK))
    dist.barrier()
    assert {p.name for p in (scratch / "adapter").iterdir() if not p.name.endswith("lock")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def check_no_sync_accumulates(scratch: Path) -> None:
    one, model = fresh(*CASES["uneven"]), fresh(*CASES["uneven"])
    two = DistributedDataParallel(model)
    with two.no_sync():
        loss_of(two, mine(IDS)).backward()
    loss_of(two, mine(IDS.flip(1))).backward()
    for ids in (IDS, IDS.flip(1)):
        loss_of(one, ids).backward()
    for name, parameter in trained(one).items():
        close(trained(model)[name].grad, parameter.grad)


if __name__ == "__main__":
    main(collect(dict(globals())))
