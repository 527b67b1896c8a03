"""Packed layers against sums of whole numbers in fp64, and against the fp32 layers."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.config.model_schema import ModelConfig
from gptcli.errors import ConfigError
from gptcli.model.gpt import GPT, initialise
from gptcli.model.packed import (
    CompactEmbedding,
    Fp16Linear,
    Int8Linear,
    Kind,
    OneDnnLinear,
    WideningLinear,
    int8_layer,
    int8_rows,
    int8_tensors,
    is_quantized,
    matrices,
    quantize,
    weight_bytes,
)

ENGINE = torch.backends.quantized.engine
needs_fbgemm = pytest.mark.skipif(ENGINE not in ("x86", "fbgemm"), reason="FBGEMM is not here")
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
SHAPES = {
    "gpt1": {"preset": "gpt1"},
    "gpt2": {"preset": "gpt2"},
    "llama": {"preset": "llama"},
    "untied": {"preset": "modern", "tie_embeddings": False},
    "tied": {"preset": "modern", "tie_embeddings": True},
    "sinusoidal": {"preset": "gpt2", "position": "sinusoidal", "norm_position": "post"},
}


def make(name: str = "gpt2", vocab_size: int = 97, **keys: Any) -> GPT:
    config = ModelConfig.model_validate({**SHAPES[name], **SIZES, **keys})
    model = GPT(config, vocab_size)
    generator = torch.Generator().manual_seed(0)
    initialise(model, generator)
    with torch.no_grad():  # no layer without effect
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def int8_linear(outputs: int, inputs: int, bias: bool = True) -> tuple[nn.Module, nn.Linear]:
    linear = nn.Linear(inputs, outputs, bias=bias)
    weight, scale = int8_rows(linear.weight)
    return int8_layer("x", weight, scale, linear.bias.detach() if bias else None), linear


def whole_number_sums(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """What int8 layers compute, in fp64, where these sums are exact."""
    size = x.abs().amax(1, keepdim=True).double()
    whole = (x.double() / torch.where(size == 0, 1.0, size) * 127).round()
    return (whole @ weight.double().T) * scale.double() * size / 127


@needs_fbgemm
@pytest.mark.parametrize("inputs", [2, 64, 65, 4096])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_extreme_values_are_exact(inputs: int, rows: int) -> None:
    """Bug: without VNNI, sums of two products of extreme numbers saturate 16 bits, unseen."""
    patterns = [torch.ones(inputs), -torch.ones(inputs), torch.ones(inputs), torch.ones(inputs)]
    patterns[2][::2] = -1
    patterns[3][::2] = 0.1
    weight, scale = int8_rows(torch.stack(patterns * 9) * torch.linspace(0.5, 2.0, 36)[:, None])
    x = torch.stack([patterns[row % 3] * 2.0 ** (row - 5) for row in range(rows)])
    layer = int8_layer("x", weight, scale, None)
    assert isinstance(layer, Int8Linear)
    expected = whole_number_sums(x, weight, scale)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-6, atol=0)


@needs_fbgemm
def test_random_values_against_whole_numbers() -> None:
    """Bug: a zero point or a scale that is off by one level, or one channel's for another's."""
    layer, linear = int8_linear(70, 130)
    weight, scale = int8_rows(linear.weight)
    x = torch.randn(9, 130) * torch.logspace(-3, 3, 9)[:, None]
    expected = whole_number_sums(x, weight, scale) + linear.bias.double()
    # A value halfway between two levels may go either way: one level of one input.
    size = x.abs().amax(1, keepdim=True)
    error = (layer(x).double() - expected).abs()
    assert (error <= size * scale * 127 / 60 + 1e-5).all()
    assert (error / size).mean() < 1e-4  # and few do


@needs_fbgemm
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 64), (257, 65), (96, 768)])
def test_rows_do_not_disturb_each_other(outputs: int, inputs: int) -> None:
    """Bug: a row's result depends on its neighbours, or on how many there are: sample k then
    changes with n."""
    layer, _ = int8_linear(outputs, inputs)
    x = torch.randn(64, inputs)
    x[1] *= 1e6
    x[2] *= 1e-6
    whole = layer(x)
    for count in (1, 2, 3, 5, 17, 63):
        assert torch.equal(layer(x[:count]), whole[:count])
    for row in (0, 1, 2, 40):
        assert torch.equal(layer(x[row : row + 1]), whole[row : row + 1])
    shape = layer(x.view(8, 8, inputs))
    assert torch.equal(shape, whole.view(8, 8, outputs))


@pytest.mark.parametrize("kind", ["int8", "fp16", "bf16"])
def test_unusual_rows(kind: Kind) -> None:
    """Bug: a row of zeros divides by zero, no rows at all crash the kernel, one nan spoils the
    batch."""
    model = make()
    quantize(model, kind)
    layer = model.get_submodule("blocks.0.mlp.up")
    bias = make().get_parameter("blocks.0.mlp.up.bias")
    x = torch.randn(6, 32)
    clean = layer(x)
    x[1], x[2], x[3, 5], x[4], x[5] = 0.0, 0.25, torch.nan, 1e-42, torch.inf
    y = layer(x)
    torch.testing.assert_close(y[1], bias, rtol=0, atol=0.0 if kind != "bf16" else 1e-2)
    torch.testing.assert_close(y[4], bias, rtol=0, atol=0.0 if kind == "int8" else 1e-2)
    assert torch.equal(y[0], clean[0])
    assert y[2].isfinite().all()
    assert y[3].isnan().all()
    assert not y[5].isfinite().any()
    assert layer(x[:0]).shape == (0, 128)
    assert layer(x[:0].view(2, 0, 32)).shape == (2, 0, 128)
    assert torch.equal(layer(x.T.contiguous().T)[0], clean[0])  # not contiguous


def test_int8_rows() -> None:
    """Bug: the largest weight overflows int8, or a row of zeros has scale 0 and gives nan."""
    weight = torch.tensor([[3.0, -4.0, 0.01], [0.0, 0.0, 0.0], [1e-44, 0.0, 0.0]])
    whole, scale = int8_rows(weight)
    assert whole.tolist() == [[95, -127, 0], [0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(scale, torch.tensor([4 / 127, 1.0, 1.0]))
    random = torch.randn(50, 70)
    whole, scale = int8_rows(random)
    pairs = whole.int().view(50, 35, 2).sum(2).abs().amax(1)
    assert pairs.max() in (127, 128)
    assert (torch.maximum(whole.int().abs().amax(1), pairs) >= 126).all()  # no larger scale
    assert ((whole * scale[:, None] - random).abs() <= scale[:, None] * 0.5001).all()


def test_widening_layer() -> None:
    """Bug: where there is no kernel, the layer computes something else, or forgets the bias."""
    linear = nn.Linear(40, 30)
    weight, scale = int8_rows(linear.weight)
    x = torch.randn(2, 3, 40)
    expected = F.linear(x, weight * scale[:, None], linear.bias)
    layer = WideningLinear(weight, linear.bias.detach(), torch.float32, scale)
    torch.testing.assert_close(layer(x), expected)
    half = WideningLinear(linear.weight.detach().half(), None, torch.float32)
    torch.testing.assert_close(half(x), F.linear(x, linear.weight.half().float()))
    brain = WideningLinear(linear.weight.detach().bfloat16(), None, torch.bfloat16)
    torch.testing.assert_close(brain(x), F.linear(x, linear.weight), rtol=0.03, atol=0.03)
    assert brain(x).dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_onednn_layer(rows: int, bias: bool) -> None:
    """Bug: a layout that was made for one number of rows is wrong for another."""
    linear = nn.Linear(48, 33, bias=bias)
    layer = OneDnnLinear(linear.weight, linear.bias, rows)
    with torch.inference_mode():
        for count in (1, 4, 5, 64):
            x = torch.randn(count, 1, 48)
            torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("kind", "error"), [("int8", 0.08), ("fp16", 2e-3), ("bf16", 0.02)])
def test_logits_of_every_shape(name: str, kind: Kind, error: float) -> None:
    """Bug: a layer that is left out, packed twice or put in another's place."""
    model, tokens = make(name), torch.randint(97, (3, 16))
    with torch.no_grad():
        expected = model(tokens)
        quantize(model, kind)
        found = model(tokens)
        assert found.dtype == torch.float32
        assert (found - expected).norm() < error * expected.norm()
        assert not torch.equal(found, expected)
        cache = model.new_cache(3)
        steps = [model(tokens[:, i : i + 1], cache) for i in range(16)]
    torch.testing.assert_close(torch.cat(steps, 1), found, rtol=0.05, atol=0.2 * error)
    assert is_quantized(model)
    assert not any(
        isinstance(module, nn.Linear | nn.Embedding)
        for module in model.modules()
        if module is not getattr(model, "wpe", None)
    )


@pytest.mark.parametrize("kind", ["int8", "fp16", "bf16"])
def test_fp32_weights_are_freed(kind: Kind) -> None:
    """Bug: the fp32 weights stay in memory, and the packed ones come on top."""
    model = make("tied")
    kept = [weakref.ref(model.get_parameter(f"{name}.weight")) for name in matrices(model)]
    quantize(model, kind)
    gc.collect()
    assert not any(weight() is not None for weight in kept)


def test_weight_bytes() -> None:
    """Bug: tied weights are counted twice, or packed ones not at all."""
    model = make("untied")
    matrix_numbers = sum(model.get_parameter(f"{n}.weight").numel() for n in matrices(model))
    others = 4 * (model.parameter_count() - matrix_numbers)
    assert weight_bytes(model) == 4 * model.parameter_count()
    tied = make("tied")
    assert weight_bytes(tied) == 4 * tied.parameter_count()
    channels = sum(len(model.get_parameter(f"{n}.weight")) for n in matrices(model))
    for kind, size in (("int8", matrix_numbers + 4 * channels), ("fp16", 2 * matrix_numbers)):
        model = make("untied")
        quantize(model, kind)
        found = weight_bytes(model)
        assert found == pytest.approx(size + others, rel=0.02)  # fp16 rows may be padded


def test_embedding() -> None:
    """Bug: tokens get another row's scale."""
    table = torch.randn(20, 6) * torch.arange(1, 21)[:, None]
    weight, scale = int8_rows(table)
    tokens = torch.tensor([[3, 19], [0, 3]])
    found = CompactEmbedding(weight, scale)(tokens)
    assert torch.equal(found, (weight * scale[:, None])[tokens])
    assert torch.equal(CompactEmbedding(table.half())(tokens), table.half().float()[tokens])


def test_tensors_of_an_int8_model() -> None:
    """Bug: what is saved is not what is computed with."""
    for name in ("tied", "untied", "gpt2"):
        model = make(name)
        tensors = dict(int8_tensors(model))
        assert ("head.weight" in tensors) is (name == "untied")
        quantize(model, "int8")
        assert torch.equal(tensors["wte.weight"], model.get_buffer("wte.weight"))
        assert torch.equal(tensors["wte.scale"], model.get_buffer("wte.scale"))
        assert tensors["blocks.1.mlp.up.weight"].dtype == torch.int8
        assert tensors["blocks.1.mlp.up.scale"].dtype == torch.float32
        assert tensors["blocks.1.norm1.weight"].dtype == torch.float32


def test_what_cannot_be_quantized() -> None:
    """Bug: weights beyond fp16 become infinite; packed layers are packed again."""
    model = make()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.proj.weight")[3, 4] = 7e4
    with pytest.raises(ConfigError, match=r"mlp.proj.weight holds 7e\+04, and fp16 ends at 65,504"):
        quantize(model, "fp16")
    assert not is_quantized(model)  # and nothing has changed
    quantize(model, "bf16")
    with pytest.raises(ValueError, match="only fp32"):
        quantize(model, "int8")
    with pytest.raises(ValueError, match="only fp32"):
        quantize(make().to(torch.bfloat16), "int8")


@needs_fbgemm
def test_fp16_layer_is_fbgemms() -> None:
    """Bug: the fallback is taken where the kernel runs, and nobody notices but the clock."""
    model = make()
    quantize(model, "fp16")
    assert isinstance(model.get_submodule("blocks.0.attn.qkv"), Fp16Linear)
