"""Whole documents packed into rows: best-fit decreasing, a bin-packing rule (Johnson 1973; Ding et
al. 2024, "Fewer Truncations Improve Language Modeling")."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Ints: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Chunks:
    """Chunk i has inputs tokens[starts[i] : starts[i] + lengths[i]] and targets one further.

    Tokens from `rest` on belong to a document whose end is not known yet.
    """

    starts: Ints
    lengths: Ints
    rest: int


@dataclass(frozen=True)
class Placement:
    """Where each piece lies: its row and the place in it; `rows` rows in all, numbered by the first
    piece in each."""

    row: Ints
    offset: Ints
    rows: int


def cut_documents(tokens: np.ndarray[Any, Any], eot: int, most: int, closed: bool) -> Chunks:
    """Cut documents [eot, d1, ..., dn] that follow each other into chunks of up to `most` targets.

    A document's targets are d1 ... dn and the next document's eot; chunks overlap by one token, so
    that each target has its input. `closed`: the last token is an eot that ends the last document;
    otherwise that document may go on, and only its full chunks are cut.
    """
    borders = np.flatnonzero(tokens == eot)
    if len(tokens) and (not len(borders) or borders[0]):
        borders = np.concatenate([[0], borders])
    ends = np.append(borders[1:], len(tokens) - 1)[: len(borders)]
    targets = ends - borders
    counts = -(-targets // most)
    rest = len(tokens)
    if len(borders) and not closed:
        counts[-1] = targets[-1] // most
        rest = int(borders[-1] + counts[-1] * most)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(borders, counts) + within * most
    return Chunks(starts, np.minimum(np.repeat(ends, counts) - starts, most), rest)


def best_fit(lengths: Ints, capacity: int) -> Placement:
    """Place pieces of 1 ... `capacity` tokens into rows of `capacity`: the longest first, each into
    the row with the least room that holds it, else into a new one. Equal lengths keep their order.
    """
    row, offset = np.zeros(len(lengths), np.int64), np.zeros(len(lengths), np.int64)
    order = np.argsort(-lengths, kind="stable")
    full = int(np.count_nonzero(lengths == capacity))
    row[order[:full]] = np.arange(full)
    rows = full
    # Rows by the room they have; bit r of `rooms` is set where there is one with room for r.
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for piece in order[full:].tolist():
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            chosen, room, rows = rows, capacity, rows + 1
        row[piece], offset[piece] = chosen, capacity - room
        with_room[room - length].append(chosen)
        if room > length:
            rooms |= 1 << (room - length)
    _, first = np.unique(row, return_index=True)
    number = np.empty(rows, np.int64)
    number[np.argsort(first)] = np.arange(rows)
    return Placement(number[row], offset, rows)
