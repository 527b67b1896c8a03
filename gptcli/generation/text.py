"""From token bytes to text as it grows: UTF-8 that is never cut, and stop texts."""

import codecs
from collections.abc import Sequence


class Utf8Stream:
    """Decodes bytes that arrive in pieces; invalid ones become U+FFFD as `bytes.decode` does it."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        """The characters that `data` completes; the start of a character waits for its rest."""
        return self._decoder.decode(data)

    def flush(self) -> str:
        """U+FFFD for a character that never ended, else nothing."""
        return self._decoder.decode(b"", True)


class StopScanner:
    """Passes text through up to the first stop text, wherever the pieces are cut.

    The first is the one that ends first (of two that end together, the longer). Text that may be
    the beginning of a stop text is held back until it is known. `stopped` tells that one was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stopped = False
        self._stops = stops
        self._held = ""

    def feed(self, piece: str) -> str:
        """The text that may be shown now that `piece` has come."""
        if self.stopped:
            return ""
        text = self._held + piece
        starts = ((text.find(stop), stop) for stop in self._stops)
        found = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
