"""The project around the package: the wheel, its metadata, the cost of the import, README's commands, the top level."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_lora

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = {
    *("pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt"),
    *("hf_lora", "tests", "recipes", "spaces_demo", "docs"),
}


def python(code: str, *arguments: str, path: Path | None = None) -> str:
    """What a fresh interpreter prints; it sees the repository, or `path` alone."""
    start = f"import sys; sys.path.insert(0, {str(path or ROOT)!r})\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", start + code, *arguments], capture_output=True, text=True, cwd="/", check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# ---- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hf_lora").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert set(names) == ours
    assert "hf_lora/py.typed" in names


def test_the_wheels_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    metadata = texts["METADATA"]
    assert re.search(r"^Name: hf[_-]lora$", metadata, re.M)
    assert f"\nVersion: {hf_lora.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nRequires-Python: >=3.10\n" in metadata
    assert {"quickstart", "test", "docs", "dev"} <= set(re.findall(r"^Provides-Extra: (\w+)$", metadata, re.M))
    assert "Apache License" in texts["LICENSE"]
    assert "hf-lora = hf_lora.cli:main" in texts["entry_points.txt"]
    pinned = [line for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) if "==" in line.split(";")[0]]
    assert not pinned, "a library names ranges; the tested versions stand in constraints.txt"


def test_the_wheel_runs_alone(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = """
import torch, hf_lora
from transformers import LlamaConfig, LlamaForCausalLM
assert hf_lora.__file__.startswith(sys.argv[1]), hf_lora.__file__
config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=16)
model, ids = LlamaForCausalLM(config).eval(), torch.arange(8).view(1, 8)
before = model(ids).logits
model.add_lora(hf_lora.LoRAConfig(r=2, target_modules=["q", "v"]))
assert torch.equal(model(ids).logits, before)
model.save_lora(sys.argv[2])
model.remove_lora()
model.load_lora(sys.argv[2])
from hf_lora.cli import app
print("alone")
"""
    assert python(code, str(site), str(tmp_path / "out"), path=site).splitlines()[-1] == "alone"


# ---- the import ------------------------------------------------------------------------------------------------------

NEW = """
from transformers import PreTrainedModel
before = set(sys.modules)
import hf_lora
new = set(sys.modules) - before
late = {"transformers.trainer", "transformers.pipelines", "transformers.models.auto.auto_factory"} & set(sys.modules)
print(*sorted({name.split(".")[0] for name in new} | late))
"""


def test_the_import_is_cheap():
    """Beyond PreTrainedModel it imports its own files and nothing else; recipes/benchmarks/import_time.py times it."""
    assert python(NEW).split() == ["hf_lora"]


# ---- the repository --------------------------------------------------------------------------------------------------


def test_the_top_level_holds_what_the_design_lists():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    tracked = done.stdout.split("\n") if done.returncode == 0 else [path.name for path in ROOT.iterdir()]
    top = {name.split("/")[0] for name in tracked if name}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def commands() -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def test_readmes_two_commands():
    quickstart, tests = (block.strip() for block in commands())
    for command in (quickstart, tests):
        assert "\n" not in command
        assert "-c constraints.txt" in command
        assert command.startswith("python3 -m venv .venv && . .venv/bin/activate && ")
    assert quickstart.endswith("&& hf-lora quickstart")
    assert re.search(r"&& pytest( -n 2)?$", tests)


def test_ci_runs_readmes_second_command_word_for_word():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    show = subprocess.run(["bash", str(ROOT / ".ci" / "run"), "--show"], capture_output=True, text=True, check=True)
    assert show.stdout.splitlines()[0] == f"test command: {commands()[1].strip()}"
    assert commands()[1].strip() not in script, "the command stands in README alone"


def test_every_direct_dependency_has_a_tested_version():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = text[text.index("[project]") : text.index("[tool.")]
    named = {name.lower().replace("_", "-") for name in re.findall(r'"([\w-]+)(?:\[\w+\])?>=', project)}
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    assert len(named) > 10
    assert named - pins.keys() == set()


def test_this_run_has_the_tested_versions():
    """Of what the numbers in the tests depend on; a run against the oldest versions is another run."""
    from importlib.metadata import version

    from conftest import OLDEST

    if OLDEST:
        pytest.skip("a run against the oldest transformers has other versions")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    checked = ("torch", "transformers", "safetensors", "huggingface-hub", "numpy")
    assert {name: version(name).split("+")[0] for name in checked} == {name: pins[name] for name in checked}
