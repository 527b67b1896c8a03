"""The training loop."""

import logging
import math
import time
from typing import Any

from torch import Tensor

from gptcli import stop, world
from gptcli.data.rows import Prefetch, StepBatch
from gptcli.device import peak_memory_bytes
from gptcli.errors import DataError, GptError, PeerError, ResourceError
from gptcli.training.events import StepEvent
from gptcli.training.flops import flops_per_token, learning_share, peak_flops
from gptcli.training.optimizers import peak_rate
from gptcli.training.readings import (
    Reading,
    Readings,
    reading_lag,
    update_ratio,
    watched_weights,
)
from gptcli.training.recovery import settle
from gptcli.training.schedule import learning_rate_ratio
from gptcli.training.session import Session
from gptcli.training.stability import Limits, applicable
from gptcli.training.state import INTERVAL_TIMES, expected_steps
from gptcli.training.step import forward_backward

log = logging.getLogger("gptcli")

_REFUSED = ("skip", "rollback")  # training.spike where a spike's update is not applied


def train(session: Session, batches: Prefetch) -> None:
    """Update the model until the run's limit, or until a stop is asked for; both end saved.

    Raises NonFiniteError after too many steps in a row that went wrong, and what `batches` raises.
    """
    training = session.config.training
    precision = session.choices.precision
    late = not session.parallel.sharded
    readings = Readings(late * reading_lag(session.device.kind, precision, training.spike))
    session.model.train()
    while _goes_on(session, readings):
        state, start = session.state, time.perf_counter()
        ratio = learning_rate_ratio(state.step, session.progress, session.config.schedule)
        batch = None
        try:
            batch = _next(batches)
            if batch is None:  # the reader saw a stop request first; _goes_on saves
                continue
            got = time.perf_counter()
            loss, grad_norm = forward_backward(session, batch)
            computed = time.perf_counter()
        except (DataError, PeerError, ResourceError):  # a file went away, or memory ran out
            # Of several processes all fail at the batch, but in the step one alone: no save then.
            if batch is None or session.parallel.here.size == 1:
                _keep_what_is_trained(session, readings)
            raise
        _update(session, readings, ratio, loss, grad_norm)
        updated = time.perf_counter()

        if readings.lag:  # the step before is read and logged while the device computes this one
            _settle(session, readings.arrived())
            _log_if_due(session, readings)
        state.step += 1
        state.tokens += batch.count
        state.epochs, state.position = batch.epochs, batch.position
        if not readings.lag:
            _settle(session, readings.arrived())
        if session.state is not state:  # a spike, and the run went back
            continue
        arrived = time.perf_counter()
        # On a GPU the wait for the last step's figures is the time that its work takes.
        parts = (got - start, computed - got + arrived - updated, updated - computed)
        times = dict(zip(INTERVAL_TIMES, parts, strict=False))
        _add(state.interval, {"tokens": batch.count, **times})
        state.seconds += arrived - start
        session.tick()
        if not readings.lag:
            _log_if_due(session, readings)
        # All that is left of the step, logging included, which the next line reports.
        other = time.perf_counter() - arrived
        _add(state.interval, {"other_seconds": other})
        state.seconds += other


def _update(
    session: Session, readings: Readings, ratio: float, loss: Tensor, grad_norm: Tensor
) -> None:
    """Update the weights, unless the step went wrong, and send off its figures."""
    state, training = session.state, session.config.training
    limits = _limits(session, readings)
    applies = applicable(loss, grad_norm, limits if training.spike in _REFUSED else Limits())
    logs = (state.step + 1) % training.log_every == 0
    old = watched_weights(session.model) if logs else None
    if readings.lag:  # decided on the device, so that nothing waits for it
        session.optimizer.step(ratio, applies)
    elif bool(applies):
        session.optimizer.step(ratio)
    session.optimizer.zero_grad()
    change = update_ratio(old, session.model) if old is not None else None
    figures = (loss, grad_norm, applies, change)
    readings.add(state.step + 1, ratio, limits, *figures, position=state.position)


def _next(batches: Prefetch) -> StepBatch | None:
    """The next batch, None where any of the processes has none because of a stop request. What one
    of them raises instead, it raises, and the others PeerError."""
    batch, problem = None, None
    try:
        batch = batches.next()
    except stop.Stopped:
        pass
    except GptError as error:
        problem = error
    lacking, failed = world.agree([float(batch is None), float(problem is not None)])
    if problem is not None:
        raise problem
    if failed:
        raise PeerError("another rank has no data to go on with", DataError.exit_code)
    return None if lacking else batch


def _goes_on(session: Session, readings: Readings) -> bool:
    """Do what is due between two steps, with all figures read. Returns whether a step follows."""
    while (due := session.due()) is not None:
        _settle(session, readings.arrived(lag=0))
        state = session.state
        _log_if_due(session, readings)
        if session.progress >= 1.0 and state.interval.get("tokens"):
            _log_interval(session, readings.last)  # the rest, up to the end
        if session.progress >= 1.0 and state.step == 0:
            log.warning(
                f"no time left for a step: {state.elapsed_seconds:.1f} s have gone by, and what"
                f" ends a run needs its part of max_time {session.config.training.max_time}"
            )
        if not session.attend(due):
            return False
        if session.progress < 1.0:  # else max_time went by meanwhile
            return True
    return True


def _keep_what_is_trained(session: Session, readings: Readings) -> None:
    """Save where the run fails between two steps. What hinders that is a warning: the failure that
    ends the run is the one to tell of."""
    try:
        _settle(session, readings.arrived(lag=0))
        _log_if_due(session, readings)
        if session.saved_step != session.state.step and not session.state.bad_steps:
            session.save(must=False)
    except Exception as error:  # out of memory, most of all
        log.warning(f"not saved at step {session.state.step}: {error}")


def _settle(session: Session, readings: list[Reading]) -> None:
    for reading in readings:
        settle(session, reading)


def _limits(session: Session, readings: Readings) -> Limits:
    """What the step that begins is judged by; the same whether figures are read late or not."""
    watch, zscore = session.state.watch, session.config.training.spike_zscore
    return watch.limits(zscore) if readings.waiting else watch.before


def _log_if_due(session: Session, readings: Readings) -> None:
    """Log the last step if that is due and not done. Its figures are the last that were read."""
    state, every = session.state, session.config.training.log_every
    if state.step % every == 0 and state.interval.get("tokens"):
        _log_interval(session, readings.last)


def _log_interval(session: Session, reading: Reading | None) -> None:
    """Write the metrics line for the steps since the last one, and tell the display. `reading` is
    of the last step, None where that was in another process."""
    state, config = session.state, session.config
    sums, state.interval = state.interval, {}
    loss = sums.get("loss", math.nan) / max(sums.get("steps", 0), 1)
    rate = peak_rate(config) * reading.lr_ratio if reading is not None else math.nan
    grad_norm = reading.grad_norm if reading is not None else math.nan
    update_ratio = reading.update_ratio if reading is not None else None
    times = {name: sums.get(name, 0.0) for name in INTERVAL_TIMES}
    per_second = sums["tokens"] / sum(times.values())
    mfu = _mfu(session, per_second)
    record: dict[str, Any] = {
        "event": "train",
        "step": state.step,
        "tokens": state.tokens,
        "epoch": state.epochs,
        "loss": loss,
        "lr": rate,
        "grad_norm": grad_norm,
        "update_ratio": update_ratio,
        "tokens_per_second": per_second,
        "seconds": state.seconds,
        **times,
        "memory_bytes": peak_memory_bytes(session.device),
        "progress": session.progress,
        "left_seconds": session.left_seconds,
    }
    session.metrics.write(record | ({"mfu": mfu} if mfu is not None else {}))
    steps, left = expected_steps(state, config.training), session.left_seconds
    event = StepEvent(
        state.step,
        steps,
        session.progress,
        loss,
        rate,
        grad_norm,
        state.tokens,
        per_second,
        state.seconds,
        left,
        update_ratio,
        mfu,
    )
    log.info(
        f"step {state.step}"
        + (f"/{steps}" if steps else "")
        + f"  loss {loss:.4f}  lr {rate:.3g}  {per_second:,.0f} tok/s"
        + (f"  mfu {mfu:.0%}" if mfu is not None else "")
        + (f"  left {left:.0f} s" if left is not None else ""),
        extra={"event": event},
    )


def _mfu(session: Session, tokens_per_second: float) -> float | None:
    """Model FLOPs utilisation, None on devices without a published peak."""
    peak = peak_flops(session.device, session.choices.precision)
    if peak is None:
        return None
    whole = flops_per_token(session.config.model, session.model.vocab_size)
    return tokens_per_second * whole * learning_share(session.config.finetune.method) / peak


def _add(sums: dict[str, float], values: dict[str, float]) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value
