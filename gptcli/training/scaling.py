"""Arithmetic of training on many GPUs: memory of each, what goes between them, time of a step.

Ring exchanges among n devices move (n - 1) / n of the numbers once for a gather or a scatter, and
twice for an all-reduce (Patarasuk & Yuan 2009). DDP all-reduces fp32 gradients once a step (Li et
al. 2020). FSDP2 keeps 1 / n of weights, gradients and optimizer state (ZeRO stage 3: Rajbhandari et
al. 2020; Zhao et al. 2023), and for each micro batch gathers each block forward and backward in the
precision of the products, the embeddings and the head once, and scatters fp32 gradients.
"""

from dataclasses import dataclass

from gptcli.device import Device
from gptcli.training.flops import peak_flops
from gptcli.training.footprint import RUNTIME_BYTES, SLACK, Footprint

# Of the matrix products' peak: the range of what published trainings of dense decoders reach when
# nothing waits for the network. PaLM 540B 46 % MFU (Chowdhery et al. 2022), Megatron-LM up to 52 %
# (Narayanan et al. 2021), Llama 3 38 to 43 % on 8,192 to 16,384 H100 (Dubey et al. 2024).
EFFICIENCY = (0.35, 0.55)
# Of a link's rate that long exchanges reach; NCCL's own tests show about this.
LINK_SHARE = 0.8
# Of a GPU's memory: the rest is the CUDA context's, the communicator's and fragments.
USABLE_SHARE = 0.92


@dataclass(frozen=True)
class Kind:
    """A GPU and the box that it is usually rented in, by the vendors' data sheets.

    `name` as torch reports it; `link_bytes` per second and direction between the GPUs of a box,
    `network_bytes` per second and GPU between boxes; `per_box` GPUs.
    """

    name: str
    memory_bytes: int
    link_bytes: float
    network_bytes: float
    per_box: int = 8


# NVIDIA's data sheets of A100, H100, H200, B200, L40S and the GeForce RTX 4090: memory, NVLink
# (half of the two-way rate) or PCIe 4.0 x16. Network: DGX A100 (200 Gb/s a GPU), DGX H100, H200 and
# B200 (400 Gb/s a GPU); for cards without NVLink one 100 Gb/s adapter for two GPUs is assumed.
KINDS = {
    "a100": Kind("NVIDIA A100-SXM4-80GB", 80 * 10**9, 300e9, 25e9),
    "h100": Kind("NVIDIA H100 80GB HBM3", 80 * 10**9, 450e9, 50e9),
    "h200": Kind("NVIDIA H200", 141 * 10**9, 450e9, 50e9),
    "b200": Kind("NVIDIA B200", 180 * 10**9, 900e9, 50e9),
    "l40s": Kind("NVIDIA L40S", 48 * 10**9, 32e9, 6.25e9),
    "rtx4090": Kind("NVIDIA GeForce RTX 4090", 24 * 10**9, 32e9, 6.25e9),
}


@dataclass(frozen=True)
class Shape:
    """What of a model decides: its `parameters`, those of all `blocks` and of one, those that Muon
    orthogonalises (0 with AdamW), and bytes of a number in the matrix products."""

    parameters: int
    blocks: int
    one_block: int
    matrices: int
    product_bytes: int


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of each device at the peak of a step. `gathered_bytes`: what FSDP holds as a whole."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    gathered_bytes: int
    activations_bytes: int
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it together."""
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


def device_memory(need: Footprint, shape: Shape, devices: int, sharding: str) -> DeviceMemory:
    """Of one of `devices`, of a step that takes `need` on a single one.

    With FSDP a device holds its share, beside it the embeddings and the head as a whole, and two
    blocks (one computes while the next is gathered) with one block's gradients.
    """
    activations = need.activations_bytes + need.logits_bytes
    if sharding != "fsdp":
        return DeviceMemory(
            weights_bytes=need.weights_bytes,
            gradients_bytes=need.gradients_bytes,
            optimizer_bytes=need.optimizer_bytes,
            gathered_bytes=0,
            activations_bytes=activations,
            other_bytes=need.other_bytes,
        )
    # A whole model keeps copies of its weights in the products' precision until the backward pass;
    # blocks are gathered in that precision, and no longer there then.
    copies = shape.product_bytes * shape.parameters if shape.product_bytes < 4 else 0
    activations = max(0, activations - copies)
    root = shape.parameters - shape.blocks
    return DeviceMemory(
        weights_bytes=need.weights_bytes // devices,
        gradients_bytes=need.gradients_bytes // devices,
        optimizer_bytes=need.optimizer_bytes // devices,
        gathered_bytes=shape.product_bytes * (root + 2 * shape.one_block) + 4 * shape.one_block,
        activations_bytes=activations,
        other_bytes=RUNTIME_BYTES["cuda"] + int(SLACK * activations),
    )


def sent_bytes(shape: Shape, devices: int, sharding: str, micro_batches: int) -> int:
    """What one device sends in a step, Muon's matrices to their owners and back included."""
    ring = (devices - 1) / devices
    if sharding == "ddp":
        return int(2 * ring * 4 * shape.parameters + ring * 4 * shape.matrices)
    gathers = shape.product_bytes * (shape.parameters + shape.blocks)
    exchange = 2 * ring * 4 * shape.matrices / devices
    return int(micro_batches * ring * (gathers + 4 * shape.parameters) + exchange)


def ring_bytes(kind: Kind, devices: int) -> float:
    """Bytes a second and device of a ring: inside a box the links' rate. Between boxes there are as
    many rings as adapters in a box, and each passes through all GPUs of a box before it leaves it:
    all of its adapters together carry what one GPU sends."""
    if devices <= kind.per_box:
        return kind.link_bytes
    return min(kind.link_bytes, kind.per_box * kind.network_bytes)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: of computation at the better efficiency, of the exchanges, and the range
    of both together; and the model FLOPs utilisation that follows, least and most."""

    compute_seconds: float
    exchange_seconds: float
    seconds: tuple[float, float]
    mfu: tuple[float, float]


def step_time(
    kind: Kind, devices: int, flops: float, sent: int, precision: str, *, recompute: bool
) -> StepTime:
    """Of a step of `flops` operations on all `devices`, each of which sends `sent` bytes.

    At best computation reaches the upper efficiency and hides all of the exchange, at worst the
    lower one and none. To compute activations again takes another forward pass: a third more.
    """
    peak = peak_flops(Device("cuda", 0, kind.name, 1, True), precision)
    assert peak is not None
    ideal = flops / (devices * peak)
    done = ideal * (4 / 3 if recompute else 1.0)
    least, most = EFFICIENCY
    exchange = sent / (LINK_SHARE * ring_bytes(kind, devices))
    seconds = (max(done / most, exchange), done / least + exchange)
    return StepTime(done / most, exchange, seconds, (ideal / seconds[1], ideal / seconds[0]))
