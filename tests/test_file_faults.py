"""Full disks, folders that may not be written, several processes in one folder, what killed ones leave behind.

Kills are in recipes/hostile/kills.py; a small run of it here, the whole of it in docs/results/faults.md. Checkpoints
are in test_trainer_survival.py, two merges at once in test_export.py.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loras import with_adapters

import hf_lora
from hf_lora import LoRAAdapter, LoRAConfig, LoRAError, LoRAFileError, scratch
from hf_lora.export import merge_to_folder, to_gguf

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "docs" / "results" / "faults.json"
NOBODY = 65534


@pytest.fixture
def values(tiny: Any) -> list[LoRAAdapter]:
    """Three adapters of one base, which differ in every number and in alpha."""
    config = LoRAConfig(r=2, target_modules=["q", "v"], base_model="me/base")
    model = with_adapters(tiny("llama"), {str(i): config.replace(alpha=float(i + 1)) for i in range(3)})
    return [model.lora_adapter(str(i)) for i in range(3)]


def which(folder: Path, values: list[LoRAAdapter]) -> int:
    """Which of the adapters a folder holds; anything else fails."""
    found = LoRAAdapter.load(folder)
    (index,) = (i for i, value in enumerate(values) if value.config.alpha == found.config.alpha)
    assert all(found.factors[path].equal(factors) for path, factors in values[index].factors.items())
    return index


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- a full disk -----------------------------------------------------------------------------------------------------


class Full:
    """From the n-th write, fsync, rename or new folder below `folder` on, the disk is full."""

    def __init__(self, folder: Path, n: int) -> None:
        self.folder, self.left = os.path.realpath(folder), n

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    def inside(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.path.realpath(path).startswith(self.folder)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("replace", "rename", "mkdir", "fsync"):
                patch.setattr(os, name, self.before(getattr(os, name)))
            opened = self.opened(builtins.open)
            patch.setattr(builtins, "open", opened)
            patch.setattr(io, "open", opened)
            yield

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def full(what: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(what, int) or self.inside(what):
                self.step()
            return call(what, *args, **kwargs)

        return full

    def opened(self, open_: Callable[..., Any]) -> Callable[..., Any]:
        disk = self

        def opened(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = open_(path, mode, *args, **kwargs)
            if not (set(mode) & set("wax+") and disk.inside(path)):
                return file
            write = file.write

            class Written:
                def __getattr__(self, name: str) -> Any:
                    return getattr(file, name)

                def __enter__(self) -> Any:
                    return self

                def __exit__(self, *_: Any) -> None:
                    file.close()

                def write(self, data: Any) -> Any:
                    try:
                        disk.step()
                    except OSError:
                        write(data[: len(data) // 2])  # a part of it still fits
                        raise
                    return write(data)

            return Written()

        return opened


def until_it_fits(
    folder: Path,
    act: Callable[[], Any],
    kept: Callable[[], Any],
    before: Callable[[], None],
    done: Callable[[], bool] | None = None,
) -> int:
    """Fill the disk at each step of `act` in turn: the error is typed, and nothing changes. How many steps there are.

    Args:
        done: once, the new one may be there already; the error then says so.
    """
    n, all_but = 0, 0
    while True:
        before()
        state = kept()
        try:
            with Full(folder, n).on():
                act()
        except LoRAError as error:
            said = error
        else:
            assert (all_but > 0) == (done is not None)
            return n
        assert "No space left" in str(said)
        assert said.remedy
        if done is not None and done():
            assert "is saved to" in str(said)
            all_but += 1
        else:
            assert kept() == state, f"full at step {n}"
        n += 1


def test_a_disk_that_is_full_at_any_step_of_a_save(values: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def before() -> None:
        shutil.rmtree(out, ignore_errors=True)
        values[0].save(out)
        (out / "notes.txt").write_text("mine")

    def kept() -> Any:
        return which(out, values), sorted(path.name for path in out.iterdir())

    steps = until_it_fits(tmp_path, lambda: values[1].save(out), kept, before, lambda: which(out, values) == 1)
    assert steps > 8


def test_a_disk_that_is_full_at_any_step_of_a_merge(values: Any, tiny: Any, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "base")
    values[0].save(tmp_path / "adapter")
    out = tmp_path / "out"

    def act() -> None:
        merge_to_folder(tmp_path / "adapter", out, tmp_path / "base", max_shard_size="30KB", force=True)

    steps = until_it_fits(tmp_path, act, lambda: files(tmp_path), lambda: shutil.rmtree(out, ignore_errors=True))
    assert steps > 8


def test_a_disk_that_is_full_at_any_step_of_a_gguf(values: Any, tiny: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed: install hf_lora[test]")
    base, out = tiny("llama"), tmp_path / "out.gguf"
    to_gguf(values[0], out, base)
    old = files(tmp_path)

    def before() -> None:
        out.write_bytes(old["out.gguf"])

    assert until_it_fits(tmp_path, lambda: to_gguf(values[1], out, base), lambda: files(tmp_path), before) > 4
    assert files(tmp_path).keys() == old.keys()


def test_a_disk_that_is_full_at_any_step_of_a_push(hub: Any, values: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    values[0].push("me/task")

    def kept() -> Any:
        return hub.files("me/task"), sorted(path.name for path in tmp_path.iterdir())

    assert until_it_fits(tmp_path, lambda: values[1].push("me/task"), kept, lambda: None) > 8
    assert which(hub.download("me/task", tmp_path / "pulled"), values) == 1


# ---- a folder that may not be written --------------------------------------------------------------------------------


def as_nobody(work: Callable[[], Any]) -> str:
    """What `work` raises in a process that may not write to what is root's, or "" (root itself may do everything)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            work()
        except BaseException as error:  # noqa: BLE001  # reported to the test
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, said.encode()[:60_000])
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_folder_that_may_not_be_written_is_named(values: Any, tiny: Any) -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to nobody
    try:
        tiny("llama").save_pretrained(folder / "base")
        values[0].save(folder / "old")
        before = files(folder)
        for path in (folder / "old", folder):
            path.chmod(0o555)
        for act in (
            lambda: values[1].save(folder / "old"),
            lambda: values[1].save(folder / "new"),
            lambda: merge_to_folder(values[1], folder / "new", folder / "base", force=True),
        ):
            said = as_nobody(act)
            assert said.startswith("LoRAFileError: "), said
            assert str(folder) in said
        assert "Permission denied" in as_nobody(lambda: values[1].save(folder / "old"))
        assert files(folder) == before
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)


# ---- several processes in one folder ---------------------------------------------------------------------------------


def started(work: Callable[[], Any]) -> Callable[[], str]:
    """Begin `work` in a process of its own; what is given waits for it, and gives what it raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # reported to the test
            said = f"{type(error).__name__}: {error}"
        finally:
            os.write(write, said.encode()[:60_000])
            os._exit(0)
    os.close(write)

    def wait() -> str:
        with os.fdopen(read) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        return said

    return wait


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_savers_race_and_a_reader_sees_whole_adapters(values: Any, tmp_path: Path) -> None:
    values[0].save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")

    def save(mine: LoRAAdapter) -> None:
        for _ in range(25):
            mine.save(tmp_path)

    waits = [started(lambda mine=mine: save(mine)) for mine in values[1:]]  # type: ignore[misc]
    seen = {which(tmp_path, values) for _ in range(60)}
    assert [wait() for wait in waits] == ["", ""]
    assert seen & {1, 2}
    assert which(tmp_path, values) in (1, 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "notes.txt",
    }


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_pruner_races_a_reader(values: Any, tmp_path: Path) -> None:
    """A run that rotates its checkpoints: the reader has a whole adapter, or a typed error that names a file."""
    folder = tmp_path / "checkpoint-2"

    def rotate() -> None:
        for i in range(60):
            values[i % 3].save(folder)
            shutil.rmtree(folder)

    wait, outcomes = started(rotate), {"read": 0, "gone": 0, "unnamed": 0}
    for _ in range(300):
        try:
            which(folder, values)
            outcomes["read"] += 1
        except LoRAFileError as error:
            outcomes["gone" if "checkpoint-2" in str(error) else "unnamed"] += 1
    assert wait() == ""
    assert outcomes["gone"]
    assert not outcomes["unnamed"]


def test_a_folder_that_goes_while_it_is_looked_at(values: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values[0].save(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()

    def gone(self: Path) -> Any:
        raise FileNotFoundError(2, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "iterdir", gone)
    with pytest.raises(LoRAFileError, match=r"no adapter_model\.safetensors"):
        LoRAAdapter.load(tmp_path / "a")


def test_threads_save_to_one_folder(values: Any, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def save(mine: LoRAAdapter) -> None:
        try:
            for _ in range(20):
                mine.save(tmp_path)
        except BaseException as error:  # noqa: BLE001  # reported below
            errors.append(error)

    threads = [threading.Thread(target=save, args=(value,)) for value in values]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors
    which(tmp_path, values)
    assert len(list(tmp_path.iterdir())) == 2


# ---- what killed processes leave -------------------------------------------------------------------------------------


def held_by_another(make: str, then: str) -> subprocess.Popen[str]:
    """A process that makes a temporary file or folder and says where."""
    program = (
        f"from hf_lora import scratch; from pathlib import Path\nwith {make} as path: print(path, flush=True); {then}"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": tempfile.gettempdir()}
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)


def test_what_a_killed_process_left_goes_and_what_a_living_one_holds_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    target, wait = tmp_path / "a [b]*", "import time; time.sleep(600)"
    running = [
        held_by_another(make, wait)
        for make in (f"scratch.beside(Path({str(target)!r}))", f"scratch.beside(Path({str(target)!r}), folder=True)")
    ]
    running.append(held_by_another("scratch.folder('push')", wait))
    try:
        paths = [Path((process.stdout or io.StringIO()).readline().strip()) for process in running]
        (paths[2] / "inner").mkdir()
        strangers = [tmp_path / ".a [b]*.hf_lora-link", tmp_path / "hf_lora-other", tmp_path / ".a b.hf_lora-1"]
        (tmp_path / "elsewhere").mkdir()
        strangers[0].symlink_to(tmp_path / "elsewhere")
        strangers[1].mkdir()
        strangers[2].touch()

        def others() -> set[Path]:
            with scratch.beside(target) as file, scratch.folder("push") as folder:
                assert file.is_file()
                assert folder.is_dir()
                found = set(tmp_path.iterdir()) - {file, folder}
            assert not file.exists()
            assert not folder.exists()
            return found

        assert others() == {*paths, *strangers, tmp_path / "elsewhere"}
        for process in running:
            process.kill()
            process.wait()
        assert others() == {*strangers, tmp_path / "elsewhere"}
    finally:
        for process in running:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()


def test_a_temporary_folder_that_another_clears_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its making and its locking it looks abandoned: another is made then."""
    real, made = tempfile.mkdtemp, []

    def cleared_once(**kwargs: Any) -> str:
        made.append(real(dir=tmp_path, **kwargs))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", cleared_once)
    with scratch.folder("push") as folder:
        assert [str(folder)] == made[1:]
        with pytest.raises(FileNotFoundError), scratch.beside(tmp_path / "nowhere" / "file"):
            pass


# ---- kills -----------------------------------------------------------------------------------------------------------


def killed(*arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "recipes" / "hostile" / "kills.py"), "--write", f"{folder}/found"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TMPDIR": folder}
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=600)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    assert done.returncode == 0, [row["problems"] for row in found["operations"].values()]
    return found


def harmless(found: dict[str, Any]) -> bool:
    rows = found["operations"].values()
    return not any(row["lost"] or row["half-read"] or row["problems"] for row in rows) and all(
        row["old"] + row["new"] + row["refused"] == row["kills"] for row in rows
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_few_kills_of_saves_and_pushes() -> None:
    found = killed("--kills", "12", "--only", "save", "push")
    assert sum(found["operations"][name]["kills"] for name in ("save", "push")) == 12
    assert harmless(found)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_kills_of_every_operation() -> None:
    found = killed("--kills", "60", "--seed", "1")
    assert sum(row["kills"] for row in found["operations"].values()) == 60
    assert harmless(found)


def test_the_page_of_a_thousand_kills() -> None:
    found = json.loads(FAULTS.read_text(encoding="utf-8"))
    assert sum(row["kills"] for row in found["operations"].values()) >= 1000
    assert harmless(found)
    page = FAULTS.with_suffix(".md").read_text(encoding="utf-8")
    for name, row in found["operations"].items():
        assert f"| {name} | {row['steps']} | {row['steps hit']} | {row['kills']} |" in page
    assert found["versions"]["hf_lora"] <= hf_lora.__version__
