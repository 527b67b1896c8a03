"""log.txt of a run."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gptcli.runs.regular import open_to_append
from gptcli.runs.run_dir import LOG

log = logging.getLogger("gptcli")


@contextmanager
def log_file(directory: Path) -> Iterator[None]:
    """Write the library's log records to log.txt in `directory`; a full disk ends no run."""
    file = os.fdopen(
        open_to_append(directory / LOG), "a", encoding="utf-8", errors="backslashreplace"
    )
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with suppress(OSError):  # what a full disk did not take
            file.close()
