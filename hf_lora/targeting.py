"""From what a config asks for (names, a regular expression, roles, "all-linear") to the layers and rows of one model.

Names match as in PEFT: the whole path of a module, or its end after a dot. A word that is a role of the model's
architecture (`q`, `mlp`, `head`, …) is read as the role first. Every word has to match; nothing is dropped silently.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from . import architectures as arch
from .attentionpairs import TWICE
from .batches import row_maps
from .config import LoRAConfig
from .errors import LoRAConfigError, LoRATargetError
from .experttargets import ExpertTarget, expert_targets
from .layerinfo import LayerInfo, describe_layer
from .matching import ALL_LINEAR, Asked, Matcher, last, listed, some, within
from .patterns import fullmatching, suffix_regex_lookup
from .survey import Layer, Survey, survey

__all__ = ["LayerInfo", "Resolution", "Target", "describe_layer", "resolve", "roles_of"]


@dataclass(frozen=True)
class Target:
    """One layer that takes a LoRA.

    Attributes:
        path: the module's name in the base model.
        info: its kind and sizes.
        rank: r of each factor pair.
        alpha: the numerator of the scaling.
        blocks: (role, output rows) of each adapted slice of a fused layer, in the order of its rows; empty: all of it.
    """

    path: str
    info: LayerInfo
    rank: int
    alpha: float
    blocks: tuple[tuple[str, tuple[range, ...]], ...] = ()


@dataclass(frozen=True)
class Resolution:
    """What a config means on a model.

    Attributes:
        targets: the layers, in the model's order, each once.
        heads: paths of modules trained and saved whole.
        architecture: the model_type whose table entry gave the roles; None if they were told from structure.
        skipped: what was left out and why, one line each, for people.
        parameters: the experts' 3-D parameters that take a LoRA.
        inner: targets whose batch is not the user's rows (vision towers, experts): routing by row needs a row map. Not
            looked for in a file's config.
    """

    targets: tuple[Target, ...]
    heads: tuple[str, ...]
    architecture: str | None
    skipped: tuple[str, ...]
    inner: tuple[str, ...] = ()
    parameters: tuple[ExpertTarget, ...] = ()


def resolve(model: nn.Module, config: LoRAConfig, *, from_file: bool = False) -> Resolution:
    """Find the layers of `model` that `config` names.

    Args:
        model: the base, with or without LoRA layers already in it.
        config: what to adapt.
        from_file: read the config as PEFT did when it wrote it: words are names, never roles; a word that matches
            nothing is noted in `skipped` (the tensors beside it say what there has to be); heads are only those
            that the config or its task_type names.

    Returns:
        the targets with rank and alpha, heads, and what was left out.

    Raises:
        LoRATargetError: a target, exclusion, pattern key, layer index or head that matches nothing (near matches are
            named), or something that is no layer.
        LoRAUnsupportedError: it matches only what is not supported yet (experts' 3-D parameters, a transposed conv, a
            fused layer whose rows nobody knows).
        LoRAConfigError: a rank above what a layer's weight can have.
    """
    return _Resolver(survey(model), model, config, from_file).resolve()


def roles_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Roles of every layer that has one: path → roles (several for a fused layer), the output head included."""
    seen = survey(model)
    roles = {path: layer.roles for path, layer in seen.layers.items() if layer.roles}
    return roles | dict.fromkeys(seen.head_layers(), ("head",))


class _Resolver:
    def __init__(self, seen: Survey, model: nn.Module, config: LoRAConfig, from_file: bool) -> None:
        self.seen, self.model, self.config, self.from_file = seen, model, config, from_file
        self.words = Matcher(seen, model, from_file)
        wanted = config.target_modules
        self.all_linear = isinstance(wanted, str) and wanted.lower() == ALL_LINEAR

    def resolve(self) -> Resolution:
        explicit, inferred = self._heads()
        asked = self._targets(explicit, inferred)
        asked = self._only_layers(asked)
        asked = self._without_excluded(asked)
        heads = list(explicit)
        for path in inferred:
            if adapted := within(asked, (path,)):
                self.words.note(f"{path}: not saved whole, because {some(adapted)} takes a LoRA")
            else:
                heads.append(path)
        notes = self.words.skipped
        experts = expert_targets(self.model, self.config, self.seen.modules, from_file=self.from_file, notes=notes)
        if not asked and not experts:
            raise LoRATargetError(
                "no layer is left to adapt",
                name="target_modules",
                value=self.config.target_modules,
                remedy="Widen target_modules, or narrow exclude_modules and modules_to_save.",
                facts=self.words.skipped,
            )
        if "" in asked:
            raise LoRATargetError(
                f"the model is one {type(self.model).__name__}, a layer without a name that a file could say",
                name="target_modules",
                value=self.config.target_modules,
                remedy="Put it in a module: nn.Sequential(layer).",
            )
        paths = [path for path in self.seen.layers if path in asked]
        self._check_patterns([*paths, *(target.path for target in experts)])
        values = resolved(self.config, {path: self.seen.layers[path].out_of for path in paths})
        targets = tuple(self._target(path, asked[path], *values[path]) for path in paths)
        maps = {} if self.from_file else row_maps(self.model, paths, self.seen.modules)
        if self.words.used_roles:
            for part, model_type in self.seen.guessed_parts.items():
                if any(target.path.startswith(f"{part}.") for target in targets):
                    self.words.note(f"{part}: model_type {model_type!r} has no table entry, roles told from structure")
        return Resolution(
            targets=targets,
            heads=tuple(heads),
            architecture=self.seen.model_type if self.seen.known else None,
            skipped=tuple(self.words.skipped),
            inner=tuple(path for path, row_map in maps.items() if row_map == "inner" or ":" in row_map),
            parameters=experts,
        )

    # -- what is asked for ------------------------------------------------------------------------------------------

    def _targets(self, explicit: Sequence[str], inferred: Sequence[str]) -> Asked:
        asked: Asked = {}
        saved = set(within(self.seen.layers, explicit))
        implied = set(within(self.seen.layers, inferred))
        wanted = self.config.target_modules
        defaults = wanted is None
        if wanted is None and self.config.target_parameters and self.seen.model_type not in arch.PEFT_DEFAULTS:
            wanted = ()
        if wanted is None:
            wanted = self._defaults()
        if wanted == () and self.config.target_parameters:
            return {}
        if self.all_linear:
            return self._all_linear(saved | implied)
        items: Sequence[str] = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        if not items:
            raise LoRATargetError(
                "target_modules is empty",
                name="target_modules",
                value=items,
                remedy='Name roles (["q", "v"]), modules, or "all-linear".',
            )
        for item in items:
            regex = isinstance(wanted, str) and not self.words.is_role(item)
            found = self.words.match(item, "target_modules", regex=regex, as_role=not defaults, strict=not defaults)
            inside = [path for path in found if path in saved]
            if inside and len(inside) == len(found) and not self.from_file:
                raise LoRATargetError(
                    f"target {item!r} matches only what modules_to_save trains whole: {some(inside)}",
                    name="target_modules",
                    value=item,
                    remedy="Drop it there or in modules_to_save: a module takes a LoRA or is trained whole.",
                )
            # A head that we kept unasked gives way to a target that names nothing else.
            left_out = saved if set(found) <= implied | saved else saved | implied
            if left := [path for path in found if path in left_out]:
                self.words.note(f"{some(left)}: trained and saved whole instead")
            for path, roles in found.items():
                if path not in left_out:
                    self._ask(asked, path, roles)
        if not asked:
            raise LoRATargetError(
                f"no target of {list(items)} matches a layer of {type(self.model).__name__}",
                name="target_modules",
                value=items,
                remedy=self.words.near(items[0]),
                facts=self.words.skipped,
            )
        return asked

    def _ask(self, asked: Asked, path: str, roles: frozenset[str] | None) -> None:
        if path not in asked:
            asked[path] = roles
            return
        before = asked[path]
        if (before is None) != (roles is None):
            raise LoRATargetError(
                f"{path!r} is asked for whole and by the role {some(sorted(before or roles or ()))}",
                name="target_modules",
                value=self.config.target_modules,
                remedy="Name the fused layer or its roles, not both: they would train the same rows twice.",
            )
        if before is not None and roles is not None:
            asked[path] = before | roles

    def _defaults(self) -> str | tuple[str, ...]:
        model_type = self.seen.model_type
        if model_type is not None and model_type in arch.PEFT_DEFAULTS:
            return arch.PEFT_DEFAULTS[model_type]
        raise LoRATargetError(
            f"the config names no target_modules, and there is no default for model_type {model_type!r}",
            name="target_modules",
            value=None,
            expected=sorted(arch.PEFT_DEFAULTS),
            remedy=f'Name them: target_modules="all-linear", or roles of this model: {listed(self.seen.roles())}.',
        )

    def _all_linear(self, heads: Collection[str]) -> Asked:
        asked: Asked = {}
        for path, layer in self.seen.layers.items():
            if layer.info.kind in ("embedding", "conv", "attention"):
                continue
            if path == self.seen.output_embeddings:
                self.words.note(f"{path}: the output head (all-linear leaves it out)")
            elif path in heads:
                self.words.note(f"{path}: trained and saved whole instead")
            else:
                asked[path] = None
        unable: dict[tuple[str, str], list[str]] = {}
        for path, module in self.seen.modules.items():
            found = self.seen.layers.get(path)
            if (found is not None and not found.out_of) or self.seen.canonical[path] != path:
                continue
            if isinstance(module, nn.Linear) or path in self.seen.experts:
                unable.setdefault((type(module).__name__, self.seen.why_not(path)[0]), []).append(path)
        for (name, reason), paths in unable.items():
            self.words.note(f"{some(paths)} ({name}): {reason}")
        return asked

    # -- narrowing --------------------------------------------------------------------------------------------------

    def _only_layers(self, asked: Asked) -> Asked:
        """Keep the layers whose index is in layers_to_transform; a path that is named in full stays."""
        wanted = self.config.layers_to_transform
        if wanted is None or wanted == ():
            return asked
        indices = {wanted} if isinstance(wanted, int) else set(wanted)
        named = self.config.target_modules
        full = set() if named is None or isinstance(named, str) else set(named)
        at = self._layer_indices([path for path in asked if path not in full])
        there = set(at.values())
        missing = sorted(indices - there)
        if missing and (not self.from_file or not indices & there):
            has = f"has layers {_span(there)}" if there else "has no numbered layers"
            pattern = self.config.layers_pattern
            raise LoRATargetError(
                f"layers_to_transform: no target in layer {some(missing)}; this model {has}"
                + (f" after layers_pattern {pattern!r}" if pattern else ""),
                name="layers_to_transform",
                value=wanted,
                expected=sorted(there),
                remedy="Choose indices in that range, or the layers_pattern which names the list of layers.",
            )
        return {path: roles for path, roles in asked.items() if path in full or at.get(path) in indices}

    def _layer_indices(self, paths: Sequence[str]) -> dict[str, int]:
        """Path → index of its layer: the first number after layers_pattern (after any name if there is none)."""
        numbers: dict[str, list[tuple[str, int]]] = {}
        for path in paths:
            parts = path.split(".")
            numbers[path] = [
                (".".join(parts[:at]), int(part)) for at, part in enumerate(parts[:-1]) if at and part.isdecimal()
            ]
        patterns = self.config.layers_pattern or ()
        given = (patterns,) if isinstance(patterns, str) else tuple(patterns)
        prefixes = list(dict.fromkeys(prefix for found in numbers.values() for prefix, _ in found))
        allowed = {
            prefix
            for pattern in given
            for prefix in fullmatching(rf"(?:.*\.)?(?:{pattern})", prefixes, field="layers_pattern")
        }
        return {
            path: index[0]
            for path, found in numbers.items()
            if (index := [number for prefix, number in found if not given or prefix in allowed])
        }

    def _without_excluded(self, asked: Asked) -> Asked:
        excluded = self.config.exclude_modules
        if not excluded:
            return asked
        items = (excluded,) if isinstance(excluded, str) else tuple(excluded)
        kept = dict(asked)
        for item in items:
            regex = isinstance(excluded, str) and not self.words.is_role(item)
            for path, roles in self.words.match(item, "exclude_modules", regex=regex).items():
                if path not in kept:
                    continue
                if roles is None:
                    del kept[path]
                    continue
                mine = kept[path]
                rest = (frozenset(self.seen.layers[path].rows) if mine is None else mine) - roles
                if rest:
                    kept[path] = rest
                else:
                    del kept[path]
        return kept

    # -- heads ------------------------------------------------------------------------------------------------------

    def _heads(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Modules to save whole: those that the config names, and those that the task implies."""
        named = self.config.modules_to_save
        explicit: list[str] = []
        for item in named or ():
            found = self._ending(item)
            if not found and self.from_file:
                self.words.note(f"modules_to_save {item!r}: matches no module of this model")
            elif not found:
                raise LoRATargetError(
                    f"modules_to_save: {item!r} matches no module of {type(self.model).__name__}",
                    name="modules_to_save",
                    value=item,
                    remedy=self._near_module(item),
                )
            explicit += found
        for item in arch.PEFT_HEADS.get(self.config.task_type or "", ()):
            explicit += self._ending(item)
        explicit = _outermost(explicit)
        if self.from_file or named == () or not arch.HEADED_CLASS.search(type(self.model).__name__):
            return tuple(explicit), ()
        inferred = [path for path in self.seen.head if not within((path,), explicit)]
        return tuple(explicit), tuple(inferred)

    def _ending(self, item: str) -> list[str]:
        # As PEFT: the end of the path, not whole components ("classifier" also keeps DistilBERT's pre_classifier).
        names = [name for name in self.seen.modules if name and name.endswith(item)]
        return list(dict.fromkeys(self.seen.canonical[name] for name in names))

    def _near_module(self, item: str) -> str:
        names = {part for name in self.seen.modules for part in name.split(".") if part and not part.isdigit()}
        close = difflib.get_close_matches(last(item), sorted(names), n=5, cutoff=0.5)
        return f"Did you mean {some(close)}?" if close else f"Its modules: {some(sorted(names))}."

    # -- rank and alpha ---------------------------------------------------------------------------------------------

    def _target(self, path: str, roles: frozenset[str] | None, rank: int, alpha: float) -> Target:
        layer = self.seen.layers[path]
        blocks = _blocks(layer, roles)
        # A file may say more than a weight can use (PEFT writes that); a new adapter would only waste it.
        limit = rank if self.from_file else layer.info.max_rank
        of = f"{layer.info.out_features} x {layer.info.in_features}"
        for role, ranges in blocks:
            rows = sum(map(len, ranges))
            if min(rows, layer.info.in_features) < limit:
                limit = min(rows, layer.info.in_features)
                of = f"{rows} x {layer.info.in_features} (its rows of role {role!r})"
        if rank > limit and self.all_linear:  # a gate of one row, say: as much as it can have, at the same scaling
            alpha *= (limit / rank) ** (0.5 if self.config.use_rslora else 1.0)
            self.words.note(f"{path}: rank {limit}, the largest that it can have ({of})")
            rank = limit
        if rank > limit:
            raise LoRAConfigError(
                f"rank {rank} is above {limit}, the largest that {path!r} of {of} can have",
                name="r",
                value=rank,
                expected=f"at most {limit}",
                remedy=f"Use r <= {limit}, give this layer its own rank in rank_pattern, or exclude it.",
            )
        if rank % layer.info.groups:
            raise LoRAConfigError(
                f"{path!r} is a convolution of {layer.info.groups} groups, which do not divide rank {rank}",
                name="r",
                value=rank,
                expected=f"a multiple of {layer.info.groups}",
                remedy="Choose such a rank, give this layer its own in rank_pattern, or exclude it.",
            )
        return Target(path, layer.info, rank, alpha, blocks)

    def _named_by(self, path: str) -> str:
        """By whose name a config means it: its own, or that of the nn.MultiheadAttention that it is a part of."""
        layer = self.seen.layers.get(path)
        return path if layer is None else layer.out_of or path

    def _check_patterns(self, paths: Sequence[str]) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            table: Mapping[str, float] = getattr(self.config, field)
            for key in table:
                if suffix_regex_lookup([key], [self._named_by(path) for path in paths], field=field):
                    continue
                if self.from_file:
                    self.words.note(f"{field} {key!r}: matches no target")
                    continue
                raise LoRATargetError(
                    f"{field}: the key {key!r} matches no target",
                    name=field,
                    value=key,
                    remedy=self.words.near(key),
                )


def resolved(config: LoRAConfig, paths: Mapping[str, str]) -> dict[str, tuple[int, float]]:
    """(rank, alpha) of each layer: path → the module whose name a config means by it, or "" for itself."""
    found = config.resolve([around or path for path, around in paths.items()])
    return {
        path: (rank, alpha * TWICE if around else alpha)
        for path, around in paths.items()
        for rank, alpha in [found[around or path]]
    }


# -- helpers ----------------------------------------------------------------------------------------------------------


def _blocks(layer: Layer, roles: frozenset[str] | None) -> tuple[tuple[str, tuple[range, ...]], ...]:
    if roles is None:
        return ()
    return tuple((role, rows) for role, rows in layer.rows.items() if role in roles)


def _outermost(paths: Iterable[str]) -> list[str]:
    unique = list(dict.fromkeys(paths))
    return [path for path in unique if not any(path.startswith(f"{other}.") for other in unique)]


def _span(numbers: Collection[int]) -> str:
    return f"{min(numbers)}…{max(numbers)}"
