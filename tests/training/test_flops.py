"""Operations per token and peaks of GPUs, on which every MFU in a log rests."""

import pytest

from gptcli.config.model_schema import ModelConfig
from gptcli.device import Device
from gptcli.training.flops import flops_per_token, peak_flops


def gpu(name: str, bf16: bool = True) -> Device:
    return Device("cuda", 0, name, 8, bf16)


def test_flops_of_gpt2_by_hand() -> None:
    """A head counted twice or not at all shifts every MFU by a third at this size."""
    blocks = 12 * (12 * 768**2 + 13 * 768) + 2 * 768  # matrices, biases and norms; final norm
    head = 50257 * 768
    attention = 12 * 12 * 768 * 1024  # 12 n_layer n_embd block_size
    found = flops_per_token(ModelConfig(preset="gpt2"), 50257)
    assert found == 6 * (blocks + head) + attention


def test_flops_count_the_head_once_tied_or_not() -> None:
    """A tied head multiplies as much as one of its own."""
    tied = ModelConfig(preset="gpt2", n_layer=2, n_embd=64, n_head=4, block_size=32)
    own = tied.model_copy(update={"tie_embeddings": False})
    assert flops_per_token(tied, 100) == flops_per_token(own, 100)


def test_flops_follow_the_width_of_the_heads() -> None:
    """With head_dim given, attention is not n_embd wide (Qwen3)."""
    narrow = ModelConfig(n_layer=2, n_embd=64, n_head=4, head_dim=16, block_size=32)
    wide = narrow.model_copy(update={"head_dim": 32})
    matrices = 3 * 64 * 64 + 64 * 64  # qkv and proj, 64 more rows and columns
    norms = 2 * 16  # q_norm and k_norm, 16 longer
    more = 2 * (6 * (matrices + norms) + 12 * 64 * 32)
    assert flops_per_token(wide, 100) - flops_per_token(narrow, 100) == more


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A6000", 154.8),
    ],
)
def test_each_gpu_has_its_own_peak(name: str, tflops: float) -> None:
    """A10, A10G and A100, or L4 and L40S, begin alike and differ by up to four times."""
    assert peak_flops(gpu(name), "bf16") == pytest.approx(tflops * 1e12)
    assert peak_flops(gpu(name), "fp16") == peak_flops(gpu(name), "bf16")
    assert peak_flops(gpu(name), "fp32") == pytest.approx(tflops / 2 * 1e12, rel=0.02)  # TF32


@pytest.mark.parametrize("name", ["Tesla V100-SXM2-16GB", "Tesla T4"])
def test_gpus_without_bf16_have_no_peak_of_it(name: str) -> None:
    """An emulated type has no published peak; an MFU against fp16's would say nothing."""
    device = gpu(name, bf16=False)
    assert peak_flops(device, "bf16") is None
    half, single = peak_flops(device, "fp16"), peak_flops(device, "fp32")
    assert half is not None
    assert single is not None
    assert half == pytest.approx(8 * single, rel=0.01)  # no TF32 either


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A100X",
        "NVIDIA GB200",
        "AMD Instinct MI300X",
        "",
    ],
)
def test_unknown_gpus_have_none(name: str) -> None:
    """A slice or a laptop's chip against the full card's peak would look badly used."""
    assert peak_flops(gpu(name), "bf16") is None


def test_processors_have_none() -> None:
    """A CPU's name could match nothing, but mps must not either."""
    for kind in ("cpu", "mps"):
        assert peak_flops(Device(kind, None, "NVIDIA H200", 8, True), "fp32") is None
