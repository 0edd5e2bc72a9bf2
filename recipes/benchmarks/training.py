"""What a step of LoRA costs: the limit, full fine-tuning, hf_lora and PEFT side by side, each in its turn.

    python recipes/benchmarks/training.py [--rounds 6] [--shapes 4x128] [--dtypes float32] [--threads 1]

The limit is the frozen base's forward and the gradient of each layer's input. Sections: time, parts (of hf_lora's step,
from torch's profiler), saved (bytes kept for the backward). Gradients are compared before anything is timed. Writes
training.json (every sample), training.md and training.svg and .png to --out. Needs hf_lora[bench], the base model of
`hf-lora quickstart`, 10 GB of memory and no network.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from training_parts import command


def main() -> None:
    options = command.arguments(__doc__)
    from training_parts import figure, sections

    measures = {
        "time": (sections.measure_time, True),
        "parts": (sections.measure_parts, True),
        "saved": (sections.measure_saved, False),
    }
    figure.draw(command.carry_out("training", options, measures, sections.TITLES), options.out)


if __name__ == "__main__":
    main()
