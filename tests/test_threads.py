"""What is active on other threads, in other tasks, in replicas, in generators, in recomputes that others start."""

from __future__ import annotations

import asyncio
import contextvars
import math
import numbers
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from loras import logits, with_adapters
from smallbase import tokenizer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import trainer

from hf_lora import LoRAConfig, LoRARouteError, LoRAStateError
from hf_lora.model import state_of

CONFIGS = {
    "a": LoRAConfig(r=2, target_modules=["q", "v"], alpha=60),
    "b": LoRAConfig(r=4, target_modules=["q", "down"], alpha=60),
}
FEW = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture
def model(tiny: Any) -> Any:
    return with_adapters(tiny("llama"), CONFIGS)


@pytest.fixture
def given(model: Any, batch: Any) -> Any:
    return batch(model, 3)


def each(model: Any, run: Callable[[], Any], choices: tuple[Any, ...] = ("a", "b", None)) -> dict[Any, Any]:
    found = {}
    for which in choices:
        with model.use_lora(which):
            found[which] = run()
    return found


# ---- replicas --------------------------------------------------------------------------------------------------------


class Parallel(nn.DataParallel[Any]):
    """torch's DataParallel on two "devices" that are both the CPU.

    `replicate` and `forward` are torch's own code; only what needs an accelerator is stood in for: the copies of
    Parameters and buffers (`clone`, through which gradients flow as through Broadcast), the scattering of inputs, and
    the threads, which begin with an empty context as torch's do.
    """

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        nn.Module.__init__(self)
        self.module, self.dim, self.device_ids, self.output_device = module, 0, [0, 1], 0
        self.src_device_obj = torch.device("cpu")
        replicate = sys.modules["torch.nn.parallel.replicate"]
        monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
        monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", self.copies)

    @staticmethod
    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Any) -> Any:
        halves = {key: value.chunk(2) if isinstance(value, Tensor) else (value,) * 2 for key, value in kwargs.items()}
        return [(), ()], [{key: value[i] for key, value in halves.items()} for i in range(2)]

    def parallel_apply(self, replicas: Any, inputs: Any, kwargs: Any) -> Any:
        results: dict[int, Any] = {}
        enabled = torch.is_grad_enabled()

        def work(i: int) -> None:
            torch.set_grad_enabled(enabled)
            try:
                results[i] = replicas[i](*inputs[i], **kwargs[i])
            except Exception as error:  # noqa: BLE001  # raised again by the caller, as torch does
                results[i] = error

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(replicas))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results.values():
            if isinstance(result, Exception):
                raise result
        return [results[i] for i in range(len(replicas))]

    def gather(self, outputs: Any, output_device: Any) -> Any:
        return {
            key: torch.cat(
                [out[key].reshape(1, *out[key].shape) if out[key].dim() == 0 else out[key] for out in outputs]
            )
            for key in ("loss", "logits")
            if outputs[0].get(key) is not None
        }


@pytest.mark.parametrize("trains", [[], ["a"], ["a", "b"]])
def test_replicas_run_what_is_active_where_they_are_called(
    model: Any, batch: Any, trains: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model.train_lora(trains)
    given, parallel = batch(model, 4), Parallel(model, monkeypatch)
    expected = each(model, lambda: logits(model, given))
    with model.use_lora({"a": 0.5, "b": -1.0}):
        expected["both"] = logits(model, given)
    for which, logit in expected.items():
        with model.use_lora({"a": 0.5, "b": -1.0} if which == "both" else which), torch.no_grad():
            found = parallel(**given, use_cache=False)["logits"]
        assert (found - logit).abs().max() <= 1e-5 * logit.abs().max(), which
    model.set_lora("b")
    with torch.no_grad():
        assert (parallel(**given, use_cache=False)["logits"] - expected["b"]).abs().max() <= 1e-4
    with model.route_lora(["a", "b", None, "a"]), pytest.raises(LoRARouteError, match="DataParallel"):
        parallel(**given, use_cache=False)
    parallel(**given, use_cache=False)


def test_replicas_run_heads(tiny: Any, batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head = LoRAConfig(r=2, target_modules=["q"], bias="all")
    model = with_adapters(tiny("bert-cls"), {"a": head, "b": head})
    given, parallel = batch(model, 4), Parallel(model, monkeypatch)
    for trains in ([], ["a", "b"]):
        model.train_lora(trains)
        for which, expected in each(model, lambda: logits(model, given)).items():
            with model.use_lora(which), torch.no_grad():
                assert (parallel(**given)["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max(), which
    with model.route_lora(["a"] * 4), pytest.raises(LoRARouteError, match="DataParallel"):
        parallel(**given)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_replicas_train(tiny: Any, batch: Any, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of what is active in the block, and of nothing else; also where the recompute comes later."""
    models = [with_adapters(tiny("llama"), CONFIGS) for _ in range(2)]
    gradients: list[dict[str, Tensor]] = []
    given = batch(models[0], 4)
    for one, wrap in zip(models, (lambda m: m, lambda m: Parallel(m, monkeypatch)), strict=True):
        one.train_lora(["a", "b"])
        one.train()
        if checkpointed:
            one.gradient_checkpointing_enable({"use_reentrant": False})
        with one.use_lora("b"):
            loss = wrap(one)(**given, labels=given["input_ids"], use_cache=False)["loss"].mean()
        loss.backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * 2 * 2  # q and down of two layers, A and B: b's alone
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


# ---- threads and tasks -----------------------------------------------------------------------------------------------


def stream(model: Any, given: Any, inherits: bool) -> str:
    """The recipe of transformers' documentation."""
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer(), timeout=20)
    run = (contextvars.copy_context().run, model.generate) if inherits else (model.generate,)
    thread = threading.Thread(target=run[0], args=run[1:], kwargs={**given, **FEW, "streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    return text


def test_a_streamer_generates_with_the_context_that_its_thread_is_given(model: Any, batch: Any) -> None:
    given = batch(model, 1)
    decode = tokenizer().decode
    expected = each(model, lambda: decode(model.generate(**given, **FEW)[0]))
    assert len(set(expected.values())) == 3
    for which in ("b", None):
        with model.use_lora(which):
            assert stream(model, given, inherits=True) == expected[which]
            assert stream(model, given, inherits=False) == expected["a"]  # the default, as documented
        model.set_lora(which)
        assert stream(model, given, inherits=False) == expected[which]
        model.set_lora("a")


def test_the_context_of_a_thread_outlives_the_block(model: Any, batch: Any) -> None:
    """The block may end while the streamer's thread still generates."""
    given, ended, found = batch(model, 1), threading.Event(), []
    expected = each(model, lambda: logits(model, given))

    def work() -> None:
        ended.wait()
        found.append(logits(model, given))

    with model.use_lora("b"):
        thread = threading.Thread(target=contextvars.copy_context().run, args=(work,))
        thread.start()
    ended.set()
    thread.join()
    assert torch.equal(found[0], expected["b"])


def test_executors_and_to_thread(model: Any, given: Any) -> None:
    expected = each(model, lambda: logits(model, given))

    def run() -> Tensor:
        return logits(model, given)

    async def main(pool: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        with model.use_lora("b"):
            assert torch.equal(await asyncio.to_thread(run), expected["b"])  # it copies the context
            assert torch.equal(await loop.run_in_executor(pool, run), expected["a"])  # this does not
            assert torch.equal(await loop.run_in_executor(pool, contextvars.copy_context().run, run), expected["b"])
            task = asyncio.create_task(asyncio.to_thread(run))  # a task copies it when it is made
        assert torch.equal(await task, expected["b"])

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(main(pool))
        with model.use_lora("b"):
            assert torch.equal(pool.submit(run).result(), expected["a"])
            assert torch.equal(pool.submit(contextvars.copy_context().run, run).result(), expected["b"])


# ---- generators ------------------------------------------------------------------------------------------------------


def steps(model: Any, which: Any) -> Iterator[Any]:
    with model.use_lora(which):
        yield model.active_lora
        yield model.active_lora


def nobody_uses(model: Any) -> bool:
    state = state_of(model)
    assert state is not None
    return not any(entry.users for entry in state.entries.values())


@pytest.mark.parametrize("leave", ["exhausted", "closed", "collected"])
def test_a_generator_that_ends_late_takes_only_its_own_block_away(model: Any, leave: str) -> None:
    generator = steps(model, "b")
    assert next(generator) == "b"
    with model.use_lora(None):  # entered after the generator's block, and left after it
        if leave == "exhausted":
            list(generator)
        elif leave == "closed":
            generator.close()
        else:
            del generator
        assert model.active_lora is None
        with model.route_lora(["a", "b"]):
            assert model.active_lora == ["a", "b"]
        assert model.active_lora is None
    assert model.active_lora == "a"
    assert nobody_uses(model)


def test_two_generators_end_in_any_order(model: Any) -> None:
    one, two = steps(model, "b"), steps(model, None)
    next(one)
    next(two)
    one.close()
    assert model.active_lora is None
    two.close()
    assert model.active_lora == "a"
    assert nobody_uses(model)


def test_a_block_that_is_left_in_another_context_says_so(model: Any) -> None:
    """A server that streams a generator runs each step in a context of its own: the second step has no block."""
    generator = steps(model, "b")
    assert contextvars.copy_context().run(next, generator) == "b"
    assert contextvars.copy_context().run(next, generator) == "a"
    with pytest.raises(LoRAStateError, match="left in another context"):
        contextvars.copy_context().run(next, generator)
    assert nobody_uses(model)
    generator = steps(model, "b")
    contextvars.copy_context().run(next, generator)
    generator.close()  # whoever gives it up is not told
    assert nobody_uses(model)
    context = contextvars.copy_context()  # the remedy: one context for all of it
    generator = steps(model, "b")
    assert [context.run(next, generator) for _ in range(2)] == ["b", "b"]
    context.run(generator.close)
    assert model.active_lora == "a"


def test_an_async_generator_is_closed_by_the_loop(model: Any) -> None:
    async def stream() -> Any:
        with model.use_lora("b"):
            yield model.active_lora
            yield model.active_lora

    async def main() -> None:
        async for found in stream():
            assert found == "b"
            break
        del found
        await asyncio.sleep(0)

    asyncio.run(main())
    assert model.active_lora == "a"
    assert nobody_uses(model)


# ---- recomputes that the caller starts, and what traces --------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_the_users_own_is_given_the_context(model: Any, given: Any, reentrant: bool) -> None:
    model.train_lora(["a", "b"])
    embedded = model.get_input_embeddings()(given["input_ids"]).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, use_cache=False).logits.square().sum()

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    with model.use_lora("b"):
        expected = gradients(run(embedded))
        loss = checkpoint(contextvars.copy_context().run, run, embedded, use_reentrant=reentrant)
    found = gradients(loss)  # after the block has ended
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_trainer_recomputes_a_mixture_of_two(tiny: Any, tmp_path: Any) -> None:
    import transformers

    name = "activation" if hasattr(transformers.TrainingArguments, "activation_checkpointing") else "gradient"
    trained: list[dict[str, Tensor]] = []
    for options in ({}, {f"{name}_checkpointing": True}):
        model = with_adapters(tiny("llama"), CONFIGS)
        model.train_lora(["a", "b"])
        model.set_lora({"a": 0.5, "b": 1.0})
        trainer(model, tmp_path, save_strategy="no", max_steps=3, **options).train()
        trained.append({(n, key): tensor for n in "ab" for key, tensor in model.lora_state_dict(n).items()})
    before = with_adapters(tiny("llama"), CONFIGS)
    start = {(n, key): tensor for n in "ab" for key, tensor in before.lora_state_dict(n).items()}
    for key, tensor in trained[0].items():
        assert not torch.equal(tensor, start[key]), key
        assert (trained[1][key] - tensor).abs().max() <= 1e-4 * tensor.abs().max(), key


def test_functional_call_sees_what_is_active(model: Any, given: Any) -> None:
    expected = each(model, lambda: logits(model, given))
    for which in ("a", "b", None):
        with model.use_lora(which), torch.no_grad():
            found = torch.func.functional_call(model, dict(model.named_parameters()), (), dict(given)).logits
            assert torch.equal(found, expected[which])
    model.train_lora("a")
    doubled = {name: p * 2 if ".lora_slots.A" in name else p for name, p in model.named_parameters()}
    with model.use_lora({"a": 2.0}):
        expected["twice"] = logits(model, given)
    with torch.no_grad():
        found = torch.func.functional_call(model, doubled, (), dict(given)).logits
    assert (found - expected["twice"]).abs().max() <= 1e-5 * found.abs().max()


def test_what_is_traced_or_exported_keeps_what_was_active(model: Any, given: Any) -> None:
    ids = given["input_ids"]
    expected = each(model, lambda: logits(model, {"input_ids": ids}))
    with model.use_lora("b"):
        traced = torch.jit.trace(lambda x: model(input_ids=x, use_cache=False).logits, (ids,), check_trace=False)
        exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False})
    assert not [node for node in exported.graph.nodes if "hf_lora" in str(node.target)]  # it runs without hf_lora
    for which in ("a", None):
        with model.use_lora(which), torch.no_grad():
            for found in (traced(ids), exported.module()(input_ids=ids, use_cache=False).logits):
                assert (found - expected["b"]).abs().max() <= 1e-5 * found.abs().max()
            assert torch.equal(logits(model, {"input_ids": ids}), expected[which])  # the model itself still switches
    with model.route_lora(["a", None, "b"]), pytest.raises(Exception, match="cannot be exported"):
        torch.export.export(model, (), {"input_ids": ids, "use_cache": False})


# ---- pipelines -------------------------------------------------------------------------------------------------------

TEXTS = ["w3 w4 w5", "w9 w8", "w20 w21 w22 w23"]
"""Of different lengths, so that a batch is padded."""


def close(mine: Any, other: Any) -> bool:
    """Equal, numbers to within float32's noise."""
    if isinstance(mine, dict):
        return mine.keys() == other.keys() and all(close(mine[key], other[key]) for key in mine)
    if isinstance(mine, list):
        return len(mine) == len(other) and all(map(close, mine, other))
    return (
        math.isclose(mine, other, rel_tol=1e-4, abs_tol=1e-5) if isinstance(mine, numbers.Real) else bool(mine == other)
    )


def assert_close(found: Any, expected: Any) -> None:
    assert close(list(found), expected), (found, expected)


TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "text-generation": ("llama", FEW),
    "text-classification": ("bert-cls", {}),
    "token-classification": ("bert-token", {}),
    "image-classification": ("vit-cls", {}),
    "feature-extraction": ("bert", {}),
}


@pytest.mark.parametrize("task", TASKS)
def test_pipelines(tiny: Any, task: str) -> None:
    import transformers

    family, options = TASKS[task]
    targets = LoRAConfig(r=2, target_modules=["q", "v"], alpha=200), LoRAConfig(r=3, target_modules=["up"], alpha=200)
    model = with_adapters(tiny(family), dict(zip("ab", targets, strict=True)))
    made: dict[str, Any] = {"tokenizer": tokenizer(padding_side="left" if family == "llama" else "right")}
    data: list[Any] = (
        TEXTS if task != "feature-extraction" else ["w3 w4", "w9 w8", "w20 w21"]
    )  # it gives the padding too
    if family == "vit-cls":
        from PIL import Image

        size = {"height": 16, "width": 16}
        made = {"image_processor": transformers.ViTImageProcessor(size=size)}
        data = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    pipe = transformers.pipeline(task, model=model, **made)
    expected = each(model, lambda: list(pipe(data, **options)))
    assert not any(close(expected["b"], expected[which]) for which in ("a", None))
    for which in ("b", None):
        with model.use_lora(which):
            assert_close(pipe(data, batch_size=2, **options), expected[which])
    route = ["b", None, "a"]
    with model.route_lora(route):
        found = pipe(data, batch_size=3, **options)
        with pytest.raises(LoRARouteError, match=r"names 3 rows.*has 2"):
            pipe(data, batch_size=2, **options)
        with pytest.raises(LoRARouteError, match=r"names 3 rows.*has 1"):
            pipe(data, **options)
    assert_close(found, [expected[name][i] for i, name in enumerate(route)])


def test_a_pipeline_over_a_data_set_runs_while_it_is_read(tiny: Any) -> None:
    import transformers

    model = with_adapters(tiny("bert-cls"), {n: LoRAConfig(r=2, target_modules=["q", "v"], alpha=200) for n in "ab"})
    pipe = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer())
    expected = each(model, lambda: pipe(TEXTS))
    assert not close(expected["a"], expected["b"])
    with model.use_lora("b"):
        lazy = pipe(text for text in TEXTS)
        assert_close(pipe(text for text in TEXTS), expected["b"])
    if not isinstance(lazy, list):  # an older transformers reads it at once
        assert_close(lazy, expected["a"])  # read after the block: the default, as documented
