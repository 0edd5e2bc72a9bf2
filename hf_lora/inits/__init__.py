"""How a new adapter begins: one small file an initialisation, looked up by the name in `LoRAConfig.init`."""

from __future__ import annotations

from . import corda, eva, loftq, lora_ga, mica, olora, orthogonal, pissa, plain
from .base import Init, Layer
from .inputs import require_data

__all__ = ["INITS", "Init", "Layer", "require_data"]

INITS: dict[str, Init] = {
    "kaiming": plain.KAIMING,
    "gaussian": plain.GAUSSIAN,
    "off": plain.OFF,
    "orthogonal": orthogonal.ORTHOGONAL,
    "pissa": pissa.PISSA,
    "olora": olora.OLORA,
    "mica": mica.MICA,
    "loftq": loftq.LOFTQ,
    "eva": eva.EVA,
    "lora_ga": lora_ga.LORA_GA,
    "corda": corda.CORDA,
}
