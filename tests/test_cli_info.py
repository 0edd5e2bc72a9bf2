"""`hf-lora info`: every adapter of the corpus, what cannot be loaded, and the JSON that scripts read."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import randomise
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_lora import LoRAAdapter, LoRAConfig, LoRAFileError
from hf_lora.cli import app
from hf_lora.cli.info import bar
from hf_lora.export import MergeReport
from hf_lora.inspection import AdapterInfo, inspect, roles_of_path

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["info", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def told(*arguments: Any) -> dict[str, Any]:
    """The JSON of a call that succeeds; stdout carries nothing else."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert set(found) == set(AdapterInfo.__dataclass_fields__)
    assert found["format"] == 1
    return found


@pytest.fixture
def adapter(tiny: Any, tmp_path: Path) -> Path:
    """On q and v, with ranks 4 and 6, trained biases and a head."""
    model = tiny("bert-cls")
    config = LoRAConfig(
        r=4,
        alpha=8,
        target_modules=["q", "v"],
        rank_pattern={"value": 6},
        bias="lora_only",
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
        base_model="me/base",
        revision="v1",
    )
    model.add_lora(config)
    randomise(model)
    model.save_lora(tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_everything_that_the_files_say(adapter: Path) -> None:
    found = told(adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert (found["source"], found["subfolder"], found["commit"]) == (str(adapter), None, None)
    assert (found["loadable"], found["problem"], found["notes"], found["run"]) == (True, None, [], None)
    assert (found["peft_type"], found["task_type"]) == ("LORA", "SEQ_CLS")
    assert (found["base"], found["base_revision"]) == ("me/base", "v1")
    assert found["config"] == json.loads((adapter / "adapter_config.json").read_text())
    assert found["use_rslora"] is False
    scales = {(s["rank"], s["alpha"], s["scaling"], s["layers"]) for s in found["scales"]}
    assert scales == {(4, 8.0, 2.0, 2), (6, 8.0, 8 / 6, 2)}
    assert [(t["role"], t["modules"], t["layers"]) for t in found["targets"]] == [
        ("q", ["query"], 2),
        ("v", ["value"], 2),
    ]
    assert [t["parameters"] for t in found["targets"]] == [2 * 4 * (32 + 32), 2 * 6 * (32 + 32)]
    assert found["heads"] == [{"path": "classifier", "parameters": 3 * 32 + 3}]
    assert (found["biases"], found["layers"]) == (4, 4)
    assert found["parameters"] == sum(t.numel() for t in tensors.values())
    assert found["nbytes"] == sum(t.nbytes for t in tensors.values())
    assert found["dtypes"] == {"float32": len(tensors)}
    assert found["health"] == []
    for file in found["files"]:
        data = (adapter / file["name"]).read_bytes()
        assert (file["nbytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert {file["name"] for file in found["files"]} == {"adapter_config.json", "adapter_model.safetensors"}


def test_the_spectrum_is_that_of_the_dense_changes(adapter: Path) -> None:
    value = LoRAAdapter.load(adapter)
    for target in told(adapter)["targets"]:
        deltas = [f.delta().double() for p, f in value.factors.items() if p.endswith(target["modules"][0])]
        sigmas = [torch.linalg.svdvals(delta) for delta in deltas]
        shares = [s / s.sum() for s in sigmas]
        ranks = [math.exp(-sum(float(p) * math.log(float(p)) for p in share if p > 1e-12)) for share in shares]
        spectrum = target["spectrum"]
        assert math.isclose(
            spectrum["delta_norm"], math.sqrt(sum(float(d.square().sum()) for d in deltas)), rel_tol=1e-5
        )
        assert math.isclose(spectrum["effective_rank"], sum(ranks) / 2, rel_tol=1e-3)
        assert math.isclose(spectrum["smallest_rank"], min(ranks), rel_tol=1e-3)
        assert math.isclose(spectrum["largest_rank"], max(ranks), rel_tol=1e-3)
        rank = 4 if target["role"] == "q" else 6
        mean = [float(sum(s[i] for s in sigmas) / 2) for i in range(rank)]
        assert spectrum["singular_values"] == pytest.approx(mean, rel=1e-5)


def test_without_the_spectrum(adapter: Path) -> None:
    found, whole = told(adapter, "--no-spectrum"), told(adapter)
    assert [target["spectrum"] for target in found["targets"]] == [None, None]
    for target in whole["targets"]:
        target["spectrum"] = None
    assert found == whole


def test_the_slices_of_a_fused_layer(tiny: Any, tmp_path: Path) -> None:
    model = tiny("neox")
    model.add_lora(LoRAConfig(r=4, alpha=6, target_modules=["q", "v"]))
    randomise(model)
    model.save_lora(tmp_path)
    found = told(tmp_path)
    assert [(t["role"], t["modules"], t["layers"]) for t in found["targets"]] == [
        ("q", ["query_key_value"], 2),
        ("v", ["query_key_value"], 2),
    ]
    assert found["scales"] == [{"rank": 4, "alpha": 6.0, "scaling": 1.5, "layers": 2}]
    value = LoRAAdapter.load(tmp_path)
    rows = {block.role: block.index() for f in value.factors.values() for block in f.blocks}
    for target in found["targets"]:
        deltas = [f.delta()[rows[target["role"]]] for f in value.factors.values()]
        norm = math.sqrt(sum(float(d.square().sum()) for d in deltas))
        assert math.isclose(target["spectrum"]["delta_norm"], norm, rel_tol=1e-4)
    assert sum(t["parameters"] for t in found["targets"]) == found["parameters"] == value.num_parameters


def test_rslora_and_low_precision(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=4, alpha=3, target_modules=["q"], use_rslora=True))
    randomise(model)
    LoRAAdapter.of(LoRAAdapter.load(model.save_lora(tmp_path / "a") or tmp_path / "a").to(torch.bfloat16)).save(
        tmp_path
    )
    found = told(tmp_path)
    assert (found["use_rslora"], found["scales"][0]["scaling"], found["dtypes"]) == (True, 1.5, {"bfloat16": 4})


def test_the_text_for_people(adapter: Path) -> None:
    said = run(adapter).output
    for words in (
        "LORA, SEQ_CLS",
        "me/base at v1",
        "rank 4, alpha 8, scaling 2",
        "query",
        "classifier (99)",
        "healthy",
    ):
        assert words in said, words
    assert re.search(r"q +query +2 +512 +\S+ +\d\.\d +█", said)
    assert "spectrum not computed" in run(adapter, "--no-spectrum").output


@pytest.mark.parametrize(
    ("values", "expected"),
    [((), ""), ((2.0, 1.0, 0.5), "█▅▃"), ((1.0, 0.0), "█·"), ((0.0, 0.0), "··"), ((1.0, 1e-9), "█▁")],
)
def test_bars(values: tuple[float, ...], expected: str) -> None:
    assert bar(values) == expected


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model.layers.0.self_attn.q_proj", "q"),
        ("model.layers.11.mlp.down_proj", "down"),
        ("transformer.h.3.attn.c_attn", "q+k+v"),
        ("transformer.h.3.attn.c_proj", "o"),
        ("transformer.h.3.mlp.c_proj", "down"),
        ("bert.encoder.layer.0.attention.output.dense", "o"),
        ("bert.encoder.layer.0.output.dense", "down"),
        ("gpt_neox.layers.0.attention.query_key_value", "q+k+v"),
        ("model.layers.0.mlp.gate_up_proj", "gate+up"),
        ("encoder.block.0.layer.0.SelfAttention.o", "o"),
        ("lm_head", "lm_head"),
        ("a.b.something", "something"),
    ],
)
def test_roles_from_names(path: str, role: str) -> None:
    assert roles_of_path(path) == role


def test_a_training_run_beside_it(adapter: Path) -> None:
    log = [{"step": 1, "loss": 2.0}, {"step": 9, "loss": 1.0}, {"step": 9, "eval_loss": 1.25}]
    state = {"global_step": 9, "epoch": 0.5, "log_history": log, "best_metric": 1.25, "best_global_step": 9}
    (adapter / "trainer_state.json").write_text(json.dumps(state))
    found = told(adapter)
    assert (found["run"]["steps"], found["run"]["best"]) == (9, ["eval_loss", 1.25, 9])
    assert "trainer_state.json" in {file["name"] for file in found["files"]}
    assert "trained 9 steps, 0.5 epochs, loss 2 → 1, best eval_loss 1.25 at step 9" in run(adapter).output
    (adapter / "trainer_state.json").write_text("{")
    found = told(adapter)
    assert (found["loadable"], found["run"]) == (True, None)
    assert "trainer_state.json" in found["notes"][0]


# ---- health ----------------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({key: change(key, tensor) for key, tensor in load_file(path).items()}, path, metadata)


def test_an_adapter_that_was_never_trained(tiny: Any, tmp_path: Path) -> None:
    model = tiny("llama")
    model.add_lora(LoRAConfig(r=4, target_modules=["q"]))
    model.save_lora(tmp_path)
    found = told(tmp_path)
    assert [(f["kind"], f["fatal"]) for f in found["health"]] == [("untouched", True)]
    assert "!! untouched" in run(tmp_path).output
    assert "healthy" not in run(tmp_path).output


def test_a_collapsed_adapter_and_that_nobody_looked(adapter: Path) -> None:
    def flatten(key: str, tensor: torch.Tensor) -> torch.Tensor:
        return (
            tensor * (torch.arange(tensor.shape[0]) == 0)[:, None] if "layer.0" in key and "lora_A" in key else tensor
        )

    edit(adapter, flatten)
    found = told(adapter)
    assert [f["kind"] for f in found["health"]] == ["collapsed"]
    assert len(found["health"][0]["where"]) == 2
    assert told(adapter, "--no-spectrum")["health"] == []


def test_a_non_finite_adapter_is_described_and_not_loadable(adapter: Path) -> None:
    edit(adapter, lambda key, t: t * math.nan if "layer.1" in key and "query.lora_B" in key else t)
    found = told(adapter)
    assert not found["loadable"]
    assert "layer.1" in json.dumps(found["problem"])
    assert found["parameters"] > 0
    assert "cannot be loaded" in run(adapter).output


# ---- what cannot be loaded -------------------------------------------------------------------------------------------


def test_every_adapter_of_the_corpus(shared: Path) -> None:
    refused = {}
    for folder in sorted((shared / "peft-corpus/adapters").iterdir()):
        found = told(folder)
        assert found["config"] == json.loads((folder / "adapter_config.json").read_text())
        assert found["base"]
        assert run(folder).exit_code == 0
        if not found["loadable"]:
            refused[folder.name] = found["problem"]["type"]
            assert found["problem"]["message"]
            continue
        weights = next(p for p in folder.iterdir() if p.suffix == ".safetensors")
        assert found["parameters"] == sum(t.numel() for t in load_file(weights).values())
        assert all(target["spectrum"]["delta_norm"] > 0 for target in found["targets"])
    assert refused == {
        "RifqiCah__Adalora_indonesiaDataset__adalora": "LoRAUnsupportedError",
        "sdtrklse__lightweight-fine-tuning": "LoRAFileError",
    }
    pickled = told(shared / "peft-corpus/adapters/sdtrklse__lightweight-fine-tuning", "--allow-pickle")
    assert pickled["loadable"]
    assert pickled["targets"]


def test_every_config_of_the_corpus(shared: Path, tmp_path: Path) -> None:
    """99 configs without their weights: none is without an answer, and each type is named."""
    with open(shared / "peft-corpus/INDEX.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert len(rows) == 99
    for row in rows:
        folder = tmp_path / row["file"]
        folder.mkdir()
        shutil.copy(shared / "peft-corpus/configs" / row["file"], folder / "adapter_config.json")
        found = inspect(folder)
        assert not found.loadable
        assert found.problem is not None
        assert found.problem.message
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8-sig")).get("peft_type")
        assert found.peft_type == kind
        assert len(found.files) == 1


def test_a_lora_without_weights_says_what_its_config_says(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    said = run(adapter)
    assert said.exit_code == 0
    for words in ("me/base", "r: 4", "lora_alpha: 8", "cannot be loaded", "adapter_model.safetensors"):
        assert words in said.output, words


@pytest.mark.parametrize("damage", ["config torn", "no config", "weights torn", "weights of another adapter"])
def test_a_damaged_adapter_is_described_as_far_as_it_goes(damage: str, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    if damage == "config torn":
        (adapter / "adapter_config.json").write_text("{")
    elif damage == "no config":
        (adapter / "adapter_config.json").unlink()
    elif damage == "weights torn":
        weights.write_bytes(weights.read_bytes()[:-9])
    else:
        save_file({"base_model.model.x.lora_A.weight": torch.ones(3, 5)}, weights)
    found = told(adapter)
    assert not found["loadable"]
    assert found["problem"]["message"]
    assert (found["parameters"] == 0) is (damage == "weights torn")
    assert bool(found["notes"]) is ("config" in damage)
    assert run(adapter).exit_code == 0


def test_where_there_is_nothing_to_say(tmp_path: Path, adapter: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "both").mkdir()
    (tmp_path / "both/adapter_config.json").write_text("no json")
    (tmp_path / "model").mkdir()  # of its own, as of a merge
    save_file({"w": torch.ones(3)}, tmp_path / "model/model.safetensors")
    for arguments, says in [
        ((tmp_path / "model",), "holds no adapter"),
        ((tmp_path / "empty",), "holds no adapter"),
        ((tmp_path / "both",), "holds no adapter"),
        ((tmp_path / "file",), "is a file"),
        ((tmp_path / "no/where/at/all",), "neither a folder here nor"),
        ((adapter, "--subfolder", "x"), "x does not exist"),
        ((adapter, "--subfolder", "../adapter"), "subfolder"),
    ]:
        result = run(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert says in result.output, (says, result.output)
        assert "Traceback" not in result.output
        as_json = run(*arguments, "--json")
        assert as_json.exit_code == 2
        assert json.loads(as_json.stdout)["error"]["message"]


def test_a_subfolder(adapter: Path) -> None:
    found = told(adapter.parent, "--subfolder", "adapter")
    assert (found["source"], found["subfolder"], found["loadable"]) == (str(adapter.parent), "adapter", True)


def test_inspect_writes_nothing(adapter: Path) -> None:
    before = {path: path.read_bytes() for path in adapter.iterdir()}
    inspect(adapter)
    assert {path: path.read_bytes() for path in adapter.iterdir()} == before
    with pytest.raises(LoRAFileError):
        inspect(adapter.parent / "nowhere else")


def test_stdout_carries_the_json_alone(adapter: Path) -> None:
    (adapter / "trainer_state.json").write_text("{")
    command = [sys.executable, "-m", "hf_lora", "info", str(adapter), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loadable"]


def test_the_page_names_every_field_of_the_json() -> None:
    page = (ROOT / "docs/pages/command-line.md").read_text(encoding="utf-8")
    section = page[page.index("## info") :].partition("\n## ")[0]
    table = "".join(re.findall(r"^\| (`.*?) \|", section, re.M))
    assert set(re.findall(r"`(\w+)`", table)) == set(AdapterInfo.__dataclass_fields__)
    merge = page[page.index("## merge") :].partition("\n## ")[0]
    said = merge[merge.index("The JSON has") :]
    assert set(re.findall(r"`(\w+)`", said)) == set(MergeReport.__dataclass_fields__)
