"""A frozen linear layer with a low-rank adapter: W x + b + (alpha / rank) B A x, of which A and B
learn (Hu et al. 2021).

Legend of shapes: N rows (batch x time), I inputs, O outputs, R rank.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gptcli.config.finetune_schema import LoraConfig
from gptcli.model import kernels

_LEVELS = 127  # magnitudes of an int8 number, symmetric


class LoraLinear(nn.Module):
    """A linear layer whose weights are frozen, with an adapter that learns."""

    weight: nn.Parameter  # (O, I), fp32, or int8 with `scale`
    scale: Tensor | None  # (O,) fp32
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, settings: LoraConfig, generator: torch.Generator) -> None:
        """Take over the tensors of `linear`; with `settings.quantize`, its weights as int8.

        A is drawn as torch draws a linear layer, from U(-1, 1) / sqrt(I), which is what peft does,
        and B is 0: at first the adapter changes nothing.
        """
        super().__init__()
        weight = linear.weight.detach()
        outputs, inputs = weight.shape
        scale = None
        if settings.quantize == "int8":
            weight, scale = _int8_rows(weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale)
        bias: Tensor | None = linear.bias  # nn.Linear says Tensor
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        drawn = torch.empty(settings.rank, inputs).uniform_(-1.0, 1.0, generator=generator)
        self.lora_a = nn.Parameter(drawn.div_(math.sqrt(inputs)).to(weight.device))
        self.lora_b = nn.Parameter(torch.zeros(outputs, settings.rank, device=weight.device))
        self.factor, self.dropout = settings.alpha / settings.rank, settings.dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        dropout = self.dropout if self.training else 0.0
        if kernels.fits(x) and not dropout:
            return self._fused(x, gated=False)
        if self.scale is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = _Int8Linear.apply(x, self.weight, self.scale)  # type: ignore[no-untyped-call]
            y = y if self.bias is None else y + self.bias
        low = F.linear(F.dropout(x, dropout), self.lora_a)
        return y + F.linear(low, self.lora_b) * self.factor

    def of_gated(self, h: Tensor) -> Tensor:
        """The layer of `kernels.silu_gate(h)`, h (..., 2 I), where `kernels.fits` h.

        What the gate gives is not kept for the backward but computed again.
        """
        if self.dropout and self.training:
            return self(kernels.silu_gate(h))
        return self._fused(h, gated=True)

    def _fused(self, x: Tensor, gated: bool) -> Tensor:
        own = (self.weight, self.scale, self.bias, self.lora_a, self.lora_b)
        y: Tensor = _LoraLinear.apply(x, *own, self.factor, gated)  # type: ignore[no-untyped-call]
        return y

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same, of fp32; int8 weights are the rounded ones."""
        outputs, inputs = self.weight.shape
        linear = nn.Linear(inputs, outputs, bias=self.bias is not None, device="meta")
        home = self.weight.device
        exact = torch.device("cpu") if home.type == "mps" else home  # which has no float64
        a, b = self.lora_a.to(exact).double(), self.lora_b.to(exact).double()
        whole = _widened(self.weight, self.scale).to(exact).double()
        weight = whole.addmm_(b, a, alpha=self.factor)  # rounded once
        linear.weight = nn.Parameter(weight.float().to(home))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach())
        return linear


class _LoraLinear(torch.autograd.Function):
    """The whole layer in fp32 on the CPU: few passes over memory, and no gradient of the base.

    What goes in is x, or where the layer is `gated` what a gate makes x of.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        factor: float,
        gated: bool,
    ) -> Tensor:
        rows = x.reshape(-1, x.size(-1))
        rows = kernels.gate_forward(rows) if gated else rows  # (N, I)
        low = rows @ a.T  # (N, R)
        y = F.linear(rows, _widened(weight, scale), bias)
        y.addmm_(low, b.T, alpha=factor)
        ctx.save_for_backward(x, weight, scale, a, b, low)
        ctx.factor, ctx.gated = factor, gated
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, a, b, low = ctx.saved_tensors
        g = grads[0].reshape(-1, len(weight))  # (N, O)
        by_b = (low.T @ g).T.mul(ctx.factor)
        by_low = (g @ b).mul_(ctx.factor)  # (N, R)
        rows = x.reshape(-1, x.size(-1))
        by_a = by_low.T @ (kernels.gate_forward(rows) if ctx.gated else rows)
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = (g @ _widened(weight, scale)).addmm_(by_low, a)
            by_x = kernels.gate_backward(rows, by_x) if ctx.gated else by_x
            by_x = by_x.view_as(x)
        return by_x, None, None, None, by_a, by_b, None, None


class _Int8Linear(torch.autograd.Function):
    """x W^T with int8 weights, which are widened for each product and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        kind = x.device.type
        mixed = torch.is_autocast_enabled(kind)
        ctx.compute = torch.get_autocast_dtype(kind) if mixed else x.dtype
        ctx.given = x.dtype
        return F.linear(x.to(ctx.compute), _widened(weight, scale).to(ctx.compute))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        by_x = grads[0].to(ctx.compute) @ _widened(weight, scale).to(ctx.compute)
        return by_x.to(ctx.given), None, None


def _int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers (O, I) int8 and scales (O,) fp32, whose product is nearest to each row."""
    scale = weight.abs().amax(1).float() / _LEVELS
    scale.masked_fill_(scale == 0, 1.0)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def _widened(weight: Tensor, scale: Tensor | None) -> Tensor:
    return weight if scale is None else weight.float().mul_(scale[:, None])
