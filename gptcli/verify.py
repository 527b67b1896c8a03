"""`verify_run`: whether everything that a run directory holds is whole, readable and continuous."""

import math
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from gptcli import stop
from gptcli.config.load import load_config, load_resolved
from gptcli.config.schema import Config
from gptcli.errors import CheckpointError, ConfigError, DataError, GptError
from gptcli.runs import checkpoint
from gptcli.runs.continuity import (
    Rhythm,
    missing_evaluations,
    missing_steps,
    missing_texts,
    rhythms,
    some,
)
from gptcli.runs.holder import lock_holder
from gptcli.runs.load import load_model
from gptcli.runs.manifest import CONFIG, OPTIMIZER
from gptcli.runs.metrics import METRICS, SAMPLES, broken_lines, read_metrics, read_samples
from gptcli.runs.run_dir import CHECKPOINTS, RUN_JSON, RUN_JSON_BYTES, read_json, read_run_json
from gptcli.runs.space import refuse_link
from gptcli.training.optimizers import Optimizer
from gptcli.training.saved import read_resumable
from gptcli.training.start import resume_command
from gptcli.training.state import TrainState
from gptcli.training.trainable import set_trainable

Verdict = Literal["ok", "note", "bad"]
_BEST = f"{CHECKPOINTS}/best.json"


@dataclass(frozen=True)
class Finding:
    """What was looked at (a path below the run, or the name of a file), and how it is.

    `note` is what a resume deals with by itself, `bad` what is lost or wrong.
    """

    what: str
    verdict: Verdict
    text: str


@dataclass
class _Run:
    """A run directory as far as it was looked at: its run.json, the state of each checkpoint that a
    resume could take, and why the others are bad."""

    directory: Path
    in_use: bool  # as this begins
    about: dict[str, Any] = field(default_factory=dict)
    states: dict[int, TrainState] = field(default_factory=dict)
    bad: dict[int, str] = field(default_factory=dict)

    @property
    def going_on(self) -> bool:
        """Whether it has not come to its own end: what it was about to write may be missing."""
        return self.about.get("status") == "running"


def verify_run(run_dir: Path) -> Iterator[Finding]:
    """Look at everything in a run, one finding after the other. Changes nothing.

    Every file of every checkpoint is hashed, its model loaded and its state read as a resume does.
    Raises ResourceError where the checkpoints are those of another place, `stop.Stopped`.
    """
    refuse_link(run_dir)
    holder = lock_holder(run_dir)
    if holder is not None:
        yield Finding(
            ".", "note", f"in use by {holder}: what it writes meanwhile may be half there"
        )
    run = _Run(run_dir, holder is not None)
    yield _run_json(run)
    yield _config(run_dir)
    saved = checkpoint.list_checkpoints(run_dir)
    if not saved:
        yield Finding(CHECKPOINTS, "bad", "there is no checkpoint")
    for path in saved:
        stop.raise_if_requested()
        yield _checkpoint(run, path)
    records = read_metrics(run_dir)
    yield from _best(run, records)
    yield from _leftovers(run_dir)
    course = rhythms(run.about.get("history"), _configs(run_dir, saved))
    yield _metrics(run, records, course)
    yield _samples(run, records, course)


def mending(run_dir: Path, findings: list[Finding]) -> list[str]:
    """What to do about what is bad, for a hint: a command that goes on without it, if one does."""
    verdicts = {one.what: one.verdict for one in findings}
    whole = [w for w, v in verdicts.items() if w.startswith(f"{CHECKPOINTS}/step-") and v == "ok"]
    if "bad" not in verdicts.values() or not whole:
        return []
    newest = max(whole)
    if verdicts.get(CONFIG) == "bad":
        source, target = (shlex.quote(str(run_dir / w / CONFIG)) for w in (newest, ""))
        return [f"the config of the newest whole checkpoint: cp {source} {target}"]
    job = "finetune" if read_run_json(run_dir).get("job") == "finetune" else "pretrain"
    command = resume_command(job, run_dir)
    return [f"to go on from the newest checkpoint that is whole: {command}"]


def _run_json(run: _Run) -> Finding:
    path = run.directory / RUN_JSON
    try:
        run.about = read_json(path, RUN_JSON_BYTES)
    except CheckpointError as error:
        return Finding(RUN_JSON, "bad", _without(path, error))
    status, error_text = run.about.get("status"), run.about.get("error")
    if run.going_on and lock_holder(run.directory) is None:
        return Finding(RUN_JSON, "note", "readable; the run was killed, --resume goes on with it")
    return Finding(RUN_JSON, "ok", f"{status}{f': {error_text}' if error_text else ''}")


def _run_config(run_dir: Path) -> Config:
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(f"{run_dir / CONFIG} is missing or no regular file")
    return load_config(str(run_dir / CONFIG)).config


def _config(run_dir: Path) -> Finding:
    try:
        config = _run_config(run_dir)
    except ConfigError as error:
        return Finding(CONFIG, "bad", _without(run_dir / CONFIG, error))
    return Finding(CONFIG, "ok", f"config {config.name}")


def _configs(run_dir: Path, saved: list[Path]) -> Iterator[Config]:
    """Those that can be read, of the run and of its checkpoints."""
    with suppress(ConfigError):  # told of already
        yield _run_config(run_dir)
    for path in saved:
        with suppress(ConfigError):
            yield load_resolved(path / CONFIG)


def _checkpoint(run: _Run, path: Path) -> Finding:
    """One that goes away or is saved again meanwhile, by a run that goes on, is not bad."""
    what, step = str(path.relative_to(run.directory)), int(path.name.removeprefix("step-"))
    try:
        return Finding(what, "ok", _whole(run, path))
    except (CheckpointError, ConfigError, DataError) as first:
        error: GptError = first
    if run.in_use and not path.is_dir():
        return Finding(what, "note", "gone meanwhile: the run goes on, and deletes old ones")
    if run.in_use:
        try:
            return Finding(what, "ok", _whole(run, path))
        except (CheckpointError, ConfigError, DataError) as second:
            error = second
    run.bad[step] = _without(path, error)
    return Finding(what, "bad", run.bad[step])


def _whole(run: _Run, path: Path) -> str:
    """What is there of a checkpoint from which a resume could go on; else CheckpointError."""
    contents = read_resumable(path)
    contents.model.clear()  # hashed and looked at; loaded again as a model
    loaded = load_model(str(path), torch.device("cpu"), merge=False)
    state, moments = TrainState.from_json(contents.state["train"]), len(contents.optimizer)
    if contents.state["job"] == "finetune":
        set_trainable(loaded.model, loaded.config.finetune)
    try:
        Optimizer(loaded.model, loaded.config.optimizer).load_state_dict(contents.optimizer)
    except CheckpointError as error:
        raise CheckpointError(f"{path / OPTIMIZER}: {error.message}") from error
    run.states[state.step] = state
    files = loaded.manifest["files"]
    return (
        f"{len(files)} files, {sum(entry['bytes'] for entry in files.values()):,} bytes: hashes"
        f" agree, {loaded.model.parameter_count():,} parameters and {moments} moments are readable"
    )


def _best(run: _Run, records: list[dict[str, Any]]) -> Iterator[Finding]:
    lacks: Verdict = "note" if run.going_on else "bad"  # a resume writes it
    known = run.states[max(run.states)].best_step if run.states else None
    if not (run.directory / _BEST).exists():
        if known in run.states:
            yield Finding(_BEST, lacks, f"missing; the best checkpoint is that of step {known}")
        return
    best = checkpoint.read_best(run.directory)
    if best is None:
        yield Finding(_BEST, "bad", "it does not parse: the newest checkpoint counts as the best")
        return
    step, loss = best
    if step in run.bad:
        yield Finding(_BEST, "bad", f"it names step {step}, whose checkpoint is bad")
    elif not checkpoint.checkpoint_dir(run.directory, step).is_dir():
        yield Finding(_BEST, "bad", f"it names step {step}, of which there is no checkpoint")
    elif (logged := _logged_loss(records, step)) is None:  # told of with the log
        yield Finding(_BEST, "ok", f"step {step}, validation loss {loss:.4f}")
    elif logged != loss:
        told = f"it says loss {loss:.6g} at step {step}, {METRICS} says {logged:.6g}"
        yield Finding(_BEST, "bad", told)
    elif (better := _better(run, records)) not in (None, step):
        yield Finding(_BEST, lacks, f"it names step {step}, but step {better} is better")
    else:
        yield Finding(_BEST, "ok", f"step {step}, validation loss {loss:.4f}")


def _logged_loss(records: list[dict[str, Any]], step: int) -> float | None:
    losses = [r.get("loss") for r in records if r.get("event") == "eval" and r.get("step") == step]
    return losses[-1] if losses and isinstance(losses[-1], float) else None


def _better(run: _Run, records: list[dict[str, Any]]) -> int | None:
    """The best step by the log, of those whose checkpoint is there, as `Session` judges them: by
    the task's score, the first one of equals; without a task by the loss."""
    found: tuple[float, float] | None = None
    best = None
    for record in records:
        step, loss, task = record.get("step"), record.get("loss"), record.get("task")
        if record.get("event") != "eval" or not _is_step(record) or step not in run.states:
            continue
        value = task.get("value") if isinstance(task, dict) else 0.0
        if not isinstance(loss, float) or not isinstance(value, float | int):
            continue
        if math.isfinite(loss) and (found is None or (value, -loss) > found):
            found, best = (value, -loss), step
    return best


def _leftovers(run_dir: Path) -> Iterator[Finding]:
    hidden = [*run_dir.glob(".tmp-*"), *(run_dir / CHECKPOINTS).glob(".*-*")]
    for path in sorted(hidden):
        what = str(path.relative_to(run_dir))
        yield Finding(what, "note", "left by a process that was killed; a resume removes it")
    for path in sorted((run_dir / CHECKPOINTS).glob("replaced-step-*")):
        what = str(path.relative_to(run_dir))
        told = "set aside when the run went back; gpt runs prune removes it"
        yield Finding(what, "note", told)


def _metrics(run: _Run, records: list[dict[str, Any]], course: list[Rhythm]) -> Finding:
    """The steps of the log follow on each other, up to the newest checkpoint, and so do its
    evaluations."""
    steps = [r["step"] for r in records if r.get("event") == "train" and _is_step(r)]
    evaluated = {r["step"] for r in records if r.get("event") == "eval" and _is_step(r)}
    newest = max(run.states, default=None)
    back = [f"{b} behind {a}" for a, b in pairwise(steps) if b <= a]
    if back:
        return Finding(METRICS, "bad", f"steps come twice or fall: {some(back)}")
    gaps, ends = missing_steps(steps, course, newest)
    if gaps:
        return Finding(METRICS, "bad", f"lines are missing: steps {some(gaps)}")
    if ends is not None:
        return Finding(METRICS, "bad", f"ends at step {ends}, before checkpoint {newest}")
    known = {state.evaluated_step for state in run.states.values()} - {-1}
    if lost := missing_evaluations(evaluated, course, newest, known):
        return Finding(METRICS, "bad", f"evaluations are missing: steps {some(lost)}")
    last = steps[-1] if steps else 0
    text = f"{len(records):,} lines, steps up to {last:,} without a gap"
    if newest is not None and last > newest:
        text += f"; those behind {newest:,} are not saved, a resume does them again"
    cut = broken_lines(run.directory, METRICS)
    return Finding(METRICS, "note" if cut else "ok", text + (f"; {cut} cut lines" if cut else ""))


def _samples(run: _Run, records: list[dict[str, Any]], course: list[Rhythm]) -> Finding:
    cut, texts = broken_lines(run.directory, SAMPLES), read_samples(run.directory)
    newest = max(run.states, default=-1)
    last = run.states[newest].evaluated_step if run.states else -1
    evaluated = {r["step"] for r in records if r.get("event") == "eval" and _is_step(r)}
    saved = {step for step in evaluated if step <= last}  # later ones may be half written
    if lost := list(missing_texts(texts, saved, course)):
        return Finding(SAMPLES, "bad", f"texts are missing: {some(lost)}")
    text = f"{len(texts):,} texts" + (f"; {cut} cut lines" if cut else "")
    return Finding(SAMPLES, "note" if cut else "ok", text)


def _is_step(record: dict[str, Any]) -> bool:
    return type(record.get("step")) is int and record["step"] >= 0


def _without(path: Path, error: GptError) -> str:
    """The error's message without the path that the finding has already."""
    lines = [line.replace(f"{path}/", "") for line in error.message.splitlines()]
    return "; ".join(line.removeprefix(str(path)).lstrip(": ") for line in lines)
