"""Which class of a model_type is built: the one that has the most of it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

__all__ = ["classes", "model_types"]

_FIRST = """
    SPEECH_SEQ_2_SEQ IMAGE_TEXT_TO_TEXT MULTIMODAL_LM SEQ_TO_SEQ_CAUSAL_LM MASKED_LM CAUSAL_LM CTC
    ZERO_SHOT_IMAGE_CLASSIFICATION ZERO_SHOT_OBJECT_DETECTION IMAGE_CLASSIFICATION AUDIO_CLASSIFICATION
    VIDEO_CLASSIFICATION OBJECT_DETECTION SEQUENCE_CLASSIFICATION UNIVERSAL_SEGMENTATION SEMANTIC_SEGMENTATION
    DEPTH_ESTIMATION QUESTION_ANSWERING TOKEN_CLASSIFICATION
"""
"""The mappings of transformers' auto classes, from the fullest model to the barest."""


def model_types() -> list[str]:
    """Every model_type that transformers has a config for."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return list(CONFIG_MAPPING_NAMES)


def classes(model_type: str) -> list[Any]:
    """Model classes of a model_type, the one to try first first; empty if none takes its config."""
    import transformers
    from transformers import PreTrainedModel
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    rest = [n.removesuffix("_MAPPING_NAMES") for n in vars(modeling_auto) if n.endswith("_MAPPING_NAMES")]
    names: list[str] = []
    for mapping in dict.fromkeys(
        [*(f"MODEL_FOR_{n}" for n in _FIRST.split()), *(n for n in rest if n not in ("MODEL", "CONFIG")), "MODEL"]
    ):
        found = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").get(model_type, ())
        names += [found] if isinstance(found, str) else found
    held = list(_modeling(config_class))
    found = [getattr(module, name) for name in dict.fromkeys(names) for module in held if hasattr(module, name)]
    found += [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    for module in held:
        for of in vars(module).values():
            own = inspect.isclass(of) and issubclass(of, PreTrainedModel) and of.__module__ == module.__name__
            if own and of.config_class is config_class and not of.__name__.endswith("PreTrainedModel"):
                found.append(of)
    return list(dict.fromkeys(found))


def _modeling(config_class: Any) -> Iterator[Any]:
    """The modules with models in the package of a config."""
    package = importlib.import_module(config_class.__module__.rpartition(".")[0])
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("modeling_"):
            yield importlib.import_module(f"{package.__name__}.{module.name}")
