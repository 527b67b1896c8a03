"""The training loop."""

import logging
import math
import time

import torch

from gptcli import stop
from gptcli.config.units import parse_seconds
from gptcli.data.rows import Prefetch
from gptcli.errors import DataError
from gptcli.training.events import StepEvent
from gptcli.training.schedule import learning_rate_ratio
from gptcli.training.session import Session
from gptcli.training.state import expected_steps
from gptcli.training.step import forward_backward

log = logging.getLogger("gptcli")

_TIMES = ("data_wait_seconds", "forward_backward_seconds", "optimizer_seconds", "other_seconds")


def train(session: Session, batches: Prefetch) -> None:
    """Update the model until the run's limit, or until a stop is asked for; both end saved.

    Raises NonFiniteError after too many non-finite steps, and what `batches` raises.
    """
    state, optimizer = session.state, session.optimizer
    loss_of = torch.compile(session.model.loss) if session.choices.compile else session.model.loss
    session.model.train()
    while session.between_steps():
        start = time.perf_counter()
        ratio = learning_rate_ratio(state.step, session.progress, session.config.schedule)
        try:
            batch = batches.next()
        except stop.Stopped:  # the reader saw the request first; between_steps saves
            continue
        except DataError:  # a file went away under the run: keep what is trained
            session.save(must=False)
            raise
        got = time.perf_counter()
        loss, grad_norm = forward_backward(session, batch, loss_of)
        computed = time.perf_counter()
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            optimizer.step(ratio)
        optimizer.zero_grad()
        updated = time.perf_counter()

        state.step += 1
        state.tokens += batch.count
        state.epochs, state.position = batch.epochs, batch.position
        if finite:
            state.bad_steps = 0
            _grow_loss_scale(session)
            _add(state.interval, {"loss": loss, "steps": 1})
        else:
            _not_applied(session, loss, grad_norm)
        state.interval["tokens"] = state.interval.get("tokens", 0) + batch.count
        parts = (got - start, computed - got, updated - computed)
        _add(state.interval, dict(zip(_TIMES, parts, strict=False)))
        state.seconds += updated - start
        session.tick()
        if state.step % session.config.training.log_every == 0 or session.progress >= 1.0:
            _log_interval(session, ratio, grad_norm)
        # All that is left of the step, logging included, which the next line reports.
        other = time.perf_counter() - updated
        _add(state.interval, {"other_seconds": other})
        state.seconds += other


def _not_applied(session: Session, loss: float, grad_norm: float) -> None:
    """A non-finite step: in fp16 the scale may have been too large; else it counts as bad."""
    state = session.state
    if session.choices.precision == "fp16" and math.isfinite(loss) and state.loss_scale > 1.0:
        state.loss_scale, state.good_steps = state.loss_scale / 2, 0
        return
    session.bad_step(loss, grad_norm)


def _grow_loss_scale(session: Session) -> None:
    """fp16: try a larger scale after 2000 finite steps (Micikevicius et al. 2018)."""
    state = session.state
    state.good_steps += 1
    if state.good_steps >= 2000:
        state.loss_scale, state.good_steps = state.loss_scale * 2, 0


def _log_interval(session: Session, ratio: float, grad_norm: float) -> None:
    """Write the metrics line for the steps since the last one, and tell the display."""
    state, config = session.state, session.config
    sums, state.interval = state.interval, {}
    loss = sums.get("loss", math.nan) / max(sums.get("steps", 0), 1)
    rate = config.optimizer.lr * ratio
    times = {name: sums.get(name, 0.0) for name in _TIMES}
    per_second = sums["tokens"] / sum(times.values())
    session.metrics.write(
        {
            "event": "train",
            "step": state.step,
            "tokens": state.tokens,
            "epoch": state.epochs,
            "loss": loss,
            "lr": rate,
            "grad_norm": grad_norm,
            "tokens_per_second": per_second,
            "seconds": state.seconds,
            **times,
        }
    )
    steps, done = expected_steps(state, config.training), session.progress
    left = None
    if config.training.max_time and done >= state.elapsed_seconds / parse_seconds(
        config.training.max_time
    ):
        left = parse_seconds(config.training.max_time) - state.elapsed_seconds
    elif done:
        left = state.elapsed_seconds * (1 - done) / done
    shown = f"step {state.step}" + (f"/{steps}" if steps else "")
    log.info(
        f"{shown}  loss {loss:.4f}  lr {rate:.3g}  {per_second:,.0f} tok/s"
        + (f"  left {left:.0f} s" if left is not None else ""),
        extra={
            "event": StepEvent(
                state.step,
                steps,
                done,
                loss,
                rate,
                grad_norm,
                state.tokens,
                per_second,
                state.seconds,
                left,
            )
        },
    )


def _add(sums: dict[str, float], values: dict[str, float]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value
