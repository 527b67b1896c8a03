"""Supervised finetuning: a pretrained model learns to answer, scored before and after."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.data.corpus import Corpus, open_corpus
from gptcli.data.stream import RecordStream, ShardReader
from gptcli.data.tasks import Example, ExampleEncoder, ExampleRows
from gptcli.device import Device, resolve_device
from gptcli.errors import ConfigError, DataError
from gptcli.evaluation.exact_match import exact_match
from gptcli.evaluation.perplexity import encode_examples
from gptcli.reports.report import write_report
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
from gptcli.training.initial import (
    required_eot,
    starting_point,
    starting_tokenizer,
    with_shape,
)
from gptcli.training.session import Session
from gptcli.training.start import Resume, Start, check_fingerprint, starting

log = logging.getLogger("gptcli")


def finetune(
    config: Config,
    *,
    model: str | None = None,
    run_dir: Path | None = None,
    resume: Resume = "no",
    overwrite: bool = False,
    allow_data_change: bool = False,
    command: str = "",
    began: float | None = None,
) -> RunResult:
    """Finetune `model` (else `config.init`) on rows of prompt and response.

    The loss is on the response and eot. Held-out perplexity of the responses and exact match of
    greedy answers are measured before and after. Otherwise as `pretrain`.
    """
    config = config if model is None else config.model_copy(update={"init": model})
    if config.init is None:
        raise ConfigError("finetuning starts from a model", hint="add --model RUN, or init: RUN")
    began = time.monotonic() if began is None else began
    check_limits(config)
    _check_data(config)
    device = resolve_device(config.training.device)
    with starting(
        "finetune",
        config,
        run_dir=run_dir,
        resume=resume,
        overwrite=overwrite,
        command=command,
        began=began,
    ) as start:
        if start.done:
            return nothing_to_do(start)
        run = _begin(config, start, device, allow_data_change)
        session, held_out = run.session, run.held_out
        tasks = read_run_json(start.directory).get("tasks", {})
        if start.contents is None:
            scoring = time.monotonic()
            tasks = _tasks({}, "before", session, held_out)
            session.state.finish_seconds = time.monotonic() - scoring  # as long as "after", about
            update_run_json(start.directory, tasks=tasks)
        result = run_session(
            session, run.rows, lambda: {"tasks": _tasks(tasks, "after", session, held_out)}
        )
        write_report(start.directory)
        return replace(result, tasks=read_run_json(start.directory).get("tasks", {}))


@dataclass(frozen=True)
class _Run:
    """What a run in memory is: the session, its rows, and the examples that score it."""

    session: Session
    rows: ExampleRows
    held_out: list[Example]


def _begin(config: Config, start: Start, device: Device, allow_data_change: bool) -> _Run:
    """The run in memory. The model that `init` names does not outlive this call."""
    config, initial = starting_point(config, start)
    tokenizer = starting_tokenizer(start, initial)
    assert tokenizer is not None  # config.init is set
    required_eot(tokenizer, config.init or "")
    fields = tuple(config.finetune.names.values())
    saved = start.saved_fingerprint
    corpus = open_corpus(config.data, fields, known=saved, val_tokens=config.eval.max_tokens)
    check_fingerprint(saved, corpus.fingerprint, allow_data_change)
    encoder = ExampleEncoder(config.finetune, tokenizer, config.model.block_size)
    held_out = encoder.encode_all(corpus.val_rows)
    if not held_out:
        raise DataError("no held-out row fits the model's block_size; add rows, or data.val")
    if not corpus.remote:
        encoder.check(corpus.train)
    if encoder.skipped or encoder.shortened:
        log.warning(
            f"{encoder.skipped} training rows do not fit and are skipped,"
            f" {encoder.shortened} prompts lose their beginning"
        )
    validation = encode_examples(held_out)
    session = build_session(config, start, device, tokenizer, corpus, validation, initial)
    return _Run(session, _example_rows(session, corpus, encoder), held_out)


def _check_data(config: Config) -> None:
    """Refuse settings of the data that are for text only."""
    data = config.data
    asked = {
        "data.packing: best_fit": data.packing != "concat",
        "data.document_mask": data.document_mask,
        "weight": any(source.weight is not None for source in data.train),
        "text_field": any(source.text_field != "text" for source in data.train),
    }
    for name, given in asked.items():
        if given:
            raise ConfigError(f"{name} is for pretraining; finetuning has one row an example")


def describe(config: Config) -> str:
    """What `gpt finetune --dry-run` prints: the model, the rows, the limits. Trains nothing."""
    if config.init is None:
        raise ConfigError("finetuning starts from a model", hint="add --model RUN, or init: RUN")
    check_limits(config)
    _check_data(config)
    start = load_model(config.init, torch.device("cpu"))
    required_eot(start.tokenizer, config.init)
    config = with_shape(config, start.config.model)
    corpus = open_corpus(config.data, fields=tuple(config.finetune.names.values()))
    encoder = ExampleEncoder(config.finetune, start.tokenizer, config.model.block_size)
    held_out = encoder.encode_all(corpus.val_rows)
    held_out_skipped = encoder.skipped
    if not corpus.remote:
        encoder.check(corpus.train)
    documents = "uncounted" if corpus.documents is None else f"{corpus.documents:,}"
    lines = {
        "model": f"{start.path}, {start.model.parameter_count():,} parameters",
        "rows": f"{documents} ({encoder.skipped} to train on do not fit)",
        "held out": f"{len(held_out):,} rows ({held_out_skipped} more do not fit)",
        "tokens per step": f"{config.training.tokens_per_step:,}",
        "limits": describe_limits(config),
    }
    return "".join(f"{name:<16} {value}\n" for name, value in lines.items())


def _example_rows(session: Session, corpus: Corpus, encoder: ExampleEncoder) -> ExampleRows:
    """The training rows from where the session stands."""
    config, position = session.config, session.state.position
    saved = position["stream"] if position else None
    reader, window = ShardReader(corpus.train), config.data.shuffle_window
    stream = RecordStream(reader, corpus.train_bytes, config.seed, window, saved)
    return ExampleRows(stream, encoder)


def _tasks(
    tasks: dict[str, Any], when: str, session: Session, held_out: list[Example]
) -> dict[str, Any]:
    """The task scores with those of now under `when`."""
    settings = session.config.finetune
    rows = held_out[: settings.score_rows]
    log.info(f"scoring {len(rows)} held-out answers {when} finetuning")
    share = exact_match(session.model, session.tokenizer, rows, settings.max_new_tokens)
    stop.raise_if_requested()
    scores = session.score_validation()
    found = {
        "exact_match": {when: share, "rows": len(rows)},
        "response_perplexity": {when: scores.perplexity, "rows": len(held_out)},
    }
    log.info(f"{when}: exact match {share:.3f}, response perplexity {scores.perplexity:.3f}")
    return {name: {**tasks.get(name, {}), **values} for name, values in found.items()}
