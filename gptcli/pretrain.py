"""Pretraining: a corpus becomes a measured GPT in a run directory."""

import json
import logging
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.data.corpus import Corpus, open_corpus
from gptcli.data.packing import PackedRows
from gptcli.data.rows import Prefetch, step_batches
from gptcli.data.stream import RecordStream
from gptcli.data.tokenizer import Tokenizer, build_tokenizer
from gptcli.device import resolve_device
from gptcli.errors import ConfigError, DataError, GptError
from gptcli.evaluation.perplexity import Scores, encode_documents
from gptcli.model.gpt import GPT, initialise
from gptcli.reports.report import write_report
from gptcli.runs.checkpoint import Contents, clean_leftovers
from gptcli.runs.load import load_model, load_weights
from gptcli.runs.run_dir import RunLock, update_run_json
from gptcli.training.choices import choose, choose_again
from gptcli.training.loop import train
from gptcli.training.optimizers import Optimizer
from gptcli.training.session import Session, validation_scorer
from gptcli.training.start import (
    Resume,
    check_fingerprint,
    choose_run_dir,
    machine,
    prepare_resume,
    resumable,
    resume_command,
    write_new_run,
)
from gptcli.training.state import TrainState

log = logging.getLogger("gptcli")


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `scores` are those of its last evaluation."""

    status: str
    run_dir: Path
    report: Path | None
    step: int
    scores: Scores | None
    signal: signal.Signals | None
    resume_command: str
    samples: list[str] = field(default_factory=list)
    tasks: dict[str, Any] = field(default_factory=dict)


def pretrain(
    config: Config,
    *,
    run_dir: Path | None = None,
    resume: Resume = "no",
    overwrite: bool = False,
    allow_data_change: bool = False,
    command: str = "",
) -> RunResult:
    """Train a model as `config` says and write its run directory.

    A stop request saves and returns status "stopped". Raises GptError for what a user can cause.
    """
    check_limits(config)
    directory, resuming = choose_run_dir(config, run_dir, resume, overwrite)
    with RunLock(directory):
        clean_leftovers(directory)
        contents, state = None, TrainState()
        if resuming:
            contents, state, done = resumable(directory, config)
            if done:
                return nothing_to_do("pretrain", directory, state)
            prepare_resume(directory, config, state, command)
        else:
            write_new_run(directory, config, command, "pretrain")
        try:
            session, corpus = _open(config, directory, contents, state, allow_data_change)
        except (GptError, stop.Stopped) as error:
            status = "stopped" if isinstance(error, stop.Stopped) else "failed"
            update_run_json(directory, status=status, error=str(error))
            raise
        rows = _rows(session, corpus)
        return run_session("pretrain", session, rows, corpus.train_bytes)


def check_limits(config: Config) -> None:
    """Training needs at least one limit."""
    t = config.training
    if not (t.max_steps or t.max_tokens or t.max_epochs or t.max_time):
        raise ConfigError(
            "training has no limit: set training.max_steps, max_tokens, max_epochs or max_time"
        )


def _open(
    config: Config,
    directory: Path,
    contents: Contents | None,
    state: TrainState,
    allow_data_change: bool,
) -> tuple[Session, Corpus]:
    """Data, tokenizer, model and optimizer of a fresh or resumed run."""
    device = resolve_device(config.training.device)
    log.info(f"reading {', '.join(source.path for source in config.data.train)}")
    corpus = open_corpus(config.data)
    if not corpus.val_documents:
        raise DataError("no validation text: the corpus is too short, or set data.val")
    initial = None
    if contents is not None:
        check_fingerprint(contents.state["data_fingerprint"], corpus.fingerprint, allow_data_change)
        tokenizer = contents.tokenizer
    elif config.init is not None:
        initial = load_model(config.init, torch.device("cpu"))
        tokenizer = initial.tokenizer
        config = config.model_copy(update={"model": initial.config.model})
    else:
        log.info(f"preparing the tokenizer ({config.tokenizer.kind})")
        tokenizer = build_tokenizer(config.tokenizer, corpus.train_texts())
    documents = encode_documents(corpus.val_documents, tokenizer, config.eval.max_tokens)
    _check_long_enough(corpus, tokenizer, config.model.block_size)
    model = GPT(config.model, tokenizer.vocab_size)
    if contents is not None:
        load_weights(model, contents.model, "the checkpoint")
    elif initial is not None:
        load_weights(model, initial.model.state_dict(), str(initial.path))
    else:
        initialise(model, torch.Generator().manual_seed(config.seed))
    model.to(device.torch)
    optimizer = Optimizer(model, config.optimizer)
    if contents is not None:
        optimizer.load_state_dict(contents.optimizer)
        choices = choose_again(contents.state["choices"], config, device, tokenizer.vocab_size)
    else:
        choices = choose(config, device, tokenizer.vocab_size)
    session = Session(
        config,
        directory,
        device,
        choices,
        model,
        tokenizer,
        optimizer,
        state,
        validation_scorer(model, documents, device, config, choices.precision),
        corpus.fingerprint,
        saved_step=state.step if contents is not None else -1,
    )
    session.write_run_json(
        machine=machine(device),
        fingerprints={"data": corpus.fingerprint, "tokenizer": tokenizer.identity},
        model=describe_model(model),
        data={
            "train": {"documents": corpus.documents, "bytes": corpus.train_bytes},
            "val": {
                "documents": len(documents),
                "tokens": sum(len(d.tokens) - 1 + d.unscored for d in documents),
                "bytes": sum(d.bytes for d in documents),
                "split": corpus.split,
            },
            "replaced_bytes": corpus.problems.replaced_bytes,
            "skipped_rows": corpus.problems.skipped_rows,
        },
    )
    return session, corpus


def run_session(job: str, session: Session, rows: Any, epoch_bytes: int) -> RunResult:
    """Train to the end or a stop, then write the report."""
    config, state = session.config, session.state
    per_step = config.training.tokens_per_step // config.model.block_size
    log.info(
        f"{session.model.parameter_count():,} parameters, {session.tokenizer.vocab_size:,} tokens"
        f" in the vocabulary, {session.choices.precision} on {session.device.kind}"
        f" ({session.choices.threads} threads), writing to {session.directory}"
    )
    status = "failed"
    try:
        with Prefetch(step_batches(rows, per_step, epoch_bytes)) as batches:
            train(session, batches)
        status = "finished" if session.progress >= 1.0 else "stopped"
    finally:
        session.write_run_json(status=status)
        session.close()
    write_report(session.directory)
    log.info(f"report: {session.directory / 'report.html'}")
    return RunResult(
        status=status,
        run_dir=session.directory,
        report=session.directory / "report.html",
        step=state.step,
        scores=session.scores,
        signal=stop.requested() if status == "stopped" else None,
        resume_command=resume_command(job, session.directory),
    )


def nothing_to_do(job: str, directory: Path, state: TrainState) -> RunResult:
    """The result of resuming a run whose limit is already reached."""
    log.info(f"nothing to do: {directory} is at its limit, step {state.step}")
    report = directory / "report.html"
    return RunResult(
        "finished",
        directory,
        report if report.exists() else None,
        state.step,
        None,
        None,
        resume_command(job, directory),
    )


def describe_model(model: GPT) -> dict[str, Any]:
    """Sizes for run.json and the report."""
    return {
        "parameters": model.parameter_count(),
        "non_embedding_parameters": model.parameter_count(embeddings=False),
        "vocab_size": model.vocab_size,
        **model.config.model_dump(),
    }


def describe(config: Config) -> str:
    """What `gpt pretrain --dry-run` prints: data, model size, steps. Trains nothing."""
    check_limits(config)
    resolve_device(config.training.device)
    corpus = open_corpus(config.data)
    tokenizer = build_tokenizer(config.tokenizer, corpus.train_texts())
    documents = encode_documents(corpus.val_documents, tokenizer, config.eval.max_tokens)
    with torch.device("meta"):
        model = GPT(config.model, tokenizer.vocab_size)
    per_token = len(tokenizer.encode(corpus.val_documents[0].text)) / max(
        len(corpus.val_documents[0].text.encode("utf-8", "replace")), 1
    )
    lines = {
        "parameters": f"{model.parameter_count():,}",
        "vocabulary": f"{tokenizer.vocab_size:,} tokens ({tokenizer.kind})",
        "training text": f"{corpus.train_bytes:,} bytes, {corpus.documents:,} documents,"
        f" about {int(corpus.train_bytes * per_token):,} tokens",
        "validation": f"{len(documents):,} documents,"
        f" {sum(len(d.tokens) - 1 for d in documents):,} tokens ({corpus.split} split)",
        "tokens per step": f"{config.training.tokens_per_step:,}",
        "limits": json.dumps(
            {
                k: v
                for k, v in config.training.model_dump().items()
                if k.startswith("max_") and v and k != "max_bad_steps"
            }
        ),
    }
    return "".join(f"{name:<16} {value}\n" for name, value in lines.items())


def _rows(session: Session, corpus: Corpus) -> PackedRows:
    config, position = session.config, session.state.position
    window = config.data.shuffle_window
    stream = RecordStream(
        corpus.train, config.seed, window, position["stream"] if position else None
    )
    return PackedRows(
        stream, session.tokenizer, config.model.block_size, config.seed, window > 0, position
    )


def _check_long_enough(corpus: Corpus, tokenizer: Tokenizer, block_size: int) -> None:
    """At least one block of training text, counted only where it may be short of that."""
    if corpus.train_bytes > 64 * (block_size + 1):
        return
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in corpus.train_texts())
    if tokens <= block_size:
        raise DataError(
            f"the training text has {tokens} tokens, less than one block of {block_size} + 1",
            hint=f"set model.block_size below {tokens}, or add text",
        )
