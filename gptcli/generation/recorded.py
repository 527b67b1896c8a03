"""Steps of decoding that are recorded once and then repeated: as CUDA graphs on a GPU, as a traced
program on a CPU.

A step of few tokens is short. On a GPU, to launch its hundreds of kernels one by one takes longer
than they do; on a CPU Python itself takes a third of a step of GPT-2 124M in int8 (14.2 ms against
9.3 recorded, one row, two AVX2 cores). The GPU part is written to PyTorch's documentation.
"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gptcli.model.batch_cache import BatchCache
from gptcli.model.gpt import GPT

# A recorded step attends to a fixed number of keys, masked where there are none yet: room for so
# many tokens more, which is how often another one is recorded. On a CPU, rows of one length in
# layers without windows need neither: there one program attends to as many keys as there are.
_ROOM_TOKENS = {"cuda": 256, "cpu": 512}
# Steps of one kind still to come from which on recording pays: it takes about as long as 50 steps
# save on a CPU, and milliseconds on a GPU.
_LEAST_STEPS = {"cuda": 16, "cpu": 80}
# Steps of one kind in a row before it is recorded: where texts end one after another, the number of
# rows changes with nearly every step, and none would be used again.
_FIRST_STEPS = 8
_CAN_TRACE = sys.version_info < (3, 14)  # which torch.jit does not know
# Programs of a model, but for those of one row, which may always be recorded. One takes 30 MB where
# there are 12 layers, and torch never gives that back: a server sees all numbers of rows in time.
_MOST_TRACED = 16
_WARM_UP_STEPS = 3  # of a CUDA graph, as its documentation has it

# Rows, tokens a row, room (0: any, of rows of one length), whether the rows share their beginning.
_Shape = tuple[int, int, int, bool]
_traced: WeakKeyDictionary[GPT, dict[_Shape, Any]] = WeakKeyDictionary()


class RecordedSteps:
    """The steps of `model` with `cache`, recorded when they come often and repeated afterwards."""

    def __init__(self, model: GPT, cache: BatchCache, rows: int, capacity: int) -> None:
        """`rows` and `capacity` are those of the cache."""
        self._model, self._cache, self._rows, self._capacity = model, cache, rows, capacity
        self._kind = model.device.type
        self._graphs: dict[_Shape, _Graph] = {}
        self._shape, self._in_a_row = (0, 0, 0, False), 0
        self._pool: Any = None  # one memory for all graphs: they never run together

    def fit(self, lengths: Sequence[int], count: int, shared: int, steps: int) -> bool:
        """Whether this step and `steps` more like it are worth recording, after some that were not,
        and can be: with rotations from the model's table, as others are copied from the host. To be
        asked once a step."""
        if self._kind not in _LEAST_STEPS or (self._kind == "cpu" and not _CAN_TRACE):
            return False
        table = self._model.positions.size(1) if self._model.config.position == "rope" else None
        room = self._room(lengths, count)
        if table is not None and max(room, max(lengths) + count) > table:
            return False
        shape = (self._recorded_rows(len(lengths)), count, room, bool(shared and not room))
        self._in_a_row = self._in_a_row + 1 if shape == self._shape else 1
        self._shape = shape
        traced = _traced.get(self._model, {})
        if shape in self._graphs or shape in traced:
            return True
        if len(traced) >= _MOST_TRACED and len(lengths) > 1:
            return False
        return self._in_a_row > _FIRST_STEPS and steps >= _LEAST_STEPS[self._kind]

    def step(self, tokens: Tensor, lengths: Sequence[int], shared: int) -> Tensor:
        """Logits (R, T, V) after `tokens` (R, T), valid until the next step of that shape. Of the
        `lengths` tokens (R,) that the rows hold the first `shared` are the same."""
        room = self._room(lengths, tokens.size(1))
        if self._kind == "cuda":
            return self._replay(tokens, lengths, room)
        traced = _traced.setdefault(self._model, {})
        shape = (*tokens.shape, room, bool(shared and not room))
        numbers = [tokens, _positions(lengths, tokens.size(1))]
        if shape[-1]:
            numbers.append(torch.tensor(shared))
        given = (*numbers, *self._cache.k, *self._cache.v)
        if shape not in traced:
            traced[shape] = _trace(self._model, room, shape[-1], given)
        # Optimising takes seconds and gains nothing.
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            logits: Tensor = traced[shape](*given)
        return logits

    def _room(self, lengths: Sequence[int], count: int) -> int:
        longest = max(lengths) + count
        alike = count == 1 and min(lengths) == max(lengths)
        if self._kind == "cpu" and alike and not any(self._model.windows):
            return 0
        return min(longest + -longest % _ROOM_TOKENS[self._kind], max(self._capacity, longest))

    def _recorded_rows(self, rows: int) -> int:
        """On a GPU, where more rows take no longer, up to the next power of two: few graphs."""
        return rows if self._kind == "cpu" else min(1 << (rows - 1).bit_length(), self._rows)

    def _replay(self, tokens: Tensor, lengths: Sequence[int], room: int) -> Tensor:
        rows, count = tokens.shape
        more = self._recorded_rows(rows) - rows  # what is in the cache above is no one's
        tokens = torch.cat([tokens, tokens[:1].expand(more, -1)])
        positions = _positions([*lengths, *[0] * more], count)
        shape = (rows + more, count, room, False)
        if shape not in self._graphs:
            self._graphs[shape] = self._record(tokens, positions, room)
        graph = self._graphs[shape]
        graph.tokens.copy_(tokens, non_blocking=True)
        graph.positions.copy_(positions, non_blocking=True)
        graph.graph.replay()
        return graph.logits[:rows]

    def _record(self, tokens: Tensor, positions: Tensor, room: int) -> "_Graph":
        device = self._model.device
        ids, places = tokens.to(device), positions.to(device)
        self._cache.begin_at(places, room)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(
                _WARM_UP_STEPS
            ):  # they store the keys that the first replay stores again
                self._model(ids, self._cache)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._model(ids, self._cache)
        return _Graph(graph, ids, places, logits)


@dataclass(frozen=True)
class _Graph:
    """A recorded step with the places of what goes in and comes out."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor  # (R, T)
    positions: Tensor  # (R, T)
    logits: Tensor  # (R, T, V)


class _Step(nn.Module):
    """A step as a function of tensors alone: tokens, positions, with `sharing` how many of the
    tokens before are shared, and the keys and values of all layers."""

    def __init__(self, model: GPT, room: int, sharing: bool) -> None:
        super().__init__()
        self.model, self.room, self.sharing = model, room, sharing
        self.eval()

    def forward(self, tokens: Tensor, positions: Tensor, *rest: Tensor) -> Tensor:
        """(R, T), (R, T), (), (rows, K, slots, D) x 2 n_layer -> logits (R, T, V)."""
        shared, kept = (rest[0], rest[1:]) if self.sharing else (None, rest)
        layers = len(kept) // 2
        cache = BatchCache.over(kept[:layers], kept[layers:])
        if self.room:
            cache.begin_at(positions, self.room)
        else:
            cache.begin_alike(positions, shared)
        logits: Tensor = self.model(tokens, cache)
        return logits


def _trace(model: GPT, room: int, sharing: bool, given: tuple[Tensor, ...]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that are constants: they are meant to be
        return torch.jit.trace(  # type: ignore[no-untyped-call]
            _Step(model, room, sharing), given, check_trace=False, _store_inputs=False
        )


def _positions(lengths: Sequence[int], count: int) -> Tensor:
    return torch.tensor(lengths)[:, None] + torch.arange(count)
