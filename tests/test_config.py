"""`LoRAConfig` refuses what is impossible, and says the same as PEFT about everything else."""

from __future__ import annotations

import copy
import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_lora.config import LoRAConfig
from hf_lora.errors import LoRAConfigError, LoRAError, LoRAUnsupportedError

SHARED = Path(os.environ.get("HF_LORA_SHARED", Path(__file__).parents[2] / "shared"))
CONFIGS = sorted((SHARED / "peft-corpus" / "configs").glob("*.json"))
needs_corpus = pytest.mark.skipif(
    not CONFIGS, reason="no adapter corpus: set HF_LORA_SHARED to the folder that holds it"
)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("r", bad) for bad in (0, -1, 8.0, "8", True, None)],
        *[("alpha", bad) for bad in (0, -1.0, float("nan"), float("inf"), "16", True)],
        *[("dropout", bad) for bad in (1, 1.0, -0.1, float("nan"), "0.1", True, None)],
        *[("use_rslora", bad) for bad in (1, "true", None)],
        *[("bias", bad) for bad in ("lora", None, "None", True)],
        *[("init", bad) for bad in ("pissa_niter_0", True, None, "kaming")],
        *[("init_options", bad) for bad in ({"rho": 2.0}, 3, [])],
        *[
            ("target_modules", bad)
            for bad in ([], "", "  ", ["q", ""], ["q", 3], ["q", "q"], 3, "*proj", b"q", {"q": 1})
        ],
        *[("exclude_modules", bad) for bad in ("(", [None], 3, "", ["q", "q"])],
        *[("layers_to_transform", bad) for bad in (-1, True, [], [1, 1], [1.0], "1", ["1"])],
        *[("modules_to_save", bad) for bad in ("classifier", [1], ["a", "a"], [""])],
        *[("rank_pattern", bad) for bad in ([], {"q": 0}, {"q": 2.0}, {1: 2}, {"(": 2}, {"": 2}, None, {"q": True})],
        *[("alpha_pattern", bad) for bad in ({"q": 0}, {"q": float("inf")}, {"[": 2}, "q")],
        *[(name, 3) for name in ("task_type", "base_model", "revision")],
        *[("peft_fields", bad) for bad in ({"r": 3}, {"peft_type": "LORA"}, {1: 2}, [])],
    ],
)
def test_impossible_values_are_refused_and_quoted(field, value):
    with pytest.raises(LoRAConfigError) as caught:
        LoRAConfig(**{field: value})
    message = str(caught.value)
    assert field in message or field == "peft_fields"
    quoted = value if not isinstance(value, (list, dict)) else None
    assert quoted is None or repr(quoted) in message or str(quoted) in message
    assert isinstance(caught.value, ValueError)


def test_combinations():
    with pytest.raises(LoRAConfigError, match="layers_to_transform"):
        LoRAConfig(target_modules=["q"], layers_pattern="h")
    with pytest.raises(LoRAConfigError, match="cannot be combined"):
        LoRAConfig(target_modules="all-linear", layers_to_transform=[1])


@pytest.mark.parametrize(
    ("keyword", "value", "named"),
    [
        ("lora_alpha", 16, "alpha=16"),
        ("lora_dropout", 0.1, "dropout=0.1"),
        ("init_lora_weights", True, "init='kaiming'"),
        ("base_model_name_or_path", "gpt2", "base_model='gpt2'"),
        ("targt_modules", ["q"], "Did you mean target_modules"),
        ("rank", 8, "rank_pattern"),
        ("lora_alfa", 8, "alpha"),
        ("arrow_config", {}, "does not compute"),
        ("zzz", 1, "The fields are"),
    ],
)
def test_unknown_keywords_name_the_one_that_was_meant(keyword, value, named):
    with pytest.raises(LoRAConfigError) as caught:
        LoRAConfig(**{keyword: value})
    assert named in str(caught.value)
    assert repr(value) in str(caught.value)


def test_by_position_is_refused():
    with pytest.raises(LoRAConfigError, match="keywords only"):
        LoRAConfig(8)


def test_it_is_a_value():
    config = LoRAConfig(target_modules=["q", "v"], rank_pattern={"q": 4}, peft_fields={"x": [1]})
    assert config.target_modules == ("q", "v")
    with pytest.raises(AttributeError):
        config.r = 3
    with pytest.raises(TypeError):
        config.rank_pattern["q"] = 5
    for twin in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.replace()):
        assert twin == config
    assert config.replace(r=4).r == 4
    with pytest.raises(LoRAConfigError, match="no field"):
        config.replace(rr=4)


def test_rank_alpha_scaling():
    config = LoRAConfig(r=8, alpha=16, rank_pattern={"q": 4, r"^a\.v": 2}, alpha_pattern={r"h\.\d+\.q": 3})
    assert [config.rank_for(p) for p in ("h.0.q", "hq", "a.v", "b.a.v")] == [4, 8, 2, 8]
    assert [config.alpha_for(p) for p in ("x.h.0.q", "q")] == [3, 16]
    assert config.scaling_for("h.0.q") == 3 / 4
    assert LoRAConfig(r=16).scaling_for("x") == 1
    assert LoRAConfig(r=16, alpha=8, use_rslora=True).scaling_for("x") == 2


# -- PEFT --------------------------------------------------------------------------------------------------------------


def test_to_peft_has_exactly_pefts_fields_and_peft_takes_them_without_a_warning():
    peft = pytest.importorskip("peft")
    written = LoRAConfig(target_modules=["v", "q"], alpha=16, task_type="CAUSAL_LM").to_peft()
    assert json.loads(json.dumps(written)) == written
    assert list(written) == sorted(written)
    assert set(written) == set(peft.LoraConfig().to_dict())
    assert written["target_modules"] == ["q", "v"]
    assert written["inference_mode"] is True
    assert type(written["lora_alpha"]) is int
    fields = {name: value for name, value in written.items() if name != "peft_type"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.LoraConfig(**fields)
    assert theirs.to_dict() == {**written, "target_modules": {"q", "v"}}


def test_the_defaults_are_pefts():
    peft = pytest.importorskip("peft")
    from hf_lora.config import PEFT_DEFAULTS

    theirs = peft.LoraConfig().to_dict() | {"peft_version": None}
    assert {name: getattr(value, "value", value) for name, value in theirs.items()} == PEFT_DEFAULTS


def test_a_peft_config_is_accepted():
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["v", "q"], task_type=peft.TaskType.CAUSAL_LM)
    ours = LoRAConfig.from_peft(theirs)
    assert (ours.r, ours.alpha, ours.target_modules, ours.task_type) == (4, 12.0, ("q", "v"), "CAUSAL_LM")
    assert ours.unsupported() == {}
    with pytest.raises(LoRAUnsupportedError, match="LOHA"):
        LoRAConfig.from_peft(peft.LoHaConfig())
    with pytest.raises(LoRAConfigError, match="neither"):
        LoRAConfig.from_peft(3)


def test_absent_fields_have_pefts_defaults_which_are_not_ours():
    config = LoRAConfig.from_peft({"peft_type": "LORA"})
    assert (config.r, config.alpha, config.dropout, config.bias, config.init) == (8, 8.0, 0.0, "none", "kaiming")
    assert LoRAConfig.from_peft({"peft_type": "LORA", "r": 64}).alpha == 8.0


@pytest.mark.parametrize(
    ("fields", "error", "named"),
    [
        ({"peft_type": "ADALORA"}, LoRAUnsupportedError, "ADALORA"),
        ({"peft_type": "lora"}, LoRAUnsupportedError, "lora"),
        ({"lora_parameters": {}, "num_layers": 4}, LoRAConfigError, "mlx-lm"),
        ({"model_class": "B", "model_type": "bert", "config": {}}, LoRAConfigError, "AdapterHub"),
        ({"base_model": "x"}, LoRAConfigError, "peft_type"),
        ({}, LoRAConfigError, "peft_type"),
        ({"peft_type": "LORA", "r": None}, LoRAConfigError, "r=None"),
        ({"peft_type": "LORA", "r": "8"}, LoRAConfigError, "'8'"),
        ({"peft_type": "LORA", "lora_alpha": 0}, LoRAConfigError, "alpha=0"),
        ({"peft_type": "LORA", "target_modules": []}, LoRAConfigError, "target_modules=[]"),
        ({"peft_type": "LORA", "target_modules": "(q"}, LoRAConfigError, "(q"),
        ({"peft_type": "LORA", "init_lora_weights": 3}, LoRAConfigError, "init_lora_weights=3"),
    ],
)
def test_other_files_are_named(fields, error, named):
    with pytest.raises(error) as caught:
        LoRAConfig.from_peft(fields)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "odd",
    [
        {"peft_version": "0.19.2.dev0@UNKNOWN"},
        {"auto_mapping": {"base_model_class": "X", "flag": True}},
        {"lora_dropout": 0},
        {"target_modules": None},
        {"target_modules": r".*\.q_proj"},
        {"target_modules": ["q", "q"]},
        {"modules_to_save": ["classifier", "score", "classifier", "score"]},
        {"base_model_name_or_path": "C:\\models\\llama"},
        {"base_model_name_or_path": ""},
        {"layers_to_transform": 3, "target_modules": ["q"]},
        {"layers_to_transform": [3, 4], "layers_pattern": "h", "target_modules": ["q"]},
        {"layers_to_transform": []},
        {"enable_lora": None, "merge_weights": False},
        {"rank_pattern": None, "fan_in_fan_out": None},
        {"megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}},
        {"runtime_config": {"ephemeral_gpu_offload": False}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"a_future_switch": False},
    ],
)
def test_oddities_that_compute_a_plain_lora(odd):
    config = LoRAConfig.from_peft({"peft_type": "LORA", **odd})
    assert config.unsupported() == {}
    assert LoRAConfig.from_peft(json.loads(json.dumps(config.to_peft()))) == config


@pytest.mark.parametrize(
    "fields",
    [
        *[{"init_lora_weights": name} for name in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "new")],
        {"arrow_config": {"top_k": 3}},
        {"enable_lora": [True, False, True]},
        {"a_future_field": 0},
        {"a_future_field": "x"},
    ],
)
def test_what_changes_the_computation_is_named(fields):
    config = LoRAConfig.from_peft({"peft_type": "LORA", **fields})
    assert config.unsupported() == fields
    with pytest.raises(LoRAUnsupportedError) as caught:
        config.require_supported()
    name, value = next(iter(fields.items()))
    assert f"{name}={value!r}" in str(caught.value)
    assert LoRAConfig.from_peft(config.to_peft()) == config


@needs_corpus
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem[:60])
def test_corpus(path):
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get("peft_type") == "LORA":
        config = LoRAConfig.from_peft(fields)
        assert LoRAConfig.from_peft(config.to_peft()) == config
        assert config.unsupported() == {}
        rewritten = config.to_peft()
        for name in set(fields) - {"peft_version", "inference_mode"}:
            ours, theirs = rewritten.get(name), fields[name]
            if isinstance(theirs, list):
                ours, theirs = sorted(ours or []), sorted(set(theirs))
            assert ours == theirs, name
    else:
        with pytest.raises(LoRAError) as caught:
            LoRAConfig.from_peft(fields)
        assert str(fields.get("peft_type") or "peft_type") in str(caught.value)


names = st.text("abq_.", min_size=1, max_size=6).filter(lambda name: name.strip())
configs = st.builds(
    LoRAConfig,
    r=st.integers(1, 512),
    target_modules=st.none() | st.just("all-linear") | st.lists(names, min_size=1, max_size=4, unique=True),
    alpha=st.floats(1e-3, 1e4),
    dropout=st.floats(0, 0.99),
    use_rslora=st.booleans(),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    exclude_modules=st.none() | st.lists(names, min_size=1, max_size=2, unique=True),
    rank_pattern=st.dictionaries(names, st.integers(1, 64), max_size=3),
    alpha_pattern=st.dictionaries(names, st.floats(1e-3, 1e4), max_size=3),
    modules_to_save=st.none() | st.lists(names, max_size=3, unique=True),
    init=st.sampled_from(["kaiming", "gaussian", "off"]),
    task_type=st.none() | st.just("CAUSAL_LM"),
    base_model=st.none() | st.text(max_size=9),
    fan_in_fan_out=st.booleans(),
    peft_fields=st.dictionaries(st.just("future"), st.integers() | st.none() | st.lists(st.booleans()), max_size=1),
)


@given(configs)
def test_round_trip_through_json(config):
    back = LoRAConfig.from_peft(json.loads(json.dumps(config.to_peft())))

    def in_order(value):
        return tuple(sorted(value)) if isinstance(value, tuple) else value

    changes = {name: in_order(getattr(config, name)) for name in ("target_modules", "exclude_modules")}
    assert back == config.replace(**changes)
