"""`RankCallback`: ranks that are found while a stock Trainer trains.

Imported when it is used: it needs transformers' Trainer.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from transformers.trainer_callback import TrainerCallback

from .errors import LoRAConfigError, LoRAFileError
from .model import require
from .ranks import RankAllocator, check

__all__ = ["RankCallback"]

_LOG = logging.getLogger(__name__)
_FILE = "rank_schedule.safetensors"


class RankCallback(TrainerCallback):
    """Runs a `RankAllocator` in a Trainer and cuts the adapter when training ends.

    Give it before `LoRACallback`, whose merge and push are of the adapter that was cut. Until the end all Parameters
    keep their shapes, and each checkpoint holds the schedule's state, so that a run can be resumed at any step, bit for
    bit. `allocator.ranks` says which ranks were found.

    Args:
        target_rank, energy, importance, adapter, every, beta1, beta2: of `RankAllocator`.
        begin, end: shares of the run's steps between which parts are taken away, 0 ≤ begin < end ≤ 1.

    Raises:
        LoRAConfigError: an argument is impossible. When training begins: as `RankAllocator`; LoRAFileError: the
            checkpoint that is resumed from has no state of the schedule.
    """

    def __init__(
        self,
        *,
        target_rank: float | None = None,
        energy: float | None = None,
        importance: Literal["sensitivity", "spectrum"] = "sensitivity",
        adapter: str | None = None,
        begin: float = 0.1,
        end: float = 0.7,
        every: int = 10,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ) -> None:
        check(target_rank, energy, importance, every, beta1, beta2)
        if not 0 <= begin < end <= 1:
            raise LoRAConfigError(
                f"begin={begin!r} and end={end!r} are not shares of a run, one after the other.",
                name="end",
                value=end,
                expected="0 ≤ begin < end ≤ 1",
            )
        self.begin, self.end = begin, end
        self._options: dict[str, Any] = {
            "target_rank": target_rank,
            "energy": energy,
            "importance": importance,
            "adapter": adapter,
            "every": every,
            "beta1": beta1,
            "beta2": beta2,
        }
        self.allocator: RankAllocator | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the adapter; go on from the checkpoint, if training does."""
        from accelerate.utils import extract_model_from_parallel

        model = extract_model_from_parallel(kwargs["model"], keep_torch_compile=False)
        begin = int(self.begin * state.max_steps)
        end = max(int(self.end * state.max_steps), begin + 1)
        self.allocator = RankAllocator(model, begin=begin, end=end, **self._options)
        if state.global_step:
            folder = Path(require(model).facts.get("checkpoint", ""))
            if folder.name != f"checkpoint-{state.global_step}" or not (folder / _FILE).is_file():
                raise LoRAFileError(
                    f"Training goes on from step {state.global_step}, and its checkpoint ({folder}) has no {_FILE}.",
                    name=_FILE,
                    value=str(folder),
                    remedy="Resume from a checkpoint of a run with RankCallback, or train without it.",
                )
            self.allocator.load_state_dict(load_file(folder / _FILE))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients, as clipped."""
        if self.allocator is not None:
            self.allocator.observe()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Zero what the schedule does not leave."""
        if self.allocator is not None:
            self.allocator.step(state.global_step + 1, kwargs.get("optimizer"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the schedule's state into the checkpoint."""
        if self.allocator is None or not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            tensors = {key: tensor.contiguous() for key, tensor in self.allocator.state_dict().items()}
            save_file(tensors, folder / f".{_FILE}")
            os.replace(folder / f".{_FILE}", folder / _FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the adapter; where Trainer loaded a best one from before the schedule's end, say so and leave it."""
        if self.allocator is None:
            return
        if self.allocator.cuttable:
            self.allocator.cut()
        else:
            _LOG.warning(
                "The adapter is not cut: training stopped before step %d, or the best one is from before it.",
                self.allocator.end,
            )
