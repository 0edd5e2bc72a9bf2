"""Inputs that the fuzzing (recipes/hostile/fuzz.py) found: each crashed, or was taken for what it is not, once."""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_lora import (
    LoRAAdapter,
    LoRAConfig,
    LoRAConfigError,
    LoRAError,
    LoRAFileError,
    LoRAHubError,
    LoRANameError,
    LoRAStateError,
    hub,
    importers,
    safefile,
    store,
    switching,
)
from hf_lora import model as models
from hf_lora.demo import library
from hf_lora.demo.launch import base_of
from hf_lora.demo.problems import DemoError
from hf_lora.export.base import open_base
from hf_lora.hub_errors import translated
from hf_lora.integrations import resuming
from hf_lora.layout import disk_config
from hf_lora.recipe import document, folder
from hf_lora.recipe.problems import RecipeError

HUGE = 10**400  # an integer that JSON and YAML can say and no float can hold
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
A, B = "base_model.model.h.q.lora_A.weight", "base_model.model.h.q.lora_B.weight"
GOOD = {A: torch.ones(2, 4), B: torch.ones(3, 2)}
DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000

serve_app: Any = importlib.import_module("hf_lora.serve.app")


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field",
    [
        {"r": HUGE},
        {"lora_alpha": HUGE},
        {"lora_alpha": 1e300},  # a scaling that is no float32: torch refused it, in the forward
        {"rank_pattern": {"q": HUGE}},
        {"alpha_pattern": {"q": HUGE}},
        {"kasa_config": {"beta": HUGE}},
        {"velora_config": {"scale": HUGE}},
        {"monteclora_config": {"kl_loss_weight": HUGE}},
        {"monteclora_config": {"num_samples": HUGE}},
        {"lora_alpha": None},  # PEFT cannot divide it by r; it was taken as alpha = r
    ],
)
def test_numbers_that_no_float_can_hold(field: dict[str, Any]) -> None:
    with pytest.raises(LoRAConfigError, match=next(iter(field)).removeprefix("lora_")):
        LoRAConfig.from_peft(CONFIG | field)


@pytest.mark.parametrize("changes", [{"r": HUGE}, {"alpha": HUGE}, {"alpha": None, "r": HUGE}])
def test_a_config_never_holds_what_disk_config_cannot_write(changes: dict[str, Any]) -> None:
    with pytest.raises(LoRAConfigError):
        LoRAConfig(target_modules=["q"], **changes)
    assert disk_config(store.from_state_dict(LoRAConfig.from_peft(CONFIG), GOOD)).r == 2


@pytest.mark.parametrize("init_r", [HUGE, 10**309])
def test_adalora_init_r(tmp_path: Path, init_r: int) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | {"peft_type": "ADALORA", "init_r": init_r}))
    with pytest.raises(LoRAError, match="init_r"):
        importers.from_adalora(tmp_path)


@pytest.mark.parametrize("weight", [HUGE, -HUGE, 1e39, -1e300, True, float("nan")])
def test_weights_of_a_mixture(weight: float) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    models.add(model, LoRAConfig(r=1, target_modules=["0"]), name="a")
    with pytest.raises(LoRAStateError, match="cannot have the weight"):
        switching.set_lora(model, {"a": weight})
    assert switching.described(models.require(model).default) == "a"


# ---- safetensors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": True, "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": 0.5, "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": -(2**63), "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": 4},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]},
        {"dtype": "F32", "shape": [2**62] * 5000, "data_offsets": [0, 4]},  # bytes with more digits than Python prints
    ],
)
def test_entries_of_a_header(tmp_path: Path, entry: dict[str, Any]) -> None:
    text = json.dumps({"x": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with (
        safefile.reading(tmp_path / "x.safetensors") as file,
        pytest.raises(LoRAFileError, match="no valid safetensors file"),
    ):
        safefile.read_header(file, tmp_path / "x.safetensors")


@pytest.mark.parametrize("shape", [(3,), (3, 2, 1), ()])
def test_a_variant_beside_factors_that_are_no_matrices(tmp_path: Path, shape: tuple[int, ...]) -> None:
    magnitude = {"base_model.model.h.q.lora_magnitude_vector": torch.ones(3)}
    save_file(GOOD | {B: torch.ones(shape)} | magnitude, tmp_path / store.WEIGHTS_NAME)
    (tmp_path / store.CONFIG_NAME).write_text(json.dumps(CONFIG | {"use_dora": True}))
    with pytest.raises(LoRAError):
        store.read_adapter(tmp_path)


@pytest.mark.parametrize(
    "field", [{"base_model_name_or_path": "\ud800"}, {"x\udfff": 1}, {"target_modules": ["\ud800"]}]
)
def test_texts_with_half_of_a_character(tmp_path: Path, field: dict[str, Any]) -> None:
    """They were read, and could not be written."""
    (tmp_path / store.CONFIG_NAME).write_text(json.dumps(CONFIG | field))
    with pytest.raises(LoRAFileError, match="half of a character"):
        store.read_config(tmp_path)
    pair = '{"base_model_name_or_path": "\\ud83d\\udca5", "peft_type": "LORA"}'
    (tmp_path / store.CONFIG_NAME).write_text(pair)
    assert store.read_config(tmp_path).base_model == "💥"


def test_a_module_path_with_half_of_a_character(tmp_path: Path) -> None:
    shapes = {"\ud800.lora_A.weight": [2, 4], "\ud800.lora_B.weight": [3, 2]}
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        start, end = end, end + 4 * rows * columns
        header["base_model.model." + name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    (tmp_path / store.WEIGHTS_NAME).write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    (tmp_path / store.CONFIG_NAME).write_text(json.dumps(CONFIG))
    with pytest.raises(LoRAFileError, match="half of a character"):
        store.read_adapter(tmp_path)


def test_a_text_that_cannot_be_written_is_refused_before_anything_is(tmp_path: Path) -> None:
    value = store.from_state_dict(LoRAConfig.from_peft(CONFIG | {"base_model_name_or_path": "\ud800"}), GOOD)
    with pytest.raises(LoRAFileError, match="half of a character"):
        store.write_adapter(value, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_index_that_names_a_tensor_which_no_shard_has(tmp_path: Path) -> None:
    """The rest was merged and written as the whole model; loading it drew the missing tensor at random."""
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoRAFileError, match="names 1 tensors that none of its files has: b"):
        open_base(str(tmp_path))


# ---- a run's files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "state", [DEEP, '"global_step"', '["global_step"]', '{"global_step": false}', '{"global_step": "6"}', "6", "null"]
)
def test_a_trainer_state_that_is_none(tmp_path: Path, state: str) -> None:
    (tmp_path / "trainer_state.json").write_text(state)
    assert not resuming._state_is_whole(tmp_path)
    assert not folder._is_whole(tmp_path, 6)


def test_the_base_of_a_folder_with_a_deep_config(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(DEEP)
    with pytest.raises(DemoError, match="no adapter names one"):
        base_of(tmp_path)


# ---- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opened", ["[", "{a: ", "[{a: "])
def test_a_recipe_with_a_thousand_brackets(opened: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was read to its end before the levels were counted: 3,000 took 10 s, and twice as many four times as long."""
    monkeypatch.setattr(document.yaml, "compose", lambda *_, **__: pytest.fail("the whole text was composed"))
    with pytest.raises(RecipeError, match="more than 20 levels"):
        document.parse("x: " + opened * 1_000)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["\ud800", "a\udfffb"])
def test_names_that_no_file_can_have(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(LoRANameError, match="half of a character"):
        models.add(model, LoRAConfig(r=1, target_modules=["0"]), name=name)
    assert type(model[0]) is nn.Linear


# ---- a deployment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"source": "s"}, "base"),
        ({"base": "b"}, "source"),
        ({"base": "b", "source": "s", "pool_options": "b"}, "pool_options"),
        ({"base": "b", "source": "s", "pool_options": 8}, "pool_options"),
        ({"base": "b", "source": "s", "ray_actor_options": HUGE, "num_gpus": 1}, "ray_actor_options"),
        ({"base": {"x": 1}, "source": "s"}, "base"),
        ({"base": "", "source": "s"}, "base"),
        ({"base": "b", "source": "s", "name": 3}, "name"),
    ],
)
def test_arguments_of_a_deployment(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(LoRAConfigError) as refused:
        serve_app.app(arguments)
    assert refused.value.name == name


# ---- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "null",
        "5",
        '"x"',
        "{",
        '{"error": "x"}',
        '[{"id": 3}]',
        '[{"id": "a/b", "tags": 5}]',
        '[{"id": "a/b", "likes": "1"}]',
    ],
)
def test_an_answer_that_is_no_list_of_repos(hub_says: Any, body: str) -> None:
    hub_says(body)
    if body == "[]":
        assert hub.list_adapters("org/base", token=False) == []
        return
    with pytest.raises(LoRAHubError, match="not the Hub") as refused:
        hub.list_adapters("org/base", token=False)
    assert refused.value.kind == "strange answer"


@pytest.mark.parametrize("status", [200, 403, 404, 500])
@pytest.mark.parametrize("body", ["[]", "5", '[["error"]]', '{"sha": 5, "id": "a/b"}', '{"id": "a/b", "sha": "../.."}'])
def test_an_answer_that_is_no_repo(hub_says: Any, status: int, body: str) -> None:
    hub_says(body, status)
    with pytest.raises(LoRAHubError):
        library._at("me/task")


def test_a_redirect_without_end(hub_says: Any) -> None:
    hub_says("", 302, {"Location": "x/y"})
    with pytest.raises(LoRAHubError):
        hub.fetch("me/task", token=False)
    assert hub.weights_size("me/task", token=False) is None


def test_a_callers_own_mistake_stays_one() -> None:
    with pytest.raises(TypeError, match="keyword"), translated("me/task"):
        hub.fetch_card("me/task", most=1, nonsense=object(), local_files_only=False)


@pytest.fixture
def hub_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Let every question to the Hub be answered with a body, a status and headers; no network."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    http: Any = vars(_http).get("httpx2") or vars(_http)["httpx"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(_http.time), "sleep": lambda seconds: None}))

    def says(body: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        def answer(request: Any) -> Any:
            return http.Response(status, content=body.encode(), headers=headers or {}, request=request)

        set_client_factory(lambda: http.Client(transport=http.MockTransport(answer), follow_redirects=True))

    yield says
    set_client_factory(_http.default_client_factory)


# ---- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "é" * 5_000],
        ["list", "é" * 5_000],
        ["merge", "é" * 5_000, "out"],
        ["push", "é" * 5_000, "me/task"],
        ["import", "mlx", "é" * 5_000, "out"],
        ["import", "mlx", "x", "é" * 5_000],
        ["analyze", "é" * 5_000, "é" * 5_000],
        ["train", "é" * 5_000],
    ],
)
def test_names_that_are_longer_than_any_files(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from hf_lora import cli

    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, arguments, env={"HF_HUB_OFFLINE": "1"})
    assert result.exit_code == 2
    assert "Error" in result.output
    assert "Unexpected" not in result.output


@pytest.mark.parametrize("name", ["h.0.q]", "h.0.q[1]", "experts.w[0][1]"])
def test_a_bracket_in_a_name(name: str, tmp_path: Path) -> None:
    """Brackets tell experts apart, in memory alone; in a file they sent `resolve` round and round."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"base_model.model.{name}.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(LoRAFileError, match="no module path"):
        LoRAAdapter.load(tmp_path)
    assert LoRAConfig(r=2, target_modules=["q"]).resolve([name])[name] == (2, 2.0)
