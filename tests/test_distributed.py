"""Two processes with gloo on the CPU: DDP, raw FSDP2, Trainer with accelerate's FSDP2; the launch lines of the page.

What runs in the processes stands in tests/distributed. One start serves many checks, and each check is a test.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")
pytest.importorskip("psutil", reason="psutil is not installed: install hf_lora[test]")

sys.path.insert(0, str(Path(__file__).with_name("distributed")))

from harness import SCRIPTS, TIMEOUT, checks_of, launch, reports_in, started

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(TIMEOUT + 12),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo"),
]

PAGE = Path(__file__).resolve().parents[1] / "docs" / "pages" / "distributed.md"


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`start(script)`: the folder and both processes' reports; one start for all tests, also of several workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    done: dict[str, list[dict[str, str]]] = {}

    def once(script: str) -> tuple[Path, list[dict[str, str]]]:
        folder = shared / f"distributed-{script.removesuffix('.py')}"
        folder.mkdir(exist_ok=True)
        if script not in done:
            with open(folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may have started it; it lets go when it is through
                if (folder / "failure").exists():
                    pytest.fail((folder / "failure").read_text())
                try:
                    done[script] = reports_in(folder) or launch(script, folder)
                except AssertionError as error:
                    (folder / "failure").write_text(f"{script} did not run: {error}")
                    raise
        return folder, done[script]

    return once


@pytest.mark.parametrize("check", [f"{script}::{check}" for script in SCRIPTS for check in checks_of(script)])
def test_two_processes(start: Any, check: str) -> None:
    _, reports = start("everything.py")
    assert [report.get(check) for report in reports] == ["ok", "ok"], "\n".join(str(r.get(check)) for r in reports)


if importlib.util.find_spec("deepspeed"):  # an extra that nobody has to install for the tests: no test, and no skip

    @pytest.mark.parametrize("check", checks_of("zero3.py"))
    def test_zero3(start: Any, check: str) -> None:
        _, reports = start("zero3.py")
        assert [report.get(check) for report in reports] == ["ok", "ok"], "\n".join(str(r.get(check)) for r in reports)


def test_trainer_under_ddp_is_trainer_in_one_process(start: Any, tmp_path: Path) -> None:
    import ddp
    import trainer_fsdp2

    from hf_lora import store

    folder, _ = start("everything.py")
    here = folder / "check_trainer_writes_once_and_resumes_bit_for_bit"
    found = json.loads((here / "losses.json").read_text(encoding="utf-8"))
    run = trainer_fsdp2.trainer(ddp.several(), tmp_path, fsdp=False, per_device_train_batch_size=4)
    run.train()
    one = trainer_fsdp2.losses(run)
    assert len(one) == trainer_fsdp2.STEPS
    assert found == pytest.approx(one, rel=1e-5)
    for name in ("lora-org%2Ftask", "lora-second"):
        mine = store.to_state_dict(store.read_adapter(tmp_path / "checkpoint-4" / name))
        theirs = store.to_state_dict(store.read_adapter(here / "whole" / "checkpoint-4" / name))
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=0, atol=1e-4 * float(tensor.abs().max()))


# ---- the page --------------------------------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


PREAMBLE = """
import os, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
ids = torch.randint(3, 64, (16, 6), generator=torch.Generator().manual_seed(0))
train_dataset = [{"input_ids": row, "labels": row} for row in ids]
batch = {"input_ids": ids[:2], "attention_mask": torch.ones_like(ids[:2])}
"""

LOOPS_WROTE = """
from pathlib import Path
from hf_lora import store
for name in ("ddp", "fsdp2"):
    torch.distributed.barrier()
    assert store.read_adapter(Path("out", name)).factors
print("the loops ran")
"""


@pytest.fixture
def workplace(tiny: Any, tmp_path: Path) -> Path:
    """A folder with `train.py` as the page has it, and a tiny base under the name that the page uses."""
    tiny("llama").save_pretrained(tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    (tmp_path / "train.py").write_text(PREAMBLE + blocks("python")[0], encoding="utf-8")
    return tmp_path


def words(line: str, endpoint: str) -> list[str]:
    """A launch line of the page as a command here: this interpreter's torchrun, and a port of this machine."""
    program, *rest = line.replace("node0:29500", endpoint).split()
    assert program == "torchrun"
    return [sys.executable, "-m", "torch.distributed.run", *rest]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def finished(processes: list[subprocess.Popen[bytes]]) -> list[int | None]:
    until = time.monotonic() + TIMEOUT
    while time.monotonic() < until and any(p.poll() is None for p in processes):
        if any(p.poll() for p in processes):
            break
        time.sleep(0.1)
    return [p.poll() for p in processes]


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_lines_of_the_page(workplace: Path, nodes: int) -> None:
    """Two "machines" are two torchrun agents on this one, which find each other by the c10d rendezvous. The page's own
    loops run after Trainer, in the one start on one machine.
    """
    lines = [line for line in blocks("bash") if ("--nnodes 2" in line) == (nodes == 2)]
    assert len(lines) == 1
    endpoint = f"localhost:{free_port()}"
    line = words(lines[0].strip(), endpoint)
    if nodes == 1:
        with open(workplace / "train.py", "a", encoding="utf-8") as file:
            file.write("\n".join([*blocks("py"), LOOPS_WROTE]))
        line[3:3] = ["--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]  # else port 29500, which may be taken
    with started(line, workplace, "a") as (first, _):
        if nodes == 1:
            codes = finished([first])
        else:
            with started(line, workplace, "b") as (second, _):
                codes = finished([first, second])
    said = "\n".join(path.read_text(errors="replace")[-4000:] for path in sorted(workplace.glob("*.log")))
    assert codes == [0] * nodes, said
    assert len(blocks("py")) == 2
    assert said.count("the loops ran") == (2 if nodes == 1 else 0)
    for folder in ("checkpoint-1", "checkpoint-2", "final"):
        names = {path.name for path in (workplace / "out" / folder).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        assert "model.safetensors" not in names
    state = json.loads((workplace / "out" / "checkpoint-2" / "trainer_state.json").read_text(encoding="utf-8"))
    # 16 rows in steps of 2 rows for each of 2 processes: 4 steps an epoch. One process would need 8.
    assert state["epoch"] == pytest.approx(2 / 4)


def test_accelerate_understands_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    file = tmp_path / "fsdp2.yaml"
    file.write_text(blocks("yaml")[0], encoding="utf-8")
    config = load_config_from_file(str(file))
    assert config.distributed_type == "FSDP"
    assert config.num_processes == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # what the launcher looks for on a machine with two GPUs
    args = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    args, _, _ = _validate_launch_command(args)
    assert args.use_fsdp
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)


def test_accelerate_understands_zero3() -> None:
    from accelerate.utils.deepspeed import HfDeepSpeedConfig

    config = HfDeepSpeedConfig(json.loads(blocks("json")[0]))
    assert config.is_zero3()
    assert not config.is_offload()
    assert config.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save") is True
