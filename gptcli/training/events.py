"""What training tells whoever listens: the `event` of log records."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepEvent:
    """Figures since the last one. Losses in nats per token."""

    step: int
    max_steps: int | None
    progress: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    seconds: float
    left_seconds: float | None


@dataclass(frozen=True)
class EvalEvent:
    """Validation scores at a step."""

    step: int
    loss: float
    perplexity: float
    bits_per_byte: float
    seconds: float


@dataclass(frozen=True)
class SampleEvent:
    """One text generated along the way."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class SaveEvent:
    """A published checkpoint."""

    step: int
    path: str
    seconds: float
