"""What every way to evaluate a model returns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """The report as written (and printed by `--json`), and where; None if nowhere."""

    report: dict[str, Any]
    directory: Path | None
