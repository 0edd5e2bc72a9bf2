"""Which class of a model_type is built: the one that has the most of it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

__all__ = ["classes", "model_types"]

_FIRST = (  # the mappings of transformers' auto classes, from the fullest model to the barest
    "MODEL_FOR_SPEECH_SEQ_2_SEQ MODEL_FOR_IMAGE_TEXT_TO_TEXT MODEL_FOR_MULTIMODAL_LM "
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM MODEL_FOR_MASKED_LM MODEL_FOR_CAUSAL_LM MODEL_FOR_CTC "
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION MODEL_FOR_IMAGE_CLASSIFICATION "
    "MODEL_FOR_AUDIO_CLASSIFICATION MODEL_FOR_VIDEO_CLASSIFICATION MODEL_FOR_OBJECT_DETECTION "
    "MODEL_FOR_SEQUENCE_CLASSIFICATION MODEL_FOR_UNIVERSAL_SEGMENTATION MODEL_FOR_SEMANTIC_SEGMENTATION "
    "MODEL_FOR_DEPTH_ESTIMATION MODEL_FOR_QUESTION_ANSWERING MODEL_FOR_TOKEN_CLASSIFICATION"
).split()


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
    for mapping in dict.fromkeys([*_FIRST, *(n for n in rest if n not in ("MODEL", "CONFIG")), "MODEL"]):
        found = getattr(modeling_auto, f"{mapping}_MAPPING_NAMES").get(model_type, ())
        names += [found] if isinstance(found, str) else found
    held = list(_modeling(config_class))
    found = [getattr(module, name) for name in dict.fromkeys(names) for module in held if hasattr(module, name)]
    found += [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    for module in held:
        for of in vars(module).values():
            if inspect.isclass(of) and issubclass(of, PreTrainedModel) and of.__module__ == module.__name__:
                if of.config_class is config_class and not of.__name__.endswith("PreTrainedModel"):
                    found.append(of)
    return list(dict.fromkeys(found))


def _modeling(config_class: Any) -> Iterator[Any]:
    """The modules with models in the package of a config."""
    package = importlib.import_module(config_class.__module__.rpartition(".")[0])
    for module in pkgutil.iter_modules(package.__path__):
        if module.name.startswith("modeling_"):
            yield importlib.import_module(f"{package.__name__}.{module.name}")
