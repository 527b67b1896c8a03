"""What a run does about each step's figures: counts it, or deals with one that went wrong."""

import logging
import math
import shlex
from dataclasses import replace
from pathlib import Path

from gptcli import world
from gptcli.errors import CheckpointError, NonFiniteError
from gptcli.evaluation.perplexity import Scores
from gptcli.runs import checkpoint
from gptcli.runs.metrics import truncate_after
from gptcli.training.initial import load_trained
from gptcli.training.optimizers import Optimizer
from gptcli.training.readings import Reading
from gptcli.training.saved import read_resumable
from gptcli.training.session import Session
from gptcli.training.state import TrainState

log = logging.getLogger("gptcli")

_STEPS_TO_GROW = 2000  # finite ones at one loss scale, before the next


def settle(session: Session, reading: Reading) -> None:
    """Take a step's figures into the run's state.

    A step that was not applied is counted, a spike is dealt with as training.spike says: with
    rollback, `session.state` is another object afterwards. Raises NonFiniteError after
    max_bad_steps in a row; the last checkpoint stays as it is.
    """
    state, training = session.state, session.config.training
    loss, grad_norm = reading.loss, reading.grad_norm
    finite = math.isfinite(loss) and math.isfinite(grad_norm)
    if training.spike != "off":
        state.watch = state.watch.having(loss, grad_norm, reading.limits, training.spike_zscore)
    if reading.applied:
        state.bad_steps = 0
        if session.choices.precision == "fp16":
            _grow_loss_scale(state)
        state.interval["loss"] = state.interval.get("loss", 0.0) + loss
        state.interval["steps"] = state.interval.get("steps", 0) + 1
        if reading.step > state.spike_step:
            state.rollbacks = 0
        if training.spike == "warn" and reading.limits.spike(loss, grad_norm):
            _note(session, reading, "spike", "a spike")
    elif finite and training.spike == "rollback":
        _roll_back(session, reading)
    elif not finite and _scale_was_too_large(session, loss):
        state.loss_scale, state.good_steps = state.loss_scale / 2, 0
    else:
        state.bad_steps += 1
        state.skipped_steps += 1
        kind = "spike" if finite else "bad_step"
        _note(session, reading, kind, f"{'a spike, ' if finite else ''}update not applied")
        _give_up_at(state.bad_steps, "spikes" if finite else "non-finite steps", session, reading)


def _roll_back(session: Session, reading: Reading) -> None:
    """Weights, optimizer and step as in the newest checkpoint, which is then published again with
    the data position of now: what made the spike is passed over, by a later resume too."""
    state, directory = session.state, session.directory
    _give_up_at(state.rollbacks + 1, "returns from spikes", session, reading)
    here = session.parallel.here
    newest = checkpoint.newest_valid(directory, log) if here.leads else None
    if newest is None and here.leads:
        raise CheckpointError(f"{directory} has no valid checkpoint to go back to")
    contents = read_resumable(Path(world.told(str(newest))))
    saved, scores = TrainState.from_json(contents.state["train"]), contents.state["scores"]
    load_trained(session.model, contents.model)
    session.optimizer = Optimizer(session.model, session.config.optimizer)
    session.optimizer.load_state_dict(contents.optimizer)
    world.meet()  # all have read what is published anew next
    session.scores = Scores.from_json(scores) if scores is not None else None
    times = {name: getattr(state, name) for name in vars(state) if name.endswith("seconds")}
    session.state = replace(
        saved,
        **times,
        position=state.position,
        epochs=state.epochs,
        watch=state.watch,
        rollbacks=state.rollbacks + 1,
        spike_step=max(state.spike_step, reading.step),
        skipped_steps=state.skipped_steps + 1,
    )
    session.save(must=True)
    session.close()  # the logs are other files afterwards
    if here.leads:
        truncate_after(directory, saved.step, saved.evaluated_step)
    _note(session, reading, "rollback", f"a spike, back to step {saved.step}, past these data")


def _note(session: Session, reading: Reading, event: str, what: str) -> None:
    """A line in metrics.jsonl, with where in the data the batch begins, and a warning. A rollback's
    line belongs to the step it leads to. `not_finite` says what a null stands for: JSON has no nan,
    no inf."""
    line = {"event": event, "step": reading.step}
    if event == "rollback":
        line |= {"step": session.state.step, "from_step": reading.step}
    figures = {"loss": reading.loss, "grad_norm": reading.grad_norm}
    lost = {name: str(value) for name, value in figures.items() if not math.isfinite(value)}
    line |= {**figures, **({"not_finite": lost} if lost else {}), "position": reading.position}
    session.metrics.write(line)
    log.warning(f"step {reading.step}: {_figures(reading)}; {what}")


def _figures(reading: Reading) -> str:
    return f"loss {reading.loss:.4g}, gradient norm {reading.grad_norm:.4g}"


def _give_up_at(count: int, what: str, session: Session, reading: Reading) -> None:
    """NonFiniteError when `count` in a row are as many as max_bad_steps allows."""
    if count >= session.config.training.max_bad_steps:
        hint = (
            "lower optimizer.lr, raise schedule.warmup_steps or set training.precision=fp32"
            " (spikes: training.spike=warn), then resume from the last checkpoint"
        )
        if session.config.training.spike != "rollback":  # which passes over data
            settings = shlex.quote(str(session.directory / "config.yaml"))
            hint += f"\nits batch: gpt data show {settings} --step {reading.step - 1}"
        raise NonFiniteError(
            f"{count} {what} in a row, the last at step {reading.step}: {_figures(reading)}",
            hint=hint,
        )


def _scale_was_too_large(session: Session, loss: float) -> bool:
    """fp16: whether the gradient overflowed because of the loss scale, which can still fall."""
    fp16 = session.choices.precision == "fp16"
    return fp16 and math.isfinite(loss) and session.state.loss_scale > 1.0


def _grow_loss_scale(state: TrainState) -> None:
    """Double it after _STEPS_TO_GROW (Micikevicius et al. 2018)."""
    state.good_steps += 1
    if state.good_steps >= _STEPS_TO_GROW:
        state.loss_scale, state.good_steps = state.loss_scale * 2, 0
