"""One run: a method on a task, trained by the stock Trainer and measured."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from hf_lora.recipe import Recipe

from . import methods
from .fewshot import few_shot
from .methods import METHODS, Size
from .tasks import TaskData, collate

__all__ = ["predict", "run", "size_of"]

Step = Callable[[int, int], None]


def size_of(recipe: Recipe, system: Mapping[str, Any]) -> Size:
    """The size of a system: the recipe's LoRA, and what the system itself says."""
    own = {key: system[key] for key in ("bottleneck", "dropped", "tokens") if key in system}
    return Size(lora=recipe.lora, **own)


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
    model = methods.apply(system["method"], model, size_of(recipe, system))
    own, head = methods.trainable(model)
    if start is not None:
        _begin(model, start)
    found: dict[str, Any] = {"trainable": own, "head": head, "total": total}
    if own + head:
        found |= _train(model, recipe, data, head_rate, step)
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


def _train(model: Any, recipe: Recipe, data: TaskData, head_rate: float | None, step: Step) -> dict[str, Any]:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step(state.global_step, state.max_steps)

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
        trainer = Trainer(
            model,
            arguments,
            train_dataset=data.train,
            data_collator=lambda examples: collate(examples, data.found.pad),
            callbacks=[Progress()],
            optimizers=(_optimizer(model, arguments, head_rate), None),
        )
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        began = time.perf_counter()
        output = trainer.train()
    return {
        "steps": output.global_step,
        "loss": round(output.training_loss, 4),
        "seconds_training": round(time.perf_counter() - began, 2),
    }


def _optimizer(model: Any, arguments: Any, head_rate: float | None) -> Any:
    """Trainer's AdamW with a rate of the head's own; None: Trainer makes one."""
    if head_rate is None:
        return None
    groups: dict[bool, list[Any]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[methods.is_head(name)].append(parameter)
    rates = {False: arguments.learning_rate, True: head_rate}
    return torch.optim.AdamW(
        [{"params": found, "lr": rates[head]} for head, found in groups.items() if found],
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
