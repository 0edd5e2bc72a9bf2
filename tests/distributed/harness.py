"""Both ends of a distributed test: `launch` starts torchrun from pytest, `main` runs a script's checks in each process.

A script is a file of functions `check_…(scratch)`; every process runs all of them in order, and each writes what failed
into a report. So one start serves many tests.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TIMEOUT = 165  # seconds for one start: a hang fails well before pytest's own limit
COLLECTIVE_TIMEOUT = 45  # seconds for one collective
SCRIPTS = ("ddp.py", "fsdp2.py", "trainer_fsdp2.py")  # whose checks `everything.py` runs
STANDALONE = ("--standalone", "--nproc_per_node", "2")


def checks_of(script: str) -> list[str]:
    """The names of a script's checks, without importing it."""
    return re.findall(r"^def (check_\w+)\(", (HERE / script).read_text(encoding="utf-8"), re.M)


def environment() -> dict[str, str]:
    """What the processes see: this checkout, no network, no GPU, one thread."""
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "RANK", "WORLD_"))}
    return {**inherited, **own, "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def started(command: Sequence[str], folder: Path, name: str = "run") -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process whose output goes to a file; it and all that it started are gone afterwards."""
    import psutil

    output = folder / f"{name}.log"
    with open(output, "wb") as log:
        process = subprocess.Popen(
            command, env=environment(), cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process, output
    finally:
        family: list[Any] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)  # torchrun's workers lead groups of their own
        process.kill()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()


def torchrun(script: str, *arguments: str, options: Sequence[str] = STANDALONE) -> list[str]:
    """The command line of a start."""
    return [sys.executable, "-m", "torch.distributed.run", *options, str(HERE / script), *arguments]


def launch(script: str, folder: Path, *arguments: str) -> list[dict[str, str]]:
    """Run a script's checks in two processes. Returns each process's report: check → "ok", or what failed."""
    with started(torchrun(script, str(folder), *arguments), folder) as (process, output):
        try:
            code: int | str = process.wait(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            code = f"none within {TIMEOUT} s"
    reports = reports_in(folder)
    if len(reports) != 2:
        raise AssertionError(f"exit code {code}\n{output.read_text(errors='replace')[-6000:]}")
    return reports


def reports_in(folder: Path) -> list[dict[str, str]]:
    """What the processes of a start have reported so far."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("report-*.json"))]


def main(checks: dict[str, Callable[[Path], None]]) -> None:
    """Run every check in this process, and report. After a failure the others are not run: processes may disagree."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT))
    rank, report, failed = dist.get_rank(), {}, ""
    path = folder / f"report-{rank}.json"
    for name, check in checks.items():
        if failed:
            report[name] = f"not run, because {failed} failed"
            continue
        try:
            scratch = folder / name.rpartition("::")[2]
            scratch.mkdir(exist_ok=True)
            torch.manual_seed(0)
            check(scratch)
            report[name] = "ok"
        except Exception:  # noqa: BLE001  # the report is where it goes
            report[name] = f"rank {rank}: {traceback.format_exc()}"
        path.write_text(json.dumps(report), encoding="utf-8")
        try:
            outcomes: list[Any] = [None, None]
            dist.all_gather_object(outcomes, report[name])
            failed = "" if outcomes == ["ok", "ok"] else name
        except Exception:  # noqa: BLE001  # the other process is stuck or gone
            failed = name
    path.write_text(json.dumps(report), encoding="utf-8")
    with contextlib.suppress(Exception):
        dist.destroy_process_group()


def collect(namespace: dict[str, Any]) -> dict[str, Callable[[Path], None]]:
    """The checks that a script defines, in order."""
    own = namespace["__name__"]
    return {n: value for n, value in namespace.items() if n.startswith("check_") and value.__module__ == own}
