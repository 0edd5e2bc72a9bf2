"""What is given to calls: names, roles, routes, requests, a page's fields, a command's arguments."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import re
import tempfile
import types
import urllib.parse
import warnings
from pathlib import Path
from typing import Any

import torch

from hf_lora import loading, store, switching
from hf_lora import model as models
from hf_lora.config import LoRAConfig
from hf_lora.demo import library, session, settings, tasks
from hf_lora.errors import LoRAError
from hf_lora.serve import ingress, requests
from hf_lora.serve.answers import Refusal
from hf_lora.serve.settings import Limits
from hf_lora.targeting import resolve

from . import good
from .core import Folder, SilentChange, Target, same
from .files import Whole, require_equal


class Reached(Exception):
    """Everything was taken; what would come next is not ours to fuzz."""


def given(data: bytes) -> Any:
    """The JSON of an input. What is no JSON never reaches a call."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LoRAError("no call") from error


def _random(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if ".lora_slots." in path and parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


class Names(Target):
    """Any string is a name; what is made of it never leaves the folder, and is read back as the same name."""

    name, title, entry = "name", "adapters' names, and subfolders", "model.add, loading.save_checkpoint"
    kinds = ("json",)
    inputs = 12_000
    guided = False

    def __init__(self) -> None:
        self.model = Whole()
        self.config = LoRAConfig(r=1, target_modules=["q"])
        models.add(self.model, self.config, name="other")
        self.before = self._state()
        self.count = 0

    def _state(self) -> Any:
        entries = models.require(self.model).entries
        return (tuple(entries), switching.described(models.require(self.model).default), tuple(self.model.bits()))

    def seeds(self) -> list[bytes]:
        return good.texts(["task", "org/name", "a b", "Übung", "../x", "lora-a", "default.x", "%2F", "checkpoint-1"])

    def check(self, data: bytes) -> None:
        from hf_lora import hub

        name = given(data)
        if isinstance(name, str):
            with contextlib.suppress(LoRAError):
                inside = hub.checked_subfolder(name)
                if inside is not None:
                    path = os.path.normpath(os.path.join("/repo", inside))
                    same(path.startswith("/repo/") and ".git" not in inside.split("/"), True, "inside of the repo")
        try:
            models.add(self.model, self.config, name=name)
        except LoRAError:
            same(self._state(), self.before, "the model after a refusal")
            raise
        try:
            self._named(name)
        finally:
            models.remove(self.model, name)
            switching.set_lora(self.model, "other")
        same(self._state(), self.before, "the model after remove")

    def _named(self, name: Any) -> None:
        same(list(models.require(self.model).entries), ["other", name], "the names")
        same(switching.described(models.require(self.model).default), name, "the active one")
        models.train(self.model, ["other", name])
        folders = loading.checkpoint_folders(self.model, "/run")
        for own, path in folders.items():
            same(os.path.normpath(path), str(path), "the folder")
            same(path.parent, Path("/run"), f"the parent of {own!r}")
            same(urllib.parse.unquote(path.name.removeprefix("lora-")), own, "the folder's name")
        self.count += 1
        if self.count % 25 == 0:
            with tempfile.TemporaryDirectory() as folder:
                loading.save_checkpoint(self.model, folder)
                found = loading.read_checkpoint(self.model, folder)
                same(set(found), {"other", name}, "the checkpoint's adapters")
                require_equal(found[name], loading.read_adapter_of(self.model, name))


# Written down here: what a role means on a llama, and what a name means on any model.
_LLAMA = {
    **{role: (f"{role}_proj",) for role in ("q", "k", "v", "o", "gate", "up", "down")},
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "head": ("lm_head",),
}
_CHEAP = re.compile(r"(?!.*[)\]*+?}][*+?{])[^{}]{0,120}", re.DOTALL)  # no repeat right after a repeat or a group


class Roles(Target):
    name, title, entry = "role", "roles, names and expressions of target_modules", "targeting.resolve"
    kinds = ("json",)
    inputs = 12_000
    guided = False

    def __init__(self) -> None:
        from transformers import (
            BertConfig,
            BertForSequenceClassification,
            GPT2Config,
            GPT2LMHeadModel,
            LlamaConfig,
            LlamaForCausalLM,
        )

        sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2}
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.models = {
                "llama": LlamaForCausalLM(LlamaConfig(**sizes, **heads)),
                "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2)),
                "bert": BertForSequenceClassification(BertConfig(**sizes, **heads)),
            }
        self.layers = {
            name: [
                path
                for path, module in model.named_modules()
                if type(module).__name__ in ("Linear", "Conv1D", "Embedding")
            ]
            for name, model in self.models.items()
        }
        self.modules = {
            name: [path for path, _ in model.named_modules() if path] for name, model in self.models.items()
        }

    def seeds(self) -> list[bytes]:
        asked = (
            *(
                ["q", "v"],
                ["attention"],
                "all-linear",
                ["mlp"],
                ["q_proj", "down_proj"],
                ["c_attn"],
                ["query", "value"],
            ),
            *(
                r".*\.(q|v)_proj",
                r"transformer\.h\.\d\.attn\.c_attn",
                ["model.layers.0.self_attn.q_proj", "k"],
                None,
                "q",
            ),
        )
        found = [{"model": name, "target_modules": targets} for name in self.models for targets in asked]
        found += [
            {"model": "llama", "target_modules": ["q", "o"], "layers_to_transform": [1], "layers_pattern": "layers"}
        ]
        found += [
            {"model": "llama", "target_modules": ["q", "mlp"], "exclude_modules": ["up"], "rank_pattern": {"q_proj": 2}}
        ]
        found += [
            {
                "model": "bert",
                "target_modules": ["query"],
                "modules_to_save": ["classifier"],
                "alpha_pattern": {"query": 3},
            }
        ]
        return [data for data in good.texts(found) if _taken(self, data)]

    def check(self, data: bytes) -> None:
        said = given(data)
        name = said.pop("model", "llama") if isinstance(said, dict) else None
        if not isinstance(name, str) or name not in self.models:
            raise LoRAError("no such model here")
        names = set(LoRAConfig.__dataclass_fields__)
        config = LoRAConfig(**{"r": 1, **{key: value for key, value in said.items() if key in names and key != "r"}})
        found = resolve(self.models[name], config)
        paths = [target.path for target in found.targets]
        same(len(set(paths)), len(paths), "each target once")
        wanted = said.get("target_modules")
        if any(
            said.get(k)
            for k in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "task_type")
        ):
            return
        expected = self._expected(name, wanted)
        if expected is not None and name == "llama":
            same(sorted(paths), sorted(expected), f"the layers of {wanted!r}")
        elif expected is not None and not set(paths) <= set(expected):
            raise SilentChange(f"{wanted!r}: {sorted(set(paths) - set(expected))}")

    def _expected(self, name: str, wanted: Any) -> list[str] | None:
        """Another reading of names on a model; None where it has none."""
        layers = self.layers[name]
        if wanted is None or wanted in ([], ""):
            return None
        if isinstance(wanted, str):
            if wanted.lower() == "all-linear":
                emb = ("embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings")
                return [path for path in layers if not path.endswith(("lm_head", "classifier", *emb))]
            if wanted in _LLAMA and name == "llama":
                return [path for path in layers if path.endswith(_LLAMA[wanted])]
            if not _CHEAP.fullmatch(wanted) or wanted in _LLAMA:
                return None
            return [path for path in layers if re.fullmatch(wanted, path)]
        if name != "llama" and any(item in _LLAMA for item in wanted):
            return None
        ends = tuple(end for item in wanted for end in _LLAMA.get(item, (item,)))
        return [path for path in layers if any(path == end or path.endswith(f".{end}") for end in ends)]


def _taken(target: Target, data: bytes) -> bool:
    try:
        target.check(data)
    except LoRAError:
        return False
    return True


class Routes(Target):
    """set_lora, use_lora, route_lora, train_lora: each row computes what was named for it, or nothing changes."""

    name, title, entry = "route", "arguments of set, use, route and train", "switching.set_lora, use_lora, route_lora"
    kinds = ("json",)
    inputs = 150_000
    refusals = (LoRAError,)

    def __init__(self) -> None:
        import numpy as np

        self.model = Whole()
        self.layer = self.model.h[0]["q"]
        self.x = torch.linspace(-1, 1, 12).view(3, 4)
        self.deltas: dict[str, Any] = {}
        for seed, name in enumerate(("a", "b", "org/x")):
            models.add(self.model, LoRAConfig(r=2, alpha=3, target_modules=["q"]), name=name)
            _random(self.model, seed)
            pair = models.read(self.model, name).factors["h.0.q"]
            self.deltas[name] = 1.5 * pair.B.detach().double().numpy() @ pair.A.detach().double().numpy()
        models.train(self.model, [])
        switching.set_lora(self.model, "a")
        self.layer = self.model.h[0]["q"]
        weight, bias = (t.detach().double().numpy() for t in (self.layer.weight, self.layer.bias))
        self.inputs_ = self.x.double().numpy()
        self.base = self.inputs_ @ weight.T + bias
        self.close_enough = functools.partial(np.allclose, rtol=1e-4, atol=1e-4)
        self.largest = lambda found: float(np.abs(found).max())
        self.state = models.require(self.model)
        self.before = self.model.bits()
        self.count = 0

    def seeds(self) -> list[bytes]:
        whiches = ["a", "org/x", None, ["a", "b"], {"a": 0.7, "b": 0.3}, {"b": -1}, [], ["a", "b", "org/x"]]
        calls = [{"verb": verb, "which": which} for verb in ("set", "use") for which in whiches]
        calls += [
            {"verb": "route", "which": which} for which in (["a", "b", None], ["a", "a", "a"], [None, None, None])
        ]
        calls += [{"verb": "train", "which": which} for which in (["a"], "b", [])]
        return good.texts(calls)

    def check(self, data: bytes) -> None:
        call = given(data)
        verb, which = (call.get("verb"), call.get("which")) if isinstance(call, dict) else (None, None)
        if verb not in ("set", "use", "route", "train"):
            raise LoRAError("no verb")
        default = self.state.default
        try:
            if verb == "set":
                switching.set_lora(self.model, which)
                self._computes(self._mixture(which))
            elif verb == "train":
                models.train(self.model, which)
                trained = [which] if isinstance(which, str) else list(which)
                same({e.name for e in self.state.entries.values() if e.trainable}, set(trained), "what trains")
                models.train(self.model, [])
            elif verb == "use":
                with switching.use_lora(self.model, which):
                    self._computes(self._mixture(which))
            else:
                with switching.route_lora(self.model, which):
                    self._computes([{} if name is None else {name: 1.0} for name in which])
        except LoRAError:
            same(self.state.default is default, True, "the default after a refusal")
            raise
        finally:
            self.state.default = default
            same(self.state.blocks, 0, "open blocks")
        self.count += 1
        if self.count % 100 == 0:
            same(self.model.bits(), self.before, "the model's weights")

    def _mixture(self, which: Any) -> list[dict[str, float]]:
        if which is None:
            mixture = {}
        elif isinstance(which, str):
            mixture = {which: 1.0}
        else:
            mixture = dict(which) if isinstance(which, dict) else dict.fromkeys(which, 1.0)
        return [mixture] * 3

    def _computes(self, rows: list[dict[str, float]]) -> None:
        with torch.no_grad():
            got = self.model(self.x).double().numpy()  # raises if the number of rows is another
        same(len(rows), 3, "rows")
        for i, mixture in enumerate(rows):
            want = self.base[i] + sum(
                (w * (self.deltas[n] @ self.inputs_[i]) for n, w in mixture.items()), 0 * self.base[i]
            )
            if any(abs(w) > 1e30 for w in mixture.values()):
                continue
            size = 1 + sum(abs(w) for w in mixture.values())
            if not self.close_enough(got[i] / size, want / size):
                raise SilentChange(f"row {i} computes {got[i].tolist()}, {mixture} is {want.tolist()}"[:300])


# ---- a deployment ----------------------------------------------------------------------------------------------------


class _Body:
    def __init__(self, data: bytes) -> None:
        self.data = data

    async def stream(self) -> Any:
        yield self.data[:100]
        yield self.data[100:]


class _Ingress(ingress.Ingress):
    """The front without Ray: a request is read, and not sent on."""

    async def _answer(self, body: object) -> Any:
        return requests.read_ask(body, self.limits)


class Requests(Target):
    name, title, entry = "request", "a request of a deployment", "serve.ingress, serve.requests.read_ask"
    kinds = ("json",)
    inputs = 250_000
    _LIMITS = Limits("org/base", 32, 2_000)

    def __init__(self) -> None:
        self.front = _Ingress(None, self._LIMITS)

    def seeds(self) -> list[bytes]:
        return good.texts(
            [
                {"model": "task", "prompt": "hello", "max_tokens": 8, "temperature": 0, "stream": False, "n": 1},
                {"prompt": "x"},
                {"model": "org/base", "prompt": "é", "max_tokens": None},
            ]
        )

    def check(self, data: bytes) -> None:
        reading = self.front._read(_Body(data))
        found = None
        try:
            reading.send(None)
        except StopIteration as stop:
            found = stop.value
        if isinstance(found, Refusal):
            json.dumps(found.body, allow_nan=False).encode()
            raise found.error
        same(isinstance(found, requests.Ask), True, "an answer")
        assert found is not None
        said = json.loads(data)
        same(found.prompt, said["prompt"], "prompt")
        same(found.adapter, None if said.get("model") == "org/base" else said.get("model"), "model")
        same(found.max_tokens, 16 if said.get("max_tokens") is None else said["max_tokens"], "max_tokens")
        same(type(found.max_tokens), int, "max_tokens")
        same(1 <= found.max_tokens <= 32 and len(data) <= 2_000, True, "limits")
        for key, only in (("stream", False), ("n", 1), ("temperature", 0)):
            same(said.get(key) in (None, only), True, key)
        same(set(said) <= {"model", "prompt", "max_tokens", "stream", "n", "temperature"}, True, "fields")


serve_app: Any = importlib.import_module("hf_lora.serve.app")  # hf_lora.serve.app is also a function


class Deployment(Target):
    name, title, entry = "deployment", "arguments of `serve run`", "serve.app"
    kinds = ("json",)
    inputs = 120_000

    def __init__(self) -> None:
        self._ray = serve_app._require_ray
        serve_app._require_ray = self._reached

    @staticmethod
    def _reached() -> None:
        raise Reached

    def seeds(self) -> list[bytes]:
        return good.texts(
            [
                {"base": "org/base", "source": "adapters/", "num_replicas": "2", "num_cpus": "1"},
                {"base": "b", "source": None, "device_slots": 4, "batch_wait_timeout_s": "0.5", "max_prompt_tokens": 9},
                {
                    "base": "b",
                    "source": "s",
                    "ray_actor_options": {"num_gpus": 1},
                    "num_gpus": 0,
                    "pool_options": {"max_rank": 8},
                },
            ]
        )

    def check(self, data: bytes) -> None:
        said = given(data)
        if not isinstance(said, dict):
            raise LoRAError("Ray gives a mapping")
        try:
            serve_app.app(said)
        except Reached:
            return
        raise SilentChange("neither taken nor refused")

    def close(self) -> None:
        serve_app._require_ray = self._ray


# ---- a page ----------------------------------------------------------------------------------------------------------


class _Tokenizer:
    chat_template = None


class _Engine:
    """As far as a form needs one: it counts."""

    tokenizer, context = _Tokenizer(), 1024

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        return tuple(text.encode())


class Page(Target):
    """The fields of the demo's page and of the Space's API. What is taken is text, bounded, and what was typed."""

    name, title, entry = "page", "fields of the demo, and of the Space's API", "demo.Demo.ask, blend, rows"
    kinds = ("json",)
    inputs = 180_000

    def __init__(self) -> None:
        folder = Folder()
        self.shipped = {}
        for name, text in zip(("one", "two"), good.TASKS, strict=True):
            folder.put(tasks.TASK_FILE, text.encode())
            task = tasks.read_task(folder.path)
            assert task is not None
            self.shipped[name] = library.Adapter(name, name, Path(name), task, 2, 100, 25)
        folder.close()
        self.demo = object.__new__(session.Demo)
        self.demo.engine = _Engine()  # type: ignore[assignment]
        self.demo.settings = settings.Settings()
        self.demo.library = object.__new__(library.Library)
        vars(self.demo.library).update(shipped=self.shipped, _visitors={}, _loading={}, _lock=contextlib.nullcontext())
        self.demo.library.settings = self.demo.settings
        self.request = types.SimpleNamespace(session_hash="visitor")
        self._row, self.rows = self.demo._row, []
        self.demo._row = self._kept  # type: ignore[method-assign]

    def _kept(self, wanted: Any) -> Any:
        row = self._row(wanted)
        self.rows.append((wanted, row))
        return row

    def seeds(self) -> list[bytes]:
        fields = {"name": "The Punter", "area": "riverside", "notes": "cheap"}
        return good.texts(
            [
                {"do": "ask", "adapter": "one", "fields": fields},
                {"do": "ask", "adapter": "two", "fields": {"a": 3}},
                {"do": "blend", "adapter": "one", "second": "two", "weight": 0.3, "fields": fields},
                {"do": "rows", "rows": [{"adapter": "one", "fields": fields}, {"adapter": None, "prompt": "hello"}]},
            ]
        )

    def check(self, data: bytes) -> None:
        api = _api()
        said = given(data)
        if not isinstance(said, dict):
            raise LoRAError("no action")
        self.rows.clear()
        action, adapter = said.get("do"), said.get("adapter")
        fields = said.get("fields")
        if action == "ask":
            self.demo.ask("visitor", adapter, api._given(self.demo, self.request, adapter, fields))
        elif action == "blend":
            self.demo.blend("visitor", adapter, said.get("second"), said.get("weight"), fields)
        elif action == "rows":
            self.demo.rows("visitor", api._asked(said.get("rows")))
        elif action == "load":
            raise LoRAError("asks the Hub")
        else:
            raise LoRAError("no action")
        most = self.demo.settings
        for wanted, row in self.rows:
            same(0 < len(row.ids) <= most.prompt_tokens and 0 < row.max_tokens <= most.new_tokens, True, "limits")
            text = bytes(row.ids).decode()
            items = wanted.given.values() if isinstance(wanted.given, dict) else [wanted.given]
            for item in items:
                typed = "" if item is None else str(item).replace("\0", "").strip()
                if typed and typed not in text:
                    raise SilentChange(f"{typed[:80]!r} was typed, the prompt is {text[:200]!r}")
            if wanted.which is not None and not isinstance(wanted.which, str):
                same(abs(sum(w for _, w in wanted.which) - 1) < 1e-9, True, "a blend's weights")


@functools.cache
def _api() -> Any:
    from hf_lora.demo.page import api

    return api


# ---- the command -----------------------------------------------------------------------------------------------------


class Command(Target):
    """Arguments of `hf-lora`: it ends with 0, or with 2 and words; never with a traceback."""

    name, title, entry = "command", "arguments of the command line", "hf_lora.cli"
    kinds = ("json",)
    inputs = 1_200
    guided = False  # typer is slow, and keeps no state between two calls worth guiding
    few = 8

    def __init__(self) -> None:
        from typer.testing import CliRunner

        self.made = tempfile.TemporaryDirectory(prefix="hf-lora-fuzz-")
        self.where = Path(self.made.name)
        self.start = Path.cwd()
        os.chdir(self.where)
        self._fill()
        self.kept = self._files()
        self.runner = CliRunner()

    def _fill(self) -> None:
        for name in ("a", "b"):
            (self.where / name).mkdir()
            (self.where / name / store.CONFIG_NAME).write_text(json.dumps(good.CONFIG))
            (self.where / name / store.WEIGHTS_NAME).write_bytes(good.weights(good.ADAPTERS[0][1]))
        config = {
            "model_type": "llama",
            "vocab_size": 32,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
        }
        config |= {"num_attention_heads": 2, "architectures": ["LlamaForCausalLM"]}
        (self.where / "config.json").write_text(json.dumps(config))
        (self.where / "r.yaml").write_text(good.RECIPES[0])
        (self.where / "train.csv").write_text("question,answer\n1,2\n")
        (self.where / "loralib.safetensors").write_bytes(
            good.weights({"h.0.q.lora_A": (2, 4), "h.0.q.lora_B": (3, 2)}, prefix="")
        )

    def _files(self) -> dict[str, bytes]:
        names = (
            "a/adapter_config.json",
            "a/adapter_model.safetensors",
            "config.json",
            "r.yaml",
            "b/adapter_config.json",
        )
        return {name: (self.where / name).read_bytes() if (self.where / name).is_file() else b"" for name in names}

    def seeds(self) -> list[bytes]:
        return good.texts(
            [
                ["info", "a"],
                ["info", "a", "--json", "--no-spectrum"],
                ["list", "."],
                ["plan", "config.json", "--targets", "q,v", "--r", "4", "--dtype", "float32", "--json"],
                ["plan", "config.json", "--budget", "500", "--batch", "2", "--length", "16"],
                ["analyze", "a", "b"],
                ["import", "loralib", "loralib.safetensors", "out", "--alpha", "4", "--force"],
                ["merge", "a", "--help"],
                ["--version"],
            ]
        )

    def check(self, data: bytes) -> None:
        arguments = given(data)
        if not isinstance(arguments, list):
            raise LoRAError("no arguments")
        arguments = [item if isinstance(item, str) else json.dumps(item) for item in arguments]
        if any("\0" in item or len(item) > 10_000 for item in arguments):
            raise LoRAError("no system passes such an argument")
        if any(
            item in ("push", "pull", "demo", "quickstart", "train", "--debug", "--install-completion")
            for item in arguments
        ):
            raise LoRAError("asks the network, or runs for minutes")
        # argv of another encoding has lone surrogates: that is how Python shows it
        from hf_lora import cli

        environment = {"COLUMNS": "120", "TERM": "dumb", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = self.runner.invoke(cli.app, arguments, env=environment)
        if result.exit_code == 1 or (result.exception is not None and not isinstance(result.exception, SystemExit)):
            raise RuntimeError(
                f"{arguments} exits with {result.exit_code}: {result.output[-300:]}"
            ) from result.exception
        same(self._files(), self.kept, "the files that it was given")
        if result.exit_code != 0:
            if not result.output.strip():
                raise RuntimeError(f"{arguments} exits with {result.exit_code} and says nothing")
            raise LoRAError(result.output[:200])
        if "--json" in arguments and "--help" not in arguments:
            json.loads(result.stdout)

    def close(self) -> None:
        os.chdir(self.start)
        self.made.cleanup()


TARGETS: dict[str, Any] = {
    target.name: target for target in (Names, Roles, Routes, Requests, Deployment, Page, Command)
}
