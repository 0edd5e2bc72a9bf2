"""Adapters to and from a hub, over HTTP, with the unmodified client: what is pushed, what is pulled, what goes wrong."""

from __future__ import annotations

import json

import pytest
import torch
from loras import logits, randomise

import hf_lora
from hf_lora import LoRAAdapter, LoRAConfig

BASE = "lab/base"
FILES = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


@pytest.fixture
def trained(tiny):
    """A tiny base, known as lab/base, with a trained adapter."""

    def build(seed=0, **config):
        model = tiny("llama")
        model.config._name_or_path = BASE
        model.add_lora(LoRAConfig(**{"r": 4, "target_modules": ["q", "v"], **config}))
        randomise(model, seed)
        return model

    return build


def test_a_push_is_one_commit_of_three_files(hub, trained, tiny, batch):
    model = trained()
    info = model.push_adapter_to_hub("me/task")
    commits = hub.history("me/task")
    assert [commit.oid for commit in commits] == [info.oid]
    assert hub.files("me/task").keys() == FILES
    fresh = tiny("llama")
    assert fresh.load_lora("me/task") == "me/task"
    assert torch.equal(logits(fresh, batch(fresh)), logits(model, batch(model)))
    print(hub.files("me/task")["README.md"].decode())
