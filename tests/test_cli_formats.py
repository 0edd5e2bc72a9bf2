"""`hf-lora import`, `export` and `extract`: thin, so what reaches the files, what is printed, and how mistakes end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import randomise
from safetensors.torch import save_file
from typer.testing import CliRunner

from hf_lora import LoRAAdapter, LoRAConfig
from hf_lora.cli import app
from hf_lora.export import GGUFReport

LAYER = {"path", "role", "rank", "relative", "error"}
REPORT = {"folder", "parameters", "error", "error_by_rank", "layers", "unchanged", "whole", "left_out"}


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


def told(*arguments: Any) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def mistaken(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.output


def test_import_loralib(tiny, tmp_path):
    model = tiny("gpt2")
    model.save_pretrained(tmp_path / "base")
    state = {}
    for i in range(2):
        state[f"transformer.h.{i}.attn.c_attn.lora_A"] = torch.randn(6, 32)
        state[f"transformer.h.{i}.attn.c_attn.lora_B"] = torch.randn(64, 3)
    torch.save(state, tmp_path / "x.pt")
    command = ("import", "loralib", tmp_path / "x.pt", tmp_path / "out")
    assert "alpha was not given" in mistaken(*command)
    assert "not read unless asked" in mistaken(*command, "--alpha", 6)
    assert "is not BITS" in mistaken(*command, "--alpha", 6, "--enable-lora", "1,2")
    options = ("--alpha", 6, "--enable-lora", "c_attn=1,0,1", "--allow-pickle", "--base", tmp_path / "base")
    found = told(*command, *options)
    assert (found["layers"], found["ranks"], found["base_model"]) == (2, [6], str(tmp_path / "base"))
    factors = LoRAAdapter.load(tmp_path / "out").factors["transformer.h.0.attn.c_attn"]
    assert [block.role for block in factors.blocks] == ["q", "v"]
    assert factors.scaling == 2
    assert "holds an adapter" in mistaken(*command, *options)
    again = run(*command, "--alpha", 12, "--enable-lora", "1,0,1", "--allow-pickle", "--force")
    assert again.exit_code == 0
    assert "2 layers, rank 6" in again.output
    assert LoRAAdapter.load(tmp_path / "out").factors["transformer.h.0.attn.c_attn"].scaling == 4


def test_import_mlx_and_adalora(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "adapter_config.json").write_text('{"lora_parameters": {"rank": 2, "scale": 4, "alpha": 1}}')
    save_file({"x.lora_a": torch.ones(8, 2), "x.lora_b": torch.ones(2, 8)}, tmp_path / "mlx" / "adapters.safetensors")
    command = ("import", "mlx", tmp_path / "mlx", tmp_path / "out", "--base-model", "org/base")
    assert "not certain" in mistaken(*command)
    assert told(*command, "--scale", 3)["base_model"] == "org/base"
    assert LoRAAdapter.load(tmp_path / "out").factors["x"].scaling == 3
    (tmp_path / "ada").mkdir()
    config = {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 2, "total_step": 9}
    (tmp_path / "ada" / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"lora_A": torch.ones(2, 8), "lora_E": torch.full((2, 1), 0.5), "lora_B": torch.ones(8, 2)}
    save_file(
        {f"base_model.model.x.{name}": t for name, t in tensors.items()},
        tmp_path / "ada" / "adapter_model.safetensors",
    )
    told("import", "adalora", tmp_path / "ada", tmp_path / "lora")
    delta = LoRAAdapter.load(tmp_path / "lora").factors["x"].delta()
    torch.testing.assert_close(delta, torch.full((8, 8), 1 / (1 + 5e-6)))


def test_export_gguf(tiny, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed: install hf_lora[test]")
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    model.add_lora(LoRAConfig(r=2, target_modules=["q"]))
    randomise(model)
    model.save_lora(tmp_path / "task")
    out = tmp_path / "task.gguf"
    found = told("export", "gguf", tmp_path / "task", out, "--base", tmp_path / "base", "--dtype", "f16")
    assert (found["architecture"], found["tensors"], found["dtype"]) == ("llama", 4, "f16")
    assert found["nbytes"] == out.stat().st_size
    assert "exists" in mistaken("export", "gguf", tmp_path / "task", out)
    result = run("export", "gguf", tmp_path / "task", out, "--base", tmp_path / "base", "--force")
    assert result.exit_code == 0
    assert "4 tensors in f32" in result.output


def test_extract(tiny, tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or name == "model.norm.weight":
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    command = ("extract", tmp_path / "base", tmp_path / "tuned", tmp_path / "out")
    found = told(*command, "--rank", 4, "--targets", "q,v")
    assert set(found) == REPORT
    assert set(found["layers"][0]) == LAYER
    assert [layer["rank"] for layer in found["layers"]] == [4, 4]
    assert list(found["left_out"]) == ["model.norm.weight"]
    assert len(found["unchanged"]) == 2
    assert 0 < found["error"] == found["error_by_rank"]["4"] < found["error_by_rank"]["1"] < 1
    assert "1 tensors changed" in mistaken(*command, "--force", "--strict")
    assert "given alone" in mistaken(*command, "--force", "--rank", 4, "--energy", 0.5)
    said = run(*command, "--force", "--energy", 0.9)
    assert said.exit_code == 0
    assert "not in the adapter: model.norm.weight" in said.output
    whole = told(*command, "--force", "--modules-to-save", "model.norm", "--strict")
    assert whole["whole"] == ["model.norm.weight"]
    norm = LoRAAdapter.load(tmp_path / "out").modules["model.norm"]["weight"]
    assert torch.equal(norm, model.model.norm.weight)
    assert Path(LoRAAdapter.load(tmp_path / "out").config.base_model) == tmp_path / "base"


def test_the_page_names_every_field_of_the_json():
    page = (Path(__file__).resolve().parents[1] / "docs/pages/command-line.md").read_text(encoding="utf-8")

    def named(command: str) -> set[str]:
        section = page[page.index(f"## {command}\n") :].partition("\n## ")[0]
        return set(re.findall(r"`(\w+)`", section[section.index("The JSON has") :]))

    assert named("extract") == REPORT | LAYER
    assert named("export") == set(GGUFReport.__dataclass_fields__)
    assert named("import") == {"source", "folder", "base_model", "layers", "ranks", "parameters"}
