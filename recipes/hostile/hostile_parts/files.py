"""Adapters' files: the config, the weights beside it, checkpoints, other formats, a base's headers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from hf_lora import config as own_config
from hf_lora import export, facts, importers, loading, store
from hf_lora.config import LoRAConfig
from hf_lora.errors import LoRAError
from hf_lora.integrations import resuming
from hf_lora.values import AdapterValue

from . import good
from .core import Folder, SilentChange, Target, pack, same, unpack
from .mutate import container

# PEFT's name -> the attribute, where they differ. Written down here, and not read from hf_lora: an independent reading.
_ATTRIBUTES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "base_model_name_or_path": "base_model",
    "init_lora_weights": "init",
}
_LEFT = ("peft_type", "peft_version", "inference_mode", "runtime_config")
_SETS = ("target_modules", "target_parameters", "exclude_modules")
# What changes the numbers that an adapter's tensors mean.
_COMPUTED = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "use_dora", "lora_bias", "kasa_config"),
    *("use_bdlora", "use_qalora", "layer_replication"),
)


def numbers_only(text: bytes) -> dict[str, Any]:
    """Another reading of a JSON object."""
    found = json.loads(text.decode("utf-8-sig"))
    assert isinstance(found, dict)
    return found


def as_said(value: Any, said: Any) -> bool:
    """Whether a field's value is what the JSON says, without a change of kind (true is not 1, "1" is not 1)."""
    if said is None:
        return value in (None, False, {})  # null is "off", also of a number that is 0 by default
    if isinstance(said, bool) or isinstance(value, bool):
        return value is said
    if isinstance(said, (int, float)):
        return isinstance(value, (int, float)) and (value == said or value == float(said))
    if isinstance(said, dict):
        return hasattr(value, "keys") and all(key in value and as_said(value[key], said[key]) for key in said)
    if isinstance(said, list):
        if not said:
            return value in (None, (), [])
        return isinstance(value, (tuple, list)) and len(value) == len(said) and all(map(as_said, value, said))
    return bool(value == said and type(value) is type(said))


def require_as_said(config: LoRAConfig, said: dict[str, Any]) -> None:
    """Raise `SilentChange` unless every field of the file is in the config, and every other has PEFT's default."""
    for name, value in {**own_config.PEFT_DEFAULTS, **said}.items():
        if name in _LEFT:
            continue
        attribute = _ATTRIBUTES.get(name, name)
        held: Any
        if name == "init_lora_weights":
            held = config.peft_fields.get(name, config.init)
            words: dict[Any, str] = {True: "kaiming", False: "off", None: "off"}
            value = words.get(value, value) if isinstance(value, bool) or value is None else value
            value = value.lower() if isinstance(value, str) else value
        elif name in own_config.PEFT_DEFAULTS and hasattr(config, attribute):
            held = getattr(config, attribute)
            if name in _SETS and isinstance(value, list):
                value = sorted(set(value)) if all(isinstance(item, str) for item in value) else value
            elif name in _SETS and value == "":
                value = None
            elif name == "modules_to_save" and isinstance(value, list):
                value = list(dict.fromkeys(value))
            elif name in ("layers_to_transform", "layers_pattern") and value == "":  # off, as in PEFT
                value = None
            if name in ("rank_pattern", "alpha_pattern") and value:
                same(list(held), list(value), f"the order of {name}")
        elif name in config.peft_fields:
            held = config.peft_fields[name]
            same(json.dumps(held, sort_keys=True), json.dumps(value, sort_keys=True), name)
            continue
        elif name in own_config.PEFT_DEFAULTS and value == own_config.PEFT_DEFAULTS[name]:
            continue
        else:  # settings of an initialisation
            held = config.init_options
            value = (
                {key: item for key, item in value.items() if key in config.init_options}
                if isinstance(value, dict)
                else value
            )
        if not as_said(held, value):
            raise SilentChange(f"{name}: the file says {value!r}, the config has {held!r}"[:400])


class Config(Target):
    name, title, entry = "config", "adapter_config.json", "store.read_config"
    kinds = ("json",)
    inputs = 200_000

    def __init__(self) -> None:
        self.folder = Folder()

    def seeds(self) -> list[bytes]:
        return [*good.texts(good.CONFIGS), *good.corpus()]

    def check(self, data: bytes) -> None:
        self.folder.put(store.CONFIG_NAME, data)
        config = store.read_config(self.folder.path)
        require_as_said(config, numbers_only(data))
        written = json.loads(json.dumps(config.to_peft(), sort_keys=True))
        same(LoRAConfig.from_peft(written), config, "what was written and read again")

    def close(self) -> None:
        self.folder.close()


def read_raw(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Another reading of a safetensors file: name -> (dtype, shape, bytes)."""
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    return {
        name: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def raw(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """A tensor as a file holds it."""
    flat = tensor.detach().contiguous().reshape(-1)
    return _DTYPES[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


_NAMED = re.compile(r"\.(lora_[A-Za-z_]+?|lora_embedding_[AB])\.[^.]+(?=$|\.weight$|\.bias$)")
_COPIES = ("original_module", "modules_to_save", "gaussian_var_prior", "expert_weights")
_BRANCHING = re.compile(r"[+*{?|(]")


class Adapter(Target):
    name, title, entry = "adapter", "adapter_config.json and adapter_model.safetensors", "store.read_adapter"
    kinds = ("json", "tensors")
    inputs = 30_000

    def __init__(self) -> None:
        self.folder, self.again = Folder(), Folder()
        self.digests: dict[str, str] = {}
        self.count = 0

    @functools.cache  # noqa: B019  # one object of each target
    def seeds(self) -> list[bytes]:
        found = []
        for more, shapes in good.ADAPTERS:
            config, weights = json.dumps({**good.CONFIG, **more}).encode(), good.weights(shapes)
            found.append(pack(config, weights))
            self._put(config, weights)
            with contextlib.suppress(LoRAError):
                store.write_adapter(store.read_adapter(self.folder.path), self.again.path)
                written = [(self.again.path / name).read_bytes() for name in (store.CONFIG_NAME, store.WEIGHTS_NAME)]
                self.digests[self._digest(written[1])] = self._meaning(written[0])
                found.append(pack(*written))
        return found

    def _put(self, config: bytes, weights: bytes) -> None:
        self.folder.put(store.CONFIG_NAME, config)
        self.folder.put(store.WEIGHTS_NAME, weights)

    @staticmethod
    def _digest(weights: bytes) -> str:
        length = int.from_bytes(weights[:8], "little")
        metadata = json.loads(weights[8 : 8 + length]).get("__metadata__", {})
        return str(metadata.get("hf_lora.config_sha256", ""))

    @staticmethod
    def _meaning(config: bytes) -> str:
        said = {**own_config.PEFT_DEFAULTS, **numbers_only(config)}
        off = (None, False, {}, [])
        found = {name: None if said[name] in off and name != "kasa_config" else said[name] for name in _COMPUTED}
        found["kasa_config"] = None if said["kasa_config"] is None else "set"  # its settings are of training
        for name in ("rank_pattern", "alpha_pattern"):
            found[name] = [[k, float(v)] for k, v in (found[name] or {}).items()]
        if isinstance(found["use_bdlora"], dict):
            given = {k: v for k, v in found["use_bdlora"].items() if v not in (None, [])}
            found["use_bdlora"] = {"nblocks": 1, "match_strict": True, **given}
        found["r"], found["lora_alpha"] = float(found["r"]), float(found["lora_alpha"])
        return json.dumps(found, sort_keys=True)

    def check(self, data: bytes) -> None:
        config, weights = unpack(data, 2)
        self._put(config, weights)
        value = store.read_adapter(self.folder.path)
        said = numbers_only(config)
        require_as_said(value.config, said)
        require_bytes(value, read_raw(weights))
        if not all(tensor.isfinite().all() for tensor in value.tensors() if tensor.is_floating_point()):
            raise SilentChange("a tensor that is not finite")
        require_scalings(value, said)
        for path in (*value.factors, *value.modules):
            if not path or path[0] == "." or any(part in path for part in ("/", "\\", "..", "\0", "\n")):
                raise SilentChange(f"{path!r} is taken for a module")
        digest = self._digest(weights)
        if digest in self.digests:
            same(self._meaning(config), self.digests[digest], "a config beside weights of another")
        self.count += 1
        if self.count % 4 == 0:
            written = store.read_adapter(store.write_adapter(value, self.again.path))
            require_equal(value, written)

    def close(self) -> None:
        self.folder.close()
        self.again.close()


def require_bytes(value: AdapterValue, file: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """Every tensor of the file is in the value, bit for bit, and no other is."""
    held = {name: raw(tensor) for name, tensor in store.to_state_dict(value).items()}
    taken = set()
    for name, content in file.items():
        plain = _NAMED.sub(r".\1", name)
        names = (name, plain, name.removesuffix(".weight"), plain.removesuffix(".weight"), f"{plain}.weight")
        own = next((n for n in names if n in held), None)
        if own is not None:
            same(held[own], content, name)
            taken.add(own)
        elif content in held.values():
            taken |= {n for n, other in held.items() if other == content}
        elif not any(part in name for part in _COPIES):
            raise SilentChange(f"{name} of the file is nowhere in the adapter")
    extra = [name for name in held.keys() - taken if not any(part in name for part in _COPIES)]
    if extra:
        raise SilentChange(f"{extra[0]} is in the adapter and not in the file")


def require_scalings(value: AdapterValue, said: dict[str, Any]) -> None:
    """Each layer scales by what r, lora_alpha and the patterns say, read as PEFT reads them."""
    given = {**own_config.PEFT_DEFAULTS, **said}
    for path, pair in value.factors.items():
        if pair.form is not None:
            continue
        numbers = []
        for default, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            found = given[default]
            for key, other in (given[pattern] or {}).items():
                if len(key) > 200 or (_BRANCHING.search(key) and key != ".*v"):
                    return  # it could take Python's re for ever
                if re.match(rf"(.*\.)?({key})$", path):
                    found = other
                    break
            numbers.append(found)
        rank, alpha = numbers
        same(pair.rank, rank, f"the rank of {path}")
        want = alpha / (rank**0.5 if given["use_rslora"] else rank)
        if not abs(pair.scaling - want) <= 1e-12 * abs(want):
            raise SilentChange(f"{path}: scaling {pair.scaling}, the file says {want}")


def require_equal(one: AdapterValue, other: AdapterValue) -> None:
    """What was written reads as the same adapter: tensors bit for bit, the same scaling of each layer."""
    first, second = ({name: raw(t) for name, t in store.to_state_dict(v).items()} for v in (one, other))
    same(second, first, "the tensors, written and read again")
    for path, pair in one.factors.items():
        again = other.factors[path]
        same((again.scaling, again.blocks, again.form), (pair.scaling, pair.blocks, pair.form), path)


def _is_taken(target: Target, data: bytes) -> bool:
    try:
        target.check(data)
    except LoRAError:
        return False
    return True


class Whole(torch.nn.Module):
    """What adapters of the seeds fit on."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.h = torch.nn.ModuleList(
                torch.nn.ModuleDict({name: torch.nn.Linear(4, 3) for name in ("q", "v")}) for _ in range(2)
            )
            self.emb = torch.nn.Embedding(5, 4)
            self.head = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.h[0]["q"](x)  # type: ignore[no-any-return, index]

    def bits(self) -> list[bytes]:
        return [raw(tensor)[2] for tensor in self.state_dict().values()]


class Load(Adapter):
    """As `Adapter`, onto a model: all of it, or the model is as before."""

    name, title, entry = "load", "the same two files, onto a model", "model.load_lora"
    inputs = 6_000
    guided = False

    @functools.cache  # noqa: B019
    def seeds(self) -> list[bytes]:
        return [data for data in super().seeds() if _is_taken(self, data)]

    def __init__(self) -> None:
        super().__init__()
        self.model = Whole()
        self.before = self.model.bits()
        self.x = torch.linspace(-1, 1, 8).view(2, 4)
        self.classes = [type(module) for module in self.model.modules()]
        self.answers = self._answers()

    def _answers(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return [layer(self.x) for part in self.model.h for layer in part.values()]

    def check(self, data: bytes) -> None:
        from hf_lora.model import remove

        config, weights = unpack(data, 2)
        self._put(config, weights)
        try:
            name = loading.load_lora(self.model, self.folder.path, name="x")
        except LoRAError:
            self._as_before()
            raise
        try:
            self._computes(numbers_only(config), read_raw(weights))
        finally:
            remove(self.model, name)
        self._as_before()

    def _computes(self, said: dict[str, Any], file: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
        """A plain adapter's layers compute W x + alpha/r B A x, by numpy."""
        import numpy as np

        given = {**own_config.PEFT_DEFAULTS, **said}
        plain = [*_COMPUTED[6:], "velora_config", "monteclora_config", "alora_invocation_tokens", "modules_to_save"]
        if any(given[name] not in (None, False) for name in plain) or given["bias"] != "none":
            return
        if given["rank_pattern"] or given["alpha_pattern"]:
            return
        got = self._answers()
        scaling = given["lora_alpha"] / (given["r"] ** 0.5 if given["use_rslora"] else given["r"])
        if not scaling < 1e6:
            return
        for i, (before, after) in enumerate(zip(self.answers, got, strict=True)):
            path = f"h.{i // 2}.{'qv'[i % 2]}"
            parts = [file.get(f"{good.PREFIX}{path}.lora_{side}.weight") for side in "AB"]
            if any(part is None or part[0] != "F32" for part in parts):
                continue
            a, b = (np.frombuffer(part[2], "<f4").reshape(part[1]).astype(np.float64) for part in parts if part)
            want = before.double().numpy() + scaling * (self.x.double().numpy() @ a.T @ b.T)
            if np.abs(want).max() > 1e37:
                continue
            if not np.allclose(after.double().numpy(), want, rtol=1e-4, atol=1e-4 * (1 + np.abs(want).max())):
                raise SilentChange(f"{path} computes {after.tolist()}, the bytes say {want.tolist()}"[:400])

    def _as_before(self) -> None:
        same(self.model.bits(), self.before, "the model's weights")
        same([type(module) for module in self.model.modules()], self.classes, "the model's classes")


# ---- other formats ---------------------------------------------------------------------------------------------------

_MLX = {"lora_parameters": {"rank": 2, "scale": 20.0, "dropout": 0.0}, "model": "org/base", "num_layers": 2}
_ADALORA = {
    **good.CONFIG,
    "peft_type": "ADALORA",
    "init_r": 3,
    "target_r": 2,
    "rank_pattern": {f"{good.PREFIX}h.0.q.lora_E": [True, True, False]},
}
_THREE = {"h.0.q.lora_A": (2, 4), "h.0.q.lora_B": (3, 2), "h.0.q.lora_E": (2, 1)}

_KOHYA_PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
_KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"

# Importer -> (file names of its input, good inputs, how it is called with the folder). An importer that is not here is
# given a folder with PEFT's two names, and files of nobody's: see `table`.
_FORMATS: dict[str, tuple[tuple[str, ...], list[bytes], Any]] = {
    "from_mlx": (
        ("adapter_config.json", "adapters.safetensors"),
        [
            pack(
                json.dumps(_MLX).encode(),
                good.weights({"model.layers.0.q.lora_a": (4, 2), "model.layers.0.q.lora_b": (2, 3)}, prefix=""),
            )
        ],
        lambda folder: importers.from_mlx(folder),
    ),
    "from_adalora": (
        ("adapter_config.json", "adapter_model.safetensors"),
        [pack(json.dumps(_ADALORA).encode(), good.weights(_THREE))],
        lambda folder: importers.from_adalora(folder),
    ),
    "from_diffusion": (
        ("adapter.safetensors",),
        [
            good.weights(
                {
                    f"{_KOHYA}.lora_down.weight": (2, 4),
                    f"{_KOHYA}.lora_up.weight": (3, 2),
                    f"{_KOHYA}.alpha": (),
                },
                prefix="",
            ),
            good.weights(
                {"unet.mid_block.conv.lora_A.weight": (2, 4, 3, 3), "unet.mid_block.conv.lora_B.weight": (3, 2, 1, 1)},
                prefix="",
            ),
            good.weights(
                {"unet.a.to_q.lora.down.weight": (2, 4), "unet.a.to_q.lora.up.weight": (3, 2)},
                prefix="",
            ),
        ],
        lambda folder: next(iter(importers.from_diffusion(folder / "adapter.safetensors").components.values())),
    ),
    "from_loralib": (
        ("adapter.safetensors",),
        [
            good.weights({"h.0.q.lora_A": (2, 4), "h.0.q.lora_B": (3, 2), "h.0.q.bias": (3,)}, prefix=""),
            good.weights({"h.0.c_attn.lora_A": (4, 4), "h.0.c_attn.lora_B": (6, 2)}, prefix="module."),
        ],
        lambda folder: (
            importers.from_loralib(folder / "adapter.safetensors", alpha=3, enable_lora=[True, False, True])
            if b"c_attn" in (folder / "adapter.safetensors").read_bytes()
            else importers.from_loralib(folder / "adapter.safetensors", alpha=3)
        ),
    ),
}


class Importer(Target):
    """One importer: what it takes is finite, of the file's own numbers, and reads the same when written."""

    title, entry = "", ""
    inputs = 8_000
    count = 0

    def __init__(self, function: str) -> None:
        self.function = function
        unknown = (("adapter.safetensors",), [good.weights(good.ADAPTERS[0][1])], _first_argument(function))
        self.files, self.good, self.call = _FORMATS.get(function, unknown)
        self.kinds = tuple("json" if name.endswith(".json") else "tensors" for name in self.files)  # type: ignore[misc]
        self.folder, self.again = Folder(), Folder()

    def seeds(self) -> list[bytes]:
        return self.good

    def check(self, data: bytes) -> None:
        for name, part in zip(self.files, unpack(data, len(self.files)), strict=True):
            self.folder.put(name, part)
        value = self.call(self.folder.path)
        file = read_raw(unpack(data, len(self.files))[-1])
        used = sum(tensor.numel() for tensor in store.to_state_dict(value).values())
        if not value.factors or used == 0:
            raise SilentChange("an adapter without factors")
        for path, pair in value.factors.items():
            if not (pair.A.isfinite().all() and pair.B.isfinite().all() and 0 < pair.scaling < float("inf")):
                raise SilentChange(f"{path} is not finite")
        self._numbers(value, file)
        self.count += 1
        if self.count % 4:
            return
        store.write_adapter(value, self.again.path)
        require_equal(value, store.read_adapter(self.again.path))

    def _numbers(self, value: AdapterValue, file: dict[str, tuple[str, tuple[int, ...], bytes]]) -> None:
        """ΔW of each layer by numpy, from the file alone."""
        import numpy as np

        for path, pair in value.factors.items():
            if self.function == "from_mlx":
                names, scaling = (f"{path}.lora_a", f"{path}.lora_b"), None
            elif self.function == "from_adalora":
                names, scaling = (f"{good.PREFIX}{path}.lora_A", f"{good.PREFIX}{path}.lora_B"), None
            elif self.function == "from_loralib" and not pair.blocks:
                names = next(
                    ((n, f"{n[:-1]}B") for n in (f"{path}.lora_A", f"module.{path}.lora_A") if n in file), ("", "")
                )
                scaling = 3 / pair.rank
            elif path == _KOHYA_PATH and f"{_KOHYA}.alpha" in file:
                names = (f"{_KOHYA}.lora_down.weight", f"{_KOHYA}.lora_up.weight")
                if file[f"{_KOHYA}.alpha"][0] != "F32":
                    continue
                scaling = float(np.frombuffer(file[f"{_KOHYA}.alpha"][2], "<f4")[0]) / pair.rank
            else:
                continue
            if any(name not in file or file[name][0] != "F32" for name in names):
                continue
            a, b = (np.frombuffer(file[n][2], "<f4").reshape(file[n][1]).astype(np.float64) for n in names)
            if self.function == "from_mlx":
                a, b = a.T, b.T
                scaling = numbers_only((self.folder.path / "adapter_config.json").read_bytes())["lora_parameters"][
                    "scale"
                ]
            elif self.function == "from_adalora":
                said = numbers_only((self.folder.path / "adapter_config.json").read_bytes())
                scaling = said.get("lora_alpha", 8) / (said.get("init_r", 12) + 1e-5)
                e = file[f"{good.PREFIX}{path}.lora_E"]
                a = a * np.frombuffer(e[2], "<f4").reshape(e[1])
            want = (b @ a) * scaling
            got = pair.B.double().numpy() @ pair.A.double().numpy() * pair.scaling
            if not np.allclose(got, want, rtol=1e-4, atol=1e-5 * (1e-30 + np.abs(want).max())):
                raise SilentChange(f"{path}: ΔW {got.tolist()}, the file says {want.tolist()}"[:400])

    def close(self) -> None:
        self.folder.close()
        self.again.close()


def _first_argument(function: str) -> Any:
    """How an importer that this table does not know is called: with the file."""
    called = getattr(importers, function)
    needed = [p.name for p in inspect.signature(called).parameters.values() if p.default is p.empty]
    assert len(needed) == 1, f"say in _FORMATS how {function} is called"
    return lambda folder: called(folder / "adapter.safetensors")


def importer_targets() -> dict[str, Any]:
    """A target for every importer that there is."""
    found = {}
    for function in sorted(name for name in importers.__all__ if name.startswith("from_")):
        what = function.removeprefix("from_")
        own = type(
            f"Importer_{what}",
            (Importer,),
            {"name": f"import-{what}", "title": f"files of {what}", "entry": f"importers.{function}"},
        )
        found[f"import-{what}"] = functools.partial(own, function)
    return found


# ---- a base, a run, a checkpoint -------------------------------------------------------------------------------------


class Base(Target):
    name, title, entry = "base", "a sharded base: config.json, index.json, shards' headers", "export.base.open_base"
    kinds = ("json", "json", "tensors")
    inputs = 30_000

    def __init__(self) -> None:
        self.folder = Folder()
        self.folder.put("model-00002-of-00002.safetensors", container({"b": ("F32", [2], b"\0" * 8)}))

    def seeds(self) -> list[bytes]:
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        index = {"metadata": {"total_size": 16}, "weight_map": {"a": names[0], "b": names[1]}}
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "text_config": {"hidden_size": 4}}
        shard = container({"a": ("F32", [2], good.numbers((2,), 1))}, {"format": "pt"})
        return [pack(json.dumps(config).encode(), json.dumps(index).encode(), shard)]

    def check(self, data: bytes) -> None:
        config, index, shard = unpack(data, 3)
        self.folder.put("config.json", config)
        self.folder.put("model.safetensors.index.json", index)
        self.folder.put("model-00001-of-00002.safetensors", shard)
        found = export.base.open_base(str(self.folder.path))
        same(json.dumps(found.config), json.dumps(numbers_only(config)), "config.json")
        wanted = set(numbers_only(index)["weight_map"].values())
        file = read_raw(shard) if "model-00001-of-00002.safetensors" in wanted else {}
        for name, content in file.items():
            same(raw(found.tensors[name].read()), content, name)
        same(set(found.tensors) - {"b"}, set(file) - {"b"}, "the tensors of the shards")
        if lost := set(numbers_only(index)["weight_map"]) - set(found.tensors):
            raise SilentChange(f"the index has {lost}, the base has not")

    def close(self) -> None:
        self.folder.close()


class Run(Target):
    name, title, entry = "trainer-state", "trainer_state.json, as the card and a resume read it", "RunFacts.read"
    kinds = ("json",)
    inputs = 160_000

    def __init__(self) -> None:
        self.folder = Folder()

    def seeds(self) -> list[bytes]:
        return good.texts([good.STATE, {"global_step": 0, "log_history": []}])

    def check(self, data: bytes) -> None:
        self.folder.put(facts.TRAINER_STATE, data)
        whole = resuming._state_is_whole(self.folder.path)
        try:
            found = facts.RunFacts.read(self.folder.path)
        except LoRAError:
            if whole:
                raise SilentChange("training would go on from a state that cannot be read") from None
            raise
        said = json.loads(data)
        same(
            whole, isinstance(said, dict) and type(said.get("global_step")) is int and said["global_step"] >= 0, "whole"
        )
        assert found is not None
        step = said.get("global_step")
        same(found.steps, step if type(step) is int and 0 <= step < 2**63 else 0, "steps")
        json.dumps(found.losses, allow_nan=False)  # all finite
        log = said.get("log_history")
        given = [e.get("loss") for e in log if isinstance(e, dict)] if isinstance(log, list) else []
        for _, loss in found.losses:
            if not any(type(g) in (int, float) and loss == (float(g) if abs(g) < 2**1000 else g) for g in given):
                raise SilentChange(f"a loss of {loss} that the log does not have")

    def close(self) -> None:
        self.folder.close()


class Checkpoint(Target):
    """A checkpoint is resumed from if all of it is there; else a reason is given, and none is an exception."""

    name, title, entry = "checkpoint", "a checkpoint's files, before a resume", "resuming.faults, read_checkpoint"
    kinds = ("json", "tensors", "json", "bytes", "bytes")
    inputs = 4_000
    guided = False
    few = 40
    _NAMES = (store.CONFIG_NAME, store.WEIGHTS_NAME, "trainer_state.json", "optimizer.pt", "rng_state.pth")

    def __init__(self) -> None:
        from hf_lora.model import add

        self.model = Whole()
        add(self.model, LoRAConfig(r=2, target_modules=["q"]), name="default")
        self.folder = Folder()
        self.before = self.model.bits()

    @functools.cache  # noqa: B019
    def seeds(self) -> list[bytes]:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            loading.save_checkpoint(self.model, folder)
            torch.save({"state": {0: torch.ones(2)}}, folder / "optimizer.pt")
            torch.save({"cpu": torch.zeros(4)}, folder / "rng_state.pth")
            (folder / "trainer_state.json").write_text(json.dumps(good.STATE))
            parts = [(folder / name).read_bytes() for name in self._NAMES]
        self.folder.put("scheduler.pt", parts[3])
        self.good = dict(zip(self._NAMES, parts, strict=True))
        for name, part in self.good.items():
            self.folder.put(name, part)
        self.first = {name: self._held(name) for name in ("optimizer.pt", "rng_state.pth")}
        return [pack(*parts)]

    def check(self, data: bytes) -> None:
        parts = dict(zip(self._NAMES, unpack(data, 5), strict=True))
        for name, part in parts.items():
            self.folder.put(name, part)
        wrong = resuming.faults(self.model, self.folder.path)
        same(self.model.bits(), self.before, "the model's weights")
        if wrong:
            raise LoRAError("; ".join(wrong))
        for name in ("optimizer.pt", "rng_state.pth"):
            if parts[name] != self.good[name]:
                same(self._held(name), self.first[name], name)
        values = loading.read_checkpoint(self.model, self.folder.path)
        require_bytes(values["default"], read_raw(parts[store.WEIGHTS_NAME]))

    def _held(self, name: str) -> str:
        try:
            return repr(torch.load(self.folder.path / name, weights_only=True))
        except Exception as error:  # it raises anything; a resume would end here, too
            raise LoRAError(f"torch.load refuses {name}") from error

    def close(self) -> None:
        self.folder.close()


TARGETS: dict[str, Any] = {
    "config": Config,
    "adapter": Adapter,
    "load": Load,
    **importer_targets(),
    "base": Base,
    "trainer-state": Run,
    "checkpoint": Checkpoint,
}
