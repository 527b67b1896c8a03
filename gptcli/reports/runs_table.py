"""The runs of a directory as a table, and one run as a list of facts, for a terminal."""

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from gptcli.reports.text import decimals, duration, moment, number, percent, size
from gptcli.runs.listing import RunSummary, checkpoint_names
from gptcli.runs.run_dir import created

RIGHT = frozenset({2, 3, 4, 5, 6, 7, 8})  # columns of `runs_rows` that hold figures
_HEAD = ["RUN", "STATUS", "DONE", "STEP", "TRAIN LOSS", "VAL BITS/BYTE", "SCORE", "SIZE", "AGE"]


def runs_rows(runs: Sequence[RunSummary], now: datetime) -> list[list[str]]:
    """A head and a row for each run."""
    return [_HEAD, *(_row(run, now) for run in runs)]


def run_facts(run: RunSummary) -> list[list[str]]:
    """Rows of name and value: how the run was made, how far it is, how well and how fast."""
    training = run.about.get("training")
    whole = training if isinstance(training, dict) else {}
    facts = {
        "run": str(run.path),
        "status": run.status + (f" ({run.holder})" if run.holder else ""),
        "error": run.about.get("error") if run.status == "failed" else None,
        "created": moment(run.about["created"]) if run.about.get("created") else None,
        "command": run.about.get("command"),
        "parameters": _known(number, whole.get("parameters")),
        "progress": _known(percent, run.progress),
        "step": _known(number, run.step),
        "tokens": _known(number, run.tokens),
        "speed": _known(lambda v: f"{number(round(v))} tokens/s", run.tokens_per_second),
        "training time": _known(duration, run.seconds),
        "time left": _known(duration, run.left_seconds) if run.status == "running" else None,
        "train loss": _known(lambda v: decimals(v, 4), run.loss),
        "val bits/byte": _known(lambda v: decimals(v, 4), run.bits_per_byte),
        run.task[0] if run.task else "score": decimals(run.task[1], 4) if run.task else None,
        "checkpoints": ", ".join(checkpoint_names(run.path)) or None,
        "size": size(run.bytes),
    }
    return [[name, str(value)] for name, value in facts.items() if value is not None]


def _row(run: RunSummary, now: datetime) -> list[str]:
    began = created(run.about)
    return [
        run.path.name,
        run.status,
        "-" if run.progress is None else f"{100 * run.progress:.0f} %",
        "-" if run.step is None else str(run.step),
        "-" if run.loss is None else f"{run.loss:.4f}",
        "-" if run.bits_per_byte is None else f"{run.bits_per_byte:.4f}",
        "-" if run.task is None else f"{run.task[0]} {run.task[1]:.4f}",
        size(run.bytes),
        "-" if began == datetime.min.replace(tzinfo=timezone.utc) else _age(now - began),
    ]


def _age(time: timedelta) -> str:
    """As `45 s`, `12 min`, `3 h` or `9 d`, for a column that is only to tell old from new."""
    seconds = max(0, int(time.total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def _known(show: Callable[[Any], str], value: Any) -> str | None:
    return None if value is None else show(value)
