"""Adapters that every version has to read, and read as the same numbers: tests/golden."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from golden import formula, kinds
from golden.write import HERE, write
from safetensors import safe_open

from hf_lora import LoRAAdapter, LoRAConfig, extras, forms
from hf_lora.inits import INITS
from hf_lora.loading import load_checkpoint
from hf_lora.values import Factors

CURRENT = "1"  # the version of the format that is written now
FOLDERS = sorted(path.parent for path in HERE.glob("[0-9]*/*/expected.json"))
ADAPTERS = [path for folder in FOLDERS for path in kinds.adapters(folder)]


def told(adapter: Path) -> tuple[kinds.Kind, dict[str, Any]]:
    """The kind of a golden adapter, and what stands beside it."""
    folder = next(folder for folder in FOLDERS if adapter == folder or adapter.parent == folder)
    facts = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    return kinds.KINDS[facts["kind"]], facts["adapters"][adapter.relative_to(folder).as_posix()]


def called(adapter: Path) -> str:
    return adapter.relative_to(HERE).as_posix()


@pytest.fixture(scope="module")
def bases() -> dict[str, Any]:
    return {name: kinds.base(name) for name in kinds.BASES}


@pytest.fixture
def fresh(bases: dict[str, Any]) -> Any:
    """A base in float64, whose adapters are put there in float64, too."""
    import copy

    return lambda name: copy.deepcopy(bases[name]).double()


@pytest.mark.parametrize("adapter", ADAPTERS, ids=called)
def test_the_files_are_as_they_were_written(adapter: Path) -> None:
    _, facts = told(adapter)
    assert formula.digests(adapter) == facts["tensors"]


@pytest.mark.parametrize("adapter", ADAPTERS, ids=called)
def test_it_is_read_and_computes_what_it_did(adapter: Path, fresh: Any) -> None:
    kind, facts = told(adapter)
    model = fresh(kind.base)
    model.load_lora(adapter, name="golden")
    value = LoRAAdapter.load(adapter)
    assert value.config.base_model == f"golden/{kind.base}"
    assert facts["outputs"].keys() >= value.factors.keys()
    for path, numbers in facts["outputs"].items():
        expected = np.array(numbers)
        if kind.shown == "layers":
            found = _given(model.get_submodule(path), len(expected))
        else:
            weight = _weight(model, path).detach().numpy() + value.factors[path].delta().double().numpy()
            found = weight @ formula.probe(weight.shape[1], "linear")
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max(), path


def _weight(model: Any, path: str) -> Any:
    name, _, expert = path.removesuffix("]").partition("[")
    if expert:
        return model.get_parameter(name)[int(expert)]
    layer = model.get_submodule(path)
    return layer.in_proj_weight if hasattr(layer, "in_proj_weight") else layer.weight


def _given(layer: Any, size: int) -> Any:
    with torch.no_grad():
        if isinstance(layer, torch.nn.LayerNorm):
            return layer(torch.zeros(1, size, dtype=torch.float64))[0].numpy()  # the bias alone
        if isinstance(layer, torch.nn.Embedding):
            return layer(torch.tensor([[3]]))[0, 0].numpy()
        if isinstance(layer, torch.nn.Conv2d):
            patch = layer.weight.shape[1:]
            return layer(torch.from_numpy(formula.probe(patch.numel(), "linear")).view(1, *patch)).flatten().numpy()
        rows = layer.weight.shape[0] if type(layer).__name__.endswith("Conv1D") else layer.weight.shape[1]
        found = layer(torch.from_numpy(formula.probe(rows, "linear"))[None, None])
    assert found.shape == (1, 1, size)
    return found[0, 0].numpy()


@pytest.mark.parametrize("adapter", ADAPTERS, ids=called)
def test_it_is_written_again_as_the_same_tensors(adapter: Path, tmp_path: Path) -> None:
    LoRAAdapter.load(adapter).save(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    _, facts = told(adapter)
    digests = {
        key.removeprefix("base_model.model."): hashlib.sha256(
            tensor.contiguous().view(-1).view(torch.uint8).numpy()
        ).hexdigest()
        for key, tensor in found.items()
    }
    assert digests == facts["tensors"]


def test_a_checkpoint_of_two_adapters_is_read_back(fresh: Any) -> None:
    folder = HERE / CURRENT / "checkpoint"
    model = fresh("llama").float()
    for name in ("org/a", "b"):
        model.add_lora(LoRAConfig(r=2, alpha=3.0, target_modules=["q", "v"]), name)
    model.train_lora(["org/a", "b"])
    load_checkpoint(model, folder)
    for name, part in (("org/a", "lora-org%2Fa"), ("b", "lora-b")):
        expected = LoRAAdapter.load(folder / part)
        found = model.lora_adapter(name)
        assert all(torch.equal(found.factors[path].A, pair.A) for path, pair in expected.factors.items())
        assert all(torch.equal(found.factors[path].B, pair.B) for path, pair in expected.factors.items())


# ---- which there are -------------------------------------------------------------------------------------------------


def golden_configs() -> list[tuple[str, LoRAConfig]]:
    """Of the current version: how each began, and its config as read."""
    found = []
    for adapter in ADAPTERS:
        if adapter.is_relative_to(HERE / CURRENT):
            kind, _ = told(adapter)
            found.append((str(kind.config.get("init", "kaiming")), LoRAAdapter.load(adapter).config))
    return found


def test_every_kind_in_the_tables_has_a_golden_adapter() -> None:
    configs = [config for _, config in golden_configs()]
    shown = {name for config in configs for name in (*extras.asked_for(config), *forms.forms_asked(config))}
    missing = {*extras.EXTRAS, *forms._OF} - shown
    missing |= {f"init {name}" for name in INITS} - {f"init {how}" for how, _ in golden_configs()}
    missing |= {
        f"{field}: not a golden one with it"
        for field in (
            *("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"),
            *("alora_invocation_tokens", "use_rslora", "fan_in_fan_out"),
            *("target_parameters", "trainable_token_indices"),
        )
        if not any(getattr(config, field) for config in configs)
    }
    pairs = {pair.kind for adapter in ADAPTERS for pair in LoRAAdapter.load(adapter).factors.values()}
    missing |= set(get_args(get_type_hints(Factors)["kind"])) - pairs
    assert not missing, f"add rows to tests/golden/kinds.py, then: python tests/golden/write.py {CURRENT}"
    assert {config.bias for config in configs} == {"none", "all", "lora_only"}


def test_every_kind_is_written_and_is_small() -> None:
    assert {json.loads((f / "expected.json").read_text())["kind"] for f in FOLDERS} == set(kinds.KINDS)
    sizes = {f: sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in FOLDERS}
    assert max(sizes.values()) <= 30_000
    assert sum(sizes.values()) <= 300_000


def test_what_is_there_is_never_written_again(tmp_path: Path) -> None:
    plain = {"plain": kinds.KINDS["plain"]}
    assert write("7", plain, tmp_path) == ["plain"]
    (tmp_path / "7" / "plain" / "adapter_config.json").write_text("old")
    assert write("7", plain, tmp_path) == []
    assert (tmp_path / "7" / "plain" / "adapter_config.json").read_text() == "old"
