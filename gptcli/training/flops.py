"""Floating-point operations of training, and the published peaks of GPUs: model FLOPs utilisation.

MFU (Chowdhery et al. 2022, appendix B) is tokens per second x flops_per_token / peak_flops.
"""

import re

from gptcli.config.model_schema import ModelConfig
from gptcli.device import Device
from gptcli.model.empty import empty_model

# Dense peaks in TFLOP/s, without structured sparsity and with sums in fp32: of fp16 and bf16, then
# of fp32 as training multiplies it (TF32 where the GPU has it, from Ampere on). Names as
# torch.cuda.get_device_properties reports them; laptop, MIG and vGPU variants match nothing.
# From NVIDIA's datasheets of these products (H100 and later list figures with sparsity: half of
# those here), the A10G's from its datasheet for AWS G5, GeForce and A6000 from the whitepapers of
# GA102, Ada and RTX Blackwell.
_PEAKS_TFLOPS = {
    r"Tesla V100-SXM[23]-.*": (125.0, 15.7),
    r"Tesla V100-PCIE-.*": (112.0, 14.0),
    r"Tesla V100S-PCIE-.*": (130.0, 16.4),
    r"Tesla T4": (65.0, 8.1),
    r"NVIDIA L4": (121.0, 60.0),
    r"NVIDIA A10": (125.0, 62.5),
    r"NVIDIA A10G": (70.0, 35.0),
    r"NVIDIA L40S": (362.0, 183.0),
    r"(NVIDIA )?A100(-SXM4|-PCIE)-[48]0GB|NVIDIA A100 80GB PCIe": (312.0, 156.0),
    r"NVIDIA H100 80GB HBM3": (989.4, 494.7),  # SXM
    r"NVIDIA H100 PCIe": (756.0, 378.0),
    r"NVIDIA H100 NVL": (835.0, 417.5),
    r"NVIDIA H200": (989.4, 494.7),  # SXM
    r"NVIDIA H200 NVL": (835.5, 417.5),
    r"NVIDIA B200": (2250.0, 1125.0),
    r"NVIDIA GeForce RTX 3090": (71.0, 35.6),
    r"NVIDIA GeForce RTX 4090": (165.2, 82.6),
    r"NVIDIA GeForce RTX 5090": (209.5, 104.8),
    r"(NVIDIA )?RTX A6000": (154.8, 77.4),
}


def flops_per_token(model: ModelConfig, vocab_size: int) -> int:
    """Operations to train on one token, forward and backward.

    6 x (non-embedding + head parameters) + 12 n_layer (n_head head_size) block_size, as in Kaplan
    et al. 2020 and Chowdhery et al. 2022: attention is counted in full, though causal, and nothing
    that is computed again.
    """
    one = empty_model(model.model_copy(update={"n_layer": 1}), vocab_size)  # all blocks are alike
    block = sum(p.numel() for p in one.blocks[0].parameters())
    others = one.parameter_count(embeddings=False) - block  # the last norm
    head = vocab_size * model.n_embd
    attention = model.n_layer * model.n_head * model.head_size * model.block_size
    return 6 * (model.n_layer * block + others + head) + 12 * attention


def learning_share(method: str) -> float:
    """Of the operations of training all weights, those of a finetuning `method`: frozen weights get
    no gradients, and below a task head that learns alone nothing goes backward."""
    return {"full": 1.0, "lora": 2 / 3, "head": 1 / 3}[method]


def peak_flops(device: Device, precision: str) -> float | None:
    """Published dense operations per second of a known GPU in fp32, bf16 or fp16; else None."""
    if device.kind != "cuda" or (precision == "bf16" and not device.bf16):
        return None
    for name, (half, single) in _PEAKS_TFLOPS.items():
        if re.fullmatch(name, device.name):
            return (single if precision == "fp32" else half) * 1e12
    return None
