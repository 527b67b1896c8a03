"""BLEU, chrF and ROUGE of generated texts, by the packages that published scores are taken with."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import regex
from numpy.typing import NDArray

from gptcli.evaluation.answers import is_chinese
from gptcli.evaluation.statistics import bootstrap_ci

ROUGE = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}
# Words of any script, Chinese and Japanese characters each alone; of ASCII text rouge-score's own.
_WORDS = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}]|[[\p{L}\p{M}\p{N}]--[\p{Han}\p{Hiragana}\p{Katakana}]]+",
    flags=regex.VERSION1,
)


@dataclass(frozen=True)
class CorpusScore:
    """A score of all texts together, 0 to 100, its interval over rows (None for a single row), that
    of each row alone, and how it was taken, in sacrebleu's words."""

    value: float
    ci95: tuple[float, float] | None
    of_rows: list[float]
    signature: str


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> CorpusScore:
    """Corpus BLEU (Papineni et al. 2002; Post 2018), in characters where references are Chinese.

    `references` are those of each answer, one or more. The scores of rows alone are smoothed and
    of effective order, and do not average to that of the corpus.
    """
    from sacrebleu.metrics.bleu import BLEU

    chinese = sum(is_chinese(texts[0]) for texts in references) * 2 > len(references)
    tokenize = "zh" if chinese else "13a"
    alone = BLEU(tokenize=tokenize, effective_order=True, force=True)
    return _corpus_score(BLEU(tokenize=tokenize, force=True), alone, answers, references)


def chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> CorpusScore:
    """Corpus chrF, n-grams of 1 to 6 characters (Popović 2015); arguments as of `bleu`."""
    from sacrebleu.metrics.chrf import CHRF

    return _corpus_score(CHRF(), CHRF(), answers, references)


def rouge(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
    """F-measures of each answer, 0 to 1: rouge_1, rouge_2 and rouge_l (Lin 2004), without stemming;
    of several references the best."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), tokenizer=_Words())
    pairs = zip(answers, references, strict=True)
    rows = [scorer.score_multi(list(texts), answer) for answer, texts in pairs]
    return {ours: [row[theirs].fmeasure for row in rows] for theirs, ours in ROUGE.items()}


class _Words:
    """What rouge-score takes for words; its own tokenizer drops all that is not ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return _WORDS.findall(text.lower())


def _corpus_score(
    metric: Any, alone: Any, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> CorpusScore:
    """`alone` is the metric for single rows."""
    streams = list(zip_longest(*references))  # first references, second ones, ...; None for none
    found = metric.corpus_score(list(answers), streams)
    # Not its own intervals, which fail where some draws score 0 (sacrebleu 2.6.0), and hold all
    # draws at once. What they rest on: counts of each row, whose sums give the score.
    counts = np.array(metric._extract_corpus_statistics(list(answers), streams))

    def resampled(drawn: NDArray[np.int64]) -> float:
        return float(metric._compute_score_from_stats(counts[drawn].sum(0).tolist()).score)

    pairs = zip(answers, references, strict=True)
    of_rows = [float(alone.sentence_score(answer, list(texts)).score) for answer, texts in pairs]
    interval = bootstrap_ci(len(answers), resampled)
    return CorpusScore(float(found.score), interval, of_rows, str(metric.get_signature()))
