"""What a training step costs on Llama shapes: full fine-tuning, PEFT and hf_lora; tokens/s and peak memory.

    python recipes/benchmarks/gpu.py --shape 1b                     # a CUDA device
    python recipes/benchmarks/gpu.py --shape 8b --batch 2 --length 1024
    python recipes/benchmarks/gpu.py --device cpu --shape tiny      # small, to see that it runs

The weights are random (bf16 on CUDA), so nothing is downloaded. Each subject runs in a process of its own, the same
steps on the same tokens, and its losses are compared with those of the other LoRA with the same factors. The table has
the paper's two ratios, memory and throughput of LoRA against full fine-tuning. Writes gpu-SHAPE.json and .md to --out.
Needs hf_lora[bench].
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# shape -> config of a Llama, batch, length
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "tiny": (
        {
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 688,
            "vocab_size": 4096,
        },
        2,
        64,
    ),
    "1b": (  # Llama 3.2 1B
        {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
        8,
        512,
    ),
    "8b": (  # Llama 3.1 8B
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 14336,
            "vocab_size": 128256,
        },
        2,
        1024,
    ),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "q,v r=8": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all-linear r=16": {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"},
}
# subject -> (who, adapter, activation checkpointing)
SUBJECTS: dict[str, tuple[str, str | None, bool]] = {
    "full fine-tuning": ("full", None, False),
    "full fine-tuning, checkpointing": ("full", None, True),
    **{f"PEFT, {name}": ("peft", name, False) for name in ADAPTERS},
    **{f"hf_lora, {name}": ("hf_lora", name, False) for name in ADAPTERS},
    **{f"PEFT, {name}, checkpointing": ("peft", name, True) for name in ADAPTERS},
    **{f"hf_lora, {name}, checkpointing": ("hf_lora", name, True) for name in ADAPTERS},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--length", type=int)
    parser.add_argument("--steps", type=int, default=10, help="timed ones; 3 go before")
    parser.add_argument("--out", type=Path, help="folder; nothing is written unless it is given")
    parser.add_argument("--date", default=datetime.date.today().isoformat(), help="what to say when it was")
    parser.add_argument("--subject", choices=SUBJECTS, help=argparse.SUPPRESS)  # one, in this process
    return parser.parse_args()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One subject, here."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    who, adapter, checkpointing = SUBJECTS[options.subject]
    fields, batch, length = SHAPES[options.shape]
    batch, length = options.batch or batch, options.length or length
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    config = LlamaConfig(**fields, max_position_embeddings=max(length, 512), use_cache=False)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
        ids = torch.randint(0, config.vocab_size, (batch, length))
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(1)
    if who == "peft":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **ADAPTERS[adapter or ""]))
    elif who == "hf_lora":
        import hf_lora

        given = dict(ADAPTERS[adapter or ""])
        model.add_lora(hf_lora.LoRAConfig(alpha=given.pop("lora_alpha"), **given))
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if who != "full":
        _same_start(factors)
    optimizer = torch.optim.AdamW(factors.values(), lr=1e-4, fused=cuda)
    seconds, losses = [], []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for step in range(3 + options.steps):
        begun = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))  # waits for the device
        if cuda:
            torch.cuda.synchronize()
        if step >= 3:
            seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "tokens_per_s": batch * length / statistics.median(seconds),
        "peak_bytes": peak,
        "losses": losses,
        "trainable": sum(p.numel() for p in factors.values()),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "batch": batch,
        "length": length,
    }


def _same_start(factors: dict[str, Any]) -> None:
    """The same A in both libraries, and a B that is not zero: by the module's path, not by its order."""
    import zlib

    import torch

    for name, parameter in factors.items():
        path = name.removeprefix("base_model.model.").partition(".lora_")[0]
        kind = "A" if "lora_A" in name or ".A" in name.rpartition("lora_")[2] else "B"
        generator = torch.Generator().manual_seed(zlib.crc32(f"{path} {kind}".encode()))
        with torch.no_grad():
            fan = parameter.shape[1] if kind == "A" else parameter.shape[1] * 16
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for subject in SUBJECTS:
        command = [sys.executable, __file__, "--subject", subject, "--shape", options.shape, "--device", options.device]
        command += ["--steps", str(options.steps)]
        for name in ("batch", "length"):
            if getattr(options, name):
                command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found[subject] = json.loads(done.stdout.splitlines()[-1])
            row = found[subject]
            print(
                f"{subject:40} {row['tokens_per_s']:10,.0f} tokens/s {row['peak_bytes'] / 2**30:8.2f} GiB", flush=True
            )
        else:
            lines = done.stderr.strip().splitlines()
            short = "out of memory" if "OutOfMemoryError" in done.stderr else (lines or ["failed"])[-1][:200]
            found[subject] = {"failed": short}
            print(f"{subject:40} {short}", flush=True)
    for name in ADAPTERS:
        for mode in ("", ", checkpointing"):
            ours, theirs = found[f"hf_lora, {name}{mode}"], found[f"PEFT, {name}{mode}"]
            if "losses" in ours and "losses" in theirs:
                pairs = zip(ours["losses"], theirs["losses"], strict=True)
                ours["loss_difference"] = max(abs(a - b) for a, b in pairs)
    return found


def as_markdown(found: dict[str, Any], options: argparse.Namespace) -> str:
    some = next((row for row in found.values() if "device" in row), None)
    if some is None:
        return "Nothing ran.\n"
    full = found["full fine-tuning"]
    size = f"{some['batch']} × {some['length']} tokens"
    head = (
        "subject",
        "trainable",
        "tokens/s",
        "peak, GiB",
        "memory ÷ full",
        "throughput ÷ full",
        "loss against PEFT's",
    )
    lines = [
        f"Measured on {options.date}: {some['device']}, shape {options.shape}, {size}.",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for subject, row in found.items():
        if "failed" in row:
            lines.append(f"| {subject} | | {row['failed']} | | | | |")
            continue
        against = ["", ""]
        if "tokens_per_s" in full:
            against = [
                f"{row['peak_bytes'] / full['peak_bytes']:.2f}",
                f"{row['tokens_per_s'] / full['tokens_per_s']:.2f}",
            ]
        differs = f"{row['loss_difference']:.1e}" if "loss_difference" in row else ""
        lines.append(
            f"| {subject} | {row['trainable']:,} | {row['tokens_per_s']:,.0f} | {row['peak_bytes'] / 2**30:.2f} "
            f"| {against[0]} | {against[1]} | {differs} |"
        )
    lines += ["", "The paper's ratios (GPT-3 175B): memory 350 GB ÷ 1.2 TB = 0.29, throughput 43.1 ÷ 32.5 = 1.33."]
    return "\n".join(lines) + "\n"


def main() -> None:
    options = arguments()
    if options.subject:
        print(json.dumps(run(options)))
        return
    found = measure(options)
    text = as_markdown(found, options)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"gpu-{options.shape}.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.out / f"gpu-{options.shape}.md").write_text(text)


if __name__ == "__main__":
    main()
