"""A table of a report, and those about the training data."""

from dataclasses import dataclass
from typing import Any

from gptcli.reports.text import (
    clip,
    compact,
    decimals,
    field,
    number,
    percent,
)


@dataclass(frozen=True)
class Table:
    """Rows of shown text; the first column names the row. `marked` rows stand out."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    marked: frozenset[int] = frozenset()
    note: str = ""


def source_table(sources: list[dict[str, Any]], seen: list[dict[str, Any]]) -> Table | None:
    """What each source holds and how much of it the run has trained on."""
    if not sources:
        return None
    total = sum(part.get("tokens") or 0 for part in seen)
    rows = []
    for place, source in enumerate(sources):
        part = seen[place] if place < len(seen) else {}
        share = part["tokens"] / total if total and "tokens" in part else None
        rows.append(
            [
                str(source.get("path")),
                number(source.get("documents")),
                field("bytes", source.get("train_bytes")),
                compact(part.get("tokens")),
                percent(share),
                number(part.get("documents")),
                decimals(part.get("epochs"), 2),
            ]
        )
    head = [
        "source",
        "documents",
        "to train on",
        "tokens seen",
        "share",
        "documents seen",
        "epochs",
    ]
    return Table("Sources", head, rows)


def cleaning_table(sources: list[dict[str, Any]]) -> Table | None:
    """What the filters left out and replaced, with short examples."""
    rows = []
    for source in sources:
        for name, done in (source.get("cleaning") or {}).items():
            counts = {k: v for k, v in done.items() if k != "examples" and v}
            shown = ", ".join(
                f"{key.replace('_', ' ')} {field('', v)}" for key, v in counts.items()
            )
            examples = " · ".join(clip(str(e), 100) for e in done.get("examples") or [])
            rows.append([str(source.get("path")), name, shown, examples])
    return Table("Cleaning", ["source", "filter", "done", "examples"], rows) if rows else None
