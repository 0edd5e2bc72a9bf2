"""`LoRAConfig`: what an adapter is, before it has any weights. Checks itself; reads and writes PEFT's JSON."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from . import fields, initnames, tokenfields, variantfields
from .errors import LoRAConfigError, LoRAUnsupportedError
from .expertnames import expert_of, parameter_of
from .fields import FrozenMapping
from .patterns import suffix_regex_lookup

__all__ = ["FrozenMapping", "LoRAConfig"]

T = TypeVar("T")

# Every field of peft 0.21.2's LoraConfig with its default, less runtime_config (which PEFT does not write).
PEFT_DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": False,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": None,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": None,
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

# PEFT's name -> ours, for the fields that LoRAConfig has.
_OWN = {
    "r": "r",
    "target_modules": "target_modules",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "lora_bias": "lora_bias",
    "kasa_config": "kasa_config",
    "use_bdlora": "use_bdlora",
    "use_qalora": "use_qalora",
    "qalora_group_size": "qalora_group_size",
    "alora_invocation_tokens": "alora_invocation_tokens",
    "velora_config": "velora_config",
    "monteclora_config": "monteclora_config",
    "bias": "bias",
    "exclude_modules": "exclude_modules",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "layer_replication": "layer_replication",
    "target_parameters": "target_parameters",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "modules_to_save",
    "trainable_token_indices": "trainable_token_indices",
    "ensure_weight_tying": "ensure_weight_tying",
    "init_lora_weights": "init",
    "task_type": "task_type",
    "base_model_name_or_path": "base_model",
    "revision": "revision",
    "fan_in_fan_out": "fan_in_fan_out",
}
_RENAMED = {theirs: ours for theirs, ours in _OWN.items() if theirs != ours}

# Written anew by whoever saves; never kept.
_BOOKKEEPING = frozenset({"peft_type", "peft_version", "inference_mode", "runtime_config"})
# Known, and without effect on what the factors of a file compute: settings of an initialisation or of Megatron's own
# layers, and of PEFT before 0.3 (merge_weights: whether eval() merged).
_NEUTRAL = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "merge_weights",
    }
)


def _off(value: Any) -> bool:
    """Whether a field of a variant is switched off: null, false, or empty (0 is a value)."""
    return value is None or value is False or value in ([], {}, "")


_REMEDIES = {
    "init_lora_weights": initnames.REMEDIES["file"],
}


def _checked_keywords(cls: type[T]) -> type[T]:
    """Make a keyword that `cls` does not have a LoRAConfigError that names the field which was meant."""
    construct: Callable[..., None] = cls.__init__
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(construct)
    def __init__(self: T, *args: Any, **kwargs: Any) -> None:
        if args:
            raise LoRAConfigError(
                f"LoRAConfig takes keywords only, not {args[0]!r} by position.",
                value=args[0],
                expected=known,
                remedy="Write LoRAConfig(r=8, target_modules=[...]).",
            )
        for keyword, value in kwargs.items():
            if keyword not in known:
                raise _unknown_keyword(keyword, value, known)
        construct(self, **kwargs)

    setattr(cls, "__init__", __init__)  # noqa: B010  (mypy refuses the plain assignment)
    return cls


def _unknown_keyword(keyword: str, value: Any, known: Sequence[str]) -> LoRAConfigError:
    if keyword in _RENAMED:
        remedy = (
            f"PEFT's {keyword} is called {_RENAMED[keyword]} here: write {_RENAMED[keyword]}={_translated(value)!r}."
        )
    elif keyword in PEFT_DEFAULTS:
        remedy = (
            f"{keyword} is a field of PEFT that hf_lora does not compute; LoRAConfig.from_peft keeps it from a file."
        )
    else:
        near = difflib.get_close_matches(keyword, [*known, *_RENAMED], n=3, cutoff=0.6)
        near = list(dict.fromkeys(_RENAMED.get(name, name) for name in near))
        remedy = f"Did you mean {' or '.join(near)}?" if near else f"The fields are {', '.join(known)}."
    return LoRAConfigError(
        f"LoRAConfig has no field {keyword!r} (given {keyword}={value!r}).",
        name=keyword,
        value=value,
        expected=list(known),
        remedy=remedy,
    )


def _translated(value: Any) -> Any:
    return initnames.from_peft(value) or value if isinstance(value, bool) else value


@_checked_keywords
@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """What a LoRA adapts and how: `W + scaling·B·A`, scaling = alpha/r, or alpha/√r with `use_rslora`.

    Args:
        r: the rank, a positive integer.
        target_modules: roles or module names (a list: each matches a whole path or its last components), a regular
            expression matched against whole paths (a string), or "all-linear". None: the model's usual targets.
        target_parameters: experts' 3-D parameters to adapt, such as "mlp.experts.gate_up_proj": a whole path, or its
            end after a dot. `target_modules=[]` adapts nothing else.
        alpha: positive; None means `r`, so that scaling is 1 as in the paper.
        dropout: probability in [0, 1) of dropping an input of A while training.
        use_rslora: scale by alpha/√r.
        use_dora: learn each output's magnitude apart: m ∘ (W + scaling·B·A) / ‖W + scaling·B·A‖ (DoRA).
        lora_bias: B has a bias of its own, which adds scaling·bias to the output.
        kasa_config: learn the singular values of the change, of a weight without its r smallest (KaSA): {} or beta and
            gamma, the weights in `hf_lora.kasa_loss`; None is off.
        use_bdlora: A or B is block-diagonal (BD-LoRA): {"nblocks": n, "target_modules_bd_a": […],
            "target_modules_bd_b": […]}, lists of what layers' names hold; "match_strict": False leaves others plain.
        use_qalora: A reads the mean of each `qalora_group_size` inputs (QA-LoRA).
        qalora_group_size: see `use_qalora`.
        alora_invocation_tokens: act from the last occurrence of these token ids in a row on, and be the base before it
            and in rows without them (aLoRA); None acts everywhere.
        velora_config: keep a rank-1 projection of A's input for its gradient instead of the input (VeLoRA): {} or
            num_groups, scale, init_type; None is off.
        monteclora_config: learn how A is distributed, and draw it in each forward of training (MonteCLoRA): {} or
            num_samples, use_entropy, dirichlet_prior, sample_scaler, kl_loss_weight; None is off.
        freeze_a: train B alone: A, or B of an embedding, stays as it began (LoRA-FA). Files do not say it.
        bias: which biases of the base train and are saved: "none", "all", or "lora_only" (those of adapted layers).
        exclude_modules: names or a regular expression to leave out, read as `target_modules` is.
        layers_to_transform: indices of the layers to adapt; needs `target_modules` to be a list.
        layers_pattern: name(s) of the list of layers that the indices count; needs `layers_to_transform`.
        layer_replication: ranges [first, last + 1] of which the model's list of layers is made while the adapter is on
            it; layers that repeat one share its weights, and have factors of their own.
        rank_pattern: exceptions to `r`, by a regular expression for the end of a module path.
        alpha_pattern: exceptions to `alpha`, likewise.
        modules_to_save: modules (heads) that are trained and saved whole.
        trainable_token_indices: token ids whose rows of the input embedding train, and of what is tied to it; or a
            mapping from modules' names to token ids.
        ensure_weight_tying: what changes of the input embedding changes in what shares its weight, too.
        init: A of a new adapter is "kaiming" (uniform) or "gaussian" and B zero; "off": both random, for debugging.
            Others: "orthogonal"; from the weights "pissa", "pissa_niter_N" (faster), "olora", "mica", and "loftq", for
            a base that is quantised, or will be; from data "eva", "lora_ga", "corda".
        init_options: settings of "eva", "lora_ga", "corda" or "loftq", under PEFT's names, such as {"rho": 1.0}.
        task_type: PEFT's task type, such as "CAUSAL_LM" or "SEQ_CLS"; kept for other tools.
        base_model: Hub id or path of the base.
        revision: the base's revision.
        fan_in_fan_out: PEFT's note that the base stores (in, out), as GPT-2's Conv1D; told from the layer here.
        peft_fields: PEFT's fields that LoRAConfig has no field for, kept verbatim (see `unsupported`).

    Raises:
        LoRAConfigError: a field is impossible or unknown; it quotes the value.

    Source: Hu et al. 2021 (arXiv:2106.09685) §4.1; rsLoRA: Kalajdzievski 2023 (arXiv:2312.03732); DoRA: Liu et al. 2024
    (arXiv:2402.09353); LoRA-FA: Zhang et al. 2023 (arXiv:2308.03303); KaSA: Wang et al.
    2024 (arXiv:2412.06071); aLoRA: Greenewald et al. 2025 (arXiv:2504.12397); BD-LoRA: Wang et al. 2025
    (arXiv:2510.23346); QA-LoRA: Xu et al. 2023 (arXiv:2309.14717); VeLoRA: Miles et al. 2024 (arXiv:2405.17991);
    MonteCLoRA: Sengupta et al. 2024 (arXiv:2411.04358).
    """

    r: int = 8
    target_modules: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    kasa_config: Mapping[str, float] | None = None
    use_bdlora: Mapping[str, Any] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    alora_invocation_tokens: Sequence[int] | None = None
    velora_config: Mapping[str, Any] | None = None
    monteclora_config: Mapping[str, Any] | None = None
    freeze_a: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    layer_replication: Sequence[Sequence[int]] | None = None
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    modules_to_save: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    ensure_weight_tying: bool = False
    init: str = "kaiming"
    init_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task_type: str | None = None
    base_model: str | None = None
    revision: str | None = None
    fan_in_fan_out: bool = False
    peft_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)  # the dataclass is frozen
        put("r", fields.integer("r", self.r, least=1))
        put("alpha", None if self.alpha is None else fields.positive("alpha", self.alpha))
        put("dropout", fields.fraction("dropout", self.dropout))
        for name in (
            "use_rslora",
            "use_dora",
            "lora_bias",
            "use_qalora",
            "freeze_a",
            "ensure_weight_tying",
            "fan_in_fan_out",
        ):
            fields.boolean(name, getattr(self, name))
        fields.one_of("bias", self.bias, ("none", "all", "lora_only"))
        initnames.check(self.init)
        put("init_options", initnames.options(self.init, self.init_options))
        for name in ("task_type", "base_model", "revision"):
            fields.optional_text(name, getattr(self, name))
        put("target_parameters", fields.optional_names("target_parameters", self.target_parameters) or None)
        alone = self.target_parameters is not None and fields.is_empty(self.target_modules)
        put("target_modules", () if alone else fields.names_or_regex("target_modules", self.target_modules))
        put("exclude_modules", fields.names_or_regex("exclude_modules", self.exclude_modules, empty=True))
        put("layers_to_transform", fields.layers(self.layers_to_transform))
        put("layers_pattern", fields.layer_names(self.layers_pattern))
        put("layer_replication", fields.ranges("layer_replication", self.layer_replication))
        put("modules_to_save", fields.optional_names("modules_to_save", self.modules_to_save))
        put("trainable_token_indices", tokenfields.checked(self.trainable_token_indices))
        put(
            "rank_pattern",
            fields.pattern_map("rank_pattern", self.rank_pattern, functools.partial(fields.integer, least=1)),
        )
        put("alpha_pattern", fields.pattern_map("alpha_pattern", self.alpha_pattern, fields.positive))
        put("kasa_config", fields.numbers("kasa_config", self.kasa_config, ("beta", "gamma")))
        put("use_bdlora", fields.block_diagonal(self.use_bdlora))
        fields.integer("qalora_group_size", self.qalora_group_size, least=2 if self.use_qalora else 1)
        put("alora_invocation_tokens", fields.token_ids("alora_invocation_tokens", self.alora_invocation_tokens))
        for name in variantfields.SETTINGS:
            put(name, variantfields.settings(name, getattr(self, name)))
        put("peft_fields", _peft_fields(self.peft_fields))
        self._check_combinations()
        variantfields.check_together(self)

    def _check_combinations(self) -> None:
        fields.require_apart(vars(self))
        tokenfields.refuse_twice(vars(self))
        if self.kasa_config is not None and self.use_dora:
            raise LoRAConfigError(
                "kasa_config cannot be combined with use_dora=True: neither says which weight the magnitudes are of.",
                name="kasa_config",
                value=dict(self.kasa_config),
                remedy="Leave one of them out.",
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise LoRAConfigError(
                f"layers_pattern={self.layers_pattern!r} without layers_to_transform selects nothing.",
                name="layers_pattern",
                value=self.layers_pattern,
                remedy="Give layers_to_transform (the indices), or leave layers_pattern out.",
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise LoRAConfigError(
                f"layers_to_transform={self.layers_to_transform!r} cannot be combined with a string, "
                f"target_modules={self.target_modules!r}.",
                name="layers_to_transform",
                value=self.layers_to_transform,
                expected="target_modules as a list of names",
                remedy="Put the layers' indices into the regular expression, or give target_modules as a list.",
            )

    # -- how it begins -------------------------------------------------------------------------------------------

    @property
    def init_method(self) -> str:
        """`init` without its number of iterations: "pissa" of "pissa_niter_4"."""
        return initnames.method(self.init)

    @property
    def init_settings(self) -> dict[str, Any]:
        """Every setting of the initialisation: `init_options` over PEFT's defaults."""
        return initnames.settings(self.init, self.init_options)

    # -- what a layer gets ---------------------------------------------------------------------------------------

    def rank_for(self, path: str) -> int:
        """The rank of the module at `path`: the first key of `rank_pattern` that matches its end, else `r`."""
        return self.resolve([path])[path][0]

    def alpha_for(self, path: str) -> float:
        """The alpha of the module at `path`: the first key of `alpha_pattern` that matches, else `alpha`, else `r`."""
        return self.resolve([path])[path][1]

    def scaling_for(self, path: str) -> float:
        """alpha/r of the module at `path`, or alpha/√r with `use_rslora`."""
        rank, alpha = self.resolve([path])[path]
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def resolve(self, paths: Iterable[str]) -> dict[str, tuple[int, float]]:
        """(rank, alpha) of every path: as `rank_for` and `alpha_for`, all at once, which is faster."""
        paths = list(paths)
        if any(expert_of(path) for path in paths):
            found = self.resolve(dict.fromkeys(map(parameter_of, paths)))
            return {path: found[parameter_of(path)] for path in paths}
        alpha = float(self.r) if self.alpha is None else self.alpha
        ranks = suffix_regex_lookup(tuple(self.rank_pattern), paths) if self.rank_pattern else {}
        alphas = (
            suffix_regex_lookup(tuple(self.alpha_pattern), paths, field="alpha_pattern") if self.alpha_pattern else {}
        )
        return {
            path: (
                self.rank_pattern[ranks[path]] if path in ranks else self.r,
                self.alpha_pattern[alphas[path]] if path in alphas else alpha,
            )
            for path in paths
        }

    def replace(self, **changes: Any) -> LoRAConfig:
        """A copy with `changes`, checked as a new config is."""
        return type(self)(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | changes)

    # -- PEFT's format -------------------------------------------------------------------------------------------

    def unsupported(self, *, constructing: bool = False) -> dict[str, Any]:
        """The fields of PEFT that change what an adapter computes and that hf_lora lacks; unknown ones too.

        Args:
            constructing: a new adapter is made: its initialisation may change the base, and settings of it or of the
                backward pass that hf_lora lacks are named too.
        """
        found: dict[str, Any] = {}
        if not constructing and initnames.method(self.init) in initnames.CHANGE_BASE:
            found["init_lora_weights"] = self.init
        for name, value in self.peft_fields.items():
            if name == "init_lora_weights":
                neutral = not constructing and initnames.from_peft(value) not in (None, *initnames.CHANGE_BASE)
            elif (constructing or self.init == "loftq") and name == initnames.OPTIONS.get(self.init, ("",))[0]:
                neutral = False
            else:
                neutral = name in _NEUTRAL or _off(value)
            if not neutral:
                found[name] = copy.deepcopy(value)
        return found

    def require_supported(self, *, constructing: bool = False) -> None:
        """Raise `LoRAUnsupportedError`, naming every field of `unsupported`, if there is one.

        `LoRAConfigError` where a new adapter's variant cannot begin as `init` says.
        """
        found = self.unsupported(constructing=constructing)
        if not found:
            if constructing or self.init == "loftq":
                initnames.require_together(self.init, {name: getattr(self, name) for name in initnames.APART})
            return
        names = ", ".join(f"{name}={value!r}" for name, value in found.items())
        remedies = [_REMEDIES[name] for name in found if name in _REMEDIES]
        unknown = [name for name in found if name not in PEFT_DEFAULTS]
        if unknown:
            remedies.append(
                f"hf_lora does not know {', '.join(unknown)}: if it has no effect, remove it from the config."
            )
        raise LoRAUnsupportedError(
            f"This adapter uses what hf_lora does not compute: {names}.",
            name=next(iter(found)),
            value=found,
            remedy=" ".join(remedies) or "Load it with PEFT, or train it without this field.",
            facts=[f"{name}={value!r}" for name, value in found.items()] if len(found) > 1 else (),
        )

    @classmethod
    def from_peft(cls, source: Any) -> LoRAConfig:
        """Read PEFT's `adapter_config.json` (as a mapping) or a `peft.LoraConfig`; an absent field has PEFT's default.

        Raises:
            LoRAUnsupportedError: another peft_type, which is named.
            LoRAConfigError: no PEFT config at all (it says what it looks like), or an impossible value.
        """
        if not isinstance(source, Mapping):
            to_dict = getattr(source, "to_dict", None)
            if not callable(to_dict):
                raise LoRAConfigError(
                    f"{source!r} is neither a mapping nor a peft.LoraConfig.",
                    value=source,
                    expected="the mapping in adapter_config.json, or a peft.LoraConfig",
                    remedy='Give a LoRAConfig, such as LoRAConfig(r=8, target_modules=["q", "v"]).',
                )
            source = to_dict()
        given = {name: _plain(value) for name, value in source.items()}
        _check_type(given)
        own: dict[str, Any] = {"alpha": PEFT_DEFAULTS["lora_alpha"]}
        kept: dict[str, Any] = {}
        for name, value in given.items():
            if name in _BOOKKEEPING:
                continue
            if name == "init_lora_weights":
                value = value.lower() if isinstance(value, str) else bool(value) if value is None else value
                init = initnames.from_peft(value)
                if init is not None:
                    own["init"] = init
                elif isinstance(value, str):
                    kept[name] = value
                else:
                    raise fields.wrong(name, value, 'true, false or a name such as "gaussian"')
            elif name in _OWN:
                if value is None and name == "lora_alpha":  # PEFT cannot divide it by r; here None would mean r
                    raise fields.wrong(name, value, "a positive number")
                if value is None and PEFT_DEFAULTS[name] in (False, {}):
                    continue  # null for "off", where PEFT's default came later
                own[_OWN[name]] = value
            elif name not in PEFT_DEFAULTS or value != PEFT_DEFAULTS[name]:
                kept[name] = value
        own["init_options"] = initnames.own_options(own.get("init", ""), kept)
        for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
            if own.get(name) in ([], ""):
                own[name] = None
        for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
            names = own.get(name)
            if isinstance(names, list) and all(isinstance(item, str) for item in names):
                # PEFT holds targets as a set (no order, duplicates without meaning) and repeats heads when it adds them
                own[name] = list(dict.fromkeys(names if name == "modules_to_save" else sorted(names)))
        return cls(**own, peft_fields=kept)

    def to_peft(self) -> dict[str, Any]:
        """Every field of peft 0.21.2's LoraConfig, JSON-ready and sorted, for PEFT, vLLM and TGI to read."""
        written = copy.deepcopy(PEFT_DEFAULTS)
        for theirs, ours in _OWN.items():
            value = getattr(self, ours)
            if isinstance(value, tuple):
                value = [list(item) if isinstance(item, tuple) else item for item in value]
            elif isinstance(value, Mapping):
                value = {key: list(i) if isinstance(i, tuple) else _number(i) for key, i in value.items()}
            written[theirs] = value
        for name in ("target_modules", "target_parameters", "exclude_modules"):
            if isinstance(written[name], list):
                written[name].sort()
        written["lora_alpha"] = _number(self.r if self.alpha is None else self.alpha)
        written["init_lora_weights"] = initnames.to_peft(self.init)
        written |= initnames.written(self.init, self.init_options)
        # The format's version, with hf_lora as the local part (PEP 440): the file is PEFT's, PEFT did not write it.
        written |= {"inference_mode": True, "peft_type": "LORA", "peft_version": "0.21.2+hf.lora"}
        written |= copy.deepcopy(dict(self.peft_fields))
        return dict(sorted(written.items()))


def _peft_fields(value: Any) -> FrozenMapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise fields.wrong("peft_fields", value, "a mapping from PEFT's field names to their values")
    for key, item in value.items():
        if key in _BOOKKEEPING or (key in _OWN and key != "init_lora_weights"):
            ours = _OWN.get(key)
            raise LoRAConfigError(
                f"peft_fields has {key}={item!r}, "
                + (f"which is LoRAConfig's {ours}." if ours else "which is not kept."),
                name="peft_fields",
                value=item,
                remedy=f"Set {ours} instead." if ours else f"Leave {key} out.",
            )
    return FrozenMapping(copy.deepcopy(dict(value)))


# -- PEFT's side -----------------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """JSON's types from those of a `peft.LoraConfig`: enums, sets and tuples."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if isinstance(value, tuple):
        return list(value)
    return value


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_LOOKS_LIKE: tuple[tuple[set[str], str, str], ...] = (
    (
        {"lora_parameters"},
        "an mlx-lm adapter's config",
        "Import it: hf_lora.importers.from_mlx(folder), or `hf-lora import mlx`.",
    ),
    ({"model_class", "model_type"}, "an AdapterHub (adapters) config", "Load it with the adapters library."),
    (set(), "no PEFT config", "Use an adapter_config.json that PEFT or hf_lora wrote."),
)


def _check_type(given: Mapping[Any, Any]) -> None:
    for name in given:
        if not isinstance(name, str):
            raise LoRAConfigError(f"The config has a field {name!r}, which is not a string.", value=name)
    kind = given.get("peft_type")
    if kind is None:
        _, what, remedy = next(entry for entry in _LOOKS_LIKE if entry[0] <= given.keys())
        shown = ", ".join(sorted(given)[:8]) or "nothing"
        raise LoRAConfigError(
            f"The config has no peft_type: this is {what} (its fields: {shown}).",
            name="peft_type",
            value=None,
            expected="LORA",
            remedy=remedy,
        )
    if kind != "LORA":
        raise LoRAUnsupportedError(
            f"peft_type={kind!r} is not LoRA; hf_lora reads LORA only.",
            name="peft_type",
            value=kind,
            expected="LORA",
            remedy="Import it: hf_lora.importers.from_adalora(folder), or `hf-lora import adalora`."
            if kind == "ADALORA"
            else "Load it with PEFT.",
        )
