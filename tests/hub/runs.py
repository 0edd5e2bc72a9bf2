"""Trainer runs that push to the hub: in this process, or (run as a program) in a child where peft may be blocked."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

STEPS, SAVE = 4, 2
SEVERAL = ("org/task", "second")


def rows(n: int = 16) -> list[dict[str, Any]]:
    import torch

    ids = torch.randint(3, 64, (n, 9), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row} for row in ids]


def model_with(names: tuple[str, ...]) -> Any:
    """The base from the hub, with adapters that all train."""
    import torch
    from transformers import AutoModelForCausalLM

    import hf_lora

    model = AutoModelForCausalLM.from_pretrained("me/base")
    torch.manual_seed(3)
    for name, targets in zip(names, (["q", "v"], ["down"]), strict=False):
        model.add_lora(hf_lora.LoRAConfig(r=2, target_modules=targets), name)
    if names:
        model.train_lora(names)
        model.set_lora(dict.fromkeys(names, 1.0) if len(names) > 1 else names[0])
    return model


def trainer(model: Any, folder: Path | str, **options: Any) -> Any:
    """A stock Trainer that pushes every save, in order, to me/<the folder's name>."""
    from transformers import Trainer, TrainingArguments

    fixed: dict[str, Any] = {
        "max_steps": STEPS,
        "save_steps": SAVE,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        "push_to_hub": True,
        "hub_always_push": True,
    }
    arguments = TrainingArguments(str(folder), **{**fixed, **options})
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(4))


if __name__ == "__main__":
    tests = Path(__file__).resolve().parents[1]
    sys.path[:] = [str(tests), *(path for path in sys.path if Path(path or ".").resolve() != tests / "hub")]
    if os.environ.get("HF_LORA_BLOCK_PEFT") == "1":
        offline = os.environ["HF_HUB_OFFLINE"]
        import conftest  # blocks peft

        os.environ["HF_HUB_OFFLINE"] = offline
        with contextlib.suppress(ImportError):
            import peft

            sys.exit(f"peft is not blocked, {conftest.BLOCK_PEFT=}: {peft}")
    for folder, names, options in json.loads(sys.argv[1]):
        run = trainer(model_with(tuple(names)), folder, **options)
        run.train()
        run.push_to_hub()
