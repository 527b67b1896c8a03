"""Evaluation of what a model says by heart: training text, planted canaries, its own samples."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptcli.config.data_schema import SourceConfig
from gptcli.config.schema import Config
from gptcli.data.corpus import open_corpus, read_documents
from gptcli.data.readers import read_shards
from gptcli.data.scan import Document
from gptcli.data.shards import Shard
from gptcli.data.stream import permutation
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device, resolve_device
from gptcli.errors import CheckpointError, ConfigError, DataError
from gptcli.evaluate import (
    described,
    eval_directory,
    eval_precision,
    source_keys,
    sources_of,
)
from gptcli.evaluation.canaries import canary_report
from gptcli.evaluation.memorization import (
    LEAST_RUN,
    PassageSample,
    SharedRun,
    SharedRuns,
    VerbatimRate,
    passage_sizes,
    verbatim_rates,
)
from gptcli.evaluation.result import Evaluation
from gptcli.generation.engine import generate_samples
from gptcli.generation.sampling import Sampling
from gptcli.reports.report import check_report_directory, write_eval_report
from gptcli.runs.load import LoadedModel, load_model

log = logging.getLogger("gptcli")

PASSAGES = 256  # so that a share of 1 % is seen as two or three
SAMPLES = 16
_SAMPLE_TOKENS = 128
_SEED = 0  # of what is drawn: an evaluation may be repeated
MOST_BYTES = 2**28  # of training text that is read, in a random order of its parts


@dataclass(frozen=True)
class _Text:
    """The training text and its name, and the held-out text to compare with, which may be none."""

    name: str
    documents: list[Document]
    shards: list[Shard]
    held_out: list[Document]

    def pieces(self) -> Iterator[tuple[Document, bool]]:
        """The training text, piece by piece, and whether a piece follows none of its document."""
        for document in self.documents:
            yield document, True
        before: tuple[str, int] | None = None
        for record in read_shards(self.shards):
            name, part = record["document"], record["part"]
            piece = Document(name, record.get("text", ""), record.get("tokens"))
            yield piece, before != (name, part - 1)
            before = (name, part)


def evaluate_memorization(
    config: Config,
    *,
    model: str | None = None,
    data: list[str] | None = None,
    run_dir: Path | None = None,
    passages: int | None = None,
    command: str = "",
) -> Evaluation:
    """Measure how much of its training text MODEL continues or repeats verbatim.

    The text is `data`, else `config.eval.data`, of any model, taken for training text, else that of
    the model's run; up to `passages` (256) of it are asked for. With the canaries that the run
    planted, if any. The report goes to `run_dir`, else below the model's run. Raises GptError,
    `stop.Stopped`.
    """
    check_report_directory(run_dir)
    device = resolve_device(config.training.device)
    loaded = load_model(model if model is not None else config.eval.model, device.torch)
    precision = eval_precision(config, loaded, device)
    sources = sources_of(data, config)
    text = _named_text(sources) if sources else _own_text(loaded)
    log.info(f"what {loaded.path} has memorised of {text.name}")
    report = described(loaded, f"memorisation of {text.name}", device, precision, command)
    found = _memorization(loaded, text, passages or PASSAGES, device, precision)
    report["memorization"] = {"text": text.name, **found}
    canaries = None if sources else loaded.config.data.canaries
    if canaries is not None:
        log.info(f"ranking {canaries.count * len(canaries.repetitions)} canaries")
        exposed = canary_report(loaded.model, loaded.tokenizer, canaries, device, precision)
        report["canaries"] = {**exposed, "epochs": _epochs(loaded)}
    name = f"memorization of {text.name} {passages or PASSAGES}"
    directory = eval_directory(loaded, run_dir, name, config.eval, source_keys(sources))
    if directory is not None:
        write_eval_report(directory, report)
    return Evaluation(report, directory)


def _named_text(sources: list[SourceConfig]) -> _Text:
    names = ", ".join(source.path for source in sources)
    return _Text(names, read_documents(sources), [], [])


def _own_text(loaded: LoadedModel) -> _Text:
    """The training text of the model's run, without the canaries, and its validation part."""
    state, config = loaded.state or {}, loaded.config
    if "data_fingerprint" not in state or state.get("job") == "finetune":
        which = "was finetuned on rows" if state.get("job") == "finetune" else "is no run of ours"
        raise ConfigError(
            f"{loaded.name} {which}, so there is no training text to look for",
            hint=f"name one: gpt eval --memorization --model {loaded.path} --data FILE",
        )
    known = state["data_fingerprint"]
    corpus = open_corpus(
        config.data, eot=loaded.tokenizer.eot, known=known, val_tokens=config.eval.max_tokens
    )
    if known != corpus.fingerprint:
        raise CheckpointError(
            "the run's own data have changed since training",
            hint="name the text: gpt eval --memorization --data FILE",
        )
    shards = [shard for shard in corpus.train if shard.file.kind != "canary"]
    if corpus.train_bytes > MOST_BYTES:
        shards = [shards[place] for place in permutation(len(shards), _SEED)]
    return _Text("the training text", [], shards, corpus.val_documents)


def _memorization(
    loaded: LoadedModel, text: _Text, passages: int, device: Device, precision: str
) -> dict[str, Any]:
    """Verbatim continuations and the longest runs that samples share with the text, JSON-able."""
    prefixes, continuation = passage_sizes(loaded.model.config.block_size)
    length = prefixes[-1] + continuation
    samples = _samples(loaded)
    compared = _pieces_like(samples, text.held_out, loaded.tokenizer)
    runs = SharedRuns([*samples, *compared])
    train, held_out = PassageSample(passages, length), PassageSample(passages, length)
    searched = 0
    for piece, begins in text.pieces():
        tokens, content = _content(piece, loaded.tokenizer)
        train.add(tokens)
        runs.add(content, piece.name, begins)
        searched += len(content)
        if searched >= MOST_BYTES:
            log.info(f"the first {searched / 1e6:,.0f} MB are searched, in a random order")
            break
    for document in text.held_out:
        held_out.add(_content(document, loaded.tokenizer)[0])
    if not len(train.passages):
        raise DataError(f"no document of {text.name} has {length} tokens, a passage to ask for")
    rates: list[list[VerbatimRate]] = [
        verbatim_rates(loaded.model, part.passages, prefixes, continuation, device, precision)
        for part in (train, held_out)
        if len(part.passages)
    ]
    return {
        "searched_bytes": searched,
        "continuation_tokens": continuation,
        "rates": [asdict(rate) for rate in rates[0]],
        "held_out_rates": [asdict(rate) for rate in rates[1]] if len(rates) > 1 else [],
        "least_run_bytes": LEAST_RUN,
        "samples": [_nearest(*pair) for pair in zip(samples, runs.found, strict=False)],
        "sample_runs": _counted(runs.found[: len(samples)]),
        "held_out_runs": _counted(runs.found[len(samples) :]),
    }


def _samples(loaded: LoadedModel) -> list[bytes]:
    """Texts that the model writes unasked; none where its tokenizer begins no document."""
    start = loaded.tokenizer.begin([])
    if not start:
        return []
    sampling = Sampling(temperature=0.8, top_p=0.95, seed=_SEED, max_new_tokens=_SAMPLE_TOKENS)
    made = generate_samples(loaded.model, loaded.tokenizer, start, SAMPLES, sampling)
    return [loaded.tokenizer.decode_bytes(sample.tokens) for sample in made]


def _pieces_like(
    samples: list[bytes], documents: list[Document], tokenizer: Tokenizer
) -> list[bytes]:
    """As many pieces of the documents, as long as the samples, from places all over them."""
    whole = b"\n".join(_content(document, tokenizer)[1] for document in documents)
    begins = [place * len(whole) // max(len(samples), 1) for place in range(len(samples))]
    cut = [whole[at : at + len(text)] for at, text in zip(begins, samples, strict=True)]
    return cut if whole else []


def _content(document: Document, tokenizer: Tokenizer) -> tuple[np.ndarray[Any, Any], bytes]:
    """The tokens of a text and its bytes."""
    if document.tokens is not None:
        return document.tokens, tokenizer.decode_bytes(document.tokens.tolist())
    text = document.text
    content = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
    return tokenizer.encode_numpy(text), content


def _nearest(sample: bytes, run: SharedRun | None) -> dict[str, Any]:
    """A sample and the longest run of bytes that the training text has too."""
    return {
        "text": sample.decode("utf-8", "replace"),
        "run_bytes": len(run.data) if run else 0,
        "run": run.data.decode("utf-8", "ignore") if run else "",
        "document": run.document if run else None,
    }


def _counted(runs: list[SharedRun | None]) -> dict[str, int]:
    """Of how many texts, how many have a run, and the longest."""
    sizes = [len(run.data) for run in runs if run]
    return {"texts": len(runs), "with_run": len(sizes), "longest_bytes": max(sizes, default=0)}


def _epochs(loaded: LoadedModel) -> float | None:
    """Passes over the text with the canaries, up to the checkpoint that is looked at."""
    position = ((loaded.state or {}).get("train") or {}).get("position") or {}
    seen = position.get("seen") or [{}]
    return seen[0].get("epochs")
