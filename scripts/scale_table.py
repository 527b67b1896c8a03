"""Writes docs/scale.md: what the GPT-3 models of Brown et al. 2020 take on 8, 64 and 512 H100.

    python scripts/scale_table.py

Each model with the batch and the 300 billion tokens of its table 2.1, by `gpt plan --devices`.
"""

from pathlib import Path

from gptcli.config.load import load_config
from gptcli.plan_devices import DevicesPlan, plan_devices
from gptcli.training.scaling import EFFICIENCY, LINK_SHARE, USABLE_SHARE

DOC = Path(__file__).parents[1] / "docs" / "scale.md"
VOCABULARY = 50257
# Tokens of a step: 0.5 to 3.2 million, in rows of 2,048.
BATCHES = {
    "gpt3-small": 524288,
    "gpt3-medium": 524288,
    "gpt3-large": 524288,
    "gpt3-xl": 1048576,
    "gpt3-2.7b": 1048576,
    "gpt3-6.7b": 2097152,
    "gpt3-13b": 2097152,
    "gpt3-175b": 3145728,
}
DEVICES = (8, 64, 512)
KIND = "h100"
HEAD = f"""# Past one box, on paper

`gpt plan CONFIG --devices 64 --device-kind h100` says, on any laptop, what a run takes on GPUs that
are not here: the sharding to use, memory of each device, what it sends in a step, and the range of
time and model FLOPs utilisation (MFU) to expect. Nothing here was measured on such a machine.

- Memory: this project's own step on tensors without memory; with FSDP each device holds its share
  of weights, gradients and optimizer state (ZeRO stage 3: Rajbhandari et al. 2020; Zhao et al.
  2023), beside it two gathered blocks, the embeddings and the head. {USABLE_SHARE:.0%} of a GPU's
  memory count as usable.
- Exchange: ring collectives (Patarasuk & Yuan 2009) at {LINK_SHARE:.0%} of the data sheets' rates;
  DDP sends 2 (n-1)/n x 4 bytes a parameter, FSDP gathers each block twice and scatters its
  gradients once for every micro batch.
- Time: operations as in Chowdhery et al. 2022 at {EFFICIENCY[0]:.0%} to {EFFICIENCY[1]:.0%} of the
  dense bf16 peak, which is the range of published trainings; at best the exchange hides behind the
  computation, at worst nothing does. Activations computed again (`ckpt`) cost a third more.

The models of GPT-3 (Brown et al. 2020, table 2.1: their batches, 300 billion tokens, AdamW), made
by `python scripts/scale_table.py`:

| model | H100 | sharding | micro batch | memory of each | sent by each | step | MFU | days |
|---|---|---|---|---|---|---|---|---|
"""


def planned(preset: str, devices: int) -> DevicesPlan:
    """The plan of one row."""
    settings = [f"model.preset={preset}", f"training.tokens_per_step={BATCHES[preset]}"]
    settings += ["training.max_tokens=300000000000", "optimizer.kind=adamw", f"name={preset}"]
    config = load_config(None, settings).config
    return plan_devices(config, devices, KIND, vocab_size=VOCABULARY)


def row(preset: str, devices: int) -> str:
    """One line of the table."""
    plan = planned(preset, devices)
    if plan.problems:
        return f"| {preset} | {devices} | does not fit: {plan.advice[0]} | | | | | | |"
    ckpt = ", ckpt" if plan.activation_checkpointing else ""
    assert plan.device_hours is not None
    low, high = (hours / devices / 24 for hours in plan.device_hours)
    (fast, slow), (least, most) = plan.time.seconds, plan.time.mfu
    cells = [
        preset,
        str(devices),
        plan.sharding + ckpt,
        f"{plan.micro_batches} x {plan.micro_batch_size}",
        f"{plan.memory_total_bytes / 2**30:.1f} GiB",
        f"{plan.sent_bytes / 2**30:.1f} GiB",
        f"{fast:.2f} to {slow:.2f} s",
        f"{least:.0%} to {most:.0%}",
        f"{low:.1f} to {high:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The whole page."""
    rows = [
        row(preset, devices)
        for preset in BATCHES
        for devices in DEVICES
        if BATCHES[preset] // 2048 >= devices
    ]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    DOC.write_text(table(), encoding="utf-8")
