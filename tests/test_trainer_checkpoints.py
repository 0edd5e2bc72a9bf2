"""The checkpoints of a run: which is loaded at the end, which stay, which is complete, and beginning again."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from loras import bits, with_adapters
from safetensors.torch import load_file
from training import logged, trainer

from hf_lora import LoRAConfig, LoRAFileError, LoRAMismatchError

pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")

QV = LoRAConfig(r=4, target_modules=["q", "v"], alpha=8, dropout=0.1)


def fresh(tiny: Any, *names: str, seed: int = 3) -> Any:
    """A model with a frozen adapter and those named, which train."""
    model = with_adapters(tiny("llama"), {"other": LoRAConfig(r=2, target_modules=["down"])})
    torch.manual_seed(seed)
    for name in names or ("org/task",):
        model.add_lora(QV, name)
    model.train_lora(names or "org/task")
    model.set_lora(list(names) or "org/task")
    return model


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.iterdir() if path.is_dir())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_holds(model: Any, name: str, folder: Path) -> None:
    """The adapter on the model is the one in the file, as safetensors alone reads it."""
    found, expected = model.lora_state_dict(name), tensors(folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# ---- the best, and which stay ----------------------------------------------------------------------------------------

WORST_IS_BEST = {  # the loss falls, so the first checkpoint is the "best"
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}


@pytest.mark.parametrize("names", [("a",), ("org/a", "b")], ids=["one", "two"])
def test_the_best_is_loaded_where_it_is_not_the_last(tiny: Any, tmp_path: Path, names: tuple[str, ...]) -> None:
    model = fresh(tiny, *names)
    other = model.lora_state_dict("other")
    run = trainer(model, tmp_path, learning_rate=0.05, **WORST_IS_BEST)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    for name in names:
        inside = f"lora-{name.replace('/', '%2F')}" if len(names) > 1 else "."
        assert_holds(model, name, best / inside)
        last = tensors(tmp_path / "checkpoint-6" / inside)
        assert any(not torch.equal(last[key], tensors(best / inside)[key]) for key in last)
    assert all(torch.equal(value, other[key]) for key, value in model.lora_state_dict("other").items())


def test_the_limit_keeps_the_best_and_the_last(tiny: Any, tmp_path: Path) -> None:
    options = {**WORST_IS_BEST, "save_total_limit": 2, "learning_rate": 0.05}
    run = trainer(fresh(tiny), tmp_path / "run", max_steps=8, **options)
    run.train()
    assert checkpoints(tmp_path / "run") == ["checkpoint-2", "checkpoint-8"]
    again = fresh(tiny, seed=9)
    trainer(again, tmp_path / "run", max_steps=10, **options).train(resume_from_checkpoint=True)
    assert_holds(again, "org/task", tmp_path / "run" / "checkpoint-2")  # the best of both runs


def test_a_limit_of_one_leaves_the_newest_whole(tiny: Any, tmp_path: Path) -> None:
    model = fresh(tiny)
    trainer(model, tmp_path, save_total_limit=1).train()
    assert checkpoints(tmp_path) == ["checkpoint-6"]
    assert_holds(model, "org/task", tmp_path / "checkpoint-6")


def test_checkpoints_at_the_ends_of_epochs(tiny: Any, tmp_path: Path) -> None:
    options = {"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch", "gradient_accumulation_steps": 2}
    model = fresh(tiny)
    whole = trainer(model, tmp_path / "whole", **options)  # 5 batches an epoch: the last update has one alone
    whole.train()
    assert checkpoints(tmp_path / "whole") == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    for step in (3, 6):
        again = fresh(tiny, seed=9)
        resumed = trainer(again, tmp_path / f"{step}", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert logged(resumed) == logged(whole)
        assert bits(again) == bits(model)


def test_resuming_twice_is_as_never(tiny: Any, tmp_path: Path) -> None:
    model = fresh(tiny, "a", "b")
    trainer(model, tmp_path / "whole", max_steps=8).train()

    class Stop(transformers.TrainerCallback):
        def __init__(self, at: int) -> None:
            self.at = at

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= self.at

    for seed, at in ((3, 2), (11, 6), (12, 8)):
        again = fresh(tiny, "a", "b", seed=seed)
        run = trainer(again, tmp_path / "run", max_steps=8, callbacks=[Stop(at)])
        run.train(resume_from_checkpoint=at > 2 or None)
    assert bits(again) == bits(model)


# ---- save_only_model -------------------------------------------------------------------------------------------------


def test_weights_alone_are_resumed_from_only_if_that_is_what_the_run_saves(
    tiny: Any, tmp_path: Path, caplog: Any
) -> None:
    trainer(fresh(tiny), tmp_path, save_only_model=True, max_steps=2).train()
    names = {p.name for p in (tmp_path / "checkpoint-2").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json", "training_args.bin"}
    model = fresh(tiny, seed=9)
    before = bits(model)
    for source in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(LoRAFileError, match=r"optimizer\.pt is missing"):
            trainer(model, tmp_path).train(resume_from_checkpoint=source)
        assert bits(model) == before
    with pytest.raises(LoRAFileError, match="set save_only_model=True"):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with caplog.at_level(logging.WARNING, "hf_lora"):
        run = trainer(model, tmp_path, save_only_model=True, max_steps=4, learning_rate=0.0)
        run.train(resume_from_checkpoint=True)
    assert "begins anew" in caplog.text
    assert_holds(model, "org/task", tmp_path / "checkpoint-2")  # at a rate of 0, what was loaded


# ---- complete or not -------------------------------------------------------------------------------------------------

DAMAGE: dict[str, tuple[Any, str]] = {
    "no adapter": (lambda f: (f / "adapter_model.safetensors").unlink(), r"has no adapter_model\.safetensors"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), r"adapter_config\.json does not exist"),
    "adapter cut": (lambda f: cut(f / "adapter_model.safetensors"), r"adapter_model\.safetensors"),
    "no optimizer": (lambda f: (f / "optimizer.pt").unlink(), r"optimizer\.pt is missing"),
    "optimizer cut": (lambda f: cut(f / "optimizer.pt"), r"optimizer\.pt is damaged"),
    "optimizer with wrong bytes": (lambda f: spoil(f / "optimizer.pt"), r"optimizer\.pt is damaged"),
    "no scheduler": (lambda f: (f / "scheduler.pt").unlink(), r"scheduler\.pt is missing"),
    "generators cut": (lambda f: cut(f / "rng_state.pth"), r"rng_state\.pth is damaged"),
    "no generators": (lambda f: (f / "rng_state.pth").unlink(), r"rng_state\.pth is missing"),
    "no state": (lambda f: (f / "trainer_state.json").unlink(), r"trainer_state\.json is missing"),
    "state cut": (lambda f: cut(f / "trainer_state.json"), r"trainer_state\.json is missing or cut short"),
    "empty": (lambda f: [p.unlink() for p in f.iterdir()], r"adapter_config\.json does not exist|no adapter_model"),
}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 256] = bytes(byte ^ 0xFF for byte in data[middle : middle + 256])  # more than the padding
    path.write_bytes(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: Any) -> Any:
    """A run with checkpoints 2, 4 and 6, made once: (folder, losses, bits)."""
    made: dict[str, Any] = {}

    def of(tiny: Any) -> tuple[Path, Any, Any]:
        if not made:
            model, folder = fresh(tiny), tmp_path_factory.mktemp("finished")
            run = trainer(model, folder, max_steps=6)
            run.train()
            made.update(folder=folder, losses=logged(run), bits=bits(model))
        return made["folder"], made["losses"], made["bits"]

    return of


@pytest.mark.parametrize("what", DAMAGE)
def test_an_incomplete_newest_checkpoint(tiny: Any, tmp_path: Path, finished: Any, caplog: Any, what: str) -> None:
    """Named: refused, with what to do instead. True: the newest complete one, with a warning. Both end alike."""
    source, losses, expected = finished(tiny)
    run = tmp_path / "run"
    shutil.copytree(source, run)
    shutil.rmtree(run / "checkpoint-6")
    damage, message = DAMAGE[what]
    damage(run / "checkpoint-4")
    model = fresh(tiny, seed=9)
    before = bits(model)
    with pytest.raises(LoRAFileError, match=message) as caught:
        trainer(model, run).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert f"trainer.train(resume_from_checkpoint={str(run / 'checkpoint-2')!r})" in str(caught.value)
    assert bits(model) == before
    with caplog.at_level(logging.WARNING, "hf_lora"):
        resumed = trainer(model, run)
        resumed.train(resume_from_checkpoint=True)
    assert str(run / "checkpoint-4") in caplog.text
    assert f"Resuming from {run / 'checkpoint-2'}" in caplog.text
    assert logged(resumed) == losses
    assert bits(model) == expected
    assert checkpoints(run) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


def test_no_complete_checkpoint_at_all(tiny: Any, tmp_path: Path, finished: Any) -> None:
    shutil.copytree(finished(tiny)[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    cut(tmp_path / "checkpoint-2" / "optimizer.pt")
    model = fresh(tiny, seed=9)
    before = bits(model)
    with pytest.raises(LoRAFileError, match=r"No checkpoint in .* is complete[\s\S]*optimizer\.pt is damaged"):
        trainer(model, tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(LoRAFileError, match="train without resume_from_checkpoint"):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert bits(model) == before


def test_no_checkpoint_is_stock_trainers_error(tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        trainer(fresh(tiny), tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("saved", "names", "message"),
    [
        (("a", "b"), ("a",), "holds 'a', 'b'; on this model 'a' would be loaded"),
        (("a",), ("a", "b"), "holds one adapter alone; on this model 'a', 'b' would be loaded"),
        (("a", "b"), ("a", "c"), "holds 'a', 'b'; on this model 'a', 'c' would be loaded"),
    ],
    ids=["fewer", "more", "others"],
)
def test_a_checkpoint_of_other_adapters(tiny: Any, tmp_path: Path, saved: Any, names: Any, message: str) -> None:
    trainer(fresh(tiny, *saved), tmp_path, max_steps=2).train()
    model = fresh(tiny, *names, seed=9)
    before = bits(model)
    for source in (True, str(tmp_path / "checkpoint-2")):
        with pytest.raises(LoRAMismatchError, match=message):
            trainer(model, tmp_path).train(resume_from_checkpoint=source)
        assert bits(model) == before


# ---- writing over an older run's checkpoints -------------------------------------------------------------------------


class Interrupted(RuntimeError):
    pass


def test_a_checkpoint_that_is_being_written_over_is_kept_until_the_new_one_is_whole(
    tiny: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    trainer(fresh(tiny), tmp_path, max_steps=2).train()
    old = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()}

    def interrupt(*args: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_rng_state", interrupt)
        with pytest.raises(Interrupted):
            trainer(fresh(tiny, seed=9), tmp_path, max_steps=2).train()
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-2").iterdir()} == old
    model = fresh(tiny, seed=9)
    trainer(model, tmp_path, max_steps=2).train()
    assert_holds(model, "org/task", tmp_path / "checkpoint-2")
    assert checkpoints(tmp_path) == ["checkpoint-2"]


# ---- auto_find_batch_size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resumed", [False, True], ids=["from the start", "resumed"])
def test_running_out_of_memory_begins_again_where_the_run_began(tiny: Any, tmp_path: Path, resumed: bool) -> None:
    """Equal to a run that had the smaller batch from the start: weights, optimizer, schedule, dropout."""

    def needs(model: Any, limit: int, after: int) -> None:
        seen = 0

        def hook(module: Any, args: Any, kwargs: Any) -> None:
            nonlocal seen
            seen += 1
            if len(kwargs["input_ids"]) > limit and seen > after:
                torch.empty(1 << 60)  # a real "DefaultCPUAllocator: can't allocate memory"

        model.register_forward_pre_hook(hook, with_kwargs=True)

    options = {"auto_find_batch_size": True, "save_steps": 1}
    source = None
    if resumed:
        trainer(fresh(tiny), tmp_path / "first", **options).train()
        source = str(tmp_path / "first" / "checkpoint-2")
    small = fresh(tiny, seed=9)
    expected = trainer(small, tmp_path / "small", per_device_train_batch_size=3, **options)
    if resumed:  # stock Trainer takes the batch size from the checkpoint
        state = tmp_path / "first" / "checkpoint-2" / "trainer_state.json"
        text = state.read_text()
        state.write_text(text.replace('"train_batch_size": 4', '"train_batch_size": 3'))
    expected.train(resume_from_checkpoint=source)
    if resumed:
        state.write_text(text)
    model = fresh(tiny, seed=9)
    needs(model, 3, after=2)
    run = trainer(model, tmp_path / "run", **options)
    run.train(resume_from_checkpoint=source)
    assert run._train_batch_size == 3
    assert bits(model) == bits(small)
    assert logged(run)[-4:] == logged(expected)[-4:]


# ---- what is wrapped -------------------------------------------------------------------------------------------------

WRAPPED = {
    "train": (["resume_from_checkpoint", "trial", "ignore_keys_for_eval"], "skipping incomplete checkpoints"),
    "_load_from_checkpoint": (["resume_from_checkpoint", "model"], "resuming"),
    "_load_best_model": ([], "load_best_model_at_end"),
    "_save_checkpoint": (["model", "trial"], "keeping old checkpoints until new ones are whole"),
    "_inner_training_loop": (
        ["batch_size", "args", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
        "beginning again after running out of memory",
    ),
    "_get_output_dir": (["trial"], "finding the folder of a checkpoint"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_private_method_is_what_it_was(name: str) -> None:
    parameters, loses = WRAPPED[name]
    here = f"transformers {transformers.__version__}"
    method = getattr(transformers.Trainer, name, None)
    assert method is not None, f"{here} has no Trainer.{name} any more: {loses} needs another place"
    found = [p for p in inspect.signature(inspect.unwrap(method)).parameters if p != "self"]
    assert found == parameters, f"{here} changed Trainer.{name}({', '.join(found)}): check {loses}"


def test_a_checkpoints_state_is_written_last(tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """That trainer_state.json is there says that all is there."""
    from transformers import TrainerState

    present: list[set[str]] = []
    save = TrainerState.save_to_json

    def watched(self: Any, path: Any) -> None:
        present.append({p.name for p in Path(path).parent.iterdir()})
        save(self, path)

    monkeypatch.setattr(TrainerState, "save_to_json", watched)
    trainer(fresh(tiny), tmp_path, max_steps=2).train()
    after = {p.name for p in (tmp_path / "checkpoint-2").iterdir()}
    here = f"transformers {transformers.__version__}"
    assert present[0] == after - {"trainer_state.json"}, (
        f"{here} writes files of a checkpoint after trainer_state.json: a half-written one may look complete"
    )
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= after, f"{here} calls a checkpoint's files otherwise"


def test_stock_trainer_still_takes_a_half_written_checkpoint(tmp_path: Path) -> None:
    """Why `train` is wrapped at all. If this fails, transformers looks at what is in the folder: wrap less."""
    from transformers.trainer_utils import get_last_checkpoint

    for name in ("checkpoint-2", "checkpoint-4", "_replaced-checkpoint-6"):
        (tmp_path / name).mkdir()
    found = get_last_checkpoint(str(tmp_path))
    assert Path(found).name == "checkpoint-4", f"transformers {transformers.__version__} chooses {found}"


def test_a_method_that_is_gone_is_said_and_the_rest_works(monkeypatch: Any, caplog: Any) -> None:
    import types

    from hf_lora.integrations import trainer as ours
    from hf_lora.integrations.patching import Registry

    stock = {name: inspect.unwrap(vars(transformers.Trainer)[name]) for name in ours._WRAPPERS}
    del stock["_load_best_model"]
    module = types.SimpleNamespace(Trainer=type("Trainer", (), stock))
    registry = Registry()
    with caplog.at_level(logging.WARNING, "hf_lora"):
        ours._wrap(registry, module)  # type: ignore[arg-type]
    assert f"transformers {transformers.__version__} has no Trainer._load_best_model" in caplog.text
    assert registry.is_set(module.Trainer, "_load_from_checkpoint")


def test_stock_trainer_does_one_step_more_after_the_last(tiny: Any, tmp_path: Path) -> None:
    """What docs/pages/trainer-features.md says of it, on a model without a LoRA. If this fails, take it out there."""
    trainer(tiny("llama"), tmp_path, max_steps=2).train()
    run = trainer(tiny("llama"), tmp_path, max_steps=2)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == 3, f"transformers {transformers.__version__} stops where the run had ended"
