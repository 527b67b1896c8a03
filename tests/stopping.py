"""Stop requests in the middle of a job."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from gptcli import stop


@contextmanager
def stopping_at(text: str) -> Iterator[None]:
    """Ask for a stop when a log message contains `text`."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if text in record.getMessage():
                stop.request(signal.SIGTERM)

    listener, logger = Listener(), logging.getLogger("gptcli")
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        stop.reset()
