"""Accuracy, F1 and the confusion matrix of predicted labels (scikit-learn), with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptcli.evaluation.statistics import bootstrap_ci, bootstrap_ratio_ci


@dataclass(frozen=True)
class LabelScore:
    """How well one label is found: of the `predicted` rows `precision` are right, of the `rows`
    that have it `recall` are found; F1 is their harmonic mean."""

    label: str
    precision: float
    recall: float
    f1: float
    rows: int
    predicted: int


@dataclass(frozen=True)
class LabelScores:
    """Scores of all rows. `confusion[i][j]` counts rows of label i that were taken for j;
    `majority` is the share of the most frequent label: the accuracy of always answering with it."""

    accuracy: float
    accuracy_ci95: tuple[float, float] | None
    macro_f1: float
    macro_f1_ci95: tuple[float, float] | None
    majority: float
    confusion: list[list[int]]
    per_label: list[LabelScore]


def label_scores(
    truth: Sequence[int], predicted: Sequence[int], labels: Sequence[str]
) -> LabelScores:
    """Scores of `predicted`, both as numbers of `labels`.

    Macro F1 is the mean over the labels that rows have or were given.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    numbers, right = list(range(len(labels))), np.equal(truth, predicted)
    confusion = confusion_matrix(truth, predicted, labels=numbers)
    precision, recall, f1, rows = precision_recall_fscore_support(
        truth, predicted, labels=numbers, zero_division=0.0
    )
    pairs = np.asarray(truth) * len(labels) + np.asarray(predicted)

    def resampled(drawn: NDArray[np.int64]) -> float:
        counts = np.bincount(pairs[drawn], minlength=len(labels) ** 2)
        return macro_f1(counts.reshape(len(labels), -1))

    return LabelScores(
        accuracy=float(right.mean()),
        accuracy_ci95=bootstrap_ratio_ci(right, np.ones(len(right))),
        macro_f1=macro_f1(confusion),
        macro_f1_ci95=bootstrap_ci(len(right), resampled),
        majority=float(rows.max() / len(right)),
        confusion=confusion.tolist(),
        per_label=[
            LabelScore(label, float(p), float(r), float(f), int(n), int(confusion[:, number].sum()))
            for number, (label, p, r, f, n) in enumerate(
                zip(labels, precision, recall, f1, rows, strict=True)
            )
        ],
    )


def macro_f1(confusion: NDArray[np.int64]) -> float:
    """Mean F1 = 2 TP / (rows + predicted) of the labels that occur in a confusion matrix (L, L)."""
    occur = confusion.sum(0) + confusion.sum(1)
    f1 = 2 * np.diagonal(confusion)[occur > 0] / occur[occur > 0]
    return float(f1.mean())
