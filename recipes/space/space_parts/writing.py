"""What a trained task leaves: the form for the Space (task.yaml) and the words of its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from hf_lora.cardtext import escape
from hf_lora.recipe.schema import Data

from .scoring import Contestant, Scores, unanswered
from .tasks import Material, Task

__all__ = ["RESULTS", "form", "results", "words"]

RESULTS = "<!-- results -->"  # stands in the card until they are known
_UNITS = {"accuracy": "accuracy (%)", "Matthews correlation": "Matthews correlation (× 100)"}


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines on one: "a\\nb"."""


_Dumper.add_representer(
    str, lambda self, text: self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)
)


def form(task: Task, data: Data, material: Material, scores: Scores) -> str:
    """The text of task.yaml."""
    content: dict[str, Any] = {"title": task.title, "about": task.about, "fields": list(map(dict, task.fields))}
    prompt = str(data.prompt)
    if task.attributes is not None:
        content["attributes"] = dict(task.attributes)
        prompt = prompt.replace(f"{{{task.column}}}", "{attributes}")
    content |= {"prompt": prompt, "chat": data.chat}
    content |= {"system": data.system} if data.chat else {}
    content |= {"max_new_tokens": task.max_new_tokens, "stop": list(task.stop)}
    content |= {"examples": list(map(dict, material.shown)), "score": _score(task, material, scores)}
    content["license"] = task.license
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)


def _score(task: Task, material: Material, scores: Scores) -> dict[str, Any]:
    """The main metric; the error is the paired 95 % one of the gain over `best_trivial`, the best without training.

    With answered examples in its prompt or without any model. If the base alone is better, the gain is over that.
    """
    metric = scores.metrics[0]
    values = {name: found[metric] for name, found in scores.values.items()}
    base, *others, ours = values
    strongest = max([base, *others], key=values.__getitem__)
    return {
        "metric": _UNITS.get(metric, metric),
        "base": round(values[base], 1),
        "best_trivial": round(max(map(values.__getitem__, others)), 1),
        "adapter": round(values[ours], 1),
        "error": round(scores.better_by[strongest][metric][1], 1),
        "on": material.on,
        "better": "higher",
    }


def words(task: Task, command: str, made_on: str) -> str:
    """The card as it is before training: the recipe's run puts its own section behind."""
    name = f"license_name: {task.license_name}\n" if task.license_name else ""
    return f"""---
license: {task.license_id}
{name}language: en
---

# {task.title}

{task.about}

## Scores

{RESULTS}

## Data and license

{task.data}

License: {task.license}.

## How it was made

```bash
{command}
```

prepares the data, trains by `recipes/space/{task.name}.yaml` and measures. The base was {made_on}.
"""


def results(task: Task, contestants: Sequence[Contestant], material: Material, scores: Scores, dtype: str) -> str:
    """The table of scores, for the card."""
    head = ["", *(cell for metric in scores.metrics for cell in (_UNITS.get(metric, metric), "adapter is better by"))]
    lines = [head, ["---"] * len(head)]
    for contestant in (contestants[-1], *contestants[:-1]):
        lines.append([escape(contestant.name), *_cells(contestant.name, scores)])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    said = f"Measured on {material.on}: greedy answers of at most {task.max_new_tokens} tokens, to the line's end, the "
    said += f"base's weights in {dtype}. ± is the 95 % error of the paired difference."
    missed = [(c.name, unanswered(task, c)) for c in contestants if unanswered(task, c)]
    if missed:
        counts = "; ".join(f"{escape(name)}: {count}" for name, count in missed)
        said += f" Answers that are neither word count as wrong: {counts}."
        said += f" In the correlation they count as “{task.classes[0]}”." if len(scores.metrics) > 1 else ""
    return f"{table}\n\n{said}"


def _cells(name: str, scores: Scores) -> list[str]:
    better: Mapping[str, tuple[float, float]] = scores.better_by.get(name, {})
    cells = []
    for metric in scores.metrics:
        cells.append(f"{scores.values[name][metric]:.1f}")
        cells.append("{:+.1f} ± {:.1f}".format(*better[metric]) if metric in better else "")
    return cells
