"""`register` and `unregister`: when transformers' models get the verbs.

Nothing is imported for it: the verbs come once transformers' models are there. So `import hf_lora`, the command's help
and its completion cost neither torch nor transformers.
"""

from __future__ import annotations

from types import ModuleType

from .integrations import importing
from .integrations.patching import Registry

__all__ = ["register", "unregister"]

# `PreTrainedModel` lives in the first; the second looks for adapters before any model class is imported.
_WATCHED = ("transformers.modeling_utils", "transformers.models.auto.auto_factory")
_REGISTRY = Registry()


def register() -> None:
    """Make the verbs methods of `PreTrainedModel`, now or once it is imported.

    `import hf_lora` does this; doing it again changes nothing.
    """
    if len(_REGISTRY):
        return
    for name in _WATCHED:
        importing.when_imported(name, _install)


def unregister() -> None:
    """Give transformers back exactly what `register` replaced. Adapters already on models keep working."""
    importing.forget()
    _REGISTRY.restore()


def _install(module: ModuleType) -> None:
    import transformers.modeling_utils  # noqa: F401  # calls this function again, where it was not imported yet

    from .mixin import install

    if not len(_REGISTRY):
        install(_REGISTRY)
