"""Byte-level BPE learned from text (Sennrich et al. 2016; on bytes: Radford et al. 2019)."""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import regex

from gptcli import stop
from gptcli.data.tiktoken_tables import PATTERNS, byte_characters

log = logging.getLogger("gptcli")

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 0.2  # in which a text is read, and the request seen there

# No split pattern has a word over this place, or looks across it.
_BORDER = regex.compile(r"[^\W\d_](?=[ \n])")
_HELD_CHARACTERS = 1 << 18  # of text without such a place

# Learning takes time quadratic in the length of a word, so runs that a pattern may make one word
# are cut. The length is a multiple of the groups that patterns make: of 8 Han characters, 3 digits.
_WORD_CHARACTERS = 240
_STRIDE = _WORD_CHARACTERS // 2
_KINDS = (r"\p{L}", r"\p{N}", r"\s", r"[^\s\p{L}\p{N}]")
_RUN = regex.compile("|".join(rf"({kind}{{{_STRIDE},}}+)" for kind in _KINDS))
_BEFORE = [regex.compile(rf"(?r){kind}*") for kind in _KINDS]  # of the same kind, backwards


def learn_ranks(
    texts: Iterable[str], vocab_size: int, pattern: str, max_bytes: int
) -> dict[bytes, int]:
    """Tokens with their merge ranks: the 256 bytes and up to `vocab_size` - 257 merges.

    Reads texts until `max_bytes` of UTF-8 are reached, the last one whole. `pattern` is a name in
    PATTERNS. The same texts give the same ranks, whatever the threads. A text with less to learn
    gives fewer tokens, and a warning. Runs of more than 240 letters, digits, blanks or other signs
    are learned from in parts. Raises `stop.Stopped` when a stop is asked for.
    """
    from tokenizers import Regex, Tokenizer, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    trainee = Tokenizer(BPE())
    trainee.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=vocab_size - 1,  # the end-of-text token is not learned
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    first = _first_bytes(texts, max_bytes)
    _stoppable(lambda: trainee.train_from_iterator(first, trainer=trainer))
    characters = byte_characters()
    vocabulary = trainee.get_vocab().items()
    ranks = {bytes(characters[c] for c in token): rank for token, rank in vocabulary}
    if len(ranks) + 1 < vocab_size:
        log.warning(
            f"the text is too small for {vocab_size:,} tokens:"
            f" the tokenizer has {len(ranks) + 1:,}, all that it could learn"
        )
    return ranks


def _stoppable(work: Callable[[], None]) -> None:
    """Do `work` in a thread beside this one, where signals are handled: a call that stays outside
    Python for minutes would keep them waiting. On a stop request what it does there is left to end
    by itself, at the next text or with the process. Raises `stop.Stopped`, and what `work` raises.
    """
    done, failed = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True).start()
    while not done.wait(_POLL_SECONDS):
        if stop.requested() is not None:
            done.wait(_GRACE_SECONDS)
            raise stop.Stopped
    if failed:
        raise failed[0]


def whole_words(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """The text of records, cut where words end instead of at the ends of pieces.

    Learning from it is learning from whole documents, in bounded memory.
    """
    held = ""
    for record in records:
        if record["part"] == 0:
            if held:
                yield held
            held = ""
        seen = max(0, len(held) - 1)  # but for its last letter, `held` has no border
        held += record["text"]
        border = _last_border(held, seen)
        if border:
            yield held[:border]
            held = held[border:]
        elif len(held) > _HELD_CHARACTERS:
            yield held
            held = ""
    if held:
        yield held


def _last_border(text: str, begin: int) -> int:
    """Where the last word that ends within `text` from `begin` on ends; 0 if none does."""
    for low in (max(begin, len(text) - 1000), begin):  # mostly it is near
        ends = [match.end() for match in _BORDER.finditer(text, low)]
        if ends:
            return ends[-1]
    return 0


def _first_bytes(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        yield from _without_long_words(text)
        left -= len(text.encode("utf-8", "replace"))
        if left <= 0:
            return


def _without_long_words(text: str) -> Iterator[str]:
    """The text, cut inside its long runs so that no word is longer than about a part of them."""
    begin = 0
    for low, high in _long_runs(text):
        for end in range(low + _WORD_CHARACTERS, high, _WORD_CHARACTERS):
            stop.raise_if_requested()
            yield text[begin:end]
            begin = end
    stop.raise_if_requested()
    yield text[begin:]


def _long_runs(text: str) -> Iterator[tuple[int, int]]:
    """Where runs longer than a part begin and end.

    Only every 120th character is looked at, and what follows it: a longer run covers the whole way
    from one of these places to the next. Searching the text instead takes longer than learning.
    """
    place = 0
    while place + _STRIDE <= len(text):
        run = _RUN.match(text, place)
        if run is None:
            place += _STRIDE
            continue
        low = _BEFORE[run.lastindex - 1].match(text, 0, place).start()
        if run.end() - low > _WORD_CHARACTERS:
            yield low, run.end()
        place += (run.end() - place) // _STRIDE * _STRIDE
