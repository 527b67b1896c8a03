"""What the scores of a task are, whichever task it is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gptcli.evaluation.label_scores import LabelScore
from gptcli.evaluation.statistics import bootstrap_ratio_ci

MOST_WORST = 10
MOST_SHOWN = 400  # characters of each text of a worst row


@dataclass(frozen=True)
class TaskScores:
    """The scores of a model on `rows` rows.

    `values` has one number a score, `ci95` their bootstrap intervals over rows, where there are
    any, and `baseline` what needs no model: the share of the most frequent label, or chance.
    `headline` names the score that the others yield to; of all but perplexities, more is better.
    exact_match, token_f1, rouge and all shares are from 0 to 1, bleu and chrf from 0 to 100.
    `predictions` has a JSON-able object for each row, in order, and `worst` those with the least
    of the headline. `signatures` says how scores were taken, in the words of the package that took
    them.
    """

    values: dict[str, float]
    ci95: dict[str, tuple[float, float]]
    headline: str
    rows: int
    predictions: list[dict[str, Any]]
    baseline: dict[str, float] = field(default_factory=dict)
    labels: list[str] | None = None
    confusion: list[list[int]] | None = None
    per_label: list[LabelScore] | None = None
    worst: list[dict[str, Any]] = field(default_factory=list)
    signatures: dict[str, str] = field(default_factory=dict)

    def entries(self, when: str) -> dict[str, dict[str, Any]]:
        """The report's `tasks` with these as the scores of `when`: before, after or, of a model
        that is only evaluated, value."""
        found: dict[str, dict[str, Any]] = {}
        for name, value in self.values.items():
            found[name] = {when: value, "rows": self.rows}
            if name in self.ci95:
                found[name][f"{when}_ci95"] = list(self.ci95[name])
            if name in self.baseline:
                found[name]["baseline"] = self.baseline[name]
        return found

    def to_json(self) -> dict[str, Any]:
        """All but the predictions, JSON-able."""
        return {name: value for name, value in asdict(self).items() if name != "predictions"}


def mean_score(of_rows: Any) -> tuple[float, tuple[float, float] | None]:
    """The mean of a score over rows (N,) and its interval."""
    numbers = np.asarray(of_rows, dtype=np.float64)
    return float(numbers.mean()), bootstrap_ratio_ci(numbers, np.ones(len(numbers)))


def task_scores(
    values: dict[str, float],
    intervals: Mapping[str, tuple[float, float] | None],
    headline: str,
    predictions: list[dict[str, Any]],
    own: Any,
    **more: Any,
) -> TaskScores:
    """The scores with the rows of which `own` (N,), the headline of each, is least as the worst."""
    order = np.argsort(np.asarray(own, dtype=np.float64), kind="stable")[:MOST_WORST]
    ci95 = {name: interval for name, interval in intervals.items() if interval is not None}
    worst = [{key: _clipped(v) for key, v in predictions[i].items()} for i in order]
    return TaskScores(values, ci95, headline, len(predictions), predictions, worst=worst, **more)


def _clipped(value: Any) -> Any:
    """Long texts cut, those in a list too."""
    if isinstance(value, list):
        return [_clipped(part) for part in value]
    if isinstance(value, str) and len(value) > MOST_SHOWN:
        return f"{value[:MOST_SHOWN]} …"
    return value
