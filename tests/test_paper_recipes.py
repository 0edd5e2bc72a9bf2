"""recipes/paper: a few steps of every experiment on tiny bases and real data, and what the runner promises."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from smallbase import save_base

from hf_lora.recipe import Recipe

pytest.importorskip("evaluate", reason="evaluate is not installed: install hf_lora[test]")

PAPER = Path(__file__).resolve().parents[1] / "recipes" / "paper"
EXPERIMENTS = sorted(path.stem for path in (PAPER / "experiments").glob("*.yaml"))
TASKS = sorted(path.stem for path in (PAPER / "tasks").glob("*.yaml"))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PAPER))
    import run
    from paper_parts import studies  # noqa: F401

    # Each end of a training collects garbage, half a second of looking through all that was imported.
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)
    return run


@pytest.fixture
def smoke(run: Any, shared: Path, tmp_path: Path) -> Any:
    """`smoke("table2", …)` runs an experiment with the smoke profile, tiny bases and the published files."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"vocab_size": 64, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 2}
    bert = save_base(transformers.BertModel(transformers.BertConfig(**sizes)), tmp_path / "bert")
    llama = save_base(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), tmp_path / "llama")
    text = (PAPER / "profiles" / "smoke.yaml").read_text().replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(llama))
    text = text.replace("all:\n", f"base: {llama}\nall:\n  base: {{model: {bert}, dtype: float32}}\n", 1)
    text = text.replace("  e2e:\n", f"  e2e:\n    base: {{model: {llama}}}\n", 1)
    profile = tmp_path / "smoke.yaml"
    profile.write_text(text)
    folders = ["--data", str(shared / "data"), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]

    def go(name: str, *options: str) -> dict[str, Any]:
        run.main([name, "--profile", str(profile), *folders, *options])
        return json.loads((tmp_path / "out" / f"{name}.json").read_text())

    go.folder = tmp_path  # type: ignore[attr-defined]
    return go


def test_every_task_is_a_recipe_of_hf_lora_train() -> None:
    for name in TASKS:
        recipe = Recipe.load(PAPER / "tasks" / f"{name}.yaml")
        assert recipe.data.train.dataset, name  # from the Hub, with the paper's hyper-parameters
        assert recipe.lora.target_modules == ("q", "v")
    table = {  # the paper's table 9: batch, epochs, learning rate
        "mnli": (16, 30, 5e-4),
        "sst2": (16, 60, 5e-4),
        "mrpc": (16, 30, 4e-4),
        "cola": (32, 80, 4e-4),
        "qnli": (32, 25, 4e-4),
        "qqp": (16, 25, 5e-4),
        "rte": (32, 80, 5e-4),
        "stsb": (16, 40, 4e-4),
        "e2e": (8, 5, 2e-4),
    }
    for name, (batch, epochs, rate) in table.items():
        training = Recipe.load(PAPER / "tasks" / f"{name}.yaml").training
        assert training["per_device_train_batch_size"] == batch
        assert training["num_train_epochs"] == epochs
        assert training["learning_rate"] == rate


def test_every_system_of_every_profile_gives_a_recipe(run: Any) -> None:
    from paper_parts.grid import Grid
    from paper_parts.sweep import Records
    from paper_parts.tasks import Profile

    from hf_lora.recipe.document import read

    for profile in ("hub", "local", "local-long", "smoke"):
        for name in EXPERIMENTS:
            experiment = read(PAPER / "experiments" / f"{name}.yaml").content
            if "columns" in experiment:
                cells = list(Grid(experiment, Profile.read(profile), Records(Path("none"))).cells())
                assert cells, (profile, name)
    long, short = (Profile.read(name).recipe("cola", "lora", {}, 0).training for name in ("local-long", "local"))
    assert ("max_steps" in short, "max_steps" in long, long["num_train_epochs"]) == (True, False, 5)


def test_all_systems_run_and_stand_in_the_table(smoke: Any, peft: Any) -> None:
    from paper_parts.methods import METHODS

    scores = smoke("table2", "--task", "stsb", "--method", "ft", "--method", "lora", "--method", "few-shot")
    assert scores["trivial"][0]["name"] == "shared words"
    assert scores["trivial"][0]["all"]["mean score"]["pearson"] == 0
    assert scores["rows"][1]["head"] == (64 * 64 + 64) + (64 + 1)  # the pooler, and what gives the score
    found = smoke("table2", "--task", "cola")
    names = {row["method"] for row in found["rows"]}
    assert names == set(METHODS)
    for row in found["rows"]:
        for column, entry in zip(found["columns"], row["columns"], strict=True):
            assert entry["metrics"].keys() == set(column["metrics"])
            assert {"low", "high"} <= entry["above trivial"].keys()
    page = (smoke.folder / "out" / "table2.md").read_text()
    assert "LoRA − FT" in page
    assert "--data FOLDER" in page
    assert str(smoke.folder) not in page
    assert all(word in page for word in ("commonest class", "What the paper found"))


def test_texts_are_written_and_measured(smoke: Any, peft: Any) -> None:
    found = smoke("table3")
    assert found["columns"][0]["metrics"] == ["bleu", "nist", "rouge_l", "cider", "meteor"]
    assert all(row["columns"][0] is not None for row in found["rows"])
    records = [json.loads(line) for line in (smoke.folder / "out" / "runs.jsonl").read_text().splitlines()]
    assert all(len(record["predictions"]) == 4 for record in records)


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if n not in ("table2", "table3", "tune", "variants-compared")])
def test_every_other_experiment_runs(name: str, smoke: Any, peft: Any) -> None:
    if name in ("figures3-4", "table7"):
        pytest.importorskip("hf_lora.analysis")
    some = ("--method", "lora", "--method", "adapter-l", "--method", "bitfit") if name == "figure2" else ()
    found = smoke(name, *some)
    assert found["command"].startswith(f"python recipes/paper/run.py {name}")
    assert (smoke.folder / "out" / f"{name}.md").stat().st_size > 300
    if name.startswith("table5"):
        assert len({row["trainable"] for row in found["rows"]}) == 1  # one budget
    if name == "table1":
        assert found["variants"][0]["name"] == "base, or LoRA merged by hand"
    if name == "costs":
        assert found["gpt3"]["trainable"] == 18_874_368
        ft, *_, lora = found["rows"]
        assert lora["optimizer"] < ft["optimizer"]
        assert lora["gradients"] == 4 * lora["trainable"]


def test_variants_are_compared_with_lora_at_one_budget(smoke: Any, peft: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from paper_parts import train

    import hf_lora

    optimizer, regularisation, rates, added = train._optimizer, hf_lora.kasa_loss, [], []

    def seen(model: Any, *args: Any) -> Any:
        if (made := optimizer(model, *args)) is not None:
            names = {id(p): name for name, p in model.named_parameters()}
            rates.append({names[id(p)]: group["lr"] for group in made.param_groups for p in group["params"]})
        return made

    def counted(model: Any) -> Any:
        added.append(regularisation(model))
        return added[-1]

    monkeypatch.setattr(train, "_optimizer", seen)
    monkeypatch.setattr(hf_lora, "kasa_loss", counted)
    found = smoke("variants-compared")
    lora, *others = found["rows"]
    for row in others:
        assert 0.93 < row["trainable"] / lora["trainable"] < 1.2  # BD-LoRA has whole ranks; DoRA, many outputs here
        assert {"low", "high", "noise"} <= row["columns"][0]["against LoRA"].keys()
        assert row["columns"][0]["saved_bytes"] > 0
    (plus,) = rates  # LoRA+ alone: the smoke profile has no rate of the head's own
    assert {plus[name] for name in plus if ".A" in name} == {plus["classifier.lora_heads.copies.0.weight"]} == {5e-4}
    assert {plus[name] for name in plus if ".B" in name} == {16 * 5e-4}
    assert len(added) == 2  # KaSA's steps
    page = (smoke.folder / "out" / "variants-compared.md").read_text()
    assert "| − LoRA [95 %] | within noise |" in page


def test_a_stopped_sweep_goes_on_and_a_changed_setting_runs_again(smoke: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from paper_parts import grid

    real, calls = grid.train.run, []

    def counted(recipe: Any, system: Any, data: Any, **options: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(system["lora"]["r"])
        return real(recipe, system, data, **options)

    monkeypatch.setattr(grid.train, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        smoke("table6")
    runs = smoke.folder / "out" / "runs.jsonl"
    assert len(runs.read_text().splitlines()) == 2
    calls.clear()
    calls.append(-1)  # one more may run before the next stop
    with pytest.raises(KeyboardInterrupt):
        smoke("table6")
    assert calls == [-1, 4]
    monkeypatch.setattr(grid.train, "run", lambda *a, **o: calls.append("again") or real(*a, **o))
    calls.clear()
    smoke("table6")
    assert calls == ["again"] * 2
    calls.clear()
    smoke("table6")
    assert calls == []
    smoke("table6", "--set", "training.learning_rate=1e-5")
    assert len(calls) == 5
    monkeypatch.setattr(grid.train, "run", None)
    assert len(smoke("table6", "--report")["rows"]) == 5


def test_a_head_is_new_with_every_system_and_has_its_own_rate(
    smoke: Any, peft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pooler that was never used is not what a task begins with; a score begins at the mean of the labels."""
    from paper_parts import methods, train
    from paper_parts.tasks import TaskData

    real, begun, groups = TaskData.model, [], []

    def model(data: Any) -> Any:
        made = real(data)
        pooler, scorer = made.bert.pooler.dense, made.classifier
        begun.append((pooler.weight.std().item(), pooler.bias.abs().max().item(), scorer.bias[0].item(), data))
        return made

    optimizer = train._optimizer

    def seen(made: Any, *args: Any) -> Any:
        chosen = optimizer(made, *args)
        names = {id(p): name for name, p in made.named_parameters()}
        groups.append([({names[id(p)] for p in g["params"]}, g["lr"]) for g in chosen.param_groups])
        return chosen

    monkeypatch.setattr(TaskData, "model", model)
    monkeypatch.setattr(train, "_optimizer", seen)
    text = (smoke.folder / "smoke.yaml").read_text()
    (smoke.folder / "smoke.yaml").write_text(text + "head_learning_rate: 0.125\n")
    some = [word for name in ("ft", "lora", "head", "prelayer") for word in ("--method", name)]
    smoke("table2", "--task", "stsb", *some, "--set", "training.learning_rate=0.25")
    assert len(begun) == len(groups) == 4
    for deviation, shift, start, data in begun:
        assert deviation == pytest.approx(64**-0.5, rel=0.1)  # 64 × 64 of them
        assert shift == 0
        assert start == pytest.approx(sum(float(e["labels"]) for e in data.train) / len(data.train))
    ft, lora, head, prelayer = groups
    for one in (ft, lora, prelayer):
        (own, rate), (new, of_head) = one
        assert (rate, of_head) == (0.25, 0.125)
        assert own
        assert not any(map(methods.is_head, own))
        assert all(map(methods.is_head, new))
        assert any("pooler" in name for name in new)
    ((new, of_head),) = head
    assert of_head == 0.125
    assert new


def test_a_task_goes_on_from_another_with_the_same_system_and_a_new_head(
    smoke: Any, peft: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paper_parts import methods, train

    begun, kept, trained = [], [], []
    begin, save, training = train._begin, train._save, train._train

    def values(model: Any, head: bool) -> dict[str, Any]:
        named = model.named_parameters()
        return {n: p.detach().clone() for n, p in named if p.requires_grad and methods.is_head(n) == head}

    def seen(model: Any, path: Path) -> None:
        begin(model, path)
        begun.append((values(model, False), values(model, True)))

    monkeypatch.setattr(train, "_begin", seen)
    monkeypatch.setattr(train, "_save", lambda m, p: kept.append((values(m, False), values(m, True))) or save(m, p))
    monkeypatch.setattr(train, "_train", lambda *args: trained.append(args[2].name) or training(*args))
    some = [word for name in ("ft", "lora", "prelayer", "head") for word in ("--method", name)]
    smoke("table2", "--task", "mrpc", *some, "--set", "training.learning_rate=0.01")
    assert trained == ["stsb", "mrpc", "stsb", "mrpc", "mrpc", "stsb", "mrpc"]
    assert len(begun) == len(kept) == 3
    for (start, fresh), (end, old) in zip(begun, kept, strict=True):
        assert start.keys() == end.keys()
        assert all((start[name] == end[name]).all() for name in end)
        assert any(fresh[name].shape != old[name].shape or (fresh[name] != old[name]).any() for name in fresh)
    smoke("table2", "--task", "stsb", *some, "--set", "training.learning_rate=0.01")
    assert trained[7:] == ["stsb"]  # the head's; the others were run for MRPC
    states = sorted((smoke.folder / "work" / "states").iterdir(), key=lambda path: path.stat().st_size)
    assert len(states) == 3
    (smoke.folder / "out" / "runs.jsonl").unlink()
    states[2].write_bytes(states[0].read_bytes())
    with pytest.raises(ValueError, match="of another system"):
        smoke("table2", "--task", "mrpc", "--method", "ft", "--set", "training.learning_rate=0.01")


def test_the_readme_shows_the_published_table_and_figure() -> None:
    root = PAPER.parents[1]
    page = (root / "docs" / "results" / "table2.md").read_text(encoding="utf-8")
    table = page.partition("[start:table] -->\n")[2].partition("<!-- --8<-- [end")[0]
    assert table.count("\n") > 10
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert table in readme
    assert '<img src="docs/results/figure2.png"' in readme
    assert (root / "docs" / "results" / "figure2.png").is_file()


def test_systems_of_one_seed_keep_to_the_profiles_tasks(run: Any) -> None:
    from paper_parts.grid import Grid
    from paper_parts.sweep import Records
    from paper_parts.tasks import Profile

    from hf_lora.recipe.document import read

    experiment = read(PAPER / "experiments" / "table2.yaml").content
    cells = list(Grid(experiment, Profile.read("local"), Records(Path("none"))).cells())
    assert {c.task for c in cells if c.system["method"] == "lora"} == {"sst2", "cola", "mrpc", "rte", "stsb"}
    assert {c.task for c in cells if c.system["method"] == "bitfit"} == {"sst2"}
    every = list(Grid(experiment, Profile.read("local-long"), Records(Path("none"))).cells())
    assert {c.task for c in every if c.system["method"] == "bitfit"} == {"sst2", "cola", "mrpc", "rte", "stsb"}


def test_the_files_are_read_as_published(run: Any, shared: Path, tmp_path: Path) -> None:
    from paper_parts import files

    counts = {
        ("sst2", "train"): 6920,
        ("sst2", "dev"): 872,
        ("cola", "train"): 8551,
        ("cola", "dev"): 1043,
        ("mrpc", "train"): 4076,
        ("mrpc", "dev"): 1725,
        ("rte", "train"): 2490,
        ("rte", "dev"): 277,
        ("stsb", "train"): 5749,
        ("stsb", "dev"): 1500,
        ("e2e", "train"): 4672,
        ("e2e", "dev"): 4693,
    }
    assert counts.keys() == files.SPLITS.keys()
    for task, split in counts:
        files.rewrite(task, shared / "data", tmp_path)
        rows = [json.loads(line) for line in (tmp_path / task / f"{split}.jsonl").read_text().splitlines()]
        assert len(rows) == counts[task, split]
        assert all(str(value) != "" for row in rows for value in row.values())
    first = json.loads((tmp_path / "rte" / "dev.jsonl").read_text().splitlines()[0])
    assert (first["label"], first["sentence2"]) == (1, "Christopher Reeve had an accident.")
    with pytest.raises(files.MissingDataError, match="--data"):
        files.rewrite("sst2", tmp_path / "nowhere", tmp_path)
