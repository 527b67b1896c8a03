"""One training run: everything the loop works with, and what it does between steps."""

import logging
import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gptcli import stop, world
from gptcli.config.load import dump_config
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device
from gptcli.errors import ResourceError
from gptcli.evaluation.perplexity import Scores
from gptcli.model.gpt import GPT
from gptcli.model.lora import adapter_tensors
from gptcli.runs import checkpoint
from gptcli.runs.metrics import SAMPLES, MetricsLog, NoLog
from gptcli.runs.prune import last_before_decay
from gptcli.runs.run_dir import update_run_json
from gptcli.runs.sharded import publish_together
from gptcli.runs.tensorboard_log import TensorBoardLog
from gptcli.training.choices import Choices
from gptcli.training.events import EvalEvent, SampleEvent, SaveEvent
from gptcli.training.facts import TaskScore, evaluation_record, run_facts
from gptcli.training.objective import LossOf
from gptcli.training.optimizers import Optimizer
from gptcli.training.parallel import Parallel
from gptcli.training.samples import sample_texts
from gptcli.training.schedule import is_decaying
from gptcli.training.state import (
    TrainState,
    evaluation_fits,
    progress,
    report_seconds,
    reserve_seconds,
)

log = logging.getLogger("gptcli")

_SLOW_SAVE_SECONDS = 1.0  # what takes less is no burden, however often
# Of the state: what each process measures for itself, and rank 0 for all.
_CLOCKS = (
    *("elapsed_seconds", "reached", "seconds", "evaluation_seconds"),
    *("evaluated_seconds", "save_seconds", "finish_seconds"),
)
_LOST_SECONDS = 1.0  # of elapsed time: so much may be forgotten where a save would keep only them


@dataclass(frozen=True)
class Due:
    """What is to be done before the next step. `end`: the run's limit or a stop request."""

    evaluate: bool
    save: bool
    end: bool


@dataclass
class Session:
    """A run in memory. `loss_of` is what a step minimises; `score_validation` scores the validation
    part, at every evaluation, and so does `score_task` where there is one; the best checkpoint is
    then the one with the best task score, else with the least validation loss. The logs `metrics`
    and `samples` are opened to append when they are first used.

    `clock` is the moment (time.monotonic()) up to which elapsed_seconds counts, at first the one
    where this process's work began.
    """

    config: Config
    directory: Path
    device: Device
    choices: Choices
    model: GPT
    tokenizer: Tokenizer
    optimizer: Optimizer
    state: TrainState
    loss_of: LossOf
    score_validation: Callable[[], Scores]
    data_fingerprint: dict[str, Any]
    job: str = "pretrain"
    scores: Scores | None = None
    score_task: Callable[[], TaskScore] | None = None
    adapter: dict[str, Any] | None = None  # adapter.json, of a run that saves adapters alone
    parallel: Parallel = field(default_factory=Parallel)
    stopping: signal.Signals | None = None  # what all processes know of
    saved_step: int = -1
    clock: float = field(default_factory=time.monotonic)
    _saved_at: float = field(default_factory=time.monotonic)
    _saved_elapsed: float = field(init=False)
    _progress_before: float | None = None  # when the last step began
    _first: tuple[float, float] | None = None  # elapsed seconds and progress behind the first step
    _save_asked: bool = False
    _told_thinning: bool = False
    _told_slow_saves: bool = False

    def __post_init__(self) -> None:
        self._saved_elapsed = self.state.elapsed_seconds

    @cached_property
    def metrics(self) -> MetricsLog:
        """metrics.jsonl, and what TensorBoard reads where the config asks for it; of rank 0."""
        if not self.parallel.here.leads:
            return NoLog(self.directory)
        tensorboard = self.config.report.tensorboard
        return TensorBoardLog(self.directory) if tensorboard else MetricsLog(self.directory)

    @cached_property
    def samples(self) -> MetricsLog:
        """samples.jsonl, of rank 0."""
        return (MetricsLog if self.parallel.here.leads else NoLog)(self.directory, SAMPLES)

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return progress(self.state, self.config.training)

    @property
    def _ends(self) -> bool:
        """Whether this process trains no further."""
        return self.progress >= 1.0 or self.stopping is not None

    @property
    def finished(self) -> bool:
        """Whether the limit is reached and the model that the run ends with is evaluated."""
        return self.progress >= 1.0 and self.state.evaluated_step == self.state.step

    @property
    def left_seconds(self) -> float | None:
        """Expected seconds to the end of the run, judged by this process's steps so far."""
        elapsed, done = self._first or (0.0, 1.0)
        if self.progress <= done:
            return None
        rate = (self.state.elapsed_seconds - elapsed) / (self.progress - done)
        return rate * (1.0 - self.progress) + reserve_seconds(self.state, self.config.training)

    def tick(self) -> None:
        """Bring the elapsed time, and with it the progress, up to now."""
        now = time.monotonic()
        self.state.elapsed_seconds += now - self.clock
        self.clock = now
        self.state.reached = self.progress

    def agree(self) -> None:
        """Learn what any of the processes was asked to do, and take over rank 0's times: whatever
        follows from them is then the same for all."""
        asked, number = stop.take_save_request(), stop.requested()
        timed = self._minutes_due()
        if self.parallel.here.size == 1:
            self.stopping, self._save_asked = number, asked or timed
            return
        times = [getattr(self.state, name) for name in _CLOCKS]
        if not self.parallel.here.leads:
            timed, times = False, [-math.inf] * len(times)
        agreed, saves, *times = world.agree([float(number or 0), float(asked or timed), *times])
        self.stopping = signal.Signals(int(agreed)) if agreed else None
        if self.stopping is not None and number is None:
            stop.request(self.stopping)
        self._save_asked = bool(saves)
        for name, value in zip(_CLOCKS, times, strict=True):
            setattr(self.state, name, value)

    def due(self) -> Due | None:
        """What comes before the next step, None for nothing; to be asked once a step."""
        self.agree()
        step, training = self.state.step, self.config.training
        end = self._ends
        save = self._save_asked or step % training.save_every == 0
        save = self._decay_begins() or save
        if self._first is None and self._progress_before is not None:
            self._first = (self.state.elapsed_seconds, self.progress)
        self._progress_before = self.progress
        evaluate = self._evaluation_due()
        return Due(evaluate, save, end) if evaluate or save or end else None

    def attend(self, due: Due) -> bool:
        """Evaluate and save as `due`. Returns whether the run goes on to another step.

        A stop request or the end of the run saves: the elapsed time too, where this process got no
        further than to start. Evaluation that a stop interrupts leaves no trace and is done again
        after the resume.
        """
        improved, step = False, self.state.step
        if due.evaluate:
            try:
                improved = self._evaluate()
                self.saved_step = -1  # a checkpoint of this step, if there, lacks these scores
            except stop.Stopped:
                log.info("evaluation interrupted")
        self.tick()
        self.agree()  # behind it nothing reads this process's own clock until all have saved
        ends = due.end or self.stopping is not None
        # After steps that were not applied, the checkpoint before them is the one to keep.
        save = (due.save or improved) and not self.state.bad_steps
        unsaved = self.saved_step != step
        late = self.state.elapsed_seconds - self._saved_elapsed > _LOST_SECONDS
        if ((save or ends) and unsaved) or (ends and late):
            self.save(must=unsaved and (ends or step == 0))
        if improved and self.parallel.here.leads:
            self._point_at_best()
        self.tick()
        world.meet()
        self.agree()
        return not ends

    def save(self, *, must: bool) -> None:
        """Publish a checkpoint. Lack of space is a warning unless the checkpoint `must` be."""
        self.tick()
        began, state = time.monotonic(), self.state
        # What this save will take, and the report of a process that ends here, count too.
        rest = state.save_seconds + (report_seconds(self.config.training) if self._ends else 0.0)
        train = {**state.to_json(), "elapsed_seconds": state.elapsed_seconds + rest}
        whole = self.adapter is None
        contents = checkpoint.Contents(
            model=self.model.state_dict() if whole else adapter_tensors(self.model),
            optimizer=self.optimizer.state_dict(),
            state={
                "train": train,
                "choices": self.choices.to_json(),
                "data_fingerprint": self.data_fingerprint,
                "job": self.job,
                "scores": self.scores.to_json() if self.scores is not None else None,
                "decaying": is_decaying(self.progress, self.config.schedule),
            },
            config_yaml=dump_config(self.config),
            tokenizer=self.tokenizer,
            adapter=self.adapter,
        )
        self.metrics.sync()  # what a full disk held up too belongs to the step that is saved
        self.samples.sync()
        try:
            path = publish_together(
                self.directory, self.state.step, contents, in_shares=self.parallel.sharded
            )
        except ResourceError as error:
            if must:
                raise
            log.warning(f"not saved at step {self.state.step}, trying again later: {error}")
            return
        seconds = state.save_seconds = time.monotonic() - began
        between = began - self._saved_at
        self.saved_step, self._saved_at = self.state.step, time.monotonic()
        self._saved_elapsed = train["elapsed_seconds"]
        log.info(
            f"saved {path} in {seconds:.1f} s",
            extra={"event": SaveEvent(self.state.step, str(path), seconds)},
        )
        if not must:
            self._tell_slow_saves(seconds, between)
        if self.parallel.here.leads:
            checkpoint.prune(self.directory, self.config.training.keep_last, self._protected())

    def _tell_slow_saves(self, seconds: float, between: float) -> None:
        """Once: that saves take longer than what lies between them."""
        if seconds > max(between, _SLOW_SAVE_SECONDS) and not self._told_slow_saves:
            self._told_slow_saves = True
            log.warning(
                f"this save took {seconds:.1f} s, longer than the {between:.1f} s since the last"
                f" one: {self.directory} is slow, or training.save_every"
                f" {self.config.training.save_every} too small"
            )

    def _evaluate(self) -> bool:
        """Score the validation part and write samples; returns whether it is the best so far."""
        state, began = self.state, time.monotonic()
        scores = self.score_validation()
        task, texts = self._judged()
        state.evaluated_step = state.step
        state.evaluation_seconds = time.monotonic() - began
        if state.step and self.progress < 1.0:
            state.evaluated_seconds += state.evaluation_seconds
        self.scores = scores
        self.metrics.write(evaluation_record(state, scores, task))
        for text in texts:
            self.samples.write(text)
        event = EvalEvent(
            state.step, scores.loss, scores.perplexity, scores.bits_per_byte, scores.seconds
        )
        log.info(
            f"step {state.step}  validation loss {scores.loss:.4f}"
            f"  perplexity {scores.perplexity:.2f}  bits/byte {scores.bits_per_byte:.4f}"
            + (f"  {task.name} {task.value:.4f}" if task is not None else ""),
            extra={"event": event},
        )
        for text in texts:
            sample = SampleEvent(state.step, text["prompt"], text["text"])
            shown = " ".join((text["prompt"] + text["text"]).split())[:120]
            log.info(f"sample: {shown}", extra={"event": sample})
        if not math.isfinite(scores.loss):
            return False
        # Of equal task scores the one with less loss.
        now = (task.value if task is not None else 0.0, -scores.loss)
        best = (state.best_score or 0.0, -(state.best_loss or 0.0))
        improved = state.best_loss is None or now > best
        if improved:
            state.best_loss, state.best_step = scores.loss, state.step
            state.best_score = task.value if task is not None else None
        self._lose_patience(improved)
        return improved

    def _judged(self) -> tuple[TaskScore | None, list[dict[str, Any]]]:
        """The task's score and some texts: rank 0 finds them, with the help of all where none has
        the whole model. Raises `stop.Stopped`, for all."""
        here, task, texts, stopped = self.parallel.here, None, list[dict[str, Any]](), False
        if here.leads or self.parallel.sharded:
            try:
                task = self.score_task() if self.score_task is not None else None
                with stop.postponed() if self.parallel.sharded else nullcontext():
                    texts = sample_texts(
                        self.model, self.tokenizer, self.config, self.state.step, self.state.tokens
                    )
            except stop.Stopped:
                if here.size == 1:
                    raise
                stopped = True
        if here.size == 1:
            return task, texts
        stopped, found = world.told([stopped, asdict(task) if task is not None else None])
        if stopped:
            raise stop.Stopped
        return TaskScore(**found) if found is not None else None, texts

    def _lose_patience(self, improved: bool) -> None:
        """End the run where as many evaluations as `finetune.patience` says did not improve."""
        state, patience = self.state, self.config.finetune.patience
        state.stale_evaluations = 0 if improved else state.stale_evaluations + 1
        if patience is not None and self.job == "finetune" and state.stale_evaluations >= patience:
            if self.progress < 1.0:
                log.info(f"ends here: no better for {patience} evaluations (finetune.patience)")
            state.reached = 1.0

    def _point_at_best(self) -> None:
        """best.json names a checkpoint that exists: the one of this step, if it was saved. A full
        disk is a warning; a resume writes it."""
        if self.saved_step == self.state.step and self.state.best_loss is not None:
            try:
                checkpoint.write_best(self.directory, self.state.step, self.state.best_loss)
            except ResourceError as error:
                log.warning(f"{error}; the best checkpoint is that of step {self.state.step}")
                return
            checkpoint.prune(self.directory, self.config.training.keep_last, self._protected())

    def _evaluation_due(self) -> bool:
        """Whether this step is to be evaluated: the first, the last and those between them that
        are due and leave max_time to the training."""
        state, training = self.state, self.config.training
        if state.evaluated_step == state.step:
            return False
        if state.step == 0 or self.progress >= 1.0:
            return True
        if state.step % training.eval_every:
            return False
        fits = evaluation_fits(state, training)
        if not fits and not self._told_thinning:
            self._told_thinning = True
            log.info(
                f"not every evaluation fits: one takes {state.evaluation_seconds:.1f} s, all may"
                f" take a tenth of max_time {training.max_time} (eval.max_tokens makes them short)"
            )
        return fits

    def _decay_begins(self) -> bool:
        """Whether the next step is the first of the decay (judged by the length of this one)."""
        schedule, before = self.config.schedule, self._progress_before
        if schedule.kind != "wsd" or before is None or is_decaying(self.progress, schedule):
            return False
        return is_decaying(2 * self.progress - before, schedule)

    def _protected(self) -> list[int]:
        """The last checkpoint before the decay, from which a longer run could go on."""
        kept = last_before_decay(self.directory)
        return [int(checkpoint.read_state(kept)["train"]["step"])] if kept is not None else []

    def _minutes_due(self) -> bool:
        minutes = self.config.training.save_minutes
        return minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def close(self) -> None:
        """Close the logs; the next record opens them again."""
        for name in ("metrics", "samples"):
            if name in self.__dict__:
                self.__dict__.pop(name).close()

    def write_run_json(self, **changes: Any) -> None:
        """Update run.json with the facts of now and `changes`; rank 0 does."""
        if not self.parallel.here.leads:
            return
        self.tick()
        facts = run_facts(self.state, self.model, self.choices, self.scores)
        update_run_json(self.directory, **{**facts, **changes})
