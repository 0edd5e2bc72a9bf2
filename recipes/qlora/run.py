"""QLoRA on real data: memory and quality of full fine-tuning, LoRA, QLoRA, and QLoRA begun by LoftQ, side by side.

    python recipes/qlora/run.py --data <folder of E2E's devset.csv and testset_w_refs.csv> [--out docs/results]

The base is `hf-lora quickstart`'s SmolLM2-135M, saved once as safetensors; bitsandbytes quantises it to nf4, its scales
too, while it loads. Each arm and seed trains in a process of its own, with the stock Trainer, on restaurants'
descriptions (E2E: Novikova et al. 2017) written from their attributes, and is measured on references for those that
were not in training: the mean negative log-likelihood of a reference's tokens, in nats. Its error is paired over those
attributes, and over the seeds.

Memory is what the process holds in a training step at most (VmHWM, reset after loading) less what it held before the
model came; beside it stands what `hf_lora.plan` says before anything is loaded.

Source: Dettmers et al. 2023 (arXiv:2305.14314); Li et al. 2023 (arXiv:2310.08659).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import gc
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

SCRIPT = Path(__file__)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way of training: how the base is held, and what trains."""

    name: str
    quantised: bool = False
    init: str | None = None  # of the LoRA; None: full fine-tuning
    rate: float = 1e-3

    @property
    def trains(self) -> bool:
        return self.rate > 0


ARMS = (
    Arm("the base, 3 examples before it", rate=0),
    Arm("the base in nf4, 3 examples before it", quantised=True, rate=0),
    Arm("full fine-tuning", rate=5e-5),
    Arm("LoRA", init="kaiming"),
    Arm("QLoRA", quantised=True, init="kaiming"),
    Arm("QLoRA, LoftQ", quantised=True, init="loftq"),
)
RANK = 16


def main() -> None:
    """Train every arm, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with devset.csv and testset_w_refs.csv")
    parser.add_argument("--out", type=Path, default=Path("docs") / "results")
    parser.add_argument("--base", type=Path, help="a base as a folder; None: the quickstart's")
    parser.add_argument("--work", type=Path, default=Path("qlora-work"), help="where the base and the runs lie")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--tests", type=int, default=48, help="how many attributes are measured on")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arm", type=int, help="one run, as a process of its own")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.arm is not None:
        print(json.dumps(run(ARMS[options.arm], options)))
        return
    options.base = options.base or save_base(options.work / "base")
    records = []
    for number, arm in enumerate(ARMS):
        for seed in range(options.seeds if arm.trains else 1):
            records.append({"arm": arm.name, "seed": seed, **apart(number, seed, options)})
            print(f"{arm.name}, seed {seed}: {statistics.mean(records[-1]['losses']):.4f}", file=sys.stderr)
    write(records, options)


def save_base(folder: Path) -> Path:
    """The quickstart's base as safetensors, from which it can be quantised while it loads."""
    from hf_lora.quickstart.base import find_base, load_model, load_tokenizer

    if not (folder / "config.json").exists():
        base = find_base()
        load_model(base).save_pretrained(folder)
        load_tokenizer(base).save_pretrained(folder)
    return folder


def apart(number: int, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own; glibc gives back what is freed, so that its memory is what is in use."""
    given = ["--arm", number, "--seed", seed]
    for name in ("data", "base", "work", "steps", "batch", "length", "tests"):
        given += [f"--{name}", getattr(options, name)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    command = [sys.executable, str(SCRIPT), *map(str, given)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{ARMS[number].name}, seed {seed}, failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---- data ------------------------------------------------------------------------------------------------------------


def table(path: Path) -> dict[str, list[str]]:
    """Attributes → the references for them."""
    found: dict[str, list[str]] = defaultdict(list)
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found[row["mr"]].append(row["ref"])
    return dict(found)


def prompt(attributes: str) -> str:
    """What the model reads before it writes."""
    return f"Restaurant: {attributes}\nDescription:"


def encoded(tokenizer: Any, before: str, reference: str, length: int | None) -> dict[str, list[int]]:
    """Token ids, and labels for the reference's alone."""
    head = tokenizer(before, add_special_tokens=False)["input_ids"]
    tail = [*tokenizer(" " + reference, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = [*head, *tail][:length]
    return {"input_ids": ids, "labels": [*[-100] * len(head), *tail][:length]}


# ---- one run ---------------------------------------------------------------------------------------------------------


def run(arm: Arm, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and measure it."""
    import torch
    from transformers import AutoTokenizer, set_seed

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    train, test = table(options.data / "devset.csv"), table(options.data / "testset_w_refs.csv")
    warm_up()
    before = resident()
    model = loaded(arm, options)
    found: dict[str, Any] = {"base_bytes": None, "peak": None, "planned": None}
    if arm.trains:
        found = trained(arm, model, tokenizer, train, options, before)
    shots = "" if arm.trains else "".join(f"{prompt(mr)} {train[mr][0]}\n\n" for mr in list(train)[:3])
    attributes = random.Random(0).sample(sorted(set(test) - set(train)), options.tests)
    model.eval()
    found["losses"] = [loss_of(model, tokenizer, shots + prompt(mr), test[mr][0]) for mr in attributes]
    return found


def loaded(arm: Arm, options: argparse.Namespace) -> Any:
    """The base as the arm holds it, with what it trains."""
    import torch
    from transformers import AutoModelForCausalLM

    import hf_lora

    model = AutoModelForCausalLM.from_pretrained(
        options.base, dtype=torch.float32, quantization_config=quantisation() if arm.quantised else None
    )
    with torch.no_grad():
        for parameter in model.parameters():  # out of the file's mapping, whose pages would count as held
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
    if arm.init is not None:
        hf_lora.prepare_lora(model, gradient_checkpointing=False)
        model.add_lora(lora(arm))
    return model


def lora(arm: Arm) -> Any:
    """The adapter of an arm."""
    from hf_lora import LoRAConfig

    options = {"loftq_bits": 4, "loftq_iter": 1} if arm.init == "loftq" else {}
    return LoRAConfig(r=RANK, target_modules="all-linear", init=arm.init or "kaiming", init_options=options)


def quantisation() -> Any:
    """NF4, its scales quantised too, as QLoRA's paper has it."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def trained(
    arm: Arm, model: Any, tokenizer: Any, train: dict[str, list[str]], options: argparse.Namespace, before: int
) -> dict[str, Any]:
    """Train with the stock Trainer; bytes of what is held."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from hf_lora.summary import base_sizes

    rows = [
        encoded(tokenizer, prompt(mr), ref, options.length) for mr, refs in sorted(train.items()) for ref in refs[:2]
    ]

    class Watch(TrainerCallback):
        peak = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step == 1:  # the optimizer has its state from here on
                gc.collect()
                reset()

        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            if state.global_step >= 2:
                self.peak = max(self.peak, peak() - before)

    watch = Watch()
    arguments = TrainingArguments(
        output_dir=str(options.work / "runs"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=arm.rate,
        lr_scheduler_type="linear",
        warmup_steps=options.steps // 10,
        save_strategy="no",
        logging_steps=10**6,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=options.seed,
    )
    collator = DataCollatorForSeq2Seq(tokenizer, padding="max_length", max_length=options.length)
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[watch])
    seconds = trainer.train().metrics["train_runtime"]
    return {
        "base_bytes": sum(nbytes for _, nbytes in base_sizes(model)),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "peak": watch.peak,
        "planned": planned(arm, options),
        "seconds": seconds / options.steps,
    }


def planned(arm: Arm, options: argparse.Namespace) -> int | None:
    """What `hf_lora.plan` says of a step, before anything is loaded; of full fine-tuning it says nothing."""
    import hf_lora

    if arm.init is None:
        return None
    given = {"quantization_config": quantisation()} if arm.quantised else {}
    # What trains is the same, however it begins.
    config = lora(dataclasses.replace(arm, init="kaiming"))
    plan = hf_lora.plan(
        str(options.base), config, batch=options.batch, length=options.length, dtype="float32", device="cpu", **given
    )
    return plan.peak_bytes


def loss_of(model: Any, tokenizer: Any, before: str, reference: str) -> float:
    """The mean negative log-likelihood of a reference's tokens, in nats."""
    import torch

    row = encoded(tokenizer, before, reference, None)
    batch = {name: torch.tensor([ids]) for name, ids in row.items()}
    with torch.no_grad():
        return float(model(**batch).loss)


# ---- memory ----------------------------------------------------------------------------------------------------------


def warm_up() -> None:
    """Let libraries take what they take once, so that it is not the model's."""
    import bitsandbytes  # noqa: F401
    import torch

    layer = torch.nn.Linear(64, 64)
    torch.optim.AdamW(layer.parameters()).zero_grad()
    layer(torch.ones(4, 64)).sum().backward()


def resident() -> int:
    """Bytes that the process holds now."""
    return status("VmRSS")


def peak() -> int:
    """The most that it held since `reset`."""
    return status("VmHWM")


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"This system does not tell {name}: memory is measured on Linux.")


def reset() -> None:
    """Let the peak begin at what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


# ---- the page --------------------------------------------------------------------------------------------------------


def write(records: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """qlora.json and qlora.md."""
    import bitsandbytes
    import torch
    import transformers

    by_arm: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_arm[record["arm"]].append(record)
    few = ARMS[0].name
    lines = [
        "| | base held | trains | step at most | planned | s/step | loss | - few-shot | - LoRA |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        mine = by_arm[arm.name]
        found = mine[0]
        cells = [arm.name, size(found["base_bytes"]), number(found.get("trainable"))]
        cells += [size(statistics.median(r["peak"] for r in mine)) if arm.trains else "–", size(found["planned"])]
        cells += [f"{statistics.median(r['seconds'] for r in mine):.2f}" if arm.trains else "–"]
        cells += [f"{statistics.mean(statistics.mean(r['losses']) for r in mine):.3f}"]
        cells += [paired(mine, by_arm[few]), paired(mine, by_arm["LoRA"])]
        lines.append("| " + " | ".join(cells) + " |")
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, bitsandbytes {bitsandbytes.__version__}"
    )
    facts = (
        f"{options.steps} steps of {options.batch} × {options.length}, {options.seeds} seeds, "
        f"{options.tests} attributes; fp32, one thread, {datetime.date.today()}, {platform.machine()}, {versions}."
    )
    options.out.mkdir(parents=True, exist_ok=True)
    text = "\n".join([facts, "", *lines, ""])
    (options.out / "qlora.md").write_text(text, encoding="utf-8")
    kept = {"facts": facts, "records": records}
    (options.out / "qlora.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    print(text)


def paired(mine: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """The mean difference and its 95 % interval: over attributes, and between seeds, whichever is wider."""
    if mine is other:
        return "–"
    means = [
        [m - o for m, o in zip(a["losses"], other[i % len(other)]["losses"], strict=True)] for i, a in enumerate(mine)
    ]
    over_tests = [statistics.mean(column) for column in zip(*means, strict=True)]
    errors = [1.96 * statistics.stdev(over_tests) / math.sqrt(len(over_tests))]
    if len(means) > 1:
        t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(means), 2.5)  # Student's, of so many seeds
        errors.append(t * statistics.stdev(map(statistics.mean, means)) / math.sqrt(len(means)))
    return f"{statistics.mean(over_tests):+.3f} ± {max(errors):.3f}"


def size(nbytes: float | None) -> str:
    """Bytes in MB."""
    return "–" if nbytes is None else f"{nbytes / 1e6:.0f} MB"


def number(count: int | None) -> str:
    """A count, or a dash."""
    return "–" if count is None else f"{count:,}"


if __name__ == "__main__":
    main()
