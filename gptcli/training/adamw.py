"""AdamW (Loshchilov and Hutter 2019) by torch's kernels.

torch.optim.AdamW calls the same function, but its first use imports torch's compiler, which takes
a second or more of every start.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw


@dataclass
class Group:
    """Parameters that share a weight decay and a learning rate, `peak` at its highest."""

    params: list[Tensor]
    peak: float
    weight_decay: float


class AdamW:
    """`state` holds the averages and the count of updates of each parameter that had a gradient."""

    def __init__(
        self, groups: list[Group], betas: tuple[float, float], eps: float, *, fused: bool
    ) -> None:
        self.groups = groups
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        self._betas, self._eps, self._fused = betas, eps, fused

    @torch.no_grad()
    def step(self, ratio: float, found_inf: Tensor | None = None) -> None:
        """One update with every learning rate at `ratio` of its peak; none where `found_inf`, of
        fused kernels alone, is 1."""
        for group in self.groups:
            learning = [p for p in group.params if p.grad is not None]
            states = [self._state(p) for p in learning]
            adamw(
                learning,
                [p.grad for p in learning if p.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=self._fused,
                found_inf=found_inf,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=group.peak * ratio,
                weight_decay=group.weight_decay,
                eps=self._eps,
                maximize=False,
            )

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        if parameter not in self.state:
            device = parameter.device if self._fused else "cpu"
            self.state[parameter] = {
                "step": torch.zeros((), device=device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return self.state[parameter]
