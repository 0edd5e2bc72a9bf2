"""The sections: time against the limit, a whole step with its optimizer, and the bytes that are saved for backward."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from serving_parts.measure import Case, Check, Competitor, Goal, Outcome, compare, frozen, in_turn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from .steps import SETTINGS, Setting, Sizes, Subjects, generic, gradients, inputs, stepper

__all__ = ["TITLES", "measure_parts", "measure_saved", "measure_time"]

TITLES = {
    "time": "A step: forward and backward, CPU time of one thread",
    "parts": "Where hf_lora's step spends what is above the limit (÷ the limit)",
    "saved": "Activations saved for the backward, the head and the loss left out",
}
LIMIT, WHOLE, FROZEN = "the limit", "full fine-tuning", "the frozen base"
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}  # of the largest entry of the gradients
_DROPOUT = ("uniform_", "log_", "clamp_", "index_fill_", "index_copy_", "cumsum", "searchsorted", "clone")


def _label(dtype: torch.dtype, shape: tuple[int, int]) -> str:
    return f"{shape[0]}×{shape[1]}, {str(dtype).removeprefix('torch.')}"


def measure_time(sizes: Sizes, settings: Sequence[Setting] = SETTINGS) -> list[Case]:
    """Every shape in float32, the first in bfloat16."""
    first, *others = sizes.dtypes
    cases = [(first, shape) for shape in sizes.shapes] + [(dtype, sizes.shapes[0]) for dtype in others]
    return [_time(sizes, *case, settings) for case in cases]


def _time(sizes: Sizes, dtype: torch.dtype, shape: tuple[int, int], settings: Sequence[Setting]) -> Case:
    made = Subjects(sizes, dtype)
    ids = inputs(made.base, shape)
    models: dict[str, Any] = {LIMIT: made.limit(), WHOLE: made.full()}
    against = {LIMIT: WHOLE, WHOLE: LIMIT}
    goals, rivals = {}, {}
    for setting in settings:
        mine, theirs = f"hf_lora, {setting.name}", f"PEFT, {setting.name}"
        models |= {mine: made.ours(setting), theirs: made.theirs(setting)}
        against |= {mine: theirs, theirs: mine}
        rivals[mine] = theirs
        if setting.goal:
            goals[mine] = Goal(setting.goal, "ratio", "design")
    checks = compare(
        {name: gradients(model, ids) for name, model in models.items()}, against, tolerance=TOLERANCE[dtype]
    )
    runs = {name: stepper(model, ids) for name, model in models.items()}
    for setting in settings:
        if not setting.saved:
            continue
        mine = f"hf_lora, {setting.name}"
        name = f"{mine}, generic path"
        runs[name], checks[name] = _without(runs[mine]), checks[mine]
    competitors = [Competitor(name, run) for name, run in runs.items()]
    with frozen():
        return in_turn(
            _label(dtype, shape),
            competitors,
            rounds=sizes.rounds,
            checks=checks,
            unit="ms",
            reference=LIMIT,
            goals=goals if dtype == torch.float32 else {},
            rivals=rivals,
            warmup=1,
            clock=time.process_time,
        )


def _without(run: Callable[[], None]) -> Callable[[], None]:
    def slow() -> None:
        with generic():
            run()

    return slow


def measure_parts(sizes: Sizes) -> list[Case]:
    """Self time of the operators of one step, of the first shape in the first dtype; and the added FLOPs alone."""
    dtype, shape = sizes.dtypes[0], sizes.shapes[0]
    made = Subjects(sizes, dtype)
    ids = inputs(made.base, shape)
    cases = []
    limit = stepper(made.limit(), ids)
    least = _flops(limit)
    for setting in SETTINGS:
        run = stepper(made.ours(setting), ids)
        with generic():  # the counter does not know addmm_
            flops = _flops(run) / least - 1
        names = ("the adapter's products", "dropout", "their FLOPs, at the base's speed")
        found: dict[str, dict[int, float]] = {name: {} for name in names}
        for i in range(-(-sizes.rounds // 3)):
            total = sum(event.self_cpu_time_total for event in _profiled(limit))
            products, dropped = _parts(_profiled(run), setting)
            for name, value in zip(names, (products / total, dropped / total, flops), strict=True):
                found[name][i] = value
        check = Check("timed above", 0.0, 0.0)
        outcomes = [Outcome(name, samples, None, check) for name, samples in found.items()]
        cases.append(Case(f"{setting.name}, {_label(dtype, shape)}", "", None, outcomes))
    return cases


def _flops(run: Callable[[], None]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def _profiled(run: Callable[[], None]) -> Any:
    run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    return profiler.key_averages(group_by_input_shape=True)


def _parts(events: Any, setting: Setting) -> tuple[float, float]:
    """Microseconds of products through the rank, and of what dropout does. Nothing in the base is as narrow."""
    products = dropped = 0.0
    for event in events:
        name = event.key.removeprefix("aten::")
        if name in ("mm", "addmm", "addmm_"):
            if any(setting.rank in size for size in event.input_shapes if size):
                products += event.self_cpu_time_total
        elif name in _DROPOUT or (name == "copy_" and len(event.input_shapes[0]) == 3):  # the copy that is zeroed
            dropped += event.self_cpu_time_total
    return products, dropped if setting.dropout else 0.0


def measure_saved(sizes: Sizes, settings: Sequence[Setting] = SETTINGS) -> list[Case]:
    """Every shape and dtype; exact, so once."""
    return [_saved(sizes, dtype, shape, settings) for dtype in sizes.dtypes for shape in sizes.shapes]


def _saved(sizes: Sizes, dtype: torch.dtype, shape: tuple[int, int], settings: Sequence[Setting]) -> Case:
    made = Subjects(sizes, dtype)
    ids = inputs(made.base, shape)
    values = {FROZEN: saved_bytes(made.limit(), ids)}
    goals, rivals, notes = {}, {}, []
    for setting in settings:
        mine, theirs = f"hf_lora, {setting.name}", f"PEFT, {setting.name}"
        model = made.ours(setting)
        values |= {mine: saved_bytes(model, ids), theirs: saved_bytes(made.theirs(setting), ids)}
        rivals[mine] = theirs
        if setting.saved:
            goals[mine] = Goal(setting.saved, "ratio", "design")
            narrow = ids.numel() * setting.rank * dtype.itemsize * len(setting.targets)
            narrow *= made.base.config.num_hidden_layers
            if not setting.dropout:
                rest = values[mine] - values[FROZEN] - narrow
                notes.append(
                    f"{_label(dtype, shape)}: of what hf_lora's all-linear adds, x A^T is {narrow / 1e6:.1f} MB; "
                    f"the rest, {rest / 1e6:.1f} MB, is the layers' inputs that the base does not keep."
                )
        with generic():
            if setting.saved and setting.dropout:
                values[f"{mine}, generic path"] = saved_bytes(model, ids)
    check = Check("one storage counted once", 0.0, 0.0)
    outcomes = [Outcome(n, {0: v / 1e6}, goals.get(n), check, rivals.get(n)) for n, v in values.items()]
    return Case(_label(dtype, shape), "MB", FROZEN, outcomes, notes)


def saved_bytes(model: Any, ids: torch.Tensor) -> int:
    """The storages that autograd saves in a forward of the layers, each once, without parameters and buffers."""
    inner = model.get_base_model().model if hasattr(model, "get_base_model") else model.model
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: list[torch.Tensor] = []  # alive, so that no place is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    gc.collect()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = inner(input_ids=ids, use_cache=False)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del output
    return sum(size for place, size in storages.items() if place not in own)
