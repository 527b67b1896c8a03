"""One training run: everything the loop works with, and what it does between steps."""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptcli import stop
from gptcli.config.load import dump_config
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device
from gptcli.errors import NonFiniteError, ResourceError
from gptcli.evaluation.perplexity import Scores
from gptcli.generation.engine import Sampling, generate_samples
from gptcli.generation.prompt import encode_prompt, fit_prompt
from gptcli.model.gpt import GPT
from gptcli.runs import checkpoint
from gptcli.runs.metrics import METRICS, SAMPLES, MetricsLog
from gptcli.runs.run_dir import update_run_json
from gptcli.training.choices import Choices
from gptcli.training.events import EvalEvent, SampleEvent, SaveEvent
from gptcli.training.optimizers import Optimizer
from gptcli.training.schedule import is_decaying
from gptcli.training.state import TrainState, progress

log = logging.getLogger("gptcli")


@dataclass
class Session:
    """A run in memory. `validation` is what every evaluation scores; `score_validation` does."""

    config: Config
    directory: Path
    device: Device
    choices: Choices
    model: GPT
    tokenizer: Tokenizer
    optimizer: Optimizer
    state: TrainState
    score_validation: Callable[[], Scores]
    data_fingerprint: dict[str, Any]
    job: str = "pretrain"
    scores: Scores | None = None
    metrics: MetricsLog = field(init=False)
    samples: MetricsLog = field(init=False)
    saved_step: int = -1
    _saved_at: float = field(default_factory=time.monotonic)
    _clock: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.metrics = MetricsLog(self.directory, METRICS)
        self.samples = MetricsLog(self.directory, SAMPLES)

    @property
    def progress(self) -> float:
        """Share of the run that is done, in [0, 1]."""
        return progress(self.state, self.config.training)

    @property
    def finished(self) -> bool:
        """Whether the limit is reached and the model that the run ends with is evaluated."""
        return self.progress >= 1.0 and self.state.evaluated_step == self.state.step

    def tick(self) -> None:
        """Bring the elapsed time up to now."""
        now = time.monotonic()
        self.state.elapsed_seconds += now - self._clock
        self._clock = now

    def between_steps(self) -> bool:
        """Evaluate and save where due. Returns whether the run goes on to another step.

        A stop request or the end of the run saves. Evaluation that a stop interrupts leaves no
        trace and is done again after the resume.
        """
        self.tick()
        training, step = self.config.training, self.state.step
        done = self.progress >= 1.0
        improved = False
        if (done or step % training.eval_every == 0) and self.state.evaluated_step != step:
            try:
                improved = self._evaluate()
                self.saved_step = -1  # a checkpoint of this step, if there, lacks these scores
            except stop.Stopped:
                log.info("evaluation interrupted")
        stopping = done or stop.requested() is not None
        due = step % training.save_every == 0 or stop.take_save_request() or self._minutes_due()
        due = due or improved or self._decay_begins()
        if self.state.bad_steps:
            due = False  # the checkpoint before them is the one to keep
        if (due or stopping) and self.saved_step != step:
            self.save(must=stopping or step == 0)
        if improved:
            self._point_at_best()
        self.tick()
        return not stopping

    def save(self, *, must: bool) -> None:
        """Publish a checkpoint. Lack of space is a warning unless the checkpoint `must` be."""
        began = time.perf_counter()
        contents = checkpoint.Contents(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            state={
                "train": self.state.to_json(),
                "choices": self.choices.to_json(),
                "data_fingerprint": self.data_fingerprint,
                "job": self.job,
                "scores": self.scores.to_json() if self.scores is not None else None,
                "decaying": is_decaying(self.progress, self.config.schedule),
            },
            config_yaml=dump_config(self.config),
            tokenizer=self.tokenizer,
        )
        try:
            if self.state.step == 0:
                checkpoint.check_space(self.directory, checkpoint.space_needed(contents))
            path = checkpoint.publish(self.directory, self.state.step, contents)
        except ResourceError as error:
            if must:
                raise
            log.warning(f"not saved at step {self.state.step}, trying again later: {error}")
            return
        self.saved_step, self._saved_at = self.state.step, time.monotonic()
        seconds = time.perf_counter() - began
        log.info(
            f"saved {path} in {seconds:.1f} s",
            extra={"event": SaveEvent(self.state.step, str(path), seconds)},
        )
        checkpoint.prune(self.directory, self.config.training.keep_last, self._protected())

    def _evaluate(self) -> bool:
        """Score the validation part and write samples; returns whether it is the best so far."""
        scores = self.score_validation()
        texts = self._sample()
        state = self.state
        state.evaluated_step = state.step
        record = {
            "event": "eval",
            "step": state.step,
            "tokens": state.tokens,
            "loss": scores.loss,
            "perplexity": scores.perplexity,
            "bits_per_byte": scores.bits_per_byte,
            "accuracy": scores.accuracy,
            "seconds": scores.seconds,
            "training_seconds": state.seconds,
        }
        self.scores = scores
        self.metrics.write(record)
        for text in texts:
            self.samples.write(text)
        event = EvalEvent(
            state.step, scores.loss, scores.perplexity, scores.bits_per_byte, scores.seconds
        )
        log.info(
            f"step {state.step}  validation loss {scores.loss:.4f}"
            f"  perplexity {scores.perplexity:.2f}  bits/byte {scores.bits_per_byte:.4f}",
            extra={"event": event},
        )
        for text in texts:
            sample = SampleEvent(state.step, text["prompt"], text["text"])
            shown = " ".join((text["prompt"] + text["text"]).split())[:120]
            log.info(f"sample: {shown}", extra={"event": sample})
        if not math.isfinite(scores.loss):
            return False
        if state.best_loss is None or scores.loss < state.best_loss:
            state.best_loss, state.best_step = scores.loss, state.step
            return True
        return False

    def _sample(self) -> list[dict[str, Any]]:
        wanted, rows = self.config.samples, []
        sampling = Sampling(
            temperature=0.8,
            top_p=0.95,
            seed=self.config.seed,
            max_new_tokens=wanted.max_new_tokens,
        )
        for prompt in wanted.prompts:
            ids = encode_prompt(self.tokenizer, prompt)
            ids = fit_prompt(ids, self.model.config.block_size, "left")
            for made in generate_samples(
                self.model, self.tokenizer, ids, wanted.n, sampling, prompt=prompt
            ):
                stop.raise_if_requested()
                row = {"step": self.state.step, "tokens": self.state.tokens, "prompt": prompt}
                rows.append({**row, "text": made.text, "sample": made.sample})
        return rows

    def _point_at_best(self) -> None:
        """best.json names a checkpoint that exists: the one of this step, if it was saved."""
        if self.saved_step == self.state.step and self.state.best_loss is not None:
            checkpoint.write_best(self.directory, self.state.step, self.state.best_loss)
            checkpoint.prune(self.directory, self.config.training.keep_last, self._protected())

    def _decay_begins(self) -> bool:
        """Whether the next step is the first of the decay (judged by the length of this one)."""
        state, schedule = self.state, self.config.schedule
        if schedule.kind != "wsd" or not state.step or is_decaying(self.progress, schedule):
            return False
        return is_decaying(self.progress * (1 + 1 / state.step), schedule)

    def _protected(self) -> list[int]:
        """The last checkpoint before the decay, from which a longer run could go on."""
        steps = []
        for path in checkpoint.list_checkpoints(self.directory):
            try:
                state = json.loads((path / "state.json").read_text())
            except (OSError, ValueError):
                continue
            if not state.get("decaying", True):
                steps.append(state["train"]["step"])
        return steps[-1:]

    def _minutes_due(self) -> bool:
        minutes = self.config.training.save_minutes
        return minutes is not None and time.monotonic() - self._saved_at > 60 * minutes

    def bad_step(self, loss: float, grad_norm: float) -> None:
        """Note a step whose loss or gradient is not finite and was not applied.

        Raises NonFiniteError after max_bad_steps in a row; the last checkpoint stays as it is.
        """
        state, most = self.state, self.config.training.max_bad_steps
        state.bad_steps += 1
        state.skipped_steps += 1
        about = f"loss {loss}, gradient norm {grad_norm}"
        line = {"event": "bad_step", "step": state.step, "loss": loss, "grad_norm": grad_norm}
        self.metrics.write(line)
        log.warning(f"step {state.step}: {about}; update not applied")
        if state.bad_steps >= most:
            raise NonFiniteError(
                f"{most} non-finite steps in a row, the last at step {state.step}: {about}",
                hint="lower optimizer.lr, raise schedule.warmup_steps or set"
                " training.precision=fp32, then resume from the last checkpoint",
            )

    def close(self) -> None:
        """Close the logs."""
        self.metrics.close()
        self.samples.close()

    def about(self) -> dict[str, Any]:
        """Facts for run.json that change as the run goes."""
        state = self.state
        per_second = state.tokens / state.seconds if state.seconds else None
        facts: dict[str, Any] = {
            "training": {
                "steps": state.step,
                "tokens": state.tokens,
                "epochs": state.epochs,
                "seconds": state.seconds,
                "elapsed_seconds": state.elapsed_seconds,
                "tokens_per_second": per_second,
                "parameters": self.model.parameter_count(),
                "best_step": state.best_step,
                "skipped_steps": state.skipped_steps,
            },
            "choices": self.choices.to_json(),
        }
        if state.position is not None and "seen" in state.position:
            facts["mixture"] = state.position["seen"]
        if self.scores is not None:
            facts["scores"] = self.scores.to_json()
        return facts

    def write_run_json(self, **changes: Any) -> None:
        """Update run.json with `about()` and `changes`."""
        update_run_json(self.directory, **{**self.about(), **changes})
