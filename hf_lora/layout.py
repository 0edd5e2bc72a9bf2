"""PEFT's tensor names: which tensor of a state dict is what, and the state dict of an adapter.

A plan is made from names, dtypes and shapes alone, so that a file is judged before its tensors are allocated.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .attentionpairs import TWICE, around, file_path, filled, model_path, taken_down
from .config import LoRAConfig
from .errors import LoRAError, LoRAFileError, LoRAUnsupportedError
from .expertnames import expert_of, matching
from .experts import Stack, in_files, named, rank_major, stacks
from .extras import EXTRAS, SCRATCH, asked_for, beside
from .forms import Form, form_of, forms_asked
from .tokenfields import ROWS, ids_of
from .values import AdapterValue, Block, Factors, group_blocks

__all__ = [
    "Plan",
    "assemble",
    "blocks_json",
    "disk_config",
    "from_state_dict",
    "make_plan",
    "is_module_path",
    "parse_blocks",
    "refuse_non_finite",
    "to_state_dict",
]

PREFIX = "base_model.model."

# What other adapters put beside or instead of plain factors: a piece of the name -> what it belongs to.
_FOREIGN = {
    "trainable_tokens_": "trainable_token_indices",
    "lora_E": "peft_type ADALORA",
    "ranknum": "peft_type ADALORA",
    "hada_w": "peft_type LOHA",
    "lokr_w": "peft_type LOKR",
    "ia3_l": "peft_type IA3",
    "vera_lambda": "peft_type VERA",
    "prompt_embeddings": "a prompt-learning peft_type",
    "prompt_encoder": "a prompt-learning peft_type",
}
_FOREIGN_KEY = re.compile(r"\.(?:" + "|".join(map(re.escape, _FOREIGN)) + ")")
# lora_A.<adapter's name>.weight: written by PEFT's training checkpoints and by tools that save the module's own names.
_NAMED = re.compile(r"(.+)\.lora_([AB])\.([^.]+)\.weight|(.+)\.lora_embedding_([AB])\.([^.]+)")
# The same of a variant's vector: lora_B.default.bias, lora_magnitude_vector.default.weight.
_NAMED_EXTRA = re.compile(
    "|".join(
        rf"(?P<{extra.name}>.+)\.{head}\.(?P<{extra.name}_of>[^.]+)(?:\.{last or 'weight'})" + ("" if last else "?")
        for extra in EXTRAS.values()
        for head, _, last in [extra.key.partition(".")]
    )
)
# Names of `extras.SCRATCH`, with or without the adapter's.
_SCRATCH = re.compile(
    "|".join(
        rf".+\.{re.escape(head)}\.(?:[^.]+\.)?(?P<{name}>{re.escape(last)})"
        for key, name in SCRATCH.items()
        for head, _, last in [key.partition(".")]
    )
)
_TOKENS = re.compile(rf"(.+)\.{re.escape(ROWS)}(?:\.([^.]+))?")  # with or without the adapter's name
_WRAPPED = re.compile(r"(.+?)\.(modules_to_save|original_module)\.(.+)")  # names inside PEFT's wrapper of a head
_BAD_NAME = re.compile(r"[/\\\[\]\x00-\x1f\x7f]|^\.|\.\.|\.$|^$|^[A-Za-z]:")
_ENDINGS = {
    ".lora_A.weight": ("linear", "A"),
    ".lora_B.weight": ("linear", "B"),
    ".lora_embedding_A": ("embedding", "A"),
    ".lora_embedding_B": ("embedding", "B"),
}
_EXTRA_ENDINGS = {f".{extra.key}{weight}": extra.name for extra in EXTRAS.values() for weight in ("", ".weight")}

_MOST_GROWN = 128  # times that the plain factors of a file may be as large as those stored

Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass
class Plan:
    """Where every tensor of a file goes; the values are the file's own names."""

    factors: dict[str, dict[str, str]] = field(default_factory=dict)  # path -> {"kind": …, "A": name, "B": name}
    extras: dict[str, dict[str, str]] = field(default_factory=dict)  # path -> {"magnitude": name, …}
    biases: dict[str, str] = field(default_factory=dict)  # "X.bias" -> name
    modules: dict[str, dict[str, str]] = field(default_factory=dict)  # path -> {"weight": name, …}
    embeddings: dict[str, str] = field(default_factory=dict)  # "X.weight" -> name
    twins: dict[str, str] = field(default_factory=dict)  # name -> name of a tensor that must be equal
    unused: list[str] = field(default_factory=list)  # names of the base's own tensors that the adapter replaces
    resolved: dict[str, tuple[int, float]] = field(default_factory=dict)  # path -> (rank, alpha)
    forms: dict[str, Form] = field(default_factory=dict)  # of those that are not stored whole
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of convolutions
    groups: dict[str, int] = field(default_factory=dict)  # of the same
    experts: dict[str, int] = field(default_factory=dict)  # paths of 3-D parameters -> how many experts


def make_plan(config: LoRAConfig, specs: Mapping[str, Spec], source: str) -> Plan:
    """Sort the tensors of a file by name and check their dtypes and shapes against `config`.

    Raises:
        LoRAFileError: missing, unknown, mis-named or mis-shaped tensors; it lists every one.
        LoRAUnsupportedError: tensors of a variant that hf_lora does not compute.
    """
    problems: list[str] = []
    foreign: dict[str, str] = {}
    adapters: set[str] = set()
    plan, rest = Plan(), {}
    for name in specs:
        key = name[len(PREFIX) :]
        if not name.startswith(PREFIX):
            problems.append(f"{name!r} does not start with {PREFIX!r}")
        elif not is_module_path(key):
            problems.append(f"{name[:200]!r} is no module path")
        elif (ending := _ending(key, _ENDINGS)) is not None:
            _put(plan, key[: -len(ending)], *_ENDINGS[ending], name, problems)
        elif (ending := _ending(key, _EXTRA_ENDINGS)) is not None:
            _put_extra(plan, key[: -len(ending)], _EXTRA_ENDINGS[ending], name, problems)
        elif (match := _SCRATCH.fullmatch(key)) is not None:
            part = next(own for own in SCRATCH.values() if match[own])
            if part in asked_for(config):
                plan.unused.append(name)
            else:
                problems.append(f"{name!r} is there, but the config does not set {EXTRAS[part].field}")
        elif (match := _NAMED_EXTRA.fullmatch(key)) is not None:
            extra = next(extra for extra in EXTRAS if match[extra])
            adapters.add(match[f"{extra}_of"])
            _put_extra(plan, match[extra], extra, name, problems)
        elif (match := _TOKENS.fullmatch(key)) is not None:
            adapters |= {match[2]} - {None}
            _put_rows(config, plan, match[1], name, specs[name], problems)
        elif (match := _FOREIGN_KEY.search(f".{key}")) is not None:
            foreign[name] = _FOREIGN[match[0][1:]]
        elif (match := _NAMED.fullmatch(key)) is not None:
            path, part, adapter = match.groups()[:3] if match[1] else match.groups()[3:]
            adapters.add(adapter)
            _put(plan, path, "linear" if match[1] else "embedding", part, name, problems)
        elif ".lora_" in f".{key}":
            foreign[name] = "target_parameters" if re.search(r"lora_[AB]$", key) else "an unknown LoRA variant"
        elif (match := _WRAPPED.fullmatch(key)) is not None:
            path, copy, parameter = match.groups()
            own = f"{PREFIX}{path}.{parameter}"
            adapter, _, parameter = parameter.partition(".")
            if own in specs and copy == "modules_to_save":
                plan.twins[name] = own  # PEFT with bias="all" writes a head's bias under both names …
            elif own in specs:
                plan.unused.append(name)  # … and also that of the base's head, which the trained one replaces
            elif copy == "modules_to_save" and parameter:
                adapters.add(adapter)
                rest[f"{path}.{parameter}"] = name
            else:
                problems.append(f"{name!r} is {own!r} of the base, without the trained one")
        else:
            rest[key] = name
    _refuse_foreign(foreign, source)
    if len(adapters) > 1:
        problems.append(f"the names belong to several adapters: {', '.join(sorted(adapters))}")
    if not plan.factors and not problems:
        raise LoRAFileError(
            f"{source} holds no LoRA tensors; its first names are {sorted(specs)[:3]}.",
            name="lora_A",
            value=sorted(specs)[:20],
            remedy="Give the adapter's own weights, not a model's.",
        )
    if config.trainable_token_indices is not None and not plan.modules and not problems:
        problems.append("it holds no rows of tokens, which trainable_token_indices names")
    _check_factors(config, plan, specs, source, problems)
    _sort_rest(config, plan, rest, specs, problems)
    if problems:
        raise LoRAFileError(
            f"{source} does not hold what its config says: {len(problems)} of its {len(specs)} tensors are wrong."
            if len(problems) > 1
            else f"{source} does not hold what its config says.",
            value=problems,
            facts=problems,
            remedy="Save the adapter again, or correct adapter_config.json.",
        )
    return plan


def is_module_path(path: str) -> bool:
    """Whether a name from a file can be a module's or parameter's: dotted, not long, and no path on a disk."""
    return 0 < len(path) <= 1000 and not _BAD_NAME.search(path)


def _ending(key: str, endings: Iterable[str]) -> str | None:
    for ending in endings:
        if key.endswith(ending) and len(key) > len(ending):
            return ending
    return None


def _put(plan: Plan, path: str, kind: str, part: str, name: str, problems: list[str]) -> None:
    out = model_path(path)  # of an nn.MultiheadAttention
    path, kind = (path, kind) if out is None else (out, "attention")
    pair = plan.factors.setdefault(path, {"kind": kind})
    if pair["kind"] != kind or part in pair:
        problems.append(f"{name!r} is a second {part} for {path!r}")
    else:
        pair[part] = name


def _put_extra(plan: Plan, path: str, part: str, name: str, problems: list[str]) -> None:
    found = plan.extras.setdefault(path, {})
    if part in found:
        problems.append(f"{name!r} is a second {EXTRAS[part].key} for {path!r}")
    found.setdefault(part, name)


def _put_rows(config: LoRAConfig, plan: Plan, path: str, name: str, spec: Spec, problems: list[str]) -> None:
    ids, (dtype, shape) = ids_of(config.trainable_token_indices, path), spec
    if ids is None:
        problems.append(f"{name!r} is there, but trainable_token_indices of the config does not name it")
    elif len(shape) != 2 or shape[0] != len(ids) or not dtype.is_floating_point:
        problems.append(f"{name!r} is {dtype} {list(shape)}; it should be floating rows of {len(ids)} tokens")
    elif path in plan.modules:
        problems.append(f"{name!r} holds the rows of {path!r} a second time")
    else:
        plan.modules[path] = {ROWS: name}


def _refuse_foreign(foreign: Mapping[str, str], source: str) -> None:
    if foreign:
        name, what = next(iter(foreign.items()))
        raise LoRAUnsupportedError(
            f"{source} has tensors of {', '.join(sorted(set(foreign.values())))}, which hf_lora does not compute.",
            name=name,
            value=what,
            facts=[f"{key}: {value}" for key, value in foreign.items()],
            remedy="Load it with PEFT, or merge it there and extract a plain LoRA.",
        )


def _check_factors(config: LoRAConfig, plan: Plan, specs: Mapping[str, Spec], source: str, problems: list[str]) -> None:
    higher: dict[str, str] = {}
    rows = {path: specs[pair["A"]][1][:1] for path, pair in plan.factors.items() if "A" in pair}
    parameters = named(config, {path: shape[0] if shape else 0 for path, shape in rows.items()}, source)
    plan.factors = {parameters.get(path, path): pair for path, pair in plan.factors.items()}
    outs = {path: path.rpartition(".")[0] for path, pair in plan.factors.items() if pair["kind"] == "attention"}
    for path in outs.values():
        if path in plan.factors:
            plan.factors[path]["kind"] = "attention"
    known = config.resolve([outs.get(path, path) for path in plan.factors])
    plan.resolved = {path: known[path] for path in plan.factors if path in known}
    for path, module in outs.items():
        rank, alpha = known[module]
        plan.resolved[path] = (rank, alpha * TWICE)
    formed = bool(forms_asked(config))
    for path, pair in plan.factors.items():
        if "A" not in pair or "B" not in pair:
            has, lacks = ("A", "B") if "A" in pair else ("B", "A")
            problems.append(f"{pair[has]!r} has no lora_{lacks} beside it")
            continue
        (a_type, a), (b_type, b) = specs[pair["A"]], specs[pair["B"]]
        rank = plan.resolved[path][0]
        form = form_of(config, path) if formed else None
        if form is not None and not (pair["kind"] == "embedding" and form.pooled):
            plan.forms[path] = form
            if len(a) == len(b) == 2:
                a, b = form.whole(a, b)
        elif _is_convolution(a, b):
            plan.kernels[path], plan.groups[path] = a[2:], a[0] // b[1]
            a, b = (a[0], math.prod(a[1:])), (b[0], a[0])
        if len(a) != 2 or len(b) != 2:
            if len(a) == 2 and len(b) == 3:
                higher[pair["B"]] = f"enable_lora (PEFT before 0.3), shape {list(b)}"
            else:
                problems.append(f"{path!r}: lora_A {list(a)} and lora_B {list(b)} are not matrices")
        elif a[0] != b[1]:
            problems.append(f"{path!r}: lora_A {list(a)} has rank {a[0]}, lora_B {list(b)} has rank {b[1]}")
        elif path in parameters.values() and a[0] % rank == 0:
            plan.experts[path] = a[0] // rank
        elif a[0] != rank:
            problems.append(f"{path!r}: its tensors have rank {a[0]}, the config says {rank}")
        elif 0 in a or 0 in b:
            problems.append(f"{path!r}: lora_A {list(a)} or lora_B {list(b)} is empty")
        elif a_type != b_type or not a_type.is_floating_point:
            problems.append(f"{path!r}: lora_A is {a_type}, lora_B {b_type}; both must have one floating dtype")
    _refuse_foreign(higher, source)
    if (plan.forms or plan.kernels) and not problems:
        _check_growth(plan, specs, problems)
    _check_extras(config, plan, specs, problems)


def _is_convolution(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether these are the shapes of a convolution's pair: (r, in, k…) and (out, r/groups, 1…)."""
    if not 2 < len(a) == len(b) < 6 or 0 in a or 0 in b or set(b[2:]) != {1}:
        return False
    return a[0] % b[1] == 0 and b[0] % (a[0] // b[1]) == 0


def _extra_shape(name: str, length: int, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a file has a variant's vector in: a magnitude of a convolution is (1, out, 1…), as its norms."""
    return (1, length, *(1 for _ in kernel)) if kernel and name == "magnitude" else (length,)


def _check_growth(plan: Plan, specs: Mapping[str, Spec], problems: list[str]) -> None:
    """A file's settings say how large its factors become: nothing is allocated that is out of proportion to it."""
    pairs = {path: (specs[pair["A"]][1], specs[pair["B"]][1]) for path, pair in plan.factors.items()}
    held = sum(math.prod(shape) for pair in pairs.values() for shape in pair)
    whole = [plan.forms[path].whole(*pair) if path in plan.forms else pair for path, pair in pairs.items()]
    grown = sum(math.prod(shape) for pair in whole for shape in pair)
    grown += sum(math.prod(pairs[path][1]) * (groups - 1) for path, groups in plan.groups.items())
    if grown > _MOST_GROWN * held:
        field = next((form.field for form in plan.forms.values()), "groups of convolutions")
        problems.append(
            f"{field}: factors of {held:,} numbers would become {grown:,}, over {_MOST_GROWN} times as many"
        )


def _check_extras(config: LoRAConfig, plan: Plan, specs: Mapping[str, Spec], problems: list[str]) -> None:
    """Every layer has the vectors that the config asks for, and no others, of its size."""
    asked = asked_for(config)
    for path, found in plan.extras.items():
        for part, name in found.items():
            extra, (dtype, shape) = EXTRAS[part], specs[name]
            pair = plan.factors.get(path, {})
            if part not in asked:
                problems.append(f"{name!r} is there, but the config does not set {extra.field}")
            elif "A" not in pair or "B" not in pair:
                problems.append(f"{name!r}: {path!r} has no factors")
            elif min(len(specs[pair[side]][1]) for side in "AB") >= 2:  # else that is said already
                (rank, inner, *_), (outer, *_) = specs[pair["A"]][1], specs[pair["B"]][1]
                size = _extra_shape(part, extra.length(config, inner, outer, rank), plan.kernels.get(path, ()))
                if shape != size or not dtype.is_floating_point:
                    problems.append(f"{name!r} is {dtype} {list(shape)}; it should be a floating {list(size)}")
    for path in plan.factors:
        for part in asked:
            if part not in plan.extras.get(path, {}):
                extra = EXTRAS[part]
                problems.append(f"{path!r} has no {extra.key}, which {extra.field} needs")


def _sort_rest(
    config: LoRAConfig, plan: Plan, rest: Mapping[str, str], specs: Mapping[str, Spec], problems: list[str]
) -> None:
    """Biases, copies of embeddings, and modules that were saved whole."""
    heads = config.modules_to_save or ()
    loose: dict[str, dict[str, str]] = {}
    for key, name in rest.items():
        path, _, parameter = key.rpartition(".")
        if path.endswith(".token_adapter.base_layer") and parameter == "weight":  # PEFT's copy of a resized embedding
            plan.embeddings[f"{path.removesuffix('.token_adapter.base_layer')}.weight"] = name
        elif path.endswith(".base_layer"):
            path = path.removesuffix(".base_layer")
            if path not in plan.factors or parameter not in ("weight", "bias"):
                problems.append(f"{name!r}: {path!r} has no factors")
            elif parameter == "bias" and config.bias != "none":
                plan.biases[f"{path}.bias"] = name
            else:
                plan.embeddings[f"{path}.{parameter}"] = name
        elif path in plan.factors:
            if parameter == "bias" and config.bias != "none":  # PEFT before 0.7
                plan.biases[key] = name
            else:
                problems.append(f"{name!r}: a second {parameter} for the adapted {path!r}")
        elif (head := _head(path, heads)) is not None:
            plan.modules.setdefault(head, {})[key[len(head) + 1 :]] = name
        else:
            loose.setdefault(path, {})[parameter] = name
    for path, state in loose.items():
        if path and "weight" in state:
            # A head saved though modules_to_save does not name it, or an embedding that was resized.
            plan.modules[path] = dict(state)
        elif path and set(state) == {"bias"} and config.bias == "all":
            plan.biases[f"{path}.bias"] = state["bias"]
        else:
            problems += [f"{name!r} is neither a factor, a trained bias nor a whole module" for name in state.values()]
    for name in (*plan.biases.values(), *plan.embeddings.values()):
        if not specs[name][0].is_floating_point:
            problems.append(f"{name!r} has dtype {specs[name][0]}, which no bias or embedding has")


def _head(path: str, heads: Sequence[str]) -> str | None:
    """The outermost module on `path` that a name in modules_to_save means; PEFT compares ends, without a dot."""
    if not heads:
        return None
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        prefix = ".".join(parts[:count])
        if any(prefix.endswith(head) for head in heads):
            return prefix
    return None


# -- values <-> tensors ----------------------------------------------------------------------------------------------


def assemble(
    config: LoRAConfig,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    blocks: Mapping[str, tuple[Block, ...]],
    source: str,
    together: Tensor | None = None,
) -> AdapterValue:
    """The value that `plan` describes; non-finite tensors are refused, and listed.

    `together`: all tensors as one flat tensor, if there is such a thing, which is faster to look through.
    """
    if together is None or not _sums_finite(together):
        refuse_non_finite(tensors, source)
    for twin, own in plan.twins.items():
        if not torch.equal(tensors[twin], tensors[own]):
            raise LoRAFileError(f"{source}: {twin!r} and {own!r} are one parameter but differ.", name=twin)
    unknown = sorted(blocks.keys() - plan.factors.keys())
    if unknown:
        raise LoRAFileError(f"{source} has blocks for {unknown}, which have no factors.", name=unknown[0])
    try:
        stacked = {
            path: Stack(A, rank_major(B, n, back=True), n, plan.resolved[path][1], config.use_rslora)
            for path, n in plan.experts.items()
            for A, B in [[tensors[plan.factors[path][part]] for part in ("A", "B")]]
        }
        factors = {
            path: Factors(
                **_pair(plan, path, tensors, blocks.get(path, ())),
                alpha=plan.resolved[path][1],
                use_rslora=config.use_rslora,
                extras={part: tensors[name].view(-1) for part, name in plan.extras.get(path, {}).items()},
            )
            for path, pair in plan.factors.items()
            if path not in plan.experts
        }
        for path, stack in stacked.items():
            factors |= stack.pairs(path)
        return AdapterValue(
            config,
            taken_down(factors),
            biases={key: tensors[name] for key, name in plan.biases.items()},
            modules={path: {k: tensors[n] for k, n in state.items()} for path, state in plan.modules.items()},
            embeddings={key: tensors[name] for key, name in plan.embeddings.items()},
        )
    except LoRAError as error:
        raise LoRAFileError(f"{source}: {error.message}", name=error.name, value=error.value) from error


def _pair(plan: Plan, path: str, tensors: Mapping[str, Tensor], blocks: tuple[Block, ...]) -> dict[str, Any]:
    """A and B whole, their kind, and their form."""
    pair = plan.factors[path]
    A, B = (tensors[pair[part]] for part in ("A", "B"))
    form, kernel = plan.forms.get(path), plan.kernels.get(path)
    if kernel is not None:
        groups = plan.groups[path]
        A, B = A.flatten(1), B.flatten(1)
        B = torch.block_diag(*B.chunk(groups)) if groups > 1 else B
        return {"kind": "conv", "A": A, "B": B, "kernel": kernel, "blocks": group_blocks(len(B), groups)}
    if form is not None:
        A, B = form.plain(A, B)
    return {"kind": pair["kind"], "A": A, "B": B, "form": form, "blocks": blocks}


def _sums_finite(tensor: Tensor) -> bool:
    """Whether the sum is finite: then every term is. It may overflow though every term is finite."""
    if not tensor.is_floating_point():
        return True
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return bool(tensor.detach().sum(dtype=wide).isfinite())


def refuse_non_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise `LoRAFileError`, naming every one, if tensors of a file hold NaN or infinity."""
    bad = []
    for name, tensor in tensors.items():
        if not _sums_finite(tensor) and not tensor.isfinite().all():
            bad.append(f"{name}: {int((~tensor.isfinite()).sum())} of {tensor.numel()} values are NaN or infinite")
    if bad:
        raise LoRAFileError(
            f"{source} has {len(bad)} tensors that are not finite.",
            name=bad[0].split(":")[0],
            value=bad,
            facts=bad,
            remedy="The training run diverged: use an earlier checkpoint.",
        )


def from_state_dict(
    config: LoRAConfig,
    tensors: Mapping[str, Tensor],
    *,
    blocks: Mapping[str, tuple[Block, ...]] | None = None,
    source: str = "The state dict",
) -> AdapterValue:
    """The adapter that PEFT-named `tensors` hold ("base_model.model." + path + ".lora_A.weight", …).

    Args:
        config: rank and alpha of every module are taken from it and checked against the tensors.
        tensors: kept as they are, not copied.
        blocks: slices of fused layers, by module path.
        source: what an error calls the state dict.

    Raises:
        LoRAFileError: the tensors are not what `config` says; every one is listed.
        LoRAUnsupportedError: fields or tensors that hf_lora does not compute.
    """
    config.require_supported()
    plan = make_plan(config, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}, source)
    return assemble(config, plan, tensors, blocks or {}, source)


def to_state_dict(value: AdapterValue) -> dict[str, Tensor]:
    """PEFT's state dict of an adapter: what adapter_model.safetensors holds. The tensors are not copied."""
    found: dict[str, Tensor] = {}
    for path, stack in in_files(stacks(value.factors)).items():
        found[f"{PREFIX}{path}.lora_A.weight"] = stack.A
        found[f"{PREFIX}{path}.lora_B.weight"] = rank_major(stack.B, stack.experts)
    layers = {path: factors for path, factors in value.factors.items() if expert_of(path) is None}
    for path, factors in filled(layers).items():
        A, B = factors.stored()
        path = file_path(path, factors)
        if factors.kind == "embedding":
            found[f"{PREFIX}{path}.lora_embedding_A"] = A
            found[f"{PREFIX}{path}.lora_embedding_B"] = B
        else:
            found[f"{PREFIX}{path}.lora_A.weight"] = A
            found[f"{PREFIX}{path}.lora_B.weight"] = B
        found |= {
            f"{PREFIX}{path}.{EXTRAS[name].key}": tensor.view(_extra_shape(name, len(tensor), factors.kernel))
            for name, tensor in factors.extras.items()
        }
        found |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in beside(factors.extras).items()}
    for name, tensor in (*value.biases.items(), *value.embeddings.items()):
        path, _, parameter = name.rpartition(".")
        found[f"{PREFIX}{path}.base_layer.{parameter}" if path in value.factors else PREFIX + name] = tensor
    for path, state in value.modules.items():
        for name, tensor in state.items():
            found[f"{PREFIX}{path}.{name}"] = tensor
    return found


def disk_config(value: AdapterValue) -> LoRAConfig:
    """The config that says on disk what `value` holds: ranks, alphas, targets and heads, resolved.

    Ranks and alphas that `value.config` gives already stay; otherwise the commonest (rank, alpha) becomes r and
    lora_alpha, for loaders that ignore the patterns. Targets stay if they are a list each of whose names ends an
    adapted path and that leaves none out; otherwise they become the full paths.
    """
    config, parameters = value.config, stacks(value.factors)
    own = filled({path: pair for path, pair in value.factors.items() if expert_of(path) is None})
    factors = {around(path, pair) or path: pair for path, pair in own.items()}
    layers = list(factors)
    every: dict[str, Factors | Stack] = {**factors, **parameters}
    actual = {path: (pair.rank, float(pair.alpha)) for path, pair in every.items()}
    rslora = {pair.use_rslora for pair in every.values()}
    if len(rslora) > 1:
        mixed = next(path for path, pair in every.items() if pair.use_rslora != config.use_rslora)
        raise LoRAFileError(
            f"Some factors scale by alpha/√r and some by alpha/r ({mixed!r}), which PEFT's format cannot say.",
            name=mixed,
        )
    changes: dict[str, Any] = {"use_rslora": rslora.pop()}
    if config.resolve(every) != actual:
        (r, alpha), _ = Counter(actual.values()).most_common(1)[0]
        changes |= {
            "r": r,
            "alpha": alpha,
            "rank_pattern": {_anchored(path): rank for path, (rank, _) in actual.items() if rank != r},
            "alpha_pattern": {_anchored(path): own for path, (_, own) in actual.items() if own != alpha},
        }
    elif config.alpha is None:
        changes["alpha"] = float(config.r)
    targets = config.target_modules
    wanted = config.target_parameters or ()
    closed = all(any(matching([name], path) for path in parameters) for name in wanted)
    if not closed or not all(matching(wanted, path) for path in parameters):
        changes["target_parameters"] = sorted(parameters) or None
    if not isinstance(targets, tuple) or not _closed(targets, layers):
        changes |= {
            "target_modules": sorted(layers),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
    if any(_unrepeatable(config.init, pair) for pair in factors.values()):
        changes["init"] = "kaiming"
    heads = tuple(config.modules_to_save or ())
    unnamed = [path for path, state in value.modules.items() if ROWS not in state and _head(path, heads) is None]
    if unnamed:
        changes["modules_to_save"] = [*heads, *unnamed]
    return config.replace(**changes)


def _unrepeatable(init: str, pair: Factors) -> bool:
    """Whether PEFT, which begins anew before it loads, could not begin so at this rank, or with these variants."""
    if init == "mica":
        return bool(pair.extras) or pair.rank > min(pair.in_features, pair.out_features)
    if "offset" in pair.extras:
        return init not in ("kaiming", "off")
    return init == "orthogonal" and pair.rank % 2 == 1


def _anchored(path: str) -> str:
    return "^" + re.escape(path)


def _closed(targets: tuple[str, ...], paths: Iterable[str]) -> bool:
    """Whether every target ends some path and every path ends with some target, at a dot."""
    ends = {".".join(parts[i:]) for path in paths for parts in [path.split(".")] for i in range(len(parts))}
    named = set(targets)
    return named <= ends and all(
        any(".".join(parts[i:]) in named for i in range(len(parts))) for path in paths for parts in [path.split(".")]
    )


# -- fused slices, which PEFT's format has no notation for -----------------------------------------------------------


def blocks_json(value: AdapterValue) -> str | None:
    """{path: [[role, [[start, stop], …]], …]} for the metadata, or None if no layer is adapted by slices."""
    found = {
        path: [[block.role, [[span.start, span.stop] for span in block.rows]] for block in factors.blocks]
        for path, factors in value.factors.items()
        if factors.blocks and factors.kind != "conv"  # whose groups the shapes tell
    }
    return json.dumps(found, sort_keys=True) if found else None


def parse_blocks(found: Mapping[str, Any]) -> dict[str, tuple[Block, ...]]:
    """What `blocks_json` wrote."""
    try:
        return {
            path: tuple(
                Block(_role(role), tuple(range(_row(start), _row(stop)) for start, stop in rows))
                for role, rows in blocks
            )
            for path, blocks in found.items()
        }
    except (LoRAError, TypeError, ValueError) as error:
        raise LoRAFileError(
            f"The blocks of fused layers in the metadata are malformed: {error}.", value=found
        ) from error


def _role(role: Any) -> str:
    if not isinstance(role, str) or not role:
        raise ValueError(f"role {role!r}")
    return role


def _row(row: Any) -> int:
    if type(row) is not int or not 0 <= row < 2**31:
        raise ValueError(f"row {row!r}")
    return row
