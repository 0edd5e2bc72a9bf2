"""What a saved adapter promises, checked on the one just trained: equal outputs when loaded, merged, unmerged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data import IGNORED, Example, Prompter
from .evaluate import collate, on_device

__all__ = ["TOLERANCE", "Proof", "check", "probe_logits", "weights_digest"]

TOLERANCE = 1e-5  # of the largest logit, float32


@dataclass(frozen=True)
class Proof:
    """One claim and what was measured. `difference` is max |difference| of the logits, None where bits are compared."""

    claim: str
    held: bool
    difference: float | None
    detail: str


def probe_logits(model: Any, prompter: Prompter, examples: Sequence[Example]) -> Any:
    """The logits at the answers of `examples`, shape (examples, answer length, vocabulary), on the CPU."""
    import torch

    features = []
    for example in examples:
        prompt, answer = prompter.prompt(example), prompter.answer(example)
        features.append({"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer})
    inputs = on_device(collate(features, prompter.tokenizer.pad_token_id), model.device)
    inputs.pop("labels")
    with torch.inference_mode():
        return model(**inputs, use_cache=False).logits.float().cpu()


def weights_digest(model: Any) -> str:
    """SHA-256 over every base weight's name and bits; an adapter's own tensors do not count."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if "lora" not in name.lower():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def check(fresh: Any, adapter: Path, trained: Any, prompter: Prompter, examples: Sequence[Example]) -> list[Proof]:
    """Load `adapter` into `fresh`, an untouched base, merge and unmerge it, comparing with the logits `trained`."""
    before = weights_digest(fresh)
    fresh.load_lora(adapter)
    loaded = probe_logits(fresh, prompter, examples)
    fresh.merge_lora()
    changed = weights_digest(fresh) != before
    merged = probe_logits(fresh, prompter, examples)
    fresh.unmerge_lora()
    restored = weights_digest(fresh) == before
    unmerged = probe_logits(fresh, prompter, examples)
    proofs = [
        _compare("loaded into a fresh base", trained, loaded),
        _compare("merged into its weights", trained, merged),
        _compare("unmerged again", loaded, unmerged, exactly=True),
    ]
    detail = "every weight has its bits back" if restored else "the weights differ from the untouched base's"
    if not changed:
        detail = "merging changed no weight, so this shows nothing"
    return [*proofs, Proof("the base's weights after unmerging", restored and changed, None, detail)]


def _compare(claim: str, expected: Any, found: Any, *, exactly: bool = False) -> Proof:
    import torch

    if torch.equal(expected, found):
        return Proof(claim, True, 0.0, "every logit equal, bit for bit")
    difference = float((expected - found).abs().max())
    limit = TOLERANCE * float(expected.abs().max())
    same = bool((expected.argmax(-1) == found.argmax(-1)).all())
    detail = f"rounding; {TOLERANCE:g} · max |logit| = {limit:.1e}; {'same' if same else 'other'} tokens chosen"
    return Proof(claim, difference <= limit and not exactly, difference, detail)  # NaN compares false
