"""Pretraining: a corpus becomes a measured GPT in a run directory."""

import logging
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gptcli import world
from gptcli.config.schema import Config
from gptcli.data.corpus import Corpus, open_corpus
from gptcli.data.pipeline import corpus_tokenizer, ready_tokenizer, training_rows
from gptcli.data.readers import read_shards
from gptcli.data.rows import RowSource
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device, resolve_device
from gptcli.errors import DataError
from gptcli.evaluation.attention import attention_picture
from gptcli.evaluation.details import details
from gptcli.evaluation.perplexity import encode_documents
from gptcli.model.empty import empty_model
from gptcli.reports.report import write_report
from gptcli.runs.load import load_model
from gptcli.runs.metrics import read_samples
from gptcli.training.build import (
    RunResult,
    build_session,
    check_limits,
    describe_limits,
    nothing_to_do,
    run_session,
)
from gptcli.training.fitting import check_memory
from gptcli.training.initial import (
    check_embedding_file,
    required_eot,
    starting_point,
    starting_tokenizer,
    with_shape,
)
from gptcli.training.saved import fitting, standing_at
from gptcli.training.session import Session
from gptcli.training.start import Resume, Start, check_fingerprint, starting
from gptcli.training.together import check_same, common_tokenizer, leave_tokenizer
from gptcli.training.validation import Validation

log = logging.getLogger("gptcli")

_PROBED_PIECES = 64  # of 16,384 tokens: enough to meet rare ids of another tokenizer


def pretrain(
    config: Config,
    *,
    run_dir: Path | None = None,
    resume: Resume = "no",
    overwrite: bool = False,
    allow_data_change: bool = False,
    command: str = "",
    began: float | None = None,
) -> RunResult:
    """Train a model as `config` says and write its run directory.

    A stop request saves and returns status "stopped". training.max_time counts from `began` (of
    time.monotonic()), or from this call. Raises GptError for what a user can cause.
    """
    began = time.monotonic() if began is None else began
    check_limits(config)
    device = resolve_device(config.training.device)
    with (
        world.joined(device.kind, config.distributed.timeout_seconds) as here,
        starting(
            "pretrain",
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
        session, rows = _begin(config, start, device, allow_data_change)
        start.take_over()
        result = run_session(session, rows, partial(_found, session))
        if here.leads:
            write_report(start.directory)
        return result


def _begin(
    config: Config, start: Start, device: Device, allow_data_change: bool
) -> tuple[Session, RowSource]:
    """The run in memory and its rows. The model that `init` names does not outlive this call."""
    config, initial = starting_point(config, start)
    saved = start.saved_fingerprint
    tokenizer = starting_tokenizer(start, initial)
    with world.first():
        if tokenizer is None:
            tokenizer = common_tokenizer(start.directory)
        corpus, tokenizer = read_corpus(config, tokenizer, known=saved)
        if start.contents is None:
            leave_tokenizer(start.directory, tokenizer)
    check_same(start.directory, config, corpus, tokenizer)
    check_fingerprint(saved, corpus.fingerprint, allow_data_change)
    validation = encode_documents(corpus.val_documents, tokenizer, config.eval.max_tokens)
    session = build_session(config, start, device, tokenizer, corpus, validation, initial)
    with fitting(start.contents, start.source):
        rows = training_rows(config, corpus, tokenizer, session.state.position)
        return session, standing_at(rows, start.contents, corpus.fingerprint)


def _found(session: Session) -> dict[str, Any]:
    """What the report shows of the trained model beside its scores: what of the validation part
    surprised it, and where it looks in a text that it wrote at the end."""
    facts, validation = dict[str, Any](), session.score_validation
    if session.parallel.sharded or not session.parallel.here.leads:
        return facts
    # A resumed run whose last evaluation was another process's has no scores of single tokens.
    if isinstance(validation, Validation) and validation.found is not None:
        facts |= details(validation.documents, validation.found, session.tokenizer)
    written = [s for s in read_samples(session.directory) if s["step"] == session.state.step]
    if written:
        text = written[0]["prompt"] + written[0]["text"]
        facts["attention"] = attention_picture(session.model, session.tokenizer, text)
    return facts


def read_corpus(
    config: Config, tokenizer: Tokenizer | None, known: dict[str, Any] | None = None
) -> tuple[Corpus, Tokenizer]:
    """The corpus and the tokenizer: the given one, else that of the config, trained if need be.

    A tokenizer that is not on this machine is missed before any text is read. `known` is the data
    fingerprint of the run that goes on. Raises DataError when there is too little text.
    """
    tokenizer = tokenizer or ready_tokenizer(config.tokenizer)
    if tokenizer is not None:
        required_eot(tokenizer, config.init or config.tokenizer.path or tokenizer.kind)
    log.info(f"reading {', '.join(source.path for source in config.data.train)}")
    eot = tokenizer.eot if tokenizer is not None else None
    corpus = open_corpus(config.data, eot=eot, known=known, val_tokens=config.eval.max_tokens)
    if tokenizer is None:
        tokenizer = corpus_tokenizer(config, corpus)
    check_vocabulary(corpus, tokenizer, config.init)
    check_long_enough(corpus, tokenizer, config.model.block_size)
    return corpus, tokenizer


def check_vocabulary(corpus: Corpus, tokenizer: Tokenizer, init: str | None) -> None:
    """DataError where data of token ids plainly are another tokenizer's.

    The beginning is looked at before any training; every id is checked on the way.
    """
    shards = [shard for shard in corpus.train if shard.file.kind == "tokens"]
    highest, name = -1, ""
    for record in islice(read_shards(shards), _PROBED_PIECES):
        if len(record["tokens"]) and int(record["tokens"].max()) > highest:
            highest, name = int(record["tokens"].max()), record["document"]
    if highest < tokenizer.vocab_size:
        return
    whose = f"the model that init names ({init})" if init is not None else "the tokenizer"
    raise DataError(
        f"{name}: has token id {highest:,}, so it was made with a vocabulary of at least"
        f" {highest + 1:,} tokens; {whose} has {tokenizer.vocab_size:,}",
        hint="give the text itself, which is then encoded to fit, or ids made with the same"
        " tokenizer"
        if init is not None
        else "set tokenizer: to the one that made the ids",
    )


def check_long_enough(corpus: Corpus, tokenizer: Tokenizer, block_size: int) -> None:
    """DataError unless there is a block of training text and some validation text."""
    # No tokenizer makes fewer tokens than one in 64 bytes of ordinary text: count only below that.
    if corpus.train_bytes <= 64 * (block_size + 1):
        tokens = sum(_token_count(record, tokenizer) for record in corpus.train_records())
        if tokens <= block_size:
            raise DataError(
                f"the training text has {tokens} tokens, less than one block of {block_size} + 1",
                hint=f"add text, or --set model.block_size={_fitting_block(tokens)}",
            )
    if not corpus.val_documents:
        raise DataError(
            "the validation part is empty",
            hint="add text, or set data.val_fraction or data.val",
        )


def _fitting_block(tokens: int) -> int:
    """The largest power of two below `tokens`: it divides most tokens_per_step."""
    return int(2 ** ((max(tokens, 2) - 1).bit_length() - 1))


def _token_count(record: dict[str, Any], tokenizer: Tokenizer) -> int:
    tokens = record["tokens"] if "tokens" in record else tokenizer.encode_numpy(record["text"])
    return len(tokens) + 1


def describe(config: Config) -> str:
    """What `gpt pretrain --dry-run` prints: model size, data, limits. Trains nothing."""
    check_limits(config)
    device = resolve_device(config.training.device)
    initial = load_model(config.init, torch.device("cpu")) if config.init is not None else None
    if initial is not None:
        config = with_shape(config, initial.config.model)
    check_embedding_file(config)
    corpus, tokenizer = read_corpus(config, initial.tokenizer if initial is not None else None)
    validation = encode_documents(corpus.val_documents, tokenizer, config.eval.max_tokens)
    vocab_size = tokenizer.vocab_size if initial is None else initial.model.vocab_size
    held = sum(p.nbytes for p in initial.model.parameters()) if initial is not None else 0
    check_memory(config, device, vocab_size, held)
    model = empty_model(config.model, vocab_size)
    tokens = sum(len(d.tokens) - d.first for d in validation)
    per_byte = tokens / max(sum(d.bytes for d in validation), 1)
    documents = "uncounted" if corpus.documents is None else f"{corpus.documents:,}"
    lines = {
        "parameters": f"{model.parameter_count():,}",
        "vocabulary": f"{tokenizer.vocab_size:,} tokens ({tokenizer.kind})",
        "training text": f"{corpus.train_bytes:,} bytes of {documents} documents,"
        f" about {int(corpus.train_bytes * per_byte):,} tokens",
        "validation": f"{len(validation):,} documents, {tokens:,} tokens ({corpus.split} split)",
        "tokens per step": f"{config.training.tokens_per_step:,}",
        "limits": describe_limits(config),
    }
    return "".join(f"{name:<16} {value}\n" for name, value in lines.items())
