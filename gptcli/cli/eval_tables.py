"""What `gpt eval` shows in a terminal, as tables."""

from typing import TYPE_CHECKING, Any

from gptcli.cli.terminal import columns

if TYPE_CHECKING:
    from gptcli.reports.table import Table

WORST, CHARACTERS = 5, 48  # rows and text of the most surprising parts; reports have more
MOST_LABELS = 12  # of a confusion matrix in a terminal; reports have larger ones


def tables(report: dict[str, Any]) -> list[str]:
    """What a terminal shows of a report of `gpt eval`, whatever it is of."""
    from gptcli.reports.privacy import privacy_tables

    if report.get("tasks"):
        return _task_tables(report)
    if report.get("lm_eval"):
        return [columns(_lm_eval_rows(report["lm_eval"]), right=frozenset({2, 3, 4, 5}))]
    if report.get("quantized"):
        return [columns(_comparison_rows(report), right=frozenset({1, 2, 3}))]
    if report.get("scores"):
        return _text_tables(report)
    return [_shown(table) for table in privacy_tables(report)]


def _text_tables(report: dict[str, Any]) -> list[str]:
    """What a terminal shows of an evaluation on text: the scores, where they are good and bad, and
    the most surprising documents and tokens."""
    from gptcli.reports.eval_sections import breakdown_tables, surprising_tables

    error = report["calibration"]["expected_calibration_error"]
    scores = score_rows(report["scores"] | {"expected_calibration_error": error})
    parts = [*breakdown_tables(report), *surprising_tables(report, WORST, CHARACTERS)]
    return [columns(scores, right=frozenset({1})), *map(_shown, parts)]


def _shown(table: "Table") -> str:
    """A table of a report; columns of figures are right-aligned."""
    cells = enumerate(zip(*table.rows, strict=True))
    right = frozenset(i for i, values in cells if all(v[:1] in "-–0123456789" for v in values))
    note = f"{table.note}\n" if table.note else ""
    return f"{table.title}\n{columns([table.columns, *table.rows], right=right)}{note}"


def _lm_eval_rows(found: dict[str, Any]) -> list[list[str]]:
    """A row for each score of each task of the harness."""
    rows = [["task", "score", "", "standard error", "shots", "rows"]]
    for score in found["scores"]:
        name = score["metric"] + ("" if score["filter"] == "none" else f", {score['filter']}")
        error = "-" if score["stderr"] is None else f"{score['stderr']:.4f}"
        counts = ["-" if score[key] is None else str(score[key]) for key in ("shots", "rows")]
        value = score["value"]
        shown = f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"
        rows.append([score["task"], name, shown, error, *counts])
    return rows


def _task_tables(report: dict[str, Any]) -> list[str]:
    """What a terminal shows of an evaluation on a task: the scores with their intervals, and where
    there are labels the confusion matrix."""
    rows = [["", "", "95 % interval", "baseline", "rows"]]
    for name, entry in report["tasks"].items():
        interval = " to ".join(f"{v:.4f}" for v in entry.get("value_ci95") or []) or "-"
        baseline = f"{entry['baseline']:.4f}" if "baseline" in entry else "-"
        rows.append([name, f"{entry['value']:.4f}", interval, baseline, str(entry["rows"])])
    tables = [columns(rows, right=frozenset({1, 3, 4}))]
    labels, confusion = report["task"]["labels"], report["task"]["confusion"]
    if confusion is not None and len(labels) <= MOST_LABELS:
        head = ["label, predicted as:", *labels]
        counts = [[label, *map(str, row)] for label, row in zip(labels, confusion, strict=True)]
        tables.append(columns([head, *counts], right=frozenset(range(1, len(head)))))
    return tables


def _comparison_rows(report: dict[str, Any]) -> list[list[str]]:
    """Scores and memory of the weights: before, after, and the change where there is one."""
    about, after = report["quantized"], report["scores"]
    before = about["scores_before"]
    rows = [["", "before", about["kind"], "change"]]
    for old, new in zip(score_rows(before), score_rows(after), strict=True):
        pair = before[old[0]], after[old[0]]
        numbers = all(isinstance(value, float) for value in pair) and pair[0]
        rows.append([*old, new[1], f"{pair[1] / pair[0] - 1:+.2%}" if numbers else ""])
    sizes = about["weight_bytes_before"], about["weight_bytes"]
    megabytes = [f"{size / 1e6:.1f} MB" for size in sizes]
    return [*rows, ["weights", *megabytes, f"{sizes[1] / sizes[0] - 1:+.2%}"]]


def score_rows(scores: dict[str, Any]) -> list[list[str]]:
    """The scores of a report as rows of name and value, each interval behind its score."""
    rows = []
    ordered = [(k, f"{k}_ci95") for k in scores if not k.endswith("_ci95")]
    for name in (k for pair in ordered for k in pair if k in scores):
        value = scores[name]
        if isinstance(value, (list, tuple)):
            text = " to ".join(f"{v:.4f}" for v in value)
        elif isinstance(value, float):
            text = f"{value:.4f}"
        else:
            text = "-" if value is None else str(value)
        rows.append([name, text])
    return rows
