"""Batches scored by several processes, each its part, with the figures of one process."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from gptcli import stop, world
from gptcli.evaluation.token_scores import TargetScores

B = TypeVar("B")
Scored = tuple[TargetScores, Tensor]


def in_turn(batches: Sequence[B], score: Callable[[B], Scored]) -> Iterator[Scored]:
    """The scores and targets of all `batches` in order, on every process.

    Each process computes every n-th batch, and all have as many turns: a model of which each has a
    share needs all of them for any batch. Raises `stop.Stopped`, for all at the same batch.
    """
    here = world.current()
    if here.size == 1:
        for batch in batches:
            stop.raise_if_requested()
            yield score(batch)
        return
    mine = []
    for turn in range(-(-len(batches) // here.size)):
        world.raise_if_stopped()
        number = turn * here.size + here.rank
        scored = score(batches[min(number, len(batches) - 1)])
        if number < len(batches):
            mine.append(scored)
    packed = [t for found, targets in mine for t in (*_tensors(found), targets)]
    everything = world.gathered_arrays(packed)
    for number in range(len(batches)):
        turn, rank = divmod(number, here.size)
        nats, likeliest, top, targets = everything[rank][4 * turn : 4 * turn + 4]
        yield TargetScores(nats, likeliest, top), targets


def _tensors(found: TargetScores) -> tuple[Tensor, Tensor, Tensor]:
    return found.nats.cpu(), found.likeliest.cpu(), found.top.cpu()
