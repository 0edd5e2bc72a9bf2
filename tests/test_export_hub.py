"""Merging and inspecting with the adapter and the base on a hub: what is fetched, what is said if something is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracles
import pytest
import torch
import transformers
from loras import randomise
from safetensors.torch import load_file

from hf_lora import LoRAConfig, LoRAFileError, LoRAMismatchError, LoRAUnsupportedError
from hf_lora.export import merge_to_folder
from hf_lora.inspection import inspect


@pytest.fixture
def published(hub: Any, tiny: Any, tmp_path: Path) -> Path:
    """A base in shards at me/base, with other formats beside it, and an adapter on it at me/task."""
    tiny("llama").save_pretrained(tmp_path / "base", max_shard_size="40KB")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.add_lora(LoRAConfig(r=4, target_modules=["q", "v"], base_model="me/base"))
    randomise(model)
    model.save_lora(tmp_path / "adapter")
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    more = {"pytorch_model.bin": b"p" * 99, "README.md": "---\n---\n", "tokenizer_config.json": "{}", "x.py": "1"}
    hub.commit("me/base", {**files, **more})
    hub.commit("me/task", {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()})
    model.eval().merge_lora()
    model.save_pretrained(tmp_path / "stock")
    return tmp_path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


def assert_same(mine: Path, stock: Path) -> None:
    one, other = weights(mine), weights(stock)
    assert one.keys() == other.keys()
    assert all(oracles.same_bits(one[key], other[key]) for key in one)


def test_both_come_from_the_hub_and_only_what_is_needed(hub: Any, published: Path) -> None:
    report = merge_to_folder("me/task", published / "out")
    assert (report.base, report.revision) == ("me/base", None)
    assert_same(published / "out", published / "stock")
    fetched = set(hub.fetched("me/base"))
    assert {name for name in fetched if name.endswith((".bin", ".py", ".md"))} == set()
    assert set(hub.fetched("me/task")) == {"adapter_config.json", "adapter_model.safetensors"}
    assert (published / "out/tokenizer_config.json").exists()
    hub.requests.clear()
    merge_to_folder("me/task", published / "again", local_files_only=True)
    assert not hub.requests
    assert_same(published / "again", published / "stock")


def test_one_file_of_weights(hub: Any, published: Path, tiny: Any) -> None:
    tiny("llama").save_pretrained(published / "whole")
    hub.commit("me/whole", {path.name: path.read_bytes() for path in (published / "whole").iterdir()})
    with pytest.raises(LoRAMismatchError, match="me/base"):
        merge_to_folder("me/task", published / "out", "me/whole")
    merge_to_folder("me/task", published / "out", "me/whole", force=True)
    assert_same(published / "out", published / "stock")


def test_a_revision_of_the_base(hub: Any, published: Path) -> None:
    first = hub.history("me/base")[0].oid
    hub.commit("me/base", {"config.json": "{}"})
    merge_to_folder("me/task", published / "out", base_revision=first)
    assert_same(published / "out", published / "stock")
    with pytest.raises(LoRAFileError, match="no revision 'nowhere'"):
        merge_to_folder("me/task", published / "other", base_revision="nowhere")


def test_a_base_in_another_format(hub: Any, published: Path) -> None:
    hub.commit("me/pickles", {"config.json": (published / "base/config.json").read_bytes(), "pytorch_model.bin": b"p"})
    with pytest.raises(LoRAUnsupportedError, match="neither model"):
        merge_to_folder("me/task", published / "out", "me/pickles", force=True)


def test_what_the_hub_does_not_give(hub: Any, published: Path) -> None:
    with pytest.raises(LoRAFileError, match="me/nothing"):
        merge_to_folder("me/task", published / "out", "me/nothing", force=True)
    hub.faults.status(503, "*/resolve/*/model-00002*", times=None)
    with pytest.raises(LoRAFileError) as caught:
        merge_to_folder("me/task", published / "out")
    assert caught.value.remedy
    assert not (published / "out").exists()
    assert not list(published.glob(".out*"))


def test_info_of_an_adapter_on_the_hub(hub: Any, published: Path) -> None:
    """`inspect` fetches the two files alone, says which commit they are of, and knows a repo without weights."""
    found = inspect("me/task")
    assert (found.loadable, found.base, found.commit) == (True, "me/base", hub.history("me/task")[0].oid)
    assert set(hub.fetched("me/task")) == {"adapter_config.json", "adapter_model.safetensors"}
    config = (published / "adapter/adapter_config.json").read_bytes()
    hub.commit("me/bare", {"a/adapter_config.json": config})
    bare = inspect("me/bare", subfolder="a")
    assert (bare.loadable, bare.base, bare.commit) == (False, "me/base", hub.history("me/bare")[0].oid)
    assert bare.problem is not None
    with pytest.raises(LoRAFileError, match="adapter_config"):
        inspect("me/base")
