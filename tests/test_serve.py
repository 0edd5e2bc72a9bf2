"""A deployment on Ray Serve: its parts without Ray, then the whole on a real local one."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import merged
from pools import MLP, QV, merged_base, random_value, write_folder
from smallbase import save_base, tokenizer

from hf_lora import (
    LoRAConfigError,
    LoRAError,
    LoRAFileError,
    LoRAHubError,
    LoRAMismatchError,
    LoRANameError,
    LoRAPoolError,
    LoRAStateError,
    LoRAUnsupportedError,
)
from hf_lora.serve import build
from hf_lora.serve.answers import Completion, refusal
from hf_lora.serve.app import app
from hf_lora.serve.engine import Engine, Row, cut, groups, left_padded
from hf_lora.serve.requests import Ask, read_ask
from hf_lora.serve.settings import Limits, Settings

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ("w3 w4 w5", "w9", "w30 w31 w32 w33 w34 w35 w36", "w50 w7")


@pytest.fixture
def base(tiny, tmp_path) -> tuple[Any, Path, Path]:
    """A base, its folder, and a folder with four adapters and a broken one."""
    model = tiny("llama")
    folder = save_base(model, tmp_path / "base")
    values = {
        name: random_value(model, seed, rank=1 + seed, targets=(QV, MLP)[seed % 2], scale=0.6)
        for seed, name in enumerate(("anna", "ben", "carla", "dora"))
    }
    adapters = tmp_path / "adapters"
    write_folder(adapters, model, {**values, "broken": values["anna"]})
    weights = adapters / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    return model, folder, adapters


@torch.no_grad()
def alone(model: Any, adapters: Path, adapter: str | None, prompt: str, count: int) -> str:
    """What the prompt is continued with: W + s B A by hand in float64, token by token, no cache, no batch."""
    words, alone = tokenizer(), merged_base(model) if adapter is None else merged(model, adapters / adapter)
    ids = words(prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, alone(ids).logits[:, -1:].argmax(-1)], dim=1)
        if int(ids[0, -1]) == words.eos_token_id:
            break
    return words.decode(ids[0, start:], skip_special_tokens=True)


# ---- a request -------------------------------------------------------------------------------------------------------

LIMITS = Limits("org/base", 32, 1000)


@pytest.mark.parametrize(
    ("body", "routed", "ask"),
    [
        ({"prompt": "a"}, "", Ask("a", None, 16)),
        ({"prompt": "a", "model": "org/base", "max_tokens": 32}, "", Ask("a", None, 32)),
        ({"prompt": "a", "model": "anna", "temperature": 0.0, "n": 1, "stream": False}, "", Ask("a", "anna", 16)),
        ({"prompt": "a", "model": None, "max_tokens": None}, "anna", Ask("a", "anna", 16)),
        ({"prompt": "a", "model": "anna"}, "anna", Ask("a", "anna", 16)),
    ],
)
def test_a_request_is_read(body, routed, ask):
    assert read_ask(body, LIMITS, routed) == ask


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (["a"], "body"),
        ({}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 33}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "8"}, "max_tokens"),
        ({"prompt": "a", "model": ""}, "model"),
        ({"prompt": "a", "model": 1}, "model"),
        ({"prompt": "a", "max_token": 8}, "max_token"),
        ({"prompt": "a", "stream": True}, "stream"),
        ({"prompt": "a", "n": 2}, "n"),
        ({"prompt": "a", "n": True}, "n"),
        ({"prompt": "a", "temperature": 0.7}, "temperature"),
    ],
)
def test_a_wrong_request_is_refused_by_its_field(body, field):
    with pytest.raises(LoRAConfigError) as caught:
        read_ask(body, LIMITS)
    assert caught.value.name == field


def test_a_request_without_max_tokens_is_never_over_the_limit():
    assert read_ask({"prompt": "a"}, Limits(None, 8, 1000)).max_tokens == 8


def test_a_header_and_a_body_must_not_name_two_adapters():
    with pytest.raises(LoRAConfigError) as caught:
        read_ask({"prompt": "a", "model": "anna"}, LIMITS, "ben")
    assert caught.value.name == "model"


def of_kind(cls: Any, kind: str, **more: Any) -> Any:
    error = cls("no")
    vars(error).update(kind=kind, **more)
    return error


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (LoRANameError("no"), 404, "adapter_not_found"),
        (of_kind(LoRAHubError, "missing repo"), 404, "adapter_not_found"),
        (of_kind(LoRAHubError, "gated"), 403, "adapter_forbidden"),
        (of_kind(LoRAHubError, "rate limited"), 503, "source_unavailable"),
        (of_kind(LoRAPoolError, "too large"), 422, "adapter_refused"),
        (of_kind(LoRAPoolError, "timeout"), 503, "overloaded"),
        (LoRAStateError("no"), 503, "unavailable"),
        (LoRAFileError("no"), 422, "adapter_refused"),
        (LoRAMismatchError("no"), 422, "adapter_refused"),
        (LoRAUnsupportedError("no"), 422, "adapter_refused"),
        (LoRAError("no"), 422, "adapter_refused"),
    ],
)
def test_every_error_has_a_status(error, status, kind):
    found = refusal(error)
    assert (found.status, found.kind) == (status, kind)
    assert found.body["error"]["message"] == "no"
    assert found.body["error"]["code"] == type(error).__name__


def test_a_refusal_says_when_to_ask_again():
    assert refusal(of_kind(LoRAHubError, "rate limited", retry_after=12.0)).headers == {"retry-after": "12"}
    assert refusal(LoRANameError("no")).headers == {}


@pytest.mark.parametrize(
    ("new", "most", "kept", "reason"),
    [
        ([5, 6, 7], 3, [5, 6, 7], "length"),
        ([5, 6, 7, 8], 2, [5, 6], "length"),
        ([5, 2, 0, 0], 4, [5, 2], "stop"),
        ([5, 6, 2], 2, [5, 6], "length"),
        ([2, 0], 2, [2], "stop"),
    ],
)
def test_an_answer_is_cut(new, most, kept, reason):
    assert cut(new, most, frozenset({2, 9})) == (kept, reason)


def test_a_batch_is_split_where_it_names_too_many_adapters():
    rows = ["a", None, "b", "a", "c", "b", None, "d", "e"]
    found = groups(rows, 2)
    assert sorted(i for group in found for i in group) == list(range(len(rows)))
    assert [{rows[i] for i in group} - {None} for group in found] == [{"a", "b"}, {"c", "d"}, {"e"}]
    assert groups([None, None], 1) == [[0, 1]]


def test_rows_end_where_new_tokens_begin():
    ids, mask = left_padded([[5], [6, 7, 8]], 0, torch.device("cpu"))
    assert ids.tolist() == [[0, 0, 5], [6, 7, 8]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("wrong", [{"max_batch_size": 0}, {"device_slots": True}, {"batch_wait_timeout_s": -1.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(LoRAConfigError) as caught:
        build("org/base", source=None, **wrong)
    assert caught.value.name in wrong


# ---- an engine, without Ray ------------------------------------------------------------------------------------------


@pytest.fixture
def engine(base):
    model, _, adapters = base
    made = Engine(Settings(lambda: (copy.deepcopy(model), tokenizer()), adapters, device_slots=2, max_prompt_tokens=8))
    yield made
    made.close()


def test_rows_of_a_batch_are_what_each_is_alone(engine, base):
    model, _, adapters = base
    asks = [
        Ask(prompt, adapter, 3 + 2 * i)
        for i, prompt in enumerate(PROMPTS)
        for adapter in ("anna", None, "ben", "carla", "dora", "nobody", "broken")
    ]
    answers = engine.complete([engine.encode(ask) for ask in asks])
    for ask, answer in zip(asks, answers, strict=True):
        if ask.adapter == "nobody":
            assert isinstance(answer, LoRANameError)
        elif ask.adapter == "broken":
            assert isinstance(answer, LoRAFileError)
        else:
            assert isinstance(answer, Completion)
            assert answer.text == alone(model, adapters, ask.adapter, ask.prompt, ask.max_tokens)
            assert answer.completion_tokens <= ask.max_tokens
    assert len({answer.text for answer in answers if isinstance(answer, Completion)}) > 10
    assert engine.mixed == engine.batches > 1
    assert engine.pool.metrics().leased == 0


def test_a_short_row_does_not_run_to_the_longest(engine, base, monkeypatch):
    """The one long row ends at its eos; the short ones have ended by then."""
    made = []
    generate = engine.model.generate

    def counting(ids: Any, **options: Any) -> Any:
        out = generate(ids, **options)
        made.append(out.shape[1] - ids.shape[1])
        return out

    monkeypatch.setattr(engine.model, "generate", counting)
    ids = engine.encode(Ask("w3 w4", None, 1)).ids
    first = engine.complete([Row(ids, None, 6)])[0]
    third = engine.tokenizer(first.text)["input_ids"][2]
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", third)
    monkeypatch.setattr(engine, "eos", frozenset({third}))
    long, short = engine.complete([Row(ids, None, 24), Row(ids, None, 2)])
    assert long.finish_reason == "stop"
    assert long.completion_tokens == made[-1] <= 3
    assert short.completion_tokens <= 2


def test_a_prompt_that_does_not_fit_is_refused(engine):
    for prompt in ("w3 " * 9, " "):
        with pytest.raises(LoRAConfigError) as caught:
            engine.encode(Ask(prompt, None, 4))
        assert caught.value.name == "prompt"
    engine.context = 10
    engine.encode(Ask("w3 " * 6, None, 4))
    with pytest.raises(LoRAConfigError):
        engine.encode(Ask("w3 " * 7, None, 4))


def test_an_encoder_decoder_is_refused(tiny):
    with pytest.raises(LoRAUnsupportedError, match="t5"):
        Engine(Settings(lambda: (tiny("t5"), tokenizer()), None))


# ---- without Ray -----------------------------------------------------------------------------------------------------


def test_nothing_needs_ray_until_a_deployment_is_built():
    """And the ingress, which forwards alone, brings no torch."""
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "import hf_lora.serve.ingress\n"
        "assert 'torch' not in sys.modules\n"
        "from hf_lora import LoRAUnsupportedError\n"
        "from hf_lora.serve import build\n"
        "try: build('org/base', source=None)\n"
        "except LoRAUnsupportedError as error: assert 'hf_lora[serve]' in str(error)\n"
        "else: raise SystemExit('it was built')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---- a real, local Ray -----------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Client:
    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def post(self, body: Any, path: str = "/v1/completions", **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_on_a_real_ray(base, tmp_path_factory, monkeypatch):
    """One test: a Ray takes long to start, and a module's fixture would be started by every process of the tests."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: install hf_lora[test]")
    import psutil

    settings = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "RAY_AUTH_MODE": "token",  # of its own: not in the user's home
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",  # on a machine that has much else to do
        "RAY_SERVE_MULTIPLEXED_MODEL_ID_MATCHING_TIMEOUT_S": "30",
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
        "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "30",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    import ray
    from ray import serve

    for module in ("api", "client"):  # no variable of the environment sets this one
        monkeypatch.setattr(f"ray.serve._private.{module}.HTTP_PROXY_TIMEOUT", 240)
    model, folder, adapters = base
    started: set[Any] = set()
    before, port = set(psutil.Process().children(recursive=True)), free_port()
    logs = tmp_path_factory.getbasetemp() / "ray"
    # A socket's path is at most 107 bytes long.
    short = {} if len(str(logs)) > 40 else {"_temp_dir": str(logs)}
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20, **short)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        made = app(
            {
                "base": str(folder),
                "source": str(adapters),
                "name": "base",
                "device_slots": "3",
                "max_batch_size": "8",
                "batch_wait_timeout_s": "0.2",
                "max_new_tokens": 8,
                "num_replicas": "2",
                "num_cpus": "1",
            }
        )
        handle = serve.run(made)
        client = Client(port)
        each_row_is_its_own(client, model, adapters)
        what_is_wrong_is_refused(client)
        a_handle_does_without_http(handle, model, adapters)
        ray_knows_who_has_which_adapter(client, adapters)
    finally:
        started |= set(psutil.Process().children(recursive=True)) - before
        serve.shutdown()
        ray.shutdown()
    assert len(started) > 4
    _, left = psutil.wait_procs(started, timeout=60)
    assert not left, f"processes are left: {left}"


def each_row_is_its_own(client: Client, model: Any, adapters: Path) -> None:
    """Concurrent requests for several adapters: every answer is that of its adapter alone; two adapters fail alone."""
    names = ("anna", "ben", None, "carla", "base", "nobody", "dora", "broken")
    asked = [(name, prompt, 2 + 2 * i) for i, prompt in enumerate(PROMPTS) for name in names]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda a: client.post({"model": a[0], "prompt": a[1], "max_tokens": a[2]}), asked))
    for (name, prompt, count), (status, answer) in zip(asked, answers, strict=True):
        if name in ("nobody", "broken"):
            expected = {"nobody": (404, "LoRANameError"), "broken": (422, "LoRAFileError")}[name]
            assert (status, answer["error"]["code"]) == expected
            assert name in answer["error"]["message"]
            continue
        assert status == 200, answer
        assert answer["model"] == (name or "base")
        adapter = None if name == "base" else name
        assert answer["choices"][0]["text"] == alone(model, adapters, adapter, prompt, count), (name, prompt)
    batches = [answer["batch"] for status, answer in answers if status == 200]
    assert max(batch["adapters"] for batch in batches) >= 2, "no batch mixed adapters"
    assert max(batch["rows"] for batch in batches) >= 3


def what_is_wrong_is_refused(client: Client) -> None:
    for body, status, param in [
        ({"prompt": "w3", "max_tokens": 9}, 400, "max_tokens"),
        ({"prompt": "w3", "typo": 1}, 400, "typo"),
        ({"prompt": "w3 " * 500}, 400, "prompt"),
        (b"{", 400, "body"),
        (b" " * 2**21, 413, "body"),
        ({"prompt": "w3", "model": "../base"}, 404, "model"),
    ]:
        found, answer = client.post(body)
        assert (found, answer["error"]["param"]) == (status, param)
    assert client.post({"prompt": "w3"}, "/v1/chat/completions")[0] == 404
    assert client.post({"prompt": "w3"}, "/stats")[0] == 405


def a_handle_does_without_http(handle: Any, model: Any, adapters: Path) -> None:
    answer = handle.complete.remote("w3 w4", adapter="ben", max_tokens=5).result(timeout_s=120)
    assert answer["choices"][0]["text"] == alone(model, adapters, "ben", "w3 w4", 5)
    routed = handle.options(multiplexed_model_id="ben").complete.remote("w3 w4", max_tokens=5).result(timeout_s=120)
    assert (routed["model"], routed["choices"]) == ("ben", answer["choices"])
    with pytest.raises(LoRANameError, match="nobody"):
        handle.complete.remote("w3", adapter="nobody").result(timeout_s=120)
    stats = handle.stats.remote().result(timeout_s=120)
    assert stats["batches"] >= 1
    assert len(stats["resident"]) == stats["pool"]["device_adapters"] <= 3


def ray_knows_who_has_which_adapter(client: Client, adapters: Path) -> None:
    """An id that one replica has loaded stays with this replica, whichever of the two that was."""
    names = [f"new/{i}" for i in range(4)]
    for name in names:
        shutil.copytree(adapters / "anna", adapters / name)
    at = {
        name: [client.post({"model": name, "prompt": "w3", "max_tokens": 1})[1]["batch"]["replica"]] for name in names
    }
    time.sleep(2)  # a replica tells the controller what it holds, and that the ingress
    for _ in range(5):
        for name in names:
            at[name].append(client.post({"model": name, "prompt": "w3", "max_tokens": 1})[1]["batch"]["replica"])
    assert {name: len(set(replicas)) for name, replicas in at.items()} == dict.fromkeys(names, 1)


def test_the_head_is_given_one_piece(tiny):
    """A strided view, which a prefill gives it, is what torch multiplies row by row with a frozen weight."""
    from hf_lora.serve.engine import keep_head_fast

    model, seen = tiny("llama"), []
    keep_head_fast(model)
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    ids = torch.randint(3, 60, (3, 5))
    with torch.no_grad():
        last = model(ids, logits_to_keep=1).logits
        assert torch.allclose(last, model(ids).logits[:, -1:], atol=1e-5)
    assert seen == [True, True]
