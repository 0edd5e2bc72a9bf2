"""LoRA (Hu et al., 2021) as a native verb of every transformers model.

`import hf_lora` adds the verbs to `PreTrainedModel`; `hf_lora.unregister()` takes them away again.

    model.add_lora(LoRAConfig(r=8, target_modules=["q", "v"]))
    Trainer(model, args, train_dataset=ds).train()
    model.save_lora("out/")
"""

from .adapter import LoRAAdapter
from .config import LoRAConfig
from .errors import (
    LoRAConfigError,
    LoRAError,
    LoRAFileError,
    LoRAHubError,
    LoRAMismatchError,
    LoRANameError,
    LoRARouteError,
    LoRAStateError,
    LoRATargetError,
    LoRAUnsupportedError,
)
from .mixin import register, unregister

__all__ = [
    "LoRAAdapter",
    "LoRAConfig",
    "LoRAConfigError",
    "LoRAError",
    "LoRAFileError",
    "LoRAHubError",
    "LoRAMismatchError",
    "LoRANameError",
    "LoRARouteError",
    "LoRAStateError",
    "LoRATargetError",
    "LoRAUnsupportedError",
    "__version__",
    "register",
    "unregister",
]

__version__ = "0.1.0"

register()
