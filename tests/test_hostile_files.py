"""Files from strangers: each kind of harm is one typed error that names the file, and nothing is executed."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hf_lora import patterns, safefile, store
from hf_lora.config import LoRAConfig
from hf_lora.errors import LoRAConfigError, LoRAError, LoRAFileError, LoRAUnsupportedError
from hf_lora.store import from_state_dict, read_adapter, read_config, to_state_dict, write_adapter
from hf_lora.values import AdapterValue, Factors

A, B = "base_model.model.h.0.q.lora_A.weight", "base_model.model.h.0.q.lora_B.weight"
GOOD = {A: torch.arange(8.0).reshape(2, 4), B: torch.ones(3, 2)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / store.CONFIG_NAME).write_text(json.dumps(CONFIG))
    save_file(GOOD, tmp_path / store.WEIGHTS_NAME)
    return tmp_path


def refused(folder, match, error=LoRAFileError, **keywords):
    with pytest.raises(error, match=match) as caught:
        read_adapter(folder, **keywords)
    return caught.value


def container(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start=0, stop=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def test_the_good_file_loads(folder):
    assert read_adapter(folder).factors["h.0.q"].scaling == 2


# -- the container -----------------------------------------------------------------------------------------------------


def test_truncated_anywhere(folder):
    path = folder / store.WEIGHTS_NAME
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert str(path) in str(refused(folder, "valid safetensors|JSON|UTF-8"))
    path.write_bytes(whole + b"\0")
    refused(folder, "truncated or damaged")


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        container(b"{"),
        container(b"[]"),
        container(b"\xff\xfe{}"),
        container(b'{"a":' * 50_000),
        container(b'{"a": NaN}'),
        container(
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        ),
        container({"a": 3}),
        container({"a": {"dtype": "F32", "shape": [2]}}, b"\0" * 8),
        container({"a": entry(dtype="F8_E4M3", stop=2)}, b"\0" * 2),
        container({"a": entry(dtype="X")}, b"\0" * 8),
        container({"a": entry(dtype=["F32"])}, b"\0" * 8),
        container({"a": entry(shape=(2**40, 2**40))}, b"\0" * 8),
        container({"a": entry(shape=(-2,))}, b"\0" * 8),
        container({"a": entry(shape=(2.0,))}, b"\0" * 8),
        container({"a": entry(shape=(True, 2))}, b"\0" * 8),
        container({"a": entry(8, 0)}, b"\0" * 8),
        container({"a": entry(0, 2**62, (2**60,))}, b"\0" * 8),
        container({"a": entry(), "b": entry(4, 12)}, b"\0" * 12),
        container({"a": entry(), "b": entry(12, 20)}, b"\0" * 20),
        container({"a": entry(8, 16)}, b"\0" * 16),
        container({"__metadata__": {"a": 1}, "a": entry()}, b"\0" * 8),
        container({"__metadata__": [], "a": entry()}, b"\0" * 8),
        b"",
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x02}" + b"\0" * 100,
    ],
)
def test_malformed_containers_allocate_nothing(folder, data, monkeypatch):
    monkeypatch.setattr(safefile, "read_tensors", lambda *_: pytest.fail("tensors were allocated"))
    (folder / store.WEIGHTS_NAME).write_bytes(data)
    assert store.WEIGHTS_NAME in str(refused(folder, ""))


def test_shapes_are_checked_against_the_config_before_allocation(folder, monkeypatch):
    monkeypatch.setattr(safefile, "read_tensors", lambda *_: pytest.fail("tensors were allocated"))
    save_file({A: torch.ones(3, 4), B: torch.ones(3, 3)}, folder / store.WEIGHTS_NAME)
    refused(folder, "its tensors have rank 3, the config says 2")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_changed_byte_is_an_error_or_another_adapter(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    write_adapter(from_state_dict(LoRAConfig.from_peft(CONFIG), GOOD), folder)
    name = data.draw(st.sampled_from([store.CONFIG_NAME, store.WEIGHTS_NAME]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(content)
    try:
        assert isinstance(read_adapter(folder), AdapterValue)
    except LoRAError as error:
        assert str(error)  # noqa: PT017


def test_odd_alignment_and_scalars_are_read(folder):
    header = {
        "base_model.model.head.weight": entry(0, 3, (3,), "U8"),
        A: entry(3, 35, (2, 4)),
        B: entry(35, 59, (3, 2)),
        "base_model.model.head.steps": entry(59, 67, (), "I64"),
        "base_model.model.head.none": entry(67, 67, (0, 5)),
    }
    data = b"\1\2\3" + GOOD[A].numpy().tobytes() + GOOD[B].numpy().tobytes() + struct.pack("<q", 7)
    (folder / store.WEIGHTS_NAME).write_bytes(container(header, data))
    value = read_adapter(folder)
    assert torch.equal(value.factors["h.0.q"].A, GOOD[A])
    assert torch.equal(value.factors["h.0.q"].B, GOOD[B])
    head = value.modules["head"]
    assert (head["weight"].tolist(), head["steps"].item(), tuple(head["none"].shape)) == ([1, 2, 3], 7, (0, 5))


# -- the config --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "no JSON object but list"),
        (b"null", "no JSON object"),
        (b'{"peft_type": "LORA", "r": 2, "r": 64}', "'r' twice"),
        (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN"),
        (b'{"peft_type": "LORA", "lora_alpha": -Infinity}', "Infinity"),
        (b'{"peft_type": "LORA", "task_type": "\xff"}', "not UTF-8"),
        (json.dumps(CONFIG).encode("utf-16"), "not UTF-8"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b'{"peft_type": "LORA", "r": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"peft_type": "LORA", "a": "' + b"x" * 17 * 2**20 + b'"}', "larger than"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "LFS"),
    ],
)
def test_malformed_configs(folder, text, match):
    (folder / store.CONFIG_NAME).write_bytes(text)
    assert store.CONFIG_NAME in str(refused(folder, match))
    with pytest.raises(LoRAFileError, match=match):
        read_config(folder)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"lora_alpha": 1e999}, LoRAFileError, "Infinity"),
        ({"r": 10**30}, LoRAFileError, "the config says 1000"),
        ({"r": -1}, LoRAConfigError, "r=-1"),
        ({"peft_type": "ADALORA"}, LoRAUnsupportedError, "ADALORA"),
        ({"use_qalora": True, "use_bdlora": {}}, LoRAConfigError, "use_bdlora cannot be combined with use_qalora"),
        ({"use_dora": True}, LoRAFileError, "has no lora_magnitude_vector, which use_dora needs"),
        ({"lora_bias": True}, LoRAFileError, "has no lora_B.bias, which lora_bias needs"),
        ({"never_heard_of": {"x": 1}}, LoRAUnsupportedError, "never_heard_of"),
        ({"init_lora_weights": "pissa"}, LoRAUnsupportedError, "path_initial_model_for_weight_conversion"),
        ({"rank_pattern": {"(": 3}}, LoRAConfigError, "not a regular expression"),
    ],
)
def test_impossible_configs_name_the_file(folder, change, error, match):
    (folder / store.CONFIG_NAME).write_text(json.dumps(CONFIG | change))
    refused(folder, match, error)


def test_an_infinite_alpha_without_the_word(folder):
    (folder / store.CONFIG_NAME).write_text(json.dumps(CONFIG).replace('"lora_alpha": 4', '"lora_alpha": 1e999'))
    assert store.CONFIG_NAME in str(refused(folder, "alpha=inf", LoRAConfigError))


def test_a_catastrophic_regex_in_a_file(folder, monkeypatch):
    monkeypatch.setattr(patterns, "_SECONDS", 0.5)
    path = "a" * 60
    save_file({k.replace("h.0.q", path): v for k, v in GOOD.items()}, folder / store.WEIGHTS_NAME)
    (folder / store.CONFIG_NAME).write_text(json.dumps(CONFIG | {"alpha_pattern": {"(a+)+b": 3}}))
    start = time.monotonic()
    refused(folder, "did not finish", LoRAConfigError)
    assert time.monotonic() - start < 5


# -- the tensors -------------------------------------------------------------------------------------------------------


def _with(**changes):
    return {**GOOD, **changes}


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({A: GOOD[A]}, "no lora_B"),
        ({B: GOOD[B]}, "no lora_A"),
        ({}, "no LoRA tensors"),
        ({"model.embed_tokens.weight": torch.ones(2, 2)}, "does not start with"),
        ({"base_model.model.head.weight": torch.ones(2, 2)}, "no LoRA tensors"),
        ({k.removeprefix("base_model.model."): v for k, v in GOOD.items()}, "does not start with"),
        ({k.replace("base_model.model.", "transformer."): v for k, v in GOOD.items()}, "does not start with"),
        (_with(**{A: torch.ones(3, 4)}), "has rank 3"),
        (_with(**{A: torch.ones(8)}), "not matrices"),
        (_with(**{A: torch.ones(2, 0)}), "is empty"),
        (_with(**{A: torch.ones(2, 4).half()}), "one floating dtype"),
        ({A: torch.ones(2, 4, dtype=torch.int8), B: torch.ones(3, 2, dtype=torch.int8)}, "one floating dtype"),
        (_with(**{"base_model.model.h.0.q.weight": torch.ones(3, 4)}), "a second weight"),
        (_with(**{"base_model.model.h.0.q.bias": torch.ones(3)}), "a second bias"),
        (_with(**{"base_model.model.h.1.k.base_layer.bias": torch.ones(3)}), "has no factors"),
        (_with(**{"base_model.model.norm.bias": torch.ones(3)}), "neither a factor"),
        (_with(**{"base_model.model.bn.running_mean": torch.ones(3)}), "neither a factor"),
        (_with(**{"base_model.model.stray": torch.ones(3)}), "neither a factor"),
        (_with(**{"base_model.model.h.0.q.lora_embedding_A": torch.ones(2, 4)}), "a second A"),
        (_with(**{"base_model.model.head.original_module.weight": torch.ones(2, 2)}), "without the trained one"),
        *[
            ({k.replace("h.0.q", name): v for k, v in GOOD.items()}, "no module path")
            for name in (
                "../../etc/passwd",
                "..",
                "/abs",
                "a/b",
                "a\\b",
                "C:x",
                "a..b",
                ".a",
                "a\nb",
                "a\0b",
                "x" * 2000,
            )
        ],
    ],
)
def test_tensors_that_do_not_fit_are_listed(folder, tensors, match):
    save_file(tensors, folder / store.WEIGHTS_NAME)
    error = refused(folder, match)
    assert str(folder) in str(error)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("emb.trainable_tokens_delta", (1, 2), "trainable_token_indices"),
        ("h.0.q.lora_E", (2, 1), "ADALORA"),
        ("mlp.experts.lora_A", (4, 4), "target_parameters"),
        ("h.0.q.lora_mid.weight", (2, 2), "unknown LoRA variant"),
        ("h.0.q.hada_w1_a", (2, 2), "LOHA"),
    ],
)
def test_variants_are_named(folder, name, shape, match):
    save_file(_with(**{f"base_model.model.{name}": torch.ones(shape)}), folder / store.WEIGHTS_NAME)
    assert name in str(refused(folder, match, LoRAUnsupportedError))


def test_a_convolution_that_grows_and_merged_linears_are_named(folder):
    config = json.loads((folder / store.CONFIG_NAME).read_text())
    (folder / store.CONFIG_NAME).write_text(json.dumps(config | {"r": 4096}))
    save_file({A: torch.ones(4096, 1, 1), B: torch.ones(4096, 1, 1)}, folder / store.WEIGHTS_NAME)
    refused(folder, "groups of convolutions")
    (folder / store.CONFIG_NAME).write_text(json.dumps(config))
    save_file({A: torch.ones(4, 4), B: torch.ones(6, 2, 1)}, folder / store.WEIGHTS_NAME)
    refused(folder, "enable_lora", LoRAUnsupportedError)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_tensors_are_listed(folder, dtype, bad):
    tensors = {name: tensor.to(dtype, copy=True) for name, tensor in GOOD.items()}
    tensors[A][1, 2] = bad
    for extra in ({}, {"base_model.model.head.weight": torch.ones(2, 2)}):
        save_file(tensors | extra, folder / store.WEIGHTS_NAME)
        error = refused(folder, "not finite")
        assert error.facts == (f"{A}: 1 of 8 values are NaN or infinite",)


def test_large_values_whose_sum_overflows_are_finite(folder):
    save_file(_with(**{A: torch.full((2, 4), 3e38)}), folder / store.WEIGHTS_NAME)
    assert read_adapter(folder).factors["h.0.q"].A[0, 0] == torch.tensor(3e38)


def test_every_problem_is_listed_at_once(folder):
    save_file(_with(**{A: torch.ones(3, 4), "base_model.model.x.bias": torch.ones(1)}), folder / store.WEIGHTS_NAME)
    assert len(refused(folder, "does not hold").facts) == 2


@pytest.mark.parametrize(
    "blocks",
    [
        "{",
        "[]",
        '{"h.0.q": 3}',
        '{"h.0.q": [["q", [[0, 1.5]]]]}',
        '{"h.0.q": [["q", [[2, 1]]]]}',
        '{"h.0.q": [["q", [[0, 4000000000000]]]]}',
        '{"h.0.q": [["", [[0, 1]]]]}',
        '{"h.0.q": [["q", [[0, 99]]]]}',
        '{"h.0.q": [["q", [[0, 1]]]]}',
        '{"nowhere": [["q", [[0, 1]]]]}',
    ],
)
def test_malformed_blocks(folder, blocks):
    save_file(GOOD, folder / store.WEIGHTS_NAME, {"format": "pt", "hf_lora.blocks": blocks})
    refused(folder, "")


# -- the folder --------------------------------------------------------------------------------------------------------


def test_lfs_pointer(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (folder / store.WEIGHTS_NAME).write_text(pointer)
    refused(folder, "git lfs pull")
    (folder / store.WEIGHTS_NAME).rename(folder / store.PICKLE_NAME)
    refused(folder, "git lfs pull", allow_pickle=True)


def test_what_is_missing_is_named(tmp_path, folder):
    with pytest.raises(LoRAFileError, match="does not exist"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(LoRAFileError, match="is a file"):
        read_adapter(folder / store.CONFIG_NAME)
    (folder / store.WEIGHTS_NAME).rename(folder / "weights.npz")
    error = refused(folder, f"has no {store.WEIGHTS_NAME}")
    assert "weights.npz" in error.value
    (folder / "weights.npz").rename(folder / store.WEIGHTS_NAME)
    (folder / store.CONFIG_NAME).unlink()
    refused(folder, store.CONFIG_NAME)
    (folder / store.CONFIG_NAME).mkdir()
    refused(folder, "is not a file")


def test_a_misnamed_file_is_taken_if_it_holds_lora_tensors(folder):
    (folder / store.WEIGHTS_NAME).rename(folder / "model.safetensors")
    assert list(read_adapter(folder).factors) == ["h.0.q"]
    save_file({"model.embed_tokens.weight": torch.ones(2, 2)}, folder / "model.safetensors")
    refused(folder, "model.safetensors")


def test_a_file_that_may_not_be_read(folder):
    path = folder / store.WEIGHTS_NAME
    path.chmod(0)
    if os.geteuid() != 0:
        refused(folder, "cannot be read")
        return
    for parent in (folder, *folder.parents):  # root may read everything: be nobody for a moment
        if parent != Path("/") and parent != Path("/tmp"):
            parent.chmod(0o755)
    os.seteuid(65534)
    try:
        refused(folder, "cannot be read")
    finally:
        os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs os.mkfifo")
def test_a_pipe_does_not_block(folder):
    (folder / store.WEIGHTS_NAME).unlink()
    os.mkfifo(folder / store.WEIGHTS_NAME)
    refused(folder, "is not a file")


# -- pickles -----------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def pickled(folder):
    (folder / store.WEIGHTS_NAME).unlink()
    torch.save(GOOD, folder / store.PICKLE_NAME)
    return folder


def test_a_pickle_is_read_on_request_only(pickled):
    refused(pickled, "allow_pickle=True")
    assert all(
        torch.equal(tensor, GOOD[k]) for k, tensor in to_state_dict(read_adapter(pickled, allow_pickle=True)).items()
    )


def test_a_pickle_runs_nothing(pickled):
    path, trap = pickled / store.PICKLE_NAME, pickled / "trap"
    torch.save({A: Bomb(trap)}, path)
    refused(pickled, "no pickle of tensors alone", allow_pickle=True)
    path.write_bytes(pickle.dumps(Bomb(trap)))
    refused(pickled, "no pickle of tensors alone", allow_pickle=True)
    assert not trap.exists()


def test_malformed_pickles(pickled):
    path = pickled / store.PICKLE_NAME
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        refused(pickled, store.PICKLE_NAME, allow_pickle=True)
    for content in ([1, 2], {1: torch.ones(1)}, {"a": 3}, torch.ones(2), {A: torch.ones(2, 4).to_sparse()}):
        torch.save(content, path)
        refused(pickled, store.PICKLE_NAME, allow_pickle=True)


def test_a_few_bytes_that_claim_to_be_terabytes(pickled):
    torch.save(_with(**{A: torch.ones(1).expand(2, 2**40)}), pickled / store.PICKLE_NAME)
    refused(pickled, "not a plain dense tensor", allow_pickle=True)


def test_a_compressed_pickle_is_refused(pickled):
    """torch.save stores; a deflated archive could unpack to a thousand times its size."""
    path = pickled / store.PICKLE_NAME
    with zipfile.ZipFile(path) as stored:
        members = {info.filename: stored.read(info) for info in stored.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name, data in members.items():
            deflated.writestr(name, data)
    refused(pickled, "packed members", allow_pickle=True)


def test_an_error_names_what_a_value_cannot_be(tmp_path):
    value = AdapterValue(LoRAConfig(r=2), {"q": Factors("linear", torch.ones(2, 4), torch.ones(3, 2), 2.0)})
    strange = AdapterValue(value.config, value.factors, modules={"h": {"weight": torch.ones(2, dtype=torch.complex64)}})
    with pytest.raises(LoRAFileError, match="complex64"):
        write_adapter(strange, tmp_path)
    assert list(tmp_path.iterdir()) == []
