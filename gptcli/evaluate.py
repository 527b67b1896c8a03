"""Evaluation: a model's perplexity on text, with a report."""

import logging
import re
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gptcli.config.schema import Config, SourceConfig
from gptcli.data.corpus import Document, open_corpus, read_documents
from gptcli.device import choose_precision, resolve_device
from gptcli.errors import CheckpointError, ConfigError, ResourceError
from gptcli.evaluation.perplexity import Scores, encode_documents, perplexity
from gptcli.reports.report import write_eval_report
from gptcli.runs.checkpoint import read_state
from gptcli.runs.load import LoadedModel, load_model

log = logging.getLogger("gptcli")


@dataclass(frozen=True)
class EvaluateResult:
    """The report as written (and printed by `--json`), and where; None if nowhere."""

    report: dict[str, Any]
    directory: Path | None
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

    The report goes to `run_dir`, else below the model's run. Raises GptError, `stop.Stopped`.
    """
    settings = config.eval
    device = resolve_device(config.training.device)
    loaded = load_model(model if model is not None else settings.model, device.torch)
    block_size = loaded.model.config.block_size
    if settings.stride is not None and settings.stride > block_size:
        raise ConfigError(
            f"--stride {settings.stride} is above the model's block_size {block_size}"
        )
    sources = [SourceConfig(path=path) for path in data] if data else settings.data
    documents, name = _documents(loaded, sources)
    encoded = encode_documents(documents, loaded.tokenizer, settings.max_tokens)
    precision = "fp32"
    if config.training.precision != "auto":
        precision = choose_precision(config.training.precision, device)
    log.info(f"scoring {loaded.path} on {name}: {len(encoded)} documents")
    scores = perplexity(loaded.model, encoded, device, stride=settings.stride, precision=precision)
    report = {
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
            "parameters": loaded.model.parameter_count(),
            "vocab_size": loaded.model.vocab_size,
        },
        "data": {"eval": {"source": name, "documents": scores.documents, "bytes": scores.bytes}},
        "scores": asdict(scores),
        "tasks": {},
        "choices": {"device": device.kind, "precision": precision},
    }
    directory = _directory(loaded, run_dir, name)
    if directory is not None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_eval_report(directory, report)
        except OSError as error:
            raise ResourceError(f"{directory}: cannot write the report: {error}") from error
    return EvaluateResult(report, directory, scores)


def _documents(
    loaded: LoadedModel, sources: list[SourceConfig] | None
) -> tuple[list[Document], str]:
    if sources:
        return read_documents(sources), ", ".join(source.path for source in sources)
    state = read_state(loaded.path)
    if state["job"] != "pretrain":
        raise ConfigError(
            "this model was finetuned on rows; name a text to score it on",
            hint="gpt eval --data FILE",
        )
    corpus = open_corpus(loaded.config.data)
    if state["data_fingerprint"] != corpus.fingerprint:
        raise CheckpointError(
            "the run's own data have changed since training, and its validation part with them",
            hint="name a text: gpt eval --data FILE",
        )
    return corpus.val_documents, "validation"


def _directory(loaded: LoadedModel, run_dir: Path | None, name: str) -> Path | None:
    if run_dir is not None:
        return run_dir
    if loaded.run_dir is None:
        return None
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(name).name).strip("-.") or "data"
    return loaded.run_dir / "evals" / slug[:100]
