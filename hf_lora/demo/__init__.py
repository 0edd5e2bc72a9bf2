"""A demo: one base model, and visitors who switch its tasks live. `hf-lora demo`, and the Space in spaces_demo."""

from .launch import launch_options, make, make_demo, require_gradio
from .problems import DemoError
from .session import Demo
from .settings import Settings

__all__ = ["Demo", "DemoError", "Settings", "launch_options", "make", "make_demo", "require_gradio"]
