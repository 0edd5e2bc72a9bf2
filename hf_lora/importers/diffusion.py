"""LoRAs of diffusion models: kohya-ss's files, and diffusers' in its three spellings.

    lora_unet_down_blocks_0_…_attn1_to_q.lora_down.weight, .lora_up.weight, .alpha, .dora_scale        kohya-ss
    unet.down_blocks.0.….attn1.processor.to_q_lora.down.weight, .up.weight                             diffusers < 0.17
    unet.….attn1.to_q.lora.down.weight; text_encoder.….q_proj.lora_linear_layer.down.weight            diffusers
    transformer.….to_q.lora_A.weight, .lora_B.weight, .lora_magnitude_vector                           diffusers, PEFT

One file holds several models' adapters: each is a value of its own. An absent alpha means the rank, as both tools read
it. kohya's `ss_…` metadata is kept and never trusted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from .. import safefile
from ..adapter import LoRAAdapter
from ..config import LoRAConfig
from ..errors import LoRAConfigError, LoRAError, LoRAUnsupportedError
from ..survey import Layer, survey
from ..values import Factors
from .kohyanames import by_underscores, component_of, diffusers_path, words_of
from .reading import adapter_of, checked, read_tensors, refuse_problems

__all__ = ["DiffusionLoRA", "from_diffusion"]

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

# The end of a key → what the tensor is. The longest end wins.
_LEAVES: Mapping[str, str] = {
    **dict.fromkeys((".lora_down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight"), "A"),
    **dict.fromkeys((".lora_up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight"), "B"),
    **dict.fromkeys((".lora_A.weight", ".lora_A.default.weight", "_lora.down.weight"), "A"),
    **dict.fromkeys((".lora_B.weight", ".lora_B.default.weight", "_lora.up.weight"), "B"),
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    **dict.fromkeys((".lora_magnitude_vector", ".lora_magnitude_vector.weight"), "magnitude"),
}
_OTHER_METHODS = (  # what is no LoRA, by the end of a key
    (re.compile(r"\.hada_[wt]\d\w*$"), "LoHa's Hadamard factors"),
    (re.compile(r"\.lokr_\w+$"), "LoKr's Kronecker factors"),
    (re.compile(r"\.lora_mid\.weight$"), "LoCon's middle (Tucker) factor"),
    (re.compile(r"\.(oft_blocks|oft_diag)$"), "OFT's rotations"),
    (re.compile(r"\.on_input$|\.(w_norm|b_norm)$"), "IA3's or a norm's scales"),
    (re.compile(r"\.(diff|diff_b)$"), "a whole difference of weights"),
    (re.compile(r"\.bias$"), "biases"),
)
# to_q_lora of an attention processor → the layer: of diffusers' attention, and of a text encoder's.
_PROCESSOR: Mapping[str, tuple[str, str]] = {
    "to_q": ("to_q", "q_proj"),
    "to_k": ("to_k", "k_proj"),
    "to_v": ("to_v", "v_proj"),
    "to_out": ("to_out.0", "out_proj"),
}
_METADATA = "lora_adapter_metadata"  # diffusers' own: PEFT's configs, each field after its component's name


@dataclass(frozen=True)
class DiffusionLoRA:
    """What one file of a diffusion model held.

    Args:
        components: "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3" → its adapter.
        metadata: the file's own words about itself (kohya's `ss_…`): for people, not checked.
    """

    components: Mapping[str, LoRAAdapter]
    metadata: Mapping[str, str]

    def __getitem__(self, component: str) -> LoRAAdapter:
        return self.components[component]

    def __iter__(self) -> Iterator[str]:
        return iter(self.components)

    def __len__(self) -> int:
        return len(self.components)


def from_diffusion(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    base: Mapping[str, nn.Module] | None = None,
    base_model: str | None = None,
    allow_pickle: bool = False,
) -> DiffusionLoRA:
    """The adapters in a LoRA file of a diffusion model: one value for each part of the pipeline.

    Args:
        source: a file (.safetensors, .pt, .bin), or its tensors.
        base: component → model, also on the meta device ({"unet": pipe.unet}): names with underscores are then those
            of its layers, and kinds and sizes are checked. Without it names are read with the words that diffusers'
            and transformers' models have.
        base_model: the base's id on the Hub, for the adapters' configs.
        allow_pickle: read a .pt or .bin, with torch.load(weights_only=True).

    Returns:
        `found["unet"]` and so on.

    Raises:
        LoRAUnsupportedError: LoHa, LoKr, OFT, a middle factor, whole differences: another method, named by its keys.
        LoRAFileError: the file is damaged or holds something else; every key that is not understood is listed, with
            the reason.
        LoRAConfigError: `base` names no component.

    Source: kohya-ss/sd-scripts, networks/lora.py; diffusers 0.42, loaders/lora_conversion_utils.py.
    """
    for component in base or {}:
        if component not in COMPONENTS:
            raise LoRAConfigError(
                f"base: {component!r} is no part of a pipeline that takes LoRAs.",
                name="base",
                value=component,
                expected=COMPONENTS,
                remedy='Give {"unet": pipe.unet}, say.',
            )
    if isinstance(source, Mapping):
        named, tensors, metadata = "The state dict", checked(source, "The state dict"), {}
    else:
        named, path = str(source), Path(source)
        tensors, metadata = read_tensors(path, allow_pickle=allow_pickle), _metadata(path)
    _refuse_other_methods(named, tensors)
    reader = _Reader({key: survey(model).layers for key, model in (base or {}).items()})
    reader.sort(tensors)
    configs = _configs(named, metadata)
    found: dict[str, dict[str, Factors]] = {}
    rslora = {component: config.use_rslora for component, config in configs.items()}
    for (component, layer), parts in reader.parts.items():
        alphas = configs[component].resolve([layer])[layer][1] if component in configs else None
        factors = reader.factors(component, layer, parts, alphas, rslora.get(component, False))
        if factors is not None:
            found.setdefault(component, {})[layer] = factors
    if not reader.parts and not reader.problems:
        reader.problems.append("lora_down.weight, lora_A.weight: there is none")
    refuse_problems(named, reader.problems, reader.remedy)
    adapters = {}
    for component in (name for name in COMPONENTS if name in found):
        layers = found[component]
        config = LoRAConfig(
            base_model=base_model,
            use_dora=any(pair.extras for pair in layers.values()),
            use_rslora=rslora.get(component, False),
        )
        adapters[component] = adapter_of(f"{named} ({component})", config, layers)
    kept = {key: value for key, value in metadata.items() if key != _METADATA}
    return DiffusionLoRA(MappingProxyType(adapters), MappingProxyType(kept))


def _metadata(path: Path) -> dict[str, str]:
    if path.suffix != ".safetensors":
        return {}
    with safefile.reading(path) as file:
        return dict(safefile.read_header(file, path).metadata)


def _configs(source: str, metadata: Mapping[str, str]) -> dict[str, LoRAConfig]:
    """PEFT's configs that diffusers wrote beside the tensors, by component: they say alpha."""
    if _METADATA not in metadata:
        return {}
    said = safefile.load_json(metadata[_METADATA].encode(), f"{source}: {_METADATA}")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        component, dot, name = key.partition(".")
        if dot and component in COMPONENTS:
            parts.setdefault(component, {})[name] = value
    return {component: LoRAConfig.from_peft({"peft_type": "LORA", **said}) for component, said in parts.items()}


def _refuse_other_methods(source: str, tensors: Mapping[str, Tensor]) -> None:
    found = {key: what for key in tensors for ends, what in _OTHER_METHODS if ends.search(key)}
    if found:
        raise LoRAUnsupportedError(
            f"{source} has {', '.join(sorted(set(found.values())))}, which are not imported.",
            name=next(iter(found)),
            value=next(iter(found.values())),
            facts=[f"{key}: {what}" for key, what in found.items()],
            remedy="Merge it into its base with the tool that made it, and extract a LoRA (extract_lora).",
        )


@dataclass
class _Reader:
    bases: Mapping[str, Mapping[str, Layer]]
    parts: dict[tuple[str, str], dict[str, Tensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remedy: str | None = None

    def __post_init__(self) -> None:
        self.names = {component: by_underscores(layers) for component, layers in self.bases.items()}

    def sort(self, tensors: Mapping[str, Tensor]) -> None:
        """Each tensor to a layer's A, B, alpha or magnitude; anything else is a problem."""
        for key, tensor in tensors.items():
            end = max((end for end in _LEAVES if key.endswith(end)), key=len, default=None)
            if end is None:
                self.problems.append(f"{key}: no part of a LoRA that is known")
                continue
            where = self._where(key.removesuffix(end), end.startswith("_lora"))
            if where is None:
                continue
            parts = self.parts.setdefault(where, {})
            if _LEAVES[end] in parts:
                self.problems.append(f"{key}: {where[0]}.{where[1]} has this twice")
            parts[_LEAVES[end]] = tensor
        for component, path in [where for where, parts in self.parts.items() if parts.keys() == {"magnitude"}]:
            if path.endswith(".to_out") and (at := (component, f"{path}.0")) in self.parts:  # so diffusers writes it
                self.parts[at].update(self.parts.pop((component, path)))

    def _where(self, name: str, processor: bool) -> tuple[str, str] | None:
        """(component, path) of a layer's name; None if it is not understood, which is then noted."""
        if "." not in name:
            return self._by_underscores(name)
        component, _, path = name.partition(".")
        if component not in COMPONENTS:
            self.remedy = "One component's file of PEFT is loaded with LoRAAdapter.load()."
            return self._wrong(name, f"{component!r} is no component ({', '.join(COMPONENTS)})")
        path = path.replace(".processor.", ".")
        if processor:
            above, _, layer = path.rpartition(".")
            if layer not in _PROCESSOR:
                return self._wrong(name, f"{layer!r} is no layer of an attention processor")
            path = f"{above}.{_PROCESSOR[layer][component.startswith('text')]}"
        return self._in_base(name, component, path)

    def _by_underscores(self, name: str) -> tuple[str, str] | None:
        found = component_of(name)
        if found is None:
            return self._wrong(name, "its prefix is of no component that is known (lora_unet, lora_te1, …)")
        component, rest = found
        ways = words_of(rest)
        paths = list(dict.fromkeys(path for way in ways if (path := diffusers_path(way)) is not None))
        if component in self.bases:
            table = self.names[component]
            there = [path for path in paths if path in self.bases[component]] or list(table.get(rest, []))
            there = there or list(table.get(rest.removeprefix("text_model_"), []))
            if len(there) == 1:
                return component, there[0]
            self.remedy = "Give the model that it was trained on as base."
            which = f"may be {' or '.join(there)}" if there else "is no layer of the base that takes a LoRA"
            return self._wrong(name, f"{rest} {which}")
        if len(paths) != 1:
            self.remedy = f"Give the model: base={{{component!r}: model}}."
            why = f"may be {' or '.join(paths)}" if paths else "underscores stand for dots, and its words are not known"
            return self._wrong(name, f"{rest}: {why}")
        return component, paths[0]

    def _in_base(self, name: str, component: str, path: str) -> tuple[str, str] | None:
        layers = self.bases.get(component)
        if layers is None or path in layers:
            return component, path
        if (shorter := path.removeprefix("text_model.")) in layers:  # transformers 5 has one level less
            return component, shorter
        self.remedy = "Give the model that it was trained on as base."
        return self._wrong(name, "is no layer of the base that takes a LoRA")

    def factors(
        self, component: str, path: str, parts: Mapping[str, Tensor], alpha: float | None, use_rslora: bool
    ) -> Factors | None:
        """One layer's; None if something is wrong, which is then noted."""
        name = f"{component}.{path}"
        if "A" not in parts or "B" not in parts:
            return self._bad(name, f"only {', '.join(sorted(parts))}: a LoRA is a pair, down and up")
        a, b = parts["A"], parts["B"]
        shapes = f"down {list(a.shape)} and up {list(b.shape)}"
        if a.dim() != b.dim() or a.dim() < 2 or a.dim() > 5 or 0 in (*a.shape, *b.shape) or set(b.shape[2:]) - {1}:
            return self._bad(name, f"{shapes} are no pair of a Linear or a convolution")
        if a.shape[0] != b.shape[1]:
            return self._bad(name, f"{shapes}: their ranks are not the same")
        kernel, layer = tuple(a.shape[2:]), self.bases.get(component, {}).get(path)
        a, b = a.flatten(1), b.flatten(1)
        if (said := parts.get("alpha")) is not None:
            if said.numel() != 1 or said.is_complex():
                return self._bad(name, f"alpha has {said.numel()} numbers")
            alpha = float(said)
        options: dict[str, Any] = {"kind": "linear"}
        if kernel and not (set(kernel) == {1} and layer is not None and layer.info.kind == "linear"):
            options = {"kind": "conv", "kernel": kernel}
        scale = parts.get("dora_scale", parts.get("magnitude"))
        if scale is not None:
            across = "dora_scale" in parts and scale.shape[:1] != (len(b),)
            if across or scale.numel() != len(b):
                what = f"the magnitude is {list(scale.shape)}, and PEFT's DoRA has one for each of the {len(b)} outputs"
                return self._bad(name, what)
            options["extras"] = {"magnitude": scale.flatten()}
        try:
            found = Factors(A=a, B=b, alpha=float(len(a)) if alpha is None else alpha, use_rslora=use_rslora, **options)
        except LoRAError as error:
            return self._bad(name, error.message)
        sizes = (found.in_features, found.out_features)
        if layer is not None and sizes != (want := (layer.info.in_features, layer.info.out_features)):
            return self._bad(name, f"the factors are {sizes[0]} -> {sizes[1]}, the layer {want[0]} -> {want[1]}")
        return found

    def _bad(self, name: str, why: str) -> Factors | None:
        self.problems.append(f"{name}: {why}")
        return None

    def _wrong(self, name: str, why: str) -> tuple[str, str] | None:
        line = f"{name}: {why}"
        if line not in self.problems:
            self.problems.append(line)
        return None
