"""Matrices that processes share, brought together where one has to be seen as a whole."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from gptcli import world

# Of whole matrices that a process has at a time. What it computes from them is some times as much.
_ROUND_BYTES = 2**24


@dataclass(frozen=True)
class Exchange:
    """Whole matrices for what has to see all of one, each at one of the processes.

    `shapes` are those of the whole matrices by name; `sharded` says that each process has a share
    of the rows of each, as torch.chunk would cut them, else each has all.
    """

    shapes: dict[str, tuple[int, int]]
    sharded: bool
    here: world.World
    device: torch.device

    @property
    def owners(self) -> dict[str, int]:
        """Who has the whole of each matrix; about as many numbers each."""
        held = [0] * self.here.size
        found = {}
        for name in sorted(self.shapes, key=lambda n: (-_size(self.shapes[n]), n)):
            found[name] = held.index(min(held))
            held[found[name]] += _size(self.shapes[name])
        return found

    def rounds(self) -> "list[Exchange]":
        """Exchanges of some of the matrices each, neighbours in the model, so that a process that
        has shares of them never has many as a whole."""
        if not self.sharded:
            return [self]
        found: list[dict[str, tuple[int, int]]] = [{}]
        held = 0
        for name, shape in self.shapes.items():
            size = 4 * _size(shape)
            if held and held + size > _ROUND_BYTES * self.here.size:
                found.append({})
                held = 0
            found[-1][name] = shape
            held += size
        return [replace(self, shapes=shapes) for shapes in found]

    def mine(self) -> list[str]:
        """The matrices that this process has as a whole."""
        return [name for name, owner in self.owners.items() if owner == self.here.rank]

    def whole(self, shares: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the shares of all matrices, this process's own ones as a whole."""
        if not self.sharded:
            return {name: shares[name] for name in self.mine()}
        sent = torch.cat([shares[name].flatten() for name in self._by_owner()])
        received = sent.new_empty(sum(_size(self.shapes[name]) for name in self.mine()))
        gives, takes = self._sizes()
        dist.all_to_all_single(received, sent, takes, gives)
        del sent
        parts: dict[str, list[Tensor]] = {name: [] for name in self.mine()}
        for rank, piece in enumerate(torch.split(received, takes)):
            sizes = [self._height(name, rank) * self.shapes[name][1] for name in parts]
            for name, part in zip(parts, torch.split(piece, sizes), strict=True):
                parts[name].append(part.view(-1, self.shapes[name][1]))
        return {name: torch.cat(found) for name, found in parts.items()}

    def shares(self, wholes: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the whole matrices of each process, this one's share of all of them."""
        if not self.sharded:
            return self._everywhere(wholes)
        mine = self.mine()
        pieces = []
        for rank in range(self.here.size):
            for name in mine:
                before = sum(self._height(name, r) for r in range(rank))
                pieces.append(wholes[name][before : before + self._height(name, rank)].flatten())
        gives, takes = self._sizes()
        sent = torch.cat(pieces) if pieces else torch.empty(0, device=self.device)
        received = sent.new_empty(sum(gives))
        dist.all_to_all_single(received, sent, gives, takes)
        order = self._by_owner()
        sizes = [self._height(name, self.here.rank) * self.shapes[name][1] for name in order]
        found = zip(order, torch.split(received, sizes), strict=True)
        return {name: piece.view(-1, self.shapes[name][1]) for name, piece in found}

    def _everywhere(self, wholes: dict[str, Tensor]) -> dict[str, Tensor]:
        order, owners = self._by_owner(), self.owners
        counts = [0] * self.here.size
        for name in order:
            counts[owners[name]] += _size(self.shapes[name])
        mine = [wholes[name].flatten() for name in order if name in wholes]
        own = torch.cat(mine) if mine else torch.empty(0, device=self.device)
        sent = own.new_zeros(max(counts))
        sent[: own.numel()] = own
        received = own.new_empty(self.here.size * max(counts))
        dist.all_gather(list(torch.split(received, max(counts))), sent)
        found, places = {}, [rank * max(counts) for rank in range(self.here.size)]
        for name in order:
            begin = places[owners[name]]
            places[owners[name]] += _size(self.shapes[name])
            found[name] = received[begin : places[owners[name]]].view(self.shapes[name])
        return found

    def _by_owner(self) -> list[str]:
        owners = self.owners
        return sorted(owners, key=lambda name: owners[name])

    def _sizes(self) -> tuple[list[int], list[int]]:
        """How many numbers of its shares this process gives to each, and takes from each."""
        gives, owners, rank = [0] * self.here.size, self.owners, self.here.rank
        for name, owner in owners.items():
            gives[owner] += self._height(name, rank) * self.shapes[name][1]
        takes = [
            sum(self._height(name, r) * self.shapes[name][1] for name in self.mine())
            for r in range(self.here.size)
        ]
        return gives, takes

    def _height(self, name: str, rank: int) -> int:
        """Rows of a matrix that are the share of `rank`."""
        rows = self.shapes[name][0]
        each = -(-rows // self.here.size)
        return max(0, min(rows, (rank + 1) * each) - rank * each)


def _size(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
