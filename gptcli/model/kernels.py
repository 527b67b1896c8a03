"""Parts of a block in fp32 on the CPU, their gradients written out.

PyTorch composes these of many small steps there, each a pass over memory, and keeps what each of
them made for the backward. Here that needs few passes and what goes in is all that is kept. They
stand in for the composed forms where `fits` says so, in training, evaluation and generation;
elsewhere PyTorch has kernels or a compiler of its own. Gradients cannot be differentiated again.

Legend of shapes: N rows (batch x time), C width, G heads, D head size, F feed-forward width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def fits(x: Tensor) -> bool:
    """Whether `x` is of the kind that these functions are for."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019); x (..., C)."""
    y: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def silu_gate(h: Tensor) -> Tensor:
    """silu(gate) * value of h = (gate, value) along the last axis (Shazeer 2020).

    (..., 2 F) -> (..., F).
    """
    y: Tensor = _SiluGate.apply(h)  # type: ignore[no-untyped-call]
    return y


def gate_forward(h: Tensor) -> Tensor:
    """`silu_gate` without a gradient, for functions that have one of their own."""
    gate, value = h.chunk(2, dim=-1)
    return F.silu(gate).mul_(value)


def gate_backward(h: Tensor, by_y: Tensor) -> Tensor:
    """The gradient by h (..., 2 F) of `silu_gate`, from that by what it gave (..., F)."""
    gate, value = h.chunk(2, dim=-1)
    by_h = torch.empty_like(h)
    by_gate, by_value = by_h.chunk(2, dim=-1)
    torch.mul(F.silu(gate), by_y, out=by_value)
    torch.ops.aten.silu_backward.grad_input(by_y * value, gate, grad_input=by_gate)
    return by_h


def norm_and_rotate(
    qkv: Tensor, weights: Tensor, rope: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """QK-norm (Henry et al. 2020) and rotary positions (Su et al. 2021) out of one projection.

    qkv (B, T, (G + K) D): G query and key heads, then K value heads; weights (G, D), those of the
    norms; rope (2, T, D/2) or (2, B, T, D/2), cosines and sines. Gives the queries and keys
    (B, T, G, D), and the values (B, T, K, D).
    """
    qk, v = _NormRotate.apply(qkv, weights, rope, eps)  # type: ignore[no-untyped-call]
    return qk, v


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    """(..., C) -> (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rms = _reciprocal_rms(x, eps)
        ctx.save_for_backward(x, weight, rms)
        return torch.mul(x, rms).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rms = ctx.saved_tensors
        width, mask = x.size(-1), [True, ctx.needs_input_grad[1], False]
        g, x, rms = grads[0].reshape(-1, width), x.reshape(-1, width), rms.view(-1, 1)
        # A layer norm whose mean is 0 differs from this one by the mean of g * weight alone.
        by_x, by_weight, _ = torch.ops.aten.native_layer_norm_backward(
            g, x, [width], torch.zeros_like(rms), rms, weight, None, mask
        )
        by_x.addcmul_(rms, (g @ weight)[:, None], value=1 / width)
        return by_x.view_as(grads[0]), by_weight, None


class _SiluGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return gate_forward(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return gate_backward(h, grads[0])


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, weights: Tensor, rope: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        heads = torch.unflatten(qkv, -1, (-1, weights.size(-1)))  # (B, T, G + K, D)
        x, v = heads[:, :, : len(weights)], heads[:, :, len(weights) :]
        rms = _reciprocal_rms(x, eps)
        ctx.save_for_backward(x, weights, rms, rope)
        y = torch.mul(x, rms).mul_(weights)
        return _turned(y, rope, 1), v.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, rms, rope = ctx.saved_tensors
        heads, size = weights.shape
        by_qkv = x.new_empty(*x.shape[:2], heads + grads[1].size(2), size)
        by_qk = by_qkv[:, :, :heads]
        by_qkv[:, :, heads:] = grads[1]
        g = _turned(grads[0], rope, -1)  # by weights * normal
        normal = x * rms
        product = g * normal
        by_weights = product.sum((0, 1)) if ctx.needs_input_grad[1] else None
        mean = product.mul_(weights).sum(-1, keepdim=True).div_(size)
        g.mul_(weights).addcmul_(normal, mean, value=-1)
        torch.mul(g, rms, out=by_qk)
        return by_qkv.flatten(2), by_weights, None, None


def _turned(x: Tensor, rope: Tensor, direction: int) -> Tensor:
    """Pairs (i, i + D/2) of x (B, T, G, D) turned by their angles, or back; contiguous."""
    cos, sin = rope.unsqueeze(-2)  # (T, 1, D/2) or (B, T, 1, D/2)
    y = torch.mul(x, torch.cat([cos, cos], -1))
    (a, b), (to_a, to_b) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    to_a.addcmul_(b, sin, value=-direction)
    to_b.addcmul_(a, sin, value=direction)
    return y
