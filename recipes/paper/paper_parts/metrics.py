"""The tables' metrics as `evaluate.Metric`s that need no network: `load("matthews").compute(...)`.

Thin classes over scikit-learn, scipy, sacrebleu, rouge-score and nltk; NIST and CIDEr are in `ngrams`. Texts take a
list of references for each prediction. Everything but NIST and CIDEr is on the scale 0 to 100 of the paper's tables.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate

from .ngrams import cider, nist

__all__ = ["METRICS", "load", "score"]


def _accuracy(predictions: list[int], references: list[int]) -> float:
    from sklearn.metrics import accuracy_score

    return 100 * float(accuracy_score(references, predictions))


def _f1(predictions: list[int], references: list[int]) -> float:
    from sklearn.metrics import f1_score

    return 100 * float(f1_score(references, predictions, zero_division=0))


def _matthews(predictions: list[int], references: list[int]) -> float:
    from sklearn.metrics import matthews_corrcoef

    return 100 * float(matthews_corrcoef(references, predictions))


def _correlation(name: str) -> Callable[[list[float], list[float]], float]:
    def compute(predictions: list[float], references: list[float]) -> float:
        from scipy import stats

        if len(set(predictions)) < 2 or len(set(references)) < 2:
            return 0.0  # a constant says nothing
        return 100 * float(getattr(stats, name)(predictions, references).statistic)

    return compute


def _bleu(predictions: list[str], references: list[list[str]]) -> float:
    import sacrebleu

    most = max(map(len, references))
    streams = [[refs[k] if k < len(refs) else None for refs in references] for k in range(most)]
    return float(sacrebleu.corpus_bleu(predictions, streams, lowercase=True).score)


def _nist(predictions: list[str], references: list[list[str]]) -> float:
    return nist([_words(p) for p in predictions], [[_words(r) for r in refs] for refs in references])


def _cider(predictions: list[str], references: list[list[str]]) -> float:
    scores = cider([_words(p) for p in predictions], [[_words(r) for r in refs] for refs in references])
    return sum(scores) / len(scores)


def _rouge(kind: str) -> Callable[[list[str], list[list[str]]], float]:
    def compute(predictions: list[str], references: list[list[str]]) -> float:
        scorer = _rouge_scorer(kind)
        best = [
            max(scorer.score(reference, text)[kind].fmeasure for reference in refs)
            for text, refs in zip(predictions, references, strict=True)
        ]
        return 100 * float(sum(best) / len(best))

    return compute


@functools.cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind])


class _NoWordNet:
    """METEOR's third stage, synonyms, needs WordNet; here it finds none."""

    @staticmethod
    def synsets(word: str) -> list[Any]:
        return []


def _meteor(predictions: list[str], references: list[list[str]]) -> float:
    """With exact words and stems, without synonyms: lower than the METEOR of the paper."""
    from nltk.translate.meteor_score import meteor_score

    scores = [
        meteor_score([_words(r) for r in refs], _words(p), wordnet=_NoWordNet)
        for p, refs in zip(predictions, references, strict=True)
    ]
    return 100 * float(sum(scores) / len(scores))


def _words(text: str) -> list[str]:
    """Lower case, with sacrebleu's 13a tokenisation, as BLEU has them."""
    return str(_tokenizer()(text.lower())).split()


@functools.cache
def _tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


_TEXTS = {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
_CLASSES = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
_SCORES = {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}

# name -> (title, function, what it takes)
METRICS: dict[str, tuple[str, Callable[..., float], dict[str, Any]]] = {
    "accuracy": ("accuracy", _accuracy, _CLASSES),
    "f1": ("F1", _f1, _CLASSES),
    "matthews": ("Matthews", _matthews, _CLASSES),
    "pearson": ("Pearson", _correlation("pearsonr"), _SCORES),
    "spearman": ("Spearman", _correlation("spearmanr"), _SCORES),
    "bleu": ("BLEU", _bleu, _TEXTS),
    "nist": ("NIST", _nist, _TEXTS),
    "cider": ("CIDEr", _cider, _TEXTS),
    "rouge_l": ("ROUGE-L", _rouge("rougeL"), _TEXTS),
    "rouge_1": ("ROUGE-1", _rouge("rouge1"), _TEXTS),
    "rouge_2": ("ROUGE-2", _rouge("rouge2"), _TEXTS),
    "meteor": ("METEOR without synonyms", _meteor, _TEXTS),
}


class PaperMetric(evaluate.Metric):
    """One row of `METRICS`."""

    def __init__(self, name: str, **options: Any) -> None:
        self.row = name
        super().__init__(**options)

    def _info(self) -> evaluate.MetricInfo:
        title, function, features = METRICS[self.row]
        return evaluate.MetricInfo(
            description=title,
            citation="",
            inputs_description=function.__doc__ or title,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return {self.row: METRICS[self.row][1](list(predictions), list(references))}


def load(name: str) -> PaperMetric:
    """A metric by name, as `evaluate.load` gives one."""
    return PaperMetric(name, keep_in_memory=True, cache_dir=tempfile.gettempdir())


def score(name: str, predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """One number."""
    return float(load(name).compute(predictions=predictions, references=references)[name])
