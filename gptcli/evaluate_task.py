"""Evaluation on a finetuning task: its scores on held-out rows, and every prediction."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptcli.config.data_schema import SourceConfig
from gptcli.config.finetune_schema import LABELLED_TASKS, FinetuneConfig
from gptcli.config.schema import Config
from gptcli.data.corpus import open_corpus, read_rows
from gptcli.data.example_rows import Encoder
from gptcli.data.shots import ShotEncoder, shots_of
from gptcli.data.task_data import Held, open_task
from gptcli.data.task_formats import TaskEncoder, row_fields
from gptcli.device import resolve_device
from gptcli.errors import CheckpointError, ConfigError, DataError
from gptcli.evaluate import (
    EvaluateResult,
    described,
    eval_directory,
    eval_precision,
    source_keys,
    sources_of,
)
from gptcli.evaluation.perplexity import encode_rows, perplexity
from gptcli.evaluation.task_scores import HeldOut, check_scores, score_task, scored_rows
from gptcli.model.heads import has_task_head, task_head
from gptcli.reports.report import check_report_directory, write_eval_report, write_predictions
from gptcli.runs.load import LoadedModel, load_model

log = logging.getLogger("gptcli")

PREDICTIONS = "predictions.jsonl"


def evaluate_task(
    config: Config | None,
    *,
    model: str | None = None,
    data: list[str] | None = None,
    run_dir: Path | None = None,
    shots: int | None = None,
    allow_code: bool = False,
    command: str = "",
) -> EvaluateResult:
    """Score MODEL on the task of `config`, without one on that of its own run.

    The rows are those of `data`, else of `config.eval.data`, else those that the task's config
    holds out, each behind `shots` (else `finetune.shots`) examples from the config's training rows.
    The labels, and the order of a task head's outputs, are those of the model's run where it has
    any. The report and
    predictions.jsonl go to `run_dir`, else below the model's run. Raises GptError, `stop.Stopped`.
    """
    check_report_directory(run_dir)
    device = resolve_device((config or Config()).training.device)
    if config is not None:
        check_scores(config.finetune, allow_code)  # before a model is loaded
    reference = model if model is not None or config is None else config.eval.model
    loaded = load_model(reference, device.torch)
    own = config is None
    sources = sources_of(data, config or Config())
    config = _task_config(config, loaded, shots)
    settings = config.finetune
    check_scores(settings, allow_code)
    name, held_out, labels = _rows_to_score(config, loaded, sources, own)
    rows = scored_rows(held_out, settings.score_rows)
    examples = _examples(settings, rows)
    _check_head(settings, loaded, labels)
    precision = eval_precision(config, loaded, device)
    log.info(f"scoring {loaded.path} on {len(rows)} rows ({name}), task {settings.task}")
    found = score_task(
        loaded.model,
        loaded.tokenizer,
        settings.task,
        rows,
        settings,
        labels,
        device,
        precision,
        allow_code=allow_code,
    )
    scores = perplexity(loaded.model, encode_rows(rows), device, precision=precision)
    report = described(loaded, f"{settings.task}, {name}", device, precision, command)
    report["data"] = {"eval": {"source": name, "rows": len(rows), **examples}}
    report |= {"scores": asdict(scores), "tasks": found.entries("value"), "task": found.to_json()}
    described_as = f"{settings.task} {name}" + (f" {settings.shots} shots" if examples else "")
    others = _settings_key(config, sources)
    directory = eval_directory(loaded, run_dir, described_as, config.eval, others)
    if directory is not None:
        write_eval_report(directory, report)
        write_predictions(directory / PREDICTIONS, found.predictions)
    return EvaluateResult(report, directory, scores)


def _settings_key(config: Config, sources: list[SourceConfig] | None) -> list[Any]:
    """What the scores depend on beside the model, JSON-able: task, seed and rows."""
    rows = [*config.data.train, *(config.data.val or [])]
    parts = [config.finetune, config.data]
    dumped = [part.model_dump(mode="json") for part in parts]
    return [*dumped, config.seed, source_keys(rows), source_keys(sources)]


def _task_config(config: Config | None, loaded: LoadedModel, shots: int | None) -> Config:
    """`config`, else the one of the model's run, with the labels that the run has, and `shots`."""
    finetuned = (loaded.state or {}).get("job") == "finetune"
    if config is None:
        if not finetuned:
            raise ConfigError(
                f"{loaded.name} was not finetuned, so it has no task of its own",
                hint=f"name a config with a finetune section: gpt eval CONFIG --task --model"
                f" {loaded.path}",
            )
        return _with_shots(loaded.config, shots)
    own = loaded.config.finetune if finetuned else None
    if own is None or own.labels is None or own.task != config.finetune.task:
        return _with_shots(config, shots)
    settings = config.finetune.model_copy(update={"labels": own.labels})
    return _with_shots(config.model_copy(update={"finetune": settings}), shots)


def _with_shots(config: Config, shots: int | None) -> Config:
    settings = config.finetune
    if shots is not None:
        settings = settings.model_copy(update={"shots": shots})
    if settings.shots and settings.has_head:
        raise ConfigError(
            f"a task head reads one row at a time, without the {settings.shots} examples of shots",
            hint="set finetune.head: false to compare labels and choices as text",
        )
    return config.model_copy(update={"finetune": settings})


def _examples(settings: FinetuneConfig, rows: HeldOut) -> dict[str, Any]:
    """What the report says of the examples before the rows; warns where they are fewer."""
    if not settings.shots:
        return {}
    counts = [shots_of(row) for row in rows]
    fewer = sum(count < settings.shots for count in counts)
    mean = sum(counts) / len(counts)
    if fewer:
        log.warning(
            f"{fewer} of {len(rows)} rows have fewer than {settings.shots} examples before them,"
            f" because no more fit the block or are there; {mean:.1f} on average"
        )
    return {"shots": settings.shots, "mean_shots": mean, "rows_with_fewer_shots": fewer}


def _rows_to_score(
    config: Config, loaded: LoadedModel, sources: list[SourceConfig] | None, own: bool
) -> tuple[str, Held, list[str]]:
    """What the rows are called, the rows, and the task's labels: all of `sources`, else those that
    the config's task holds out."""
    if not sources:
        return "held out", *_held_out(config, loaded, own)
    name = ", ".join(source.path for source in sources)
    return name, _named_rows(config, loaded, sources, name), config.finetune.labels or []


def _named_rows(
    config: Config, loaded: LoadedModel, sources: list[SourceConfig], name: str
) -> Held:
    """All rows of `sources` that fit the model's block."""
    settings, labels = config.finetune, config.finetune.labels
    if settings.task in LABELLED_TASKS and not labels:
        raise ConfigError(
            "the labels are not known: they are those of a run, or of its training rows",
            hint="set finetune.labels in the config",
        )
    block_size, labels = loaded.model.config.block_size, labels or []
    encoder: Encoder = TaskEncoder(settings, loaded.tokenizer, block_size, labels)
    if settings.shots:
        corpus = open_corpus(config.data, row_fields(settings), val_tokens=config.eval.max_tokens)
        encoder = ShotEncoder(settings, loaded.tokenizer, block_size, labels, corpus, config.seed)
    rows = [encoder.encode(row, where) for where, row in read_rows(sources, row_fields(settings))]
    kept = [row for row in rows if row is not None]
    if len(kept) < len(rows):
        log.warning(f"{len(rows) - len(kept)} of {len(rows)} rows are empty or do not fit")
    if not kept:
        raise DataError(f"no row of {name} fits the model's block_size {block_size}")
    return kept  # type: ignore[return-value]  # all of one kind, which the task decides


def _held_out(config: Config, loaded: LoadedModel, own: bool) -> tuple[Held, list[str]]:
    """The rows that the config's task holds out, and its labels."""
    known = (loaded.state or {})["data_fingerprint"] if own else None
    fields, most = row_fields(config.finetune), config.eval.max_tokens
    corpus = open_corpus(config.data, fields, known=known, val_tokens=most)
    if own and known != corpus.fingerprint:
        raise CheckpointError(
            "the run's own data have changed since training, and its held-out rows with them",
            hint="name rows: gpt eval --task --data FILE",
        )
    block_size = loaded.model.config.block_size
    task = open_task(
        config, loaded.tokenizer, corpus, block_size=block_size, labels=config.finetune.labels
    )
    return task.held_out, task.labels


def _check_head(settings: FinetuneConfig, loaded: LoadedModel, labels: list[str]) -> None:
    """ConfigError when the task wants a head that the model lacks, or one of another size."""
    if not settings.has_head:
        return
    if not has_task_head(loaded.model):
        raise ConfigError(
            f"{loaded.path} has no task head",
            hint="finetune it first, or set finetune.head: false to compare labels as text",
        )
    outputs = task_head(loaded.model).out_features
    if settings.task in LABELLED_TASKS and outputs != len(labels):
        raise ConfigError(
            f"{loaded.path} has a head for {outputs} labels, the task has {len(labels)}:"
            f" {', '.join(labels)}"
        )
