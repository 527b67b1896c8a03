"""Low-rank adapters (Hu et al. 2021): W x + b + (alpha / rank) B A x, of which A and B learn.

The names of the base's tensors stay (blocks.0.attn.qkv.weight); beside them are those of the
adapter (blocks.0.attn.qkv.lora_a, blocks.0.attn.qkv.lora_b).

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
from gptcli.model.gpt import GPT

_LEVELS = 127  # magnitudes of an int8 number, symmetric
_HEAD = "task_head."


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
            y: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
                x, self.weight, self.scale, self.bias, self.lora_a, self.lora_b, self.factor
            )
            return y
        if self.scale is None:
            y = F.linear(x, self.weight, self.bias)
        else:
            y = _Int8Linear.apply(x, self.weight, self.scale)  # type: ignore[no-untyped-call]
            y = y if self.bias is None else y + self.bias
        low = F.linear(F.dropout(x, dropout), self.lora_a)
        return y + F.linear(low, self.lora_b) * self.factor

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same, of fp32; int8 weights are the rounded ones."""
        outputs, inputs = self.weight.shape
        linear = nn.Linear(inputs, outputs, bias=self.bias is not None, device="meta")
        change = self.lora_b.double() @ self.lora_a.double() * self.factor
        weight = _widened(self.weight, self.scale).double() + change  # rounded once
        linear.weight = nn.Parameter(weight.float())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach())
        return linear


def add_lora(model: GPT, settings: LoraConfig, generator: torch.Generator) -> None:
    """Freeze the weights of an fp32 `model` and give it adapters, in place.

    Drawn on the CPU from `generator`, layer by layer, so that every device starts alike.
    """
    model.requires_grad_(False)
    for name in _layers(model, settings):
        place, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(place), child, LoraLinear(linear, settings, generator))


def merge_lora(model: GPT) -> None:
    """Put plain layers in the place of those with adapters: the model computes the same, and all
    of its weights can learn again."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear):
            place, _, child = name.rpartition(".")
            setattr(model.get_submodule(place), child, layer.merged())
    model.requires_grad_(True)


def adapter_shapes(model: GPT, settings: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of what `add_lora` would give `model`, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _layers(model, settings):
        outputs, inputs = model.get_parameter(f"{name}.weight").shape
        shapes[f"{name}.lora_a"] = (settings.rank, inputs)
        shapes[f"{name}.lora_b"] = (outputs, settings.rank)
    return shapes


def has_lora(model: GPT) -> bool:
    """Whether the model has adapters that are not merged."""
    return any(isinstance(module, LoraLinear) for module in model.modules())


def adapter_tensors(model: GPT) -> dict[str, Tensor]:
    """What a run with adapters learns, by name: the adapters, and a task head where there is one.

    They are the model's own memory.
    """
    own = ("lora_a", "lora_b")
    state = model.state_dict()
    return {n: t for n, t in state.items() if n.endswith(own) or n.startswith(_HEAD)}


def _layers(model: GPT, settings: LoraConfig) -> list[str]:
    chosen = sorted(set(settings.layers))
    return [f"blocks.{layer}.{name}" for layer in range(model.config.n_layer) for name in chosen]


class _LoraLinear(torch.autograd.Function):
    """The whole layer in fp32 on the CPU: few passes over memory, and no gradient of the base."""

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
    ) -> Tensor:
        rows = x.reshape(-1, x.size(-1))  # (N, I)
        low = rows @ a.T  # (N, R)
        y = F.linear(rows, _widened(weight, scale), bias)
        y.addmm_(low, b.T, alpha=factor)
        ctx.save_for_backward(x, weight, scale, a, b, low)
        ctx.factor = factor
        return y.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, a, b, low = ctx.saved_tensors
        g = grads[0].reshape(-1, len(weight))  # (N, O)
        by_b = (low.T @ g).T.mul(ctx.factor)
        by_low = (g @ b).mul_(ctx.factor)  # (N, R)
        by_a = by_low.T @ x.reshape(-1, x.size(-1))
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = g @ _widened(weight, scale)
            by_x = by_x.addmm_(by_low, a).view_as(x)
        return by_x, None, None, None, by_a, by_b, None


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
