"""What a report says of tasks of the lm-evaluation-harness."""

from typing import Any

from gptcli.reports.section import Section
from gptcli.reports.table import Table
from gptcli.reports.text import NOTHING, decimals, finite, number


def lm_eval_section(report: dict[str, Any]) -> Section | None:
    """A row for each score of each task; None where the report has none."""
    found = report.get("lm_eval")
    scores = found.get("scores") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(scores, list) or not scores:
        return None
    rows = [_row(score) for score in scores if isinstance(score, dict)]
    columns = ["task", "score", "value", "standard error", "better", "shots", "rows"]
    text = [
        f"Scored by lm-eval {found.get('version')}, which defines tasks and scores; the likelihoods"
        " and texts are those of this model here."
    ]
    if finite(found.get("limit")) is not None:
        text.append(f"Only the first {number(found['limit'])} rows of each task are scored.")
    return Section("Tasks of lm-eval", text, tables=[Table("Scores by task", columns, rows)])


def _row(score: dict[str, Any]) -> list[str]:
    name, filtered = str(score.get("metric")), score.get("filter")
    higher = score.get("higher_is_better")
    return [
        str(score.get("task")),
        name if filtered in (None, "none") else f"{name}, {filtered}",
        *(decimals(score.get(key), 4) for key in ("value", "stderr")),
        NOTHING if higher is None else "higher" if higher else "lower",
        *(number(score.get(key)) for key in ("shots", "rows")),
    ]
