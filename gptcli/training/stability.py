"""Spikes: a loss or gradient norm far above the recent ones, judged by its z-score.

A z-score is the distance from the recent mean in recent standard deviations. Mean and variance are
exponentially weighted (Finch 2009, "Incremental calculation of weighted mean and variance"), so
they follow a falling loss and need no window of old values.
"""

import math
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor

from gptcli.data.position import Count

_RECENT_STEPS = 50  # about how far back "recent" reaches, and how many values come before a verdict
# Of the mean: the least standard deviation, for losses that hardly differ from step to step.
_LEAST_DEVIATION = 0.01
_LEAST_NATS = 0.01  # the same for a loss near 0, of which a share is next to nothing
# What a field may hold, which `saved.read_resumable` checks: losses and norms are never below 0.
_Limit: TypeAlias = Annotated[float, Field(strict=True, ge=0)]
_Figure: TypeAlias = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Limits:
    """Above either, a step is a spike. Loss in nats per token, norm before clipping."""

    loss: _Limit = math.inf
    grad_norm: _Limit = math.inf

    def spike(self, loss: float, grad_norm: float) -> bool:
        """Whether finite figures are a spike."""
        return loss > self.loss or grad_norm > self.grad_norm


@dataclass(frozen=True)
class Recent:
    """Exponentially weighted mean and variance of `count` values; plain ones of the first 50."""

    mean: _Figure = 0.0
    variance: _Figure = 0.0
    count: Count = 0

    def having(self, value: float) -> "Recent":
        """These figures with one more value, which must be finite."""
        weight = max(1 / (self.count + 1), 1 / _RECENT_STEPS)
        difference = value - self.mean
        change = weight * difference
        variance = (1 - weight) * (self.variance + difference * change)
        return Recent(self.mean + change, variance, self.count + 1)

    def limit(self, zscore: float, least: float = 0.0) -> float:
        """The value at `zscore`, the standard deviation being `least` or more; infinity before
        there are enough values to judge by."""
        if self.count < _RECENT_STEPS:
            return math.inf
        share = _LEAST_DEVIATION * abs(self.mean)
        return self.mean + zscore * max(math.sqrt(self.variance), share, least)


@dataclass(frozen=True)
class Watch:
    """Recent losses and gradient norms up to a step.

    A step is judged by what was known two steps before it. On a GPU the figures of the step just
    before are still on their way when it begins, and when a figure is read must not decide what is
    trained. So `before` keeps the limits from before the last step was seen.
    """

    loss: Recent = Recent()
    grad_norm: Recent = Recent()
    before: Limits = Limits()

    @classmethod
    def from_json(cls, saved: dict[str, dict[str, float]]) -> "Watch":
        """What `dataclasses.asdict` gave."""
        loss, grad_norm = saved["loss"], saved["grad_norm"]
        return cls(_recent(loss), _recent(grad_norm), Limits(**saved["before"]))

    def limits(self, zscore: float) -> Limits:
        """The limits for the step after the next one."""
        return Limits(self.loss.limit(zscore, _LEAST_NATS), self.grad_norm.limit(zscore))

    def having(self, loss: float, grad_norm: float, judged: Limits, zscore: float) -> "Watch":
        """The watch after one more step, which was `judged` by these limits.

        A spike counts as its limit: a jump that stays becomes usual, one that does not hardly moves
        the mean. A step that is not finite leaves the figures as they are.
        """
        before = self.limits(zscore)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return Watch(self.loss, self.grad_norm, before)
        return Watch(
            self.loss.having(min(loss, judged.loss)),
            self.grad_norm.having(min(grad_norm, judged.grad_norm)),
            before,
        )


def applicable(loss: Tensor, grad_norm: Tensor, limits: Limits) -> Tensor:
    """Whether a step's update is to be applied: a bool scalar where `loss` and `grad_norm` (fp32
    scalars) are, without waiting for them. False where one is not finite or above its limit."""
    finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
    return finite & (loss <= limits.loss) & (grad_norm <= limits.grad_norm)


def _recent(saved: dict[str, float]) -> Recent:
    return Recent(saved["mean"], saved["variance"], int(saved["count"]))
