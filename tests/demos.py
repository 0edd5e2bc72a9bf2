"""A demo of a tiny base with four adapters, for tests: two with forms of their own, two with a free prompt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pools import MLP, QV, random_value, write_folder
from smallbase import save_base

from hf_lora.demo import Demo, Settings, launch_options, make, make_demo

NAMES = ("places", "tone", "ben", "dora")
TASKS = {
    "places": """
title: Describe a place
about: Words in, words out.
fields:
  - {name: name, label: Name, kind: text, hint: w3}
  - {name: food, label: Food, kind: choice, choices: ["", w10, w11]}
  - {name: near_by, label: Near, kind: text, optional: true}
attributes: {pair: "{key} {value}", joint: " w5 ", keys: {near_by: w20}}
prompt: "{attributes} w6"
chat: true
max_new_tokens: 12
examples:
  - {name: w7 w8, food: w10}
  - {name: w9, food: "", near_by: w30}
score: {metric: ROUGE-L, base: 16.1, best_trivial: 19.1, adapter: 30.6, error: 4.7, on: 64 held-out places}
""",
    "tone": """
title: Tone of a sentence
fields: [{name: sentence, label: Sentence, kind: long}]
prompt: "{sentence}"
max_new_tokens: 3
stop: [w63]
examples: [{sentence: w3 w4 w5}]
""",
}


def folder_of_adapters(model: Any, root: Path, *, base: str = "org/tiny") -> Path:
    """Four adapters' folders, with ranks 1 to 4."""
    values = {
        name: random_value(model, seed, rank=1 + seed, targets=(QV, MLP)[seed % 2], scale=0.6, base_model=base)
        for seed, name in enumerate(NAMES)
    }
    write_folder(root, model, values)
    for name, text in TASKS.items():
        (root / name / "task.yaml").write_text(text)
        (root / name / "README.md").write_text(f"---\nlicense: mit\n---\n# The card of {name}\n\n<b>bold</b> words.\n")
    return root


def small_demo(model: Any, root: Path, **settings: Any) -> Demo:
    """Base and adapters in folders of `root`, and the demo of them."""
    base = save_base(model, root / "base", chat=True)
    adapters = folder_of_adapters(model, root / "adapters")
    return make_demo(str(base), adapters, Settings(**settings), base_id="org/tiny")


@contextlib.contextmanager
def served(demo: Demo) -> Iterator[str]:
    """The page's address, while it runs."""
    page = make(demo)
    try:
        _, url, _ = page.launch(
            prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", inbrowser=False, **launch_options()
        )
        yield url
    finally:
        page.close(verbose=False)
        demo.close()
