"""The chain of one architecture: add, train, PEFT, load, merge, unmerge, remove; by "all-linear" and by roles."""

from __future__ import annotations

import copy
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from variants_parts.formula import written_out

import hf_lora
from hf_lora.errors import LoRAError, LoRAMismatchError, LoRATargetError, LoRAUnsupportedError
from hf_lora.targeting import roles_of

from .build import Built, run

__all__ = ["COLUMNS", "chain"]

COLUMNS = ("all-linear", "roles")
RANK, ALPHA, RATE, STEPS = 2, 4.0, 5e-2, 2
_TOLERANCE, _TOLERANCE_64 = 1e-5, 1e-9
_UP = re.compile(r"\.lora_slots\.B\d")  # B of a layer
_ROLES = ("q", "k", "v", "o", "gate", "up", "down")

Tensors = dict[str, Tensor]
Cell = dict[str, Any]


class _Leaves(Exception):
    """PEFT reads a file, and not all of it."""


class Failed(Exception):
    """A promise that does not hold; says which."""


def chain(built: Built, column: str) -> Cell:
    """A cell: its outcome, at which step and why where it is no pass, and what was adapted."""
    cell: Cell = {"outcome": "pass"}
    scene = _Scene(built, column, cell)
    try:
        with tempfile.TemporaryDirectory() as folder:
            scene.play(Path(folder))
    except LoRAError as error:
        cell |= {"outcome": "refused", "step": scene.step, "why": said(error)}
    except Failed as error:
        cell |= {"outcome": "fail", "step": scene.step, "why": str(error)}
    except Exception as error:  # noqa: BLE001  # what a user would see is the cell
        cell |= {"outcome": "error", "step": scene.step, "why": said(error)}
    return cell


class _Scene:
    def __init__(self, built: Built, column: str, cell: Cell) -> None:
        self.built, self.column, self.cell, self.step = built, column, cell, "add"
        self.base = built.model

    def play(self, folder: Path) -> None:
        """The whole chain; raises at the first promise that does not hold."""
        self.folder = folder
        model, given = self.fresh(), self.built.given
        classes, bits = _classes(model), _bits(model)
        targets = "all-linear" if self.column == "all-linear" else self.roles(model)
        torch.manual_seed(2)
        model.add_lora(hf_lora.LoRAConfig(r=RANK, alpha=ALPHA, target_modules=targets))
        start = run(self.base, given)
        _equal(run(model, given), start, "step 0 is not the base, bit for bit")

        self.step = "train"
        self.train(model)
        ours = run(model, given)
        change = _apart(ours, start)
        for _ in range(3):
            if change > 1e-3:
                break
            self.grow(model)  # a head that is nearly zero, say
            ours = run(model, given)
            change = _apart(ours, start)
        _require(change > 1e-4, f"the trained adapter changes the output by {change:.0e} of its largest value only")
        model.save_lora(folder)

        self.step = "PEFT"
        self.peft(folder, ours)

        self.step = "load"
        other = self.fresh()
        name = other.load_lora(folder)
        self.agree(run(other, given), ours, "loaded again", lambda: self.formula_64(folder))

        self.step = "merge"
        self.merge(other, name, run(other, given))

        self.step = "remove"
        for left in (model, other):
            left.remove_lora()
            _require(_classes(left) == classes, "remove_lora has not given every class back")
            _require(_same(_bits(left), bits), "remove_lora has not given every key and bit back")
            _equal(run(left, given), start, "after remove_lora the model does not compute what the base does")
        if self.column == "all-linear":
            self.step = "from PEFT"
            self.from_peft(folder / "peft")

    # ---- steps -------------------------------------------------------------------------------------------------------

    def roles(self, model: Any) -> list[str]:
        """Every role of the model that can be adapted; those that cannot be are noted."""
        there = {role for roles in roles_of(model).values() for role in roles}
        found, refused = [], {}
        for role in _ROLES:
            if role not in there:
                continue
            try:
                hf_lora.targeting.resolve(model, hf_lora.LoRAConfig(r=1, target_modules=[role]))
                found.append(role)
            except LoRAUnsupportedError as error:
                refused[role] = said(error)
        self.cell["roles"] = found
        if refused:
            self.cell["refused_roles"] = refused
        if not found:
            if refused:
                raise LoRAUnsupportedError(next(iter(refused.values())))
            raise LoRATargetError("no layer's role is known")
        return found

    def train(self, model: Any) -> None:
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not any(t.requires_grad for t in run(model, self.built.given, grad=True).values()):
            model.enable_input_require_grads()  # reversible layers pass no gradient on to what is inside otherwise
            self.cell["inputs_require_grad"] = True
        optimizer = torch.optim.AdamW([p for _, p in trained], RATE)
        for _ in range(STEPS):
            _loss(run(model, self.built.given, grad=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
        ups = {n: bool(p.any()) for n, p in trained if _UP.search(n)}
        moved = [n for n, nonzero in ups.items() if nonzero]
        self.cell |= {"layers": len(ups), "trained": len(moved)}
        _require(bool(moved), "no gradient reaches the adapter")
        with torch.no_grad():  # a layer that the inputs do not reach, or that only reads W: it is not to be zero
            for name, p in trained:
                if name in ups and not ups[name]:
                    p.normal_(std=0.3)
        _require(all(bool(p.isfinite().all()) for _, p in trained), "the training diverged")

    def grow(self, model: Any) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad and _UP.search(name):
                    p.mul_(10)

    def peft(self, folder: Path, ours: Tensors) -> None:
        """PEFT's forward of the file; the formula's where PEFT cannot read it, or leaves layers of it out."""
        import peft

        try:
            model = peft.PeftModel.from_pretrained(self.fresh(), str(folder)).eval()
            if left := _left_out(model, folder):
                raise _Leaves(f"PEFT leaves {left} layers of the file out")
            theirs = run(model, self.built.given)
            self.agree(ours, theirs, "PEFT", lambda: self.in_64(folder))
        except LoRAError:
            raise
        except Failed as error:  # does PEFT compute what is in the file?
            self.formula(folder, ours)
            self.cell["peft"] = f"PEFT does not compute W + s·BA here: {error}"
        except Exception as error:  # noqa: BLE001  # whatever PEFT cannot do
            self.cell["peft"] = str(error) if isinstance(error, _Leaves) else said(error)
            self.formula(folder, ours)

    def formula(self, folder: Path, ours: Tensors) -> None:
        """The forward with W + s·BA in the weights, from the file."""
        theirs = run(written_out(_untied(self.base), [folder]).float(), self.built.given)
        self.agree(ours, theirs, "W + s·BA", lambda: self.formula_64(folder))

    def in_64(self, folder: Path) -> tuple[Tensors, Tensors]:
        """Ours and PEFT's forward of the same file, all in float64."""
        import peft

        ours = self.double()
        ours.load_lora(folder)
        theirs = peft.PeftModel.from_pretrained(_eager(self.fresh()), str(folder)).eval().double()
        given = self.given_64()
        return run(ours, given), run(theirs, given)

    def merge(self, model: Any, name: str, ours: Tensors) -> None:
        before = _bits(model)
        model.set_lora(name)
        try:
            model.merge_lora()
        except LoRAUnsupportedError as error:
            if "tied" not in str(error):
                raise
            self.cell["merge"] = said(error)
            model.merge_lora(untie=True)
        merged = run(model, self.built.given)
        _require(not _same(_bits(model), before), "the merge has changed nothing")
        self.agree(merged, ours, "merged", self.merged_64)
        model.unmerge_lora()
        _require(_same(_bits(model), before), "unmerge_lora has not given every bit back")
        _equal(run(model, self.built.given), ours, "unmerged it does not compute what it did")

    def from_peft(self, folder: Path) -> None:
        """An adapter that PEFT put on its own choice of layers."""
        import peft

        torch.manual_seed(4)
        base = self.fresh()
        try:
            config = peft.LoraConfig(r=RANK, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
            theirs = peft.get_peft_model(base, config).eval()
            theirs.save_pretrained(folder)
            expected = run(theirs, self.built.given)
        except Exception as error:  # noqa: BLE001  # whatever PEFT cannot do
            self.cell["peft_all_linear"] = said(error)
            return
        model = self.fresh()
        try:
            model.load_lora(folder)
        except (LoRAUnsupportedError, LoRAMismatchError) as error:
            self.cell["from_peft"] = " ".join([said(error), *error.facts[:1]])
            return
        ours = run(model, self.built.given)
        try:
            self.agree(ours, expected, "PEFT's own all-linear", lambda: self.in_64(folder))
        except Failed as error:
            self.formula(folder, ours)
            self.cell["peft_all_linear"] = f"PEFT does not compute W + s·BA here: {error}"

    # ---- helpers -----------------------------------------------------------------------------------------------------

    def fresh(self) -> Any:
        """The base, again."""
        return copy.deepcopy(self.base)

    def agree(self, ours: Tensors, theirs: Tensors, what: str, again: Any) -> None:
        """Fail unless max|difference| ≤ 1e-5 · max|theirs|; where float32 jumps (a top-k, say), in float64."""
        apart = _apart(ours, theirs)
        if apart <= _TOLERANCE:
            return
        if again is not None:
            try:
                precise = _apart(*again())
            except LoRAError:
                raise
            except Exception as error:  # not every model computes in float64
                raise Failed(f"{what}: {apart:.0e} of the largest value apart; float64: {said(error)}") from error
            if precise <= _TOLERANCE_64:
                self.cell.setdefault("float64", []).append(f"{what}: {apart:.0e} in float32")
                return
            apart = max(apart, precise)
        raise Failed(f"{what}: {apart:.0e} of the largest value apart")

    def formula_64(self, folder: Path) -> tuple[Tensors, Tensors]:
        """Ours and the formula's forward of the same file, all in float64."""
        ours = self.double()
        ours.load_lora(folder)
        return run(ours, self.given_64()), run(_eager(written_out(_untied(self.base), [folder])), self.given_64())

    def merged_64(self) -> tuple[Tensors, Tensors]:
        """Merged and unmerged, all in float64."""
        model, given = self.double(), self.given_64()
        model.load_lora(self.folder)
        unmerged = run(model, given)
        model.merge_lora(untie=True)
        return run(model, given), unmerged

    def given_64(self) -> dict[str, Any]:
        given = self.built.given.items()
        return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given}

    def double(self) -> Any:
        """The base, again, in float64."""
        return _eager(self.fresh().double())


def _eager(model: Any) -> Any:
    """Experts one after another: the grouped product knows no float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def _untied(model: Any) -> Any:
    """A copy in which no two modules share a weight: an adapter changes one of them."""
    model, seen = copy.deepcopy(model), set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) in seen:
                    module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
                seen.add(id(parameter))
    return model


def _left_out(model: Any, folder: Path) -> int:
    """How many layers of a file a PEFT model has not, or has with other factors."""
    modules, left = dict(model.get_base_model().named_modules()), 0
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118  # no mapping
            path, _, rest = key.removeprefix("base_model.model.").partition(".lora_B")
            if rest:
                held = getattr(modules.get(path), "lora_B", {})
                left += "default" not in held or not held["default"].weight.equal(file.get_tensor(key))
    return left


def said(error: BaseException) -> str:
    """An error's class and first line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:300]}"


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Failed(otherwise)


def _loss(found: Tensors) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    total = torch.zeros(())
    for tensor in found.values():
        if tensor.requires_grad:
            noise = torch.randn(tensor.shape, generator=generator)
            total = total + (tensor.nan_to_num(0, 0, 0) * noise).mean()
    return total


def _classes(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def _bits(model: nn.Module) -> Tensors:
    return {k: v.detach().clone() for k, v in model.state_dict().items() if isinstance(v, Tensor) and "lora_" not in k}


def _same(now: Tensors, before: Tensors) -> bool:
    """Whether keys and tensors are those, as integers (−0.0 is not 0.0)."""
    return now.keys() == before.keys() and all(_as_bytes(now[k]).equal(_as_bytes(v)) for k, v in before.items())


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _equal(ours: Tensors, theirs: Tensors, otherwise: str) -> None:
    same = ours.keys() == theirs.keys() and all(ours[k].nan_to_num().equal(v.nan_to_num()) for k, v in theirs.items())
    _require(same, otherwise)


def _apart(ours: Tensors, theirs: Tensors) -> float:
    """The largest difference, of the largest value of its tensor."""
    if ours.keys() != theirs.keys() or any(ours[k].shape != v.shape for k, v in theirs.items()):
        return float("inf")
    found = 0.0
    for key, their in theirs.items():
        our, their = ours[key].double(), their.double()
        finite = their.isfinite()
        if not finite.equal(our.isfinite()):
            return float("inf")
        largest = float(their[finite].abs().max()) if bool(finite.any()) else 0.0
        if largest:
            found = max(found, float((our - their)[finite].abs().max()) / largest)
    return found
