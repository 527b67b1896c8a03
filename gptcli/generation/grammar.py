"""Texts held to a constraint token by token, on llguidance.

What is allowed next are all tokens whose bytes go on with some text that fulfils the constraint,
not only those that the tokenizer itself would choose. The model's probabilities of them are scaled
to add up to 1 at each step. So the texts are distributed as those of the model that happen to
fulfil the constraint only where each step leaves the same share of its probability.
"""

from collections import OrderedDict
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError
from gptcli.generation.constraint import Constraint, first_line, library, limits

_MOST_KEPT = 16  # grammars of a tokenizer that are ready; hard ones take megabytes
_NOTHING_FITS = "none of the model's tokens goes on with it"


class Matcher:
    """How far one text is on its way through a grammar.

    `banned` (V,) bool are the tokens that must not come next. `accepting` tells that the text so
    far fulfils the constraint: where it does, the tokenizer's ends are not banned. `done` tells
    that it does and nothing can follow, `problem` what keeps it from going on.
    """

    def __init__(self, grammar: "_Grammar") -> None:
        self._grammar, self._state = grammar, grammar.start.deep_copy()
        self.banned, self.accepting = grammar.banned, grammar.accepting
        self.done, self.problem = grammar.done, grammar.problem

    def advance(self, token: int) -> None:
        """The text goes on with `token`; an end of the tokenizer's changes nothing."""
        if token < 0 or token in self._grammar.ends or self.problem is not None:
            return
        self._state.consume_token(token)
        self.banned, self.accepting, self.done, self.problem = self._grammar.standing(self._state)

    def fulfilled_by(self, text: str) -> bool:
        """Whether `text` alone would fulfil the constraint."""
        state = self._grammar.start.deep_copy()
        tokens = self._grammar.vocabulary.library.greedy_tokenize(text)
        return bool(state.try_consume_tokens(tokens) == len(tokens) and state.is_accepting())

    def stuck(self) -> str:
        """What is to be said where none of the tokens that are allowed can be drawn."""
        return self.problem or "what the bad words leave does not fulfil it"


class Vocabulary:
    """The tokens of a tokenizer below `vocab_size` in the library's form, and its grammars.

    Ends, other special tokens and the unknown one spell nothing, so no constraint allows them; the
    library's own end is one id behind all, and stands for all ends.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.size = vocab_size
        self.ends = np.array(sorted(i for i in tokenizer.ends if i < vocab_size), dtype=np.int64)
        self.tokens = [_spelled(tokenizer, token) for token in range(vocab_size)]
        self.library = library().LLTokenizer(_Wrapper([*self.tokens, b""], vocab_size))
        self._recent: OrderedDict[Constraint, _Grammar] = OrderedDict()
        self._used = WeakValueDictionary[Constraint, _Grammar]()

    def matcher(self, constraint: Constraint) -> Matcher:
        """For a new text. Where it cannot even begin, `problem` says so. It is there at once while
        another matcher of `constraint` is in use, or was lately."""
        self._recent.pop(constraint, None)
        grammar = self._used.get(constraint)
        if grammar is None or grammar.spent:
            grammar = _Grammar(self, constraint)
        self._recent[constraint] = self._used[constraint] = grammar
        if len(self._recent) > _MOST_KEPT:
            self._recent.popitem(last=False)
        return Matcher(grammar)

    def unspelled(self, texts: list[str]) -> list[str]:
        """Those of `texts` that no sequence of tokens spells."""
        known = set(self.tokens) - {b""}
        if all(bytes([byte]) in known for text in texts for byte in set(text.encode())):
            return []
        longest = max(map(len, known), default=0)
        return [text for text in texts if not _is_spelled(text.encode(), known, longest)]


_vocabularies: WeakKeyDictionary[Tokenizer, dict[int, Vocabulary]] = WeakKeyDictionary()


def vocabulary_of(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """The one vocabulary of `tokenizer` for a model with `vocab_size` tokens: 0.2 s for 50k."""
    made = _vocabularies.setdefault(tokenizer, {})
    if vocab_size not in made:
        made[vocab_size] = Vocabulary(tokenizer, vocab_size)
    return made[vocab_size]


def check_spelled(constraint: Constraint, tokenizer: Tokenizer, model_vocab_size: int) -> Matcher:
    """One for a text that is held to `constraint`: as long as it is kept, others are made at once.

    ConfigError where the tokens of a model cannot begin to fulfil `constraint`, or cannot spell
    one of its choices."""
    vocabulary = vocabulary_of(tokenizer, min(tokenizer.vocab_size, model_vocab_size))
    if constraint.kind == "choices":
        unspelled = vocabulary.unspelled(constraint.texts)
        if unspelled:
            more = f" and {len(unspelled) - 1} more" if len(unspelled) > 1 else ""
            raise ConfigError(
                f"choices: the model's tokens cannot spell {unspelled[0][:80]!r}{more}"
            )
    matcher = vocabulary.matcher(constraint)
    if matcher.problem is not None:
        raise ConfigError(f"{constraint.shown()}: {matcher.problem}")
    return matcher


class _Grammar:
    """A constraint made ready for a vocabulary, and how texts stand in it."""

    def __init__(self, vocabulary: Vocabulary, constraint: Constraint) -> None:
        self.vocabulary, self.ends = vocabulary, frozenset(vocabulary.ends.tolist())
        self.spent = False  # its texts share a lexer, which grew too large
        self._mask = np.zeros((vocabulary.size + 1 + 31) // 32, dtype=np.int32)
        self.start = library().LLMatcher(
            vocabulary.library,
            constraint.grammar,
            log_level=0,
            limits=limits(constraint.most_states),
        )
        self.banned, self.accepting, self.done, self.problem = self.standing(self.start)

    def standing(self, state: Any) -> tuple[NDArray[np.bool_], bool, bool, str | None]:
        """`banned`, `accepting`, `done` and `problem` of a text, see `Matcher`."""
        size, nothing = self.vocabulary.size, np.ones(self.vocabulary.size, dtype=np.bool_)
        if not state.is_error():
            state.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if state.is_error():
            told = first_line(state.get_error())
            if told.startswith("NoExtension"):
                return nothing, False, False, _NOTHING_FITS
            self.spent = True
            return nothing, False, False, f"too complex to go on: {told}"
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")
        banned = bits[:size] == 0
        going_on, accepting = not banned.all(), bool(bits[size])
        problem = None if going_on or accepting else _NOTHING_FITS
        if accepting and len(self.vocabulary.ends):
            banned[self.vocabulary.ends] = False
        return banned, accepting, accepting and not going_on, problem


class _Wrapper:
    """What the library asks a tokenizer for. It never has to encode (`no_forcing`)."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None
    special_token_ids: tuple[int, ...] = ()

    def __init__(self, tokens: list[bytes], end: int) -> None:
        self.tokens, self.eos_token_id = tokens, end

    def __call__(self, text: str) -> list[int]:
        return []


def _spelled(tokenizer: Tokenizer, token: int) -> bytes:
    if token in tokenizer.ends or token == tokenizer.unknown:
        return b""
    return tokenizer.token_bytes(token)


def _is_spelled(text: bytes, tokens: set[bytes], longest: int) -> bool:
    """Whether `text` is some of `tokens` one after another."""
    reached = {0}
    for start in range(len(text)):
        if start in reached:
            ends = range(start + 1, min(start + longest, len(text)) + 1)
            reached |= {end for end in ends if text[start:end] in tokens}
    return len(text) in reached
