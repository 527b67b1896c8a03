"""What a report says of scores of text: broken down, the most surprising parts, calibration."""

from typing import Any

from matplotlib.axes import Axes

from gptcli.reports.drawing import INK, LARGE, RULE, TRAIN, svg
from gptcli.reports.section import Plot, Section
from gptcli.reports.table import Table
from gptcli.reports.text import NOTHING, decimals, field, finite, number, percent

SHOWN_CHARACTERS = 120  # of a document's start, or of a token's context (its end)


def breakdown_section(report: dict[str, Any]) -> Section | None:
    """Scores by source, language and position; None where the report has none."""
    tables = breakdown_tables(report)
    if not tables:
        return None
    text = ["Intervals are bootstrapped over documents (95 %)."]
    return Section("Where it does well and badly", text, tables=tables)


def breakdown_tables(report: dict[str, Any]) -> list[Table]:
    """A table for each way that the scores are broken down."""
    found = report.get("breakdown")
    parts = {k: _rows(found, k) for k in ("source", "language", "script", "position")}
    tables = []
    for key in ("source", "language", "script"):
        if parts[key]:
            head = [key, "documents", "text", "bits per byte", "95 % interval", "loss", "accuracy"]
            rows = [_group(row) for row in parts[key]]
            tables.append(Table(f"By {key}", head, rows))
    if len(parts["position"]) > 1:
        head = ["tokens to the left", "tokens", "loss", "95 % interval", "accuracy"]
        rows = [_position(row) for row in parts["position"]]
        note = "By how many tokens of the document the model saw before the one it was to predict."
        tables.append(Table("By position", head, rows, note=note))
    return tables


def surprising_section(report: dict[str, Any]) -> Section | None:
    """The documents and tokens that the model found least likely; None where there are none."""
    tables = surprising_tables(report)
    return Section("What surprised it most", tables=tables) if tables else None


def surprising_tables(
    report: dict[str, Any], rows: int | None = None, characters: int = SHOWN_CHARACTERS
) -> list[Table]:
    """The most surprising documents, then tokens, where the report has them; of each at most
    `rows`, with so many `characters` of their text."""
    found, tables = report.get("surprising"), []
    documents = [
        [
            _line(row.get("name")),
            decimals(row.get("bits_per_byte"), 3),
            field("bytes", row.get("bytes")),
            _line(row.get("start"))[:characters],
        ]
        for row in _rows(found, "documents")[:rows]
    ]
    if documents:
        head = ["document", "bits per byte", "text", "begins"]
        tables.append(Table("Most surprising documents", head, documents))
    tokens = [
        [
            repr(str(row.get("token"))),
            decimals(row.get("bits"), 1),
            _end(_line(row.get("context")), characters),
            f"{str(row.get('likeliest'))!r} {percent(row.get('likeliest_probability'))}",
            _line(row.get("document")),
        ]
        for row in _rows(found, "tokens")[:rows]
    ]
    if tokens:
        head = ["token", "bits", "after", "expected", "document"]
        note = "Each token of the vocabulary at most once."
        tables.append(Table("Most surprising tokens", head, tokens, note=note))
    return tables


def calibration_section(report: dict[str, Any]) -> Section | None:
    """Expected calibration error and the reliability curve; None where the report has none."""
    found = report.get("calibration")
    bins = [row for row in _rows(found, "bins") if _known(row)]
    if not isinstance(found, dict) or not bins:
        return None
    sure, right = finite(found.get("confidence")), finite(found.get("accuracy"))
    error = decimals(found.get("expected_calibration_error"), 4)
    text = [
        f"Expected calibration error {error}: how far, on average over tokens, the probability of"
        " the likeliest token is from the share of times that it is right (Guo et al. 2017,"
        " 15 bins)."
    ]
    if sure is not None and right is not None:
        kind = "more" if sure > right else "less"
        text.append(
            f"Its mean probability is {percent(sure)} and it is right in {percent(right)}: the"
            f" model is {kind} sure than it should be."
        )
    rows = [
        [
            f"{percent(row['low'])} – {percent(row['high'])}",
            number(row.get("tokens")),
            percent(row["confidence"]),
            percent(row["accuracy"]),
        ]
        for row in bins
    ]
    table = Table("Calibration by bin", ["probability", "tokens", "mean", "right"], rows)
    return Section("Calibration", text, [_reliability(bins, error)], [table])


def _reliability(bins: list[dict[str, Any]], error: str) -> Plot:
    """Share of right tokens by probability, beside the diagonal of a calibrated model."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=RULE, linewidth=1.0, linestyle=(0, (3, 3)))
        x, y = [row["confidence"] for row in bins], [row["accuracy"] for row in bins]
        axes.plot(x, y, color=TRAIN, marker="o", ms=3.5)
        axes.annotate("calibrated", (0.72, 0.75), color=INK, ha="right")
        axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="share right")
        axes.set_xlabel("probability of the likeliest token")

    ends = f"from {percent(bins[0]['accuracy'])} to {percent(bins[-1]['accuracy'])}"
    description = (
        "Share of times that the likeliest token is right, by its probability, in up to 15 bins:"
        f" {ends}; the dashed diagonal is a calibrated model. Expected calibration error {error}."
    )
    drawn = svg("reliability", LARGE, draw)
    return Plot("reliability", "Reliability curve", description, drawn, large=True)


def _group(row: dict[str, Any]) -> list[str]:
    return [
        _line(row.get("name")),
        number(row.get("documents")),
        field("bytes", row.get("bytes")),
        decimals(row.get("bits_per_byte"), 4),
        _interval(row.get("bits_per_byte_ci95")),
        decimals(row.get("loss"), 4),
        percent(row.get("accuracy")),
    ]


def _position(row: dict[str, Any]) -> list[str]:
    low, high = number(row.get("low")), number(row.get("high"))
    return [
        low if low == high else f"{low} – {high}",
        number(row.get("tokens")),
        decimals(row.get("loss"), 4),
        _interval(row.get("loss_ci95")),
        percent(row.get("accuracy")),
    ]


def _rows(found: Any, key: str) -> list[dict[str, Any]]:
    """The objects under `key`, whatever a damaged file holds there."""
    rows = found.get(key) if isinstance(found, dict) else None
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _known(row: dict[str, Any]) -> bool:
    return all(
        finite(row.get(key)) is not None for key in ("low", "high", "confidence", "accuracy")
    )


def _interval(value: Any) -> str:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return NOTHING
    return f"{decimals(value[0], 4)} – {decimals(value[1], 4)}"


def _line(value: Any) -> str:
    return " ".join(str(value).split())


def _end(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"…{text[-limit:]}"
