"""A dense layer and its adapter as one operation of autograd: against autograd's own, and against formulas."""

from __future__ import annotations

import copy
import io
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from hf_lora import LoRAConfig, fused
from hf_lora.dropout import dropped
from hf_lora.slots import LoRASlots

WIDE, OUT, RANK, SCALE = 6, 5, 2, 0.7
# max|found − expected| / max|expected|, the expected in float64 from the same numbers
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(dtype: torch.dtype = torch.float64, wide: int = WIDE, out: int = OUT) -> tuple[Tensor, Tensor]:
    A, B = numbers(RANK, wide, seed=3, dtype=dtype), numbers(out, RANK, seed=4, dtype=dtype)
    return A.requires_grad_(), B.requires_grad_()


def mask(x: Tensor, p: float, seed: int) -> Tensor:
    """1 where kept, 0 where dropped, in float64; all of it is what `dropped` says, and nothing of its use."""
    where = dropped(x, p, seed)
    if where.dtype is torch.bool:
        return 1 - where.double()
    kept = [1.0] * x.numel()
    for place in where.tolist():
        kept[place] = 0.0
    return torch.tensor(kept, dtype=torch.float64).view(x.shape)


def apart(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


INPUTS: dict[str, Callable[[], Tensor]] = {
    "(d)": lambda: numbers(WIDE, seed=1),
    "(T, d)": lambda: numbers(7, WIDE, seed=1),
    "(B, T, d)": lambda: numbers(2, 7, WIDE, seed=1),
    "(a, b, c, d)": lambda: numbers(2, 3, 2, WIDE, seed=1),
    "empty": lambda: numbers(0, 3, WIDE, seed=1),
    "no positions": lambda: numbers(2, 0, WIDE, seed=1),
    "transposed": lambda: numbers(7, 2, WIDE, seed=1).transpose(0, 1),
    "columns far apart": lambda: numbers(2, WIDE, 7, seed=1).transpose(1, 2),
    "every second": lambda: numbers(2, 7, 2 * WIDE, seed=1)[..., ::2],
    "expanded": lambda: numbers(1, 7, WIDE, seed=1).expand(3, 7, WIDE),
}


def gradients(run: Callable[..., Tensor], *given: Tensor) -> tuple[Tensor, ...]:
    output = run(*given)
    weights = numbers(*output.shape, seed=9, dtype=output.dtype)
    return (output, *torch.autograd.grad(output, given, weights))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", INPUTS)
def test_output_and_gradients_are_the_formulas(shape: str, dtype: torch.dtype, p: float) -> None:
    """Factors in float32 where x is smaller: their gradients come in float32."""
    master = torch.promote_types(dtype, torch.float32)
    x = INPUTS[shape]().to(dtype).requires_grad_()
    weight, bias = numbers(OUT, WIDE, seed=5, dtype=dtype), numbers(OUT, seed=6, dtype=dtype)
    A, B = pair(master)
    found = gradients(lambda x, A, B: fused.lora_linear(x, weight, bias, A, B, SCALE, p=p, seed=11), x, A, B)
    assert [f.dtype for f in found] == [dtype, dtype, master, master]
    kept = mask(x, p, 11) if p else torch.ones(x.shape, dtype=torch.float64)
    X, W, A64, B64 = x.detach().double(), weight.double(), A.detach().double(), B.detach().double()
    s, D, G = SCALE / (1 - p), X * kept, numbers(*found[0].shape, seed=9, dtype=dtype).double()
    flat = lambda t: t.reshape(-1, t.shape[-1])  # noqa: E731
    expected = (
        X @ W.T + bias.double() + s * (D @ A64.T) @ B64.T,
        G @ W + s * (G @ B64 @ A64) * kept,
        s * flat(G @ B64).T @ flat(D),
        s * flat(G).T @ flat(D @ A64.T),
    )
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert apart(one.detach(), other) <= TOLERANCE[dtype]
    reference = gradients(
        lambda x, A, B: fused.lora_linear_reference(x, weight, bias, A, B, SCALE, p=p, seed=11), x, A, B
    )
    assert all(apart(r.detach(), e) <= TOLERANCE[dtype] for r, e in zip(reference, expected, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 4), max_size=2),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.05, 0.25, 0.3, 0.9]),
    st.booleans(),
    st.booleans(),
)
def test_first_and_second_derivatives(
    inner: list[int], wide: int, out: int, p: float, keep: bool, biased: bool
) -> None:
    x = numbers(*inner, wide, seed=1).requires_grad_()
    weight, bias = numbers(out, wide, seed=5), numbers(out, seed=6) if biased else None

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return fused.lora_linear(x, weight, bias, A, B, -0.3, p=p, seed=5, keep=keep)

    assert torch.autograd.gradcheck(run, (x, *pair(wide=wide, out=out)))
    assert torch.autograd.gradgradcheck(run, (x, *pair(wide=wide, out=out)))


def test_a_second_derivative_that_nothing_was_kept_for_is_refused() -> None:
    (A, B), x = pair(), numbers(3, WIDE, seed=1).requires_grad_()
    output = fused.lora_linear(x, numbers(OUT, WIDE, seed=5), None, A.detach(), B)
    with pytest.raises(NotImplementedError, match="A is frozen"):
        torch.autograd.grad(output.sum(), (x, B), create_graph=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_with_a_b_of_zero_it_is_the_base_layer_in_every_bit(dtype: torch.dtype, biased: bool, p: float) -> None:
    A, B = pair(torch.float32)
    x, weight = numbers(2, 7, WIDE, seed=1, dtype=dtype), numbers(OUT, WIDE, seed=5, dtype=dtype)
    bias = numbers(OUT, seed=6, dtype=dtype) if biased else None
    assert torch.equal(fused.lora_linear(x, weight, bias, A, B * 0, 2.0, p=p), F.linear(x, weight, bias))


# ---- nothing is done, or kept, that is not needed --------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """What autograd saves within the block."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


# what needs a gradient -> products of the backward, and what is saved of x, W, A, B, h
NEEDS = {
    "x A B": (5, "x W A B h"),  # g W + (g B) A, of which g B is one; dA; dB
    "A B": (3, "x A B h"),
    "x": (3, "W A B"),
    "A": (2, "x A B"),
    "B": (1, "B h"),
    "x B": (4, "W A B h"),
    "x A": (4, "x W A B"),
}


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("needs", NEEDS)
def test_no_work_and_no_memory_for_what_is_frozen(needs: str, p: float) -> None:
    A, B = (t.detach() for t in pair())
    held = {"x": numbers(3, WIDE, seed=1), "W": numbers(OUT, WIDE, seed=5), "A": A, "B": B}
    for name in needs.split():
        held[name].requires_grad_()
    with kept() as saved:
        output = fused.lora_linear(held["x"], held["W"], None, A, B, p=p)
    names = {tensor.data_ptr(): name for name, tensor in held.items()}
    products, what = NEEDS[needs]
    assert sorted(names.get(t.data_ptr(), "h") for t in saved) == sorted(what.split())
    assert all(t.numel() == 3 * RANK for t in saved if t.data_ptr() not in names)
    with Products() as count:
        output.sum().backward()
    assert count.count == products
    assert {name for name, t in held.items() if t.grad is not None} == set(needs.split())


def test_h_can_be_computed_again_instead() -> None:
    (A, B), x = pair(), numbers(3, WIDE, seed=1).requires_grad_()
    weight = numbers(OUT, WIDE, seed=5)
    with kept() as saved:
        again = gradients(lambda *g: fused.lora_linear(g[0], weight, None, *g[1:], p=0.2, seed=3, keep=False), x, A, B)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, weight, A, B)}
    held = gradients(lambda *g: fused.lora_linear(g[0], weight, None, *g[1:], p=0.2, seed=3), x, A, B)
    assert all(torch.equal(a, b) for a, b in zip(again, held, strict=True))


def with_lora(model: Any, **fields: Any) -> Any:
    torch.manual_seed(1)
    model.add_lora(LoRAConfig(**{"r": 3, "alpha": 6, "target_modules": "all-linear", **fields}))
    randomise(model)
    return model.train()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_that_share_an_input_keep_it_once_and_no_mask(tiny: Any, dtype: torch.dtype, dropout: float) -> None:
    """Beyond what the frozen base keeps: one input for q, k, v, o's, one for gate and up, down's; and h of each."""

    def bytes_of(model: Any) -> int:
        hidden = numbers(2, 9, 32, seed=1, dtype=dtype).requires_grad_()
        own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers(), hidden]}
        with kept() as saved:
            model.model(inputs_embeds=hidden, use_cache=False)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        return sum(size for place, size in storages.items() if place not in own)

    base = tiny("llama", dtype=dtype).requires_grad_(False)
    extra = bytes_of(with_lora(tiny("llama", dtype=dtype), dropout=dropout)) - bytes_of(base)
    layers, tokens, size = 2, 18, dtype.itemsize
    inputs, narrow = 32 + 32 + 48, 7 * 3  # the attention's output is kept by the base already
    assert extra <= layers * tokens * (inputs + narrow) * size


# ---- in a model ------------------------------------------------------------------------------------------------------


def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[bool]:
    """How often a layer asked for the fused path, and did (True) or did not (False) get it."""
    found: Counter[bool] = Counter()
    whole = LoRASlots.fused

    def counted(self: Any, x: Tensor, base: nn.Module) -> Tensor | None:
        output = whole(self, x, base)
        found[output is not None] += 1
        return output

    monkeypatch.setattr(LoRASlots, "fused", counted)
    return found


def train(model: Any, batch: dict[str, Tensor], seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_model_trains_as_by_the_generic_path(
    tiny: Any, batch: Any, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    """The same masks of the same seed, too."""
    found = calls(monkeypatch)
    model = with_lora(tiny("llama"), dropout=dropout)
    inputs = batch(model)
    loss, grads = train(model, inputs)
    assert found == {True: 14}
    monkeypatch.setattr(fused, "fits", lambda *_: False)
    generic, others = train(model, inputs)
    assert found == {True: 14, False: 14}
    torch.testing.assert_close(loss, generic)
    torch.testing.assert_close(grads, others)
    assert len(grads) == 28
    assert all(grad.abs().max() > 0 for grad in grads.values())


def test_gradients_are_pefts(tiny: Any, batch: Any, peft: Any) -> None:
    mine = with_lora(tiny("llama"))
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    other = peft.get_peft_model(tiny("llama"), config).train()
    values = mine.lora_state_dict()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[name.replace(".default", "")])
    inputs = batch(mine)
    loss, grads = train(mine, inputs)
    expected, others = train(other, inputs)
    torch.testing.assert_close(loss, expected)
    assert len(grads) == len(others) == 28
    for ours, theirs in zip(sorted(grads), sorted(others), strict=True):
        torch.testing.assert_close(grads[ours], others[theirs], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_region_draws_its_masks_again(
    tiny: Any, batch: Any, monkeypatch: pytest.MonkeyPatch, reentrant: bool
) -> None:
    model = with_lora(tiny("llama"), dropout=0.3)
    model.enable_input_require_grads()
    inputs = batch(model)
    loss, grads = train(model, inputs)
    other = train(model, inputs, seed=6)[0]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = calls(monkeypatch)
    again, others = train(model, inputs)
    # Forward and recompute, whether autograd records or not; the recompute may stop before the last layer of a block.
    assert found.keys() == {True}
    assert found[True] in (26, 28)
    assert torch.equal(loss, again)
    assert not torch.equal(loss, other)
    assert grads.keys() == others.keys()
    assert all(torch.equal(grads[name], others[name]) for name in grads)


def test_offloaded_to_the_cpu_and_copied(tiny: Any, batch: Any) -> None:
    model = with_lora(tiny("llama"), dropout=0.3)
    inputs = batch(model)
    expected = train(model, inputs)
    with torch.autograd.graph.save_on_cpu():
        assert_same(train(model, inputs), expected)
    assert_same(train(copy.deepcopy(model), inputs), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_same(train(torch.load(buffer, weights_only=False), inputs), expected)


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_it_is_as_exact_as_the_generic_path(
    tiny: Any, batch: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, dropout: float
) -> None:
    """Against the same model and the same masks in float32: bfloat16's rounding is all that is between them."""
    found = calls(monkeypatch)
    model = with_lora(tiny("llama", dtype=dtype), dropout=dropout)
    exact, inputs = copy.deepcopy(model).float(), batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grads = train(model, inputs)
    assert found == {True: 14}
    monkeypatch.setattr(fused, "fits", lambda *_: False)
    expected, right = train(exact, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        _, others = train(model, inputs)
    assert len(grads) == 28
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    torch.testing.assert_close(loss.float(), expected, rtol=0.02, atol=0)

    def off(values: dict[str, Tensor]) -> float:
        both = [torch.cat([v[name].flatten() for name in right]) for v in (values, right)]
        return float((both[0] - both[1]).norm() / both[1].norm())

    assert off(grads) < 0.05
    assert off(grads) < 1.5 * off(others)


def test_under_autocast_too_layers_that_share_an_input_keep_it_once(tiny: Any, peft: Any) -> None:
    """Beside the frozen base's: x in bfloat16 once for q, k, v and once for gate and up. PEFT keeps one for each."""

    def bytes_of(model: Any, layers: Any) -> int:
        hidden = numbers(2, 9, 32, seed=1, dtype=torch.float32).requires_grad_()
        own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers(), hidden]}
        with kept() as saved, torch.autocast("cpu", torch.bfloat16):
            layers(inputs_embeds=hidden, use_cache=False)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        return sum(size for place, size in storages.items() if place not in own)

    base = tiny("llama").requires_grad_(False)
    ours = with_lora(tiny("llama"))
    theirs = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=3, target_modules="all-linear")).train()
    least = bytes_of(base, base.model)
    extra = bytes_of(ours, ours.model) - least
    layers, tokens, size = 2, 18, 2
    inputs, narrow = 32 + 32 + 48, 7 * 3  # as above
    factors = sum(p.numel() for p in ours.parameters() if p.requires_grad) * size  # their casts
    assert extra <= layers * tokens * (inputs + narrow) * size + factors
    assert extra < bytes_of(theirs, theirs.model.model) - least


def test_the_copy_that_autocast_asks_for_is_of_this_tensor_as_it_is_now() -> None:
    x = numbers(3, WIDE, seed=1, dtype=torch.float32).requires_grad_()
    first = fused._cast(x, torch.bfloat16)
    assert fused._cast(x, torch.bfloat16) is first
    assert fused._cast(x, torch.float16).dtype == torch.float16
    with torch.no_grad():
        assert not fused._cast(x, torch.bfloat16).requires_grad
        again = fused._cast(x, torch.bfloat16)
        x.mul_(2)
        assert torch.equal(fused._cast(x, torch.bfloat16), x.bfloat16())
        assert not torch.equal(again, x.bfloat16())
    assert fused._cast(x, torch.bfloat16).requires_grad
    other = numbers(3, WIDE, seed=2, dtype=torch.float32)
    assert torch.equal(fused._cast(other, torch.bfloat16), other.bfloat16())
    elsewhere: list[Any] = []
    thread = threading.Thread(target=lambda x: elsewhere.append(fused._cast(x, torch.bfloat16)), args=(other,))
    thread.start()
    thread.join()
    assert elsewhere[0] is not fused._cast(other, torch.bfloat16)
    held = weakref.ref(fused._cast(other, torch.bfloat16))
    assert held() is not None
    del other, thread
    assert held() is None  # nothing is held for what is gone
    with torch.inference_mode():
        made = torch.ones(2)
        assert fused._cast(made, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "where", ["autocast over float64", "trained base", "another adapter too", "bias trained too", "hooked"]
)
def test_where_it_is_not_for_the_generic_path_runs(
    tiny: Any, batch: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    doubles = where == "autocast over float64"  # which autocast leaves alone
    model = tiny("llama", dtype=torch.float64 if doubles else torch.float32)
    if where == "another adapter too":
        model.add_lora(LoRAConfig(r=2, target_modules="all-linear"), "second")
    with_lora(model, bias="lora_only" if where == "bias trained too" else "none")
    found, inputs = calls(monkeypatch), batch(model)
    layer = model.model.layers[0].self_attn.q_proj
    if where == "another adapter too":
        model.set_lora({"default": 0.5, "second": 0.5})
    if where == "trained base":
        layer.weight.requires_grad_()
    if where == "hooked":  # a hook sees what it always saw
        layer.register_forward_hook(lambda module, given, output: output * 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=doubles):
        _, grads = train(model, inputs)
    assert found[False] == {"autocast over float64": 14, "trained base": 1, "another adapter too": 14}.get(where, 0)
    own = {name: g for name, g in grads.items() if "lora_slots" in name}
    assert len(own) == 28
    if where == "trained base":
        assert layer.weight.grad is not None
    if where == "hooked":
        assert own["model.layers.0.self_attn.q_proj.lora_slots.A0"].abs().max() == 0


def test_transforms_of_torch_func_give_autograds_gradients(tiny: Any, batch: Any) -> None:
    model = with_lora(tiny("llama"))
    inputs = batch(model)
    _, expected = train(model, inputs)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, values, (ids,), {"labels": ids}).loss
        return result

    found = torch.func.grad(loss)(trained, inputs["input_ids"])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_graph_and_no_break_when_compiled(tiny: Any, dropout: float) -> None:
    model = with_lora(tiny("llama"), dropout=dropout)
    mlp, x = model.model.layers[0].mlp, numbers(2, 5, 32, seed=1, dtype=torch.float32).requires_grad_()
    given = (x, *(p for p in mlp.parameters() if p.requires_grad))
    expected = gradients(lambda *_: mlp(x), *given)
    found = gradients(lambda *_: torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), *given)
    if not dropout:
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_checkpointed_on_its_own(reentrant: bool, p: float) -> None:
    weight, (A, B), x = numbers(OUT, WIDE, seed=5), pair(), numbers(40, WIDE, seed=1).requires_grad_()

    def run(*given: Tensor) -> Tensor:
        return fused.lora_linear(given[0], weight, None, *given[1:], p=p)

    torch.manual_seed(2)
    expected = gradients(run, x, A, B)
    torch.manual_seed(2)
    output = checkpoint(run, x, A, B, use_reentrant=reentrant)
    output.backward(numbers(*output.shape, seed=9))
    assert all(torch.equal(a, b) for a, b in zip((output, x.grad, A.grad, B.grad), expected, strict=True))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_gradients_are_the_same_when_their_graph_is_kept(p: float) -> None:
    (A, B), x, weight = pair(), numbers(40, WIDE, seed=1).requires_grad_(), numbers(OUT, WIDE, seed=5)
    output = fused.lora_linear(x, weight, None, A, B, SCALE, p=p, seed=3)
    kept_graph = torch.autograd.grad(output.sum(), (x, A, B), create_graph=True)
    torch.testing.assert_close(kept_graph, torch.autograd.grad(output.sum(), (x, A, B)))


@pytest.mark.parametrize("case", ["weighted", "two trained", "bias"])
def test_mixtures_and_biases_are_the_generic_paths(
    tiny: Any, batch: Any, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    model = tiny("bert-cls" if case == "bias" else "llama")
    if case == "two trained":
        model.add_lora(LoRAConfig(r=2, target_modules="all-linear"), "second")
    with_lora(model, bias="lora_only" if case == "bias" else "none").eval()
    if case == "two trained":
        model.train_lora(["default", "second"])
        randomise(model)
    if case != "bias":
        model.set_lora({"default": 0.5, "second": 0.3} if case == "two trained" else {"default": 0.5})
    inputs = batch(model)
    mine = model(**inputs).logits
    monkeypatch.setattr(fused, "fits", lambda *_: False)
    torch.testing.assert_close(mine, model(**inputs).logits)
