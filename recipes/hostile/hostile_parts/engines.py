"""Where inputs come from: changes of good ones, hypothesis, and atheris where it is installed (in its own process)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import targets
from .core import Tally, Target, Watch, bound, pack, seed_of, unpack, varied

__all__ = ["GUIDED", "guided", "has_atheris", "hypothesis", "mutation"]

GUIDED = "guided"  # the child's command


def ready(target: Target) -> list[bytes]:
    """The good inputs, each played once: what is imported for the first has no time to keep."""
    seeds = target.seeds()
    for data in seeds:
        with contextlib.suppress(*target.refusals):
            target.check(data)
    return seeds


def mutation(target: Target, count: int, seed: int) -> Tally:
    """`count` changes of good inputs."""
    rng, seeds = random.Random(seed), ready(target)
    watch = Watch(target)
    for _ in range(count):
        watch.play(varied(rng, target, seeds))
    return watch.tally


def hypothesis(target: Target, count: int, seed: int) -> Tally:
    """About `count` inputs that hypothesis makes: a good one with a drawn value in some place, or drawn as a whole."""
    import hypothesis as h
    from hypothesis import strategies as st

    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
    flat = scalars | st.lists(scalars, max_size=4)
    values = flat | st.lists(flat, max_size=4) | st.dictionaries(st.text(max_size=9), flat, max_size=4)
    seeds = ready(target)
    parts, watch = len(target.kinds), Watch(target)

    def placed(data: bytes, kind: str, draw: Any) -> bytes:
        if kind == "tensors":
            return (
                data[:8] + placed(data[8:], "json", draw)[: max(len(data) - 8, 0)]
                if draw(st.booleans())
                else draw(st.binary(max_size=200))
            )
        if kind == "json":
            try:
                found = json.loads(data)
            except ValueError:
                return json.dumps(draw(values)).encode()
            where: Any = None
            key: Any = None
            inner = found
            while isinstance(inner, (dict, list)) and inner:
                keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
                where, key = inner, draw(st.sampled_from(list(keys)))
                inner = inner[key]
                if draw(st.booleans()):
                    break
            if where is None:
                return json.dumps(draw(values)).encode()
            where[key] = draw(values)
            return json.dumps(found).encode("utf-8", "surrogatepass")
        text = data.decode("utf-8", "replace")
        at = draw(st.integers(0, len(text)))
        new = draw(st.text(max_size=40) | values.map(str))
        return (text[:at] + new + text[draw(st.integers(at, len(text))) :]).encode("utf-8", "surrogatepass")

    @h.seed(seed)
    @h.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[h.Phase.generate],
        suppress_health_check=list(h.HealthCheck),
    )
    @h.given(st.data())
    def run(data: Any) -> None:
        texts = unpack(data.draw(st.sampled_from(seeds)), parts)
        which = data.draw(st.integers(0, parts - 1))
        texts[which] = placed(texts[which], target.kinds[which], data.draw)
        watch.play(texts[0] if parts == 1 else pack(*texts))

    run()
    return watch.tally


def has_atheris() -> bool:
    """Whether coverage can guide."""
    return importlib.util.find_spec("atheris") is not None


def guided(names: list[str], count: int, seed: int, script: Path) -> dict[str, Tally]:
    """`count` inputs for all of these targets together, by atheris in a process of its own: it never returns."""
    with tempfile.TemporaryDirectory() as folder:
        out, corpus = Path(folder) / "tallies.json", Path(folder) / "corpus"
        corpus.mkdir()
        command = [sys.executable, str(script), f"--{GUIDED}", str(out), str(count), str(seed), str(corpus), *names]
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=3 * 3600)
        if not out.is_file():
            raise RuntimeError(f"atheris ended with {done.returncode} before its first input:\n{done.stderr[-3000:]}")
        return {name: Tally.from_dict(found) for name, found in json.loads(out.read_text()).items()}


def run_guided(arguments: list[str]) -> None:
    """The child: instruments hf_lora, then fuzzes until it has done `count` inputs."""
    import atheris

    out, count, seed, corpus, *names = arguments
    with atheris.instrument_imports(include=["hf_lora"]):
        made = targets()
    found = [made[name]() for name in names]
    seeds = [ready(target) for target in found]
    watches = [Watch(target) for target in found]
    bound()
    for which, good in enumerate(seeds):  # an input's first byte is its target
        for number, data in enumerate(good):
            (Path(corpus) / f"{which}-{number}").write_bytes(bytes([which]) + data)
    played = 0

    def play(data: bytes) -> None:
        nonlocal played
        if data and data[0] < len(found) and played < int(count):
            watches[data[0]].play(data[1:])
            played += 1
            if played % 500 == 0 or played == int(count):
                text = json.dumps({name: watch.tally.to_dict() for name, watch in zip(names, watches, strict=True)})
                Path(out).write_text(text)
        if played >= int(count):
            os._exit(0)

    def change(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(seed_of(seed, number, len(data)))
        which = data[0] if data and data[0] < len(found) and rng.random() < 0.9 else rng.randrange(len(found))
        kept = data[1:] if data and data[0] == which and rng.random() < 0.8 else rng.choice(seeds[which])
        if rng.random() < 0.15:
            return bytes([which]) + bytes(atheris.Mutate(kept, max(len(kept), 16)))[: most - 1]
        return (bytes([which]) + varied(rng, found[which], seeds[which], kept))[:most]

    options = [
        f"-seed={int(seed) % 2**31}",
        "-max_len=200000",
        "-handle_alrm=0",
        "-rss_limit_mb=0",
        "-verbosity=0",
        "-len_control=0",
    ]
    atheris.Setup([sys.argv[0], *options, corpus], play, custom_mutator=change)
    atheris.Fuzz()
