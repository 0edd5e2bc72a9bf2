"""An experiment that is a grid: systems × columns × seeds, each cell a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from hf_lora.recipe import Recipe

from . import metrics, train
from .methods import METHODS
from .statistics import paired, summary
from .sweep import Records, key_of
from .tasks import TASKS, Profile, TaskData, load
from .trivial import trivial

__all__ = ["Cell", "Grid", "base_name", "column_name", "label"]


@dataclass(frozen=True)
class Cell:
    """One run: a system on a column with a seed."""

    system: Mapping[str, Any]
    column: Mapping[str, Any]
    seed: int
    recipe: Recipe

    @property
    def task(self) -> str:
        """Its name in `TASKS`."""
        return str(self.column["task"])

    @property
    def title(self) -> str:
        """For the progress display."""
        return f"{label(self.system)} · {column_name(self.column)} · seed {self.seed}"


def label(system: Mapping[str, Any]) -> str:
    """A system as a table's row calls it."""
    if "label" in system:
        return str(system["label"])
    method, lora = system["method"], system.get("lora", {})
    parts = [METHODS[method].title]
    if "r" in lora:
        parts.append(f"r={lora['r']}")
    if "target_modules" in lora:
        parts.append("+".join(lora["target_modules"]))
    parts += [f"{letter}={system[key]}" for key, letter in (("bottleneck", "r"), ("tokens", "l")) if key in system]
    return " ".join(parts)


def base_name(data: TaskData) -> str:
    """The base, without the folders of this machine."""
    path = Path(data.found.name)
    return path.name if path.is_absolute() else data.found.name


def column_name(column: Mapping[str, Any]) -> str:
    """A column as a table calls it."""
    return str(column.get("name") or TASKS[column["task"]].title)


# Of a system, what its numbers depend on beside the recipe.
_SIZES = ("bottleneck", "dropped", "tokens", "b_lr_ratio", "init_batches", "ranks")


class Grid:
    """The cells of an experiment under a profile, with their records."""

    def __init__(
        self,
        experiment: Mapping[str, Any],
        profile: Profile,
        records: Records,
        *,
        methods: set[str] | None = None,
        tasks: set[str] | None = None,
        seeds: int | None = None,
    ) -> None:
        self.experiment, self.profile, self.records = experiment, profile, records
        columns = experiment["columns"]
        columns = columns.get(profile.name, columns.get(profile.get("like", ""), columns.get("all")))
        self.columns = [column for column in columns if tasks is None or column["task"] in tasks]
        systems = experiment["systems"]
        if isinstance(systems, Mapping):
            systems = systems.get(profile.name, systems.get(profile.get("like", ""), systems.get("all")))
        alike = profile.get("like", profile.name)
        self.systems = [
            system
            for system in systems
            if (methods is None or system["method"] in methods) and alike in system.get("profiles", (alike,))
        ]
        self.seeds = seeds if seeds is not None else int(profile.get("seeds", 1))
        if not self.columns or not self.systems:
            raise SystemExit("Nothing is left to run: check --task and --method.")
        for column in self.columns:
            profile.rewrite(column["task"])
            profile.rewrite(self._starts.get(column["task"], column["task"]))

    def cells(self) -> Iterator[Cell]:
        """All runs: by column, then seed, so that a stopped sweep has whole tables of few seeds."""
        for column in self.columns:
            for seed in range(self.seeds):
                for system in self.systems:
                    if seed < int(system.get("seeds", 1)) and self._wanted(system, column):
                        yield self.cell(system, column, seed)

    def _wanted(self, system: Mapping[str, Any], column: Mapping[str, Any]) -> bool:
        """A profile may keep the systems that a table gives one seed to some of its tasks."""
        few = self.profile.get("one_seed_tasks")
        return few is None or int(system.get("seeds", 1)) > 1 or column["task"] in few

    def cell(self, system: Mapping[str, Any], column: Mapping[str, Any], seed: int) -> Cell:
        """One run."""
        seed += int(system.get("first_seed", 0))
        over = {key: column[key] for key in ("data", "training") if key in column}
        recipe = self.profile.recipe(column["task"], system["method"], _over(system, over), seed)
        return Cell(system, column, seed, recipe)

    def data(self, cell: Cell) -> TaskData:
        """The examples of a run."""
        return load(cell.task, cell.recipe, test=self.profile.get("test", {}).get(cell.task))

    def key(self, cell: Cell) -> str:
        """The digest of all that the run's numbers depend on."""
        data, recipe, method = self.data(cell), cell.recipe, METHODS[cell.system["method"]]
        settings: dict[str, Any] = {
            "task": cell.task,
            "data": data.fingerprint,
            "method": cell.system["method"],
            "seed": cell.seed,
        }
        if method.trains:
            settings |= {"base": data.found.name, "training": recipe.to_dict().get("training", {})}
            settings["head_rate"] = self._head_rate(data)
            if (start := self._start(cell)) is not None:
                settings["start"] = self.key(start)
            settings["size"] = {k: cell.system[k] for k in _SIZES if k in cell.system}
            if cell.system["method"].startswith("lora"):
                settings["lora"] = recipe.to_dict().get("lora", {})
        else:
            settings["shots"] = dict(self.profile.get("few_shot", {}))
        if data.task.kind == "text":
            settings["generation"] = dict(self.profile.get("generation", {}))
        return key_of(settings)

    @property
    def _starts(self) -> Mapping[str, str]:
        """Task -> the task that was trained before it, as the paper starts some from its MNLI adapter."""
        return self.profile.get("start") or {}

    def _start(self, cell: Cell) -> Cell | None:
        """The run that a run goes on from: the same system and seed on the task before."""
        task = self._starts.get(cell.task)
        if task is None or not self._has_own(cell):
            return None
        return self.cell(cell.system, {"task": task}, cell.seed - int(cell.system.get("first_seed", 0)))

    @staticmethod
    def _has_own(cell: Cell) -> bool:
        """Whether the system trains more than a head."""
        return METHODS[cell.system["method"]].trains and cell.system["method"] != "head"

    def _state(self, cell: Cell) -> Path:
        return self.profile.work / "states" / f"{self.key(cell)}.safetensors"

    def _head_rate(self, data: TaskData) -> float | None:
        return None if data.task.kind == "text" else self.profile.get("head_learning_rate")

    def run(self, cell: Cell, step: Callable[[int, int], None], keep: Path | None = None) -> dict[str, Any]:
        """The record of a cell, from the file or from a run."""
        key = self.key(cell)
        kept = None if keep is None else keep / key
        if (record := self.records.get(key)) is not None and (kept is None or kept.is_dir()):
            return record
        start, before = self._start(cell), None
        if start is not None:
            before = self._state(start)
            if not before.exists():
                self._train(start, step, state=before)
        return self._train(cell, step, start=before, keep=kept)

    def _train(self, cell: Cell, step: Callable[[int, int], None], **files: Path | None) -> dict[str, Any]:
        data = self.data(cell)
        if cell.task in self._starts.values() and self._has_own(cell):
            files["state"] = self._state(cell)
        found = train.run(
            cell.recipe,
            cell.system,
            data,
            generation=self.profile.get("generation", {}),
            shots=self.profile.get("few_shot", {}),
            head_rate=self._head_rate(data),
            step=step,
            **files,
        )
        scored = {
            name: metrics.score(name, found["predictions"], data.references[: len(found["predictions"])])
            for name in data.task.metrics
        }
        if data.task.kind == "score":
            found["predictions"] = [round(value, 3) for value in found["predictions"]]
        if (record := self.records.get(self.key(cell))) is not None:  # trained again for its state
            return record
        return self.records.add(
            self.key(cell),
            {
                "task": cell.task,
                "method": cell.system["method"],
                "label": label(cell.system),
                "seed": cell.seed,
                "metrics": {name: round(value, 4) for name, value in scored.items()},
                **found,
            },
        )

    # ---- what came out -----------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """Every number of the table, from the records that are there."""
        rows = []
        runs: dict[tuple[int, int], list[dict[str, Any]]] = {}
        for s, system in enumerate(self.systems):
            for c, column in enumerate(self.columns):
                cells = [
                    self.cell(system, column, seed) for seed in range(min(self.seeds, int(system.get("seeds", 1))))
                ]
                found = [self.records.get(self.key(cell)) for cell in cells]
                runs[s, c] = [record for record in found if record is not None]
        trivials = [self._trivial(column) for column in self.columns]
        against = self.experiment.get("against", METHODS["ft"].title)
        reference = next((s for s, system in enumerate(self.systems) if label(system) == against), None)
        for s, system in enumerate(self.systems):
            row: dict[str, Any] = {"system": label(system), "method": system["method"], "columns": []}
            for c, column in enumerate(self.columns):
                if not (records := runs[s, c]):
                    row["columns"].append(None)
                    continue
                if "total" not in row:
                    row |= {key: records[0][key] for key in ("trainable", "head", "total")}
                    row["share"] = (row["trainable"] + row["head"]) / row["total"]
                entry = self._entry(column, records, trivials[c])
                if reference is not None and s != reference and runs[reference, c]:
                    entry[f"against {against}"] = self._difference(column, records, runs[reference, c])
                row["columns"].append(entry)
            rows.append(row)
        return {
            "columns": [self._described(column) for column in self.columns],
            "trivial": [{k: v for k, v in best.items() if k != "predictions"} for best in trivials],
            "rows": rows,
        }

    def _described(self, column: Mapping[str, Any]) -> dict[str, Any]:
        data = self.data(self.cell(self.systems[0], column, 0))
        return {
            "name": column_name(column),
            "task": column["task"],
            "metrics": list(data.task.metrics),
            "base": base_name(data),
            "train": len(data.train),
            "eval": len(data.eval),
        }

    def _entry(
        self, column: Mapping[str, Any], records: list[dict[str, Any]], best: Mapping[str, Any]
    ) -> dict[str, Any]:
        entry: dict[str, Any] = {"seeds": len(records), "metrics": {}, "steps": records[0].get("steps")}
        for name in TASKS[column["task"]].metrics:
            of = summary([record["metrics"][name] for record in records])
            entry["metrics"][name] = {"mean": of.mean, "deviation": of.deviation}
        entry["seconds"] = round(fmean(record["seconds"] for record in records), 1)
        if all("cpu_seconds_training" in record for record in records):
            entry["cpu_seconds_per_step"] = [record["cpu_seconds_training"] / record["steps"] for record in records]
            entry["cpu_seconds_beginning"] = fmean(record["cpu_seconds_beginning"] for record in records)
            entry["saved_bytes"] = records[0]["saved_bytes"]
        entry["above trivial"] = self._paired(column, records, [best["predictions"]])
        return entry

    def _difference(self, column: Mapping[str, Any], ours: list[Any], theirs: list[Any]) -> dict[str, Any]:
        return self._paired(column, ours, [record["predictions"] for record in theirs])

    def _paired(self, column: Mapping[str, Any], ours: list[Any], theirs: list[list[Any]]) -> dict[str, Any]:
        data = self.data(self.cell(self.systems[0], column, 0))
        name, values = _pairing(data)
        found = paired(
            _FAST[name],
            [values(record["predictions"]) for record in ours],
            [values(run) for run in theirs],
            data.references,
            resamples=int(self.profile.get("resamples", 1000)),
        )
        return {"metric": name, "mean": found.mean, "low": found.low, "high": found.high, "noise": found.noise}

    def _trivial(self, column: Mapping[str, Any]) -> dict[str, Any]:
        """The best baseline of a column, and all of them."""
        data = self.data(self.cell(self.systems[0], column, 0))
        found = trivial(data)
        scored = {
            name: {metric: metrics.score(metric, predictions, data.references) for metric in data.task.metrics}
            for name, predictions in found.items()
        }
        by = _pairing(data)[0] if data.task.kind == "text" else data.task.metrics[0]
        best = max(scored, key=lambda name: scored[name][by])
        return {"name": best, "metrics": scored[best], "all": scored, "predictions": found[best]}


def _over(system: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    from .tasks import merged

    return merged(system, over)


def _pairing(data: TaskData) -> tuple[str, Callable[[list[Any]], list[Any]]]:
    """The metric of the paired error, and what it takes. Of texts it is ROUGE-L, a mean over examples."""
    if data.task.kind != "text":
        return data.task.metrics[0], lambda predictions: predictions

    def each(predictions: list[str]) -> list[float]:
        return [
            metrics.METRICS["rouge_l"][1]([text], [refs])
            for text, refs in zip(predictions, data.references[: len(predictions)], strict=True)
        ]

    return "rouge_l", each


def _matthews(predictions: Any, references: Any) -> float:
    p, r = np.asarray(predictions, float), np.asarray(references, float)
    return 0.0 if p.std() == 0 or r.std() == 0 else 100 * float(np.corrcoef(p, r)[0, 1])


# The metrics again, fast enough to resample. Of two classes Matthews' correlation is Pearson's.
_FAST: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": lambda p, r: 100 * float((np.asarray(p) == np.asarray(r)).mean()),
    "matthews": _matthews,
    "pearson": _matthews,
    "rouge_l": lambda p, r: float(np.mean(p)),
}
