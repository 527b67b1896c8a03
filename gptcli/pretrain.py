"""Pretraining: a corpus becomes a measured GPT in a run directory."""

import logging
from pathlib import Path

import torch

from gptcli.config.schema import Config
from gptcli.data.corpus import Corpus, open_corpus
from gptcli.data.packing import PackedRows
from gptcli.data.stream import RecordStream
from gptcli.data.tokenizer import Tokenizer, build_tokenizer
from gptcli.device import resolve_device
from gptcli.errors import DataError
from gptcli.evaluation.perplexity import encode_documents
from gptcli.model.gpt import GPT
from gptcli.reports.report import write_report
from gptcli.training.build import (
    RunResult,
    build_session,
    check_limits,
    describe_limits,
    nothing_to_do,
    run_session,
    starting_point,
)
from gptcli.training.session import Session
from gptcli.training.start import Resume, check_fingerprint, starting

log = logging.getLogger("gptcli")


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
    device = resolve_device(config.training.device)
    with starting(
        "pretrain", config, run_dir=run_dir, resume=resume, overwrite=overwrite, command=command
    ) as start:
        if start.done:
            return nothing_to_do(start)
        config, initial = starting_point(config, start)
        log.info(f"reading {', '.join(source.path for source in config.data.train)}")
        corpus = open_corpus(config.data)
        if start.contents is not None:
            saved = start.contents.state["data_fingerprint"]
            check_fingerprint(saved, corpus.fingerprint, allow_data_change)
            tokenizer = start.contents.tokenizer
        elif initial is not None:
            tokenizer = initial.tokenizer
        else:
            log.info(f"preparing the tokenizer ({config.tokenizer.kind})")
            tokenizer = build_tokenizer(config.tokenizer, corpus.train_texts())
        check_long_enough(corpus, tokenizer, config.model.block_size)
        validation = encode_documents(corpus.val_documents, tokenizer, config.eval.max_tokens)
        session = build_session(config, start, device, tokenizer, corpus, validation, initial)
        result = run_session(session, packed_rows(session, corpus), corpus.train_bytes)
        write_report(start.directory)
        return result


def packed_rows(session: Session, corpus: Corpus) -> PackedRows:
    """The training rows from where the session stands."""
    config, position = session.config, session.state.position
    window = config.data.shuffle_window
    stream = RecordStream(
        corpus.train, config.seed, window, position["stream"] if position else None
    )
    return PackedRows(
        stream, session.tokenizer, config.model.block_size, config.seed, window > 0, position
    )


def check_long_enough(corpus: Corpus, tokenizer: Tokenizer, block_size: int) -> None:
    """DataError unless there is a block of training text and some validation text."""
    # No tokenizer makes fewer tokens than one in 64 bytes of ordinary text: count only below that.
    if corpus.train_bytes <= 64 * (block_size + 1):
        tokens = sum(len(tokenizer.encode(text)) + 1 for text in corpus.train_texts())
        if tokens <= block_size:
            raise DataError(
                f"the training text has {tokens} tokens, less than one block of {block_size} + 1",
                hint=f"add text, or set model.block_size below {tokens}",
            )
    if not corpus.val_documents:
        raise DataError("no validation text is left: add text, or set data.val")


def describe(config: Config) -> str:
    """What `gpt pretrain --dry-run` prints: model size, data, limits. Trains nothing."""
    check_limits(config)
    resolve_device(config.training.device)
    corpus = open_corpus(config.data)
    tokenizer = build_tokenizer(config.tokenizer, corpus.train_texts())
    check_long_enough(corpus, tokenizer, config.model.block_size)
    validation = encode_documents(corpus.val_documents, tokenizer, config.eval.max_tokens)
    with torch.device("meta"):
        model = GPT(config.model, tokenizer.vocab_size)
    tokens = sum(len(d.tokens) - d.first for d in validation)
    per_byte = tokens / max(sum(d.bytes for d in validation), 1)
    lines = {
        "parameters": f"{model.parameter_count():,}",
        "vocabulary": f"{tokenizer.vocab_size:,} tokens ({tokenizer.kind})",
        "training text": f"{corpus.train_bytes:,} bytes of {corpus.documents:,} documents,"
        f" about {int(corpus.train_bytes * per_byte):,} tokens",
        "validation": f"{len(validation):,} documents, {tokens:,} tokens ({corpus.split} split)",
        "tokens per step": f"{config.training.tokens_per_step:,}",
        "limits": describe_limits(config),
    }
    return "".join(f"{name:<16} {value}\n" for name, value in lines.items())
