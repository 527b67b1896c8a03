"""Steps of decoding on a GPU as CUDA graphs: one call launches all kernels of a step.

A step of few tokens is short, and to launch its hundreds of kernels one by one takes longer than
they do. Written to PyTorch's documentation of torch.cuda.CUDAGraph.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcli.model.batch_cache import BatchCache
from gptcli.model.gpt import GPT

# A graph repeats the very same work, so it attends to a fixed number of keys, masked where there
# are none yet. It grows by this many tokens, which is how often another graph is recorded.
_ROOM_TOKENS = 256
_WARM_UP_STEPS = 3  # as that documentation has it


class GraphedSteps:
    """The steps of `model` with `cache`, recorded when they first come and replayed afterwards."""

    def __init__(self, model: GPT, cache: BatchCache, capacity: int) -> None:
        self._model, self._cache, self._capacity = model, cache, capacity
        self._graphs: dict[tuple[int, int, int], _Graph] = {}

    def fit(self, lengths: Sequence[int], count: int) -> bool:
        """Whether the step can be a graph: it must copy nothing from the host, as rotations beyond
        the model's table are."""
        table = self._model.positions.size(1) if self._model.config.position == "rope" else None
        return self._model.device.type == "cuda" and (
            table is None or self._room(lengths, count) <= table
        )

    def step(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits (R, T, V) after `tokens` (R, T), valid until the next step of that shape."""
        rows, count = tokens.shape
        room = self._room(lengths, count)
        graph = self._graphs.get((rows, count, room))
        if graph is None:
            graph = self._graphs[rows, count, room] = self._record(tokens, lengths, room)
        graph.tokens.copy_(tokens, non_blocking=True)
        graph.positions.copy_(_positions(lengths, count), non_blocking=True)
        graph.graph.replay()
        return graph.logits

    def _room(self, lengths: Sequence[int], count: int) -> int:
        longest = max(lengths) + count
        return min(longest + -longest % _ROOM_TOKENS, max(self._capacity, longest))

    def _record(self, tokens: Tensor, lengths: Sequence[int], room: int) -> "_Graph":
        device = self._model.device
        ids = tokens.to(device)
        positions = _positions(lengths, tokens.size(1)).to(device)
        self._cache.begin_at(positions, room)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(
                _WARM_UP_STEPS
            ):  # they store the keys that the first replay stores again
                self._model(ids, self._cache)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._model(ids, self._cache)
        return _Graph(graph, ids, positions, logits)


@dataclass(frozen=True)
class _Graph:
    """A recorded step with the places of what goes in and comes out."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # (R, T)
    positions: Tensor  # (R, T)
    logits: Tensor  # (R, T, V)


def _positions(lengths: Sequence[int], count: int) -> Tensor:
    return torch.tensor(lengths)[:, None] + torch.arange(count)
