"""Files: PEFT's format both ways, exact round trips, and writes that a kill cannot tear."""

from __future__ import annotations

import itertools
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_lora import store
from hf_lora.config import LoRAConfig
from hf_lora.errors import LoRAFileError, LoRAUnsupportedError
from hf_lora.store import from_state_dict, read_adapter, read_config, to_state_dict, write_adapter
from hf_lora.values import AdapterValue, Block, Factors

SHARED = Path(os.environ.get("HF_LORA_SHARED", Path(__file__).parents[2] / "shared"))
ADAPTERS = sorted(path for path in (SHARED / "peft-corpus" / "adapters").glob("*") if path.is_dir())
needs_corpus = pytest.mark.skipif(
    not ADAPTERS, reason="no adapter corpus: set HF_LORA_SHARED to the folder that holds it"
)


def pair(out=3, rank=2, columns=4, dtype=torch.float32, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, columns, generator=generator), torch.randn(out, rank, generator=generator)
    return Factors(**({"kind": "linear", "A": a.to(dtype), "B": b.to(dtype), "alpha": 16.0} | changes))


def adapter(seed=0, **config):
    fields = {"r": 2, "alpha": 16.0, "target_modules": ["q", "v"]} | config
    return AdapterValue(LoRAConfig(**fields), {"h.0.q": pair(seed=seed), "h.0.v": pair(5, seed=seed + 1)})


def same_tensors(one, two):
    one, two = to_state_dict(one), to_state_dict(two)
    return one.keys() == two.keys() and all(
        torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one
    )


# -- our own round trip ------------------------------------------------------------------------------------------------


def test_everything_round_trips(tmp_path):
    q, v = Block("q", (range(2), range(4, 6))), Block("v", (range(2, 4),))
    parts = [(q, torch.randn(3, 4), torch.randn(4, 3)), (v, torch.randn(3, 4), torch.randn(2, 3))]
    value = AdapterValue(
        LoRAConfig(r=2, bias="all", modules_to_save=["head"], task_type="CAUSAL_LM", base_model="me/é"),
        {
            "h.0.fused": Factors.stack(parts, out_features=8, alpha=3.0),
            "h.0.q": pair(),
            "h.1.q": pair(rank=5, alpha=1.5),
            "emb": pair(kind="embedding"),
        },
        biases={"h.0.q.bias": torch.randn(3), "norm.bias": torch.randn(2)},
        modules={
            "head": {"dense.weight": torch.randn(2, 2), "steps": torch.tensor(7)},
            "x.pooler": {"weight": torch.ones(1)},
        },
        embeddings={"emb.weight": torch.randn(4, 3)},
    )
    assert write_adapter(value, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    back = read_adapter(tmp_path / "new" / "folder")
    assert back.equal(AdapterValue(back.config, value.factors, value.biases, value.modules, value.embeddings))
    assert back.factors["h.0.fused"].blocks == (q, v)
    assert back.config.modules_to_save == ("head", "x.pooler")
    assert back.config.target_modules == ("emb", "h.0.fused", "h.0.q", "h.1.q")
    write_adapter(back, tmp_path / "again")
    for name in (store.CONFIG_NAME, store.WEIGHTS_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "new" / "folder" / name).read_bytes()


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(
        st.sampled_from(["a.q", "b.a.q", "a.v", "q", "c-1.q"]),
        st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.floats(0.5, 64)),
        min_size=1,
    ),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.booleans(),
)
def test_ranks_alphas_and_dtypes_round_trip(tmp_path_factory, layers, dtype, rslora):
    value = AdapterValue(
        LoRAConfig(),
        {
            path: pair(out, rank, columns, dtype, alpha=alpha, use_rslora=rslora)
            for path, (out, rank, columns, alpha) in layers.items()
        },
    )
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(value, folder)
    back = read_adapter(folder)
    assert back.equal(AdapterValue(back.config, value.factors))
    for name, tensor in load_file(folder / store.WEIGHTS_NAME).items():  # safetensors' own reader agrees
        assert torch.equal(tensor, to_state_dict(value)[name])


def test_what_the_config_already_says_is_kept(tmp_path):
    value = adapter(rank_pattern={"nowhere": 3}, base_model="gpt2", layers_to_transform=[0])
    write_adapter(value, tmp_path)
    assert read_adapter(tmp_path).equal(value)


def test_the_commonest_rank_and_alpha_become_r_and_lora_alpha(tmp_path):
    value = AdapterValue(LoRAConfig(r=7), {"a.q": pair(rank=4), "b.q": pair(rank=4), "x.a.q": pair(rank=2, alpha=3.0)})
    write_adapter(value, tmp_path)
    fields = json.loads((tmp_path / store.CONFIG_NAME).read_text())
    assert (fields["r"], fields["lora_alpha"]) == (4, 16)
    assert fields["rank_pattern"] == {r"^x\.a\.q": 2}
    assert fields["alpha_pattern"] == {r"^x\.a\.q": 3}


@pytest.mark.parametrize("targets", [None, "all-linear", r".*\.q", ["query", "value"], ["q"], ["q", "v", "k"]])
def test_targets_that_are_no_closed_list_become_full_paths(targets, tmp_path):
    value = adapter(target_modules=targets)
    write_adapter(value, tmp_path)
    assert read_config(tmp_path).target_modules == ("h.0.q", "h.0.v")


def test_mixed_scaling_cannot_be_said(tmp_path):
    value = AdapterValue(LoRAConfig(), {"a": pair(), "b": pair(use_rslora=True)})
    with pytest.raises(LoRAFileError, match="alpha/√r"):
        write_adapter(value, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loaded_tensors_are_not_the_file(tmp_path):
    value = adapter()
    write_adapter(value, tmp_path)
    back = read_adapter(tmp_path)
    path = tmp_path / store.WEIGHTS_NAME
    path.write_bytes(b"\0" * path.stat().st_size)  # in place, as safetensors' save_file does
    assert back.equal(value)


def test_parameters_views_and_shared_storage_are_written(tmp_path):
    base = torch.randn(6, 4)
    factors = {
        "q": Factors("linear", torch.nn.Parameter(base[:2]), torch.nn.Parameter(base[2:5, :2]), 16.0),
        "v": Factors("linear", base[:2], base.t()[:, :2], 16.0),
    }
    value = AdapterValue(LoRAConfig(r=2, alpha=16, target_modules=["q", "v"]), factors)
    write_adapter(value, tmp_path)
    assert read_adapter(tmp_path).equal(value)


# -- PEFT --------------------------------------------------------------------------------------------------------------


def tiny(kind):
    import transformers

    torch.manual_seed(0)
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=13, n_embd=8, n_layer=2, n_head=2, n_positions=8)
        )
    if kind == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=13,
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
            )
        )
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=13, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
        )
    )


CASES = [
    ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 7}),
    ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    ("llama", {"target_modules": r".*\.(q|v)_proj", "lora_dropout": 0.1}),
    (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            "rank_pattern": {"down_proj": 3, r"layers\.0\.self_attn\.q_proj": 5},
            "alpha_pattern": {"q_proj": 2},
        },
    ),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "mlp"]}),
    ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
    ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "lora_only"}),
    ("bert", {"target_modules": ["query"], "task_type": "SEQ_CLS", "bias": "all"}),
]


def randomised(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_pefts_files_read_and_ours_load_in_peft(kind, fields, tmp_path):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on saving embeddings
        model = randomised(peft.get_peft_model(tiny(kind), peft.LoraConfig(**fields)))
        model.save_pretrained(tmp_path / "theirs")
    value = read_adapter(tmp_path / "theirs")
    modules = dict(model.base_model.model.named_modules())
    for path, factors in value.factors.items():
        layer = modules[path]
        assert factors.rank == layer.r["default"]
        assert factors.scaling == layer.scaling["default"]
        delta = layer.get_delta_weight("default")
        expected = factors.delta() if delta.shape == factors.delta().shape else factors.delta().T
        torch.testing.assert_close(delta, expected)
    assert {path for path, layer in modules.items() if hasattr(layer, "lora_A")} == value.factors.keys()

    write_adapter(value, tmp_path / "ours")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    extra = {name for name in theirs if "original_module" in name or ".modules_to_save." in name}
    assert ours.keys() == theirs.keys() - extra
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "ours")
        loaded = peft.get_peft_model_state_dict(again)
    assert all(torch.equal(loaded[name], theirs[name]) for name in theirs if name not in extra)
    model.eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    assert torch.equal(model(ids).logits, again.eval()(ids).logits)


def test_a_fused_slice_is_dense_for_peft(tmp_path):
    peft = pytest.importorskip("peft")
    parts = [
        (Block("q", (range(8),)), torch.randn(2, 8), torch.randn(8, 2)),
        (Block("v", (range(16, 24),)), torch.randn(2, 8), torch.randn(8, 2)),
    ]
    fused = Factors.stack(parts, out_features=24, alpha=4.0)
    value = AdapterValue(
        LoRAConfig(r=2, alpha=4, target_modules=["q", "v"], fan_in_fan_out=True, task_type="CAUSAL_LM"),
        {"transformer.h.0.attn.c_attn": fused},
    )
    write_adapter(value, tmp_path)
    model = peft.PeftModel.from_pretrained(tiny("gpt2"), tmp_path)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    torch.testing.assert_close(layer.get_delta_weight("default"), fused.delta().T)
    assert not hasattr(model.base_model.model.transformer.h[1].attn.c_attn, "lora_A")
    assert read_adapter(tmp_path).factors["transformer.h.0.attn.c_attn"].equal(fused)


def test_rows_of_tokens_are_those_that_the_config_names(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1])
    peft.get_peft_model(tiny("llama"), config).save_pretrained(tmp_path)
    assert read_adapter(tmp_path).modules.keys() == {"model.embed_tokens"}
    path = tmp_path / store.CONFIG_NAME
    written = json.loads(path.read_text())
    for wrong in (None, [1, 2], {"lm_head": [1]}):
        path.write_text(json.dumps(written | {"trainable_token_indices": wrong}))
        with pytest.raises(LoRAFileError, match="token"):
            read_adapter(tmp_path)
    tensors = {name: t for name, t in load_file(tmp_path / store.WEIGHTS_NAME).items() if "token" not in name}
    path.write_text(json.dumps(written))
    save_file(tensors, tmp_path / store.WEIGHTS_NAME)
    with pytest.raises(LoRAFileError, match="no rows of tokens"):
        read_adapter(tmp_path)


def test_names_with_an_adapter_in_them(tmp_path):
    value = adapter()
    named = {name.replace(".weight", ".default.weight"): tensor for name, tensor in to_state_dict(value).items()}
    assert same_tensors(from_state_dict(value.config, named), value)
    named["base_model.model.head.modules_to_save.default.weight"] = torch.ones(2, 2)
    assert list(from_state_dict(value.config, named).modules) == ["head"]
    named["base_model.model.h.1.q.lora_A.other.weight"] = torch.ones(2, 4)
    named["base_model.model.h.1.q.lora_B.other.weight"] = torch.ones(3, 2)
    with pytest.raises(LoRAFileError, match="default, other"):
        from_state_dict(value.config, named)


# -- the corpus --------------------------------------------------------------------------------------------------------


@needs_corpus
@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda path: path.name)
def test_corpus(folder, tmp_path):
    fields = json.loads((folder / store.CONFIG_NAME).read_text())
    if fields["peft_type"] != "LORA":
        with pytest.raises(LoRAUnsupportedError, match=fields["peft_type"]):
            read_adapter(folder, allow_pickle=True)
        return
    files = [path for path in folder.iterdir() if path.suffix != ".json"]
    if files[0].suffix == ".bin":
        with pytest.raises(LoRAFileError, match="allow_pickle=True"):
            read_adapter(folder)
        published = torch.load(files[0], weights_only=True, map_location="cpu")
    else:
        published = load_file(files[0])
    value = read_adapter(folder, allow_pickle=True)
    mine = to_state_dict(value)
    assert mine.keys() == published.keys()
    assert all(torch.equal(mine[name], published[name]) for name in mine)
    assert {factors.scaling for factors in value.factors.values()} == {fields["lora_alpha"] / fields["r"]}
    write_adapter(value, tmp_path)
    assert same_tensors(read_adapter(tmp_path), value)


# -- the pair ----------------------------------------------------------------------------------------------------------


def test_metadata(tmp_path):
    write_adapter(adapter(), tmp_path)
    with safe_open(tmp_path / store.WEIGHTS_NAME, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert len(metadata["hf_lora.config_sha256"]) == 64


@pytest.mark.parametrize("field", [{"r": 2, "lora_alpha": 17}, {"use_rslora": True}, {"alpha_pattern": {"q": 1}}])
def test_a_torn_pair_is_seen(field, tmp_path):
    write_adapter(adapter(), tmp_path)
    path = tmp_path / store.CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    with pytest.raises(LoRAFileError, match="not saved together"):
        read_adapter(tmp_path)


def test_a_hand_edited_base_name_still_loads(tmp_path):
    write_adapter(adapter(), tmp_path)
    path = tmp_path / store.CONFIG_NAME
    fields = json.loads(path.read_text()) | {"base_model_name_or_path": "D:\\base", "lora_dropout": 0, "revision": "x"}
    path.write_bytes(json.dumps(fields, indent=4).replace("\n", "\r\n").encode("utf-8-sig"))
    assert read_adapter(tmp_path).config.base_model == "D:\\base"


def test_peft_may_overwrite_ours(tmp_path):
    write_adapter(adapter(), tmp_path)
    save_file(to_state_dict(adapter(seed=5)), tmp_path / store.WEIGHTS_NAME, {"format": "pt"})
    assert same_tensors(read_adapter(tmp_path), adapter(seed=5))


def test_a_link_in_a_cache_is_replaced_not_followed(tmp_path):
    write_adapter(adapter(), tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in (store.CONFIG_NAME, store.WEIGHTS_NAME):
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / name)
    assert read_adapter(tmp_path / "snapshot").equal(adapter())
    write_adapter(adapter(seed=9), tmp_path / "snapshot")
    assert read_adapter(tmp_path / "blobs").equal(adapter())
    assert read_adapter(tmp_path / "snapshot").equal(adapter(seed=9))


def old_pair(folder, kind):
    """The adapter that was there before: none, ours, PEFT's, or PEFT's pickle."""
    value = adapter(seed=20, alpha=4.0) if kind == "ours" else adapter(seed=30)
    if kind == "nothing":
        return None
    if kind == "ours":
        value = AdapterValue(value.config, {path: pair(seed=i, alpha=4.0) for i, path in enumerate(value.factors)})
        write_adapter(value, folder)
        return value
    (folder / store.CONFIG_NAME).write_text(json.dumps(value.config.to_peft()))
    if kind == "pickle":
        torch.save(to_state_dict(value), folder / store.PICKLE_NAME)
    else:
        save_file(to_state_dict(value), folder / store.WEIGHTS_NAME, {"format": "pt"})
    return value


class Chunked:
    """A file whose every 199 bytes are a system call of their own."""

    def __init__(self, file, step):
        self._file, self.fileno, self._step = file, file.fileno, step

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def flush(self):
        pass

    def write(self, data):
        data = bytes(data)
        for start in range(0, len(data), 199):
            self._step()
            self._file.write(data[start : start + 199])


def killed_at(step, folder, value):
    """Write in a child process that dies before its `step`-th write, fsync, rename or removal; False: it had fewer."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        return status == 9
    count = itertools.count()

    def one_step():
        if next(count) == step:
            os._exit(9)

    def stepping(call):
        def stepped(*args, **kwargs):
            one_step()
            return call(*args, **kwargs)

        return stepped

    try:
        store.open = lambda path, mode: Chunked(open(path, mode, buffering=0), one_step)  # noqa: SIM115
        os.replace, os.fsync, Path.unlink = stepping(os.replace), stepping(os.fsync), stepping(Path.unlink)
        write_adapter(value, folder)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("kind", ["nothing", "ours", "peft", "pickle"])
def test_a_kill_anywhere_leaves_the_old_adapter_or_the_new_one(kind, tmp_path):
    new, newer = adapter(seed=1, base_model="new"), adapter(seed=2, alpha=16.0, base_model="newer")

    def state(folder, *candidates):
        try:
            value = read_adapter(folder, allow_pickle=True)
        except LoRAFileError:
            if None in candidates and not (folder / store.WEIGHTS_NAME).exists():
                return None
            raise
        found = [c for c in candidates if c is not None and value.equal(c)]
        assert len(found) == 1, "a mixture"
        assert read_config(folder) == found[0].config
        return found[0]

    seen = set()
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        old = old_pair(folder, kind)
        died = killed_at(step, folder, new)
        after = state(folder, old, new)
        seen.add(after is new)
        # Killed again, while the next write cleans up after the first …
        died_again = killed_at(step % 5, folder, newer)
        assert died_again
        after = state(folder, after, newer)
        # … and the one after that leaves nothing behind.
        write_adapter(newer, folder)
        assert state(folder, newer) is newer
        left = {path.name for path in folder.iterdir()} - {store.PICKLE_NAME}
        assert left == {store.CONFIG_NAME, store.WEIGHTS_NAME}
        if not died:
            break
    assert seen == {False, True}
    assert step > 15


def test_a_failing_write_leaves_the_old_files_and_nothing_else(tmp_path, monkeypatch):
    write_adapter(adapter(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = os.fsync
    for failing in range(2):
        count = itertools.count()

        def full(handle, failing=failing, count=count):
            if next(count) == failing:
                raise OSError(28, "No space left on device")
            return real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(LoRAFileError, match="No space left") as caught:
                write_adapter(adapter(seed=8), tmp_path)
        assert isinstance(caught.value.__cause__, OSError)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(LoRAFileError, match="cannot be saved"):
        write_adapter(adapter(), tmp_path / "file")
    (tmp_path / store.CONFIG_NAME).mkdir()
    with pytest.raises(LoRAFileError, match="is a folder"):
        write_adapter(adapter(), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_data_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    """Against power loss: each file is synced before its rename, and the pending config before the weights."""
    steps = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        steps.append(("fsync", os.readlink(f"/proc/self/fd/{handle}").rsplit("/", 1)[-1].rsplit(".", 1)[-1]))
        return fsync(handle)

    def replaced(source, target):
        steps.append(("replace", Path(target).name))
        return replace(source, target)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to name a handle")
    folder = tmp_path / "folder"
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_adapter(adapter(), folder)
    assert steps == [
        ("fsync", "safetensors"),
        ("fsync", "json"),
        ("replace", ".adapter_config.json.pending"),
        ("fsync", "folder"),
        ("replace", store.WEIGHTS_NAME),
        ("fsync", "folder"),
        ("replace", store.CONFIG_NAME),
        ("fsync", "folder"),
    ]


def test_readers_beside_a_writer_see_whole_adapters(tmp_path):
    import threading

    values = [adapter(seed=1, base_model="one"), adapter(seed=2, base_model="two")]  # digests of the configs are equal
    rslora = adapter(use_rslora=True)
    factors = {path: pair(seed=7, use_rslora=True) for path in rslora.factors}
    values.append(AdapterValue(rslora.config, factors))
    write_adapter(values[0], tmp_path)
    done = threading.Event()

    def write():
        for i in range(60):
            write_adapter(values[i % 3], tmp_path)
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    try:
        while not done.is_set():
            found = read_adapter(tmp_path)
            assert sum(found.equal(value) for value in values) == 1
    finally:
        thread.join()
