"""Scores of labels against scikit-learn and cases worked by hand."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from gptcli.evaluation.label_scores import label_scores, macro_f1


def test_by_hand() -> None:
    """Bug: precision and recall, or the sides of the confusion matrix, are exchanged."""
    found = label_scores([0, 0, 0, 1], [0, 1, 0, 1], ["no", "yes"])
    assert found.accuracy == 0.75
    assert found.majority == 0.75
    assert found.confusion == [[2, 1], [0, 1]]
    no, yes = found.per_label
    assert (no.precision, no.recall, no.rows, no.predicted) == (1.0, pytest.approx(2 / 3), 3, 2)
    assert (yes.precision, yes.recall, yes.rows, yes.predicted) == (0.5, 1.0, 1, 2)
    assert found.macro_f1 == pytest.approx((no.f1 + yes.f1) / 2)


def test_macro_f1_is_scikit_learns() -> None:
    """Bug: labels that do not occur pull the mean down, or one that is never predicted does not."""
    from sklearn import metrics

    random = np.random.default_rng(0)
    for _ in range(20):
        truth, predicted = random.integers(4, size=(2, 12))
        confusion = metrics.confusion_matrix(truth, predicted, labels=range(5))
        expected = metrics.f1_score(truth, predicted, average="macro", zero_division=0.0)
        assert macro_f1(confusion) == pytest.approx(expected)
    found = label_scores(truth.tolist(), predicted.tolist(), list("abcde"))
    assert found.macro_f1 == pytest.approx(expected)


def test_intervals() -> None:
    """Bug: intervals are of something else than the score, or one row has one."""
    random = np.random.default_rng(1)
    truth = random.integers(3, size=400)
    predicted = np.where(random.random(400) < 0.8, truth, random.integers(3, size=400))
    found = label_scores(truth.tolist(), predicted.tolist(), list("abc"))
    for value, interval in (
        (found.accuracy, found.accuracy_ci95),
        (found.macro_f1, found.macro_f1_ci95),
    ):
        assert interval is not None
        assert interval[0] < value < interval[1]
        # Twice the 1.96 standard errors of a share of 400.
        assert interval[1] - interval[0] == pytest.approx(
            2 * 1.96 * np.sqrt(value * (1 - value) / 400), rel=0.2
        )
    assert label_scores([1], [1], ["a", "b"]).macro_f1_ci95 is None
