"""Matrices in fewer bits or in another layout: layers that take the place of `nn.Linear` and
`nn.Embedding` in a model that only reads.

Decoding a few rows at a time is bound by reading the weights from memory, so weights of half or a
quarter of the bytes are read in half or a quarter of the time (as in Dettmers et al. 2022,
"LLM.int8()"). Activations stay in fp32 between the layers.

int8  weights with a scale for each output channel, activations with one for each row
fp16  fp16 weights, products in fp32
bf16  bf16 weights, products in bf16 or fp32, whichever is faster on this machine

On a CPU, where FBGEMM or oneDNN have packed kernels for them, those compute; elsewhere the weights
are widened for each product. On a GPU, fp16 and bf16 are simply the dtype of the whole model.

Legend of shapes: M rows, I inputs, O outputs, V vocabulary, C n_embd.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli import stop
from gptcli.errors import ConfigError
from gptcli.model.gpt import GPT
from gptcli.model.race import race

Kind = Literal["int8", "fp16", "bf16"]

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_LEVELS = 127  # magnitudes of an int8 number, symmetric
_ZERO = 128  # among unsigned numbers: -1, 0 and 1 are 1, 128 and 255
_RACED_ROWS = 4
_MOST_PACKERS = 4  # threads; each has a layer's weights in memory twice


def quantize(model: GPT, kind: Kind) -> None:
    """Make the layers of an fp32 `model` packed ones of `kind`, in place, for reading only.

    All linear layers, the head and the token embedding; norms, biases and learned positions stay as
    they are. The fp32 weights are freed one by one. ConfigError for weights that fp16 cannot hold,
    ValueError for a model of another dtype, `stop.Stopped`.
    """
    if model.dtype != torch.float32 or is_quantized(model):
        raise ValueError("only fp32 weights can be quantized")
    if kind == "fp16":
        _check_fp16(model)
    if kind != "int8" and model.device.type != "cpu":
        model.to(_HALVES[kind])
        model.reset_positions()  # in fp32 where they were
        return
    pack_linear = _packing(model, kind)

    def pack(name: str) -> nn.Module:
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            return pack_linear(layer)
        if kind == "int8":
            return CompactEmbedding(*int8_rows(model.wte.weight))
        return CompactEmbedding(model.wte.weight.detach().to(_HALVES[kind]))

    replace_layers(model, matrices(model), pack)


def is_quantized(model: GPT) -> bool:
    """Whether the model's matrices are packed ones, which cannot be trained or converted."""
    return not isinstance(model.wte, nn.Embedding)


def matrices(model: GPT) -> list[str]:
    """Names of the modules that `quantize` replaces, the head directly behind the embedding; a task
    head, which is small, stays as it is."""
    modules = model.named_modules()
    linear = [n for n, m in modules if isinstance(m, nn.Linear) and n != "task_head"]
    return ["wte", *sorted(linear, key=lambda name: name != "head")]


def replace_layers(model: GPT, names: Sequence[str], pack: Callable[[str], nn.Module]) -> None:
    """Put `pack(name)` in the place of each module such as blocks.0.attn.qkv.

    Several are packed at a time, as the kernels' own packing takes one thread. `stop.Stopped`.
    """

    def stoppable(name: str) -> nn.Module:
        stop.raise_if_requested()
        return pack(name)

    _fbgemm_runs()  # here, as it hushes a warning, which is not for several threads
    with ThreadPoolExecutor(min(_MOST_PACKERS, torch.get_num_threads())) as pool:
        for name, layer in zip(names, pool.map(stoppable, names), strict=True):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)


def weight_bytes(model: GPT) -> int:
    """Memory of the weights, tied ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    return sum(tensors.values()) + sum(getattr(m, "packed_bytes", 0) for m in model.modules())


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers (O, I) int8 in [-127, 127] and scales (O,) fp32, whose product is nearest to
    each row of `weight` (O, I); a row of zeros has scale 1.

    Processors without the VNNI instructions add the products of two neighbours, unsigned times
    signed, in 16 bits. So the scale is large enough that no two neighbours add up to more than 128:
    255 * 128 < 2**15. For normally distributed weights that leaves about 100 of 127 levels.
    """
    weight = weight.detach().float()
    whole_pairs = weight[:, : weight.size(1) // 2 * 2]
    pairs = whole_pairs[:, 0::2] + whole_pairs[:, 1::2]
    scale = torch.maximum(weight.abs().amax(1), pairs.abs().amax(1)) / _LEVELS
    scale.masked_fill_(scale == 0, 1.0)
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def int8_tensors(model: GPT) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an fp32 `model` in int8 by name: NAME.weight (int8) with NAME.scale (fp32) for
    each of its `matrices`, the others in fp32. Tied ones come once, as wte."""
    names = {f"{name}.weight" for name in matrices(model)}
    for name, tensor in model.state_dict().items():
        if name not in names:
            yield name, tensor
        elif name != "head.weight" or not model.config.tie_embeddings:
            rows, scale = int8_rows(tensor)
            yield name, rows
            yield f"{name.removesuffix('weight')}scale", scale


def int8_layer(name: str, weight: Tensor, scale: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer `name` of an int8 model out of what `int8_tensors` gave."""
    if name == "wte":
        return CompactEmbedding(weight, scale)
    if weight.device.type == "cpu" and _fbgemm_runs():
        return Int8Linear(weight, scale, bias)
    return WideningLinear(weight, bias, torch.float32, scale)


class Int8Linear(nn.Module):
    """x W^T + b with int8 weights and activations, by FBGEMM's kernel.

    Each row of x is divided by its largest magnitude, so that all are in [-1, 1], the range that
    the kernel is told, and its result is multiplied by that again. The sums are of whole numbers
    and exact, so what a row gives depends on no other row, bit for bit.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        """`weight` (O, I) int8 and `scale` (O,) as `int8_rows` makes them, `bias` (O,)."""
        super().__init__()
        zeros = torch.zeros(len(weight), dtype=torch.int64)
        whole = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(whole, None)
        self.product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default
        self.register_buffer("bias", bias)
        self.packed_bytes = weight.nbytes + scale.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, I) or (M, I) -> the same with O, fp32. A row with nan gives nan."""
        size = x.abs().amax(-1, keepdim=True)
        # Of a row of zeros the kernel gets nan and gives some number, which is multiplied by 0.
        y: Tensor = self.product(x / size, 1 / _LEVELS, _ZERO, self.packed)
        return y.mul_(size) if self.bias is None else torch.addcmul(self.bias, y, size)


class Fp16Linear(nn.Module):
    """x W^T + b with fp16 weights and fp32 activations, by FBGEMM's kernel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(linear.weight, linear.bias)
        self.product = torch.ops.quantized.linear_dynamic_fp16.default
        bias = 0 if linear.bias is None else linear.bias.nbytes
        self.packed_bytes = 2 * linear.weight.numel() + bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), fp32."""
        y: Tensor = self.product(x, self.packed)
        return y


class OneDnnLinear(nn.Module):
    """x W^T + b with weights in the layout that oneDNN likes best for `rows` rows of x.

    It is right for any number of rows. RuntimeError where oneDNN has no kernel for the dtype.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        """`weight` (O, I) and `bias` (O,) fp32 or bf16."""
        super().__init__()
        self.dtype, self.bias = weight.dtype, bias
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
        self.register_buffer("packed", packed, persistent=False)
        self.product = torch.ops.mkldnn._linear_pointwise.default
        self.packed_bytes = weight.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of x."""
        given = x if x.dtype == self.dtype else x.to(self.dtype)
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            y: Tensor = _recordable().product(given, self.packed, self.bias)
        else:
            y = self.product(given, self.packed, self.bias, "none", [], "")
        return y if y.dtype == x.dtype else y.to(x.dtype)


class WideningLinear(nn.Module):
    """x W^T + b with weights of any dtype, which are widened for each product."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        compute: torch.dtype,
        scale: Tensor | None = None,
    ) -> None:
        """`weight` (O, I), `bias` and `scale` (O,); products are in the dtype `compute`."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("scale", scale)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the dtype of x."""
        y = F.linear(x.to(self.compute), self.weight.to(self.compute)).to(x.dtype)
        y = y if self.scale is None else y * self.scale
        return y if self.bias is None else y + self.bias


class CompactEmbedding(nn.Module):
    """Rows of a table in fewer bits."""

    weight: Tensor
    scale: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor | None = None) -> None:
        """`weight` (V, C), `scale` (V,)."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids (...) int64 -> (..., C) fp32."""
        rows = self.weight[tokens].float()
        return rows if self.scale is None else rows * self.scale[tokens].unsqueeze(-1)


@cache
def _recordable() -> Any:
    """oneDNN's product for programs that are recorded, which a list of no scalars cannot get into
    but as code of their own language."""
    return torch.jit.CompilationUnit("""
def product(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    scalars: List[Optional[number]] = []
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", scalars, "")
""")


@cache
def _fbgemm_runs() -> bool:
    """Whether this processor and this build of torch have FBGEMM."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return False
    with warnings.catch_warnings():
        # Once in a process torch says that it means to drop what the weights are handed over in.
        warnings.simplefilter("ignore", UserWarning)
        try:
            Int8Linear(torch.ones(1, 4, dtype=torch.int8), torch.ones(1), None)(torch.ones(1, 4))
        except (RuntimeError, AttributeError):
            return False
    return True


def _packing(model: GPT, kind: Kind) -> Callable[[nn.Linear], nn.Module]:
    if kind == "int8":
        return _int8
    return _fp16 if kind == "fp16" else _fastest_bf16(model)


def _int8(linear: nn.Linear) -> nn.Module:
    return int8_layer("", *int8_rows(linear.weight), _bias(linear))


def _fp16(linear: nn.Linear) -> nn.Module:
    if _fbgemm_runs():
        return Fp16Linear(linear)
    return WideningLinear(linear.weight.detach().half(), _bias(linear), torch.float32)


def _fastest_bf16(model: GPT) -> Callable[[nn.Linear], nn.Module]:
    """How to pack the layers in bf16, by a race with one of them.

    Arithmetic in bf16 is twice as fast as in fp32 on some processors, and hundreds of times slower
    on those that emulate it.
    """
    ways: dict[str, Callable[[nn.Linear], nn.Module]] = {
        "fp32": partial(_widening, compute=torch.float32),
        "bf16": partial(_widening, compute=torch.bfloat16),
        "onednn": _onednn_bf16,
    }
    layer = model.get_submodule("blocks.0.mlp.up")
    assert isinstance(layer, nn.Linear)
    x = torch.ones(_RACED_ROWS, layer.in_features)
    contestants = {}
    for name, way in ways.items():
        try:
            packed = way(layer)
            packed(x)
        except (RuntimeError, AttributeError):  # no kernel for this processor
            continue
        contestants[name] = partial(packed, x)
    return ways[race(contestants, "fp32").winner]


def _widening(linear: nn.Linear, compute: torch.dtype) -> nn.Module:
    return WideningLinear(linear.weight.detach().bfloat16(), _bias(linear), compute)


def _onednn_bf16(linear: nn.Linear) -> nn.Module:
    bias = _bias(linear)
    bias = bias if bias is None else bias.bfloat16()
    return OneDnnLinear(linear.weight.detach().bfloat16(), bias, rows=1)


def _bias(linear: nn.Linear) -> Tensor | None:
    bias: Tensor | None = linear.bias  # nn.Linear says Tensor
    return None if bias is None else bias.detach()


def _check_fp16(model: GPT) -> None:
    largest = torch.finfo(torch.float16).max
    for name in matrices(model):
        weight = model.get_parameter(f"{name}.weight")
        if (found := weight.abs().amax().item()) > largest:
            raise ConfigError(
                f"quantize fp16: {name}.weight holds {found:.4g}, and fp16 ends at {largest:,.0f}",
                hint="bf16 takes as little space and reaches as far as fp32",
            )
