"""What a step tells about itself, read when it has arrived from the device.

On a GPU the figures of a step are copied while the next one is computed, and read one step late:
the processor hands out work without waiting for results.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gptcli.model.gpt import GPT
from gptcli.runs.tensors import local
from gptcli.training.parallel import sharded
from gptcli.training.stability import Limits

_WATCHED = ("attn.qkv.weight", "mlp.up.weight", "lora_a")


@dataclass(frozen=True)
class Reading:
    """Figures of the update `step` (its number after it). Loss in nats per token, `grad_norm`
    before clipping, `lr_ratio` of the peak rates; `limits` are those that it was judged by;
    `position` is where in the data its batch begins (None: at their beginning)."""

    step: int
    lr_ratio: float
    limits: Limits
    loss: float
    grad_norm: float
    applied: bool
    update_ratio: float | None  # norm of the change over norm of the weights, where measured
    position: dict[str, Any] | None = None


@dataclass(frozen=True)
class _OnItsWay:
    step: int
    lr_ratio: float
    limits: Limits
    values: Tensor  # (4,) fp32 on the CPU: loss, gradient norm, applied, update ratio
    measured: bool
    copied: torch.cuda.Event | None
    position: dict[str, Any] | None


class Readings:
    """Figures of the last steps in order; each can be read when `lag` more steps were begun."""

    def __init__(self, lag: int) -> None:
        self.lag = lag
        self.last: Reading | None = None
        self._waiting: deque[_OnItsWay] = deque()

    @property
    def waiting(self) -> bool:
        """Whether the last step's figures are still to be read."""
        return bool(self._waiting)

    def add(
        self,
        step: int,
        lr_ratio: float,
        limits: Limits,
        loss: Tensor,
        grad_norm: Tensor,
        applied: Tensor,
        update_ratio: Tensor | None,
        position: dict[str, Any] | None = None,
    ) -> None:
        """Send off a step's figures: scalars on one device. Waits for nothing."""
        ratio = update_ratio if update_ratio is not None else torch.zeros_like(loss)
        values = torch.stack([loss.float(), grad_norm.float(), applied.float(), ratio.float()])
        copied = None
        if values.is_cuda:
            pinned = torch.empty(values.shape, pin_memory=True)
            values = pinned.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        measured = update_ratio is not None
        sent = _OnItsWay(step, lr_ratio, limits, values, measured, copied, position)
        self._waiting.append(sent)

    def arrived(self, lag: int | None = None) -> list[Reading]:
        """Take out the readings that are `lag` (default: this one's own) steps old; 0: all."""
        keep = self.lag if lag is None else lag
        found = [_read(self._waiting.popleft()) for _ in range(len(self._waiting) - keep)]
        self.last = found[-1] if found else self.last
        return found


def reading_lag(device_kind: str, precision: str, spike: str) -> int:
    """Steps by which readings are late: 1 on a GPU, so that the step never waits for it.

    0 where the next step needs them: fp16 sets its loss scale by them, a rollback its weights.
    """
    return 1 if device_kind == "cuda" and precision != "fp16" and spike != "rollback" else 0


def watched_weights(model: GPT) -> list[Tensor]:
    """Copies of two matrices that learn and stand for all: what enters the first block's attention
    and the last block's feed-forward layer. No preset initialises them to zero. With adapters, the
    first and the last A; where no block learns, the first and the last matrix that does."""
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad and p.ndim == 2}
    hidden = [p for n, p in learning.items() if n.endswith(_WATCHED)] or list(learning.values())
    return [local(w).detach().clone() for w in (hidden[0], hidden[-1])]


def update_ratio(old: list[Tensor], model: GPT) -> Tensor:
    """Norm of the change of the watched weights since `old` over the norm of `old`, a scalar on
    their device. About 1e-3 is usual for Adam; Muon moves matrices farther."""
    new = watched_weights(model)
    changes = [now - was for now, was in zip(new, old, strict=True)]
    figures = torch.stack([_norm(changes), _norm(old)])
    if sharded(model):
        figures = figures**2
        dist.all_reduce(figures)
        figures = figures.sqrt()
    return figures[0] / figures[1]


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))


def _read(sent: _OnItsWay) -> Reading:
    if sent.copied is not None:
        sent.copied.synchronize()
    loss, grad_norm, applied, ratio = sent.values.tolist()
    return Reading(
        sent.step,
        sent.lr_ratio,
        sent.limits,
        loss,
        grad_norm,
        bool(applied),
        ratio if sent.measured else None,
        sent.position,
    )
