"""Comparing models: a paired test on the same text, with what they cost and how they differ."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from gptcli.config.data_schema import SourceConfig
from gptcli.config.load import dump_config
from gptcli.config.schema import Config
from gptcli.data.corpus import Corpus, open_corpus, read_documents
from gptcli.data.scan import Document
from gptcli.data.task_data import open_task
from gptcli.data.task_formats import row_fields
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device, resolve_device
from gptcli.errors import ConfigError, DataError
from gptcli.evaluation.paired import in_pieces, paired, shortened
from gptcli.evaluation.perplexity import (
    DocumentScores,
    EncodedDocument,
    encode_documents,
    encode_rows,
    score_documents,
    total_scores,
)
from gptcli.model.empty import empty_model
from gptcli.reports.comparison import verdict
from gptcli.reports.report import check_report_directory, write_eval_report
from gptcli.runs.load import load_model
from gptcli.runs.run_dir import is_run_dir, read_run_json, runs_root
from gptcli.training.start import machine, versions

log = logging.getLogger("gptcli")

# Keys that change no weights: two runs that differ in them and the seed are of one recipe.
_NO_WEIGHTS = (
    *("name", "samples.", "report.", "eval.", "generate."),
    *("training.log_every", "training.save_every", "training.save_minutes", "training.keep_last"),
)
_ELSEWHERE = "name a text that none of them was trained on: --data FILE"
_OVER_DOCUMENTS = (
    "The intervals are over {}: they tell which of these models predicts such text better. Whether"
    " the change of a setting made it so takes runs of several seeds."
)
_FEW = (
    "There are only {} documents, so they are cut into pieces of {} KiB, each scored from its own"
    " start. The interval tells how even the difference is throughout these documents, not whether"
    " it holds on others."
)
_ALONE = "There is too little text for an interval: give more with --data FILE."


@dataclass(frozen=True)
class _Entrant:
    """A model without its weights, which are loaded when it is scored."""

    name: str
    path: Path
    run_dir: Path | None
    step: int
    config: Config
    tokenizer: Tokenizer
    vocab_size: int
    state: dict[str, Any]


@dataclass(frozen=True)
class _Text:
    """What all are scored on, encoded for each; `unit` is what the lists hold."""

    name: str
    unit: str
    encoded: list[list[EncodedDocument]]
    notes: list[str]


@dataclass(frozen=True)
class CompareResult:
    """The report (`comparison` holds all of it), and where it was written; None if nowhere."""

    report: dict[str, Any]
    directory: Path | None


def compare(
    models: Sequence[str],
    *,
    data: list[str] | None = None,
    max_tokens: int | None = None,
    run_dir: Path | None = None,
    command: str = "",
) -> CompareResult:
    """Compare `models`, each a MODEL or the name of a run, on `data`, else on the validation part
    that all of them have; at most `max_tokens` of it, as the first one's tokenizer counts.

    All are scored in fp32. Two are compared as given, of more each with the best; since the same
    text says which is the best, their intervals are as wide as if all were compared with all.
    Raises GptError, `stop.Stopped`.
    """
    check_report_directory(run_dir)
    device = resolve_device("auto")
    entrants = [_entrant(reference, device) for reference in models]
    if len({entrant.path.resolve() for entrant in entrants}) < len(entrants):
        raise ConfigError("the same model is named twice; a comparison needs different ones")
    if len({entrant.name for entrant in entrants}) < len(entrants):  # runs of other folders
        entrants = [replace(entrant, name=str(entrant.path)) for entrant in entrants]
    text = _text(entrants, data, max_tokens)
    scored = []
    rows = []
    for entrant, encoded in zip(entrants, text.encoded, strict=True):
        log.info(f"scoring {entrant.path} on {text.name}: {len(encoded)} {text.unit}")
        model = load_model(str(entrant.path), device.torch).model
        began = time.perf_counter()
        scored.append(score_documents(model, encoded, device))
        seconds = time.perf_counter() - began
        rows.append(_row(entrant, scored[-1], encoded, seconds))
        del model
    report = _report(entrants, rows, scored, text, device, command)
    if run_dir is not None:
        write_eval_report(run_dir, report)
    return CompareResult(report, run_dir)


def _entrant(reference: str, device: Device) -> _Entrant:
    named = runs_root() / reference
    known = not Path(reference).exists() and is_run_dir(named)
    loaded = load_model(str(named) if known else reference, device.torch)
    return _Entrant(
        name=loaded.run_dir.resolve().name if loaded.run_dir is not None else loaded.name,
        path=loaded.path,
        run_dir=loaded.run_dir,
        step=loaded.step,
        config=loaded.config,
        tokenizer=loaded.tokenizer,
        vocab_size=loaded.model.vocab_size,
        state=loaded.state or {},
    )


def _text(entrants: list[_Entrant], data: list[str] | None, max_tokens: int | None) -> _Text:
    """What to score: `data`, else what all runs hold out. The same for each, or DataError."""
    if data:
        sources = [SourceConfig(path=path) for path in data]
        return _documents_text(
            entrants, read_documents(sources, max_tokens), ", ".join(data), max_tokens
        )
    corpora = _own_corpora(entrants)
    if entrants[0].state["job"] == "finetune":
        if max_tokens is not None:
            raise ConfigError("--max-tokens cuts texts; these models were finetuned on rows")
        return _rows_text(entrants, corpora)
    texts = [[(d.name, d.text) for d in corpus.val_documents] for corpus in corpora]
    if any(text != texts[0] for text in texts):
        raise DataError("the runs hold out different parts of their data", hint=_ELSEWHERE)
    limits = [entrant.config.eval.max_tokens for entrant in entrants]
    most = max_tokens or (None if None in limits else max(limit or 0 for limit in limits))
    return _documents_text(entrants, corpora[0].val_documents, "validation", most)


def _own_corpora(entrants: list[_Entrant]) -> list[Corpus]:
    """The corpus of each run; those of the same settings are one. DataError unless all hold the
    same data, unchanged since training."""
    for entrant in entrants:
        if "data_fingerprint" not in entrant.state:
            raise DataError(f"{entrant.name} has no validation part of its own", hint=_ELSEWHERE)
    first, corpora = entrants[0], list[Corpus]()
    opened: dict[str, Corpus] = {}
    for entrant in entrants:
        config, state = entrant.config, entrant.state
        if any(state[key] != first.state[key] for key in ("job", "data_fingerprint")):
            raise DataError(
                f"{first.name} and {entrant.name} were trained on different data",
                hint=_ELSEWHERE,
            )
        fields = row_fields(config.finetune) if state["job"] == "finetune" else None
        eot, most = entrant.tokenizer.eot, config.eval.max_tokens
        key = repr((config.data, fields, eot, most))
        if key not in opened:
            known = state["data_fingerprint"]
            opened[key] = open_corpus(config.data, fields, eot=eot, known=known, val_tokens=most)
        if opened[key].fingerprint != state["data_fingerprint"]:
            raise DataError(
                "the runs' own data have changed since training, and their validation part with"
                " them",
                hint=_ELSEWHERE,
            )
        corpora.append(opened[key])
    return corpora


def _documents_text(
    entrants: list[_Entrant], documents: list[Document], name: str, max_tokens: int | None
) -> _Text:
    if max_tokens is not None:
        documents = _first_tokens(documents, entrants[0].tokenizer, max_tokens)
    pieces, size = in_pieces(documents)
    tokenizers = {entrant.tokenizer.identity for entrant in entrants}
    if len(tokenizers) > 1 and any(d.tokens is not None for d in pieces):
        raise DataError(f"{name} holds token ids, which are of one tokenizer", hint=_ELSEWHERE)
    encoded = [encode_documents(pieces, entrant.tokenizer) for entrant in entrants]
    for entrant, theirs in zip(entrants, encoded, strict=True):
        same = [(d.name, d.bytes) for d in theirs] == [(d.name, d.bytes) for d in encoded[0]]
        if not same:
            raise DataError(
                f"{name}: some documents are too short for the tokenizer of {entrant.name}, which"
                " has no token to begin with",
                hint="leave out documents of one word",
            )
    notes = [_FEW.format(len(documents), size // 1024)] if size else []
    return _Text(name, "pieces" if size else "documents", encoded, notes)


def _first_tokens(documents: list[Document], tokenizer: Tokenizer, most: int) -> list[Document]:
    """The documents up to `most` tokens; the text of the last one ends there."""
    kept = list[Document]()
    for document in documents:
        tokens = document.tokens
        ids = tokenizer.encode_numpy(document.text) if tokens is None else tokens
        if len(ids) > most:
            cut = len(tokenizer.decode_bytes(ids[:most].tolist()))
            last = shortened(document, cut) if tokens is None else None
            kept += [last or replace(document, tokens=ids[:most])] if most else []
            break
        kept.append(document)
        most -= len(ids)
    return kept


def _rows_text(entrants: list[_Entrant], corpora: list[Corpus]) -> _Text:
    """The held-out rows that all can score; one of another length in bytes is another row."""
    encoded = []
    for entrant, corpus in zip(entrants, corpora, strict=True):
        config = entrant.config
        block_size, labels = config.model.block_size, config.finetune.labels
        task = open_task(config, entrant.tokenizer, corpus, block_size=block_size, labels=labels)
        encoded.append({(row.name, row.bytes): row for row in encode_rows(task.held_out)})
    common = [key for key in encoded[0] if all(key in rows for rows in encoded)]
    if not common:
        raise DataError("the runs share no held-out row", hint=_ELSEWHERE)
    most = max(map(len, encoded))
    left = most - len(common)
    notes = [f"{left} of {most} rows are left out: not every run can score them."] if left else []
    return _Text("validation", "rows", [[rows[key] for key in common] for rows in encoded], notes)


def _row(
    entrant: _Entrant, found: DocumentScores, encoded: list[EncodedDocument], seconds: float
) -> dict[str, Any]:
    """A model's scores, and what it cost."""
    trained = read_run_json(entrant.run_dir) if entrant.run_dir is not None else {}
    training = trained.get("training") or {}
    scores = total_scores(found, encoded, entrant.config.model.block_size)
    known = ("loss", "perplexity", "bits_per_byte", "bits_per_byte_ci95", "accuracy", "tokens")
    return {
        "name": entrant.name,
        "path": str(entrant.path),
        "step": entrant.step,
        **{key: getattr(scores, key) for key in known},
        "scoring_seconds": seconds,
        "parameters": empty_model(entrant.config.model, entrant.vocab_size).parameter_count(),
        "trained_tokens": training.get("tokens"),
        "training_seconds": training.get("seconds"),
        "tokens_per_second": training.get("tokens_per_second"),
    }


def _report(
    entrants: list[_Entrant],
    rows: list[dict[str, Any]],
    scored: list[DocumentScores],
    text: _Text,
    device: Device,
    command: str,
) -> dict[str, Any]:
    names = [entrant.name for entrant in entrants]
    best = min(range(len(rows)), key=lambda i: float(rows[i]["bits_per_byte"]))
    others = [i for i in range(len(rows)) if i != best]
    pairs = [(0, 1)] if len(rows) == 2 else [(best, i) for i in others]
    comparisons = len(rows) * (len(rows) - 1) // 2
    notes = [*text.notes, _OVER_DOCUMENTS.format(text.unit)]
    if len(scored[0].bytes) < 2:
        notes = [_ALONE]
    comparison = {
        "data": text.name,
        "unit": text.unit,
        "units": len(scored[0].bytes),
        "bytes": int(scored[0].bytes.sum()),
        "runs": sorted(rows, key=lambda row: float(row["bits_per_byte"])),
        "pairs": [_pair(entrants, scored, a, b, comparisons) for a, b in pairs],
        "names": names,
        "differences": _differences(entrants),
        "notes": notes,
    }
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    title = f"{', '.join(names)} on {text.name}"
    return {
        "run": {"name": title, "job": "compare", "created": created},
        "command": command,
        "comparison": comparison,
        "machine": machine(device),
        "versions": versions(),
    }


def _pair(
    entrants: list[_Entrant], scored: list[DocumentScores], a: int, b: int, comparisons: int
) -> dict[str, Any]:
    """The paired test of two models. `seed_alone` tells that they are runs of one recipe, both at
    their best or last step, with two seeds, so that what sets them apart is chance, however sure it
    is that one of the two is better."""
    both = [entrants[a], entrants[b]]
    bits = [found.nats / math.log(2) for found in scored]
    found = paired(bits[a], bits[b], scored[a].bytes, comparisons)
    about = {
        "a": both[0].name,
        "b": both[1].name,
        **asdict(found),
        "winner": found.winner,
        "seed_alone": all(map(_is_result, both)) and _one_recipe(both),
    }
    return {**about, "verdict": verdict(about)}


def _is_result(entrant: _Entrant) -> bool:
    """Whether it is the best or the last checkpoint of a run that finished."""
    run = read_run_json(entrant.run_dir) if entrant.run_dir is not None else {}
    training = run.get("training") or {}
    ends = (training.get("best_step"), training.get("steps"))
    return run.get("status") == "finished" and entrant.step in ends


def _one_recipe(entrants: list[_Entrant]) -> bool:
    """Whether they differ in the seed, and beside it in nothing that changes weights."""
    differing = {key for key in _differences(entrants) if not key.startswith(_NO_WEIGHTS)}
    return differing == {"seed"}


def _differences(entrants: list[_Entrant]) -> dict[str, list[Any]]:
    """Settings that are not the same for all, by key: the value for each. Of models that were made
    elsewhere only the shape is known, and pretraining does not read `finetune`."""
    flat = [_flat(yaml.safe_load(dump_config(entrant.config))) for entrant in entrants]
    if not all(entrant.state for entrant in entrants):
        flat = [{k: v for k, v in keys.items() if k.startswith("model.")} for keys in flat]
    if all(entrant.state.get("job") == "pretrain" for entrant in entrants):
        flat = [{k: v for k, v in keys.items() if not k.startswith("finetune.")} for keys in flat]
    keys = dict.fromkeys(key for values in flat for key in values if key != "name")
    return {
        key: [values.get(key) for values in flat]
        for key in keys
        if any(values.get(key) != flat[0].get(key) for values in flat)
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inside = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return flat
