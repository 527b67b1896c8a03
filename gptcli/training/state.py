"""What a resume needs besides weights and optimizer state, and the limits of a run."""

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from gptcli.config.schema import TrainingConfig
from gptcli.config.units import parse_seconds
from gptcli.data.position import MOST, Count
from gptcli.training.stability import Watch

# The report and its plots take about as long whatever the run: 0.75 s of one AVX2 core, and the
# process ends. But never so much of a short run.
REPORT_SECONDS = 1.0
_REPORT_SHARE = 0.05
EVALUATION_SHARE = 0.1  # of max_time, for evaluations between the first and the last
# What of the steps since the last log line is summed up in `TrainState.interval`.
INTERVAL_TIMES = (
    "data_wait_seconds",
    "forward_backward_seconds",
    "optimizer_seconds",
    "other_seconds",
)
INTERVAL = frozenset(("loss", "steps", "tokens", *INTERVAL_TIMES))
# What a field may hold, which `saved.read_resumable` checks.
_StepOrNone: TypeAlias = Annotated[int, Field(strict=True, ge=-1, lt=MOST)]  # -1: none yet
_Amount: TypeAlias = Annotated[float, Field(strict=True, ge=0, lt=MOST, allow_inf_nan=False)]
_Share: TypeAlias = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
_Finite: TypeAlias = Annotated[float, Field(strict=True, allow_inf_nan=False)]
_LossScale: TypeAlias = Annotated[float, Field(strict=True, gt=0, lt=2**128, allow_inf_nan=False)]


@dataclass
class TrainState:
    """Where a run stands after `step` updates. All of it is saved in a checkpoint's state.json.

    Randomness needs no state: every step seeds its generators from (seed, step). `seconds` counts
    training steps only. `elapsed_seconds`, which max_time limits, counts all: start-up, reading,
    evaluation and saving too, over all resumes. What a killed process did since its last checkpoint
    is done again and not counted.
    """

    step: Count = 0
    tokens: Count = 0
    epochs: _Amount = 0.0
    position: dict[str, Any] | None = None  # of the data, behind the last step
    seconds: _Amount = 0.0
    elapsed_seconds: _Amount = 0.0
    evaluation_seconds: _Amount = 0.0  # of the last evaluation with its samples
    evaluated_seconds: _Amount = 0.0  # of all evaluations but those of step 0 and of the end
    save_seconds: _Amount = 0.0  # of the last save
    finish_seconds: _Amount = 0.0  # of what the job does after the last save, but the report
    reached: _Share = 0.0  # the furthest `progress`, which never falls under the same limits
    best_loss: _Finite | None = None
    best_step: Count | None = None
    best_score: _Finite | None = None  # of a finetuning task, at best_step
    stale_evaluations: Count = 0  # in a row, without a better one
    bad_steps: Count = 0  # not applied, in a row
    skipped_steps: Count = 0  # not applied, in all
    rollbacks: Count = 0  # in a row, without getting past `spike_step`
    spike_step: _StepOrNone = -1  # where the last rollback came from
    evaluated_step: _StepOrNone = -1
    loss_scale: _LossScale = 65536.0  # fp16 only
    good_steps: Count = 0  # fp16: since the scale changed
    interval: dict[str, _Finite] = field(default_factory=dict)  # sums since the last log line
    watch: Watch = field(default_factory=Watch)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping that `from_json` takes back."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "TrainState":
        """What `to_json` gave."""
        watch = saved.get("watch")
        return cls(**{**saved, "watch": Watch.from_json(watch) if watch else Watch()})


def progress(state: TrainState, limits: TrainingConfig) -> float:
    """Share of the run that is done, in [0, 1]: the furthest of its limits, and never less than it
    was. Of max_time, what follows the last step (`reserve_seconds`) is kept back."""
    shares = [state.reached]
    if limits.max_steps:
        shares.append(state.step / limits.max_steps)
    if limits.max_tokens:
        shares.append(state.tokens / limits.max_tokens)
    if limits.max_epochs:
        shares.append(state.epochs / limits.max_epochs)
    if limits.max_time:
        usable = parse_seconds(limits.max_time) - reserve_seconds(state, limits)
        shares.append(state.elapsed_seconds / usable if usable > 0 else 1.0)
    return min(max(shares), 1.0)


def reserve_seconds(state: TrainState, limits: TrainingConfig) -> float:
    """Expected seconds between the last step and the end of the run: evaluation, samples, save and
    report, as they took before; and half a step, for a run ends at the border of steps that is
    nearest to its limit."""
    step = state.seconds / state.step if state.step else 0.0
    ends = state.evaluation_seconds + state.save_seconds + state.finish_seconds
    return ends + report_seconds(limits) + step / 2


def report_seconds(limits: TrainingConfig) -> float:
    """Expected seconds of the report."""
    whole = parse_seconds(limits.max_time) if limits.max_time else math.inf
    return min(REPORT_SECONDS, _REPORT_SHARE * whole)


def evaluation_fits(state: TrainState, limits: TrainingConfig) -> bool:
    """Whether one more evaluation along the way leaves max_time to the training.

    They may take a tenth of the time so far, the first a tenth of all: how long it takes tells more
    than the one of step 0, which also warms up. None is begun that the run's last one, soon to
    come, makes needless. Always true without max_time.
    """
    if not limits.max_time:
        return True
    whole, so_far = parse_seconds(limits.max_time), state.elapsed_seconds
    if so_far + state.evaluation_seconds >= whole - reserve_seconds(state, limits):
        return False
    share = EVALUATION_SHARE * (so_far if state.evaluated_seconds else whole)
    return state.evaluated_seconds + state.evaluation_seconds <= share


def expected_steps(state: TrainState, limits: TrainingConfig) -> int | None:
    """About how many steps the run will have in all, None before its first one."""
    done = progress(state, limits)
    if limits.max_steps and done <= state.step / limits.max_steps:
        return limits.max_steps
    return math.ceil(state.step / done) if state.step and done else limits.max_steps
