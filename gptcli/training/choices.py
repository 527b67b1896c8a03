"""Automatic choices: made once at step 0, written to run.json and the checkpoint, reused."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gptcli.config.schema import Config
from gptcli.device import Device, choose_precision

log = logging.getLogger("gptcli")

_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 29, "mps": 1 << 26}  # logits of one micro batch


@dataclass(frozen=True)
class Choices:
    """How this run computes. `micro_batch_size` is in rows of block_size tokens."""

    device: str
    threads: int
    precision: str
    compile: bool
    micro_batch_size: int
    torch: str

    def to_json(self) -> dict[str, Any]:
        """For run.json and state.json."""
        return asdict(self)


def choose(config: Config, device: Device, vocab_size: int) -> Choices:
    """The choices for a fresh run on `device`."""
    training = config.training
    rows = training.tokens_per_step // config.model.block_size
    if training.micro_batch_size == "auto":
        most = max(1, _LOGITS[device.kind] // (vocab_size * config.model.block_size))
        micro = next(n for n in range(min(rows, most), 0, -1) if rows % n == 0)
    else:
        micro = training.micro_batch_size
    # Compiling takes about half a minute, which short runs on a CPU do not earn back.
    compiles = training.compile == "on" or (training.compile == "auto" and device.kind == "cuda")
    return Choices(
        device=f"{device.kind}:{device.index}" if device.index is not None else device.kind,
        threads=device.threads,
        precision=choose_precision(training.precision, device),
        compile=compiles,
        micro_batch_size=micro,
        torch=torch.__version__,
    )


def choose_again(saved: dict[str, Any], config: Config, device: Device, vocab: int) -> Choices:
    """The saved choices for a resumed run; where the machine or config differs, one warning says
    why the result may differ in its last bits."""
    old = Choices(**saved)
    reasons = []
    here = f"{device.kind}:{device.index}" if device.index is not None else device.kind
    if here != old.device:
        reasons.append(f"device {old.device} -> {here}")
    if device.threads != old.threads:
        reasons.append(f"threads {old.threads} -> {device.threads}")
    if torch.__version__ != old.torch:
        reasons.append(f"torch {old.torch} -> {torch.__version__}")
    training = config.training
    rows = training.tokens_per_step // config.model.block_size
    new = old
    if here != old.device:
        new = choose(config, device, vocab)
    else:
        changes: dict[str, Any] = {"threads": device.threads, "torch": torch.__version__}
        if training.precision not in ("auto", old.precision):
            changes["precision"] = choose_precision(training.precision, device)
            reasons.append(f"precision {old.precision} -> {changes['precision']}")
        micro = training.micro_batch_size
        if micro != "auto" and micro != old.micro_batch_size:
            changes["micro_batch_size"] = micro
            reasons.append(f"micro_batch_size {old.micro_batch_size} -> {micro}")
        elif rows % old.micro_batch_size:
            changes["micro_batch_size"] = choose(config, device, vocab).micro_batch_size
        if training.compile != "auto":
            changes["compile"] = training.compile == "on"
        new = Choices(**{**old.to_json(), **changes})
    if reasons:
        log.warning(f"not bit-exact with the run so far: {', '.join(reasons)}")
    return new
