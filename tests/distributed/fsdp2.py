"""`fully_shard` on each decoder layer and the root, in two processes, against one process with the whole batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from harness import collect, main
from loras import with_adapters
from oracles import build
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from hf_lora import LoRAAdapter, LoRAConfig, LoRAFileError, LoRAStateError
from hf_lora.loading import load_checkpoint, save_checkpoint

TASK = "org/task"
IDS = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(7))

# family, config of the adapter that trains. Rank 3 does not divide by two processes; rank 1 leaves one without rows.
CASES: dict[str, tuple[str, LoRAConfig]] = {
    "uneven": ("llama", LoRAConfig(r=3, target_modules=["q", "v", "down"], alpha=6)),
    "one row": ("llama", LoRAConfig(r=1, target_modules=["q", "embed_tokens", "lm_head"])),
    "roles of a fused layer, biases": ("gpt2", LoRAConfig(r=2, target_modules=["q", "v"], bias="all")),
    "head": ("llama-cls", LoRAConfig(r=2, target_modules=["q"], modules_to_save=["score"])),
}


def rank() -> int:
    return dist.get_rank()


def fresh(family: str, config: LoRAConfig, dtype: torch.dtype = torch.float32) -> Any:
    """A frozen adapter "other", and over it one that trains; both active, unless the one that trains has a head."""
    model = with_adapters(build(family, dtype=dtype), {"other": LoRAConfig(r=2, target_modules=["down"], alpha=4)})
    torch.manual_seed(3)
    model.add_lora(config, TASK)
    if not (config.modules_to_save or config.bias != "none"):
        model.set_lora({TASK: 1.0, "other": 0.5})
    for module in model.modules():
        if isinstance(module, nn.Dropout):  # the base's own: processes draw otherwise than one would
            module.p = 0.0
    return model.train()


def layers_of(model: Any) -> list[nn.Module]:
    return list(model.transformer.h if hasattr(model, "transformer") else model.model.layers)


def shard(model: Any, **options: Any) -> Any:
    for layer in layers_of(model):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def mine(rows: Tensor) -> Tensor:
    """This process's half of the batch."""
    half = len(rows) // 2
    return rows[rank() * half : (rank() + 1) * half]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    labels = ids[:, 0] % 3 if hasattr(getattr(model, "module", model), "score") else ids
    return model(input_ids=ids, labels=labels).loss


def trained(model: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def steps(model: Any, optimizer: Any, n: int, ids: Tensor, start: int = 0) -> list[float]:
    losses = []
    for step in range(start, start + n):
        loss = loss_of(model, torch.roll(ids, step, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def mean(values: list[float]) -> list[float]:
    """Of both processes."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return (tensor / 2).tolist()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    limit = tolerance * max(float(expected.abs().max()), 1e-8)
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def same_everywhere(tensors: Mapping[str, Tensor]) -> None:
    both: list[Any] = [None, None]
    dist.all_gather_object(both, dict(tensors))
    equal(both[0], both[1])


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model).values(), lr=1e-2)


# ---- training --------------------------------------------------------------------------------------------------------


def check_gradients_losses_and_values_equal_one_process(scratch: Path) -> None:
    for case, (family, config) in CASES.items():
        one, two = fresh(family, config), shard(fresh(family, config))
        sharded = trained(two)
        assert sharded
        assert all(isinstance(p, DTensor) for p in sharded.values()), case
        loss_of(one, IDS).backward()
        loss_of(two, mine(IDS)).backward()
        expected = {name: p.grad for name, p in trained(one).items()}
        assert expected.keys() == sharded.keys()
        for name, parameter in trained(two).items():
            assert parameter.grad is not None, (case, name)
            close(full(parameter.grad), expected[name])
        optimizers = [torch.optim.SGD(trained(m).values(), lr=0.1, momentum=0.9) for m in (one, two)]
        expected_losses = steps(one, optimizers[0], 4, IDS)
        losses = mean(steps(two, optimizers[1], 4, mine(IDS)))
        assert losses == pytest.approx(expected_losses, rel=1e-5), case
        assert expected_losses[-1] != expected_losses[0]
        found, wanted = two.lora_state_dict(TASK), one.lora_state_dict(TASK)
        assert found.keys() == wanted.keys()
        for key in wanted:
            close(found[key], wanted[key], 1e-4)
        same_everywhere(found)
        equal(dict(full_base(two)), dict(full_base(one)))


def full_base(model: Any) -> dict[str, Tensor]:
    return {name: full(p) for name, p in model.named_parameters() if ".lora_" not in name}


def check_activation_checkpointing_gives_the_same_gradients(scratch: Path) -> None:
    for reentrant in (False, True):
        one = fresh(*CASES["uneven"])
        loss_of(one, IDS).backward()
        two = fresh(*CASES["uneven"])
        two.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        two.enable_input_require_grads()
        shard(two)
        with two.use_lora({TASK: 1.0, "other": 0.5}):
            loss = loss_of(two, mine(IDS))
        two.set_lora(None)  # the backward recomputes under what was active in the forward
        loss.backward()
        expected = {name: p.grad for name, p in trained(one).items()}
        for name, parameter in trained(two).items():
            close(full(parameter.grad), expected[name])


def check_bf16_policy_keeps_float32_masters(scratch: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        model = shard(fresh(*CASES["one row"], dtype=dtype), mp_policy=policy)
        before = model.lora_state_dict(TASK)
        optimizer = adamw(model)
        losses = steps(model, optimizer, 3, mine(IDS))
        assert torch.isfinite(torch.tensor(losses)).all()
        for parameter in trained(model).values():
            assert parameter.dtype == torch.float32
            assert parameter.grad.dtype == torch.float32
        after = model.lora_state_dict(TASK)
        assert all(not torch.equal(after[key], before[key]) for key in before)
        # After a forward without backward the root still holds whole Parameters, cast: they are not what is saved.
        model.eval()
        with torch.no_grad():
            model(input_ids=IDS)
        again = model.lora_state_dict(TASK)
        equal(again, after)
        assert any(not torch.equal(t, t.to(torch.bfloat16).float()) for t in again.values())


def check_a_root_alone_is_read_sharded_after_a_forward(scratch: Path) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = fully_shard(fresh(*CASES["one row"]), mp_policy=policy)
    before = model.lora_state_dict(TASK)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
    assert not any(isinstance(p, DTensor) for p in model.parameters())  # whole, and bf16
    equal(model.lora_state_dict(TASK), before)
    with torch.no_grad():
        model(input_ids=IDS)
    value = LoRAAdapter.of(model.lora_adapter(TASK).copy())
    model.save_lora(scratch / "root", TASK)
    with torch.no_grad():
        model(input_ids=IDS)
    changed = dataclasses.replace(value, factors={p: scaled(f, 0.5) for p, f in value.factors.items()})
    from hf_lora.model import refill

    refill(model, {TASK: changed})
    found = model.lora_state_dict(TASK)
    assert all(torch.equal(found[key], before[key] * 0.5) for key in before)


def scaled(factors: Any, by: float) -> Any:
    return dataclasses.replace(factors, A=factors.A * by, B=factors.B * by)


# ---- files -----------------------------------------------------------------------------------------------------------


def check_saving_gathers_and_the_first_process_alone_writes(scratch: Path) -> None:
    from hf_lora import store

    calls: list[Any] = []
    write = store.write_adapter

    def counted(*args: Any) -> Path:
        calls.append(args)
        return write(*args)

    for case, (family, config) in CASES.items():
        model = shard(fresh(family, config))
        steps(model, adamw(model), 2, mine(IDS))
        tensors = model.lora_state_dict(TASK)
        assert not any(isinstance(t, DTensor) for t in tensors.values())
        same_everywhere(tensors)
        folder = scratch / case.replace(" ", "-")
        calls.clear()
        store.write_adapter = counted
        try:
            assert model.save_lora(folder / "saved", TASK) == folder / "saved"
            model.save_pretrained(folder / "pretrained", is_main_process=rank() == 0)
            model.save_pretrained(folder / "every")  # also where every process says that it is the main one
            whole_state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if rank() == 0:  # as Trainer does: one process alone has the whole state dict, and saves
                model.save_pretrained(folder / "state", state_dict=whole_state)
        finally:
            store.write_adapter = write
        assert len(calls) == (4 if rank() == 0 else 0), (case, len(calls))
        dist.barrier()
        for name in ("saved", "pretrained", "every", "state"):
            equal(store.to_state_dict(store.read_adapter(folder / name)), tensors)
        # A model of one process loads it, and computes the same.
        model.eval()
        model.set_lora(TASK)
        plain = build(family)
        plain.load_lora(folder / "saved")
        with torch.no_grad():
            close(model(input_ids=IDS).logits, plain.eval()(input_ids=IDS).logits)


def check_a_failed_write_is_an_error_in_every_process(scratch: Path) -> None:
    model = shard(fresh(*CASES["uneven"]))
    file = scratch / "file"
    if rank() == 0:
        file.write_text("in the way")
    dist.barrier()
    match = "cannot be saved" if rank() == 0 else "first process could not write"
    with pytest.raises(LoRAFileError, match=match):
        model.save_lora(file / "adapter", TASK)
    model.save_lora(scratch / "adapter", TASK)  # and nobody is left waiting


def check_resuming_from_the_adapter_and_the_optimizer_state(scratch: Path) -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    for case, (family, config) in CASES.items():
        folder = scratch / case.replace(" ", "-")
        whole_run = shard(fresh(family, config))
        optimizer = adamw(whole_run)
        steps(whole_run, optimizer, 2, mine(IDS))
        save_checkpoint(whole_run, folder)
        state = get_optimizer_state_dict(whole_run, optimizer, options=options)
        if rank() == 0:
            torch.save(state, folder / "optimizer.pt")
        dist.barrier()
        losses = steps(whole_run, optimizer, 2, mine(IDS), start=2)

        resumed = shard(fresh(family, config))
        parameters = list(trained(resumed).values())
        load_checkpoint(resumed, folder)
        assert all(a is b for a, b in zip(parameters, trained(resumed).values(), strict=True))  # the optimizer's own
        optimizer = adamw(resumed)
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        set_optimizer_state_dict(resumed, optimizer, state, options=StateDictOptions(full_state_dict=True))
        assert steps(resumed, optimizer, 2, mine(IDS), start=2) == losses, case
        equal(resumed.lora_state_dict(TASK), whole_run.lora_state_dict(TASK))


def check_resuming_with_a_distributed_checkpoint(scratch: Path) -> None:
    options = StateDictOptions(ignore_frozen_params=True)
    whole_run = shard(fresh(*CASES["uneven"]))
    optimizer = adamw(whole_run)
    steps(whole_run, optimizer, 2, mine(IDS))

    def state(model: Any, optimizer: Any) -> dict[str, Any]:
        tensors = get_model_state_dict(model, options=options)
        assert all(".lora_slots." in key for key in tensors)
        return {"model": tensors, "optimizer": get_optimizer_state_dict(model, optimizer)}

    dcp.save(state(whole_run, optimizer), checkpoint_id=str(scratch / "dcp"))
    losses = steps(whole_run, optimizer, 2, mine(IDS), start=2)
    resumed = shard(fresh(*CASES["uneven"]))
    optimizer = adamw(resumed)
    loaded = state(resumed, optimizer)
    dcp.load(loaded, checkpoint_id=str(scratch / "dcp"))
    set_optimizer_state_dict(resumed, optimizer, loaded["optimizer"])
    assert steps(resumed, optimizer, 2, mine(IDS), start=2) == losses
    equal(resumed.lora_state_dict(TASK), whole_run.lora_state_dict(TASK))


# ---- verbs -----------------------------------------------------------------------------------------------------------


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def check_switching_and_routing_compute_as_in_one_process(scratch: Path) -> None:
    one, two = fresh(*CASES["uneven"]).eval(), shard(fresh(*CASES["uneven"]).eval())
    for model in (one, two):  # B = 0 would hide the adapter
        with torch.no_grad():
            for name, p in trained(model).items():
                if ".B" in name:
                    p.copy_(p + 0.3) if model is one else p.add_(0.3)
    base = logits(build("llama"))
    for which in (TASK, "other", {TASK: 0.5, "other": 2.0}, None):
        for model in (one, two):
            model.set_lora(which)
        close(logits(two), logits(one))
        assert torch.equal(logits(two), base) == (which is None)
    for model in (one, two):
        model.set_lora(TASK)
    with one.use_lora("other"), two.use_lora("other"):
        close(logits(two), logits(one))
    with two.no_lora():
        assert torch.equal(logits(two), base)
    route = [TASK, None, "other", TASK]
    with one.route_lora(route), two.route_lora(route):
        close(logits(two), logits(one))
        assert torch.equal(logits(two)[1], base[1])
    assert two.active_lora == TASK
    assert str(two.lora_summary()).replace("FSDP", "") == str(one.lora_summary())
    two.print_lora_summary()


def check_banks_are_whole_in_every_process(scratch: Path) -> None:
    model = shard(fresh(*CASES["uneven"], dtype=torch.bfloat16), mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    plain = dict(fresh(*CASES["uneven"], dtype=torch.bfloat16).named_buffers())
    banks = {name: b for name, b in model.named_buffers() if ".bank_" in name}
    assert banks
    for name, bank in banks.items():
        assert not isinstance(bank, DTensor)
        assert bank.dtype == torch.bfloat16
        assert bank.device == next(model.parameters()).device
        assert torch.equal(bank, plain[name])


def check_what_comes_after_sharding(scratch: Path) -> None:
    source = with_adapters(build("llama"), {"late": LoRAConfig(r=4, target_modules=["q", "embed_tokens"])})
    if rank() == 0:
        source.save_lora(scratch / "late")
    headed = build("llama-cls")
    headed.add_lora(LoRAConfig(r=2, target_modules=["q"], modules_to_save=["score"]), "headed")
    head = headed.lora_adapter()
    dist.barrier()
    model = shard(fresh(*CASES["uneven"]))
    cls = shard(fresh(*CASES["head"]))
    loss_of(model, mine(IDS)).backward()
    before, names = model.lora_state_dict(TASK), model.lora_names

    refused: list[Callable[[], Any]] = [
        lambda: model.add_lora(LoRAConfig(r=2, target_modules=["k"]), "new"),
        lambda: model.load_lora(scratch / "late", trainable=True),
        lambda: cls.load_lora(head, name="headed"),
        lambda: model.train_lora([]),
        lambda: model.train_lora("other"),
        lambda: model.remove_lora(TASK),
        lambda: model.remove_lora(),
        lambda: model.load_lora(scratch / "late", name=TASK, replace=True),
        lambda: cls.remove_lora(TASK),
        lambda: model.eval().merge_lora(),
    ]
    for call in refused:
        with pytest.raises(LoRAStateError, match=r"fully_shard\(\)[\s\S]*(before fully_shard|in one process)"):
            call()
    model.train()
    assert model.lora_names == names
    equal(model.lora_state_dict(TASK), before)
    model.train_lora(TASK)  # what trains already may be said again

    assert model.load_lora(scratch / "late") == "late"  # frozen: each process has its whole bank
    model.eval()
    model.set_lora("late")
    close(logits(model), logits(source))
    equal(model.lora_state_dict("late"), source.lora_state_dict("late"))
    model.remove_lora("late")
    model.set_lora(TASK)
    model.train()
    optimizer = adamw(model)
    losses = steps(model, optimizer, 2, mine(IDS))
    untouched = shard(fresh(*CASES["uneven"]))
    untouched.set_lora(TASK)
    assert steps(untouched, adamw(untouched), 2, mine(IDS)) == losses
    equal(model.lora_state_dict(TASK), untouched.lora_state_dict(TASK))


def check_frozen_biases_that_come_after_sharding(scratch: Path) -> None:
    """A bank holds their difference from the base's, which has to be gathered."""
    source = with_adapters(build("gpt2"), {"late": LoRAConfig(r=2, target_modules=["q"], bias="all")})
    model = shard(build("gpt2"))
    model.load_lora(source.lora_adapter("late"), name="late")
    close(logits(model), logits(source))


def check_adapted_layers_that_are_units_themselves(scratch: Path) -> None:
    """fully_shard swaps a unit's class too; ours is then below it (added before) or above it (loaded after)."""
    config = LoRAConfig(r=2, target_modules=["embed_tokens", "lm_head", "q"])
    for order in ("before", "after"):
        source = with_adapters(build("llama"), {"a": config})
        model = source if order == "before" else build("llama")
        expected = logits(source)
        for layer in (model.model.embed_tokens, model.lm_head):
            fully_shard(layer)
        shard(model)
        if order == "after":
            model.load_lora(source.lora_adapter("a"), name="a")
        close(logits(model), expected)
        classes = [type(m) for m in model.modules()]
        if order == "before":
            with pytest.raises(LoRAStateError, match="was there before"):
                model.remove_lora("a")
            assert [type(m) for m in model.modules()] == classes
        else:
            model.remove_lora("a")
            assert torch.equal(logits(model), logits(build("llama")))
        assert isinstance(model.lm_head, FSDPModule)
        assert isinstance(model.lm_head, nn.Linear)


if __name__ == "__main__":
    main(collect(dict(globals())))
