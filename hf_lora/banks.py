"""What the adapters hold of one layer: frozen ones in banks, trainable ones as Parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .extras import EXTRAS
from .forms import Form
from .state import LoRAState
from .variants import Base, Effect, Narrow, effect_of, narrowing, scratch_of

__all__ = ["LoRABanks", "Slot", "block_index"]


@dataclass
class Slot:
    """What one adapter is on one layer."""

    rank: int = 0  # R; 0 where the adapter only trains the layer's bias
    alpha: float = 1.0
    scaling: float = 1.0
    dropout: float = 0.0
    trainable: bool = False
    blocks: tuple[Any, ...] = ()  # the fused layer's (role, rows) that the pair is made of; () for the whole layer
    bias: bool = False  # whether it adds to the output what depends on no input
    invoked: bool = False  # whether it acts only from its invocation on (aLoRA)
    extras: tuple[str, ...] = ()  # the vectors of its variants, `extras.EXTRAS`
    gain: bool = False  # whether it multiplies the output
    extra_rank: int = 0  # what stands in the banks beyond R: a variant's change of W that dropout does not reach
    anchored: bool = False  # whether the second half of each block's rank never trains: what the pair began as, negated
    rounded: str = ""  # the name of the buffer that stands for the layer's weight under this adapter, if one does
    still: tuple[str, ...] = ()  # "A" or "B": the factor of a trainable adapter that stays as it began
    form: Form | None = None  # in which smaller shape a trainable pair is held
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of steps of training, by config field
    dtype: torch.dtype | None = None  # of the factors as they came, where the banks hold every bit of them

    def parts(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """The Parameters, by name, that hold A (R, in) and B (out, R), or compact (rows, r); of its form's shapes."""
        if self.form is not None:
            A, B = self.form.stored(A, B)
        if not self.anchored:
            return {"A": A, "B": B}
        n = max(len(self.blocks), 1)
        r = self.rank // (2 * n)
        a = A.view(n, 2 * r, -1)
        halves = {"A": a[:, :r].reshape(n * r, -1), "start_A": a[:, r:].reshape(n * r, -1)}
        return {**halves, "B": B[:, :r].contiguous(), "start_B": B[:, r:].contiguous()}

    @staticmethod
    def learned(A: Tensor, B: Tensor, start_A: Tensor, start_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Other parts of the same product: B·A − B₀·A₀ = B·(A − A₀) + (B − B₀)·A₀. `start_B` is −B₀.

        Nothing large cancels: at step 0 it is 0 to the last bit, and DoRA's norm needs it in half precision.
        """
        return A - start_A, B, start_A, B + start_B

    def joined(self, A: Tensor, B: Tensor, start_A: Tensor, start_B: Tensor) -> tuple[Tensor, Tensor]:
        """What `parts` took apart, of a slot that is anchored."""
        n = max(len(self.blocks), 1)
        a = torch.cat([A.view(n, -1, A.shape[1]), start_A.view(n, -1, A.shape[1])], dim=1)
        return a.view(-1, A.shape[1]), torch.cat([B, start_B], dim=1)

    def exact_in(self, bank: torch.dtype, dtype: torch.dtype) -> bool:
        """Whether factors of `dtype` can be read back from a bank, bit for bit: B · 2^n / 2^n is B, rounding is not."""
        doubled = self.scaling >= 1 and math.frexp(self.scaling)[0] == 0.5
        return doubled and torch.promote_types(bank, dtype) == bank


class LoRABanks(nn.Module):
    """The adapters of one layer, by slot.

    A trainable adapter is a pair of Parameters `A<slot>` (R, in) and `B<slot>` (out, R), in float32. Frozen ones stand
    in two buffers, `bank_A` (slots, R_max, in) and `bank_B` (slots, R_max, out), padded with zeros to the largest rank,
    in the layer's compute dtype, their scaling already in B. `present` (slots + 1,) says which slots have frozen
    factors here; the last one stands for every slot beyond the banks, and is never set. A trained bias is held, frozen,
    as its difference from the layer's own, in `bank_bias` (slots, out).

    A trainable adapter that is anchored has the half of its rank that trains in `A<slot>` and `B<slot>`, and the other
    in frozen Parameters `start_A<slot>` and `start_B<slot>`: Parameters, since DDP hands them to every process.

    One whose pair has a form has Parameters of the form's shapes; the banks hold what they stand for.
    Under an adapter that is for a rounded base (LoftQ) a buffer `rounded_<key>`, (out, in), stands for the weight.

    A variant's vectors are Parameters `<name><slot>` while they train. Frozen, they are folded: into B, into
    `bank_bias`, and into `bank_gain` (slots, out), what the layer's output is multiplied by, less 1.
    """

    state: LoRAState
    kind: str
    row_map: str
    in_features: int
    out_features: int
    kernel: tuple[int, ...] = ()  # of a convolution
    fresh: bool  # whether the base's forward is known to give a tensor that nobody else holds
    leaders: dict[int, LoRABanks]  # of trainable adapters whose pair is that of a tied embedding: its banks
    kept: bool  # whether it stays while it holds no adapter: room for those to come
    learning: tuple[int, ...]  # the slots of trainable adapters
    standing: tuple[tuple[int, str], ...]  # the slots of frozen ones with a buffer that stands for the weight, and it
    slots: dict[int, Slot]
    masters: dict[int, tuple[Tensor, Tensor]]  # what `read` gives of adapters whose bank was cast to a smaller dtype
    bank_A: Tensor
    bank_B: Tensor
    bank_bias: Tensor
    bank_gain: Tensor
    gained: bool  # whether any of them needs the layer's own output, to multiply it or to put another one there
    invoked: bool  # whether any of them is an aLoRA
    base: type[nn.Module]  # the class that the layer had
    present: Tensor
    _squares: Tensor | None  # ‖W‖² of each row, (out,), once a variant has asked for it
    _squares_of: Any  # the weight that they are of
    _tails: dict[int, tuple[Tensor, Tensor]]  # of the same weight, by rank

    def __init__(
        self,
        state: LoRAState,
        kind: str,
        in_features: int,
        out_features: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        row_map: str = "batch",
    ) -> None:
        super().__init__()
        # As attributes and register_buffer(persistent=False), which take longer for hundreds of layers.
        vars(self).update(state=state, kind=kind, row_map=row_map, in_features=in_features, out_features=out_features)
        vars(self).update(slots={}, masters={}, fresh=False, gained=False, invoked=False, kept=False)
        vars(self).update(learning=(), standing=(), leaders={})
        vars(self).update(_squares=None, _squares_of=None, _tails={})
        empty = torch.empty(0, device=device, dtype=dtype)
        self._buffers.update(
            bank_A=empty.view(0, 0, in_features),
            bank_B=empty.view(0, 0, out_features),
            bank_bias=empty.view(0, out_features),
            bank_gain=empty.view(0, out_features),
            present=torch.zeros(1, device=device, dtype=torch.bool),
        )
        self._non_persistent_buffers_set.update(self._buffers)

    @property
    def factored(self) -> bool:
        """Whether any adapter has factors here."""
        return any(slot.rank for slot in self.slots.values())

    # ---- putting and reading ----------------------------------------------------------------------------------------

    def put_trainable(
        self,
        index: int,
        slot: Slot,
        A: Tensor | None,
        B: Tensor | None,
        bias: Tensor | None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Hold an adapter as Parameters. A: (R, in). B: (out, R), or compact (rows, r) where the slot has blocks."""
        self.remove(index)
        device = self.bank_A.device
        slot.extras = tuple(extras or ())
        slot.gain = any(EXTRAS[name].gain for name in slot.extras)
        pair = {} if A is None or B is None else slot.parts(A, B)
        for name, tensor in {**pair, "bias": bias, **(extras or {})}.items():
            if tensor is not None:
                trains = not name.startswith("start_") and name not in slot.still
                trains = trains and (name not in EXTRAS or EXTRAS[name].trains)
                parameter = nn.Parameter(tensor.detach().clone().to(device), requires_grad=trains)
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # init_weights() leaves it alone
                self.register_parameter(f"{name}{index}", parameter)
        for name, tensor in scratch_of(slot.settings, extras or {}).items():
            self.register_buffer(f"{name}{index}", tensor.to(device), persistent=False)
        if slot.blocks:
            rows, columns = block_index(slot.blocks, slot.rank)
            self.register_buffer(f"rows{index}", rows.to(device), persistent=False)
            self.register_buffer(f"columns{index}", columns.to(device), persistent=False)
        self._hold(index, slot)

    def put_frozen(
        self,
        index: int,
        slot: Slot,
        A: Tensor | None,
        B: Tensor | None,
        bias: Tensor | None,
        effect: Effect | None = None,
    ) -> None:
        """Write an adapter into the banks, cast once.

        Args:
            A: (R, in). B: (out, R), unscaled, dense.
            bias: what it changes the bias by, b' − b, (out,).
            effect: what the pair and a variant's vectors come to; A and B are then taken from it.
        """
        self.remove(index)
        slot.gain = effect is not None and effect.gain is not None
        slot.bias = bias is not None
        if effect is not None:
            A, B = effect.pair
            B = B if effect.gain is None else B * effect.gain[:, None]
            slot.extra_rank = A.shape[0] - slot.rank
        if A is not None and B is not None:
            rank = A.shape[0]
            self.reserve(index + 1, rank, writing=index)
            own_A, own_B = self._buffers["bank_A"][index], self._buffers["bank_B"][index]  # type: ignore[index]
            if rank < own_A.shape[0]:
                own_A[rank:].zero_()  # what was never written may be NaN
                own_B[rank:].zero_()
                own_A, own_B = own_A[:rank], own_B[:rank]
            own_A.copy_(A)
            own_B.copy_(B.T if slot.scaling == 1 or effect is not None else _wide(B.to(own_B.device)).T * slot.scaling)
            self._buffers["present"][index] = True  # type: ignore[index]
            if effect is None and slot.exact_in(own_B.dtype, B.dtype) and not own_B.is_meta:
                slot.dtype = B.dtype
        for name, vector in (("bank_bias", bias), ("bank_gain", None if effect is None else effect.gain)):
            bank: Tensor = self._buffers[name]  # type: ignore[assignment]
            if vector is not None:
                if index >= bank.shape[0]:
                    bank = self._buffers[name] = _grown(bank, (_capacity(index + 1), self.out_features))
                bank[index].copy_(vector - 1 if name == "bank_gain" else vector)
        self._hold(index, slot)

    def follow(self, index: int, leader: LoRABanks) -> None:
        """Let a trainable adapter's pair be the one that a tied embedding has, turned: no Parameters of its own."""
        self.leaders[index] = leader
        for name in (f"A{index}", f"B{index}"):
            del self._parameters[name]

    def _hold(self, index: int, slot: Slot) -> None:
        self.slots[index] = slot
        self._look()

    def _look(self) -> None:
        """See what the adapters here are. A graph reads this, and not the slots: a new frozen pair leaves it valid."""
        held = self.slots.items()
        self.gained = any(slot.gain or slot.rounded for _, slot in held)
        self.invoked = any(slot.invoked for _, slot in held)
        self.learning = tuple(index for index, slot in held if slot.trainable)
        self.standing = tuple((index, s.rounded) for index, s in held if s.rounded and not s.trainable)

    def hold_rounded(self, index: int, key: str, make: Callable[[], Tensor]) -> None:
        """Let another weight stand for the layer's under an adapter; those of one key share it.

        Args:
            make: gives it, (out, in).
        """
        slot, name = self.slots[index], f"rounded_{key}"
        if name not in self._buffers:
            self.register_buffer(name, make().to(self.bank_A).contiguous(), persistent=False)
        slot.rounded = name
        self._hold(index, slot)

    def reserve(self, slots: int, rank: int, *, writing: int | None = None) -> None:
        """Let the banks hold so many slots of this rank; one that is about to be written need not be zero.

        The number of slots doubles, so that loading n adapters copies O(n), and a compiled graph sees few new shapes.
        """
        have, widest = self._buffers["bank_A"].shape[:2]  # type: ignore[union-attr]
        if slots <= have and rank <= widest:
            return
        size, widest = have if slots <= have else _capacity(slots), max(widest, rank)
        # Another thread may be reading them one after the other; it takes the rank that both have.
        self._buffers["bank_A"] = _grown(self.bank_A, (size, widest, self.in_features), writing)
        self._buffers["bank_B"] = _grown(self.bank_B, (size, widest, self.out_features), writing)
        self._buffers["present"] = _grown(self.present, (size + 1,))

    def remove(self, index: int) -> None:
        """Forget an adapter; nobody reads its place in the banks until another is written there."""
        slot = self.slots.pop(index, None)
        self.masters.pop(index, None)
        self.leaders.pop(index, None)
        if slot is None:
            return
        for name in ("A", "B", "start_A", "start_B", "bias", *slot.extras):
            self._parameters.pop(f"{name}{index}", None)
        for name in (f"rows{index}", f"columns{index}", f"noise{index}"):
            self._buffers.pop(name, None)
            self._non_persistent_buffers_set.discard(name)
        if not slot.trainable:
            if slot.rank:
                self.present[index] = False
            if slot.bias:
                self.bank_bias[index].zero_()
            if slot.gain:
                self.bank_gain[index].zero_()
        self._look()
        if slot.rounded and all(held.rounded != slot.rounded for held in self.slots.values()):
            self._buffers.pop(slot.rounded, None)
            self._non_persistent_buffers_set.discard(slot.rounded)

    def frozen(self, index: int) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (R, out), scaled, of a frozen adapter, as they lie in the banks."""
        slot = self.slots[index]
        rank = slot.rank + slot.extra_rank
        A, B = self._buffers["bank_A"][index], self._buffers["bank_B"][index]  # type: ignore[index]
        return (A, B) if A.shape[0] == rank == B.shape[0] else (A[:rank], B[:rank])

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R), unscaled, of a frozen adapter whose slot has a dtype: copies, on the CPU."""
        if index in self.masters:
            return self.masters[index]
        slot, (A, B) = self.slots[index], self.frozen(index)
        own = A.to("cpu", slot.dtype, copy=True)
        return own, (B.to("cpu").T / slot.scaling).to(own.dtype).contiguous()

    def dense(
        self, index: int, of: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor, *, learned: bool = False
    ) -> tuple[Tensor, Tensor] | None:
        """A (R, in) and the dense, unscaled B (out, R) of a trainable adapter; None without factors.

        Args:
            of: what to take for a Parameter, given its name here and itself.
            learned: of one that is anchored another pair of the same product, see `Slot.learned`.
        """
        slot = self.slots[index]
        if not slot.rank:
            return None
        A, B = self.compact(index, of, learned)
        if slot.blocks:
            rows, columns = (self.get_buffer(f"{key}{index}").to(B.device) for key in ("rows", "columns"))
            B = functional.place_blocks(B, rows, columns, self.out_features, slot.rank)
        return A, B

    def compact(
        self, index: int, of: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor, learned: bool = False
    ) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R), or (rows, r) with blocks, of a trainable adapter. Arguments: as of `dense`."""
        slot = self.slots[index]
        if index in self.leaders:
            leader = self.leaders[index]
            B, A = (getattr(leader, key) for key in (f"A{index}", f"B{index}"))
            return (B, A) if leader.kind == self.kind else (A.T, B.T)
        A, B = (of(key, getattr(self, key)) for key in (f"A{index}", f"B{index}"))
        if not slot.anchored:
            return (A, B) if slot.form is None else slot.form.plain(A, B)
        start_A, start_B = (of(key, getattr(self, key)) for key in (f"start_A{index}", f"start_B{index}"))
        return slot.joined(*(slot.learned(A, B, start_A, start_B) if learned else (A, B, start_A, start_B)))

    def factors(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (R, in) and B (out, R), dense and scaled, in `dtype`, of any adapter of this layer."""
        slot = self.slots[index]
        if not slot.trainable:
            A, B = self.frozen(index)
            return A.to(dtype), B.T.to(dtype)
        pair = self.dense(index, learned=True)
        assert pair is not None
        A, B = pair
        return A.to(dtype), (B if slot.scaling == 1 else B * slot.scaling).to(dtype)

    def extras(self, index: int, of: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor) -> dict[str, Tensor]:
        """The vectors of a trainable adapter's variants, by name. `of`: as of `dense`."""
        return {name: of(key, getattr(self, key)) for name in self.slots[index].extras for key in (f"{name}{index}",)}

    def effect(self, index: int, layer: nn.Module) -> Effect:
        """What a trainable adapter with a variant's vectors comes to on the layer, differentiable."""
        pair = self.dense(index, learned=True)
        assert pair is not None
        return effect_of(self.extras(index), *pair, self.slots[index].scaling, lambda: self._base(layer))

    def narrowing(self, index: int) -> Narrow:
        """How an input goes through A of a trainable adapter, in training."""
        slot, held = self.slots[index], self.extras(index)
        scratch = {name: self.get_buffer(f"{name}{index}") for name in scratch_of(slot.settings, held)}
        return narrowing(slot.settings, {**held, **scratch})

    def _base(self, layer: nn.Module) -> Base:
        """The layer's weight, and the squares of its rows, summed again when it changes."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        weight = weight.detach()
        held: Tensor | None = self._squares
        if not torch.compiler.is_compiling():
            key = (weight.data_ptr(), weight.dtype, weight.device, 0 if weight.is_inference() else weight._version)
            if held is None or key != self._squares_of:
                with torch.inference_mode(False), torch.no_grad():
                    held = Base.of(weight, self.base).squares_of_rows()
                vars(self).update(_squares=held, _squares_of=key, _tails={})
        elif held is None or held.device != weight.device:
            return Base.of(weight, self.base)
        return Base.of(weight, self.base, held, self._tails)

    def bias_delta(self, index: int, bias: Tensor | None) -> Tensor:
        """What the adapter changes the bias by, b' − b, (out,)."""
        if not self.slots[index].trainable:
            return self.bank_bias[index]
        trained: Tensor = getattr(self, f"bias{index}")
        return trained if bias is None else trained - bias.to(trained.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LoRABanks:
        dtype = fn(self.bank_A.new_empty(0)).dtype
        for index, slot in self.slots.items():  # model.half(), say: what was loaded stays, to be saved again
            if slot.dtype is not None and torch.promote_types(dtype, slot.dtype) != dtype:
                self.masters[index] = self.read(index)
        applied: LoRABanks = super()._apply(fn, recurse)
        return applied

    def _replicate_for_data_parallel(self) -> LoRABanks:
        replica: LoRABanks = super()._replicate_for_data_parallel()
        replica.state = self.state.pinned()  # its thread does not see the caller's blocks
        return replica


def block_index(blocks: tuple[Any, ...], rank: int) -> tuple[Tensor, Tensor]:
    """Rows (n, 1) and columns (n, r) in the dense B of the compact rows of a fused layer's blocks."""
    r = rank // len(blocks)
    rows, columns = [], []
    for i, (_, ranges) in enumerate(blocks):
        index = torch.cat([torch.arange(span.start, span.stop) for span in ranges])
        rows.append(index.view(-1, 1))
        columns.append(torch.arange(i * r, (i + 1) * r).expand(len(index), r))
    return torch.cat(rows), torch.cat(columns)


def _capacity(slots: int) -> int:
    return 1 << (slots - 1).bit_length()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _grown(bank: Tensor, shape: tuple[int, ...], writing: int | None = None) -> Tensor:
    """The bank with more slots, or wider ones, of zeros."""
    have = len(bank)
    if have and bank.shape[1:] != shape[1:]:
        grown = bank.new_zeros(shape)
        grown[tuple(slice(0, n) for n in bank.shape)].copy_(bank)
        return grown
    grown = bank.new_empty(shape)
    if have:
        grown[:have].copy_(bank)
    for slot in range(have, shape[0]):
        if slot != writing:
            grown[slot].zero_()
    return grown
