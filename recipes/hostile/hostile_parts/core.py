"""What a target of the fuzzing is, what one input did to it, and what it cost."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hf_lora.errors import LoRAError

from . import mutate

MOST_SECONDS = 15.0  # of one input; a regular expression from a file may take 5 s by itself
MOST_BYTES = 512 * 2**20  # that one input may add to the memory
_WINDOW = 200  # inputs between two looks at the memory's high-water mark

OUTCOMES = ("loaded", "refused", "crash", "silent", "slow", "large")


class SilentChange(AssertionError):
    """What was taken is not what the bytes say, or something changed though it was refused."""


class TooSlow(BaseException):
    """An input took longer than `MOST_SECONDS`. No Exception, so that nobody catches it."""


def same(one: Any, other: Any, what: str) -> None:
    """Raise `SilentChange` unless the two are equal."""
    if one != other:
        first, second = repr(one), repr(other)
        at = max(next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0) - 60, 0)
        raise SilentChange(f"{what}: {first[at : at + 150]} is not {second[at : at + 150]}")


class Target:
    """One thing that takes what comes from outside.

    An input is bytes: one text, or several (`pack`). `check` returns if it was taken (and everything that can be known
    of the result holds), raises a `LoRAError` if it was refused, and anything else is a finding.
    """

    name: ClassVar[str]
    title: ClassVar[str]  # what comes from outside, for the table
    entry: ClassVar[str]  # the function that takes it
    kinds: ClassVar[tuple[str, ...]]  # of each part: "json", "yaml", "text", "lines", "tensors", "bytes"
    inputs: ClassVar[int] = 10_000  # of a full run
    guided: ClassVar[bool] = True  # whether coverage guides some of its inputs, where atheris is installed
    few: ClassVar[int] = 60  # inputs of a test
    refusals: ClassVar[tuple[type[BaseException], ...]] = (LoRAError,)

    def seeds(self) -> list[bytes]:
        """Good inputs: each is taken."""
        raise NotImplementedError

    def check(self, data: bytes) -> None:
        """Give one input to what is tested."""
        raise NotImplementedError

    def close(self) -> None:
        """Take away what was made."""


def pack(*parts: bytes) -> bytes:
    """Several texts as one input."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def unpack(data: bytes, count: int) -> list[bytes]:
    """The `count` texts of an input, whatever its bytes are; the last one takes the rest."""
    if count == 1:
        return [data]
    parts, at = [], 0
    for _ in range(count):
        length = int.from_bytes(data[at : at + 4], "little")
        parts.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return parts


def varied(rng: random.Random, target: Target, seeds: Sequence[bytes], data: bytes | None = None) -> bytes:
    """A good input, or `data`, changed in one place or a few."""
    data = rng.choice(seeds) if data is None else data
    count = len(target.kinds)
    parts = unpack(data, count)
    which = range(count) if rng.random() < 0.15 else [rng.randrange(count)]
    for i in which:
        others = [unpack(rng.choice(seeds), count)[i]]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            parts[i] = mutate.changed(rng, target.kinds[i], parts[i], others)
    return parts[0] if count == 1 else pack(*parts)


@dataclass
class Tally:
    """What a number of inputs did."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0  # of all
    slowest: float = 0.0
    largest: int = 0  # bytes that an input added to the memory, at most
    longest: int = 0  # bytes of an input
    findings: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.outcomes += other.outcomes
        self.seconds += other.seconds
        self.slowest, self.largest = max(self.slowest, other.slowest), max(self.largest, other.largest)
        self.longest = max(self.longest, other.longest)
        self.findings += other.findings

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "outcomes": dict(self.outcomes)}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Tally:
        return cls(**{**found, "outcomes": Counter(found["outcomes"])})


class Watch:
    """Plays inputs and keeps the tally: outcome, time, memory."""

    def __init__(self, target: Target) -> None:
        self.target, self.tally = target, Tally()
        self._base = self._before = _high_water(reset=True)
        self._seen: set[str] = set()

    def play(self, data: bytes) -> str:
        """One input's outcome."""
        tally = self.tally
        count = sum(tally.outcomes.values())
        if count % _WINDOW == 0:
            self._base = self._before = _high_water(reset=True)
        signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
        start = time.perf_counter()
        why: BaseException | None = None
        try:
            self.target.check(data)
            outcome = "loaded"
        except self.target.refusals as error:
            outcome = "refused"
            if isinstance(error, LoRAError):
                try:
                    if not str(error):
                        outcome, why = "crash", AssertionError("an error without a message")
                except Exception as broken:  # noqa: BLE001  # a message that cannot be made is a crash, too
                    outcome, why = "crash", broken
        except SilentChange as error:
            outcome, why = "silent", error
        except TooSlow as error:
            outcome, why = "slow", error
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:  # noqa: BLE001  # whatever it is, it is the finding
            outcome, why = "crash", error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        took = time.perf_counter() - start
        peak = _high_water()
        if peak - self._before > MOST_BYTES:
            outcome, why = "large", MemoryError(f"{(peak - self._before) >> 20} MiB more")
        self._before = peak
        tally.outcomes[outcome] += 1
        tally.seconds += took
        tally.slowest, tally.longest = max(tally.slowest, took), max(tally.longest, len(data))
        tally.largest = max(tally.largest, peak - self._base)
        if why is not None:
            self._note(outcome, data, why)
        return outcome

    def _note(self, outcome: str, data: bytes, why: BaseException) -> None:
        """Keep one input of each kind of finding."""
        place = ""
        trace = why.__traceback__
        while trace is not None:
            if "hf_lora/" in trace.tb_frame.f_code.co_filename:
                place = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
            trace = trace.tb_next
        said = f"{type(why).__name__}: {why}"[:400]
        kind = f"{outcome} {type(why).__name__} {place or said[:60]}"
        if kind not in self._seen and len(self._seen) < 200:
            self._seen.add(kind)
            self.tally.findings.append(
                {
                    "target": self.target.name,
                    "outcome": outcome,
                    "said": said,
                    "at": place,
                    "input": data.hex()[:20_000],
                }
            )


def _late(*_: Any) -> None:
    raise TooSlow(f"longer than {MOST_SECONDS:g} s")


def bound() -> None:
    """From now on an input that takes too long is interrupted."""
    signal.signal(signal.SIGALRM, _late)


def _high_water(reset: bool = False) -> int:
    """Bytes of memory that the process had at most, since the last reset."""
    if reset:
        try:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        except OSError:
            pass  # not Linux: the mark then only grows, and says less
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seed_of(*what: object) -> int:
    """A fixed number for these words."""
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "big")


class Folder:
    """A folder in memory, where there is such a thing, for the files of one input."""

    def __init__(self) -> None:
        shared = Path("/dev/shm")
        where = shared if shared.is_dir() and os.access(shared, os.W_OK) else None
        self._made = tempfile.TemporaryDirectory(prefix="hf-lora-fuzz-", dir=where)
        self.path = Path(self._made.name)

    def put(self, name: str, data: bytes) -> None:
        with open(self.path / name, "wb") as file:
            file.write(data)

    def close(self) -> None:
        self._made.cleanup()
