"""Building a session: model, optimizer and choices of a fresh or resumed run."""

import logging
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli import stop, world
from gptcli.config.schema import Config
from gptcli.data.corpus import Corpus
from gptcli.data.rows import Prefetch, RowSource, step_batches
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device, allow_tf32, give_back_freed_memory
from gptcli.errors import CheckpointError, ConfigError
from gptcli.evaluation.perplexity import EncodedDocument, Scores
from gptcli.model.gpt import GPT
from gptcli.reports.report import write_report
from gptcli.runs.checkpoint import Contents
from gptcli.runs.load import LoadedModel
from gptcli.runs.manifest import OPTIMIZER
from gptcli.runs.run_dir import read_run_json
from gptcli.runs.sharded import empty_like, read_together
from gptcli.runs.tensorboard_log import check_tensorboard
from gptcli.runs.tensors import local, stored_shapes
from gptcli.training.choices import (
    Choices,
    apply,
    check_strategy,
    choose,
    choose_again,
    choose_strategy,
    device_name,
    rows_of_a_process,
)
from gptcli.training.fitting import check_memory
from gptcli.training.initial import draws_shares, starting_model
from gptcli.training.loop import train
from gptcli.training.objective import LossOf, language_model_loss
from gptcli.training.optimizers import Optimizer
from gptcli.training.parallel import Parallel, Strategy, draw_shares, shard, sharded
from gptcli.training.resuming import LIMITS
from gptcli.training.session import Session
from gptcli.training.start import Start, machine, note_end, resume_command
from gptcli.training.trainable import set_trainable
from gptcli.training.tuning import tune
from gptcli.training.validation import Validation

log = logging.getLogger("gptcli")

# Of weights: a process with a share of more keeps its memory small rather than its steps fast.
_LARGE_BYTES = 2**27


@dataclass(frozen=True)
class RunResult:
    """How a run ended: status finished or stopped. `scores` are those of its last evaluation."""

    status: str
    run_dir: Path
    report: Path | None
    step: int
    scores: Scores | None
    signal: signal.Signals | None
    resume_command: str
    tasks: dict[str, Any] = field(default_factory=dict)


def check_limits(config: Config) -> None:
    """ConfigError unless training has a limit, and the package that its log needs."""
    if config.report.tensorboard:
        check_tensorboard()
    t = config.training
    if not (t.max_steps or t.max_tokens or t.max_epochs or t.max_time):
        raise ConfigError(
            "training has no limit: set training.max_steps, max_tokens, max_epochs or max_time"
        )


def describe_limits(config: Config) -> str:
    """The limits that are set, for people."""
    limits = config.training.model_dump(include=set(LIMITS))
    return ", ".join(f"{name} {limits[name]}" for name in LIMITS if limits[name] is not None)


def build_session(
    config: Config,
    start: Start,
    device: Device,
    tokenizer: Tokenizer,
    corpus: Corpus,
    validation: list[EncodedDocument],
    initial: LoadedModel | None,
    *,
    outputs: int | None = None,
    objective: Callable[[GPT, str], LossOf] | None = None,
) -> Session:
    """Model, optimizer and choices, from the checkpoint, from `initial` or from the seed.

    The checkpoint's tensors are taken out of `start.contents`, so that the run holds them once.
    `initial` gives its tensors to the session: it is not to be used, nor kept, afterwards.
    `outputs` are those of a finetuning task's head, None without one; `objective` gives
    what the model is to minimise in the run's precision, else it is the loss of language models.
    """
    strategy = _strategy(config, start, device, tokenizer.vocab_size, initial)
    in_shares = strategy == "fsdp"
    model, facts = starting_model(config, start, tokenizer, initial, outputs, in_shares=in_shares)
    if not in_shares:  # else the whole of it may not fit there
        model.to(device.torch)
    if start.job == "finetune":
        set_trainable(model, config.finetune)
    allow_tf32(device)
    choices = _choices(config, start, device, model, strategy, corpus.train_bytes)
    parallel = Parallel(strategy)
    if parallel.sharded:
        if sum(parameter.nbytes for parameter in model.parameters()) > _LARGE_BYTES:
            give_back_freed_memory()
        shard(model, device.torch, choices.precision)
        if draws_shares(config, start):
            draw_shares(model, torch.Generator().manual_seed(config.seed))
    optimizer = Optimizer(model, config.optimizer)
    if start.contents is not None:
        _restore(start, model, optimizer)
    loss_of = objective(model, choices.precision) if objective else language_model_loss(model)
    session = Session(
        config=config,
        directory=start.directory,
        device=device,
        choices=choices,
        model=model,
        tokenizer=tokenizer,
        optimizer=optimizer,
        state=start.state,
        loss_of=parallel.loss_of(
            loss_of, model, device.torch, partly=_has_idle_head(config, model)
        ),
        score_validation=Validation(
            model, validation, device, config.eval.stride, choices.precision
        ),
        data_fingerprint=corpus.fingerprint,
        job=start.job,
        scores=saved_scores(start.contents),
        adapter=facts.get("adapter"),
        parallel=parallel,
        saved_step=start.state.step if start.contents is not None else -1,
        clock=start.began,
    )
    _note_facts(session, corpus, validation, facts)
    return session


def _has_idle_head(config: Config, model: GPT) -> bool:
    """Whether the language model's head may learn, but has no part in the loss of a task head."""
    apart = model.head.weight.requires_grad and not config.model.tie_embeddings
    return config.finetune.has_head and not config.finetune.lm_weight and apart


def _strategy(
    config: Config, start: Start, device: Device, vocab_size: int, initial: LoadedModel | None
) -> Strategy:
    """How several processes share the run; ResourceError where its model cannot fit at all."""
    before = start.contents.state["choices"]["strategy"] if start.contents is not None else None
    strategy = choose_strategy(config, device, vocab_size, start.job, before)
    check_strategy(config, start.job, strategy)
    if strategy != "fsdp":
        check_memory(config, device, vocab_size, _held_bytes(start, initial), start.directory)
    return strategy


def _note_facts(
    session: Session, corpus: Corpus, validation: list[EncodedDocument], facts: dict[str, Any]
) -> None:
    """In run.json: what the run computes on, its model and its data, and `facts` of the start."""
    model, planted = session.model, [asdict(canary) for canary in corpus.canaries]
    session.write_run_json(
        machine=machine(session.device),
        fingerprints={"data": corpus.fingerprint, "tokenizer": session.tokenizer.identity},
        model={
            "parameters": model.parameter_count(),
            "non_embedding_parameters": model.parameter_count(embeddings=False),
            "vocab_size": model.vocab_size,
            **session.config.model.model_dump(),
        },
        data=_data_facts(corpus, validation),
        skipped_text=_left_out(corpus),
        **({"planted_canaries": planted} if planted else {}),
        **facts,
    )


def _choices(
    config: Config,
    start: Start,
    device: Device,
    model: GPT,
    strategy: Strategy,
    train_bytes: int,
) -> Choices:
    """How the run computes, applied to `model`. Several processes take what rank 0 finds."""
    saved = start.contents.state["choices"] if start.contents is not None else None
    choices = None
    if world.current().leads and saved is not None:
        choices = choose_again(saved, config, device)
    if choices is not None:
        choices = replace(choices, strategy=strategy)
    elif world.current().leads:
        held = sum(parameter.nbytes for parameter in model.parameters())
        choices = choose(
            config,
            device,
            model.vocab_size,
            held_bytes=held,
            strategy=strategy,
            run_dir=start.directory,
        )
        # Nothing to race where no block learns; and a step of a whole model may not fit.
        if strategy != "fsdp" and any(p.requires_grad for p in model.blocks.parameters()):
            probed = _probed(config, start)
            choices = tune(choices, probed, device, model, train_bytes, start.directory)
    told = world.told(choices.to_json() if choices is not None else None)
    choices = choices or replace(Choices(**told), device=device_name(device))
    apply(choices, model)
    return choices


def _restore(start: Start, model: GPT, optimizer: Optimizer) -> None:
    """The optimizer's state of the checkpoint; and the weights, where each process has a share."""
    assert start.contents is not None
    state, path = start.contents.optimizer, start.source / OPTIMIZER
    if sharded(model):
        weights = dict(model.named_parameters())
        parts = empty_like(stored_shapes(path), weights)
        with torch.no_grad():
            read_together(start.source, {**weights, **parts})
        state = {name: local(tensor) for name, tensor in parts.items()}
    try:
        optimizer.load_state_dict(state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}") from error


def run_session(
    session: Session,
    rows: RowSource,
    finish: Callable[[], dict[str, Any]] = dict,
) -> RunResult:
    """Train to the end or to a stop; the last checkpoint is saved and run.json is up to date.

    `finish` is called at the end of the training and gives facts for run.json; the run counts as
    finished after it, and a resume calls it again where a stop came between.
    """
    config = session.config
    per_step = config.training.tokens_per_step // config.model.block_size
    learning = sum(p.numel() for p in session.model.parameters() if p.requires_grad)
    whole = session.model.parameter_count()
    log.info(
        f"{f'{learning:,} of ' if learning < whole else ''}{whole:,} parameters"
        f"{' learn' if learning < whole else ''},"
        f" vocabulary {session.tokenizer.vocab_size:,},"
        f" {session.choices.precision} on {session.device.kind}"
        f" ({session.choices.threads} threads{_together(session)}), micro batches of"
        f" {session.choices.micro_batch_size} rows, writing to {session.directory}"
    )
    status, facts = "failed", dict[str, Any]()
    try:
        with Prefetch(step_batches(rows, per_step, pin=session.device.kind == "cuda")) as batches:
            train(session, batches)
        status = "stopped"
        if session.finished:
            facts = finish()
            status = "finished"
        world.meet()
    except stop.Stopped:
        log.info("stopped before the end of the last scoring")
    finally:
        try:
            session.write_run_json(status=status, **facts)
            if session.parallel.here.leads:
                note_end(session.directory, status, session.state)
        finally:
            session.close()
    return RunResult(
        status=status,
        run_dir=session.directory,
        report=session.directory / "report.html",
        step=session.state.step,
        scores=session.scores,
        signal=(session.stopping or stop.requested()) if status == "stopped" else None,
        resume_command=resume_command(session.job, session.directory),
    )


def _together(session: Session) -> str:
    parallel = session.parallel
    if parallel.here.size == 1:
        return ""
    return f" each of {parallel.here.size} processes, {parallel.strategy.upper()}"


def nothing_to_do(start: Start) -> RunResult:
    """The result of resuming a run whose limit is already reached; its report is written again."""
    log.info(f"nothing to do: {start.directory} is at its limit, step {start.state.step}")
    if world.current().leads:
        write_report(start.directory)
    return RunResult(
        status="finished",
        run_dir=start.directory,
        report=start.directory / "report.html",
        step=start.state.step,
        scores=saved_scores(start.contents),
        signal=None,
        resume_command=resume_command(start.job, start.directory),
        tasks=read_run_json(start.directory).get("tasks", {}),
    )


def saved_scores(contents: Contents | None) -> Scores | None:
    """The scores of the last evaluation before a checkpoint."""
    saved = contents.state["scores"] if contents is not None else None
    return Scores.from_json(saved) if saved is not None else None


def _held_bytes(start: Start, initial: LoadedModel | None) -> int:
    """Of the tensors that a run begins with."""
    tensors: list[Tensor] = list(initial.model.parameters()) if initial is not None else []
    if start.contents is not None:
        tensors += [*start.contents.model.values(), *start.contents.optimizer.values()]
    return sum(tensor.nbytes for tensor in tensors)


def _probed(config: Config, start: Start) -> Config:
    """The config for trials on random tokens: a step is this process's part of one, and packed
    examples are as documents with a mask."""
    part = rows_of_a_process(config) * config.model.block_size
    training = config.training.model_copy(update={"tokens_per_step": part})
    config = config.model_copy(update={"training": training})
    if start.job != "finetune" or not config.finetune.packing:
        return config
    return config.model_copy(
        update={"data": config.data.model_copy(update={"document_mask": True})}
    )


def _data_facts(corpus: Corpus, validation: list[EncodedDocument]) -> dict[str, Any]:
    return {
        "train": {"documents": _train_documents(corpus), "bytes": corpus.train_bytes},
        "sources": [asdict(source) for source in corpus.sources],
        "val": {
            "documents": len(validation),
            "tokens": sum(len(d.tokens) - d.first for d in validation),
            "bytes": sum(d.bytes for d in validation),
            "split": corpus.split,
        },
    }


def _train_documents(corpus: Corpus) -> int | None:
    """Documents to train on; None if not counted. With a tail split, each is in both parts."""
    if corpus.documents is None or corpus.split != "hash":
        return corpus.documents
    return corpus.documents - len(corpus.val_documents) - len(corpus.val_rows)


def _left_out(corpus: Corpus) -> dict[str, dict[str, int]]:
    """By file, for the report: what of the text is not as it was."""
    problems = corpus.problems
    found = {
        "invalid_utf8": problems.invalid_utf8,
        "skipped_rows": problems.skipped_rows,
        "null_rows": problems.null_rows,
        "blank_rows": problems.blank_rows,
    }
    return {name: counts for name, counts in found.items() if counts}
