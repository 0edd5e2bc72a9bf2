"""`hf-lora push`, `pull` and `list`, over HTTP against the local hub, and on folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import randomise
from smallbase import save_base
from test_cli import run, said

from hf_lora import LoRAAdapter, LoRAConfig

ROOT = Path(__file__).parents[1]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "lab/base"


@pytest.fixture
def adapter(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trained adapter in the folder task of the working directory."""
    monkeypatch.chdir(tmp_path)
    return saved(tiny, tmp_path / "task")


def saved(tiny: Any, folder: Path, base: str | None = BASE, **config: Any) -> Path:
    model = tiny("llama")
    if base is not None:
        model.config._name_or_path = base
    model.add_lora(LoRAConfig(**{"r": 4, "target_modules": ["q", "v"], "task_type": "CAUSAL_LM", **config}))
    randomise(model)
    model.save_lora(folder)
    return folder


def same(one: Path, other: Path) -> bool:
    a, b = LoRAAdapter.load(one).factors, LoRAAdapter.load(other).factors
    return a.keys() == b.keys() and all(torch.equal(a[k].A, b[k].A) and torch.equal(a[k].B, b[k].B) for k in a)


# ---- push ------------------------------------------------------------------------------------------------------------


def test_push_is_one_commit_of_three_files_with_the_users_words(hub: Any, adapter: Path) -> None:
    (adapter / "README.md").write_text("# My task\n\nWords of mine.\n")
    (adapter / "optimizer.pt").write_bytes(b"state")
    (adapter / "recipe.json").write_text("{}")
    state = {"global_step": 30, "log_history": [{"step": 10, "loss": 2.5}, {"step": 30, "loss": 1.25}]}
    (adapter / "trainer_state.json").write_text(json.dumps(state))
    result = run("push", "task", "me/task", "--private", "--message", "first", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    files = hub.files("me/task")
    assert set(files) == {CONFIG, WEIGHTS, "README.md"}
    assert files[WEIGHTS] == (adapter / WEIGHTS).read_bytes()
    card = files["README.md"].decode()
    assert "Words of mine." in card
    assert f"base_model: {BASE}" in card
    assert "1.25" in card
    (commit,) = hub.history("me/task")
    assert (commit.title, commit.oid) == ("first", found["commit"])
    assert hub.repo("me/task").private


def test_push_into_a_branch_and_a_subfolder(hub: Any, adapter: Path) -> None:
    hub.create("me/task")
    result = run("push", "task", "me/task", "--revision", "v2", "--subfolder", "deep/one")
    assert result.exit_code == 0, result.output
    assert "Pushed: " in said(result)
    assert {f"deep/one/{CONFIG}", f"deep/one/{WEIGHTS}"} <= set(hub.files("me/task", "v2"))
    assert f"deep/one/{CONFIG}" not in hub.files("me/task")


def test_push_of_a_base_in_a_folder_asks_for_its_id(hub: Any, adapter: Path, tiny: Any) -> None:
    saved(tiny, adapter, base="/home/somebody/base")
    result = run("push", "task", "me/task")
    assert result.exit_code == 2
    assert "is a folder or no id on the Hub" in said(result)
    assert run("push", "task", "me/task", "--base-model", BASE).exit_code == 0
    assert "/home/somebody" not in "".join(str(content) for content in hub.files("me/task").values())


def test_push_of_an_untrained_adapter_needs_force(hub: Any, adapter: Path, tiny: Any) -> None:
    model = tiny("llama")
    model.config._name_or_path = BASE
    model.add_lora(LoRAConfig(r=2, target_modules=["q"]))
    model.save_lora("fresh")
    result = run("push", "fresh", "me/task", "--json")
    assert result.exit_code == 2
    assert "never trained" in json.loads(result.stdout)["error"]["message"]
    assert run("push", "fresh", "me/task", "--force").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere", "me/task"), "is no folder"),
        ((".", "me/task"), "adapter_config.json"),
        (("task", "you/task"), "you/task"),
        (("task", "a/b/c"), "a/b/c"),
        (("task", "me/task", "--token", "hf_x"), "No such option"),
        (("task", "me/task", "--token-from-env", "NOT_SET"), "NOT_SET is no environment variable"),
    ],
)
def test_push_refused(arguments: tuple[str, ...], says: str, hub: Any, adapter: Path) -> None:
    result = run("push", *arguments)
    assert result.exit_code == 2
    assert says in said(result)
    assert "Traceback" not in result.output
    answered = run("push", *arguments, "--json")
    assert answered.exit_code == 2
    assert set(json.loads(answered.stdout)["error"]) == {"type", "message", "remedy"}
    assert "me/task" not in hub.store.repos


def test_a_token_comes_from_the_environment_and_is_never_shown(
    hub: Any, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.login(None)
    assert run("push", "task", "me/task").exit_code == 2
    monkeypatch.setenv("MY_TOKEN", hub.token)
    result = run("push", "task", "me/task", "--token-from-env", "MY_TOKEN")
    assert result.exit_code == 0, result.output
    mistaken = run("push", "task", "me/task", "--token-from-env", hub.token)
    assert mistaken.exit_code == 2
    assert hub.token not in mistaken.output


# ---- pull ------------------------------------------------------------------------------------------------------------


def test_pull_fetches_two_files_and_no_more(hub: Any, adapter: Path) -> None:
    run("push", "task", "me/task")
    hub.requests.clear()
    result = run("pull", "me/task", "--out", "there", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["folder"], found["base_model"], found["rank"]) == ("there", BASE, 4)
    assert {path.name for path in Path("there").iterdir()} == {CONFIG, WEIGHTS}
    assert sorted(hub.fetched("me/task")) == [CONFIG, WEIGHTS]
    assert same(adapter, Path("there"))


def test_pull_names_the_folder_and_does_not_replace_an_adapter(hub: Any, adapter: Path, tiny: Any) -> None:
    run("push", "task", "me/other")
    run("push", "task", "me/other", "--subfolder", "deep/one", "--revision", "v2")
    assert run("pull", "me/other").exit_code == 0
    assert same(adapter, Path("other"))
    assert run("pull", "me/other", "--subfolder", "deep/one", "--revision", "v2").exit_code == 0
    assert same(adapter, Path("one"))
    saved(tiny, adapter, r=2)
    before = (adapter / WEIGHTS).read_bytes()
    result = run("pull", "me/other", "--out", "task")
    assert result.exit_code == 2
    assert "'task' holds an adapter" in said(result)
    assert (adapter / WEIGHTS).read_bytes() == before
    assert run("pull", "me/other", "--out", "task", "--force").exit_code == 0
    assert LoRAAdapter.load("task").config.r == 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("me/none",), "me/none"), (("me/task", "--revision", "v9"), "v9"), (("me/task", "--subfolder", "x"), "x")],
)
def test_pull_refused(arguments: tuple[str, ...], says: str, hub: Any, adapter: Path) -> None:
    run("push", "task", "me/task")
    result = run("pull", *arguments, "--out", "there")
    assert result.exit_code == 2
    assert says in said(result)
    assert not Path("there").exists()


def test_pull_of_a_cut_download_leaves_nothing(hub: Any, adapter: Path) -> None:
    run("push", "task", "me/task")
    hub.requests.clear()
    hub.faults.cut(f"*/resolve/*/{WEIGHTS}", times=None, after=100)
    result = run("pull", "me/task", "--out", "there", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["type"] == "LoRAHubError"
    assert not Path("there").exists()


# ---- list ------------------------------------------------------------------------------------------------------------


def test_list_of_a_base(hub: Any, adapter: Path, tiny: Any) -> None:
    for repo in ("me/one", "me/two", "lab/three"):
        assert run("push", "task", repo).exit_code == 0
    saved(tiny, Path("else"), base="lab/other")
    run("push", "else", "me/four")
    found = json.loads(run("list", BASE, "--json").stdout)
    assert found["base_model"] == BASE
    assert {item["repo_id"] for item in found["adapters"]} == {"me/one", "me/two", "lab/three"}
    assert {item["repo_id"] for item in json.loads(run("list", BASE, "--author", "lab", "--json").stdout)["adapters"]} == {"lab/three"}  # fmt: skip  # noqa: E501
    assert {item["repo_id"] for item in json.loads(run("list", BASE, "--search", "tw", "--json").stdout)["adapters"]} == {"me/two"}  # fmt: skip  # noqa: E501
    assert len(json.loads(run("list", BASE, "--limit", "1", "--json").stdout)["adapters"]) == 1
    assert "lab/three" in said(run("list", BASE))
    empty = run("list", "lab/unknown")
    assert empty.exit_code == 0
    assert "No adapter for lab/unknown." in said(empty)


def test_list_of_a_folder(adapter: Path, tiny: Any) -> None:
    saved(tiny, Path("runs/deep/b"), r=2)
    saved(tiny, Path("runs/a"))
    (Path("runs") / "torn").mkdir()
    (Path("runs") / "torn" / CONFIG).write_text("{")
    found = json.loads(run("list", "runs", "--json").stdout)["adapters"]
    assert [item["path"] for item in found] == ["a", "deep/b", "torn"]
    # q: r·(32 + 32), v: r·(32 + 16), in two layers, four bytes each
    assert [item["parameters"] for item in found] == [896, 448, None]
    assert [item["nbytes"] for item in found] == [3584, 1792, None]
    assert [item["rank"] for item in found] == [4, 2, None]
    assert found[0]["problem"] is None
    assert CONFIG in found[2]["problem"]
    table = said(run("list", "runs"))
    assert "deep/b" in table
    assert "896" in table
    Path("empty").mkdir()
    assert "No adapter below empty." in said(run("list", "empty"))


def test_list_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("list", "./nowhere")
    assert result.exit_code == 2
    assert "is no folder" in said(result)
    result = run("list", ".", "--author", "me")
    assert result.exit_code == 2
    assert "for the Hub" in said(result)


# ---- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_with_push_then_pull_elsewhere(hub: Any, tiny: Any, tmp_path: Path) -> None:
    """One process trains and publishes; the card says what the run was, and another folder gets the same adapter."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")
    save_base(tiny("llama"), tmp_path / "base")
    (tmp_path / "d.csv").write_text("t\n" + "w3 w4 w5\n" * 16)
    arguments = ["--base", "base", "--base-id", BASE, "--data", "d.csv", "--text", "{t}", "--targets", "q,v"]
    arguments += ["--steps", "3", "--eval-fraction", "0.25", "--out", "out", "--push", "me/task", "--json"]
    import os

    done = subprocess.run(
        [sys.executable, "-m", "hf_lora", "train", *arguments],
        cwd=tmp_path,
        env={**os.environ, **hub.env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"].startswith(hub.url)
    assert set(hub.files("me/task")) == {CONFIG, WEIGHTS, "README.md"}
    card = hub.files("me/task")["README.md"].decode()
    assert "learning" in card
    assert "0.0002" in card or "2e-04" in card or "2e-4" in card
    assert run("pull", "me/task", "--out", str(tmp_path / "there")).exit_code == 0
    assert same(tmp_path / "out", tmp_path / "there")
