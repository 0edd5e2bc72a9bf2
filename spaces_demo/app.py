"""One base model, many LoRA adapters, switched live. All of it is in hf_lora.demo."""

from pathlib import Path

from hf_lora.demo import launch_options, make, make_demo

demo = make(make_demo(None, Path(__file__).parent / "adapters"), title="One base model, tasks switched live")

if __name__ == "__main__":
    demo.launch(**launch_options())
