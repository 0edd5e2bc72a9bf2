"""Real processes: killed while they write a checkpoint, out of disk, in a folder that they may not write to.

A save makes about 75 calls; the tests kill at a sample of them, and with HF_LORA_KILLS=0 at each. They start this file
as a program. It imports everything once, and forks a process for each run: so a killed run and the one that resumes it
share no memory. The oracle is a run that nobody disturbed.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed: install hf_lora[test]")

SAVED_AT = 4  # the step whose checkpoint is disturbed; checkpoint-2 is there before
KEPT = "checkpoint-2 is complete and unchanged"
NOBODY = 65534
MANY = int(os.environ.get("HF_LORA_KILLS", "10"))  # of the calls of one save, in the slow tests; 0 is all of them


# ---- the program -----------------------------------------------------------------------------------------------------


def build(seed: int) -> Any:
    """Two adapters that train, beside a frozen one."""
    import torch
    import transformers
    from conftest import TINY
    from loras import with_adapters

    from hf_lora import LoRAConfig

    config, model, fields = TINY["llama"]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()
    with_adapters(built, {"other": LoRAConfig(r=2, target_modules=["down"])})
    torch.manual_seed(seed)
    for name in ("org/a", "b"):
        built.add_lora(LoRAConfig(r=4, target_modules=["q", "v"], dropout=0.1), name)
    built.train_lora(["org/a", "b"])
    built.set_lora(["org/a", "b"])
    return built


def train(run: Path, *, seed: int = 3, resume: Any = None, until: int = 6, disturb: Any = None) -> str:
    """Train in `run`; the digest of the weights at the end. `disturb(save)` runs in place of a save at SAVED_AT."""
    import hashlib

    import transformers
    from loras import bits
    from training import trainer

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= until

    model = build(seed)
    made = trainer(model, run, callbacks=[Stop()])
    save = made._save_checkpoint
    if disturb is not None:
        made._save_checkpoint = lambda *args: (
            disturb(lambda: save(*args)) if made.state.global_step == SAVED_AT else save(*args)
        )
    made.train(resume_from_checkpoint=resume)
    return hashlib.sha256(repr(sorted(bits(model).items())).encode()).hexdigest()


def forked(work: Callable[[], Any]) -> tuple[int, Any]:
    """Run `work` in a process of its own: (the signal that ended it or 0, what it returned)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = {"returned": work()}
        except BaseException:  # noqa: BLE001  # whatever it was, this process must not go on as the parent
            answer = {"raised": traceback.format_exc()}
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    answer = json.loads(text) if text else {}
    assert "raised" not in answer, answer.get("raised")
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), answer.get("returned")


class Counted:
    """Counts what a save does to the disk, and kills this process at one of them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count, self.over = at, 0, False

    def point(self) -> None:
        self.count += not self.over
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.point()
            return function(*args, **kwargs)

        return counted

    def opened(self, open_: Callable[..., Any]) -> Callable[..., Any]:
        def counted(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = open_(path, mode, *args, **kwargs)
            return Halved(file, self) if "w" in mode else file

        return counted

    def saved(self, save: Callable[..., Any]) -> Callable[..., Any]:
        def counted(what: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            self.point()
            save(what, path, *args, **kwargs)
            whole = Path(path).read_bytes()
            os.truncate(path, len(whole) // 2)
            self.point()  # half of it is written
            Path(path).write_bytes(whole)
            self.point()

        return counted

    def __call__(self, save: Callable[[], Any]) -> None:
        import torch

        torch.save = self.saved(torch.save)
        builtins.open = self.opened(builtins.open)  # type: ignore[assignment]
        for name in ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self.around(getattr(os, name)))
        save()
        self.point()
        self.at, self.over = None, True


class Halved:
    """A file whose writes come in two halves, each on the disk at once."""

    def __init__(self, file: Any, counted: Counted) -> None:
        self.file, self.counted = file, counted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Halved:
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        for part in (data[: len(data) // 2], data[len(data) // 2 :]):
            self.file.write(part)
            self.file.flush()
            self.counted.point()
        return len(data)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Scene:
    """A run that stopped after step 2, and what it would have come to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.expected = forked(lambda: train(folder / "whole"))[1]
        forked(lambda: train(folder / "start", until=2))
        self.other = forked(lambda: train(folder / "old", seed=9))[1]

    def reset(self, *, over: bool = False) -> None:
        """The run as it stood after step 2; `over`: with a checkpoint-4 of an older run in its way."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.folder / "start", self.run)
        if over:
            shutil.copytree(self.folder / "old" / "checkpoint-4", self.run / "checkpoint-4")

    def resume(self, disturb: Any = None) -> tuple[int, Any]:
        source = str(self.run / "checkpoint-2") if disturb else True  # over an old checkpoint-4, True would take that
        return forked(lambda: train(self.run, seed=77, resume=source, disturb=disturb))

    def check(self, *, over: bool = False) -> None:
        """What was saved before is as it was, and resume_from_checkpoint=True ends where it should."""
        assert files(self.run / "checkpoint-2") == files(self.folder / "start" / "checkpoint-2")
        died, found = self.resume()
        assert died == 0
        assert found in ({self.expected, self.other} if over else {self.expected}), "neither run's weights"
        assert not list(self.run.glob("_replaced*"))


def kills(scene: Scene, over: bool, sample: int) -> int:
    """Kill a save at its calls, all of them or a sample; how many there were."""

    def counting() -> int:
        counted = Counted(None)
        train(scene.run, seed=77, resume=str(scene.run / "checkpoint-2"), disturb=counted)
        return counted.count

    scene.reset(over=over)
    total: int = forked(counting)[1]
    points = range(1, total + 1)
    chosen = sorted(random.Random(0).sample(points, sample)) if 0 < sample < total else points
    for at in chosen:
        scene.reset(over=over)
        died, _ = scene.resume(Counted(at))
        assert died == signal.SIGKILL, (at, died)
        try:
            scene.check(over=over)
        except AssertionError as error:
            left = {str(p.relative_to(scene.run)) for p in scene.run.rglob("*")}
            raise AssertionError(f"killed at call {at} of {total}: {error}\n{sorted(left)}") from error
    return total


def refused(save: Callable[[], Any], *says: str) -> None:
    from hf_lora import LoRAFileError

    with pytest.raises(LoRAFileError) as caught:
        save()
    for text in ("cannot be written", "is complete and unchanged", *says):
        assert text in str(caught.value), (text, str(caught.value))
    raise Expected


class Expected(Exception):
    """The save failed as it should."""


def trouble(scene: Scene, hinder: Callable[[], None], *says: str) -> None:
    """A save that fails: the error says so, and nothing saved before is lost."""

    def work() -> str:
        def disturb(save: Callable[[], Any]) -> None:
            hinder()
            refused(save, *says)

        try:
            train(scene.run, seed=77, resume=True, disturb=disturb)
        except Expected:
            return "refused"
        return "went on"

    assert forked(work) == (0, "refused")


def largest(limit: int) -> Callable[[], None]:
    def hinder() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return hinder


def cut_at(scene: Scene, name: str) -> int:
    """A size that lets every file be written before `name`, but not `name`."""
    return max(p.stat().st_size for p in (scene.folder / "whole" / "checkpoint-4").rglob(name)) - 64


def full_disk_adapter(scene: Scene) -> None:
    scene.reset()
    trouble(scene, largest(cut_at(scene, "adapter_model.safetensors")), "File too large", KEPT)
    scene.check()


def full_disk_optimizer(scene: Scene) -> None:
    scene.reset()
    trouble(scene, largest(cut_at(scene, "optimizer.pt")), "checkpoint-4 cannot be written", KEPT)
    scene.check()


def full_disk_over(scene: Scene) -> None:
    scene.reset(over=True)
    old = files(scene.run / "checkpoint-4")
    shutil.move(scene.run / "checkpoint-4", scene.folder / "later")  # so that the run resumes from checkpoint-2

    def hinder() -> None:
        shutil.move(scene.folder / "later", scene.run / "checkpoint-4")
        largest(cut_at(scene, "optimizer.pt"))()

    trouble(scene, hinder, "checkpoint-4 is complete and unchanged")  # the older run's
    assert files(scene.run / "checkpoint-4") == old
    assert not list(scene.run.glob("_replaced*"))


def full_tmpfs(scene: Scene) -> None:
    """On a file system that is really full, where this system lets anybody mount one."""
    mounted = subprocess.run(
        ["unshare", "-rm", sys.executable, __file__, "tmpfs", str(scene.folder)], capture_output=True, text=True
    )
    assert mounted.returncode == 0, mounted.stdout + mounted.stderr


def on_tmpfs(folder: Path) -> None:
    scene = object.__new__(Scene)
    scene.folder, scene.run = folder, folder / "tmpfs"
    scene.run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(scene.run)], check=True)
    shutil.copytree(folder / "start", scene.run, dirs_exist_ok=True)
    before = files(scene.run / "checkpoint-2")

    def hinder() -> None:
        with open(scene.run / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"0" * 4096)
        os.truncate(scene.run / "filler", os.path.getsize(scene.run / "filler") // 4096 * 4096 - 3 * 4096)

    trouble(scene, hinder, "No space left on device", KEPT)
    assert files(scene.run / "checkpoint-2") == before
    os.unlink(scene.run / "filler")
    died, found = scene.resume()
    assert (died, found) == (0, train(folder / "whole again"))


def read_only(scene: Scene) -> None:
    """As a user who may read the folder and not write to it (root may do both, so it becomes nobody)."""
    scene.reset()

    def hinder() -> None:
        os.chmod(scene.run, 0o555)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    trouble(scene, hinder, "Permission denied", KEPT)
    os.chmod(scene.run, 0o755)
    scene.check()


def file_in_the_way(scene: Scene) -> None:
    scene.reset()

    def hinder() -> None:
        (scene.run / "checkpoint-4").write_text("mine")

    trouble(scene, hinder, "checkpoint-4", KEPT)
    assert (scene.run / "checkpoint-4").read_text() == "mine"
    (scene.run / "checkpoint-4").unlink()
    scene.check()


SCENES: dict[str, Callable[[Scene], Any]] = {
    "killed": lambda scene: kills(scene, False, 6),
    "killed, writing over an older run": lambda scene: kills(scene, True, 6),
    "full disk, adapter": full_disk_adapter,
    "full disk, optimizer": full_disk_optimizer,
    "full disk, writing over an older run": full_disk_over,
    "read-only folder": read_only,
    "a file in the way": file_in_the_way,
}
LONG: dict[str, Callable[[Scene], Any]] = {
    "killed": lambda scene: kills(scene, False, MANY),
    "killed, writing over an older run": lambda scene: kills(scene, True, MANY),
    "full file system": full_tmpfs,
}


def main(which: str, folder: Path) -> None:
    import torch
    from training import trainer

    torch.set_num_threads(1)
    trainer(build(0), folder / "imports").get_train_dataloader()  # once, rather than in every forked process
    if which == "tmpfs":
        on_tmpfs(folder)
        return
    scene, found = Scene(folder), {}
    for name, play in (SCENES if which == "short" else LONG).items():
        try:
            found[name] = [True, play(scene)]
        except Exception:  # noqa: BLE001  # reported by the test
            found[name] = [False, traceback.format_exc()]
    (folder / "found.json").write_text(json.dumps(found))


# ---- the tests -------------------------------------------------------------------------------------------------------


def played(which: str) -> dict[str, Any]:
    """The scenes' outcomes, by name: [whether it went well, what it returned or its traceback]."""
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to nobody
    folder.chmod(0o755)
    try:
        root = str(Path(__file__).resolve().parents[1])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
        done = subprocess.run(
            [sys.executable, __file__, which, str(folder)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        found: dict[str, Any] = json.loads((folder / "found.json").read_text())
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def failed(found: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {what}" for name, (well, what) in found.items() if not well)


# One test for all scenes of a kind: they share the runs that they start from, and that takes longest.
def test_nothing_saved_before_is_lost() -> None:
    found = played("short")
    assert found.keys() == SCENES.keys()
    assert not failed(found), failed(found)


@pytest.mark.slow
def test_killed_at_many_calls_of_a_save_and_a_full_file_system() -> None:
    found = played("long")
    assert found.keys() == LONG.keys()
    if not may_mount():  # there the limit on a file's size, above, stands for it
        del found["full file system"]
    assert not failed(found), failed(found)
    assert min(count for _, count in found.values() if count) > 40  # so many places


def may_mount() -> bool:
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
