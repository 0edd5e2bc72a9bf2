"""Merging: cycles, swaps, failures at every layer, tied weights, other threads, and standalone models."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    Snapshot,
    assert_apart,
    assert_close,
    bits,
    build,
    disturb,
    inputs,
    logits,
    merged,
    same_bits,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_lora import LoRAConfig, LoRAError, LoRAFileError, LoRAStateError, LoRAUnsupportedError, exact, merging, workers
from hf_lora.exact import Factored, Scratch, added, fingerprint, restored

ROUND = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def adapter(family: str, folder: Path, *, seed: int = 1, std: float = 0.1, **fields: Any) -> Path:
    """A folder with a random adapter for the family's model."""
    model = build(family)
    model.add_lora(LoRAConfig(**{"r": 3, "alpha": 6, "target_modules": ["q", "v"], **fields}))
    disturb(model, seed=seed, std=std)
    return model.save_lora(folder)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Bits of the base's own tensors."""
    return {key: bits(tensor).clone() for key, tensor in model.state_dict().items() if "lora" not in key}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- one weight ------------------------------------------------------------------------------------------------------


def weight_and_change(shape: tuple[int, int], dtype: torch.dtype, scale: float, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    weight = normal(*shape).to(dtype)
    weight.view(-1)[:: max(weight.numel() // 7, 1)] = -0.0
    return weight, Factored((normal(shape[0], 3) * scale).float(), normal(3, shape[1]).float())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    dtype=st.sampled_from([*ROUND, torch.float64]),
    scale=st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 1e3]),
    piece=st.sampled_from([2, 64, 1 << 17]),
    transposed=st.booleans(),
)
def test_a_weight_is_w_plus_delta_rounded_once_and_comes_back(
    rows: int, columns: int, dtype: torch.dtype, scale: float, piece: int, transposed: bool
) -> None:
    weight, change = weight_and_change((rows, columns), dtype, scale, rows * 41 + columns)
    if transposed:  # a weight that does not lie in memory row by row
        weight = weight.T.contiguous().T
    before, old = weight.clone(), exact._PIECE["cpu"]
    exact._PIECE["cpu"] = piece
    try:
        new, record = added(weight, change, "w", Scratch())
        wide = torch.promote_types(dtype, torch.float32)
        truth = (weight.double() + change.left.double() @ change.right.double()).to(dtype).double()
        terms = weight.double().abs() + (change.left.abs() @ change.right.abs()).double()
        allowed = torch.finfo(dtype).eps * truth.abs() + 4 * torch.finfo(wide).eps * terms + torch.finfo(dtype).tiny
        assert bool(((new.double() - truth).abs() <= allowed).all())
        assert same_bits(weight, before)
        back = restored(new.clone(), record, "w", Scratch())
    finally:
        exact._PIECE["cpu"] = old
    assert same_bits(back, before)


@pytest.mark.parametrize("dtype", [*ROUND, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (64, 7), (700, 300)], ids=str)
def test_a_fingerprint_sees_one_bit_two_swapped_weights_and_minus_zero(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(shape, generator=generator).to(dtype)
    flat, ints = tensor.view(-1), tensor.view(INTEGERS[dtype.itemsize]).view(-1)
    flat[:2] = torch.tensor([0.0, -0.0])  # the highest bit alone
    before, width, count = fingerprint(tensor), 8 * dtype.itemsize, tensor.numel()
    assert fingerprint(tensor.clone()) == before

    def chosen(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    flips = [(0, width - 1), (count - 1, 0), (count - 1, width - 1)] + [
        (chosen(count), chosen(width)) for _ in range(40)
    ]
    for place, bit in flips:
        value = int(ints[place])
        mask = 1 << bit if bit < width - 1 else -1 << bit
        ints[place] = value ^ mask
        assert fingerprint(tensor) != before, (place, bit)
        ints[place] = value
    pairs = [(0, 1), (0, count - 1)] + [(chosen(count), chosen(count)) for _ in range(40)]
    pairs += [(place, place + gap) for gap in (1, 2, 4, 64, 128, 256, 512) for place in (0, 3) if place + gap < count]
    for one, other in pairs:
        mine, theirs = int(ints[one]), int(ints[other])
        ints[one], ints[other] = theirs, mine
        assert (fingerprint(tensor) != before) == (mine != theirs), (one, other)
        ints[one], ints[other] = mine, theirs
    assert fingerprint(tensor) == before
    assert fingerprint(tensor.T) != before


def test_a_record_is_small() -> None:
    for ratio, most in ((0.01, 0.1), (0.1, 0.35), (1.0, 0.75), (1000.0, 1.2)):
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(0)
            weight = torch.randn(512, 512, generator=generator).to(dtype)
            change = Factored(
                torch.randn(512, 1, generator=generator) * ratio, torch.randn(1, 512, generator=generator)
            )
            _, record = added(weight, change, "w", Scratch())
            assert record.nbytes <= most * weight.nbytes, (ratio, dtype, record.nbytes / weight.nbytes)


# ---- many cycles, families and dtypes --------------------------------------------------------------------------------

FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, q and v of c_attn": ("gpt2", {}),
    "gpt2, Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "llama, embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "phi3": ("phi3", {"target_modules": ["q", "v", "o"]}),
    "neox": ("neox", {"target_modules": ["q", "v"]}),
    "bloom": ("bloom", {"target_modules": ["q", "v", "k"]}),
    "falcon": ("falcon-heads", {"target_modules": ["q", "v"]}),
    "falcon, one key": ("falcon", {"target_modules": ["q", "k"]}),
    "bert, biases and a head": ("bert-cls", {"bias": "all", "task_type": "SEQ_CLS"}),
    "t5": ("t5", {"target_modules": ["q", "v", "wi"]}),
}


@pytest.mark.parametrize("case", FUSED)
def test_merged_is_the_float64_formula_and_comes_back_in_every_family(case: str, tmp_path: Path) -> None:
    family, fields = FUSED[case]
    for name, seed in (("a", 1), ("b", 2)):
        adapter(family, tmp_path / name, seed=seed, **{**fields, "r": 2 + seed})
    for dtype in ROUND:
        model = build(family, dtype=dtype)
        before, batch, plain = Snapshot(model), inputs(model), logits(model, inputs(model))
        for name in "ab":
            model.load_lora(tmp_path / name)
        for cycle in range(4):
            name = "ab"[cycle % 2]
            model.merge_lora(name)
            if cycle < 2:
                truth = logits(merged(build(family, dtype=dtype), tmp_path / name), batch)
                assert_close(logits(model, batch), truth, dtype)
                if dtype == torch.float32:
                    assert_apart(truth, plain)
            model.unmerge_lora()
            before.assert_weights(model)
        model.remove_lora()
        before.assert_same(model)


def test_a_base_in_float64_is_merged_in_float64(tmp_path: Path) -> None:
    adapter("llama", tmp_path / "a", target_modules="all-linear")
    model = build("llama", dtype=torch.float64)
    before, batch = Snapshot(model), inputs(model)
    truth = merged(model, tmp_path / "a")
    model.load_lora(tmp_path / "a")
    model.merge_lora()
    for name, parameter in truth.named_parameters():
        mine = model.get_parameter(name)
        assert (mine - parameter).abs().max() <= 1e-13 * parameter.abs().max()
    assert_close(logits(model, batch), logits(truth, batch))
    model.unmerge_lora()
    before.assert_weights(model)


# ---- swapping --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of different layers, ranks and kinds: a and b share layers, c is elsewhere; for llama and for BERT."""
    root = tmp_path_factory.mktemp("tasks")
    adapter("llama", root / "a", seed=1, target_modules="all-linear")
    adapter("llama", root / "b", seed=2, target_modules=["q", "v", "o"], r=5)
    adapter("llama", root / "c", seed=3, target_modules=["up", "embed_tokens"])
    whole = {"task_type": "SEQ_CLS"}
    adapter("bert-cls", root / "bert-a", seed=1, bias="all", **whole)
    adapter("bert-cls", root / "bert-b", seed=2, bias="lora_only", target_modules=["up"], **whole)
    adapter("bert-cls", root / "bert-c", seed=3, target_modules=["k", "v"], modules_to_save=[])
    return root


LLAMA: dict[str, Any] = {"a": "a", "b": "b", "c": "c", "mixture": {"a": 0.7, "b": -0.3, "c": 2.0}}
BERT: dict[str, Any] = {name: name for name in ("bert-a", "bert-b", "bert-c")}


def loaded(root: Path, names: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    model = build("bert-cls" if "bert-a" in names else "llama", dtype=dtype)
    for name, which in names.items():
        if isinstance(which, str):
            model.load_lora(root / name)
    return model


@pytest.mark.parametrize("dtype", ROUND, ids=str)
@pytest.mark.parametrize("names", [LLAMA, BERT], ids=["llama", "bert"])
def test_swapping_gives_the_bits_of_a_fresh_merge_in_any_order(
    names: dict[str, Any], dtype: torch.dtype, tasks: Path
) -> None:
    model, fresh = loaded(tasks, names, dtype), {}
    before, batch = Snapshot(model), inputs(model)
    base = weights(model)
    for name, which in names.items():
        model.merge_lora(which)
        fresh[name] = weights(model), logits(model, batch)
        model.unmerge_lora()
        assert not same(fresh[name][0], base)
    chain = [name for pair in itertools.permutations(names, 2) for name in pair]
    model.merge_lora(names[chain[0]], replace=True)  # nothing is merged yet, which is fine
    for name in chain:
        model.merge_lora(names[name], replace=True)
        assert same(weights(model), fresh[name][0]), name
    assert torch.equal(logits(model, batch), fresh[chain[-1]][1])
    assert model.active_lora is None
    model.unmerge_lora()
    before.assert_weights(model)
    model.remove_lora()
    assert model.lora_names == ()


class Injected(BaseException):
    """Not an Exception, as Ctrl-C is not."""


def failing(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, at: int, *, after: bool = False) -> None:
    """Let the call number `at` of a function fail, before or after it has done its work."""
    inner, count, lock = getattr(module, name), itertools.count(), threading.Lock()

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with lock:
            mine = next(count) == at
        if mine and not after:
            raise Injected
        result = inner(*args, **kwargs)
        if mine:
            raise Injected
        return result

    monkeypatch.setattr(module, name, wrapped)


@pytest.mark.parametrize("verb", ["merge", "unmerge", "swap"])
def test_a_failure_at_any_layer_leaves_everything_as_it_was(
    verb: str, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(tasks, LLAMA)
    if verb != "merge":
        model.merge_lora("a")
    before, held = weights(model), model._lora_state.merged
    do: dict[str, Callable[[], Any]] = {
        "merge": lambda: model.merge_lora("b"),
        "unmerge": model.unmerge_lora,
        "swap": lambda: model.merge_lora({"b": 1.0, "c": 0.5}, replace=True),
    }
    steps = {"merge": ["added"], "unmerge": ["restored"], "swap": ["added", "restored"]}[verb]
    failures = 0
    for step, after in itertools.product(steps, (False, True)):
        for at in range(100):
            with monkeypatch.context() as patch:
                failing(patch, merging, step, at, after=after)
                try:
                    do[verb]()
                except Injected:
                    failures += 1
                else:
                    break
            assert same(weights(model), before), (step, at)
            assert model._lora_state.merged is held
        else:
            raise AssertionError("it fails for ever")
        {"merge": model.unmerge_lora, "unmerge": lambda: model.merge_lora("a")}.get(
            verb, lambda: model.merge_lora("a", replace=True)
        )()
        assert same(weights(model), before)
        held = model._lora_state.merged
    assert failures >= 2 * 6


def test_a_failure_while_an_adapter_takes_its_own_place(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tasks, LLAMA)
    base = weights(model)
    model.merge_lora("a")
    before = weights(model)
    with monkeypatch.context() as patch, pytest.raises(Injected):
        failing(patch, merging, "added", 9)
        model.merge_lora("a", replace=True)
    assert same(weights(model), before)
    model.merge_lora({"a": 0.0}, replace=True)  # the base's own bits
    assert same(weights(model), base)
    with monkeypatch.context() as patch, pytest.raises(Injected):
        failing(patch, merging, "restored", 9)
        model.unmerge_lora()
    model.unmerge_lora()
    assert same(weights(model), base)


@pytest.mark.parametrize("at", range(2))
@pytest.mark.parametrize("merged_first", ["bert-a", "bert-c"])  # of which the second has no heads and biases
def test_a_failure_while_heads_are_written_leaves_everything_as_it_was(
    merged_first: str, at: int, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(tasks, BERT)
    base = weights(model)
    model.merge_lora(merged_first)
    before = weights(model)
    with monkeypatch.context() as patch, pytest.raises(Injected):
        failing(patch, merging, "_write", at, after=True)
        model.merge_lora("bert-b", replace=True)
    assert same(weights(model), before)
    model.unmerge_lora()
    assert same(weights(model), base)


def test_an_adapter_that_cannot_be_merged_leaves_the_one_that_is(tasks: Path) -> None:
    for dtype in (torch.float16, torch.float32):
        model = loaded(tasks, LLAMA, dtype)
        model.add_lora(LoRAConfig(r=2, target_modules=["o", "down"]), "bad", active=False)
        if dtype == torch.float32:
            [p for p in model.parameters() if p.requires_grad][-1].data[0, 0] = float("nan")
        else:
            disturb(model, std=300)
        base = weights(model)
        model.merge_lora("a")
        before, held = weights(model), model._lora_state.merged
        for which in ("bad", {"a": 1.0, "bad": 1.0}, "nobody", []):
            with pytest.raises(LoRAError):
                model.merge_lora(which, replace=True)
            assert same(weights(model), before)
            assert model._lora_state.merged is held
        model.unmerge_lora()
        assert same(weights(model), base)


def test_merging_again_without_replace_says_how(tasks: Path) -> None:
    model = loaded(tasks, LLAMA)
    model.merge_lora("a")
    with pytest.raises(LoRAStateError, match="replace=True"):
        model.merge_lora("b")


# ---- somebody else wrote the weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["weight", "head"])
@pytest.mark.parametrize("verb", ["unmerge", "swap"])
def test_a_weight_that_changed_since_is_never_overwritten(verb: str, where: str, tasks: Path) -> None:
    model = loaded(tasks, BERT)
    base = weights(model)
    model.merge_lora("bert-a")
    name = "classifier.weight" if where == "head" else "bert.encoder.layer.1.attention.self.value.weight"
    changed, before = model.get_parameter(name).data, weights(model)
    value = changed[1, 3].clone()
    changed[1, 3] = value.view(torch.int32).bitwise_xor(1).view(torch.float32)
    touched = weights(model)
    for _ in range(2):
        with pytest.raises(LoRAStateError, match="changed since"):
            model.unmerge_lora() if verb == "unmerge" else model.merge_lora("bert-b", replace=True)
        assert same(weights(model), touched)
    changed[1, 3] = value
    assert same(weights(model), before)
    model.unmerge_lora()
    assert same(weights(model), base)


def test_the_number_of_threads_and_copies_of_the_model_do_not_matter(tasks: Path) -> None:
    model, threads = loaded(tasks, LLAMA), torch.get_num_threads()
    base = weights(model)
    try:
        torch.set_num_threads(2)
        model.merge_lora("a")
        assert torch.get_num_threads() == 2
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert found == [2], "a thread that begins after a merge has another number of threads"
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False), model):
            torch.set_num_threads(1)
            other.unmerge_lora()
            assert same(weights(other), base)
    finally:
        torch.set_num_threads(threads)


def test_under_inference_mode_too(tasks: Path) -> None:
    model = loaded(tasks, LLAMA)
    base = weights(model)
    with torch.inference_mode():
        model.merge_lora("a")
        model.merge_lora("b", replace=True)
    model.unmerge_lora()
    assert same(weights(model), base)
    with torch.inference_mode():
        again = loaded(tasks, LLAMA)  # whose weights are inference tensors
        again.merge_lora("a")
        again.unmerge_lora()
    assert same(weights(again), base)


def test_threads_that_cannot_begin_are_an_error_and_nothing_waits(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tasks, LLAMA)
    base, threads = weights(model), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with monkeypatch.context() as patch:
            failing(patch, workers.ThreadPoolExecutor, "submit", 1)
            with pytest.raises(Injected):
                model.merge_lora("a")
        assert same(weights(model), base)
        model.merge_lora("a")
        model.unmerge_lora()
    finally:
        torch.set_num_threads(threads)


# ---- other threads ---------------------------------------------------------------------------------------------------

BLOCKS: dict[str, Callable[[Any], Any]] = {
    "use": lambda model: model.use_lora("b"),
    "no": lambda model: model.no_lora(),
    "route": lambda model: model.route_lora(["a", None, "b"]),
    "route to the base": lambda model: model.route_lora([None]),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_nothing_merges_while_another_thread_is_inside_a_block(block: str, tasks: Path, tmp_path: Path) -> None:
    model = loaded(tasks, LLAMA)
    base, inside, leave = weights(model), threading.Event(), threading.Event()

    def serve() -> None:
        with BLOCKS[block](model):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=serve)
    thread.start()
    assert inside.wait(10)
    try:
        for verb in (lambda: model.merge_lora("a"), lambda: model.merge_and_save(tmp_path / "out", "a")):
            with pytest.raises(LoRAStateError, match="another thread"):
                verb()
            assert same(weights(model), base)
        assert copy.deepcopy(model)._lora_state.blocks == 0
    finally:
        leave.set()
        thread.join()
    copied = copy.deepcopy(model)
    model.merge_lora("a")
    with pytest.raises(LoRAStateError, match="merged"), BLOCKS[block](model):
        pass
    model.unmerge_lora()
    copied.merge_lora("a")


def test_a_copy_of_a_model_made_inside_a_block_has_no_block_open(tasks: Path) -> None:
    model = loaded(tasks, LLAMA)
    with model.use_lora("a"):
        copied = copy.deepcopy(model)
    copied.remove_lora("a")
    assert copied.lora_names == ("b", "c")


def test_no_block_opens_while_weights_change(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(tasks, LLAMA)
    inner, refused = merging.added, []

    def during(*args: Any, **kwargs: Any) -> Any:
        for block in BLOCKS.values():
            try:
                with block(model):
                    pass
            except LoRAStateError as error:
                refused.append(error)
        return inner(*args, **kwargs)

    monkeypatch.setattr(merging, "added", during)
    model.merge_lora("b")
    assert len(refused) == len(BLOCKS) * 6
    model.unmerge_lora()
    with model.use_lora("a"):
        pass


# ---- tied weights ----------------------------------------------------------------------------------------------------

TIED: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("llama-tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "both": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "whole head": ("llama-tied", {"modules_to_save": ["lm_head"]}),
    "whole embedding": ("llama-tied", {"modules_to_save": ["embed_tokens"]}),
    "both whole": ("llama-tied", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "gpt2": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "bart": ("bart", {"target_modules": ["lm_head", "q"]}),
    "t5, shared": ("t5", {"target_modules": ["shared", "q"]}),
}


@pytest.mark.parametrize("case", TIED)
def test_tied_weights_are_refused_or_parted_and_never_wrong(case: str, tmp_path: Path) -> None:
    family, fields = TIED[case]
    try:
        adapter(family, tmp_path / "a", std=0.3, **fields)
    except LoRAError:
        pytest.fail("the adapter itself is refused")
    model = build(family)
    before, batch = Snapshot(model), inputs(model)
    truth = logits(merged(model, tmp_path / "a"), batch)
    assert_apart(truth, logits(model, batch))
    model.load_lora(tmp_path / "a")
    assert_close(logits(model, batch), truth)
    for refused in (model.merge_lora, lambda: model.merge_and_save(tmp_path / "refused")):
        with pytest.raises(LoRAUnsupportedError, match="tied to"):
            refused()
        before.assert_weights(model)
    assert not (tmp_path / "refused").exists()

    folder = model.merge_and_save(tmp_path / "saved", untie=True)
    before.assert_weights(model)
    model.merge_lora(untie=True)
    assert_close(logits(model, batch), truth)
    found = logits(model, batch)
    model.save_pretrained(tmp_path / "merged")
    assert model.config.tie_word_embeddings
    model.unmerge_lora()
    model.remove_lora()
    before.assert_same(model)  # the identity of every Parameter, too: they are tied again
    for saved in (folder, tmp_path / "merged"):
        assert json.loads((saved / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(logits(type(model).from_pretrained(saved).eval(), batch), found)
        auto = transformers.AutoModelForSeq2SeqLM if family in ("t5", "bart") else transformers.AutoModelForCausalLM
        assert torch.equal(logits(auto.from_pretrained(saved).eval(), batch), found)


def test_swapping_unties_and_ties_as_a_fresh_merge_does(tmp_path: Path) -> None:
    tied = {"e": ["embed_tokens"], "h": ["lm_head", "q_proj"], "q": ["q_proj"]}
    for seed, (name, targets) in enumerate(tied.items()):
        adapter("llama-tied", tmp_path / name, seed=seed, target_modules=targets)
    model = build("llama-tied")
    before = Snapshot(model)
    for name in tied:
        model.load_lora(tmp_path / name)
    fresh = {}
    for name in tied:
        model.merge_lora(name, untie=True)
        fresh[name] = weights(model), model.lm_head.weight is model.model.embed_tokens.weight
        model.unmerge_lora()
    assert [alone for _, alone in fresh.values()] == [False, False, True]
    for name in ("e", "h", "e", "q", "h", "q", "e"):
        model.merge_lora(name, replace=True, untie=True)
        assert same(weights(model), fresh[name][0])
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == fresh[name][1]
        for other in ("e", "h"):  # not tied at present, perhaps, but it would be without this merge
            with pytest.raises(LoRAUnsupportedError, match="tied to"):
                model.merge_lora(other, replace=True)
            assert same(weights(model), fresh[name][0])
    model.unmerge_lora()
    model.remove_lora()
    before.assert_same(model)


def test_a_failed_merge_ties_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter("llama-tied", tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    model = build("llama-tied")
    before = Snapshot(model)
    model.load_lora(tmp_path / "a")
    for at in range(3):
        with monkeypatch.context() as patch, pytest.raises(Injected):
            failing(patch, merging, "added", at)
            model.merge_lora(untie=True)
    model.remove_lora()
    before.assert_same(model)


def test_two_parameters_in_the_same_memory_are_tied_too(tmp_path: Path) -> None:
    adapter("llama", tmp_path / "a", target_modules=["lm_head"])
    model = build("llama")
    model.lm_head.weight.data = model.model.embed_tokens.weight.data
    batch = inputs(model)
    truth = logits(merged(model, tmp_path / "a"), batch)
    model.load_lora(tmp_path / "a")
    with pytest.raises(LoRAUnsupportedError, match=r"tied to model\.embed_tokens\.weight"):
        model.merge_lora()
    model.merge_lora(untie=True)
    assert_close(logits(model, batch), truth)
    model.unmerge_lora()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


# ---- a standalone model ----------------------------------------------------------------------------------------------


def state_of(model: Any) -> Any:
    held = {key: bits(tensor).clone() for key, tensor in model.state_dict().items()}
    config = model.config.to_json_string(), model.config.dtype, model.config.architectures
    return held, model.lora_names, model.active_lora, [m.training for m in model.modules()], config


def assert_same_state(model: Any, before: Any) -> None:
    after = state_of(model)
    assert same(after[0], before[0])
    assert after[1:] == before[1:]


@pytest.mark.parametrize("which", [None, "b", "mixture"])
def test_merge_and_save_writes_what_merge_lora_computes_and_changes_nothing(
    which: str | None, tasks: Path, tmp_path: Path
) -> None:
    build("llama").save_pretrained(tmp_path / "base")  # a model that was loaded keeps some buffers in float32
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    for name in "abc":
        model.load_lora(tasks / name)
    model.set_lora("a")
    model.train_lora("b")
    model.generation_config.max_new_tokens = 7
    model.train()
    before, chosen = state_of(model), LLAMA[which] if which else None
    folder = model.merge_and_save(tmp_path / "deep" / "out", chosen, max_shard_size="20KB")
    assert_same_state(model, before)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} <= names
    assert not any("adapter" in name for name in names)
    assert not [path for path in folder.parent.iterdir() if path.name != "out"]
    keys = {key for path in folder.glob("*.safetensors") for key in load_file(path)}
    assert keys == set(build("llama").state_dict())
    batch = inputs(model)
    model.eval().merge_lora(chosen)
    found = logits(model, batch)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert again.dtype == torch.bfloat16
    assert again.generation_config.max_new_tokens == 7
    assert torch.equal(logits(again, batch), found)
    assert same(weights(again), weights(model))
    assert same(
        weights(transformers.AutoModelForCausalLM.from_pretrained(model.merge_and_save(tmp_path / "2"))), weights(model)
    )
    with pytest.raises(LoRAStateError, match="merged already"):
        model.merge_and_save(tmp_path / "3", "c")
    assert not (tmp_path / "3").exists()


def test_a_standalone_model_needs_no_hf_lora(tasks: Path, tmp_path: Path) -> None:
    model = loaded(tasks, BERT)
    batch = inputs(model)
    folder = model.merge_and_save(tmp_path / "out", "bert-a")
    model.merge_lora("bert-a")
    torch.save({"batch": batch, "logits": logits(model, batch)}, tmp_path / "expected.pt")
    program = f"""
import sys
sys.modules["hf_lora"] = sys.modules["peft"] = None
import torch
from transformers import AutoModelForSequenceClassification
torch.set_num_threads({torch.get_num_threads()})
kept = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForSequenceClassification.from_pretrained({str(folder)!r})
with torch.no_grad():
    assert torch.equal(model(**kept["batch"]).logits, kept["logits"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("odd")])
def test_a_failed_merge_and_save_leaves_no_folder_and_no_merged_model(
    error: BaseException, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(tasks, LLAMA)
    model.set_lora("b")
    before = state_of(model)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("transformers.modeling_utils.safe_save_file", broken)
        with pytest.raises(LoRAFileError if isinstance(error, OSError) else type(error)):
            model.merge_and_save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert_same_state(model, before)
    with monkeypatch.context() as patch:
        failing(patch, merging, "added", 3)
        with pytest.raises(Injected):
            model.merge_and_save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert_same_state(model, before)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("mine")
    with pytest.raises(LoRAFileError, match="not empty"):
        model.merge_and_save(tmp_path / "out")
    assert (tmp_path / "out" / "kept").read_text() == "mine"
    assert_same_state(model, before)


def test_merge_and_save_inside_a_block_or_without_an_adapter_is_refused(tasks: Path, tmp_path: Path) -> None:
    model = loaded(tasks, LLAMA)
    with model.route_lora(["a"]), pytest.raises(LoRAStateError, match="merge_and_save"):
        model.merge_and_save(tmp_path / "out")
    model.set_lora(None)
    with pytest.raises(LoRAStateError, match="No adapter is active"):
        model.merge_and_save(tmp_path / "out")
    with pytest.raises(LoRAStateError, match="has no LoRA"):
        build("llama").merge_and_save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_merging_leaks_nothing(tasks: Path) -> None:
    model = loaded(tasks, LLAMA)

    def alive() -> int:
        gc.collect()
        return sum(1 for item in gc.get_objects() if isinstance(item, (exact.Record, exact.Scratch)))

    start = alive()
    for _ in range(3):
        model.merge_lora("a")
        model.merge_lora("b", replace=True)
        model.unmerge_lora()
    assert alive() == start
