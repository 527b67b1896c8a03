"""Texts as a task head reads them (Radford et al. 2018, figure 1): one sequence of tokens each.

A sequence is document start, text, eot; the head reads what the model makes of that eot. Two texts
of one sequence are parted by a line end. Texts that are too long lose their beginning.
"""

from dataclasses import dataclass, field

from gptcli.data.tokenizer import Tokenizer

_DELIMITER = "\n"


@dataclass(frozen=True)
class Sequences:
    """No sequence where a text is `empty` or does not fit; `shortened` where one lost its
    beginning."""

    sequences: list[list[int]] = field(default_factory=list)
    empty: bool = False
    shortened: bool = False


class HeadSequences:
    """Makes sequences of at most `block_size` tokens; `cuts` says whether texts may be cut."""

    def __init__(self, tokenizer: Tokenizer, block_size: int, cuts: bool) -> None:
        assert tokenizer.eot is not None
        self._tokenizer, self._cuts = tokenizer, cuts
        self._start = [] if tokenizer.prompt_start is None else [tokenizer.prompt_start]
        self._end = [tokenizer.eot]
        self._delimiter = tokenizer.encode(_DELIMITER)
        self._room = block_size - len(self._start) - len(self._end)  # for texts

    def of_text(self, text: str) -> Sequences:
        """The sequence of one text."""
        body = self._encode(text)
        shortened = len(body) > self._room
        if not body or (shortened and not self._cuts):
            return Sequences(empty=not body)
        return Sequences([self._closed(_last(body, self._room))], shortened=shortened)

    def of_choices(self, text: str, choices: list[str]) -> Sequences:
        """A sequence for each choice that may follow the text."""
        body, bodies = self._encode(text), [self._encode(choice) for choice in choices]
        if not body or not all(bodies):
            return Sequences(empty=True)
        # One cut for all, so that the sequences differ in their choices only.
        room = self._room - len(self._delimiter) - max(map(len, bodies))
        shortened = len(body) > room
        if room < 1 or (shortened and not self._cuts):
            return Sequences()
        made = [self._closed(_last(body, room), choice) for choice in bodies]
        return Sequences(made, shortened=shortened)

    def of_pair(self, first: str, second: str, *, both: bool) -> Sequences:
        """Two texts in one sequence, with `both` in a second one the other way round."""
        a, b = self._encode(first), self._encode(second)
        if not a or not b:
            return Sequences(empty=True)
        room = self._room - len(self._delimiter)
        shortened = len(a) + len(b) > room
        if room < 2 or (shortened and not self._cuts):
            return Sequences()
        # The longer one is cut first; a text that has less than half of the room stays whole.
        rest = _last(b, max(room - room // 2, room - len(a)))
        a, b = _last(a, room - len(rest)), rest
        orders = [(a, b), (b, a)] if both else [(a, b)]
        return Sequences([self._closed(*order) for order in orders], shortened=shortened)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text) if text.strip() else []

    def _closed(self, body: list[int], second: list[int] | None = None) -> list[int]:
        follows = [] if second is None else [*self._delimiter, *second]
        return [*self._start, *body, *follows, *self._end]


def _last(ids: list[int], most: int) -> list[int]:
    return ids[-most:] if len(ids) > most else ids
