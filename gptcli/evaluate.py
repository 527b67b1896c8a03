"""Evaluation: a model's perplexity on text, with a report."""

import hashlib
import json
import logging
import math
import os
import re
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gptcli import world
from gptcli.config.data_schema import SourceConfig
from gptcli.config.schema import Config, EvalConfig
from gptcli.data.corpus import open_corpus, read_documents
from gptcli.data.task_data import open_task
from gptcli.data.task_formats import row_fields
from gptcli.device import Device, choose_precision, resolve_device
from gptcli.errors import CheckpointError, ConfigError
from gptcli.evaluation.details import details
from gptcli.evaluation.perplexity import (
    DocumentScores,
    EncodedDocument,
    Scores,
    encode_documents,
    encode_rows,
    score_documents,
    total_scores,
)
from gptcli.evaluation.result import Evaluation
from gptcli.generation.sampling import DIVERGED
from gptcli.model.empty import empty_model
from gptcli.model.gpt import GPT
from gptcli.model.packed import is_quantized, quantize, weight_bytes
from gptcli.reports.report import TRAINING_KEYS, check_report_directory, write_eval_report
from gptcli.runs.load import LoadedModel, load_model
from gptcli.runs.run_dir import read_run_json
from gptcli.training.start import machine, versions

log = logging.getLogger("gptcli")


@dataclass(frozen=True)
class EvaluateResult(Evaluation):
    """With the scores of the text, or of the text of the task's rows."""

    scores: Scores


def evaluate(
    config: Config,
    *,
    model: str | None = None,
    data: list[str] | None = None,
    run_dir: Path | None = None,
    command: str = "",
) -> EvaluateResult:
    """Score MODEL on `data`, else on `config.eval.data`, else on its run's own validation part.

    With `config.eval.quantize` the model is scored as it is and then with its weights made smaller:
    the report's scores are the latter, and what was before is under `quantized`; both are computed
    in fp32. The report goes to `run_dir`, else below the model's run. Raises GptError,
    `stop.Stopped`.
    """
    device = resolve_device(config.training.device)
    with world.joined(device.kind, config.distributed.timeout_seconds) as here:
        if here.leads:
            check_report_directory(run_dir)
        return _evaluate(config, model, data, run_dir if here.leads else None, command, device)


def _evaluate(
    config: Config,
    model: str | None,
    data: list[str] | None,
    run_dir: Path | None,
    command: str,
    device: Device,
) -> EvaluateResult:
    """As `evaluate`. Of several processes each scores its part, and rank 0 writes the report."""
    settings = config.eval
    loaded = load_model(model if model is not None else settings.model, device.torch)
    block_size = loaded.model.config.block_size
    if settings.stride is not None and settings.stride > block_size:
        raise ConfigError(
            f"--stride {settings.stride} is above the model's block_size {block_size}"
        )
    if settings.quantize is not None and is_quantized(loaded.model):
        raise ConfigError(
            f"{loaded.path} holds int8 weights already, with nothing to compare them to",
            hint="leave out --quantize, or name the model that they were made from",
        )
    sources = sources_of(data, config)
    with world.first():  # what it reads of a corpus, the others find in the cache
        encoded, name = _documents(loaded, sources, settings.max_tokens)
    precision = eval_precision(config, loaded, device)
    log.info(f"scoring {loaded.path} on {name}: {len(encoded)} documents")
    scores, found = _scored(loaded.model, encoded, device, settings, precision)
    if math.isnan(scores.loss):
        raise CheckpointError(f"{loaded.path}: its loss on {name} is not a number", DIVERGED)
    quantized: dict[str, Any] = {}
    if settings.quantize is not None:
        scores, found, quantized = _quantized(loaded.model, encoded, device, settings, scores)
    report = {**described(loaded, name, device, precision, command), **quantized}
    report |= details(encoded, found, loaded.tokenizer)
    sizes = {"documents": scores.documents, "bytes": scores.bytes}
    report["data"] = {"eval": {"source": name, **sizes}}
    report["scores"] = asdict(scores)
    directory = eval_directory(loaded, run_dir, name, settings, source_keys(sources))
    if directory is not None and world.current().leads:
        write_eval_report(directory, report)
    return EvaluateResult(report, directory, scores)


def sources_of(data: list[str] | None, config: Config) -> list[SourceConfig] | None:
    """What to score: `data`, else `eval.data`; None where neither is given."""
    return [SourceConfig(path=path) for path in data] if data else config.eval.data


def source_keys(sources: list[SourceConfig] | None) -> list[dict[str, Any]]:
    """What tells `sources` from others, JSON-able: their settings, with whole paths."""
    return [
        source.model_dump(mode="json") | {"path": _whole_path(source.path)}
        for source in sources or []
    ]


def _whole_path(path: str) -> str:
    return path if re.match(r"\w+:", path) else os.path.abspath(path)


def described(
    loaded: LoadedModel, name: str, device: Device, precision: str, command: str
) -> dict[str, Any]:
    """What the report of an evaluation on `name` says beside its scores."""
    trained = read_run_json(loaded.run_dir) if loaded.run_dir is not None else {}
    vocab_size = loaded.model.vocab_size
    return {
        "run": {
            "name": f"{loaded.name}, step {loaded.step}, on {name}",
            "job": "eval",
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        },
        "command": command,
        "model": {
            "name": loaded.name,
            "path": str(loaded.path),
            "step": loaded.step,
            "parameters": empty_model(loaded.model.config, vocab_size).parameter_count(),
            "vocab_size": vocab_size,
        },
        "data": {},
        "scores": {},
        "tasks": {},
        "training": trained.get("training") or dict.fromkeys(TRAINING_KEYS),
        "choices": {"device": device.kind, "precision": precision},
        "machine": machine(device),
        "versions": versions(),
    }


def _scored(
    model: GPT,
    encoded: list[EncodedDocument],
    device: Device,
    settings: EvalConfig,
    precision: str,
) -> tuple[Scores, DocumentScores]:
    """The scores of `model`, and those of each document and token."""
    began = time.perf_counter()
    found = score_documents(
        model, encoded, device, stride=settings.stride, precision=precision, tokens=True
    )
    seconds = time.perf_counter() - began
    return total_scores(found, encoded, model.config.block_size, settings.stride, seconds), found


def _quantized(
    model: GPT,
    encoded: list[EncodedDocument],
    device: Device,
    settings: EvalConfig,
    before: Scores,
) -> tuple[Scores, DocumentScores, dict[str, Any]]:
    """What `_scored` gives of `model`, which becomes a quantized one, and the report's part about
    that."""
    assert settings.quantize is not None
    before_bytes = weight_bytes(model)
    log.info(f"scoring again with {settings.quantize} weights")
    quantize(model, settings.quantize)
    scores, found = _scored(model, encoded, device, settings, "fp32")
    about = {
        "kind": settings.quantize,
        "perplexity_ratio": scores.perplexity / before.perplexity,
        "weight_bytes": weight_bytes(model),
        "weight_bytes_before": before_bytes,
        "scores_before": asdict(before),
    }
    return scores, found, {"quantized": about}


def _documents(
    loaded: LoadedModel, sources: list[SourceConfig] | None, max_tokens: int | None
) -> tuple[list[EncodedDocument], str]:
    """What to score, and its name: `sources`, else the validation part of the model's own run."""
    if sources:
        names = ", ".join(source.path for source in sources)
        documents = read_documents(sources, max_tokens)
        return encode_documents(documents, loaded.tokenizer, max_tokens), names
    state, config = loaded.state or {}, loaded.config
    if "data_fingerprint" not in state:  # a published model, or one that was imported
        raise CheckpointError(
            f"{loaded.name} has no validation part of its own",
            hint=f"name a text: gpt eval --model {loaded.path} --data FILE",
        )
    finetuned = state["job"] == "finetune"
    fields = row_fields(config.finetune) if finetuned else None
    corpus = open_corpus(
        config.data,
        fields,
        eot=loaded.tokenizer.eot,
        known=state["data_fingerprint"],
        val_tokens=config.eval.max_tokens,
    )
    if state["data_fingerprint"] != corpus.fingerprint:
        raise CheckpointError(
            "the run's own data have changed since training, and its validation part with them",
            hint="name a text: gpt eval --data FILE",
        )
    if not finetuned:
        most = max_tokens or config.eval.max_tokens
        return encode_documents(corpus.val_documents, loaded.tokenizer, most), "validation"
    if max_tokens is not None:
        raise ConfigError("--max-tokens cuts texts; this model was finetuned on rows")
    settings, block_size = config.finetune, config.model.block_size
    task = open_task(
        config, loaded.tokenizer, corpus, block_size=block_size, labels=settings.labels
    )
    return encode_rows(task.held_out), "validation"


def eval_precision(config: Config, loaded: LoadedModel, device: Device) -> str:
    """The config's, else that of the model's training where the device is the same, else fp32.

    Packed layers take nothing but fp32, and so does what they are compared to.
    """
    if config.eval.quantize is not None or is_quantized(loaded.model):
        return "fp32"
    if config.training.precision != "auto":
        return choose_precision(config.training.precision, device)
    choices = (loaded.state or {}).get("choices")
    if choices is None:  # not trained here
        return "fp32"
    same = str(choices["device"]).partition(":")[0] == device.kind
    return str(choices["precision"]) if same else "fp32"


def eval_directory(
    loaded: LoadedModel, run_dir: Path | None, name: str, settings: EvalConfig, others: Any = None
) -> Path | None:
    """`run_dir`, else evals/NAME-HASH of the run; the hash tells text, step and settings apart, and
    `others`, JSON-able: whatever else the scores depend on that `name` does not tell."""
    if run_dir is not None:
        return run_dir
    if loaded.run_dir is None:
        return None
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name).strip("-.") or "data"
    about = [name, loaded.step, settings.stride, settings.max_tokens]
    about += [settings.quantize] if settings.quantize else []
    key = json.dumps(about + ([others] if others else []))
    return loaded.run_dir / "evals" / f"{slug[:80]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
