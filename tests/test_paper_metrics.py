"""recipes/paper: metrics against values by hand and other implementations; statistics; records."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("evaluate", reason="evaluate is not installed: install hf_lora[test]")

PAPER = Path(__file__).resolve().parents[1] / "recipes" / "paper"

CANDIDATES = ["the cat sat on the mat", "a dog ran in the park today", "there is a pub"]
REFERENCES = [
    ["the cat is on the mat", "there is a cat on the mat"],
    ["a dog ran in a park"],
    ["a pub is there", "pub"],
]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(PAPER))
    import paper_parts
    from paper_parts import metrics, ngrams, statistics, sweep  # noqa: F401

    return paper_parts


def words(texts: Any) -> Any:
    return [words(t) if isinstance(t, list) else t.split() for t in texts]


def test_metrics_are_evaluates_and_have_the_values_by_hand(parts: Any) -> None:
    import evaluate

    score = parts.metrics.score
    assert isinstance(parts.metrics.load("f1"), evaluate.Metric)
    predicted, right = [1, 1, 0, 0, 1, 0], [1, 0, 0, 1, 1, 0]  # tp 2, fp 1, fn 1, tn 2
    assert score("accuracy", predicted, right) == pytest.approx(100 * 4 / 6)
    assert score("f1", predicted, right) == pytest.approx(100 * 2 / 3)
    assert score("matthews", predicted, right) == pytest.approx(100 * (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3))
    x, y = [0.0, 1.0, 2.0, 5.0], [1.0, 0.0, 2.0, 3.0]  # x − 2: −2 −1 0 3; y − 1.5: −.5 −1.5 .5 1.5
    assert score("pearson", x, y) == pytest.approx(100 * 7 / math.sqrt(14 * 5))
    assert score("spearman", x, y) == pytest.approx(100 * (1 - 6 * 2 / (4 * 15)))
    assert score("pearson", [1.0, 1.0], [0.0, 1.0]) == 0
    assert score("bleu", ["the cat sat on the mat"], [["the cat sat on the mat"]]) == pytest.approx(100)
    # LCS of 6 and 6 words: the cat on the mat = 5
    assert score("rouge_l", CANDIDATES[:1], REFERENCES[:1]) == pytest.approx(100 * 5 / 6)


def test_the_best_of_several_references_counts(parts: Any) -> None:
    several = parts.metrics.score("rouge_l", ["a pub"], [["unrelated words", "a pub"]])
    assert several == pytest.approx(100)
    uneven = parts.metrics.score("bleu", CANDIDATES, REFERENCES)
    import sacrebleu

    assert uneven == pytest.approx(
        sacrebleu.corpus_bleu(CANDIDATES, [[r[0] for r in REFERENCES], [r[-1] for r in REFERENCES]]).score
    )


def test_nist_is_nltks(parts: Any) -> None:
    from nltk.translate.nist_score import corpus_nist

    for order in (1, 3, 5):
        ours = parts.ngrams.nist(words(CANDIDATES), words(REFERENCES), order=order)
        assert ours == pytest.approx(corpus_nist(words(REFERENCES), words(CANDIDATES), n=order))
    # one word in four references' words: log2(4 / 1); half as long as it should be: exp(β log²(1/2))
    penalty = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(0.5) ** 2)
    assert parts.ngrams.nist([["a"], ["b"]], [[["a", "x"]], [["b", "y"]]], order=1) == pytest.approx(2 * penalty)


def test_cider_is_its_definition_with_dense_vectors(parts: Any) -> None:
    candidates, references = words(CANDIDATES), words(REFERENCES)
    ours = parts.ngrams.cider(candidates, references)
    expected = []
    for candidate, refs in zip(candidates, references, strict=True):
        total = []
        for reference in refs:
            for n in (1, 2, 3, 4):

                def grams(tokens: list[str], n: int = n) -> list[tuple[str, ...]]:
                    return list(zip(*(tokens[i:] for i in range(n)), strict=False))

                vocabulary = sorted(
                    {g for text in [*candidates, *(r for refs in references for r in refs)] for g in grams(text)}
                )
                idf = np.array(
                    [
                        math.log(len(references))
                        - math.log(max(1, sum(any(g in grams(r) for r in item) for item in references)))
                        for g in vocabulary
                    ]
                )
                c, r = (np.array([grams(t).count(g) for g in vocabulary], float) * idf for t in (candidate, reference))
                norm = np.linalg.norm(c) * np.linalg.norm(r)
                cosine = float(np.minimum(c, r) @ r / norm) if norm else 0.0
                total.append(cosine * math.exp(-((len(candidate) - len(reference)) ** 2) / 72))
        expected.append(10 * sum(total) / len(total))
    assert ours == pytest.approx(expected)
    assert ours[0] > ours[2] > 0
    # Its own only reference, no word of which another item has: 1 for each order.
    same = parts.ngrams.cider(words(["a b c d e", "v w x y z"]), words([["a b c d e"], ["q r s t u"]]))
    assert same == pytest.approx([10, 0])


def test_mean_deviation_and_paired_difference(parts: Any) -> None:
    found = parts.statistics.summary([1.0, 2.0, 4.5])
    assert (found.mean, found.deviation) == (pytest.approx(2.5), pytest.approx(math.sqrt(6.5 / 2)))
    assert parts.statistics.summary([3.0]).deviation is None

    right = [0, 1] * 100
    good, bad = list(right), [1 - v if i % 4 == 0 else v for i, v in enumerate(right)]

    def accuracy(p: Any, r: Any) -> float:
        return 100 * float((np.asarray(p) == np.asarray(r)).mean())

    better = parts.statistics.paired(accuracy, [good], [bad], right)
    assert better.mean == pytest.approx(25)
    assert not better.noise
    # Binomial: ± 1.96 · 100 · √(.25 · .75 / 200) = 6.0
    assert better.low == pytest.approx(19, abs=1.6)
    assert better.high == pytest.approx(31, abs=1.6)
    assert parts.statistics.paired(accuracy, [good, bad], [bad, good], right).noise  # seeds differ more than systems
    alike = parts.statistics.paired(accuracy, [bad], [bad], right)  # the same examples are drawn for both
    assert (alike.mean, alike.low, alike.high) == (0, 0, 0)
    fewer = parts.statistics.paired(accuracy, [good[:40]], [bad], right)
    assert fewer.mean == pytest.approx(25)


def test_records_outlive_a_kill_and_know_changed_settings(parts: Any, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    key = parts.sweep.key_of({"lr": 1e-3, "data": "x"})
    assert key == parts.sweep.key_of({"data": "x", "lr": 1e-3})
    assert key != parts.sweep.key_of({"lr": 2e-3, "data": "x"})
    parts.sweep.Records(path).add(key, {"value": 1})
    with path.open("ab") as stream:
        stream.write(b'{"key": "torn", "val')
    again = parts.sweep.Records(path)
    assert key in again
    assert "torn" not in again
    again.add("other", {"value": 2})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == [key, "other"]
    path.write_text('no record\n{"key": "a"}\n')
    with pytest.raises(SystemExit, match="line 1"):
        parts.sweep.Records(path)
