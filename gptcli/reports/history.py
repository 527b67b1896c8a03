"""How a run began, stopped and went on."""

from itertools import pairwise
from typing import Any

from gptcli.reports.table import Table
from gptcli.reports.text import NOTHING, duration, finite, moment, number

BEGINNINGS = {"start", "resume"}


def history_table(history: Any) -> Table | None:
    """The starts, resumes and ends in `history` of run.json, in order; None where nothing but one
    start and its end is known."""
    known = [e for e in history if isinstance(e, dict)] if isinstance(history, list) else []
    if len(known) <= 2 and not any(entry.get("event") == "resume" for entry in known):
        return None
    rows = []
    for entry, after in pairwise([*known, None]):
        assert entry is not None
        rows.append(_row(entry))
        begins = entry.get("event") in BEGINNINGS
        if begins and after is not None and after.get("event") in BEGINNINGS:
            rows.append(
                [
                    NOTHING,
                    "was killed",
                    NOTHING,
                    NOTHING,
                    "what came after its last save was done again",
                ]
            )
    return Table("History", ["time", "event", "step", "training so far", "with"], rows)


def _row(entry: dict[str, Any]) -> list[str]:
    versions = [f"{k} {entry[k]}" for k in ("gptcli", "torch") if entry.get(k)]
    facts = [*versions, f"{entry['cores']} cores"] if entry.get("cores") else versions
    seconds = entry.get("elapsed_seconds")
    return [
        moment(entry.get("at")),
        str(entry.get("event")),
        number(entry.get("step")),
        duration(seconds) if finite(seconds) is not None else NOTHING,
        ", ".join(facts) or NOTHING,
    ]
