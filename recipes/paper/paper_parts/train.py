"""One run: a method on a task, trained by the stock Trainer and measured."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import hf_lora
from hf_lora import initnames
from hf_lora.recipe import Recipe

from . import methods
from .costs import counted
from .fewshot import few_shot
from .methods import METHODS, Size
from .tasks import TaskData, collate

__all__ = ["predict", "run", "size_of"]

Step = Callable[[int, int], None]


def size_of(recipe: Recipe, system: Mapping[str, Any], data: TaskData | None = None) -> Size:
    """The size of a system: the recipe's LoRA, what the system itself says, and what its initialisation looks at."""
    own = {key: system[key] for key in ("bottleneck", "dropped", "tokens") if key in system}
    if data is not None and system["method"].startswith("lora") and recipe.lora.init in initnames.NEED_DATA:
        own["batches"] = tuple(_batches(recipe, data, int(system.get("init_batches", 16))))
    return Size(lora=recipe.lora, **own)


def _batches(recipe: Recipe, data: TaskData, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """The first training examples, in batches of the size that training has."""
    rows = int(recipe.training["per_device_train_batch_size"])
    for start in range(0, min(count * rows, len(data.train)), rows):
        yield collate(data.train[start : start + rows], data.found.pad)


def run(
    recipe: Recipe,
    system: Mapping[str, Any],
    data: TaskData,
    *,
    generation: Mapping[str, Any],
    shots: Mapping[str, Any],
    head_rate: float | None = None,
    step: Step = lambda done, total: None,
    start: Path | None = None,
    state: Path | None = None,
    keep: Path | None = None,
) -> dict[str, Any]:
    """Train and predict. Returns the predictions and what they cost.

    Args:
        head_rate: learning rate of a new head, the same for all systems; None: the system's own.
        system: the method's name and its sizes. generation: arguments of `generate`, for tasks of texts.
        shots: of few-shot prompting: base, count, max_eval. keep: folder to save a LoRA in.
        start: a `state` of the same system, trained on another task, to begin from; the head is new.
        state: file to save what was trained in, without the head.
    """
    from transformers import set_seed

    method, began = METHODS[system["method"]], time.perf_counter()
    if not method.trains:
        return few_shot(data, seed=recipe.seed, generation=generation, step=step, **shots)
    set_seed(recipe.seed)
    model = data.model()
    total = sum(p.numel() for p in model.parameters())
    began_to_apply = time.process_time()
    model = methods.apply(system["method"], model, size_of(recipe, system, data))
    beginning = time.process_time() - began_to_apply
    own, head = methods.trainable(model)
    if start is not None:
        _begin(model, start)
    found: dict[str, Any] = {"trainable": own, "head": head, "total": total}
    if own + head:
        found |= _train(model, recipe, data, head_rate, step, system.get("b_lr_ratio"), system.get("ranks"))
        found["trainable"], _ = methods.trainable(model)  # fewer where ranks were found
        found["cpu_seconds_beginning"] = round(beginning, 2)
    began_to_predict = time.perf_counter()
    found["predictions"] = predict(model, data, recipe, generation)
    found["seconds_predicting"] = round(time.perf_counter() - began_to_predict, 2)
    found["seconds"] = round(time.perf_counter() - began, 2)
    if keep is not None:
        model.save_lora(keep)
    if state is not None:
        _save(model, state)
    return found


def _own(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and not methods.is_head(n)}


def _save(model: Any, path: Path) -> None:
    from safetensors.torch import save

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(save({name: value.cpu().contiguous() for name, value in _own(model).items()}))
    os.replace(temporary, path)


def _begin(model: Any, path: Path) -> None:
    from safetensors.torch import load_file

    own, found = _own(model), load_file(path)
    if own.keys() != found.keys():
        raise ValueError(f"{path} is of another system: {sorted(own.keys() ^ found.keys())[:3]}. Remove it.")
    for name, value in own.items():
        value.copy_(found[name])


def _train(
    model: Any,
    recipe: Recipe,
    data: TaskData,
    head_rate: float | None,
    step: Step,
    b_lr_ratio: float | None = None,
    ranks: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step(state.global_step, state.max_steps)

    class Regularised(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found, added = super().compute_loss(*args, **kwargs), regularisation(model)
            return (found[0] + added, *found[1:]) if isinstance(found, tuple) else found + added

    losses = {"kasa_config": hf_lora.kasa_loss, "monteclora_config": hf_lora.monteclora_loss}
    regularisation = next((own for field, own in losses.items() if getattr(recipe.lora, field, None) is not None), None)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            **{
                "output_dir": folder,
                "seed": recipe.seed,
                "save_strategy": "no",
                "logging_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "remove_unused_columns": False,
                **recipe.training,
            }
        )
        arguments.dataloader_pin_memory &= arguments.device.type == "cuda"
        made = Trainer if regularisation is None else Regularised
        trainer = made(
            model,
            arguments,
            train_dataset=data.train,
            data_collator=lambda examples: collate(examples, data.found.pad),
            callbacks=[Progress(), *([] if ranks is None else [hf_lora.RankCallback(**ranks)])],
            optimizers=(_optimizer(model, arguments, head_rate, b_lr_ratio), None),
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        began, began_computing = time.perf_counter(), time.process_time()
        output = trainer.train()
    found = {
        "steps": output.global_step,
        "loss": round(output.training_loss, 4),
        "seconds_training": round(time.perf_counter() - began, 2),
        "cpu_seconds_training": round(time.process_time() - began_computing, 2),
    }
    batch = collate(data.train[: arguments.per_device_train_batch_size], data.found.pad)
    _, found["saved_bytes"] = counted(model.train(), {key: value.to(arguments.device) for key, value in batch.items()})
    return found


def _optimizer(model: Any, arguments: Any, head_rate: float | None, b_lr_ratio: float | None = None) -> Any:
    """Trainer's AdamW with a rate of the head's own, and of B's if a ratio is given; None: Trainer makes one."""
    if head_rate is None and b_lr_ratio is None:
        return None
    own: list[Any] = []
    head: list[Any] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if methods.is_head(name) else own).append(parameter)
    rate = arguments.learning_rate
    groups = [{"params": own, "lr": rate}, {"params": head, "lr": rate if head_rate is None else head_rate}]
    if b_lr_ratio is not None:
        of_head = set(map(id, head))
        apart = hf_lora.optimizer_groups(model, rate, b_lr_ratio=b_lr_ratio)
        ours = [{"params": [p for p in g["params"] if id(p) not in of_head], "lr": g["lr"]} for g in apart]
        groups = [*ours, groups[1]]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
    )


def predict(model: Any, data: TaskData, recipe: Recipe, generation: Mapping[str, Any]) -> list[Any]:
    """A class, a number or a text for each example, in their order."""
    model.eval()
    rows = int(recipe.training.get("per_device_eval_batch_size", 8))
    order = sorted(range(len(data.eval)), key=lambda i: len(data.eval[i]["input_ids"]))
    found: list[Any] = [None] * len(order)
    device = next(model.parameters()).device
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        examples = [{k: v for k, v in data.eval[i].items() if k != "labels"} for i in chosen]
        batch = {k: v.to(device) for k, v in collate(examples, data.found.pad, left=data.task.kind == "text").items()}
        with torch.inference_mode():
            if data.task.kind == "text":
                written = model.generate(**batch, **generation, pad_token_id=data.found.pad)
                texts = data.found.tokenizer.batch_decode(
                    written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
                )
                answers: list[Any] = [" ".join(text.split()) for text in texts]
            else:
                logits = model(**batch).logits.float()
                answers = logits[:, 0].tolist() if data.task.kind == "score" else logits.argmax(-1).tolist()
        for index, answer in zip(chosen, answers, strict=True):
            found[index] = answer
    return found
