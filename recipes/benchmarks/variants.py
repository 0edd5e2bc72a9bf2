"""What LoRA's variants and starts cost beside LoRA: hf_lora and PEFT side by side, each in its turn.

    python recipes/benchmarks/variants.py [--rounds 3] [--shapes 2x128] [--dtypes float32] [--threads 1]

Sections: time (a step ÷ the frozen base's forward and the gradient of each layer's input), saved (bytes kept for the
backward), begin (how long add_lora takes). Gradients, and of a start the logits, are compared before anything is timed.
PEFT's PiSSA is a plain LoRA of PEFT on a base that the first product was taken from. Writes variants.json (every
sample) and variants.md to --out. Needs hf_lora[bench], the base model of `hf-lora quickstart`, 10 GB of memory and no
network.
"""

from __future__ import annotations

import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from training_parts import command


def main() -> None:
    options = command.arguments(__doc__)
    import torch
    from training_parts import sections, steps, variants

    measures = {
        "time": (functools.partial(sections.measure_time, settings=variants.SETTINGS), True),
        "saved": (functools.partial(sections.measure_saved, settings=variants.SETTINGS), False),
        "begin": (variants.measure_begin, True),
    }
    # At 4x128 all models and what PEFT's DoRA keeps were 23 GB.
    full = steps.Sizes(rounds=3, shapes=((2, 128),), dtypes=(torch.float32, torch.bfloat16))
    command.carry_out("variants", options, measures, variants.TITLES, full)


if __name__ == "__main__":
    main()
