"""A table of a report, and those about the training data."""

from dataclasses import dataclass, replace
from typing import Any

from gptcli.reports.text import (
    NOTHING,
    clip,
    compact,
    decimals,
    field,
    finite,
    number,
    percent,
)

MAX_ROWS, MAX_COLUMNS, MAX_CELL = 60, 24, 400


@dataclass(frozen=True)
class Table:
    """Rows of shown text; the first column names the row. `marked` rows stand out; `shares`, where
    there are any, are one a row, from 0 to 1, and drawn as bars."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    marked: frozenset[int] = frozenset()
    note: str = ""
    shares: tuple[float, ...] = ()


def bounded(table: Table) -> Table:
    """The table as a page can show it: so many rows, columns and characters a cell, and no more."""
    left_out = len(table.rows) - MAX_ROWS
    note = f"{left_out:,} more rows are not shown." if left_out > 0 else ""
    return replace(
        table,
        title=clip(table.title, MAX_CELL),
        columns=[clip(name, MAX_CELL) for name in table.columns[:MAX_COLUMNS]],
        rows=[
            [clip(cell, MAX_CELL) for cell in row[:MAX_COLUMNS]] for row in table.rows[:MAX_ROWS]
        ],
        note=" ".join(part for part in (table.note, note) if part),
        shares=table.shares[:MAX_ROWS],
    )


def source_table(sources: list[dict[str, Any]], seen: list[dict[str, Any]]) -> Table | None:
    """What each source holds and how much of it the run has trained on."""
    if not sources:
        return None
    total = sum(part.get("tokens") or 0 for part in seen)
    rows, shares = [], []
    for place, source in enumerate(sources):
        part = seen[place] if place < len(seen) else {}
        share = part["tokens"] / total if total and "tokens" in part else None
        shares.append(share or 0.0)
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
    return Table("Sources", head, rows, shares=tuple(shares))


def cleaning_table(sources: list[dict[str, Any]]) -> Table | None:
    """What the filters left out and replaced, with short examples; a bar is the share of a source's
    documents that the filter left out."""
    rows, shares = [], []
    for source in sources:
        filters = source.get("cleaning") or {}
        left = [finite(done.get("documents")) or 0 for done in filters.values()]
        before = (finite(source.get("documents")) or 0) + sum(left)
        for name, done in filters.items():
            counts = {k: v for k, v in done.items() if k != "examples" and v}
            shown = ", ".join(
                f"{key.replace('_', ' ')} {field('', v)}" for key, v in counts.items()
            )
            examples = " · ".join(clip(str(e), 100) for e in done.get("examples") or [])
            share = (finite(done.get("documents")) or 0) / before if before else 0.0
            shares.append(share)
            rows.append([str(source.get("path")), name, percent(share), shown or NOTHING, examples])
    head = ["source", "filter", "documents left out", "done", "examples"]
    return Table("Cleaning", head, rows, shares=tuple(shares)) if rows else None
