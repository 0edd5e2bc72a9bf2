"""The Space: its files, its push to the local hub, and that what was pushed runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from demos import NAMES, folder_of_adapters
from smallbase import save_base
from typer.testing import CliRunner

from hf_lora.cli import app
from hf_lora.demo.space import app as app_of
from hf_lora.demo.space import push_space, readme, requirements, space_files

ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "spaces_demo"


@pytest.fixture
def adapters(tiny, tmp_path) -> Path:
    return folder_of_adapters(tiny("llama"), tmp_path / "adapters", base="me/tiny")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["demo", *arguments])


def test_the_repository_s_space_is_what_a_push_writes():
    """`hf-lora demo --push` and the folder spaces_demo never say different things."""
    assert (SPACE / "app.py").read_text() == app_of()
    assert (SPACE / "requirements.txt").read_text() == requirements()
    assert (SPACE / "README.md").read_text() == readme(SPACE / "adapters")
    tracked = {path.name for path in SPACE.iterdir()}
    assert tracked == {"app.py", "requirements.txt", "README.md", "adapters"}


def test_metadata_and_files(adapters):
    files = space_files(adapters, title := 'A "title": with\' marks')
    front = yaml.safe_load(files["README.md"].decode().split("---")[1])
    assert (front["sdk"], front["app_file"], front["models"], front["title"]) == (
        "gradio",
        "app.py",
        ["me/tiny"],
        title,
    )
    assert len(front["short_description"]) <= 60
    assert f"title={json.dumps(title)})" in files["app.py"].decode()
    compile(files["app.py"], "app.py", "exec")
    assert front["sdk_version"] in (ROOT / "constraints.txt").read_text()
    names = requirements()
    assert all(f"{name}>=" in names for name in ("torch", "transformers", "gradio", "safetensors", "matplotlib"))
    assert "peft" not in names
    assert "hf_lora" not in names
    assert {path for path in files if path.startswith("adapters/places/")} == {
        f"adapters/places/{name}"
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md", "task.yaml")
    }
    assert "hf_lora/demo/page/style.css" in files
    assert not [path for path in files if "__pycache__" in path]


def test_push_again_replaces_its_own_and_keeps_yours(hub, adapters):
    first = run("--adapters", str(adapters), "--push", "me/space", "--json")
    assert first.exit_code == 0, first.output
    files = hub.files("me/space")
    assert hub.repo("me/space").kind == "space"
    assert files["app.py"].decode() == app_of()
    assert json.loads(first.stdout)["commit"] == hub.history("me/space")[0].oid
    hub.commit("me/space", {"README.md": "---\nsdk: gradio\n---\nMy words.", "notes.txt": "mine"})
    for path in sorted((adapters / "dora").iterdir()):
        path.unlink()
    (adapters / "dora").rmdir()
    second = run("--adapters", str(adapters), "--push", "me/space")
    assert second.exit_code == 0, second.output
    files = hub.files("me/space")
    assert files["README.md"].endswith(b"My words.")
    assert files["notes.txt"] == b"mine"
    assert not [path for path in files if path.startswith("adapters/dora/")]
    assert [commit.title for commit in hub.history("me/space")] == [
        "Push the demo of 3 adapters",
        "a commit",
        "Push the demo of 4 adapters",
    ]


def test_a_push_that_is_refused_pushes_nothing(hub, adapters):
    (adapters / "ben" / "README.md").write_text("token: hf_" + "a" * 34)
    found = run("--adapters", str(adapters), "--push", "me/space")
    assert found.exit_code == 2
    assert "holds a token" in found.stderr
    assert hub.requests == []
    (adapters / "ben" / "README.md").unlink()
    hub.login(None)
    found = run("--adapters", str(adapters), "--push", "me/space")
    assert found.exit_code == 2
    assert "hf auth login" in found.stderr
    assert "me/space" not in hub.store.repos


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--adapters", "nowhere", "--push", "me/space"), "is no folder"),
        (("--adapters", ".", "--push", "me/space"), "holds no adapters"),
        (("--adapters", "nowhere"), "is no folder"),
        (("--adapters", ".", "--batch-rows", "0"), "batch-rows"),
        (("--port", "70000"), "port"),
        (("--push", "me/space", "--timeout", "3", "--share"), "--share, --timeout"),
    ],
)
def test_mistakes(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run(*arguments)
    assert found.exit_code == 2
    assert words in found.stderr


def test_adapters_of_several_bases(tiny, adapters, monkeypatch):
    config = adapters / "ben" / "adapter_config.json"
    config.write_text(config.read_text().replace("me/tiny", "me/another"))
    found = run("--adapters", str(adapters))
    assert found.exit_code == 2
    assert "me/another: ben" in found.stderr


def test_a_base_that_is_a_folder_is_not_published(hub, adapters):
    for path in adapters.glob("*/adapter_config.json"):
        path.write_text(path.read_text().replace("me/tiny", "/home/me/tiny"))
    found = run("--adapters", str(adapters), "--push", "me/space")
    assert found.exit_code == 2
    assert "folder or no id on the Hub" in found.stderr
    assert hub.requests == []


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_was_pushed_runs(hub, adapters, tiny, tmp_path):
    """The Space's files alone, in a folder of their own: the base from the hub, the package from beside app.py."""
    from gradio_client import Client

    base = save_base(tiny("llama"), tmp_path / "base", chat=True)
    hub.commit("me/tiny", {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()})
    push_space("me/space", adapters)
    space = hub.download("me/space", tmp_path / "space")
    port = free_port()
    env = {**os.environ, **hub.env, "GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"}
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while True:
            log.seek(0)
            assert process.poll() is None, log.read()
            assert time.monotonic() < end, log.read()
            try:
                client = Client(f"http://127.0.0.1:{port}", verbose=False)
                break
            except Exception:  # noqa: BLE001  # not up yet
                time.sleep(0.5)
        assert {task["name"] for task in client.predict(api_name="/tasks")} == set(NAMES)
        found = client.predict("places", {"name": "w7"}, True, api_name="/ask")
        assert found["state"] == "done"
        assert all(answer["text"] for answer in found["answers"])
        client.close()
    finally:
        process.terminate()
        process.wait(20)
        log.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_shipped_adapters_on_the_real_base(monkeypatch, peft):
    """Through the page, one at a time and all at once: each answer is PEFT's to the same prompt alone."""
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "benchmarks"))
    import demo as bench

    found = bench.measure(SPACE / "adapters", 8)
    assert len(found["tasks"]) == 4
    for row in found["ways"].values():
        assert row["wrong"] == []
    assert found["ways"]["8 at once"]["batches"] < 8
    assert "8 at once" in bench.as_markdown(found, "today")
