"""Regular expressions from files: right, and never for long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lora import patterns
from hf_lora.errors import LoRAConfigError

NAMES = [f"model.layers.{i}.self_attn.{n}_proj" for i in range(12) for n in "qkvo"] + ["lm_head", "a" * 40]
SAFE = [
    r".*\.(q|v)_proj",
    r"model\.layers\.\d+\.self_attn\.q_proj",
    "lm_head",
    r"(?:.*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.x)",
    r"^(?!lm_head).*$",
    "nothing",
]
# Each takes longer than the universe on "aaaa…" without a limit.
CATASTROPHES = [r"(a+)+b", r"(a|a)*b", r"(.*)*b", r"((a?){30}){30}b", r"(a*)*\1b", r"(?:a|aa)+$x"]


@pytest.mark.parametrize("pattern", SAFE)
def test_same_as_re_fullmatch(pattern):
    assert patterns.fullmatching(pattern, NAMES) == [name for name in NAMES if re.fullmatch(pattern, name)]


@pytest.mark.parametrize("pattern", CATASTROPHES)
def test_catastrophes_are_stopped_and_quoted(pattern, monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(LoRAConfigError, match="did not finish") as caught:
        patterns.fullmatching(pattern, ["a" * 60])
    assert caught.value.value == pattern
    assert time.monotonic() - start < 5


def test_a_key_of_a_pattern_map_is_stopped_too(monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.5)
    with pytest.raises(LoRAConfigError, match="rank_pattern"):
        patterns.suffix_regex_lookup(["(a+)+b"], ["a" * 60])


def test_the_common_patterns_start_no_process(monkeypatch):
    monkeypatch.setattr(patterns, "_match_in_child", lambda *_: pytest.fail("a child process was started"))
    patterns.fullmatching(r".*\.(q|v)_proj", NAMES)
    patterns.fullmatching(r"model\.layers\.\d+\.self_attn\.q_proj", NAMES)
    patterns.suffix_regex_lookup(["q_proj", r"layers\.[0-3]\.self_attn\.k_proj"], NAMES)


def test_bad_expressions_are_quoted():
    for pattern in ("*proj", "(q", "a{9999999999999}", "x" * 20_000):
        with pytest.raises(LoRAConfigError) as caught:
            patterns.compile_pattern(pattern)
        assert pattern[:5] in str(caught.value) or "20000" in str(caught.value)


def _peft(keys, path):  # peft.utils.other.get_pattern_key
    for key in keys:
        if re.match(rf"(.*\.)?({key})$", path):
            return key
    return None


PIECES = st.sampled_from(["a", "b", "ab", r"\.", ".", "^", "a.b", r"a\.b", "[ab]", "x|a", "b$", r"\w+", "-", r"\-"])


@given(
    st.lists(st.lists(PIECES, min_size=1, max_size=4).map("".join), min_size=1, max_size=5, unique=True),
    st.lists(st.text("ab.-", min_size=1, max_size=8), min_size=1, max_size=6),
)
def test_lookup_is_pefts(keys, paths):
    found = patterns.suffix_regex_lookup(keys, paths)
    assert found == {path: key for path in paths if (key := _peft(keys, path)) is not None}


def test_lookup_of_many_full_paths_is_fast():
    paths = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(48) for j in range(128)]
    start = time.monotonic()
    assert len(patterns.suffix_regex_lookup(paths, paths)) == len(paths)  # unescaped dots, as EVA writes them
    assert time.monotonic() - start < 3


def test_too_many_expressions():
    with pytest.raises(LoRAConfigError, match="at most"):
        patterns.suffix_regex_lookup([f"[a]{i}" for i in range(3000)], ["a1"])
