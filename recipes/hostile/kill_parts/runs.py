"""A checkpoint of the stock Trainer: killed while the run writes it, and the run that goes on from what is left."""

from __future__ import annotations

import hashlib
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .killing import Going, ended
from .operations import Operation, digests, tiny_llama

SAVED_AT, STEPS = 4, 5  # the step whose checkpoint is killed (checkpoint-2 is there before); the whole run


class Checkpoint(Operation):
    """A run of two adapters with `LoRACallback` and `save_steps=2`.

    The process that trains stops before the save of step 4, and every kill is of a copy of it that goes on from there.
    """

    name = "checkpoint"
    reads_forked, settles = True, False  # the run that goes on saves step 4 again: see `judge`

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        super().__init__(folder)
        self.limit = limit  # save_total_limit: older checkpoints are removed after a save
        self.run = folder / "run"
        self.expected = self._train(folder / "whole", 0)
        shutil.rmtree(folder / "whole")

    def _trainer(self, run: Path, seed: int, *callbacks: Any) -> Any:
        import transformers

        from hf_lora import LoRACallback, LoRAConfig

        model = tiny_llama()
        torch.manual_seed(seed)
        for name in ("org/a", "b"):
            model.add_lora(LoRAConfig(r=4, target_modules=["q", "v"], dropout=0.1), name)
        model.train_lora(["org/a", "b"])
        model.set_lora(["org/a", "b"])
        ids = torch.randint(3, 96, (20, 9), generator=torch.Generator().manual_seed(7))
        arguments = transformers.TrainingArguments(
            str(run),
            max_steps=STEPS,
            save_steps=2,
            save_total_limit=self.limit,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=5,
        )
        rows = [{"input_ids": row, "labels": row} for row in ids]
        return transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[LoRACallback(), *callbacks])

    def _train(self, run: Path, seed: int, resume: bool = False, *callbacks: Any) -> str:
        """The digest of the weights at the end."""
        made = self._trainer(run, seed, *callbacks)
        made.train(resume_from_checkpoint=resume)
        total = hashlib.sha256()
        for key, tensor in sorted(made.model.state_dict().items()):
            total.update(key.encode() + tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def at_the_save(self, work: Callable[[], None]) -> None:
        """Train, and do `work` before step 4 is saved."""
        import transformers

        operation = self

        class Stop(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == SAVED_AT:
                    operation.start = digests(operation.run / "checkpoint-2")
                    shutil.copytree(operation.run, operation.folder / "start")
                    try:
                        work()
                    except Going:
                        return  # a copy that saves now
                    control.should_training_stop, control.should_save = True, False

            def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == SAVED_AT:
                    ended()

        self._train(self.run, 0, False, Stop())

    def before(self, chance: random.Random) -> str:
        kind = chance.choice(["an earlier checkpoint", "what the last kill left"])
        if kind == "an earlier checkpoint" or not (self.run / "checkpoint-2").is_dir():
            kind = "an earlier checkpoint"
            shutil.rmtree(self.run, ignore_errors=True)
            shutil.copytree(self.folder / "start", self.run)
        return kind

    def act(self) -> None:
        raise Going

    def judge(self) -> str:
        """Resume in a copy of the folder, by a run that begins with other weights."""
        import transformers

        began: list[int] = []

        class Began(transformers.TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                began.append(state.global_step)

        if (self.run / "checkpoint-2").is_dir():
            assert self.limit or digests(self.run / "checkpoint-2") == self.start, "what was saved before is lost"
        with tempfile.TemporaryDirectory(dir=self.folder) as other:
            shutil.copytree(self.run, Path(other) / "run")
            found = self._train(Path(other) / "run", 77, True, Began())
            left = [path.name for path in (Path(other) / "run").iterdir()]
        assert found == self.expected, "half-written and read as good"
        assert began[0] in (2, SAVED_AT), began
        assert all(name.startswith("checkpoint-") for name in left), f"left over: {left}"
        return "new" if began[0] == SAVED_AT else "old"

    def half_written(self) -> bool:
        from hf_lora import LoRAFileError

        folder = self.run / f"checkpoint-{SAVED_AT}"
        if not folder.is_dir() or (folder / "trainer_state.json").is_file():
            return False
        try:
            self._trainer(self.run, 77).train(resume_from_checkpoint=str(folder))
        except LoRAFileError as error:
            if str(folder) in str(error):
                return True
            raise
        raise AssertionError("half-written and read as good")

    def settle(self) -> None:
        """See `judge`."""


class Rotated(Checkpoint):
    """The same with `save_total_limit=1`: the older checkpoint is removed once the new one is whole."""

    name = "checkpoint, rotated"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, limit=1)
