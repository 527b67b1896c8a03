"""Supervised finetuning: a pretrained model learns a task, scored before and after."""

import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gptcli import stop, world
from gptcli.config.data_schema import SourceConfig
from gptcli.config.schema import Config
from gptcli.data.corpus import Corpus, open_corpus, read_documents
from gptcli.data.task_data import TaskData, open_task
from gptcli.data.task_formats import row_fields
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device, resolve_device
from gptcli.errors import CheckpointError, ConfigError
from gptcli.evaluation.perplexity import (
    EncodedDocument,
    encode_documents,
    encode_rows,
    perplexity,
)
from gptcli.evaluation.task_result import TaskScores
from gptcli.evaluation.task_scores import HeldOut, check_scores, score_task, scored_rows
from gptcli.reports.report import write_predictions, write_report
from gptcli.runs import checkpoint
from gptcli.runs.load import load_model
from gptcli.runs.run_dir import read_run_json, update_run_json
from gptcli.training.build import (
    RunResult,
    build_session,
    check_limits,
    describe_limits,
    nothing_to_do,
    run_session,
)
from gptcli.training.facts import TaskScore
from gptcli.training.initial import (
    load_trained,
    required_eot,
    starting_point,
    starting_tokenizer,
    with_shape,
)
from gptcli.training.saved import fitting, standing_at
from gptcli.training.session import Session
from gptcli.training.start import Resume, Start, check_fingerprint, starting, write_config
from gptcli.training.task_objective import task_objective
from gptcli.training.together import check_same

log = logging.getLogger("gptcli")


def finetune(
    config: Config,
    *,
    model: str | None = None,
    run_dir: Path | None = None,
    resume: Resume = "no",
    overwrite: bool = False,
    allow_data_change: bool = False,
    allow_code: bool = False,
    command: str = "",
    began: float | None = None,
) -> RunResult:
    """Finetune `model` (else `config.init`) on the rows of a task.

    The task's scores, the perplexity of held-out responses and, with `finetune.reference`, that of
    a text on which nothing is trained are measured before and after. Otherwise as `pretrain`.
    `allow_code` runs generated programs, where these are scored by that.
    """
    config = config if model is None else config.model_copy(update={"init": model})
    if config.init is None:
        raise ConfigError("finetuning starts from a model", hint="add --model RUN, or init: RUN")
    began = time.monotonic() if began is None else began
    check_limits(config)
    _check_data(config)
    check_scores(config.finetune, allow_code)
    device = resolve_device(config.training.device)
    with (
        world.joined(device.kind, config.distributed.timeout_seconds) as here,
        starting(
            "finetune",
            config,
            run_dir=run_dir,
            resume=resume,
            overwrite=overwrite,
            command=command,
            began=began,
        ) as start,
    ):
        if start.done:
            return nothing_to_do(start)
        run = _begin(config, start, device, allow_data_change, allow_code)
        if start.contents is None:
            scoring = time.monotonic()
            run.score("before")
            # "after" takes about as long, for which max_time keeps time back.
            run.session.state.finish_seconds = time.monotonic() - scoring
        task, position = run.task, run.session.state.position
        with fitting(start.contents, start.source):
            rows = task.rows(config.seed, config.data.shuffle_window, position)
            standing_at(rows, start.contents, task.corpus.fingerprint)
        start.take_over()
        result = run_session(run.session, rows, run.finish)
        if here.leads:
            write_report(start.directory)
        return replace(result, tasks=read_run_json(start.directory).get("tasks", {}))


@dataclass
class _Run:
    """A run in memory: the session, the task's rows, and what scores them."""

    session: Session
    task: TaskData
    allow_code: bool
    reference_text: list[EncodedDocument]
    reference: dict[int, tuple[float, float]] = field(default_factory=dict)
    scored: tuple[tuple[int, int], TaskScores] | None = None  # the last, and of when

    @property
    def rows(self) -> HeldOut:
        """The held-out rows that the task's scores are of."""
        return scored_rows(self.task.held_out, self.session.config.finetune.score_rows)

    def task_scores(self) -> TaskScores:
        """The scores of the model as it is now, taken once a step."""
        session = self.session
        now = (session.state.step, session.state.skipped_steps)  # a rollback repeats steps
        if self.scored is not None and self.scored[0] == now:
            return self.scored[1]
        found = score_task(
            session.model,
            session.tokenizer,
            session.config.finetune.task,
            self.rows,
            session.config.finetune,
            self.task.labels,
            session.device,
            session.choices.precision,
            allow_code=self.allow_code,
            reference=self.reference or None,
        )
        self.scored = now, found
        return found

    def headline(self) -> TaskScore:
        """The score by which checkpoints are compared."""
        found = self.task_scores()
        return TaskScore(found.headline, found.values[found.headline])

    def score(self, when: str) -> None:
        """Take all scores as those of `when` (before, after) into run.json."""
        session, directory = self.session, self.session.directory
        log.info(f"scoring {len(self.rows)} held-out rows {when} finetuning")
        found = None
        with suppress(stop.Stopped):  # of which all learn next
            found = self.task_scores() if session.parallel.here.leads else None
        world.raise_if_stopped(patient=True)
        response = session.score_validation()
        session.scores = response  # run.json has those of the model that is left behind
        entries = found.entries(when) if found is not None else {}
        entries["response_perplexity"] = {when: response.perplexity, "rows": response.documents}
        if self.reference_text:
            text = perplexity(
                session.model,
                self.reference_text,
                session.device,
                precision=session.choices.precision,
            )
            entries["reference_perplexity"] = {when: text.perplexity, "rows": text.documents}
        if found is None:  # rank 0 writes
            return
        tasks = read_run_json(directory).get("tasks", {})
        merged = {name: {**tasks.get(name, {}), **entry} for name, entry in entries.items()}
        write_predictions(directory / f"predictions-{when}.jsonl", found.predictions)
        update_run_json(directory, tasks={**tasks, **merged}, task=found.to_json())
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.values.items())
        log.info(f"{when}: {shown}, response perplexity {response.perplexity:.3f}")

    def finish(self) -> dict[str, Any]:
        """Score what the run leaves behind: its best checkpoint, which is not there where its step
        was not saved. Nothing is left for run.json."""
        directory = self.session.directory
        best = world.told(checkpoint.read_best(directory))
        if best is not None and best[0] != self.session.state.step:
            path = checkpoint.checkpoint_dir(directory, best[0])
            try:
                tensors = checkpoint.read(path, with_optimizer=False).model
            except CheckpointError as error:
                log.warning(f"scoring the last weights instead of the best: {error.message}")
            else:
                log.info(f"scoring the best checkpoint, step {best[0]}")
                load_trained(self.session.model, tensors)
                self.scored = None
        self.score("after")
        return {}


def _begin(
    config: Config, start: Start, device: Device, allow_data_change: bool, allow_code: bool
) -> _Run:
    """The run in memory. The model that `init` names does not outlive this call."""
    given = config
    config, initial = starting_point(config, start)
    tokenizer = starting_tokenizer(start, initial)
    assert tokenizer is not None  # config.init is set
    required_eot(tokenizer, config.init or "")
    saved = start.saved_fingerprint
    fields, most = row_fields(config.finetune), config.eval.max_tokens
    with world.first():  # what it reads of the rows, the others find in the cache
        corpus = open_corpus(config.data, fields, known=saved, val_tokens=most)
    check_same(start.directory, config, corpus, tokenizer)
    check_fingerprint(saved, corpus.fingerprint, allow_data_change)
    task = _task(config, tokenizer, corpus, start)
    if task.labels:
        kept = config.finetune.model_copy(update={"labels": task.labels})
        config = config.model_copy(update={"finetune": kept})
        # As it was given, without the shape that came from `init`: a resume compares the two.
        given = given.model_copy(update={"finetune": kept})
        write_config(start.directory, given.settled_for(config.model))
    reference_text = _reference_text(config, tokenizer)
    reference: dict[int, tuple[float, float]] = {}
    session = build_session(
        config,
        start,
        device,
        tokenizer,
        corpus,
        encode_rows(task.held_out),
        initial,
        outputs=_outputs(config, task),
        objective=partial(task_objective, config, task, start, device, reference),
    )
    run = _Run(session, task, allow_code, reference_text, reference)
    settings = config.finetune
    # The loss on responses says little about labels and preferences, whose scores are cheap.
    if settings.has_head or settings.task == "preference" or settings.patience is not None:
        session.score_task = run.headline
    session.write_run_json(task_data=task.facts())
    return run


def _task(config: Config, tokenizer: Tokenizer, corpus: Corpus, start: Start | None) -> TaskData:
    """The rows of the task, with the labels that the config or the resumed run has."""
    labels = config.finetune.labels
    if start is not None and start.contents is not None:
        labels = start.saved_config.get("finetune", {}).get("labels")
    block_size = config.model.block_size
    return open_task(config, tokenizer, corpus, block_size=block_size, labels=labels)


def _outputs(config: Config, task: TaskData) -> int | None:
    """Outputs of the task head: one for each label, or one for any choice; None without a head."""
    if not config.finetune.has_head:
        return None
    return 1 if config.finetune.task == "multiple_choice" else len(task.labels)


def _reference_text(config: Config, tokenizer: Tokenizer) -> list[EncodedDocument]:
    """The text on which forgetting shows; empty where none is named."""
    settings = config.finetune
    if settings.reference is None:
        return []
    source, most = SourceConfig(path=settings.reference), settings.reference_tokens
    return encode_documents(read_documents([source], most), tokenizer, most)


def _check_data(config: Config) -> None:
    """Refuse settings of the data that are for text only, or for evaluation."""
    if config.finetune.shots:
        raise ConfigError(
            "finetune.shots is for gpt eval --task: training reads its rows alone",
            hint="leave it out here, and give gpt eval --task the flag --shots K",
        )
    data = config.data
    asked = {
        "data.packing: best_fit": data.packing != "concat",
        "data.document_mask": data.document_mask,
        "text_field": any(source.text_field != "text" for source in data.train),
    }
    hints = {
        "data.packing: best_fit": "finetune.packing packs whole examples",
        "data.document_mask": "attention always stays inside an example",
        "text_field": "finetune.fields names the fields of the rows",
    }
    for name, given in asked.items():
        if given:
            raise ConfigError(f"{name} is for pretraining", hint=hints.get(name))


def describe(config: Config) -> str:
    """What `gpt finetune --dry-run` prints: the model, the rows, the limits. Trains nothing."""
    if config.init is None:
        raise ConfigError("finetuning starts from a model", hint="add --model RUN, or init: RUN")
    check_limits(config)
    _check_data(config)
    loaded = load_model(config.init, torch.device("cpu"))
    required_eot(loaded.tokenizer, config.init)
    config = with_shape(config, loaded.config.model)
    corpus = open_corpus(config.data, row_fields(config.finetune))
    task = _task(config, loaded.tokenizer, corpus, None)
    documents = "uncounted" if corpus.documents is None else f"{corpus.documents:,}"
    left_out = task.counts.left_out
    lines = {
        "model": f"{loaded.path}, {loaded.model.parameter_count():,} parameters",
        "task": f"{config.finetune.task}, method {config.finetune.method}",
        "rows": f"{documents} ({left_out} to train on are left out,"
        f" {task.counts.shortened} are cut)",
        "held out": f"{len(task.held_out):,} rows",
        **({"labels": ", ".join(task.labels)} if task.labels else {}),
        "tokens per step": f"{config.training.tokens_per_step:,}",
        "limits": describe_limits(config),
    }
    return "".join(f"{name:<16} {value}\n" for name, value in lines.items())
