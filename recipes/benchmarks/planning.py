"""What `hf_lora.plan` predicts beside what is then measured, on SmolLM2-135M; and for a 175B shape.

    python recipes/benchmarks/planning.py [--only 0,2,4] [--out docs/benchmarks]

Each case runs in a process of its own, with one thread: a training step, so that the optimizer has its state, then

- another step, and the most memory that the process had in it (VmHWM), less what it had before the model came;
- the tensors that autograd saves in a forward (saved-tensor hooks, each storage once, parameters and inputs left out);
- a step under torch's profiler, which sees every allocation: the most that is held beside what was there.

The weights are random: what they are takes no memory. glibc's malloc, which keeps and splits what was freed, is told to
give every block of 256 kB back at once (MALLOC_MMAP_THRESHOLD_); the first case is measured without that, too.

Writes planning.json and planning.md. Needs Linux, the config of `hf-lora quickstart`'s base, and 3 GB of memory.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import gc
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

OUT = Path("docs") / "benchmarks"
GPT3 = "GPT-3 175B's shape"
LORAS: dict[str, dict[str, Any]] = {
    "q,v r=8": {"r": 8, "target_modules": ["q", "v"]},
    "all-linear r=16": {"r": 16, "target_modules": "all-linear"},
    "all-linear r=16, dropout 0.05": {"r": 16, "target_modules": "all-linear", "dropout": 0.05},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    dtype: str
    lora: str
    batch: int
    length: int
    gradient_checkpointing: bool = False

    def __str__(self) -> str:
        again = ", checkpointed" if self.gradient_checkpointing else ""
        return f"{self.dtype}, {self.lora}{again}, {self.batch} × {self.length}"


CASES = [
    *(Case(*c, *s) for c in itertools.product(("float32", "bfloat16"), list(LORAS)[:2]) for s in ((4, 128), (1, 512))),
    Case("float32", "all-linear r=16, dropout 0.05", 4, 128),
    Case("float32", "q,v r=8", 4, 128, True),
]


# ---- in a process of its own -----------------------------------------------------------------------------------------


def status(field: str) -> int:
    """Bytes that /proc says this process has (VmRSS), or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def settle() -> None:
    """Give back what is free, and begin to count the most anew."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def saved_nbytes(model: Any, batch: dict[str, Any]) -> int:
    """Bytes of the storages that autograd saves in a forward, each once."""
    import torch

    tensors = [*model.parameters(), *model.buffers(), *(t for t in batch.values() if isinstance(t, torch.Tensor))]
    own = {t.untyped_storage()._cdata for t in tensors}
    found = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(storage.nbytes() for storage in found.values())
    del loss
    return total


def allocated(step: Any) -> int:
    """The most that a step holds, in the allocations that torch's profiler sees."""
    import torch
    from torch._C._profiler import _EventType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events, changes = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    live = most = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        live += nbytes
        most = max(most, live)
    return most


def measure(case: Case, process_only: bool) -> dict[str, Any]:
    import torch

    import hf_lora
    from hf_lora.planning.skeleton import read_config
    from hf_lora.quickstart import base as known

    torch.set_num_threads(1)
    import transformers.models.llama.modeling_llama  # before what is counted from

    loading = known.find_base().loading
    config = read_config(loading.pop("pretrained_model_name_or_path"), **loading)
    lora = hf_lora.LoRAConfig(**LORAS[case.lora])
    settle()
    before = status("VmRSS")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    plan = hf_lora.plan(
        model, lora, batch=case.batch, length=case.length, gradient_checkpointing=case.gradient_checkpointing
    )
    base = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    model.train()
    if case.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.add_lora(lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)
    ids = torch.randint(0, model.config.vocab_size, (case.batch, case.length))
    batch = {"input_ids": ids, "labels": ids, "use_cache": False}

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    settle()
    step()
    process = status("VmHWM") - before
    if process_only:
        return {"peak, process, malloc as it is": process}
    state = sum(t.nbytes for kept in optimizer.state.values() for t in kept.values())
    resident = base + sum(p.nbytes for p in trained) + state
    saved = None if case.gradient_checkpointing else saved_nbytes(model, batch)
    peak = resident + allocated(step)
    with tempfile.TemporaryDirectory() as folder:
        model.save_lora(folder)
        file = (Path(folder) / "adapter_model.safetensors").stat().st_size
    measured = {
        "trainable parameters": sum(p.numel() for p in trained),
        "adapter file": file,
        "base": base,
        "optimizer state": state,
        "activations": saved,
        "peak": peak,
        "peak, process": process,
    }
    predicted = {
        "trainable parameters": plan.trainable_parameters,
        "adapter file": plan.adapter_bytes,
        "base": plan.base_bytes,
        "optimizer state": plan.optimizer_bytes,
        "activations": plan.activation_bytes,
        "peak": plan.peak_bytes,
        "peak, process": plan.peak_bytes,
    }
    return {"case": str(case), "predicted": predicted, "measured": measured}


def measure_gpt3() -> dict[str, Any]:
    """Time and memory of planning for 175 billion parameters."""
    import transformers

    import hf_lora

    config = transformers.OPTConfig(
        hidden_size=12288,
        num_hidden_layers=96,
        num_attention_heads=96,
        ffn_dim=49152,
        vocab_size=50257,
        word_embed_proj_dim=12288,
        max_position_embeddings=2048,
        dropout=0.0,
    )
    start = time.perf_counter()
    lora = hf_lora.LoRAConfig(r=4, target_modules=["q", "v"])
    plan = hf_lora.plan(config, lora, batch=1, length=2048, dtype="float16")
    seconds = time.perf_counter() - start
    again = time.perf_counter()
    chosen = hf_lora.plan(config, batch=1, length=2048, dtype="float16", budget=18_874_368)
    return {
        "case": GPT3,
        "seconds": round(seconds, 2),
        "seconds with a budget": round(time.perf_counter() - again, 2),
        "process": status("VmHWM"),
        "plan": str(plan),
        "proposals": [str(proposal) for proposal in chosen.proposals],
    }


# ---- all of them -----------------------------------------------------------------------------------------------------


def in_a_process(argument: str, *, process_only: bool = False) -> dict[str, Any]:
    command = [sys.executable, __file__, "--case", argument, *["--process-only"] * process_only]
    environment = os.environ | ({} if process_only else {"MALLOC_MMAP_THRESHOLD_": str(2**18)})
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def markdown(data: dict[str, Any]) -> str:
    lines = [
        f"{data['date']}, {data['machine']}, one thread. Predicted ÷ measured; in brackets what was measured.",
        "",
        "| SmolLM2-135M | activations | peak, allocations | peak, process | peak, process, malloc as it is |",
        "|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        cells = [cell(row, name) for name in MEASURED]
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    exact = ("trainable parameters", "adapter file", "base", "optimizer state")
    wrong = [f"{r['case']}: {n}" for r in data["rows"] for n in exact if r["predicted"][n] != r["measured"][n]]
    lines += ["", "Not equal to the byte: " + "; ".join(wrong) if wrong else EXACT]
    gpt3 = data["gpt3"]
    lines += [
        "",
        (
            f"{GPT3} (96 layers, d 12,288) in {gpt3['seconds']} s, with a budget in {gpt3['seconds with a budget']} s; "
            f"the process had {gpt3['process'] / 1e9:.2f} GB at most, PyTorch and transformers included:"
        ),
        "",
        "```text",
        gpt3["plan"],
        "within 18,874,368 parameters:",
        *(f"  {proposal}" for proposal in gpt3["proposals"]),
        "```",
    ]
    return "\n".join(lines) + "\n"


MEASURED = ("activations", "peak", "peak, process", "peak, process, malloc as it is")
EXACT = "Trainable parameters, the file's bytes, the base's and the optimizer state's were equal in every case."


def cell(row: dict[str, Any], name: str) -> str:
    predicted, measured = row["predicted"].get(name), row["measured"].get(name)
    if not measured:
        return "–"
    ratio = predicted / measured
    far = " **beyond 10 %**" if abs(ratio - 1) > 0.1 else ""
    return f"{ratio:.3f} ({measured / 1e6:,.0f} MB){far}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder; default {OUT}")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="what to say when it was")
    parser.add_argument("--only", help="cases by number, with commas; default: all, from 0 on")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--process-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        gpt3 = options.case == "gpt3"
        found = measure_gpt3() if gpt3 else measure(CASES[int(options.case)], options.process_only)
        print(json.dumps(found))
        return
    numbers = map(int, options.only.split(",")) if options.only else range(len(CASES))
    rows = [measured_row(number, CASES[number]) for number in numbers]
    write(options.out, options.date, rows, in_a_process("gpt3"))


def measured_row(number: int, case: Case) -> dict[str, Any]:
    """A case's row, printed as it comes."""
    row = in_a_process(str(number))
    if number == 0:
        row["measured"] |= in_a_process(str(number), process_only=True)
        row["predicted"]["peak, process, malloc as it is"] = row["predicted"]["peak"]
    print(case, *(f"{name}: {cell(row, name)}" for name in row["measured"]), sep="\n  ", flush=True)
    return row


def write(out: Path, date: str, rows: list[dict[str, Any]], gpt3: dict[str, Any]) -> None:
    import torch
    import transformers

    machine = f"{platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}"
    data = {"date": date, "machine": machine, "rows": rows, "gpt3": gpt3}
    out.mkdir(parents=True, exist_ok=True)
    (out / "planning.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "planning.md").write_text(markdown(data), encoding="utf-8")
    print(f"Written to {out}.")


if __name__ == "__main__":
    main()
