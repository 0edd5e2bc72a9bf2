"""What a LoRA learned: subspaces, amplification, spectra, intruders. Adapters in, arrays out, figures on request.

adapter = LoRAAdapter.load("task")
hf_lora.analysis.subspace_similarity(adapter, other).plot().savefig("phi.png")
"""

from .amplification import Amplification, LayerAmplification, amplification_factor
from .intruders import Intruders, LayerIntruders, intruder_dimensions
from .places import LayerResult, Result
from .ranks import LayerSpectrum, Spectra, SuggestedRank, effective_rank, spectrum, suggested_rank
from .reports import Report, report
from .subspaces import (
    AdapterOverlap,
    LayerOverlap,
    LayerSimilarity,
    SubspaceSimilarity,
    overlap,
    random_similarity,
    subspace_similarity,
)

__all__ = [
    "AdapterOverlap",
    "Amplification",
    "Intruders",
    "LayerAmplification",
    "LayerIntruders",
    "LayerOverlap",
    "LayerResult",
    "LayerSimilarity",
    "LayerSpectrum",
    "Report",
    "Result",
    "Spectra",
    "SubspaceSimilarity",
    "SuggestedRank",
    "amplification_factor",
    "effective_rank",
    "intruder_dimensions",
    "overlap",
    "random_similarity",
    "report",
    "spectrum",
    "subspace_similarity",
    "suggested_rank",
]
