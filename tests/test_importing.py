"""What waits for a module that another thread, or the caller itself, is importing already."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from hf_lora.integrations import importing


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module `lora_slow` whose import waits until it is told to end, or to fail."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lora_gate.py").write_text(
        "import threading\nbegun, go, fail = threading.Event(), threading.Event(), []"
    )
    (tmp_path / "lora_slow.py").write_text(
        "from lora_gate import *\nbegun.set()\nassert go.wait(60)\nassert not fail\nready = True\n"
    )
    yield importlib.import_module("lora_gate")
    importing._WATCHER.callbacks.pop("lora_slow", None)
    importing._WATCHER.packages.discard("lora_slow")
    for name in ("lora_gate", "lora_slow"):
        sys.modules.pop(name, None)


def _imported(errors: list[BaseException]) -> None:
    try:
        importlib.import_module("lora_slow")
    except AssertionError as error:
        errors.append(error)


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_that_another_thread_imports_already_is_waited_for(slow: Any, fails: bool) -> None:
    errors: list[BaseException] = []
    thread = threading.Thread(target=_imported, args=(errors,))
    thread.start()
    assert slow.begun.wait(60)
    seen: list[bool] = []
    importing.when_imported("lora_slow", lambda module: seen.append(module.ready))
    assert not seen
    slow.fail += [True] if fails else []
    slow.go.set()
    thread.join()
    if fails:
        assert errors
        assert not seen
        slow.fail.clear()
        importlib.import_module("lora_slow")
    assert seen == [True]
    importing.when_imported("lora_slow", lambda module: seen.append(module.ready))
    assert seen == [True, True]


@pytest.mark.parametrize("first", ["transformers.models.auto.auto_factory", "transformers.trainer", "transformers"])
def test_whatever_is_imported_first_each_method_is_wrapped_once(first: str) -> None:
    code = (
        f"import hf_lora, {first}\n"
        "from transformers import PreTrainedModel, Trainer\n"
        "for wrapped in (PreTrainedModel.save_pretrained, Trainer._load_best_model):\n"
        "    assert wrapped.__code__.co_filename.startswith(hf_lora.__path__[0])\n"
        "    assert not wrapped.__wrapped__.__code__.co_filename.startswith(hf_lora.__path__[0])\n"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
