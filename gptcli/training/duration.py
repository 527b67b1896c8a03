"""How long a run will take: its steps, evaluations, samples and checkpoints, from short probes."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from gptcli.config.schema import Config
from gptcli.config.units import parse_seconds
from gptcli.device import DTYPES, Device
from gptcli.evaluation.perplexity import EncodedDocument, perplexity
from gptcli.generation.engine import MOST_ROWS
from gptcli.model.gpt import GPT
from gptcli.training.flops import flops_per_token, learning_share
from gptcli.training.probe import median_seconds, probe_speed, step_seconds, synchronise
from gptcli.training.state import EVALUATION_SHARE
from gptcli.training.trainable import sequences_per_row

_SHARE_OF_PRODUCTS = 0.6  # of the speed of matrix products alone, where there is no probe
_SAVED_BYTES_PER_SECOND = 250e6  # written, synced and hashed


@dataclass(frozen=True)
class Paces:
    """Seconds of one step, one evaluation with its samples, one checkpoint, and of all before the
    first step. `source` is how they were found: probe (real steps), or products (operations over
    the speed of products)."""

    source: Literal["probe", "products"]
    step_seconds: float
    evaluation_seconds: float
    sampling_seconds: float
    saving_seconds: float
    starting_seconds: float = 0.0


@dataclass(frozen=True)
class Duration:
    """A whole run: `steps`, and seconds by what takes them."""

    steps: int
    training_seconds: float
    evaluation_seconds: float
    sampling_seconds: float
    saving_seconds: float
    starting_seconds: float

    @property
    def total_seconds(self) -> float:
        """All of them."""
        return (
            self.starting_seconds
            + self.training_seconds
            + self.evaluation_seconds
            + self.sampling_seconds
            + self.saving_seconds
        )


def probed_paces(
    model: GPT,
    config: Config,
    device: Device,
    precision: str,
    rows: int,
    *,
    val_tokens: int,
    checkpoint_bytes: int,
    seconds: float = 5.0,
) -> Paces:
    """Paces from about `seconds` of real steps of `model`, a few scored windows and one generated
    token. Raises what `probe_speed` raises."""
    speed = probe_speed(model, config, device, precision, rows, seconds)
    return Paces(
        source="probe",
        step_seconds=step_seconds(speed, config),
        evaluation_seconds=val_tokens * _scored_token_seconds(model, config, device, precision),
        sampling_seconds=_samples(config) * _generated_token_seconds(model, config, device),
        saving_seconds=checkpoint_bytes / _SAVED_BYTES_PER_SECOND,
    )


def computed_paces(
    config: Config,
    vocab_size: int,
    device: Device,
    precision: str,
    *,
    recompute: bool,
    val_tokens: int,
    checkpoint_bytes: int,
) -> Paces:
    """Paces from the operations of a token and the measured speed of matrix products."""
    size = 1024 if device.kind == "cpu" else 4096
    a = torch.ones(size, size, device=device.torch, dtype=DTYPES[precision])
    product = median_seconds(lambda: a @ a, device, 0.5, least=3)
    whole = flops_per_token(config.model, vocab_size) / (2 * size**3 / product) / _SHARE_OF_PRODUCTS
    forward = whole / 3  # the backward pass takes twice as many operations
    token = whole * learning_share(config.finetune.method) * sequences_per_row(config.finetune)
    return Paces(
        source="products",
        step_seconds=config.training.tokens_per_step * (token + forward * recompute),
        evaluation_seconds=val_tokens * forward,
        sampling_seconds=_samples(config) * config.samples.n * forward,
        saving_seconds=checkpoint_bytes / _SAVED_BYTES_PER_SECOND,
    )


def duration(config: Config, paces: Paces, epoch_tokens: int | None) -> Duration | None:
    """The run at `paces`, up to the first of its limits; None where no limit tells.

    `epoch_tokens` is the length of the training text, None where it is not known.
    """
    limits = config.training
    steps = _most_steps(config, epoch_tokens)
    if limits.max_time:
        ends = _between(config, paces, 1)  # the start, and what comes before and after the steps
        seconds = parse_seconds(limits.max_time) - (ends.total_seconds - ends.training_seconds)
        # With each step goes its share of the evaluations and checkpoints between, of which a run
        # of limited time leaves out what would take more of it than EVALUATION_SHARE.
        many = _between(config, paces, 10**6)
        between = (many.total_seconds - paces.starting_seconds) / 10**6 - paces.step_seconds
        between = min(between, paces.step_seconds * EVALUATION_SHARE / (1 - EVALUATION_SHARE))
        most = max(1, int(seconds / (paces.step_seconds + between)))
        steps = most if steps is None else min(steps, most)
    if steps is None:
        return None
    found = _between(config, paces, steps)
    return _thinned(found, parse_seconds(limits.max_time)) if limits.max_time else found


def _thinned(run: Duration, limit_seconds: float) -> Duration:
    """Without the evaluations and checkpoints along the way that the limit has no time for."""
    extra = run.evaluation_seconds + run.sampling_seconds + run.saving_seconds
    over = max(0.0, run.total_seconds - limit_seconds)
    kept = max(0.0, 1 - over / extra) if extra else 1.0
    return replace(
        run,
        evaluation_seconds=kept * run.evaluation_seconds,
        sampling_seconds=kept * run.sampling_seconds,
        saving_seconds=kept * run.saving_seconds,
    )


def _most_steps(config: Config, epoch_tokens: int | None) -> int | None:
    """Steps until the first limit but max_time; None where there is none, or it is not known."""
    limits = config.training
    found = [limits.max_steps] if limits.max_steps else []
    if limits.max_tokens:
        found.append(math.ceil(limits.max_tokens / limits.tokens_per_step))
    if limits.max_epochs and epoch_tokens is not None:
        found.append(math.ceil(limits.max_epochs * epoch_tokens / limits.tokens_per_step))
    return max(1, min(found)) if found else None


def _between(config: Config, paces: Paces, steps: int) -> Duration:
    """`steps` steps with the evaluations before, between and behind them, each of which saves, as
    does every save_every-th step and the last before the decay."""
    evaluate, save = config.training.eval_every, config.training.save_every
    ends = steps % evaluate != 0
    evaluations = 1 + steps // evaluate + ends
    saves_apart = steps // save - steps // math.lcm(evaluate, save)
    saves = evaluations + saves_apart + (config.schedule.kind == "wsd")
    return Duration(
        steps=steps,
        training_seconds=steps * paces.step_seconds,
        evaluation_seconds=evaluations * paces.evaluation_seconds,
        sampling_seconds=evaluations * paces.sampling_seconds,
        saving_seconds=saves * paces.saving_seconds,
        starting_seconds=paces.starting_seconds,
    )


def _samples(config: Config) -> int:
    """Tokens generated at an evaluation, those of one prompt's samples at a time."""
    return len(config.samples.prompts) * config.samples.max_new_tokens


def _scored_token_seconds(model: GPT, config: Config, device: Device, precision: str) -> float:
    """Of evaluation, for each token of the text."""
    length = 8 * model.config.block_size + 1
    tokens = torch.randint(model.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    document = EncodedDocument(tokens, unscored=0, bytes=length)

    def score() -> None:
        perplexity(model, [document], device, stride=config.eval.stride, precision=precision)

    return median_seconds(score, device, 1.0, least=2) / (length - 1)


@torch.no_grad()
def _generated_token_seconds(model: GPT, config: Config, device: Device) -> float:
    """Of one token for each of the samples of a prompt, with half of them behind it."""
    count = min(config.samples.max_new_tokens, model.config.block_size) // 2
    model.eval()
    rows = min(config.samples.n, MOST_ROWS)  # more come one batch after the other
    cache = model.new_cache(rows)
    tokens = torch.zeros(rows, count + 1, dtype=torch.int64, device=device.torch)
    if count:
        model(tokens[:, :-1], cache, last_only=True)

    def step() -> None:
        model(tokens[:, -1:], cache, last_only=True)
        cache.length = count
        synchronise(device)

    return median_seconds(step, device, 0.5, least=2) * math.ceil(config.samples.n / rows)
