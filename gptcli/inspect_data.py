"""Looking at data before training: what a corpus holds, and the rows that a model is fed."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.data import extras
from gptcli.data.chosen_tokenizer import build_tokenizer
from gptcli.data.corpus import Corpus, open_corpus
from gptcli.data.duplicates import Duplicates
from gptcli.data.findings import Finding, judge
from gptcli.data.overlap import N_GRAM, Overlap
from gptcli.data.pipeline import corpus_tokenizer, ready_tokenizer, training_rows
from gptcli.data.privacy import KINDS, available_kinds, find
from gptcli.data.row_fields import RowFields
from gptcli.data.rows import RowSource
from gptcli.data.shown_rows import ShownRow, show_rows
from gptcli.data.shown_task import show_task_rows, task_facts
from gptcli.data.survey import EXACT_DOCUMENTS, Probes, Survey
from gptcli.data.task_data import finetuning_fields, open_task
from gptcli.data.tokenizer import Tokenizer
from gptcli.data.unicode_scripts import language_of, main_script
from gptcli.errors import ConfigError, DataError
from gptcli.runs.load import load_model
from gptcli.training.initial import with_shape

log = logging.getLogger("gptcli")

NEAR = 0.8  # Jaccard similarity from which documents count as near duplicates here
NEAR_DOCUMENTS = 200_000  # among which near duplicates are looked for: up to 0.6 GB of memory
REMOTE_BYTES = 100_000_000  # read of a corpus that is streamed, where nothing else is said

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DataCheck:
    """What `check_data` found. `report` is an object for JSON, the findings in it too."""

    report: dict[str, Any]
    findings: list[Finding]

    @property
    def warnings(self) -> int:
        """How many findings are warnings."""
        return sum(finding.level == "warning" for finding in self.findings)


def check_data(
    config: Config, *, max_bytes: int | None = None, progress: Progress | None = None
) -> DataCheck:
    """Read the training text of `config` as pretraining would, and measure it.

    Reads all of it, or the first `max_bytes`; of a streamed hub corpus 100 MB where nothing is
    said. `progress` is called with the bytes read and those to read. Raises DataError for data
    that cannot be read, `stop.Stopped` when a stop is asked for.
    """
    log.info(f"reading {', '.join(source.path for source in config.data.train)}")
    fields = finetuning_fields(config)
    corpus, tokenizer, block_size = _open(config, fields)
    if corpus.remote and max_bytes is None:
        max_bytes = REMOTE_BYTES
    held_out = [(d.name, d.text) for d in corpus.val_documents if isinstance(d.text, str)]
    if fields is not None:
        held_out += [(name, fields.text_of(row)) for name, row in corpus.val_rows]
    overlap = Overlap(held_out) if held_out else None
    probes, missing = _probes(overlap)
    survey = Survey(tokenizer, block_size, probes)
    total = max(corpus.train_bytes, 1)
    goal = total if max_bytes is None else min(total, max_bytes)
    complete = True
    for record in corpus.train_records():
        stop.raise_if_requested()
        if max_bytes is not None and survey.bytes >= max_bytes:
            complete = False
            break
        if fields is not None:
            record = {**record, "text": fields.text_of(record["row"])}
        survey.add(record)
        if progress is not None:
            progress(min(survey.bytes, goal), goal)
    survey.end()
    report = _report(config, corpus, tokenizer, survey, overlap)
    report["read"] = {"bytes": survey.bytes, "of_bytes": total, "complete": complete}
    report["not_looked_for"] = missing
    findings = judge(report, config.data)
    report["findings"] = [vars(finding) for finding in findings]
    return DataCheck(report, findings)


@dataclass(frozen=True)
class DataRows:
    """What `show_data` found: the first rows of optimizer step `step`, each `block_size` long.

    `facts` says how they were made, for a heading.
    """

    rows: list[ShownRow]
    step: int
    block_size: int
    facts: dict[str, str]


def show_data(
    config: Config, *, rows: int = 4, step: int = 0, model: str | None = None
) -> DataRows:
    """The first `rows` rows of optimizer step `step` (0-based), as training would feed them.

    With finetuning fields in `config` these are examples, encoded by `model` (else `config.init`).
    Reads all rows before them. Raises GptError, `stop.Stopped`.
    """
    init = model if model is not None else config.init
    fields = finetuning_fields(config)
    if fields is not None and init is None:
        raise ConfigError(
            "rows for finetuning are encoded by a model's tokenizer", hint="add --model RUN"
        )
    if init is not None:
        config = config.model_copy(update={"init": init})
    corpus, tokenizer, block_size = _open(config, fields)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"block_size": block_size})}
    )
    facts = {
        "data": ", ".join(s.path for s in config.data.train),
        "tokenizer": f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens",
    }
    before = step * max(1, config.training.tokens_per_step // block_size)
    if fields is not None:
        task = open_task(config, tokenizer, corpus, block_size=block_size)
        source = task.rows(config.seed, config.data.shuffle_window)
        _skip(source, before)
        shown = show_task_rows(task, source.take(rows))
        return DataRows(shown, step, block_size, {**facts, **task_facts(task)})
    source = training_rows(config, corpus, tokenizer)
    _skip(source, before)
    taken = source.take(rows)
    facts |= {
        "packing": config.data.packing,
        "document_mask": "on" if config.data.document_mask else "off",
    }
    shown = show_rows(tokenizer, taken.inputs, taken.targets, taken.starts)
    return DataRows(shown, step, block_size, facts)


def _skip(source: RowSource, rows: int) -> None:
    while rows > 0:
        stop.raise_if_requested()
        source.take(min(rows, 64))
        rows -= 64


def _open(config: Config, fields: RowFields | None) -> tuple[Corpus, Tokenizer, int]:
    """The corpus, the tokenizer that training would use, and its block size."""
    most = config.eval.max_tokens
    if config.init is not None:
        loaded = load_model(config.init, torch.device("cpu"))
        corpus = open_corpus(config.data, fields, eot=loaded.tokenizer.eot, val_tokens=most)
        return corpus, loaded.tokenizer, with_shape(config, loaded.config.model).model.block_size
    tokenizer = ready_tokenizer(config.tokenizer)
    eot = tokenizer.eot if tokenizer is not None else None
    corpus = open_corpus(config.data, fields, eot=eot, val_tokens=most)
    if tokenizer is None:
        if fields is None:
            tokenizer = corpus_tokenizer(config, corpus)
        else:
            tokenizer = build_tokenizer(config.tokenizer, _row_texts(corpus, fields))
    return corpus, tokenizer, config.model.block_size


def _row_texts(corpus: Corpus, fields: RowFields) -> Iterator[str]:
    return (fields.text_of(record["row"]) for record in corpus.train_records())


def _probes(overlap: Overlap | None) -> tuple[Probes, list[str]]:
    """The measures that the installed packages allow, and the names of those they do not."""
    missing = []
    near: float | None = NEAR
    language: Callable[[str], str | None] = language_of
    if not _installed("datasketch", "datasketch"):
        near = None
        missing.append("near duplicates")
    if not _installed("py3langid.langid", "py3langid"):
        language = _no_language
        missing.append("languages")
    kinds = available_kinds()
    missing += [f"personal data: {kind}" for kind in KINDS if kind not in kinds]
    duplicates = _FirstDocuments(near)

    def personal(text: str) -> Mapping[str, int]:
        return Counter(kind for kind, _, _ in find(text, kinds))

    return Probes(main_script, duplicates.seen, personal, overlap, language), missing


class _FirstDocuments:
    """`Duplicates` whose memory is bounded: of more documents only the first are remembered."""

    def __init__(self, near: float | None) -> None:
        self._exact = Duplicates(True, None)
        self._near = Duplicates(False, near) if near is not None else None
        self._count = 0

    def seen(self, text: str) -> str | None:
        """ "exact_duplicates" or "near_duplicates" if an earlier text is the same or alike."""
        self._count += 1
        found = self._exact.seen(text) if self._count <= EXACT_DOCUMENTS else None
        if found is None and self._near is not None and self._count <= NEAR_DOCUMENTS:
            found = self._near.seen(text)
        return found


def _installed(module: str, package: str) -> bool:
    try:
        extras.load(module, package, needed_by="gpt data check")
    except DataError:
        return False
    return True


def _no_language(text: str) -> str | None:
    return None


def _report(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, survey: Survey, overlap: Overlap | None
) -> dict[str, Any]:
    texts = survey.documents - survey.data_documents
    problems = corpus.problems
    return {
        "name": config.name,
        "job": "pretrain" if finetuning_fields(config) is None else "finetune",
        "text": survey.characters > 0,
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size},
        "train": {
            "documents": survey.documents,
            "bytes": survey.bytes,
            "characters": survey.characters,
            "tokens": survey.tokens,
            "bytes_per_token": survey.text_bytes / max(survey.text_tokens, 1),
        },
        "lengths": {
            **survey.lengths.summary(),
            "block_size": survey.block_size,
            "shorter_than_block": survey.shorter,
        },
        "scripts": survey.scripts.summary(),
        "languages": dict(survey.languages.most_common()),
        "sources": _source_facts(config, corpus, survey),
        "validation": _validation_facts(corpus, overlap),
        "duplicates": {
            kind: {**survey.duplicates[kind].summary(), "among": min(texts, most)}
            for kind, most in (("exact", EXACT_DOCUMENTS), ("near", NEAR_DOCUMENTS))
        },
        "no_text": _no_text(survey),
        "empty": survey.empty.summary(),
        "control_characters": {
            **survey.controls.summary(),
            "codes": dict(survey.control_codes.most_common(10)),
        },
        "replacement_characters": survey.replacement.summary(),
        "personal": {kind: tally.summary() for kind, tally in sorted(survey.personal.items())},
        "repetitive": survey.repetitive.summary(),
        "repeated_lines": {"lines": survey.lines, "repeated": survey.repeated_lines},
        "problems": {
            "invalid_utf8": problems.invalid_utf8,
            "skipped_rows": problems.skipped_rows,
            "null_rows": problems.null_rows,
            "blank_rows": problems.blank_rows,
        },
    }


def _source_facts(config: Config, corpus: Corpus, survey: Survey) -> list[dict[str, Any]]:
    return [
        {
            "path": source.path,
            "weight": source.weight,
            **survey.sources.get(number, Counter()),
            "share": survey.sources[number]["tokens"] / max(survey.tokens, 1)
            if number in survey.sources
            else 0.0,
            "filters": corpus.sources[number].cleaning,
        }
        for number, source in enumerate(config.data.train)
    ]


def _validation_facts(corpus: Corpus, overlap: Overlap | None) -> dict[str, Any]:
    held = overlap.counts() if overlap is not None else None
    return {
        "documents": len(corpus.val_documents) + len(corpus.val_rows),
        "split": corpus.split,
        "compared": held is not None,
        "n": N_GRAM,
        "ngrams": held.grams if held else 0,
        "ngrams_found": held.found if held else 0,
        "sampled": held.sampled if held else False,
        "exact": held.exact if held else 0,
        "near": held.near if held else 0,
        "places": list(held.names) if held else [],
    }


def _no_text(survey: Survey) -> dict[str, Any]:
    """What applies to token ids and binary data."""
    return {
        "documents": survey.data_documents,
        "duplicates": survey.data_duplicates.summary(),
        "outside_vocabulary": survey.outside.summary(),
        "largest_id": survey.largest_id,
    }
