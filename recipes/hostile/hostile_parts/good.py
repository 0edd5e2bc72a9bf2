"""Small good files that the inputs are made of."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import mutate

PREFIX = "base_model.model."
Arrays = Mapping[str, tuple[int, ...]]


def numbers(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> bytes:
    """float32 values in (-1, 1), little-endian."""
    rng = random.Random(seed)
    count = 1
    for n in shape:
        count *= n
    return struct.pack(f"<{count}f", *(scale * rng.uniform(-1, 1) for _ in range(count)))


def weights(shapes: Arrays, metadata: Any = None, prefix: str = PREFIX) -> bytes:
    """A safetensors file of float32 tensors of these shapes."""
    parts = {
        prefix + name: ("F32", list(shape), numbers(shape, seed)) for seed, (name, shape) in enumerate(shapes.items())
    }
    return mutate.container(parts, {"format": "pt"} if metadata is None else metadata)


def pair(path: str, rank: int = 2, inner: int = 4, outer: int = 3) -> dict[str, tuple[int, ...]]:
    """Shapes of a linear layer's factors."""
    return {f"{path}.lora_A.weight": (rank, inner), f"{path}.lora_B.weight": (outer, rank)}


CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q", "v"],
    "base_model_name_or_path": "org/base",
    "task_type": "CAUSAL_LM",
}

# (what adapter_config.json says beyond CONFIG, the tensors)
ADAPTERS: tuple[tuple[dict[str, Any], Arrays], ...] = (
    ({}, {**pair("h.0.q"), **pair("h.0.v")}),
    ({"use_rslora": True, "lora_alpha": 3}, pair("h.0.q")),
    ({"rank_pattern": {"h.1.q": 3}, "alpha_pattern": {"^h\\.0\\.q": 7, ".*v": 0.5}},
     {**pair("h.0.q"), **pair("h.1.q", 3), **pair("h.0.v")}),
    ({"use_dora": True}, {**pair("h.0.q"), "h.0.q.lora_magnitude_vector": (3,)}),
    ({"lora_bias": True}, {**pair("h.0.q"), "h.0.q.lora_B.bias": (3,)}),
    ({"kasa_config": {"beta": 1e-4}}, {**pair("h.0.q"), "h.0.q.lora_diag": (2,)}),
    ({"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["q"], "target_modules_bd_b": []}},
     {"h.0.q.lora_A.weight": (2, 2), "h.0.q.lora_B.weight": (3, 2)}),
    ({"use_qalora": True, "qalora_group_size": 2}, {"h.0.q.lora_A.weight": (2, 2), "h.0.q.lora_B.weight": (3, 2)}),
    ({"bias": "lora_only"}, {**pair("h.0.q"), "h.0.q.base_layer.bias": (3,)}),
    ({"bias": "all"}, {**pair("h.0.q"), "h.0.q.base_layer.bias": (3,), "norm.bias": (4,)}),
    ({"modules_to_save": ["head"]}, {**pair("h.0.q"), "head.weight": (2, 3), "head.bias": (2,)}),
    ({"target_modules": ["emb"]}, {"emb.lora_embedding_A": (2, 5), "emb.lora_embedding_B": (4, 2)}),
    ({"layer_replication": [[0, 2], [1, 2]]}, {**pair("h.0.q"), **pair("h.2.q")}),
    ({"alora_invocation_tokens": [1, 2]}, pair("h.0.q")),
    ({"velora_config": {"num_groups": 2}}, {**pair("h.0.q"), "h.0.q.lora_velora_embed": (2,)}),
    ({"init_lora_weights": "gaussian", "peft_version": "0.21.2"}, pair("h.0.q")),
)  # fmt: skip

CONFIGS: tuple[dict[str, Any], ...] = (
    *({**CONFIG, **more} for more, _ in ADAPTERS),
    {**CONFIG, "target_modules": ".*\\.(q|v)_proj", "exclude_modules": ["lm_head"], "lora_dropout": 0.05},
    {**CONFIG, "layers_to_transform": [0, 1], "layers_pattern": "layers", "revision": "main"},
    {**CONFIG, "init_lora_weights": "eva", "eva_config": {"rho": 1.0}},
    {**CONFIG, "init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    {**CONFIG, "monteclora_config": {"num_samples": 4}, "auto_mapping": {"base_model_class": "LlamaForCausalLM"}},
    {**CONFIG, "target_parameters": ["mlp.experts.w1"], "trainable_token_indices": {"embed_tokens": [1, 2]}},
    {**CONFIG, "inference_mode": True, "fan_in_fan_out": False, "megatron_core": "megatron.core"},
)


def corpus() -> list[bytes]:
    """Real configs, where the folder HF_LORA_SHARED names has some; short ones, for speed."""
    folder = Path(os.environ.get("HF_LORA_SHARED", "")) / "peft-corpus" / "configs"
    if not os.environ.get("HF_LORA_SHARED") or not folder.is_dir():
        return []
    return [data for path in sorted(folder.glob("*.json")) if len(data := path.read_bytes()) < 4_000]


README = """---
base_model: org/base
library_name: peft
# of the data
license: apache-2.0
tags:
- lora
- "text-generation"
datasets: [glue, 'a/b']
model-index:
- name: x
  results: []
nested: {a: 1, b: [1.5, null, true]}
folded: >
  two
  lines
date: 2024-01-02
---

# Title

Words.
"""

READMES = (
    README,
    "---\nbase_model: org/base\n---\ntext\n",
    "# no metadata\n\nword\n",
    "---\r\ntags:\r\n- lora\r\n---\r\n\r\nwindows\r\n",
    "---\n{a: 1, base_model: org/base}\n---\nflow\n",
    "---\n# only a comment\n---\nbody\n",
    "---\na: &x [1, 2]\nb: *x\n'quoted key': |\n  kept\n   as is\n---\nbody\n",
)

RECIPES = (
    """base:
  model: org/base
  revision: main
  dtype: bfloat16
data:
  train: train.csv
  eval_fraction: 0.1
  prompt: "Question: {question}"
  completion: " {answer}"
  max_length: 256
lora:
  r: 8
  target_modules: [q, v]
  alpha: 16
training:
  learning_rate: 1e-4
  num_train_epochs: 1
out: runs/one
seed: 3
""",
    """# classification
base: {model: org/base, task: classification}
data:
  train: {dataset: glue, config: sst2, split: "train[:100]"}
  eval: {file: dev.tsv, columns: [sentence, label], quoting: false}
  text: "{sentence}"
  label: label
  labels: [negative, positive]
lora: {target_modules: ".*(q|v)_proj", dropout: 0.1}
out: x
push:
  repo: me/task
  private: true
""",
    "base: {model: b}\ndata: {train: a.jsonl, messages: chat}\nout: o\n",
)

TASKS = (
    """title: Describe a restaurant
about: From attributes to a sentence.
fields:
- {name: name, label: Name, hint: The Punter}
- {name: area, label: Area, kind: choice, choices: ["", city centre, riverside]}
- name: notes
  label: Notes
  kind: long
  optional: true
prompt: "{attributes} ->"
attributes: {pair: "{key}[{value}]", joint: ", ", keys: {area: place}}
chat: true
system: Write one sentence.
max_new_tokens: 64
stop: ["\\n"]
examples:
- {name: The Punter, area: riverside}
score: {metric: BLEU, base: 0.1, best_trivial: 20, adapter: 60.5, error: 1.5, on: held-out data}
license: cc-by-4.0
""",
    "title: T\nfields: [{name: a, label: A}]\nprompt: '{a}'\n",
)

STATE = {
    "global_step": 6,
    "epoch": 2.0,
    "best_metric": 0.5,
    "best_global_step": 4,
    "log_history": [
        {"step": 2, "loss": 1.5, "learning_rate": 1e-4, "epoch": 0.5},
        {"step": 4, "eval_loss": 0.5, "eval_runtime": 1.0},
        {"step": 6, "train_runtime": 12.5, "loss": 0.25},
    ],
}


def texts(items: Any) -> list[bytes]:
    """Each as JSON."""
    return [json.dumps(item).encode() for item in items]
