"""Checkpoints of loralib: `torch.save(lora.lora_state_dict(model), path)`.

A layer has lora_A (r, in) and lora_B (out, r), with scaling lora_alpha/r. A MergedLinear splits its output rows into
`len(enable_lora)` equal parts and adapts those that are enabled, n of them: lora_A (n·r, in) and lora_B (n·out/len, r),
a convolution of n groups. That is one block of rows for each enabled part here. An Embedding has lora_A (r, V) and
lora_B (d, r). The file says neither lora_alpha nor enable_lora nor the layers' kinds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import fields
from ..adapter import LoRAAdapter
from ..config import LoRAConfig
from ..errors import LoRAConfigError
from ..survey import Layer, survey
from ..values import Block, Factors
from .reading import adapter_of, checked, read_tensors, refuse_problems

__all__ = ["from_loralib"]

Enabled = Sequence[bool] | Mapping[str, Sequence[bool]]

_WITHIN = ("model_state_dict", "state_dict")  # GPT-2's training script of the paper saves {"model_state_dict": …}
_QKV = ("q", "k", "v")


def from_loralib(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    alpha: float | None = None,
    enable_lora: Enabled | None = None,
    embeddings: Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    base: nn.Module | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    allow_pickle: bool = False,
) -> LoRAAdapter:
    """The adapter in a checkpoint of loralib (microsoft/LoRA), with ΔW equal to loralib's own.

    Args:
        source: a file (.pt, .bin, .safetensors), or the state dict itself.
        alpha: lora_alpha, which no checkpoint says; the scaling is alpha/r, with r from the shapes.
        enable_lora: of the MergedLinear layers, such as [True, False, True]: one list for every layer whose shapes show
            that it is one, or lists by the end of a layer's path ({"attn.c_attn": [False, False, True]}). A layer with
            a single enabled part looks like a plain one: name it, or give `base`.
        embeddings: ends of the paths that are Embedding layers; told from `base` if that is given.
        modules_to_save: names of modules that the checkpoint holds whole ("classifier").
        base: the model it is for, also on the meta device: kinds, sizes and roles are then checked against it.
        base_model: the base's id, for the adapter's config. None takes that of `base`.
        task_type: PEFT's task type, for the adapter's config.
        allow_pickle: read a .pt or .bin, with torch.load(weights_only=True).

    Returns:
        The adapter. Biases in the file (bias="lora_only" or "all") become its biases.

    Raises:
        LoRAConfigError: alpha or enable_lora is missing or impossible; a name matches nothing.
        LoRAFileError: the file is damaged or holds something else; everything that is not understood is listed.

    Source: Hu et al. 2021 (arXiv:2106.09685) §4.1; loralib 0.1.2, layers.py.
    """
    if alpha is None:
        raise LoRAConfigError(
            "alpha was not given, and no checkpoint of loralib says its lora_alpha.",
            name="alpha",
            expected="the lora_alpha that it was trained with",
            remedy="Give alpha=… (--alpha): the paper's GPT-2 runs have 32, its RoBERTa runs 8 or 16.",
        )
    alpha = fields.positive("alpha", alpha)
    if isinstance(source, Mapping):
        named, tensors = "The state dict", checked(source, "The state dict")
    else:
        named = str(source)
        tensors = read_tensors(Path(source), allow_pickle=allow_pickle, within=_WITHIN)
    if tensors and all(name.startswith("module.") for name in tensors):  # saved from DistributedDataParallel
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    layers = survey(base).layers if base is not None else None
    reader = _Reader(
        named,
        alpha,
        enable_lora,
        fields.name_list("embeddings", embeddings),
        fields.name_list("modules_to_save", modules_to_save),
        layers,
    )
    reader.sort(tensors)
    factors = {path: f for path, pair in reader.pairs.items() if (f := reader.factors(path, pair)) is not None}
    if not reader.pairs and not reader.problems:
        reader.problems.append("lora_A: there is none; save lora.lora_state_dict(model)")
    refuse_problems(named, reader.problems, reader.remedy)
    reader.refuse_unused()
    lora_only = all(name.rpartition(".")[0] in factors for name in reader.biases)
    if base is not None and base_model is None:
        base_model = getattr(getattr(base, "config", None), "_name_or_path", None) or None
    config = LoRAConfig(
        alpha=alpha,
        bias="none" if not reader.biases else "lora_only" if lora_only else "all",
        modules_to_save=sorted(reader.modules) or None,
        task_type=task_type,
        base_model=base_model,
        fan_in_fan_out=any(layers[path].info.kind == "conv1d" for path in factors) if layers else False,
    )
    return adapter_of(named, config, factors, reader.biases, reader.modules)


@dataclass
class _Reader:
    source: str
    alpha: float
    enable: Enabled | None
    embeddings: tuple[str, ...]
    heads: tuple[str, ...]
    layers: Mapping[str, Layer] | None
    pairs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remedy: str | None = None
    used: set[str] = field(default_factory=set)  # of the names that the caller gave

    def sort(self, tensors: Mapping[str, Tensor]) -> None:
        """Each tensor to a pair, a bias or a whole module; anything else is a problem."""
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            head = next((h for h in self.heads if f".{name}".find(f".{h}.") >= 0), None)
            if leaf in ("lora_A", "lora_B") and path:
                self.pairs.setdefault(path, {})[leaf[-1]] = tensor
            elif head is not None:
                self.used.add(head)
                whole = f".{name}".partition(f".{head}.")[0] + f".{head}"
                self.modules.setdefault(whole[1:], {})[name[len(whole) :]] = tensor
            elif leaf == "bias" and path:
                self.biases[name] = tensor
            else:
                self.problems.append(f"{name}: neither a factor, a bias, nor part of modules_to_save")
                self.remedy = "Name the modules that were trained whole (modules_to_save), or save lora_state_dict()."

    def factors(self, path: str, pair: Mapping[str, Tensor]) -> Factors | None:
        """One layer's; None if something is wrong, which is then noted."""
        if len(pair) < 2:
            return self._wrong(path, f"lora_{next(iter(pair))} is alone")
        a, b = pair["A"], pair["B"]
        shapes = f"lora_A {list(a.shape)} and lora_B {list(b.shape)}"
        if a.dim() != 2 or b.dim() != 2 or 0 in (*a.shape, *b.shape) or a.shape[0] % b.shape[1]:
            return self._wrong(path, f"{shapes} are no factors of a Linear, Embedding or MergedLinear")
        if not a.is_floating_point() or a.dtype != b.dtype:
            return self._wrong(path, f"lora_A is {a.dtype}, lora_B {b.dtype}")
        layer = self.layers.get(path) if self.layers is not None else None
        if self.layers is not None and layer is None:
            self.remedy = "Give the class of model that it was trained on, or leave base out."
            return self._wrong(path, "the base has no such layer that takes a LoRA")
        parts, enabled = a.shape[0] // b.shape[1], self._enabled(path, a, b, layer)
        if enabled is None and parts > 1:
            return self._wrong(path, f"{shapes}: a MergedLinear with {parts} enabled parts, and no enable_lora for it")
        if enabled is not None and (sum(enabled) != parts or b.shape[0] % parts):
            return self._wrong(path, f"{shapes}: {parts} enabled parts, enable_lora says {enabled}")
        if enabled is not None:
            found = self._merged(path, a, b, enabled, layer)
        else:
            ends = [name for name in self.embeddings if _ends(path, name)]
            self.used.update(ends)
            embedding = layer.info.kind == "embedding" if layer is not None else bool(ends)
            found = Factors("embedding" if embedding else "linear", a, b, self.alpha)
        sizes = (found.in_features, found.out_features)
        if layer is not None and sizes != (want := (layer.info.in_features, layer.info.out_features)):
            return self._wrong(path, f"the factors are {sizes[0]} -> {sizes[1]}, the layer {want[0]} -> {want[1]}")
        return found

    def _wrong(self, path: str, why: str) -> Factors | None:
        self.problems.append(f"{path}: {why}")
        return None

    def _enabled(self, path: str, a: Tensor, b: Tensor, layer: Layer | None) -> list[bool] | None:
        """The list for a layer; None for a plain one."""
        if isinstance(self.enable, Mapping):
            for name, given in self.enable.items():
                if _ends(path, name):
                    self.used.add(name)
                    return _flags(given, name)
            return None
        if self.enable is None:
            return None
        flags = _flags(self.enable, "enable_lora")
        alone = layer is not None and layer.info.out_features != b.shape[0]  # one enabled part of a larger layer
        if a.shape[0] == b.shape[1] and not alone:
            return None
        self.used.add("")
        return flags

    def _merged(self, path: str, a: Tensor, b: Tensor, enabled: list[bool], layer: Layer | None) -> Factors:
        """The groups of the convolution as blocks: part i of the rows gets the next r rows of A and out/len of B."""
        size, r = b.shape[0] // sum(enabled), b.shape[1]
        out = size * len(enabled)
        rows = [range(i * size, (i + 1) * size) for i in range(len(enabled))]
        names: Sequence[str] = _QKV if len(enabled) == 3 else [str(i) for i in range(len(enabled))]
        if layer is not None:  # its own roles, where they are these rows
            known = {spans: role for role, spans in layer.rows.items()}
            names = [known.get((span,), f"rows {span.start}-{span.stop}") for span in rows]
        blocks = [Block(names[i], (rows[i],)) for i, on in enumerate(enabled) if on]
        groups = [(a[g * r : (g + 1) * r], b[g * size : (g + 1) * size]) for g in range(len(blocks))]
        parts = [(block, *group) for block, group in zip(blocks, groups, strict=True)]
        return Factors.stack(parts, out_features=out, alpha=self.alpha)

    def refuse_unused(self) -> None:
        """A name that the caller gave and that nothing has is a mistake."""
        given: dict[str, Sequence[str]] = {"modules_to_save": self.heads}
        if self.layers is None:
            given["embeddings"] = self.embeddings
        if self.enable is not None:
            given["enable_lora"] = tuple(self.enable) if isinstance(self.enable, Mapping) else ("",)
        for keyword, names in given.items():
            for name in names:
                if name not in self.used:
                    value: Any = name or self.enable
                    raise LoRAConfigError(
                        f"{keyword}={value!r} fits no layer of {self.source}.",
                        name=keyword,
                        value=value,
                        expected=sorted({path.rpartition(".")[2] for path in self.pairs}),
                        remedy="Give the end of a path that it holds; name a MergedLinear with one enabled part.",
                    )


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _flags(given: Any, name: str) -> list[bool]:
    flags = list(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else []
    if not flags or not any(flags) or not all(isinstance(flag, bool) for flag in flags):
        raise fields.wrong(name, given, "a list of booleans, at least one of them True, as loralib's enable_lora")
    return flags
