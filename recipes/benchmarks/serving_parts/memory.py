"""What adapters and routes hold in memory: the bytes of every tensor that is alive, with and without them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from . import subjects
from .measure import Case, Check, Outcome, compare, difference, frozen
from .rows import Routes, step
from .sizes import Sizes

__all__ = ["alive_bytes", "measure_bytes"]

FILE, OURS, PEFT = "the tensors in the file", "hf_lora", "PEFT"


def alive_bytes() -> int:
    """The storages of all tensors that Python has made since `frozen()`, and can reach; each counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.device.type != "meta":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _held(make: Callable[[], Any]) -> tuple[Any, int]:
    """What `make` returns, and the bytes that came with it."""
    before = alive_bytes()
    made = make()
    return made, alive_bytes() - before


def measure_bytes(root: Path, sizes: Sizes) -> list[Case]:
    """On the rows' model and on SmolLM2-135M's shape, rank 8."""
    shapes = {"the rows' model": sizes.rows_shape}
    if sizes.real:
        shapes["SmolLM2-135M's shape"] = sizes.load_shape
    cases = [
        case for i, (name, shape) in enumerate(shapes.items()) for case in _measured(root / str(i), name, shape, sizes)
    ]
    cases[0].notes.append(
        "The banks of frozen adapters double when they are full, so one adapter more than a power of two is the worst "
        "case. A float32 base's banks hold every bit of a float32 adapter, so there is no other copy of it."
    )
    return cases


def _measured(root: Path, label: str, shape: dict[str, Any], sizes: Sizes) -> list[Case]:
    with frozen():  # fewer objects to look at
        return _measure(root, label, shape, sizes)


def _measure(root: Path, label: str, shape: dict[str, Any], sizes: Sizes) -> list[Case]:
    base = subjects.llama(shape)
    count = sizes.rows
    folders = subjects.adapters(root, base, count + 1, subjects.ALL, rank=8)
    tensors = load_file(folders[0] / "adapter_model.safetensors")
    file = sum(tensor.nbytes for tensor in tensors.values()) / 1e6
    (mine, _), held = _held(lambda: subjects.ours(subjects.sharing(base), folders[:count]))
    (peft, _), held_peft = _held(lambda: subjects.theirs(subjects.sharing(base), folders[:count]))
    names = [f"a{i}" for i in range(count)]
    forward = step(base, "decode", count, sizes.past)
    routes = Routes(mine)
    try:
        run, reset = forward.on(mine)
        run()  # whatever else a first forward leaves behind
        reset()
        call = routes(names, run)

        def routed() -> Tensor:
            logits: Tensor = call().logits
            reset()
            return logits

        output, held_route = _held(routed)
    finally:
        routes.close()
    # The logits, and the cache's views of what the step appended, are no part of the route: a second call has them too.
    run_peft, reset_peft = forward.on(peft, adapter_names=names)
    outputs = {OURS: output, PEFT: run_peft().logits}
    reset_peft()
    checks = compare(outputs, {OURS: PEFT, PEFT: OURS})
    saved = mine.lora_state_dict("a0")
    assert tensors.keys() == saved.keys()
    checks[FILE] = Check("what hf_lora saves", max(difference(saved[k], t) for k, t in tensors.items()), 0.0)
    held_route -= output.untyped_storage().nbytes()
    _, held_one_more = _held(lambda: mine.load_lora(folders[count], name="more"))

    def case(name: str, values: dict[str, float], reference: str | None) -> Case:
        outcomes = [Outcome(who, {0: value}, None, checks.get(who)) for who, value in values.items()]
        return Case(f"{name}: {label}", "MB", reference, outcomes)

    per = {FILE: file, OURS: held / count / 1e6, PEFT: held_peft / count / 1e6}
    worst = {FILE: file, OURS: (held + held_one_more) / (count + 1) / 1e6}
    return [
        case(f"each of {count} adapters resident", per, FILE),
        case(f"each of {count + 1} adapters resident", worst, FILE),
        case(
            f"an open route of {count} rows over {count} adapters", {FILE: count * file, OURS: held_route / 1e6}, FILE
        ),
    ]
