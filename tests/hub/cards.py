"""What the Hub reads out of a README's metadata: whether it is valid, and the tags that search filters on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import yaml

_RELATIONS = ("adapter", "finetune", "merge", "quantized")
_LISTS = ("tags", "datasets", "metrics")


def metadata(text: str) -> dict[str, Any]:
    """The front matter of a card; empty if there is none or it is no mapping. Raises yaml.YAMLError."""
    match = re.match(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|\Z)", text, re.DOTALL)
    data = yaml.safe_load(match.group(1)) if match else None
    return data if isinstance(data, dict) else {}


def problems(text: str) -> tuple[list[str], list[str]]:
    """Errors and warnings, as `POST /api/validate-yaml` gives them."""
    try:
        data = metadata(text)
    except yaml.YAMLError as error:
        return [f"YAML: {error}"], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [f'"{key}" must be an array' for key in _LISTS if not isinstance(data.get(key, []), (list, str))]
    for key in (*_LISTS, "base_model", "language"):
        if not all(isinstance(item, str) for item in _listed(data.get(key))):
            errors.append(f'"{key}" must hold strings only')
    for key in ("library_name", "pipeline_tag", "license"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    if data.get("base_model_relation", "adapter") not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(_RELATIONS)}]')
    return errors + _index_problems(data.get("model-index")), []


def _index_problems(index: Any) -> list[str]:
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for i, model in enumerate(index):
        where = f"model-index[{i}]"
        errors += _required(model, where, "name", "results")
        for j, result in enumerate(model.get("results") or []):
            here = f"{where}.results[{j}]"
            errors += _required(result, here, "task", "metrics")
            errors += _required(result.get("task") or {}, f"{here}.task", "type")
            if "dataset" in result:
                errors += _required(result["dataset"], f"{here}.dataset", "type", "name")
            for k, metric in enumerate(result.get("metrics") or []):
                errors += _required(metric, f"{here}.metrics[{k}]", "type", "value")
    return errors


def _required(value: dict[str, Any], where: str, *keys: str) -> list[str]:
    return [f'"{where}.{key}" is required' for key in keys if value.get(key) is None]


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def describe(card: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """`library_name`, `pipeline_tag` and `tags` of a repo with this card and these files."""
    paths = set(paths)
    library = card.get("library_name")
    if library is None:
        library = "peft" if "adapter_config.json" in paths else "transformers" if "config.json" in paths else None
    relation = card.get("base_model_relation") or ("adapter" if library == "peft" else "finetune")
    tags: list[str] = [] if library is None else [library]
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in paths) else []
    tags += ["tensorboard"] if any("tfevents" in path for path in paths) else []
    tags += _listed(card.get("tags"))
    for base in _listed(card.get("base_model")):
        tags += [f"base_model:{base}", f"base_model:{relation}:{base}"]
    tags += [f"dataset:{name}" for name in _listed(card.get("datasets"))]
    tags += [f"license:{name}" for name in _listed(card.get("license"))]
    tags += _listed(card.get("language"))
    pipeline = card.get("pipeline_tag")
    tags += [] if pipeline is None else [pipeline]
    tags += ["model-index"] if card.get("model-index") else []
    return {"library_name": library, "pipeline_tag": pipeline, "tags": [*dict.fromkeys(tags), "region:us"]}
