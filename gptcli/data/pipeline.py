"""From a corpus to the rows that a model trains on: tokenizer, token cache, order, packing."""

import hashlib
import logging
import os
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from gptcli.config.data_schema import TokenizerConfig
from gptcli.config.schema import Config
from gptcli.data.bpe import whole_words
from gptcli.data.cache_folder import cache_root
from gptcli.data.chosen_tokenizer import build_tokenizer
from gptcli.data.corpus import Corpus
from gptcli.data.encode import EncodedStream
from gptcli.data.mixture import Mixture
from gptcli.data.packing import PackedRows
from gptcli.data.readers import read_shards
from gptcli.data.shards import Shard
from gptcli.data.store import StoreReader, open_store
from gptcli.data.stream import RecordStream, ShardReader
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError, GptError, ResourceError

log = logging.getLogger("gptcli")

_FORMAT = 1  # of kept tokenizers; raised when training changes
AUTO_BYTES = 4 * 2**30
MOST_THREADS = 8  # that encode text at a time; more would outrun the reader


def ready_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that needs no training text; None for kind bpe. Raises DataError."""
    return None if config.kind == "bpe" else build_tokenizer(config, [])


def corpus_tokenizer(config: Config, corpus: Corpus) -> Tokenizer:
    """The BPE tokenizer trained on the corpus; kept in the cache, so that it is trained once.

    Raises DataError for a corpus without text, `stop.Stopped` on a stop request.
    """
    settings = config.tokenizer
    if any(shard.file.kind == "tokens" for shard in corpus.train):
        raise ConfigError(
            "a tokenised corpus needs the tokenizer that made it",
            hint="set tokenizer.kind to tiktoken or file",
        )
    # Another version of the library that trains it may learn other tokens.
    about = f"{_FORMAT} {version('tokenizers')} {corpus.key} {settings.model_dump_json()}"
    key = hashlib.sha256(about.encode()).hexdigest()
    place = cache_root() / "tokenizers" / key
    if config.data.cache != "off" and place.is_dir():
        try:
            return Tokenizer.load(place)
        except GptError as error:
            log.warning(f"training the tokenizer again: {error}")
            shutil.rmtree(place, ignore_errors=True)
    log.info(f"training the tokenizer ({settings.kind}, {settings.vocab_size} tokens)")
    tokenizer = build_tokenizer(settings, whole_words(read_shards(_interleaved(corpus))))
    if config.data.cache != "off":
        _keep(tokenizer, place)
    return tokenizer


def should_cache(
    choice: Literal["auto", "on", "off"],
    train_bytes: int | None,
    remote: bool,
    expected_tokens: float | None,
) -> bool:
    """Whether a run keeps its tokens. auto: for local text of at most 4 GiB (None: not known) of
    which the run's `expected_tokens` (None: not known) will read at least half, at about four bytes
    a token."""
    if choice != "auto":
        return choice == "on"
    if remote or train_bytes is None or expected_tokens is None:
        return False
    return train_bytes <= AUTO_BYTES and expected_tokens >= 0.5 * train_bytes / 4


def _interleaved(corpus: Corpus) -> list[Shard]:
    """The shards, each source's in order, so that the beginning holds something of each source.

    Without canaries: a tokenizer with tokens of their own for some secrets would give them away.
    """
    shards = [shard for shard in corpus.train if shard.file.kind != "canary"]
    if len(corpus.sources) == 1:
        return shards
    sizes = Counter(shard.file.number for shard in shards)
    places: Counter[int] = Counter()
    keyed: list[tuple[float, int, int]] = []
    for shard in shards:
        number = shard.file.number
        keyed.append((places[number] / sizes[number], number, len(keyed)))
        places[number] += 1
    return [shards[place] for _, _, place in sorted(keyed)]


def training_rows(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, position: dict[str, Any] | None = None
) -> PackedRows:
    """The rows of the run from `position` (a state of PackedRows) on, else from the beginning.

    Tokens come from the token cache or are made on the way; the rows are the same.
    """
    data = config.data
    groups = source_groups(corpus)
    states = position["mixture"]["streams"] if position else [None] * len(groups)
    cached = should_cache(
        data.cache, corpus.train_bytes, corpus.remote, _expected_tokens(config, corpus)
    )
    streams = []
    for number, (shards, size) in enumerate(groups):
        seed = config.seed + number  # another order for each source of a mixture
        reader = _cached(shards, tokenizer, corpus) if cached else None
        stream = RecordStream(
            reader or ShardReader(shards), size, seed, data.shuffle_window, states[number]
        )
        streams.append(stream if reader else EncodedStream(stream, tokenizer, _threads()))
    return PackedRows(
        Mixture(streams, corpus.weights, position["mixture"] if position else None),
        tokenizer,
        config.model.block_size,
        config.seed,
        data.shuffle_window > 0,
        data.packing,
        data.document_mask,
        len(corpus.sources),
        position,
    )


def source_groups(corpus: Corpus) -> list[tuple[list[Shard], int]]:
    """Shards and size of each stream: one a source where they have weights, else one in all."""
    if corpus.weights is None:
        return [(corpus.train, corpus.train_bytes)]
    return [
        ([shard for shard in corpus.train if shard.file.number == number], source.train_bytes)
        for number, source in enumerate(corpus.sources)
    ]


def _cached(shards: list[Shard], tokenizer: Tokenizer, corpus: Corpus) -> StoreReader | None:
    """The shards' tokens in the cache, made if missing; None where no cache can be written."""
    try:
        key, check = corpus.key, corpus.check_unchanged
        return StoreReader(open_store(shards, tokenizer, key, _threads(), check))
    except (ResourceError, OSError) as error:
        log.warning(f"no token cache: {error}; tokenising on the way")
        return None


def _expected_tokens(config: Config, corpus: Corpus) -> float | None:
    """About how many tokens the run will read, as far as its limits say."""
    training = config.training
    limits = [float(training.max_tokens)] if training.max_tokens else []
    if training.max_epochs:
        limits.append(training.max_epochs * corpus.train_bytes / 4)
    if training.max_steps:
        limits.append(float(training.max_steps) * training.tokens_per_step)
    return min(limits) if limits else None


def _threads() -> int:
    return min(os.cpu_count() or 1, MOST_THREADS)


def _keep(tokenizer: Tokenizer, place: Path) -> None:
    temporary = place.with_name(f".tmp-{place.name}-{os.getpid()}")
    try:
        tokenizer.save(temporary)
        temporary.rename(place)
    except OSError as error:  # another process was first, or nothing can be written
        log.debug(f"tokenizer not kept: {error}")
        shutil.rmtree(temporary, ignore_errors=True)
