"""The adapter as data: a config and its tensors. Nothing here knows a disk or a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from .config import FrozenMapping, LoRAConfig
from .errors import LoRAConfigError, LoRAMismatchError, LoRAUnsupportedError
from .extras import EXTRAS, FORWARD, Extra, asked_for
from .forms import Form, form_of, forms_asked
from .tokenfields import ROWS, ids_of

V = TypeVar("V", bound="AdapterValue")

__all__ = [
    "NAMES",
    "AdapterValue",
    "Block",
    "Factors",
    "group_blocks",
    "plain",
    "refuse_extras",
    "refuse_rows",
    "refuse_replicated",
    "require_kind",
    "require_whole_linear",
    "without_training",
]


# Of the kinds that not every variant is for.
NAMES = {"embedding": "an embedding", "conv": "a convolution", "attention": "nn.MultiheadAttention"}


@dataclass(frozen=True)
class Block:
    """A slice of a fused layer: the output rows that belong to one role (q of a fused q, k, v).

    Args:
        role: the role's name.
        rows: ascending, disjoint ranges of output rows, each with step 1.
    """

    role: str
    rows: tuple[range, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        last = 0
        for span in self.rows:
            if not isinstance(span, range) or span.step != 1 or len(span) == 0 or span.start < last:
                raise LoRAMismatchError(
                    f"The rows {self.rows!r} of role {self.role!r} are not ascending, disjoint ranges of step 1.",
                    name=self.role,
                    value=self.rows,
                )
            last = span.stop
        if not self.rows:
            raise LoRAMismatchError(f"Role {self.role!r} has no rows.", name=self.role, value=self.rows)

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    def index(self, device: torch.device | str | None = None) -> Tensor:
        """The rows as one index tensor, (len(self),) int64."""
        return torch.cat([torch.arange(span.start, span.stop, device=device) for span in self.rows])


def group_blocks(out_features: int, groups: int) -> tuple[Block, ...]:
    """The blocks of a convolution's B: none, or one for each of its groups (PEFT's B is a grouped convolution)."""
    step = out_features // groups
    return tuple(Block(f"group {i}", (range(i * step, (i + 1) * step),)) for i in range(groups if groups > 1 else 0))


@dataclass(frozen=True, eq=False)
class Factors:
    """One layer's factors: ΔW = scaling·B·A, scaling = alpha/R, or alpha/√R with rsLoRA.

    Args:
        kind: "linear" (Conv1D too), "embedding", "conv" (nn.Conv1d, Conv2d, Conv3d), or "attention" (in_proj and
            out_proj of nn.MultiheadAttention).
        A: (R, in); embedding: (R, V); convolution: (R, in·∏k).
        B: (out, R); embedding: (d, R).
        alpha: alpha of PEFT's dense form, that is for the whole R.
        use_rslora: divide alpha by √R rather than R.
        blocks: slices of a fused layer. With n of them R = n·r, and columns i·r:(i+1)·r of B are zero outside block
            i's rows. Empty: the whole layer. A convolution's groups are blocks.
        extras: the tensors that a variant adds, by the names in `extras.EXTRAS`, such as DoRA's "magnitude" (out,).
        anchored: when it trains, the second half of each block's rank stays: what the pair began as, negated, so that
            ΔW = scaling·(B·A − B₀·A₀). Nothing for a file: there it is a pair like any other.
        form: in which smaller shape A or B is trained and stored. Here both are whole, and of that form.
        kernel: the sizes of a convolution's kernel, k; () for other kinds.

    Raises:
        LoRAMismatchError: the tensors are no such pair.

    Source: Hu et al. 2021 (arXiv:2106.09685) §4.1.
    """

    kind: Literal["linear", "embedding", "conv", "attention"]
    A: Tensor
    B: Tensor
    alpha: float
    use_rslora: bool = False
    blocks: tuple[Block, ...] = ()
    extras: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    anchored: bool = False
    form: Form | None = None
    kernel: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        object.__setattr__(self, "kernel", tuple(self.kernel))
        if not isinstance(self.extras, FrozenMapping):
            object.__setattr__(self, "extras", FrozenMapping(self.extras))
        a, b = tuple(self.A.shape), tuple(self.B.shape)
        if self.kind not in ("linear", *NAMES):
            raise LoRAMismatchError(
                f"kind={self.kind!r} is none of {', '.join(map(repr, ('linear', *NAMES)))}.",
                name="kind",
                value=self.kind,
            )
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a or 0 in b:
            raise LoRAMismatchError(
                f"A {a} and B {b} are no factors: A is (rank, in), B (out, rank).", name="A, B", value=(a, b)
            )
        if not self.A.is_floating_point() or self.A.dtype != self.B.dtype:
            raise LoRAMismatchError(
                f"A is {self.A.dtype} and B {self.B.dtype}: both must have the same floating dtype.",
                value=(self.A.dtype, self.B.dtype),
            )
        if isinstance(self.alpha, bool) or not 0 < self.alpha < math.inf:
            raise LoRAMismatchError(f"alpha={self.alpha!r} is not a positive number.", name="alpha", value=self.alpha)
        for name, tensor in self.extras.items():
            self._check_extra(name, tensor)
        if self.anchored and a[0] % (2 * max(len(self.blocks), 1)):
            raise LoRAMismatchError(f"Rank {a[0]} has no second half in each block.", name="anchored", value=a[0])
        self._check_kernel()
        if self.blocks:
            self._check_blocks()
        if self.form is not None:
            self._check_form(self.form)

    def _check_kernel(self) -> None:
        conv, size = self.kind == "conv", math.prod(self.kernel)
        if conv == bool(self.kernel) and (not conv or (len(self.kernel) <= 3 and size > 0 == self.A.shape[1] % size)):
            return
        raise LoRAMismatchError(
            f"A reads {self.A.shape[1]} inputs, and kernel={self.kernel!r} is of no {self.kind} with so many.",
            name="kernel",
            value=self.kernel,
            expected="one to three sizes whose product divides A's columns" if conv else "()",
        )

    def _check_extra(self, name: str, tensor: Tensor) -> None:
        if name not in EXTRAS:
            raise LoRAMismatchError(f"Factors have no {name!r}.", name=name, expected=tuple(EXTRAS))
        extra = EXTRAS[name]
        size = {"rank": self.rank, "out": self.out_features}.get(extra.size, max(tensor.numel(), 1))
        if tuple(tensor.shape) != (size,) or not tensor.is_floating_point():
            raise LoRAMismatchError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}: it has one floating number for each of {size}.",
                name=name,
                value=tuple(tensor.shape),
                expected=(size,),
            )
        require_kind(extra, self.kind)
        if self.blocks and self.kind == "conv":
            if extra.weight:
                raise LoRAUnsupportedError(
                    f"{extra.field} is not for a convolution with groups, whose W + ΔW is no grouped weight.",
                    name=extra.field,
                    value=len(self.blocks),
                    remedy=f"Leave it out of target_modules, or train without {extra.field}.",
                )
        elif self.blocks and not extra.training:
            raise LoRAUnsupportedError(
                f"{extra.field} is for whole layers, not for slices of a fused one "
                f"({', '.join(block.role for block in self.blocks)}).",
                name=extra.field,
                value=[block.role for block in self.blocks],
                remedy="Name the fused layer itself in target_modules (c_attn, qkv_proj, query_key_value).",
            )

    def _check_form(self, form: Form) -> None:
        require_whole_linear(form, self.kind, self.blocks)
        problem = form.problem(self.rank, self.in_features, self.out_features)
        if problem is None and self.A.device.type != "meta":
            same = zip((self.A, self.B), form.plain(*form.stored(self.A, self.B)), strict=True)
            # NaN, which is refused elsewhere, is not a matter of form.
            if not all(torch.equal(own.nan_to_num(), other.nan_to_num()) for own, other in same):
                problem = f"the factors are not of the form that {form.field} gives them"
        if problem is not None:
            raise LoRAMismatchError(f"{problem}.", name=form.field, value=form)

    def _check_blocks(self) -> None:
        n, out = len(self.blocks), self.B.shape[0]
        if self.rank % n:
            raise LoRAMismatchError(f"Rank {self.rank} does not divide into {n} blocks.", value=self.rank)
        taken: set[int] = set()
        for block in self.blocks:
            if block.rows[-1].stop > out:
                raise LoRAMismatchError(
                    f"Role {block.role!r} has rows up to {block.rows[-1].stop}, but the layer has {out}.",
                    name=block.role,
                    value=block.rows,
                )
            rows = {row for span in block.rows for row in span}
            if taken & rows:
                raise LoRAMismatchError(f"Role {block.role!r} shares rows with another block.", name=block.role)
            taken |= rows
        if self.B.device.type == "meta":
            return
        for block, _, part in self._parts():
            outside = part.detach().clone()
            outside[block.index(part.device)] = 0
            if outside.count_nonzero():
                raise LoRAMismatchError(
                    f"B is not zero outside the rows of role {block.role!r}.",
                    name=block.role,
                    remedy="Drop the blocks: the factors are then those of the whole layer.",
                )

    @property
    def rank(self) -> int:
        """R, the number of rows of A."""
        return self.A.shape[0]

    @property
    def scaling(self) -> float:
        """alpha/R, or alpha/√R with rsLoRA; times what its form asks for."""
        scaling = self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
        return scaling if self.form is None else scaling * self.form.factor(self.in_features)

    @property
    def num_parameters(self) -> int:
        """How many numbers were trained: in B only the rows that the blocks own."""
        if self.blocks:
            pair = self.A.numel() + int(sum(map(len, self.blocks)) / len(self.blocks) * self.rank)
        else:
            pair = sum(tensor.numel() for tensor in self.stored())
        return pair // (2 if self.anchored else 1) + sum(
            tensor.numel() for name, tensor in self.extras.items() if EXTRAS[name].trains
        )

    @property
    def in_features(self) -> int:
        """Columns of A: the layer's inputs, or an embedding's V."""
        return self.A.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of B: the layer's outputs, or an embedding's d."""
        return self.B.shape[0]

    def stored(self) -> tuple[Tensor, Tensor]:
        """A and B in the shapes that files hold: its form's; of a convolution (r, in, k…) and (out, r/groups, 1…)."""
        if self.kind == "conv":
            B = torch.cat([part for _, _, part in self.split()]) if self.blocks else self.B
            ones = (1,) * len(self.kernel)
            return self.A.view(self.rank, -1, *self.kernel), B.view(*B.shape, *ones)
        return (self.A, self.B) if self.form is None else self.form.stored(self.A, self.B)

    def plain(self) -> Factors:
        """The plain pair that computes the same."""
        if self.form is None:
            return self
        return dataclasses.replace(self, form=None, alpha=self.alpha * self.form.factor(self.in_features))

    def delta(self) -> Tensor:
        """ΔW = scaling·B·A as a dense (out, in) tensor, in float32 (float64 if the factors are).

        An embedding's is (d, V), the transpose of its weight; a Conv1D's likewise. A convolution's is (out, in·∏k).

        Raises:
            LoRAUnsupportedError: ΔW depends on the base's weight (DoRA).
        """
        refuse_extras(self, "delta()", [name for name, extra in EXTRAS.items() if extra.weight])
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        return (self.B.to(dtype) @ self.A.to(dtype)) * self.scaling

    def to(self, dtype: torch.dtype) -> Factors:
        """The same factors in another floating dtype."""
        extras = {name: tensor.to(dtype) for name, tensor in self.extras.items()}
        return dataclasses.replace(self, A=self.A.to(dtype), B=self.B.to(dtype), extras=extras)

    def equal(self, other: Factors) -> bool:
        """Same kind, scaling, blocks, and bit-equal tensors of the same dtype."""
        return (
            (self.kind, self.alpha, self.use_rslora, self.blocks, self.form, self.kernel)
            == (other.kind, other.alpha, other.use_rslora, other.blocks, other.form, other.kernel)
            and _same(self.A, other.A)
            and _same(self.B, other.B)
            and self.extras.keys() == other.extras.keys()
            and all(_same(tensor, other.extras[name]) for name, tensor in self.extras.items())
        )

    def _parts(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        r = self.rank // len(self.blocks)
        for i, block in enumerate(self.blocks):
            yield block, self.A[i * r : (i + 1) * r], self.B[:, i * r : (i + 1) * r]

    def split(self) -> list[tuple[Block, Tensor, Tensor]]:
        """The blocks' own factors: (block, A_i (r, in), B_i (len(block), r)); empty for a whole layer."""
        if not self.blocks:
            return []
        return [(block, a, b[block.index(b.device)]) for block, a, b in self._parts()]

    @classmethod
    def stack(
        cls,
        parts: Sequence[tuple[Block, Tensor, Tensor]],
        *,
        out_features: int,
        alpha: float,
        use_rslora: bool = False,
        kind: Literal["linear", "embedding", "conv", "attention"] = "linear",
        kernel: tuple[int, ...] = (),
    ) -> Factors:
        """One dense pair that computes what `parts` compute side by side; the inverse of `split`.

        Args:
            parts: (block, A_i (r, in), B_i (len(block), r)), all of one rank r.
            out_features: rows of the fused layer.
            alpha: alpha of one part, for rank r. The result's is n·alpha (rsLoRA: √n·alpha), so scaling stays.
        """
        blocks = tuple(block for block, _, _ in parts)
        ranks = {a.shape[0] for _, a, _ in parts} | {b.shape[1] for _, _, b in parts}
        if len(ranks) != 1 or any(b.shape[0] != len(block) for block, _, b in parts):
            shapes = [(block.role, tuple(a.shape), tuple(b.shape)) for block, a, b in parts]
            raise LoRAMismatchError(f"The parts {shapes} do not share one rank, or B does not fit its rows.")
        r, n = ranks.pop(), len(parts)
        b = parts[0][2].new_zeros(out_features, n * r)
        for i, (block, _, part) in enumerate(parts):
            if block.rows[-1].stop > out_features:
                raise LoRAMismatchError(
                    f"Role {block.role!r} has rows up to {block.rows[-1].stop}, but the layer has {out_features}.",
                    name=block.role,
                )
            b[block.index(b.device), i * r : (i + 1) * r] = part.detach()
        a = torch.cat([part.detach() for _, part, _ in parts])
        return cls(kind, a, b, alpha * (math.sqrt(n) if use_rslora else n), use_rslora, blocks, kernel=kernel)


@dataclass(frozen=True, eq=False)
class AdapterValue:
    """An adapter: its config and its tensors, by module path in the base (without PEFT's "base_model.model.").

    Args:
        config: the config that its files say or will say.
        factors: module path → factors; at least one.
        biases: "X.bias" → the whole trained bias. Needs `config.bias` "lora_only", or "all" where X has no factors.
        modules: module path → state dict of a module that was trained whole (modules_to_save), or of which single rows
            were (trainable_token_indices): those rows alone, under `tokenfields.ROWS`.
        embeddings: "X.weight" → PEFT's copy of the base's own weight, written beside the factors of an embedding; to be
            compared with the base, not put into it.
    """

    config: LoRAConfig
    factors: Mapping[str, Factors]
    biases: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    modules: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    embeddings: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("factors", "biases", "embeddings"):
            object.__setattr__(self, name, FrozenMapping(getattr(self, name)))
        modules = {path: FrozenMapping(state) for path, state in self.modules.items()}
        object.__setattr__(self, "modules", FrozenMapping(modules))
        if not self.factors:
            raise LoRAMismatchError("The adapter has no LoRA factors.", remedy="Adapt at least one module.")
        asked = set(asked_for(self.config))
        for path, pair in self.factors.items():
            if asked != pair.extras.keys():
                odd = sorted(asked ^ pair.extras.keys())[0]
                said = f"has no {odd}, which" if odd in asked else f"has a {odd}, which only"
                raise LoRAMismatchError(
                    f"{path}: the adapter {said} {EXTRAS[odd].field} asks for.",
                    name=EXTRAS[odd].field,
                    value=sorted(pair.extras),
                    expected=sorted(asked),
                )
        formed = bool(forms_asked(self.config))
        for path, pair in self.factors.items():
            want = form_of(self.config, path) if formed else None
            # PEFT does not pool in layers that GPTQ did not quantise.
            if pair.form != want and not (pair.form is None and want is not None and want.pooled):
                fields = [form.field for form in (pair.form, want) if form is not None]
                raise LoRAMismatchError(
                    f"{path}: its factors are of the form {pair.form}, the config asks for {want}.",
                    name=fields[0],
                    value=pair.form,
                    expected=want,
                )
        self._check_rows()
        for name in self.biases:
            if not name.endswith(".bias") and name != "bias":
                raise LoRAMismatchError(f"The bias {name!r} is not named '<module>.bias'.", name=name)
            needed = "lora_only" if name.removesuffix(".bias") in self.factors else "all"
            if self.config.bias not in ("all", needed):
                raise LoRAConfigError(
                    f"The adapter has the bias {name!r}, but config.bias is {self.config.bias!r}.",
                    name="bias",
                    value=self.config.bias,
                    expected=needed,
                    remedy=f'Set bias="{needed}".',
                )

    def _check_rows(self) -> None:
        """The rows of tokens are those that the config names."""
        indices = self.config.trainable_token_indices
        held = {path: state[ROWS] for path, state in self.modules.items() if ROWS in state}
        for path, rows in held.items():
            ids = ids_of(indices, path)
            if ids is None or rows.dim() != 2 or len(rows) != len(ids) or not rows.is_floating_point():
                raise LoRAMismatchError(
                    f"{path}: the adapter holds rows {tuple(rows.shape)} of tokens, the config names "
                    f"{'none there' if ids is None else len(ids)}.",
                    name="trainable_token_indices",
                    value=tuple(rows.shape),
                    expected=ids,
                )
            if path in self.factors:
                raise LoRAUnsupportedError(
                    f"{path}: single rows of it train (trainable_token_indices), and it has factors.",
                    name="trainable_token_indices",
                    value=path,
                    remedy="Leave it out of target_modules, as PEFT asks for, too.",
                )
        if indices is not None and not held:
            raise LoRAMismatchError(
                "The adapter holds no rows of tokens, which its config's trainable_token_indices names.",
                name="trainable_token_indices",
                value=indices,
            )

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the adapter, as files hold it."""
        for factors in self.factors.values():
            yield from factors.stored()
            yield from factors.extras.values()
        yield from self.biases.values()
        for state in self.modules.values():
            yield from state.values()
        yield from self.embeddings.values()

    @property
    def num_parameters(self) -> int:
        """How many numbers were trained: factors (of fused slices only their own rows), biases and whole modules."""
        whole = [t for state in self.modules.values() for t in state.values()]
        rest = sum(tensor.numel() for tensor in (*self.biases.values(), *whole))
        return rest + sum(factors.num_parameters for factors in self.factors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor, as stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())

    def copy(self) -> AdapterValue:
        """The same adapter with tensors of its own."""

        def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.detach().clone() for name, tensor in tensors.items()}

        return dataclasses.replace(
            self,
            factors={
                path: dataclasses.replace(f, A=f.A.detach().clone(), B=f.B.detach().clone(), extras=own(f.extras))
                for path, f in self.factors.items()
            },
            biases=own(self.biases),
            modules={path: own(state) for path, state in self.modules.items()},
            embeddings=own(self.embeddings),
        )

    def to(self, dtype: torch.dtype) -> AdapterValue:
        """The same adapter in another floating dtype; whole numbers in modules stay, copies of the base stay."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return dataclasses.replace(
            self,
            factors={path: factors.to(dtype) for path, factors in self.factors.items()},
            biases={name: cast(tensor) for name, tensor in self.biases.items()},
            modules={path: {k: cast(t) for k, t in state.items()} for path, state in self.modules.items()},
        )

    def equal(self, other: AdapterValue) -> bool:
        """Same config, names, dtypes and bits."""

        def same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
            return mine.keys() == theirs.keys() and all(_same(tensor, theirs[name]) for name, tensor in mine.items())

        return (
            self.config == other.config
            and self.factors.keys() == other.factors.keys()
            and all(factors.equal(other.factors[path]) for path, factors in self.factors.items())
            and same(self.biases, other.biases)
            and same(self.embeddings, other.embeddings)
            and self.modules.keys() == other.modules.keys()
            and all(same(state, other.modules[path]) for path, state in self.modules.items())
        )


def require_kind(extra: Extra, kind: str) -> None:
    """Raise `LoRAUnsupportedError` if a layer of this kind cannot have what a variant adds."""
    if kind not in extra.kinds:
        raise LoRAUnsupportedError(
            f"{extra.field} is for {' and '.join(extra.kinds)} layers, not for {NAMES.get(kind, kind)}.",
            name=extra.field,
            value=kind,
            expected=extra.kinds,
            remedy=f"Leave {NAMES.get(kind, kind)} out of target_modules, or train without {extra.field}.",
        )


def require_whole_linear(form: Form, kind: str, blocks: Sequence[Block]) -> None:
    """Raise `LoRAUnsupportedError` if a pair of this kind, or of these slices, cannot have a form."""
    if blocks or kind in NAMES:
        raise LoRAUnsupportedError(
            f"{form.field} is for whole linear layers, not for "
            + (f"{NAMES[kind]}." if kind in NAMES else "slices of a fused one."),
            name=form.field,
            value=kind if kind in NAMES else [block.role for block in blocks],
            remedy=f"Leave {NAMES[kind]} out of target_modules, or train without {form.field}."
            if kind in NAMES
            else "Name the fused layer itself in target_modules (c_attn, qkv_proj, query_key_value).",
        )


def plain(value: V) -> V:
    """The adapter with plain pairs that compute the same; itself if it has no others."""
    if not forms_asked(value.config):
        return value
    factors = {path: pair.plain() for path, pair in value.factors.items()}
    return dataclasses.replace(value, config=value.config.replace(use_bdlora=None, use_qalora=False), factors=factors)


def refuse_extras(value: AdapterValue | Factors, what: str, names: Iterable[str] = FORWARD) -> None:
    """Raise `LoRAUnsupportedError` if there are such extras, with which B·A alone is not what the adapter computes."""
    all_factors = [value] if isinstance(value, Factors) else value.factors.values()
    if isinstance(value, AdapterValue) and value.config.init == "loftq":
        raise LoRAUnsupportedError(
            f"{what} is of plain factors, and this adapter (init_lora_weights='loftq') is for a base that is rounded.",
            name="init_lora_weights",
            value="loftq",
            remedy="Put it on its base in memory and merge_lora(); or, for a quantised base, take it as a plain "
            'LoRA: config.replace(init="kaiming", init_options={}).',
        )
    for name in names:
        if any(name in factors.extras for factors in all_factors):
            extra = EXTRAS[name]
            raise LoRAUnsupportedError(
                f"{what} is of plain factors, and this adapter was trained with {extra.field}.",
                name=extra.field,
                value=True,
                remedy="Put it on its base in memory and merge_lora(); extract_lora() of that model is a plain LoRA.",
            )


def refuse_replicated(value: AdapterValue, what: str) -> None:
    """Raise `LoRAUnsupportedError` if the adapter's layers are not those of the base, whose weights `what` takes."""
    spans = value.config.layer_replication
    if spans is not None:
        raise LoRAUnsupportedError(
            f"{what} is of the base's own layers, and this adapter has layer_replication={[list(s) for s in spans]}: "
            "layers share weights there, and each has a change of its own.",
            name="layer_replication",
            value=spans,
            remedy="Put it on its base in memory, and run it there.",
        )


def refuse_rows(value: AdapterValue, what: str) -> None:
    """Raise `LoRAUnsupportedError` if single rows of an embedding were trained, which `what` does not write."""
    if value.config.trainable_token_indices is not None:
        raise LoRAUnsupportedError(
            f"{what} does not write single rows, and this adapter has trainable_token_indices.",
            name="trainable_token_indices",
            value=value.config.trainable_token_indices,
            remedy="Load the base, resize_token_embeddings() if tokens were added, load_lora(), and merge_and_save().",
        )


def refuse_invoked(config: LoRAConfig) -> None:
    """Raise `LoRAUnsupportedError` if it is an aLoRA's, which no change of a weight stands for."""
    if config.alora_invocation_tokens is not None:
        raise LoRAUnsupportedError(
            "An aLoRA cannot be merged: it acts from its invocation tokens on, and a weight everywhere.",
            name="alora_invocation_tokens",
            value=config.alora_invocation_tokens,
            remedy="Run it unmerged: set_lora(), use_lora() or route_lora().",
        )


def without_training(value: V) -> V:
    """The value without what only training reads, for a result that was not trained so."""
    fields = {extra.field for extra in EXTRAS.values() if extra.training and extra.name in asked_for(value.config)}
    if not fields:
        return value
    factors = {
        path: dataclasses.replace(pair, extras={k: t for k, t in pair.extras.items() if not EXTRAS[k].training})
        for path, pair in value.factors.items()
    }
    return dataclasses.replace(value, config=value.config.replace(**dict.fromkeys(fields)), factors=factors)


def _same(mine: Tensor, theirs: Tensor) -> bool:
    return mine.dtype == theirs.dtype and torch.equal(mine, theirs)
