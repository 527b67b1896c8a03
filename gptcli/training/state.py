"""What a resume needs besides weights and optimizer state, and the limits of a run."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from gptcli.config.schema import TrainingConfig
from gptcli.config.units import parse_seconds


@dataclass
class TrainState:
    """Where a run stands after `step` updates. All of it is saved in a checkpoint's state.json.

    Randomness needs no state: every step seeds its generators from (seed, step). `seconds` counts
    training steps only, `elapsed_seconds` evaluation and saving too, over all resumes.
    """

    step: int = 0
    tokens: int = 0
    epochs: float = 0.0
    position: dict[str, Any] | None = None  # of the data, behind the last step
    seconds: float = 0.0
    elapsed_seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    bad_steps: int = 0  # non-finite ones in a row
    skipped_steps: int = 0  # non-finite ones in all
    evaluated_step: int = -1
    loss_scale: float = 65536.0  # fp16 only
    good_steps: int = 0  # fp16: since the scale changed
    interval: dict[str, float] = field(default_factory=dict)  # sums since the last log line

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping that `TrainState(**it)` takes back."""
        return asdict(self)


def progress(state: TrainState, limits: TrainingConfig) -> float:
    """Share of the run that is done, in [0, 1]: the furthest of its limits."""
    shares = [0.0]
    if limits.max_steps:
        shares.append(state.step / limits.max_steps)
    if limits.max_tokens:
        shares.append(state.tokens / limits.max_tokens)
    if limits.max_epochs:
        shares.append(state.epochs / limits.max_epochs)
    if limits.max_time:
        shares.append(state.elapsed_seconds / parse_seconds(limits.max_time))
    return min(max(shares), 1.0)


def expected_steps(state: TrainState, limits: TrainingConfig) -> int | None:
    """About how many steps the run will have in all, None before its first one."""
    done = progress(state, limits)
    if limits.max_steps and done <= state.step / limits.max_steps:
        return limits.max_steps
    return math.ceil(state.step / done) if state.step and done else limits.max_steps
