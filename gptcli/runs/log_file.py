"""log.txt of a run."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gptcli.errors import ResourceError
from gptcli.runs.run_dir import LOG

log = logging.getLogger("gptcli")


@contextmanager
def log_file(directory: Path) -> Iterator[None]:
    """Write the library's log records to log.txt in `directory`; a full disk ends no run."""
    path = directory / LOG
    if path.is_symlink():  # in a run that somebody else made it can lead anywhere
        raise ResourceError(f"{path} is a symbolic link")
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with suppress(OSError):  # what a full disk did not take
            handler.close()
