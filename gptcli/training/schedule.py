"""Learning-rate schedules, pure functions of step and progress."""

import math

from gptcli.config.schema import ScheduleConfig


def learning_rate(step: int, progress: float, schedule: ScheduleConfig, peak: float) -> float:
    """Learning rate for update `step` (0-based) at `progress` in [0, 1]: linear warmup by step,
    then the chosen decay by progress, down to min_lr_ratio * peak at progress 1."""
    return peak * learning_rate_ratio(step, progress, schedule)


def learning_rate_ratio(step: int, progress: float, schedule: ScheduleConfig) -> float:
    """`learning_rate` for a peak of 1. wsd: warmup, stable, linear decay over the last
    decay_ratio of the run (Hu et al. 2024); cosine: Loshchilov & Hutter 2017."""
    progress = min(max(progress, 0.0), 1.0)
    warmup = min(1.0, (step + 1) / schedule.warmup_steps) if schedule.warmup_steps else 1.0
    if schedule.kind == "constant":
        decay = 1.0
    elif schedule.kind == "cosine":
        decay = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif schedule.kind == "linear":
        decay = 1.0 - progress
    else:
        ratio = schedule.decay_ratio
        decay = min(1.0, (1.0 - progress) / ratio) if ratio else 1.0
    return min(warmup, schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * decay)


def is_decaying(progress: float, schedule: ScheduleConfig) -> bool:
    """Whether a wsd run at `progress` has left its stable part."""
    return schedule.kind == "wsd" and progress > 1.0 - schedule.decay_ratio
