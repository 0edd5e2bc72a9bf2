"""What `LoRACallback` puts into Trainer's logs: the numbers, and where they arrive."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import randomise

import hf_lora
from hf_lora import LoRACallback, LoRAConfig
from hf_lora.progress import Progress

pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")


def rows(n: int = 16) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 64, (n, 9), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer(model: Any, folder: Path, *callbacks: Any, kind: Any = None, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    fixed: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
    }
    arguments = TrainingArguments(str(folder), **{**fixed, **options})
    return (kind or Trainer)(model, arguments, callbacks=list(callbacks), train_dataset=rows(), eval_dataset=rows(4))


def with_lora(tiny: Any, family: str = "llama", **options: Any) -> Any:
    model = tiny(family)
    torch.manual_seed(3)
    model.add_lora(LoRAConfig(**{"r": 4, "target_modules": ["q", "v"], "alpha": 8, **options}), "task")
    return model


# ---- the numbers -----------------------------------------------------------------------------------------------------


def by_hand(A: torch.Tensor, B: torch.Tensor, scaling: float) -> tuple[float, float]:
    """‖ΔW‖² and the effective rank, of a dense ΔW in float64."""
    delta = scaling * B.double() @ A.double()
    sigma = torch.linalg.svdvals(delta)[: A.shape[0]]
    p = sigma / sigma.sum()
    p = p[p > 1e-12]
    return float((delta**2).sum()), math.exp(-float((p * p.log()).sum()))


def test_norms_and_ranks_are_those_of_the_dense_matrices(tiny: Any) -> None:
    model = with_lora(tiny, target_modules=["q", "v", "down"])
    randomise(model)
    with torch.no_grad():  # one layer collapsed to one direction, one untouched
        model.model.layers[0].self_attn.q_proj.lora_slots.B0[:, 1:] = 0
        model.model.layers[1].mlp.down_proj.lora_slots.B0.zero_()
    found = Progress(model).measure()
    for role, layer in {"q": "self_attn.q_proj", "v": "self_attn.v_proj", "down": "mlp.down_proj"}.items():
        squares, ranks, base = 0.0, [], 0.0
        for block in model.model.layers:
            module = block.get_submodule(layer)
            square, rank = by_hand(module.lora_slots.A0.data, module.lora_slots.B0.data, 2.0)
            squares, base = squares + square, base + float((module.weight.double() ** 2).sum())
            ranks.append(rank if square else 0.0)
        assert found[f"delta_norm/{role}"] == pytest.approx(math.sqrt(squares / base), rel=1e-9)
        assert found[f"effective_rank/{role}"] == pytest.approx(sum(ranks) / 2, rel=1e-6)
    assert len(found) == 6


def test_roles_of_fused_and_transposed_layers_are_measured_apart(tiny: Any) -> None:
    """GPT-2's c_attn holds q, k and v, stored (in, out); q and v take an adapter each."""
    model = with_lora(tiny, "gpt2", target_modules=["q", "v"], r=2)
    randomise(model)
    found = Progress(model).measure()
    assert set(found) == {"delta_norm/q", "delta_norm/v", "effective_rank/q", "effective_rank/v"}
    value = hf_lora.model.read(model, "task")
    for i, rows_ in {0: slice(0, 32), 1: slice(64, 96)}.items():
        square = base = 0.0
        for path, factors in value.factors.items():
            delta = factors.scaling * (factors.B.double() @ factors.A.double())
            square += float((delta[rows_] ** 2).sum())
            base += float((model.get_submodule(path).weight.double().T[rows_] ** 2).sum())
        assert found[f"delta_norm/{'qv'[i]}"] == pytest.approx(math.sqrt(square / base), rel=1e-6)


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("gpt2", {"target_modules": ["q", "v"]}, {"target_modules": ["v"]}),  # v is the second block, and the first
        ("llama", {"target_modules": ["q"], "layers_to_transform": [0]}, {"target_modules": ["q"]}),
    ],
)
def test_an_adapters_norm_is_of_its_own_layers_whatever_trains_beside_it(
    tiny: Any, family: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    model = tiny(family)
    model.add_lora(LoRAConfig(r=2, **first), "first")
    model.add_lora(LoRAConfig(r=2, **second), "second")
    model.train_lora(["first", "second"])
    randomise(model)
    both = Progress(model).measure()
    for name in ("first", "second"):
        model.train_lora(name)
        alone = {f"{name}/{key}": number for key, number in Progress(model).measure().items()}
        assert alone == pytest.approx({key: number for key, number in both.items() if key.startswith(name)})
        value = hf_lora.model.read(model, name)
        rows_ = slice(64, 96) if family == "gpt2" else slice(None)  # v, of c_attn's q, k and v
        role, square, base = "v" if family == "gpt2" else "q", 0.0, 0.0
        for path, factors in value.factors.items():
            weight = model.get_submodule(path).weight.double()
            square += float((factors.delta().double()[rows_] ** 2).sum())
            base += float(((weight.T if family == "gpt2" else weight)[rows_] ** 2).sum())
        assert both[f"{name}/delta_norm/{role}"] == pytest.approx(math.sqrt(square / base), rel=1e-5)


def test_embeddings_are_measured(tiny: Any) -> None:
    model = with_lora(tiny, target_modules=["embed_tokens"])
    randomise(model)
    slots = model.model.embed_tokens.lora_slots
    square, rank = by_hand(slots.A0.data, slots.B0.data, 2.0)
    found = Progress(model).measure()
    base = float((model.model.embed_tokens.weight.double() ** 2).sum())
    assert found["delta_norm/embed_tokens"] == pytest.approx(math.sqrt(square / base), rel=1e-9)
    assert found["effective_rank/embed_tokens"] == pytest.approx(rank, rel=1e-6)


def test_a_diverged_adapter_is_told_and_does_not_stop_the_run(tiny: Any) -> None:
    model = with_lora(tiny)
    model.model.layers[0].self_attn.q_proj.lora_slots.B0.data.fill_(math.nan)
    found = Progress(model).measure()
    assert math.isnan(found["delta_norm/q"])
    assert math.isnan(found["effective_rank/q"])
    assert found["delta_norm/v"] == 0


def test_a_quantised_base_has_no_norm_and_the_log_says_why(tiny: Any, tmp_path: Path, caplog: Any) -> None:
    model = with_lora(tiny)
    for block in model.model.layers:
        layer = block.self_attn.q_proj
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    progress = Progress(model)
    assert set(progress.measure()) == {"effective_rank/q", "effective_rank/v", "delta_norm/v"}
    assert "q_proj is quantised (torch.float8_e4m3fn)" in progress.left_out["q"]
    callback = LoRACallback()
    run = trainer(with_lora(tiny), tmp_path, callback)
    callback.on_train_begin(run.args, run.state, run.control, model=model)
    for _ in range(2):
        assert "lora/delta_norm/q" not in callback.numbers({"loss": 1.0})
    (told,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "q: model.layers.1.self_attn.q_proj is quantised (torch.float8_e4m3fn)." in told


# ---- the gradient's norm ---------------------------------------------------------------------------------------------


def own_norm(model: Any, batches: list[Any]) -> float:
    """‖g‖ of the adapter for the mean loss over the batches' tokens, by autograd."""
    model.zero_grad()
    inputs = torch.cat([torch.stack([row["input_ids"] for row in batch]) for batch in batches])
    model(input_ids=inputs, labels=inputs).loss.backward()
    grads = [p.grad for path, p in model.named_parameters() if p.grad is not None and "lora_slots" in path]
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in grads))


@pytest.mark.parametrize("max_grad_norm", [0.01, 100.0, 0.0])
@pytest.mark.parametrize("others", [False, True], ids=["adapter alone", "the norm trains too"])
def test_the_gradients_norm_is_the_adapters_accumulated_and_not_clipped(
    tiny: Any, tmp_path: Path, max_grad_norm: float, others: bool
) -> None:
    model = with_lora(tiny)
    randomise(model)
    model.model.norm.weight.requires_grad_(others)
    seen: list[Any] = []

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        seen.append(batch)
        ids = torch.stack([row["input_ids"] for row in batch])
        labels = ids.clone()
        labels[:, 0] = -100  # nothing predicts it, but older Trainers count it in the mean
        return {"input_ids": ids, "labels": labels}

    expected = copy_of(model)
    run = trainer(
        model, tmp_path, LoRACallback(), max_steps=1, gradient_accumulation_steps=2, max_grad_norm=max_grad_norm
    )
    run.data_collator = collate
    run.train()
    (log,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert log["lora/grad_norm"] == pytest.approx(own_norm(expected, seen[:2]), rel=1e-4)
    total = log.get("grad_norm", 0.0)  # older Trainers log none where they do not clip
    assert total or not max_grad_norm
    assert (log["lora/grad_norm"] < 0.999 * total) is (others and bool(total))
    assert log["lora/grad_norm"] > 0.01  # so that the first case clips


def copy_of(model: Any) -> Any:
    import copy

    return copy.deepcopy(model).eval()


# ---- where they arrive -----------------------------------------------------------------------------------------------

NAMES = {
    "lora/trainable_share",
    "lora/grad_norm",
    "lora/delta_norm/q",
    "lora/delta_norm/v",
    "lora/effective_rank/q",
    "lora/effective_rank/v",
}


def reporter(into: list[dict[str, Any]]) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        """Stands where the integrations of `report_to` stand: before a user's callbacks."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            into.append(dict(logs))

    return Reporter()


def test_they_reach_the_history_the_integrations_and_the_printed_line(tiny: Any, tmp_path: Path, capsys: Any) -> None:
    reported: list[dict[str, Any]] = []
    model = with_lora(tiny)
    run = trainer(model, tmp_path, LoRACallback(), eval_strategy="steps", eval_steps=1)
    run.callback_handler.callbacks.insert(0, reporter(reported))
    run.train()
    for logs in (run.state.log_history, reported):
        training = [entry for entry in logs if "loss" in entry]
        assert len(training) == 3
        assert all({name for name in entry if name.startswith("lora/")} == NAMES for entry in training)
        assert not any(name.startswith("lora/") for entry in logs if "loss" not in entry for name in entry)
    assert "lora/delta_norm/q" in capsys.readouterr().out
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    share = sum(trained) / sum(p.numel() for p in tiny("llama").parameters())
    assert reported[0]["lora/trainable_share"] == share
    norms = [entry["lora/delta_norm/q"] for entry in run.state.log_history if "loss" in entry]
    assert 0 < norms[0] < norms[-1]
    assert norms[-1] == Progress(model).measure()["delta_norm/q"]  # of after the step, as the log's step says


def test_they_reach_tensorboard(tiny: Any, tmp_path: Path) -> None:
    written: dict[str, float] = {}

    class Writer:
        def add_scalar(self, name: str, value: float, step: int) -> None:
            written[name] = value

        def __getattr__(self, name: str) -> Any:
            return lambda *args, **kwargs: None

    from transformers.integrations import TensorBoardCallback

    run = trainer(with_lora(tiny), tmp_path, LoRACallback())
    board = TensorBoardCallback.__new__(TensorBoardCallback)
    board.tb_writer, board._SummaryWriter, board.logging_dir = Writer(), None, None
    run.callback_handler.callbacks.insert(1, board)
    run.train()
    assert {f"train/{name}" for name in NAMES} <= written.keys()


def test_several_adapters_have_names_of_their_own(tiny: Any, tmp_path: Path) -> None:
    model = with_lora(tiny)
    model.add_lora(LoRAConfig(r=2, target_modules=["k"]), "org/second")
    model.train_lora(["task", "org/second"])
    model.set_lora(["task", "org/second"])
    run = trainer(model, tmp_path, LoRACallback())
    run.train()
    names = {name for name in run.state.log_history[0] if "delta_norm" in name}
    assert names == {"lora/task/delta_norm/q", "lora/task/delta_norm/v", "lora/org/second/delta_norm/k"}


def test_a_subclass_with_its_own_log_and_compiled_and_accumulated_runs_work_too(tiny: Any, tmp_path: Path) -> None:
    from transformers import Trainer

    class Own(Trainer):
        def log(self, logs: Any, start_time: Any = None) -> None:
            logs["mine"] = 1.0
            super().log(logs, start_time)

    run = trainer(with_lora(tiny), tmp_path, LoRACallback(), kind=Own)
    run.train()
    assert {"mine", *NAMES} <= run.state.log_history[0].keys()


def test_without_the_callback_logs_are_as_ever(tiny: Any, tmp_path: Path) -> None:
    run = trainer(with_lora(tiny), tmp_path)
    run.train()
    assert not any(name.startswith("lora/") for entry in run.state.log_history for name in entry)
    hf_lora.unregister()
    try:
        other = trainer(tiny("llama"), tmp_path)
        other.train()
    finally:
        hf_lora.register()
    assert run.state.log_history[0].keys() == other.state.log_history[0].keys()


def test_the_numbers_change_nothing_in_the_training(tiny: Any, tmp_path: Path) -> None:
    plain, watched = with_lora(tiny, dropout=0.1), with_lora(tiny, dropout=0.1)
    trainer(plain, tmp_path).train()
    trainer(watched, tmp_path, LoRACallback()).train()
    a, b = plain.lora_state_dict(), watched.lora_state_dict()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_trainer_has_the_log_method_that_is_wrapped() -> None:
    """If this fails, transformers changed `Trainer.log`: LoRACallback's numbers need another way in."""
    from transformers import Trainer
    from transformers.trainer_callback import CallbackHandler

    method = inspect.unwrap(Trainer.log)
    assert list(inspect.signature(method).parameters) == ["self", "logs", "start_time"]
    source = inspect.getsource(method)
    assert source.index("log_history.append") < source.index("callback_handler.on_log")
    assert "self.callbacks" in inspect.getsource(CallbackHandler.call_event)
