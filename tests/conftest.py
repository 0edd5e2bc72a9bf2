"""Isolation of every test, tiny models, shared data, and the modes of a run.

Environment:
    HF_LORA_SHARED: folder with the adapter corpus and data sets; default ../shared beside the repository.
    HF_LORA_BLOCK_PEFT=1: peft cannot be imported or found, as if it were not installed.
    HF_LORA_OLDEST=1: the run is against the oldest supported transformers; newer features may be skipped.
    CI=true: a skipped test is a failure, but for the reasons in `ALLOWED_SKIPS` and in the two modes above.
"""

from __future__ import annotations

import concurrent.futures.thread
import copy
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

BLOCK_PEFT = os.environ.get("HF_LORA_BLOCK_PEFT") == "1"
OLDEST = os.environ.get("HF_LORA_OLDEST") == "1"
STRICT = os.environ.get("CI") == "true" and not (BLOCK_PEFT or OLDEST)
ALLOWED_SKIPS = ("needs a CUDA device",)

# Files that test the project rather than the package: no need to run them against an old transformers or without peft.
NOT_CORE = {
    "test_analysis.py",  # values, as the next
    "test_any_module.py",  # mostly models outside of transformers
    "test_architectures_sweep.py",
    "test_arithmetic.py",  # values, which know no transformers
    "test_benchmarks.py",
    "test_card.py",
    "test_ci.py",
    "test_conv.py",  # this and test_multihead.py: layers of torch
    "test_cli.py",
    "test_cli_analyze.py",
    "test_cli_formats.py",
    "test_cli_hub.py",
    "test_cli_info.py",
    "test_cli_train.py",
    "test_distributed.py",
    "test_demo.py",
    "test_demo_page.py",
    "test_demo_space.py",
    "test_docs.py",
    "test_dropout.py",  # this, test_fused.py and test_functional.py: tensors alone
    "test_export.py",
    "test_experts.py",  # layouts of the tested release
    "test_export_hub.py",
    "test_facts.py",
    "test_file_faults.py",  # files and processes
    "test_functional.py",
    "test_fuzz.py",
    "test_fuzz_cases.py",
    "test_fused.py",
    "test_gguf.py",
    "test_golden.py",  # files
    "test_health.py",
    "test_hostile_files.py",  # files alone
    "test_hub.py",
    "test_import_table.py",
    "test_hotswap.py",  # this, test_ties.py and test_tokens.py: against PEFT and compiled, in the tested versions
    "test_importers.py",  # values, and formats of others
    "test_kohya.py",  # values, and formats of others
    "test_lightning.py",  # this and test_trl.py: installed in the tested versions only
    "test_local_hub.py",
    "test_multihead.py",
    "test_multimodal.py",  # the tested release's names, as test_rowmaps.py
    "test_package.py",
    "test_paper_methods.py",
    "test_paper_metrics.py",
    "test_paper_recipes.py",
    "test_patterns.py",  # strings alone
    "test_planning.py",  # a model of transformers before 5.6 with rotary positions does not run on meta
    "test_pool_soak.py",
    "test_qlora_recipe.py",
    "test_quantised_bases.py",  # bases that others quantised, in the tested versions
    "test_quickstart.py",
    "test_races.py",
    "test_recipe.py",
    "test_security.py",
    "test_serve.py",
    "test_space_adapters.py",
    "test_ties.py",
    "test_tokens.py",
    "test_trainer_features.py",
    "test_trainer_hub.py",
    "test_trainer_survival.py",
    "test_trl.py",
    "test_variants_matrix.py",
}

# What the oldest supported transformers (5.0.0) cannot show: part of a test's id -> why.
OLDEST_SKIPS = {
    "test_architectures.py::": "the layers written down there are the tested release's; older ones name some otherwise",
    "test_rowmaps.py::": "the scenes are of the tested release's architectures and arguments",
    "[mpt]": "transformers 5.0 itself cannot run MPT in float64",
    "[qwen2_vl vision]": "transformers 5.0 gives the vision tower the whole model's type, so roles stay out of it",
    "[qwen2_5_vl vision]": "transformers 5.0 gives the vision tower the whole model's type, so roles stay out of it",
    "[chunked prefill]": "transformers 5.0 makes its cache too late for a prefill in chunks",
    "[prefill in chunks]": "transformers 5.0 makes its cache too late for a prefill in chunks",
    "[prompt lookup]": "transformers 5.0 looks for an end token there, and the model has none",
    "[the rest of the prompt]": "transformers 5.0 itself goes on wrongly from the rest of a prompt",
    "test_continuous_batching": "transformers 5.0 configures continuous batching otherwise",
    "test_transformers_routers_that_derive_from_linear": "transformers 5.0 has no deepseek_v4",
}


def block_peft() -> None:
    """Hide peft from `import`, from `importlib.util.find_spec` and from the installed distributions."""
    import importlib.metadata

    assert "peft" not in sys.modules, "peft was imported before it could be blocked"
    sys.modules["peft"] = None  # type: ignore[assignment]  # `import peft` raises, find_spec gives None
    from_name = importlib.metadata.Distribution.from_name.__func__  # type: ignore[attr-defined]

    def hidden(cls: Any, name: str) -> Any:
        if name.lower() == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return from_name(cls, name)

    importlib.metadata.Distribution.from_name = classmethod(hidden)  # type: ignore[assignment,method-assign]


if BLOCK_PEFT:
    block_peft()

pytest_plugins = ["hub.fixture"]  # the fixture `hub`

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# Two workers on two cores must not each start two threads for every small matrix product.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))


# ---- which tests run -------------------------------------------------------------------------------------------------


def pytest_report_header() -> list[str]:
    import transformers

    modes = [name for name, on in {"peft blocked": BLOCK_PEFT, "oldest": OLDEST, "strict skips": STRICT}.items() if on]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return [f"hf_lora: {versions}, {', '.join(modes) or 'plain'}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name not in NOT_CORE and item.get_closest_marker("slow") is None:
            item.add_marker("core")
        for part, reason in OLDEST_SKIPS.items():
            if OLDEST and part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _refuse_skip(report: Any) -> None:
    if not (STRICT and report.outcome == "skipped") or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not reason.removeprefix("Skipped: ").startswith(ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"CI=true: a test that does not run is a failure. It was skipped with: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[Any]:
    report = yield
    _refuse_skip(report)
    return report


# ---- isolation -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    """Same seeds before every test; afterwards nothing of it may be left: overrides, threads, graphs, registration."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads, flags = set(threading.enumerate()), _registered()
    yield
    if (utils := sys.modules.get("torch._dynamo.utils")) is not None and utils.counters:
        sys.modules["torch._dynamo"].reset()
        utils.counters.clear()
    state = sys.modules.get("hf_lora.state")
    if state is not None:
        assert not state._OVERRIDES.get(), "the test left a use_lora, no_lora or route_lora open"
    left = [t for t in threading.enumerate() if t not in threads and not t.daemon and not _pooled(t)]
    for thread in left:
        thread.join(timeout=10)
    left = [t for t in left if t.is_alive()]
    assert not left, f"the test left threads running: {left}"
    assert flags is None or _registered() == flags, "the test left hf_lora registered otherwise than it found it"


def _pooled(thread: threading.Thread) -> bool:
    """Whether it is a worker of an executor: transformers' loading and inductor keep theirs."""
    return getattr(thread, "_target", None) is concurrent.futures.thread._worker  # type: ignore[attr-defined]


def _registered() -> bool | None:
    module = sys.modules.get("hf_lora")
    transformers = sys.modules.get("transformers.modeling_utils")
    return None if module is None or transformers is None else hasattr(transformers.PreTrainedModel, "add_lora")


# ---- what tests use --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the adapter corpus and the data sets."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("HF_LORA_SHARED", root.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} does not exist; set HF_LORA_SHARED")
    return folder


@pytest.fixture
def peft() -> Any:
    """The package peft, as an oracle. Only a run with peft blocked, or an old environment without it, skips."""
    if BLOCK_PEFT:
        pytest.skip("peft is blocked in this run")
    return pytest.importorskip("peft", reason="peft is not installed: install hf_lora[test]")


# name -> (class of the config, class of the model, the config's fields)
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SMALL = {**_SIZES, "vocab_size": 64}
_BERT = {**_SMALL, "max_position_embeddings": 64}
_BERT3 = {**_BERT, "num_labels": 3}
_LLAMA = {**_SMALL, **_IDS, "num_key_value_heads": 2, "max_position_embeddings": 64}
_NEOX = {**_SMALL, **_IDS, "max_position_embeddings": 64}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "pad_token_id": 0}
_GPT2 = {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 64}
_BLOOM = {**_IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
_OPT = {**_SMALL, **_IDS, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
_VIT = {**_SIZES, "image_size": 16, "patch_size": 4}
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA),
    "llama-tied": ("LlamaConfig", "LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "llama-cls": ("LlamaConfig", "LlamaForSequenceClassification", {**_LLAMA, "num_labels": 3}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _LLAMA),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_LLAMA, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_LLAMA, "head_dim": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _LLAMA),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _NEOX),
    "bloom": ("BloomConfig", "BloomForCausalLM", _BLOOM),
    "opt": ("OPTConfig", "OPTForCausalLM", _OPT),
    "bert": ("BertConfig", "BertModel", _BERT),
    "bert-cls": ("BertConfig", "BertForSequenceClassification", _BERT3),
    "bert-token": ("BertConfig", "BertForTokenClassification", _BERT3),
    "t5": ("T5Config", "T5ForConditionalGeneration", {**_T5, "decoder_start_token_id": 0}),
    "vit-cls": ("ViTConfig", "ViTForImageClassification", {**_VIT, "num_labels": 3}),
}


@pytest.fixture(scope="session")
def _built() -> dict[tuple[str, int], Any]:
    return {}


@pytest.fixture
def tiny(_built: dict[tuple[str, int], Any]) -> Callable[..., Any]:
    """`tiny("llama")`: a random model of two layers (fp32, CPU, eval): a fresh copy, the same for a seed."""

    def build(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        key = (name, seed)
        if key not in _built:
            import transformers

            config_name, model_name, fields = TINY[name]
            config = getattr(transformers, config_name)(**fields)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = getattr(transformers, model_name)(config)
                for parameter_name, parameter in model.named_parameters():  # zero biases and unit norms hide mistakes
                    if parameter_name.endswith("bias") or "norm" in parameter_name.lower():
                        parameter.data.add_(0.1 * torch.randn_like(parameter))
            _built[key] = model.eval()
        return copy.deepcopy(_built[key]).to(dtype)

    return build


@pytest.fixture
def batch() -> Callable[..., dict[str, torch.Tensor]]:
    """`batch(model)`: inputs that the tiny model takes, with its own generator (no global randomness)."""

    def make(model: Any, rows: int = 2, length: int = 7, *, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        config = model.config
        if model.main_input_name == "pixel_values":
            size = (rows, config.num_channels, config.image_size, config.image_size)
            return {"pixel_values": torch.randn(size, generator=generator).to(model.dtype)}
        vocab = config.get_text_config().vocab_size
        ids = torch.randint(3, vocab, (rows, length), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(3, vocab, (rows, length), generator=generator)
        return inputs

    return make
