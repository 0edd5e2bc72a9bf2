"""Routes where a layer's batch is not the rows: equal to each row alone, or refused, for every architecture we know.

The oracle is each row as a batch of its own, under `use_lora`: the images (sounds) of a row and its text, and nothing
of the others.
"""

from __future__ import annotations

import contextvars
import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rowscenes
import torch
from loras import randomise, with_adapters
from rowscenes import IMAGE_ID, OTHERS, TOWERS, Scene, grids, plain
from test_architectures import CASES
from torch import Tensor, nn

from hf_lora import LoRAConfig, LoRARouteError
from hf_lora import architectures as arch
from hf_lora.batches import row_maps
from hf_lora.layerinfo import describe_layer
from hf_lora.model import add, require
from hf_lora.state import active_rows
from hf_lora.survey import survey
from hf_lora.switching import route_lora, use_lora

ROUTE = ["b", None, "a"]
PER_ROW = ("logits", "last_hidden_state", "pooler_output", "text_embeds", "image_embeds", "encoder_last_hidden_state")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def outputs(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What the model says of each row."""
    with torch.no_grad():
        found = model(**inputs)
    tensors = {key: found[key] for key in PER_ROW if isinstance(found.get(key), Tensor)}
    if "transformer_decoder_last_hidden_state" in found:  # Mask2Former
        tensors = {"masks": found["masks_queries_logits"][-1]}
    return {key: tensor for key, tensor in tensors.items() if tensor.dim() and tensor.shape[0] in (1, rowscenes.ROWS)}


def alone(scene: Scene, route: list[str | None] | tuple[str | None, ...] = tuple(ROUTE)) -> list[dict[str, Tensor]]:
    """Each row by itself, through its adapter."""
    found = []
    for name, inputs in zip(route, scene.alone, strict=True):
        with scene.model.use_lora(name):
            found.append(outputs(scene.model, inputs))
    return found


def routed(scene: Scene, route: list[str | None] | tuple[str | None, ...] = tuple(ROUTE)) -> dict[str, Tensor]:
    with scene.model.route_lora(list(route)):
        return outputs(scene.model, scene.batch)


def agree(found: dict[str, Tensor], expected: list[dict[str, Tensor]]) -> None:
    assert found
    for row, own in enumerate(expected):
        for key, tensor in found.items():
            error = (tensor[row] - own[key][0]).abs().max()
            assert error <= 1e-5 * own[key].abs().max(), f"row {row} of {key} differs by {error:.1e}"


def layers(model: nn.Module, *, embeddings: bool = False) -> list[str]:
    """Every layer that can take a rank of 2."""
    kinds = {"linear", "conv1d", *(["embedding"] if embeddings else [])}
    found = {path: layer.info for path, layer in survey(model).layers.items()}
    return [path for path, info in found.items() if info.kind in kinds and info.max_rank >= 2]


def adapted(model: Any, targets: list[str], **fields: Any) -> Any:
    """Two adapters, of ranks 1 and 2, with biases."""
    fields = {"bias": "lora_only", "alpha": 4, **fields}
    return with_adapters(
        model, {name: LoRAConfig(r=r, target_modules=targets, **fields) for name, r in (("a", 1), ("b", 2))}
    )


# ---- every architecture ----------------------------------------------------------------------------------------------

SCENES: dict[str, Callable[[], Scene]] = {
    **{name: (lambda name=name: plain(name)) for name in (*CASES, *OTHERS) if name not in TOWERS},
    **TOWERS,
}
PLACES = {"swinv2", "swin2sr"}  # where a Linear layer computes positions: refused


@pytest.mark.parametrize("name", SCENES)
def test_a_route_equals_each_row_alone_or_is_refused(name: str) -> None:
    scene = SCENES[name]()
    model, everything = scene.model, layers(scene.model, embeddings=True)
    maps = row_maps(model, everything)
    inner = [path for path in everything if maps[path] == "inner" or "position" in path]
    kinds = {describe_layer(model.get_submodule(path)).kind for path in inner}
    assert name in PLACES or kinds <= {"embedding"}  # of layers that PEFT's all-linear names, none is refused

    adapted(model, [path for path in everything if path not in inner])
    expected = alone(scene)
    for (key, base), other in zip(alone(scene, [None] * 3)[0].items(), expected[0].values(), strict=True):
        assert (base - other).abs().max() > 1e-3 * base.abs().max(), f"{key}: the adapter has no effect"
    agree(routed(scene), expected)
    model.remove_lora()
    for path in inner[:1] + inner[-1:]:  # a table by place serves all rows at once
        adapted(model, [path])
        expected = alone(scene)
        with model.route_lora(ROUTE):
            try:
                found = outputs(model, scene.batch)
            except LoRARouteError:
                found = {}
        if found:  # it does not run at all, or on one row for each row
            agree(found, expected)
        model.remove_lora()


def test_every_map_of_the_table_is_tested() -> None:
    assert {name.replace("blip-2", "blip2") for name in arch.ROW_MAPS} <= SCENES.keys()
    # reached in other models; SAM's in test_multimodal.py
    parts = {"mllama_text_model", "mlcd_vision_model", "sam_vision_model"}
    other = {"jetmoe", "nllb-moe", "oneformer", "bros"}  # NLLB-MoE is `nllb`; the last two are refused
    assert arch.BATCHES.keys() <= SCENES.keys() | parts | other


def _of_text(path: str) -> bool:
    return any(part in path for part in ("language_model", "text_model", "lm_head"))


@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2_vl"])
def test_a_part_of_an_unknown_architecture_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arch, "ROW_MAPS", {})
    monkeypatch.setattr(arch, "INNER_PARTS", frozenset())  # whatever its parts are called
    scene = TOWERS[name]()
    maps = row_maps(scene.model, layers(scene.model))
    assert {row_map for path, row_map in maps.items() if _of_text(path)} == {"batch"}
    beside = [path for path in maps if not _of_text(path)]
    assert {maps[path] for path in beside} == {"inner"}
    for path in (beside[0], beside[-1]):
        adapted(scene.model, [path])
        with pytest.raises(LoRARouteError, match="no row map is known"):
            routed(scene)
        agree(routed(scene, ["a"] * 3), alone(scene, ["a"] * 3))  # one adapter for all needs no map
        scene.model.remove_lora()


# ---- what the rows bring ---------------------------------------------------------------------------------------------


def tower(model: nn.Module) -> list[str]:
    parts = ("vision", "visual", "projector", "connector", "audio_tower")
    return [path for path in layers(model) if any(part in path for part in parts)]


@pytest.fixture
def llava() -> Scene:
    scene = rowscenes.llava()
    adapted(scene.model, tower(scene.model))
    return scene


def test_rows_without_images_run_through_adapters_of_the_tower(llava: Scene) -> None:
    text = [inputs["input_ids"] for inputs in llava.alone]
    plain_text = torch.where(torch.cat(text) == IMAGE_ID, 5, torch.cat(text))
    scene = Scene(llava.model, {"input_ids": plain_text}, [{"input_ids": row[None]} for row in plain_text])
    agree(routed(scene), alone(scene))


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_images_or_videos_alone(kind: str) -> None:
    scene = grids("qwen2_5_vl", images=kind == "images", videos=kind == "videos")
    adapted(scene.model, layers(scene.model))
    agree(routed(scene), alone(scene))


def test_images_and_videos_of_equal_size_are_not_told_apart() -> None:
    scene = grids("qwen2_vl", videos=True)
    adapted(scene.model, tower(scene.model))
    films = torch.tensor([[2, 4, 4], [1, 2, 6], [1, 2, 4]])  # 52 patches, as the images
    scene.batch["pixel_values_videos"] = scene.batch["pixel_values_videos"][:52]
    scene.batch["video_grid_thw"] = films
    text = scene.batch["input_ids"]
    spare = (text[1] == rowscenes.VIDEO_ID).nonzero().flatten()[-2:]
    text[1, spare] = 5
    scene.batch["mm_token_type_ids"][1, spare] = 0
    with pytest.raises(LoRARouteError, match="images and videos"):
        routed(scene)


def _fewer(text: Tensor) -> None:
    text[0, (text[0] == IMAGE_ID).nonzero()[0]] = 5


def _moved(text: Tensor) -> None:
    text[0, (text[0] == IMAGE_ID).nonzero()[:8]] = 5
    text[1, 2:10] = IMAGE_ID


def _last(text: Tensor) -> None:
    text[2, (text[2] == IMAGE_ID).nonzero()[-1]] = 5


def _more(text: Tensor) -> None:
    text[2, -1] = IMAGE_ID


CHANGES = {
    "one too few": _fewer,
    "one too few at the end": _last,
    "one too many": _more,
    "half an image in another row": _moved,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["llava", "mistral3", "qwen2_vl", "idefics3"])
def test_placeholders_that_do_not_fit_raise_before_anything_runs(name: str, change: Callable[[Tensor], None]) -> None:
    scene = TOWERS[name]()
    adapted(scene.model, tower(scene.model))
    if change is _moved and name != "llava":
        text = scene.batch["input_ids"]
        text[0, (text[0] == IMAGE_ID).nonzero()[0]] = 5
        text[1, 2] = IMAGE_ID
    else:
        change(scene.batch["input_ids"])
    ran: list[str] = []
    for module in scene.model.modules():
        if describe_layer(module) is not None:
            module.register_forward_pre_hook(lambda module, _: ran.append(type(module).__name__))
    with pytest.raises(LoRARouteError, match="placeholders") as caught:
        routed(scene)
    assert caught.value.remedy
    assert not ran


def test_padding_and_placeholders_have_to_say_the_same() -> None:
    scene = rowscenes.idefics3()
    adapted(scene.model, tower(scene.model))
    scene.batch["pixel_values"] = scene.batch["pixel_values"][[1, 0, 2]]
    with pytest.raises(
        LoRARouteError, match=r"placeholders the images are of rows \[0, 0, 2\], by the input of \[1, 1, 2\]"
    ):
        routed(scene)


def test_what_hides_whose_the_images_are_is_refused(llava: Scene) -> None:
    model, batch = llava.model, dict(llava.batch)
    embeddings = model.get_input_embeddings()(batch.pop("input_ids"))
    with model.route_lora(ROUTE), pytest.raises(LoRARouteError, match="placeholders in input_ids"):
        model(inputs_embeds=embeddings, **batch)
    with model.route_lora(ROUTE), pytest.raises(LoRARouteError, match="outside the model's own forward"):
        model.get_image_features(**batch)
    with model.route_lora(["b"] * 3):
        found = model.get_image_features(**batch)
    with model.use_lora("b"):
        expected = model.get_image_features(**batch)
    assert torch.allclose(found.last_hidden_state, expected.last_hidden_state)


def test_positional_arguments_tell_the_rows_too(llava: Scene) -> None:
    expected = alone(llava)
    with llava.model.route_lora(ROUTE), torch.no_grad():
        found = llava.model(llava.batch["input_ids"], llava.batch["pixel_values"])
    agree({"logits": found.logits}, expected)


def test_an_exception_in_the_tower_leaves_nothing_behind(llava: Scene) -> None:
    model, state, expected = llava.model, require(llava.model), alone(llava)
    layer = model.model.multi_modal_projector.linear_2
    with model.route_lora(ROUTE):
        before = state.current
        handle = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**llava.batch)
        handle.remove()
        assert state.current is before
        with pytest.raises(LoRARouteError, match="outside"):
            layer(torch.zeros(3, 16, layer.in_features, dtype=torch.float64))
        agree(outputs(model, llava.batch), expected)
        assert state.current is before


def test_two_threads_route_their_own_images(llava: Scene) -> None:
    routes = (["b", None, "a"], ["a", "b", None])
    expected = [alone(llava, route) for route in routes]
    gate, found = threading.Barrier(2), [[], []]

    def work(at: int) -> None:
        gate.wait()
        found[at] += [routed(llava, routes[at]) for _ in range(8)]

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(work, at)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for at in range(2):
        assert len(found[at]) == 8
        for one in found[at]:
            agree(one, expected[at])


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3", "mllama", "mistral3", "qwen2_audio"])
def test_generate(name: str) -> None:
    scene = TOWERS[name]()
    adapted(scene.model, layers(scene.model))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = []
    for which, inputs in zip(ROUTE, scene.alone, strict=True):
        with scene.model.use_lora(which):
            expected.append(scene.model.generate(**inputs, **options)[0])
    with scene.model.route_lora(ROUTE):
        found = scene.model.generate(**scene.batch, **options)
        assert require(scene.model).current.maps is None
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_each_row_alone(llava: Scene, checkpointing: bool) -> None:
    model = llava.model
    model.train_lora(["a", "b"])
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

    def loss(inputs: dict[str, Any], weight: Tensor) -> Tensor:
        return (model(**inputs, use_cache=False).logits * weight).sum()

    weight = torch.randn(llava.batch["input_ids"].shape[1], 64, dtype=torch.float64)
    for which, inputs in zip(ROUTE, llava.alone, strict=True):
        with model.use_lora(which):
            value = loss(inputs, weight)
        if value.requires_grad:
            value.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with model.route_lora(ROUTE):
        value = loss(llava.batch, weight)
    value.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name in expected.keys() | found.keys():
        pair = [g.get(name, torch.zeros(())) for g in (expected, found)]
        assert (pair[0] - pair[1]).abs().max() <= 1e-9 * max(1.0, float(pair[0].abs().max())), name


def test_a_projector_trained_whole_goes_with_its_rows() -> None:
    scene = rowscenes.llava()
    adapted(scene.model, ["q_proj"], modules_to_save=["multi_modal_projector"])
    expected = alone(scene)
    agree(routed(scene), expected)
    scene.model.train_lora(["a"])
    agree(routed(scene), expected)


def test_a_merger_trained_whole_gives_other_entries_than_it_is_given() -> None:
    scene = grids("qwen2_vl")
    adapted(scene.model, ["o_proj"], modules_to_save=["merger"])
    with pytest.raises(LoRARouteError, match="no row map"):
        routed(scene)


def test_a_model_inside_another_module_is_told_by_its_own_forward() -> None:
    class Around(nn.Module):
        def __init__(self, inside: nn.Module) -> None:
            super().__init__()
            self.inside = inside

        def forward(self, **inputs: Any) -> Any:
            return self.inside(**inputs)

    scene = rowscenes.llava()
    around = Around(scene.model)
    for seed, name in enumerate(("a", "b")):
        add(around, LoRAConfig(r=2, target_modules=tower(around)), name)
        randomise(around, seed)
    expected = []
    for name, inputs in zip(ROUTE, scene.alone, strict=True):
        with use_lora(around, name):
            expected.append(outputs(around, inputs))
    with route_lora(around, ROUTE):
        agree(outputs(around, scene.batch), expected)


def test_copies_have_their_own_maps_and_the_last_adapter_takes_the_hooks(llava: Scene) -> None:
    other = copy.deepcopy(llava.model)
    expected = alone(llava)
    llava.model.remove_lora()
    for module in llava.model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        assert not any("hf_lora" in (getattr(hook, "__module__", None) or "") for hook in hooks)
        assert not module._forward_hooks_always_called
        assert not module._forward_pre_hooks_with_kwargs
    agree(routed(Scene(other, llava.batch, llava.alone)), expected)


def test_a_graph_refuses_what_it_cannot_tell(llava: Scene) -> None:
    state, x = require(llava.model), torch.zeros(5, 4)
    for row_map in ("inner", "map:images", "second"):
        with llava.model.route_lora(ROUTE), pytest.raises(LoRARouteError, match="no row map"):
            active_rows(x, state, row_map)
        with llava.model.route_lora(["b"] * 3), torch.no_grad():
            slots, weights = active_rows(x, state, row_map)
        assert slots.flatten().tolist() == [state.entry("b").slot] * 5
        assert weights.flatten().tolist() == [1.0] * 5


# ---- other forms of a batch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_torch_encoder_says_itself_which_dimension_is_the_rows(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0, batch_first=batch_first)
    model = nn.Sequential(nn.Linear(16, 16), layer).double().train()  # eval() would take torch's fused kernel
    targets = ["linear1", "linear2"] + ["0"] * batch_first
    for seed, name in enumerate(("a", "b")):
        add(model, LoRAConfig(r=2, target_modules=targets), name)
        randomise(model, seed)
    x = torch.randn(3, 3, 16, dtype=torch.float64)
    rows = x if batch_first else x.transpose(0, 1)
    expected = []
    for row, name in enumerate(ROUTE):
        with use_lora(model, name):
            own = rows[row : row + 1]
            expected.append(model(own if batch_first else own.transpose(0, 1)))
    with route_lora(model, ROUTE):
        found = model(x)
    assert torch.allclose(found, torch.cat(expected, 0 if batch_first else 1))


def test_ids_of_one_dimension_are_no_rows() -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table(torch.arange(x.shape[1]))

    model = Places()
    for seed, name in enumerate(("a", "b")):
        add(model, LoRAConfig(r=2, target_modules=["table"]), name)
        randomise(model, seed)
    x = torch.randn(3, 3, 4)
    with route_lora(model, ROUTE), pytest.raises(LoRARouteError, match="positions"):
        model(x)
    with use_lora(model, "b"):
        expected = model(x)
    with route_lora(model, ["b"] * 3):
        assert torch.equal(model(x), expected)


def test_the_gate_of_shared_experts_sees_the_rows_one_after_another() -> None:
    scene = plain("qwen2_moe")  # its one output is too narrow for the scan's ranks
    config = LoRAConfig(r=1, target_modules=["shared_expert_gate"], alpha=16)
    with_adapters(scene.model, {"a": config, "b": config})
    agree(routed(scene), alone(scene))


def test_an_encoder_of_its_own_refuses_another_number_of_rows() -> None:
    scene = plain("bart")
    adapted(scene.model, ["fc1"])
    ran: list[int] = []
    scene.model.get_encoder().layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with scene.model.route_lora(["a", "b"]), pytest.raises(LoRARouteError, match="names 2 rows, but the batch has 3"):
        scene.model.generate(scene.batch["input_ids"], max_new_tokens=1)
    assert not ran


@pytest.mark.parametrize("name", ["switch", "nllb"])
def test_experts_whose_tokens_are_not_of_the_rows_are_refused(name: str) -> None:
    scene = TOWERS[name]()
    adapted(scene.model, [path for path in layers(scene.model) if ".experts." in path])
    ids = torch.cat([scene.batch["input_ids"]] * 2)[:4]
    with scene.model.route_lora(ROUTE), pytest.raises(LoRARouteError, match="names 3 rows, but the batch has 4"):
        scene.model.get_encoder()(input_ids=ids)
