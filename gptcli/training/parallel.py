"""One step by several processes: which rows are whose, and how gradients come together.

The rows of a step are those that one process would train on, in the same order: each process reads
them all and computes its part, so the number of processes changes nothing but the rounding. A
step's loss is a sum over rows, divided by what the whole step scores; so is its gradient.

DDP (Li et al. 2020) keeps the whole model in each process, FSDP2 (Zhao et al. 2023) a share of the
rows of each of its tensors, and gathers a block when it computes.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptcli import world
from gptcli.data.rows import StepBatch
from gptcli.device import DTYPES
from gptcli.model.gpt import GPT, initial_values
from gptcli.runs.tensors import local
from gptcli.training.objective import LossOf

Strategy = Literal["one", "ddp", "fsdp"]


def micro_batches(rows: int, size: int, here: world.World) -> Iterator[tuple[slice, float]]:
    """This process's part of `rows` rows in micro batches of at most `size`, each with its weight.

    All processes have as many, because each takes part in exchanges: who has fewer rows computes
    one again with the weight 0.
    """
    most = -(-rows // here.size)
    shares = [rows // here.size + (rank < rows % here.size) for rank in range(here.size)]
    start = sum(shares[: here.rank])
    stop = start + shares[here.rank]
    for first in range(start, start + most, size):
        if first < stop:
            yield slice(first, min(first + size, stop)), 1.0
        else:
            yield slice(0, 1), 0.0


@dataclass
class Parallel:
    """How the processes of this run share a step; `one` is alone."""

    strategy: Strategy = "one"
    here: world.World = field(default_factory=world.current)
    _wrapped: nn.Module | None = field(default=None, init=False)

    @property
    def sharded(self) -> bool:
        """Whether each process has a share of the model only."""
        return self.strategy == "fsdp"

    def loss_of(self, loss_of: LossOf, model: GPT, device: torch.device, *, partly: bool) -> LossOf:
        """`loss_of`, after whose backward pass gradients are those of all processes together.
        `partly`: not every parameter that learns takes part in it."""
        if self.strategy != "ddp":
            return loss_of
        with warnings.catch_warnings():
            # What broadcast_buffers is to be called in newer torch, older ones do not know.
            warnings.simplefilter("ignore", FutureWarning)
            self._wrapped = nn.parallel.DistributedDataParallel(
                _Loss(model, loss_of),
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=partly,
            )
        return self._wrapped

    @contextmanager
    def gradients(self, model: GPT, *, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro batch: gradients are exchanged at the `last`."""
        if isinstance(self._wrapped, nn.parallel.DistributedDataParallel):
            with nullcontext() if last else self._wrapped.no_sync():
                yield
            return
        if self.sharded:
            model.set_is_last_backward(last)  # type: ignore[operator]
        yield

    def backward(self, loss: Tensor) -> None:
        """Both engines take the mean over the processes, but shares of a loss add up."""
        torch.autograd.backward(loss * self.here.size if self.strategy != "one" else loss)

    def total(self, share: Tensor) -> Tensor:
        """The sum of a scalar over the processes."""
        if self.strategy != "one":
            dist.all_reduce(share)
        return share


class _Loss(nn.Module):
    """A loss as a module, which is what DDP wraps."""

    def __init__(self, model: GPT, loss_of: LossOf) -> None:
        super().__init__()
        self.model, self.loss_of = model, loss_of

    def forward(self, rows: StepBatch, step: StepBatch) -> Tensor:
        return self.loss_of(rows, step)


def shard(model: GPT, device: torch.device, precision: str) -> None:
    """Leave to this process its share of each of the model's tensors, on `device`.

    A model on the meta device has memory for the shares afterwards, and nothing in it yet. Matrix
    products are in `precision`, gradients are added up in fp32. The methods that read all of the
    model gather each block as they come to it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(device.type, (world.current().size,))
    dtype = DTYPES[precision]
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if dtype != torch.float32 else None, reduce_dtype=torch.float32
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in ("loss", "hidden"):
        register_fsdp_forward_method(model, method)
    if model.device.type == "meta":
        model.to_empty(device=device)
        if model.config.tie_embeddings:
            model.head.weight = model.wte.weight  # two parameters were made of them
        model.reset_positions()


@torch.no_grad()
def draw_shares(model: GPT, generator: torch.Generator) -> None:
    """Give a sharded model the first weights that `initialise` gives to a whole one."""
    here = world.current()
    for parameter, value in initial_values(model, generator):
        share = local(parameter)
        first = here.rank * -(-value.size(0) // here.size)
        share.copy_(value[first : first + share.size(0)])


def sharded(model: GPT) -> bool:
    """Whether this process has a share of the model's tensors only."""
    return hasattr(model, "reshard")


def like(share: Tensor, whole: Tensor) -> Tensor:
    """`share` as the share of a tensor that is cut as `whole` is; where that is not cut, itself."""
    if not hasattr(whole, "to_local") or share.ndim == 0:
        return share
    from torch.distributed.tensor import DTensor  # half a second, which most runs do without

    assert isinstance(whole, DTensor)
    return DTensor.from_local(
        share,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
