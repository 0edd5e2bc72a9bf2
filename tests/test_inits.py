"""How adapters begin: against PEFT's own initialisation, float64 formulas, and what every adapter promises."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from loras import bits, logits, randomise
from training import logged, trainer

from hf_lora import LoRAConfig, initnames
from hf_lora.errors import LoRAConfigError, LoRAStateError, LoRAUnsupportedError
from hf_lora.inits import INITS
from hf_lora.inits.pca import IncrementalPCA
from hf_lora.model import read
from hf_lora.progress import Progress
from hf_lora.store import read_adapter

torch.set_num_threads(1)

ANCHORED = ("pissa", "pissa_niter_8", "olora", "lora_ga", "corda")
EVERY = ("orthogonal", *ANCHORED, "mica", "eva")
QV = {"r": 4, "alpha": 6.0, "target_modules": ["q", "v", "up"]}


def loader(n: int = 3, rows_each: int = 2) -> list[dict[str, torch.Tensor]]:
    """Batches of tokens with labels; the end of some rows is padded."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(n):
        ids = torch.randint(3, 64, (rows_each, 20), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, -4:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100  # a prompt
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def given(init: str) -> Any:
    """The data of an initialisation that looks at data."""
    return loader() if init in initnames.NEED_DATA else None


def added(model: Any, init: str, name: str = "default", **fields: Any) -> Any:
    """The model with an adapter that begins so."""
    model.add_lora(LoRAConfig(**{**QV, "init": init, **fields}), name, data=given(init))
    return model


def steps(model: Any, n: int = 4) -> list[float]:
    """Train a little; the losses."""
    batch = loader()[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(n):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def close(mine: torch.Tensor, other: torch.Tensor, within: float = 1e-5) -> bool:
    """As the project's promise has it: the largest difference is within so much of the largest entry."""
    return float((mine - other).abs().max()) <= within * float(other.abs().max())


def starts(model: Any, name: str = "default") -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """(A₀, B₀, s) of each layer of a new adapter, in float64; of an anchored one the half that trains."""
    found = {}
    for path, f in read(model, name).factors.items():
        r = f.rank // 2 if f.anchored else f.rank
        found[path] = f.A[:r].double(), f.B[:, :r].double(), f.scaling
    return found


# ---- what every one of them promises ---------------------------------------------------------------------------------


@pytest.mark.parametrize("init", EVERY)
def test_the_whole_path(init, tiny, peft, tmp_path):
    """Step 0 is the base; the loss falls; PEFT computes the same on the original base; every bit is given back."""
    model, inputs = tiny("llama"), loader()[1]
    inputs.pop("labels")
    before, base = bits(model), logits(model, inputs)
    added(model, init)
    for mode in (False, True):  # the fused path is training's
        model.train(mode)
        start = model(**inputs).logits.detach()
        # Orthogonal factors have B·A = 0 in exact arithmetic alone.
        assert torch.equal(start, base) if init != "orthogonal" else close(start, base, 2e-6)
    losses = steps(model)
    assert losses[-1] < losses[0]
    ours = logits(model, inputs)
    assert not close(ours, base, 1e-2)
    model.save_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()
    assert close(ours, logits(theirs, inputs))
    again = tiny("llama")
    again.load_lora(tmp_path, name="x")
    assert close(logits(again, inputs), ours)
    with model.no_lora():
        assert torch.equal(logits(model, inputs), base)
    model.remove_lora()
    assert bits(model) == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("init", EVERY)
def test_others_beside_it_see_the_base(init, tiny, batch):
    """Routes, mixtures, another adapter, merging: the base is the base, whatever an adapter began as."""
    model = tiny("llama")
    inputs = batch(model, rows=3)
    base = logits(model, inputs)
    model.add_lora(LoRAConfig(r=2, target_modules=["q", "o"], init="off"), "other")
    other = logits(model, inputs)
    added(model, init, "own")
    steps(model, 2)
    own = logits(model, inputs)
    with model.use_lora("other"):
        assert torch.equal(logits(model, inputs), other)
    with model.route_lora(["own", None, "other"]):
        routed = logits(model, inputs)
    for row, alone in enumerate((own, base, other)):
        assert close(routed[row], alone[row])
    model.set_lora({"own": 1.0, "other": 0.5})
    mixed = logits(model, inputs)
    model.set_lora(None)
    assert torch.equal(logits(model, inputs), base)
    model.train_lora([])
    for which, alone in (("own", own), ({"own": 1.0, "other": 0.5}, mixed)):
        model.set_lora(which)
        assert close(logits(model, inputs), alone)
        model.merge_lora()
        assert close(logits(model, inputs), alone)
        model.unmerge_lora()


@pytest.mark.parametrize("init", EVERY)
def test_only_what_should_train_trains(init, tiny):
    """A₀ and B₀ stay, MiCA's B stays, also after a while in the frozen banks; all else gets a gradient."""
    model = added(tiny("llama"), init, "a")
    first = read(model, "a")
    model.train_lora([])
    model.train_lora("a")
    assert read(model, "a").equal(first)
    steps(model, 2)
    r = {path: f.rank // 2 if f.anchored else f.rank for path, f in first.factors.items()}
    for path, f in read(model, "a").factors.items():
        was = first.factors[path]
        assert f.anchored == was.anchored == (INITS[initnames.method(init)].anchored)
        assert torch.equal(f.A[r[path] :], was.A[r[path] :])
        assert torch.equal(f.B[:, r[path] :], was.B[:, r[path] :])
        assert not torch.equal(f.A[: r[path]], was.A[: r[path]])
        assert torch.equal(f.B[:, : r[path]], was.B[:, : r[path]]) == (init == "mica")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = [f.A.shape[1] + (0 if init == "mica" else f.B.shape[0]) for f in first.factors.values()]
    assert trained == sum(size * rank for size, rank in zip(sizes, r.values(), strict=True))


@pytest.mark.parametrize("init", ["pissa", "olora", "mica", "lora_ga", "eva", "orthogonal"])
def test_resume_is_the_run_that_nobody_stopped(init, tiny, tmp_path):
    """Also where the resuming machine begins with other signs or another random start."""
    torch.manual_seed(1)
    whole = trainer(added(tiny("llama"), init), tmp_path / "whole", max_steps=4)
    whole.train()
    torch.manual_seed(99)
    model = added(tiny("llama"), init)
    for name, p in model.named_parameters():  # what the decomposition of another machine may well be
        if ".lora_slots." in name:
            p.data.neg_()
    resumed = trainer(model, tmp_path / "run", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert read(model, "default").equal(read(whole.model, "default"))
    assert logged(resumed) == logged(whole)
    written = read_adapter(tmp_path / "run" / "checkpoint-4")
    assert all(torch.equal(f.A, written.factors[path].A) for path, f in read(model, "default").factors.items())


# ---- against PEFT's own initialisation -------------------------------------------------------------------------------


def peft_start(peft: Any, base: Any, init: str, **fields: Any) -> Any:
    """PEFT's model, initialised by PEFT."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=init, **fields
    )
    if init == "corda":
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(base, config, run_model=lambda: [base(input_ids=row[None]) for row in unpadded()])
    if init == "lora_ga":
        from peft.tuners.lora.loraga import preprocess_loraga

        preprocess_loraga(base, config, lambda: [base(**batch).loss.backward() for batch in loader()])
    return peft.get_peft_model(base, config)


def seeded(*args: Any, **kwargs: Any) -> Any:
    """The fast decomposition from the same random start each time."""
    torch.manual_seed(0)
    return SVD_LOWRANK(*args, **kwargs)


SVD_LOWRANK = torch.svd_lowrank


def unpadded() -> list[torch.Tensor]:
    """The rows of `loader()`, without what is padded."""
    return [ids[mask.bool()] for b in loader() for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]


@pytest.mark.parametrize(
    ("init", "options"),
    [
        ("pissa", {}),
        ("pissa rslora", {}),
        ("pissa_niter_8", {}),
        ("olora", {}),
        ("mica", {}),
        ("lora_ga", {"direction": "ArB2r", "scale": "stable"}),
        ("lora_ga", {"direction": "ArBr", "scale": "weight_svd"}),
        ("lora_ga", {"direction": "A2rBr", "scale": "gd_scale"}),
        ("lora_ga", {"direction": "ArB2r", "scale": "unit"}),
        ("corda", {"corda_method": "ipm"}),
        ("corda", {"corda_method": "kpm"}),
    ],
    ids=str,
)
def test_the_start_is_pefts(init, options, tiny, peft, monkeypatch):
    """A₀, B₀, and the base less s·B₀·A₀, which PEFT trains on (signs of singular vectors are free)."""
    monkeypatch.setattr(torch, "svd_lowrank", seeded)
    monkeypatch.setattr("peft.tuners.lora.layer.svd_lowrank", seeded)
    init, _, rslora = init.partition(" ")
    base, model = tiny("llama"), tiny("llama")
    made = {"lora_ga": "LoraGAConfig", "corda": "CordaConfig"}
    fields = (
        {f"{init}_config": getattr(importlib.import_module("peft.tuners.lora.config"), made[init])(**options)}
        if init in made
        else {}
    )
    theirs = peft_start(peft, tiny("llama"), init, use_rslora=bool(rslora), **fields)
    model.add_lora(LoRAConfig(**QV, init=init, use_rslora=bool(rslora), init_options=options), data=given(init))
    for path, (A, B, s) in starts(model).items():
        layer = theirs.base_model.model.get_submodule(path)
        their_A, their_B = (getattr(layer, f"lora_{x}")["default"].weight.detach().double() for x in "AB")
        for mine, other in ((A, their_A), (B.T, their_B.T)):
            signs = (mine * other).sum(1, keepdim=True).sign()
            assert close(mine, other * signs, 1e-3), path
        removed = base.get_submodule(path).weight.double() - layer.base_layer.weight.double()
        if init != "lora_ga":  # of which A and B hold different directions, whose signs do not cancel
            assert close(s * B @ A, removed, 1e-4) or (init == "mica" and not removed.any())
        anchor = read(model, "default").factors[path]
        assert not anchor.delta().any() or float(anchor.delta().abs().max()) < 1e-6


def test_eva_is_pefts(tiny, peft):
    """The directions, the ranks of groups with one input, and the scaling that goes with a rank."""
    from peft.tuners.lora.eva import get_eva_state_dict

    options = {"rho": 2.0, "tau": 0.99}
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": "eva"}
    config = peft.LoraConfig(**fields, eva_config=peft.EvaConfig(**options))
    model, other = tiny("llama"), tiny("llama")
    for each in (model, other):  # two directions explain most of what goes into the first layer
        each.model.layers[0].input_layernorm.weight.data[:2] *= 12
    theirs = get_eva_state_dict(other, Sized(loader()), config, show_progress_bar=False)
    model.add_lora(config, data=loader())
    mine = starts(model)
    groups: dict[str, list[list[int]]] = {}
    for path, w in theirs.items():
        A, B, s = mine.get(path, (torch.zeros(0, w.shape[1]).double(), torch.zeros(1), 1.5))
        groups.setdefault(path.replace("v_proj", "q_proj"), []).append([len(w), len(A)])
        assert s == pytest.approx(1.5)  # alpha/r stays as the rank changes
        assert not B.any()
        n = min(len(w), len(A), 2)  # the later ones depend on the fast decomposition's random start
        assert bool((torch.cosine_similarity(A[:n], w[:n].double()) > 0.98).all()), path
    assert {k: sum(a for a, _ in v) for k, v in groups.items()} == {k: sum(b for _, b in v) for k, v in groups.items()}
    assert len({len(w) for w in theirs.values()}) > 2
    assert sum(len(w) for w in theirs.values()) == sum(len(a) for a, _, _ in mine.values()) == 24


class Sized(list):  # type: ignore[type-arg]
    """A list that PEFT may take for a DataLoader."""


# ---- against formulas ------------------------------------------------------------------------------------------------


def test_the_components_are_those_of_all_rows_at_once():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.diag(torch.logspace(0, -2, 12, dtype=torch.float64))
    x = torch.randn(200, 12, generator=generator, dtype=torch.float64) @ mixing + 3
    pca = IncrementalPCA(12, 0.99)
    for part in x.split(40):
        pca.update(part)
    centred = x - x.mean(0)
    _, values, Vt = torch.linalg.svd(centred, full_matrices=False)
    assert torch.allclose(pca.values, values)
    assert torch.allclose((pca.components * Vt).sum(1).abs(), torch.ones(12, dtype=torch.float64))
    assert torch.allclose(pca.shares, values**2 / centred.square().sum())
    assert torch.allclose(pca.mean, x.mean(0))
    pca.update(x[:11])  # fewer than the components: left out
    assert pca.count == 200


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga", "mica", "eva"])
def test_roles_of_a_fused_layer(init, tiny):
    """q and v of GPT-2's c_attn each begin from their own rows (of a Conv1D, whose weight is (in, out))."""
    model = tiny("gpt2")
    inputs = loader()[0]
    base = logits(model, inputs)
    model.add_lora(LoRAConfig(r=3, alpha=6.0, target_modules=["q", "v"], init=init), data=given(init))
    assert close(logits(model, inputs), base, 2e-6)
    steps(model, 2)
    if init == "pissa":
        model.remove_lora()
        model.add_lora(LoRAConfig(r=3, alpha=6.0, target_modules=["q", "v"], init=init))
        f = read(model, "default").factors["transformer.h.0.attn.c_attn"]
        W = tiny("gpt2").transformer.h[0].attn.c_attn.weight.double().T
        for (_, A, B), rows in zip(f.split(), (slice(0, 32), slice(64, 96)), strict=True):
            U, values, Vt = torch.linalg.svd(W[rows])
            expected = U[:, :3] @ torch.diag(values[:3]) @ Vt[:3]
            assert close(f.scaling * B[:, :3].double() @ A[:3].double(), expected)
            assert torch.equal(A[:3], A[3:])
            assert torch.equal(B[:, :3], -B[:, 3:])


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_embeddings(init, tiny, batch, tmp_path, peft):
    model = tiny("llama")
    inputs = batch(model)
    base = logits(model, inputs)
    model.add_lora(LoRAConfig(r=4, target_modules=["embed_tokens", "q"], init=init))
    assert close(logits(model, inputs), base, 2e-6)
    steps(model, 2)
    model.save_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()
    assert close(logits(model, inputs), logits(theirs, inputs))


@pytest.mark.parametrize("rslora", [False, True])
def test_patterns_and_rslora_survive_the_doubling(rslora, tiny, batch, peft, tmp_path):
    """What PEFT itself refuses to convert: rsLoRA with rank and alpha patterns."""
    model = tiny("llama")
    fields = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\..*q_proj": 3.0}, "use_rslora": rslora}
    added(model, "pissa", **fields)
    wanted = LoRAConfig(**QV, **fields)
    randomise(model)
    for path, f in read(model, "default").factors.items():
        assert f.rank == 2 * wanted.rank_for(path)
        assert f.scaling == pytest.approx(wanted.scaling_for(path))
    model.save_lora(tmp_path)
    inputs = batch(model)
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path)).eval()
    assert close(logits(model, inputs), logits(theirs, inputs))
    assert theirs.peft_config["default"].init_lora_weights is True


def test_dropout_copies_graphs_and_half_precision(tiny, batch):
    """A compiled graph, a copy of the model, dropout, half precision: the pair is the pair."""
    model = added(tiny("llama"), "pissa", dropout=0.3)
    inputs = batch(model)
    base = logits(tiny("llama"), inputs)
    model.train()
    assert close(logits(model, inputs), base, 2e-6)  # dropout acts on what was learned, which is nothing yet
    model.eval()
    steps(model, 2)
    ours = logits(model, inputs)
    assert torch.equal(logits(copy.deepcopy(model), inputs), ours)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert close(logits(compiled, inputs), ours)
    half = added(tiny("llama", dtype=torch.bfloat16), "pissa")
    assert close(logits(half, inputs).float(), logits(tiny("llama", dtype=torch.bfloat16), inputs).float(), 1e-2)
    assert all(p.dtype == torch.float32 for n, p in half.named_parameters() if ".lora_slots." in n)


@pytest.mark.parametrize("init", sorted(initnames.NEED_DATA))
def test_data_are_read_by_the_base_alone(init, tiny, monkeypatch):
    """Whatever is active on the model, and in whatever mode it is."""
    monkeypatch.setattr(torch, "svd_lowrank", seeded)
    alone, crowded = tiny("llama"), tiny("llama")
    crowded.add_lora(LoRAConfig(r=2, target_modules=["q", "down"], init="off"), "other")
    crowded.train()
    modes = [module.training for module in crowded.modules()]
    added(alone, init, "x")
    added(crowded, init, "x")
    for path, f in read(alone, "x").factors.items():
        assert torch.equal(f.A, read(crowded, "x").factors[path].A)
        assert torch.equal(f.B, read(crowded, "x").factors[path].B)
    assert [m.training for m in crowded.modules() if "lora_slots" not in m._modules][:9] == modes[:9]


def test_lora_ga_of_a_conv1d_is_of_its_gradient(tiny):
    model = tiny("gpt2")
    for batch in loader():
        (model(**batch).loss / 3).backward()
    gradient = model.transformer.h[0].attn.c_attn.weight.grad.T.double()
    model = tiny("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the gradient is taken in training mode
    options = {"direction": "ArB2r", "scale": "unit"}
    model.add_lora(LoRAConfig(r=3, target_modules=["q", "v"], init="lora_ga", init_options=options), data=loader())
    f = read(model, "default").factors["transformer.h.0.attn.c_attn"]
    for (_, A, B), rows in zip(f.split(), (slice(0, 32), slice(64, 96)), strict=True):
        U, values, Vt = torch.linalg.svd(gradient[rows])
        assert bool(((A[:3].double() * Vt[:3]).sum(1).abs() > 0.99).all())
        assert torch.allclose(B[:, :3].double().norm(dim=0), values[3:6], rtol=0.05)
        assert float((U[:, 3:6].T @ B[:, :3].double()).diagonal().abs().min()) > 0.9 * float(values[5])


def test_logs_and_summary_are_of_what_was_learned(tiny):
    model = added(tiny("llama"), "pissa")
    assert max(v for k, v in Progress(model).measure().items() if k.startswith("delta_norm")) < 1e-6
    steps(model)
    found = Progress(model).measure()["delta_norm/up"]
    factors, base = read(model, "default").factors, tiny("llama")
    paths = [path for path in factors if path.endswith("up_proj")]
    change = sum(float(factors[p].delta().double().square().sum()) for p in paths)
    whole = sum(float(base.get_submodule(p).weight.detach().double().square().sum()) for p in paths)
    assert found == pytest.approx((change / whole) ** 0.5, rel=1e-3)
    assert "r=8 (half of it stays as it began)" in str(model.lora_summary())


def test_pefts_config_and_a_plan(tiny, peft):
    """`peft.LoraConfig` begins the same way; a plan counts what trains."""
    model = tiny("llama")
    model.add_lora(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa_niter_4"))
    assert all(f.anchored and f.rank == 8 for f in read(model, "default").factors.values())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert read(model, "default").num_parameters == trained
    with torch.device("meta"):
        empty = type(model)(model.config)
    empty.add_lora(LoRAConfig(r=4, target_modules=["q"], init="pissa"))
    assert sum(p.numel() for p in empty.parameters() if p.requires_grad) == trained


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(model: Any, error: type[Exception], match: str, **fields: Any) -> None:
    """Adding it raises, and the model is as before."""
    data = fields.pop("data", None)
    before = bits(model)
    with pytest.raises(error, match=match) as caught:
        model.add_lora(LoRAConfig(**{**QV, **fields}), data=data)  # type: ignore[arg-type]
    assert caught.value.remedy  # type: ignore[attr-defined]
    assert bits(model) == before
    assert model.lora_names == ()
    assert not any(m._forward_hooks for m in model.modules())
    assert not model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_refusals(tiny):
    model = tiny("llama")
    for init in ("eva", "lora_ga", "corda"):
        refused(model, LoRAConfigError, "looks at data", init=init)
        refused(model, LoRAConfigError, "no batch", init=init, data=[])
        refused(model, LoRAConfigError, "has to give batches", init=init, data=loader()[0])
        refused(model, LoRAConfigError, "A batch is a list", init=init, data=[[1]])
        embedding = {"target_modules": ["embed_tokens"], "data": loader(1)}
        refused(model, LoRAUnsupportedError, "not for embeddings", init=init, **embedding)
    refused(model, LoRAConfigError, "looks at no data", init="pissa", data=loader())
    refused(model, LoRAUnsupportedError, "not for embeddings", init="loftq", target_modules=["embed_tokens"])
    refused(model, LoRAConfigError, "odd", init="orthogonal", r=3)
    refused(model, LoRAConfigError, "at most 16", init="lora_ga", r=17, data=loader(1), target_modules=["q"])
    refused(model, LoRAConfigError, "no loss", init="lora_ga", data=[{"input_ids": loader()[0]["input_ids"]}])
    refused(model, LoRAConfigError, "only once", init="eva", data=iter(loader()), init_options={"tau": 1.0})
    short = [{"input_ids": loader()[0]["input_ids"][:1, :5]}]
    refused(model, LoRAConfigError, "tokens that", init="eva", r=16, data=short)
    for init, options in (("eva", {"rho": 0.5}), ("eva", {"tau": 2}), ("eva", {"whiten": 1}),
                          ("lora_ga", {"direction": "x"}), ("lora_ga", {"scale": "x"}),
                          ("lora_ga", {"stable_gamma": 0}), ("corda", {"corda_method": "x"})):  # fmt: skip
        refused(model, LoRAConfigError, next(iter(options)), init=init, init_options=options, data=loader(1))


def test_data_that_reach_no_layer(tiny):
    model = tiny("t5")
    ids = loader()[0]["input_ids"]
    data = [{"encoder_outputs": (torch.randn(2, 5, 32),), "decoder_input_ids": ids}]
    with pytest.raises(LoRAStateError, match="never reached") as caught:
        model.add_lora(LoRAConfig(r=2, target_modules=["q"], init="corda"), data=data)
    assert any("encoder" in fact for fact in caught.value.facts)


def test_a_quantised_weight(tiny):
    model = tiny("llama")
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    for init in ("pissa", "olora", "mica", "corda", "lora_ga"):
        with pytest.raises(LoRAUnsupportedError, match="int8"):
            added(model, init)


def test_options_are_pefts_and_go_to_its_fields():
    config = LoRAConfig(init="eva", init_options={"rho": 1.0})
    written = config.to_peft()
    assert (written["init_lora_weights"], written["eva_config"]) == ("eva", {"rho": 1.0})
    assert LoRAConfig.from_peft(written).init_options == {"rho": 1.0}
    kept = LoRAConfig.from_peft({**written, "eva_config": {"rho": 1.0, "new": 3}})
    assert kept.peft_fields["eva_config"] == {"rho": 1.0, "new": 3}
    assert kept.unsupported() == {}
    assert kept.unsupported(constructing=True) == {"eva_config": {"rho": 1.0, "new": 3}}
    fields = {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm", "cache_file": None}}
    corda = LoRAConfig.from_peft({**written, **fields})
    assert corda.init_options == {"corda_method": "kpm"}
    assert INITS.keys() == set(initnames.NAMES)
    assert {name for name, init in INITS.items() if init.look} == initnames.NEED_DATA
    assert {name for name, init in INITS.items() if init.anchored} == initnames.CHANGE_BASE


def test_a_file_of_peft_that_was_not_converted(tiny, peft, tmp_path):
    peft_start(peft, tiny("llama"), "pissa").save_pretrained(tmp_path)
    with pytest.raises(LoRAUnsupportedError, match="path_initial_model_for_weight_conversion"):
        tiny("llama").load_lora(tmp_path)


def test_pefts_own_conversion_loads_and_agrees(tiny, batch, peft, tmp_path):
    theirs = peft_start(peft, tiny("llama"), "pissa")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    randomise_peft(theirs)
    theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = tiny("llama")
    model.load_lora(tmp_path / "end")
    inputs = batch(model)
    assert close(logits(model, inputs), logits(theirs.eval(), inputs))


def randomise_peft(model: Any) -> None:
    """Random values for PEFT's factors."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_an_orthogonal_start_that_peft_could_not_repeat_is_not_named(tiny, tmp_path: Path):
    """An orthogonal adapter that is cut to an odd rank: PEFT's orthogonal start would refuse to load it."""
    model = added(tiny("llama"), "orthogonal")
    randomise(model)
    model.lora_adapter().truncate(rank=3).save(tmp_path)
    again = tiny("llama")
    again.load_lora(tmp_path)
    assert '"init_lora_weights": true' in (tmp_path / "adapter_config.json").read_text()


# ---- with variants ---------------------------------------------------------------------------------------------------


def test_a_start_that_peft_refuses_with_a_variant_is_not_named(tiny, tmp_path, peft):
    for place, (init, variant) in enumerate([("gaussian", "lora_bias"), ("mica", "use_dora"), ("eva", "lora_bias")]):
        model = added(tiny("llama"), init, target_modules=["q_proj"], **{variant: True})
        assert model.lora_adapter("default").config.init == init
        model.save_lora(tmp_path / str(place))
        assert peft.LoraConfig.from_pretrained(str(tmp_path / str(place))).init_lora_weights is True


TOGETHER = [
    ("pissa", {"use_dora": True}),
    ("mica", {"use_dora": True}),
    ("lora_ga", {"use_dora": True, "freeze_a": True}),
    ("olora", {"freeze_a": True}),
    ("orthogonal", {"lora_bias": True}),
]


@pytest.mark.parametrize(("init", "variant"), TOGETHER, ids=str)
def test_the_whole_path_of_a_variant(init, variant, tiny, peft, tmp_path):
    """As of an initialisation alone; and merges, frozen factors, a compiled graph."""
    family, targets = ("gpt2", ["c_attn", "c_fc"]) if "lora_bias" in variant else ("llama", ["q_proj", "up_proj"])
    model, inputs = tiny(family), loader()[1]
    inputs.pop("labels")
    before, base = bits(model), logits(model, inputs)
    added(model, init, target_modules=targets, **variant)
    assert close(logits(model, inputs), base, 2e-6)
    stays = {"A"} if variant.get("freeze_a") else {"B"} if init == "mica" else set()
    stays |= {"start_A", "start_B"} if init in ANCHORED else set()
    own = [(n.rpartition(".")[2], p) for n, p in model.named_parameters() if ".lora_slots." in n]
    assert {name[:-1] for name, p in own if not p.requires_grad} == stays
    losses = steps(model)
    assert losses[-1] < losses[0]
    ours, value = logits(model, inputs), model.lora_adapter("default")
    assert not close(ours, base, 1e-2)
    if init == "pissa":
        assert close(logits(torch.compile(model, backend="eager", fullgraph=True), inputs), ours)
    model.save_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(family), str(tmp_path)).eval()
    assert close(ours, logits(theirs, inputs))
    model.train_lora([])
    assert close(logits(model, inputs), ours)
    held = bits(model)
    model.merge_lora()
    assert close(logits(model, inputs), ours)
    model.unmerge_lora()
    assert bits(model) == held
    model.train_lora("default")
    assert model.lora_adapter("default").equal(value)
    assert torch.equal(logits(model, inputs), ours)
    model.remove_lora()
    assert bits(model) == before


def test_dora_from_pissa_has_the_gradients_of_the_formula(tiny):
    """W' = m ∘ V / ‖V‖, V = W + s·(B·A − B₀·A₀), with the norm a constant."""
    model = added(tiny("llama"), "pissa", target_modules=["q_proj"], use_dora=True)
    steps(model, 2)
    layer = model.model.layers[0].self_attn.q_proj
    slots, x = layer.lora_slots, torch.randn(7, 32)
    for parameter in slots.parameters():
        parameter.grad = None
    layer(x).square().sum().backward()
    names = ("A0", "B0", "magnitude0")
    A, B, m = (getattr(slots, name).detach().double().requires_grad_() for name in names)
    V = layer.weight.double() + slots.slots[0].scaling * (B @ A + slots.start_B0.double() @ slots.start_A0.double())
    W = (m / V.detach().norm(dim=1))[:, None] * V
    (x.double() @ W.T).square().sum().backward()
    for name, expected in zip(names, (A, B, m), strict=True):
        assert close(getattr(slots, name).grad.double(), expected.grad, 1e-5), name


def test_the_norm_of_a_small_change_is_not_lost_in_half_precision(tiny):
    """In bfloat16 B·A and B₀·A₀ are each as large as W; what they differ by is what DoRA's norm is of."""
    model = added(tiny("llama", dtype=torch.bfloat16), "pissa", target_modules=["q_proj"], use_dora=True)
    layer = model.model.layers[0].self_attn.q_proj
    slots = layer.lora_slots
    with torch.no_grad():
        slots.A0.add_(1e-3 * slots.A0.std() * torch.randn(slots.A0.shape))
        gain = slots.effect(0, layer).gain.double()
        A, B = (x.double() for x in slots.dense(0))
        V = layer.weight.double() + slots.slots[0].scaling * (B @ A)
        assert close(gain, slots.magnitude0.double() / V.norm(dim=1), 2e-5)


REFUSED = [("kasa_config", init) for init in ("pissa", "pissa_niter_4", "olora", "mica", "orthogonal", "corda")]


@pytest.mark.parametrize(("field", "init"), [*REFUSED, ("freeze_a", "mica")])
def test_a_variant_that_cannot_begin_so(field, init, tiny):
    model = tiny("llama")
    before = bits(model)
    value = {} if field == "kasa_config" else True
    with pytest.raises(LoRAConfigError, match=rf"(?s){field}.*{init}.*Leave {field} out") as caught:
        model.add_lora(LoRAConfig(init=init, **{field: value}), data=given(init))
    assert caught.value.name == field
    assert bits(model) == before
    # The file of one that was trained elsewhere says what it computes, however it began.
    if init in ("mica", "orthogonal") and field == "kasa_config":
        LoRAConfig.from_peft({"peft_type": "LORA", "init_lora_weights": init, "kasa_config": {}}).require_supported()
