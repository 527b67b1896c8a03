"""Rows of a batch as readers see them: every token with its text, position, target and loss."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from gptcli.data.tokenizer import Tokenizer
from gptcli.model.loss import IGNORED


@dataclass(frozen=True)
class ShownToken:
    """One token of a row.

    `text` has control characters and parts of characters as escapes, special tokens as ⟨name⟩;
    `completes` are the characters that end with this token and began in earlier ones, control
    characters as escapes too. `position` is what the model is told; None for a target that is no
    input, such as a row's last one. `target` is the token to be predicted here, None without loss.
    `loss` tells whether this token itself is a target with loss; `begins`, whether a segment (what
    attends to itself only: the row, or a document of it) begins here.
    """

    id: int
    text: str
    completes: str
    kind: Literal["text", "eot"]
    position: int | None
    target: int | None
    loss: bool
    begins: bool


@dataclass(frozen=True)
class ShownRow:
    """A row: its tokens, and how many of the block are padding, are trained on, begin segments.

    `name` tells rows apart that are texts of one example; `label` is what a task head learns of it.
    """

    tokens: list[ShownToken]
    padding: int
    targets: int
    segments: int
    name: str = ""
    label: str | None = None


@dataclass(frozen=True)
class _Cell:
    """A token to be shown; `place` is its place among the inputs, None: it is only a target."""

    id: int
    place: int | None
    loss: bool
    begins: bool


def show_rows(
    tokenizer: Tokenizer,
    inputs: np.ndarray[Any, Any],
    targets: np.ndarray[Any, Any],
    starts: np.ndarray[Any, Any] | None,
    lengths: Sequence[int] | None = None,
    *,
    apart: bool = False,
) -> list[ShownRow]:
    """Rows of inputs and targets (n, T); `starts` (n, T) tells where segments begin, None: rows
    are one segment each. What is behind `lengths` inputs is padding, by default what is behind the
    last one with a target. `apart` says that the last target of a segment is never the first input
    of the next one, even where both are eot."""
    trained = targets != IGNORED
    return [
        _row(
            tokenizer,
            inputs[i],
            targets[i],
            starts[i] if starts is not None else None,
            lengths[i] if lengths is not None else _length(trained[i]),
            apart,
        )
        for i in range(len(inputs))
    ]


def _row(
    tokenizer: Tokenizer,
    inputs: np.ndarray[Any, Any],
    targets: np.ndarray[Any, Any],
    starts: np.ndarray[Any, Any] | None,
    length: int,
    apart: bool,
) -> ShownRow:
    trained = targets != IGNORED
    cells: list[_Cell] = []
    for i in range(length + 1):
        # A target is shown as the next input, or by itself where another token stands there.
        before = int(targets[i - 1]) if i and trained[i - 1] else None
        here = int(inputs[i]) if i < length else None
        begins = i == 0 or (i < length and starts is not None and bool(starts[i]))
        same = before == here and not (apart and begins)
        if before is not None and not same:
            cells.append(_Cell(before, None, loss=True, begins=False))
        if here is not None:
            cells.append(_Cell(here, i, same, begins))
    texts = token_texts(tokenizer, [c.id for c in cells], [c.begins for c in cells])
    names = {i: name for name, i in tokenizer.special.ids.items() if i != tokenizer.eot}
    tokens = []
    position = -1
    for cell, (text, completes) in zip(cells, texts, strict=True):
        place = cell.place
        if place is not None:
            position = 0 if cell.begins else position + 1
        tokens.append(
            ShownToken(
                id=cell.id,
                text=text or (f"⟨{names[cell.id]}⟩" if cell.id in names else ""),
                completes=completes,
                kind="eot" if cell.id == tokenizer.eot else "text",
                position=position if place is not None else None,
                target=int(targets[place]) if place is not None and trained[place] else None,
                loss=cell.loss,
                begins=cell.begins,
            )
        )
    segments = sum(cell.begins for cell in cells)
    return ShownRow(tokens, len(inputs) - length, int(trained.sum()), segments)


def _length(trained: np.ndarray[Any, np.dtype[np.bool_]]) -> int:
    """Inputs up to the last one with a target; what is behind is padding."""
    places = np.flatnonzero(trained)
    return int(places[-1]) + 1 if len(places) else len(trained)


def token_texts(
    tokenizer: Tokenizer, ids: Sequence[int], begins: Sequence[bool]
) -> list[tuple[str, str]]:
    r"""Each token's text and the characters it completes: `\xe5` and "" for a first part, `\x8f`
    and the character for the last. Parts are not joined across a place in `begins`."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shown = []
    partial = False  # the bytes so far end within a character
    for token, fresh in zip(ids, begins, strict=True):
        data = tokenizer.token_bytes(token)
        if fresh or token == tokenizer.eot:
            decoder.reset()
            partial = False
        joined = decoder.decode(data)
        begun, partial = partial, bool(decoder.getstate()[0])
        completes = _escaped(joined.encode()) if begun and "\ufffd" not in joined else ""
        shown.append((_escaped(data), completes))
    return shown


def _escaped(data: bytes) -> str:
    """Bytes as text; what is no UTF-8, control characters and backslashes as escapes."""
    text = data.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    names = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return "".join(names.get(c) or (c if c.isprintable() else ascii(c)[1:-1]) for c in text)
