"""A tokenizer as GGUF metadata, where llama.cpp makes the same ids of every text."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptcli.data.tiktoken_tables import GPT2_PATTERN, GPT4_PATTERN, byte_characters
from gptcli.data.tokenizer import IdsTokenizer, LibraryTokenizer, Tokenizer
from gptcli.data.tokenizer_json import flat, split_pattern
from gptcli.errors import CheckpointError
from gptcli.interop.tokenizer_export import merges_of, tokenizer_json

log = logging.getLogger("gptcli")

# llama.cpp's token types.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# How llama.cpp calls the regexes that it cuts words with; each twice, as published and as ours.
_PRE_TOKENIZERS = {
    GPT2_PATTERN: "gpt-2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt-2",
    GPT4_PATTERN: "llama-bpe",
    GPT4_PATTERN.replace(
        "'(?i:[sdmt]|ll|ve|re)", "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    ): "llama-bpe",  # Llama 3
}
# A list of merges is compulsory; this one is of signs that no byte is spelled with.
_NO_MERGE = "[none] [none]"
# Names that llama.cpp takes for an end of text, whatever type the token has.
_END_NAMES = (
    *("</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "<|eot_id|>", "<|eom_id|>", "<|end|>"),
    *("<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>", "<turn|>"),
    *("<|im_end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|tool_response>"),
)
_HINT = "gpt export --to hf keeps the tokenizer as it is"


@dataclass(frozen=True)
class Vocabulary:
    """The keys tokenizer.ggml.* of a GGUF file.

    `model` is gpt2 (byte-level BPE) or llama (sentencepiece); `pre` names the regex that cuts
    words. `tokens`, `types` and `scores` have one entry an id, `start` is the token that begins a
    text, and `adds_start` tells whether it is put before every one; `ends` are those that end one,
    the first of them the end-of-text token.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    start: int | None
    adds_start: bool
    ends: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    unknown: int | None = None


def vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """The tokenizer for llama.cpp, with as many tokens as the model has rows.

    CheckpointError with the reason when llama.cpp would make other ids of some text.
    """
    if isinstance(tokenizer, IdsTokenizer):
        raise _refusal("the model has no tokenizer, and llama.cpp reads only text")
    if not tokenizer.ends:
        raise _refusal(
            "the tokenizer has no end-of-text token; llama.cpp then takes an ordinary one for it"
        )
    if tokenizer.vocab_size > vocab_size:
        raise _refusal(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {vocab_size}"
        )
    if isinstance(tokenizer, LibraryTokenizer):
        raw = json.loads(tokenizer_json(tokenizer))
        if any(step.get("type") == "ByteLevel" for step in flat(raw.get("decoder"), "decoders")):
            return _byte_level_of_library(tokenizer, raw, vocab_size)
        return _sentencepiece(tokenizer, raw, vocab_size)
    return _byte_level(tokenizer, vocab_size)


def _byte_level(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    special = tokenizer.special
    ranks = {
        tokenizer.token_bytes(i): i
        for i in set(range(tokenizer.vocab_size)) - set(special.ids.values())
        if tokenizer.token_bytes(i)
    }
    merges, reached = merges_of(ranks)
    pre = _pre_tokenizer(tokenizer, whole_words=not reached)
    characters = {byte: character for character, byte in byte_characters().items()}
    spelled = {token: "".join(characters[b] for b in token) for token in ranks}
    named = {i: (spelled[token], NORMAL) for token, i in ranks.items()}
    in_text = {special.ids[name] for name in special.in_text}
    for name, i in special.ids.items():
        named[i] = (name, USER_DEFINED if i in in_text else CONTROL)
    pairs = [f"{spelled[a]} {spelled[b]}" for a, b in merges]
    return _merged(tokenizer, pre, named, pairs, vocab_size)


def _pre_tokenizer(tokenizer: Tokenizer, whole_words: bool) -> str:
    """llama.cpp's name of the split pattern; `whole_words` when some tokens need them."""
    if tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9"):
        raise _refusal("the tokenizer normalises texts to NFC, which llama.cpp does not")
    if tokenizer.vocab_size - len(tokenizer.special.ids) == 256:
        return "gpt-2"  # a token a byte: however words are cut, the ids are the same
    pre = _PRE_TOKENIZERS.get(tokenizer.pattern)
    if pre is None:
        raise _refusal(
            "llama.cpp has no regex that cuts words as the tokenizer's does; it has those of the"
            f" patterns gpt2 and gpt4, not {tokenizer.pattern[:60]!r}"
        )
    if pre == "gpt-2" and whole_words:  # llama-bpe looks for whole words before it merges
        raise _refusal(
            "the tokenizer has tokens that come about by no merges, and llama.cpp does not look for"
            " whole words with the pattern gpt2"
        )
    return pre


def _byte_level_of_library(
    tokenizer: LibraryTokenizer, raw: dict[str, Any], vocab_size: int
) -> Vocabulary:
    """A byte-level BPE by its own list of merges, which llama.cpp follows in the same order."""
    model, special, pre = raw["model"], tokenizer.special, _library_pre(raw)
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback") or affixes:
        raise _refusal("the tokenizer's tokens are not made by merging bytes alone")
    if raw.get("normalizer") is not None:
        raise _refusal("the tokenizer has a normalizer that changes texts, llama.cpp none")
    if special.in_text:
        raise _refusal(f"the tokenizer looks for {special.in_text[0]!r} before it cuts words")
    if bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        raise _refusal(f"llama.cpp looks for whole words with llama-bpe only, not with {pre}")
    missing = [f"0x{b:02X}" for c, b in byte_characters().items() if c not in model["vocab"]]
    if missing:
        log.warning(
            "these bytes have no token, and llama.cpp merges otherwise what is around them: %s",
            " ".join(missing),
        )
    named = {i: (token, NORMAL) for token, i in model["vocab"].items()}
    named |= {i: (name, CONTROL) for name, i in special.ids.items()}
    pairs = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return _merged(tokenizer, pre, named, pairs, vocab_size)


def _merged(
    tokenizer: Tokenizer,
    pre: str,
    named: dict[int, tuple[str, int]],
    merges: list[str],
    vocab_size: int,
) -> Vocabulary:
    """The vocabulary of a byte-level BPE, tokens and merges in their byte-to-unicode spelling."""
    tokens, types = _listed(named, vocab_size)
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        start=tokenizer.start,
        adds_start=tokenizer.prompt_start is not None,
        ends=_ends(tokenizer),
        merges=merges or [_NO_MERGE],
    )


def _library_pre(raw: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer of a byte-level BPE."""
    steps = list(flat(raw.get("pre_tokenizer"), "pretokenizers"))
    if len(steps) == 2 and steps[0].get("type") == "Digits" and steps[0].get("individual_digits"):
        if split_pattern(steps[1]) == GPT2_PATTERN:
            return "smollm"
    elif pre := _PRE_TOKENIZERS.get(split_pattern(raw.get("pre_tokenizer")) or ""):
        return pre
    kinds = " + ".join(str(step.get("type")) for step in steps) or "none"
    raise _refusal(
        f"the tokenizer is a byte-level BPE, but its pattern (pre-tokenizer: {kinds}) is none that"
        " llama.cpp knows by a name of ours (gpt-2, llama-bpe, smollm)"
    )


def _sentencepiece(tokenizer: LibraryTokenizer, raw: dict[str, Any], vocab_size: int) -> Vocabulary:
    """A BPE over the whole text with spaces as `▁` and bytes for unknown characters.

    llama.cpp merges any two neighbours whose union is a token, the highest score first.
    """
    model = raw["model"]
    ids: dict[str, int] = model.get("vocab", {})
    if not _is_plain_sentencepiece(raw) or tokenizer.special.in_text:
        raise _refusal(
            "the tokenizer is neither a byte-level BPE nor a sentencepiece BPE as llama.cpp runs it"
            " (space before the text, `▁` for spaces, bytes for unknown characters)"
        )
    ranks = _merge_ranks(model["merges"])
    strays = (token for token in ids if len(token) > 1 and token not in ranks)
    if any(t[:i] in ids and t[i:] in ids for t in strays for i in range(1, len(t))):
        raise _refusal("llama.cpp would merge tokens that the tokenizer does not")
    special, unknown = tokenizer.special.ids, model.get("unk_token")
    named = {
        i: (token, CONTROL if token in special else BYTE if _is_byte(token) else NORMAL)
        for token, i in {**ids, **special}.items()
    }
    if unknown is not None:
        named[ids[unknown]] = (unknown, UNKNOWN)
    tokens, types = _listed(named, vocab_size)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        start=tokenizer.start,
        adds_start=tokenizer.prompt_start is not None,
        ends=_ends(tokenizer),
        scores=[-float(ranks.get(token, len(ranks))) for token in tokens],
        unknown=None if unknown is None else ids[unknown],
    )


def _merge_ranks(merges: list[Any]) -> dict[str, int]:
    """Tokens that come about by merging, in the order in which they do.

    CheckpointError unless merging any two neighbours into the first of these comes to the same as
    the listed pairs: their order is that of the tokens, and each token's last merge is listed.
    """
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    made = ["".join(pair) for pair in pairs]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(made))}
    order = [ranks[token] for token in made]
    if order != sorted(order) or not {_last_merge(t, ranks) for t in ranks} <= set(pairs):
        raise _refusal("the tokenizer's merges do not follow from its tokens, as in llama.cpp")
    return ranks


def _last_merge(token: str, ranks: dict[str, int]) -> tuple[str, str] | None:
    """The two parts that `token` is merged from at last; None when merging ends before.

    Wherever the token comes about inside a text, the merges inside it are these: what is next to it
    has no part in them.
    """
    parts = list(token)
    while len(parts) > 2:
        unions = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
        found = [(ranks[union], i) for i, union in enumerate(unions) if union in ranks]
        if not found:
            return None
        _, i = min(found)
        parts[i : i + 2] = [unions[i]]
    return parts[0], parts[1]


def _is_plain_sentencepiece(raw: dict[str, Any]) -> bool:
    model, normalizer = raw["model"], raw.get("normalizer") or {}
    steps = [
        {key: value for key, value in step.items() if key != "type"}
        for step in normalizer.get("normalizers", [])
    ]
    return (
        model.get("type", "BPE") == "BPE"
        and bool(model.get("byte_fallback"))
        and not model.get("ignore_merges")
        and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))
        and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
        and steps == [{"prepend": "▁"}, {"pattern": {"String": " "}, "content": "▁"}]
        and raw.get("pre_tokenizer") is None
    )


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _listed(named: Mapping[int, tuple[str, int]], vocab_size: int) -> tuple[list[str], list[int]]:
    """Name and type of every id; ids without a token get names that nothing else has."""
    taken: dict[str, int] = {}
    for i, (name, _) in named.items():
        if name in taken:
            raise _refusal(f"tokens {taken[name]} and {i} are both spelled {name!r} in GGUF")
        taken[name] = i
    _warn_of_ends((name, kind) for name, kind in named.values())
    names, types = [], []
    for i in range(vocab_size):
        name, kind = named.get(i, (f"[PAD{i}]", UNUSED))
        while kind == UNUSED and name in taken:
            name = f"[{name}]"
        names.append(name)
        types.append(kind)
    return names, types


def _warn_of_ends(named: Iterable[tuple[str, int]]) -> None:
    wrong = sorted(name for name, kind in named if kind == NORMAL and name in _END_NAMES)
    if wrong:
        log.warning("llama.cpp ends a text at these ordinary tokens: %s", " ".join(wrong))


def _ends(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text, eot first. GGUF has keys for three; more are told of."""
    others = sorted(tokenizer.ends - {tokenizer.eot})
    ends = [*([] if tokenizer.eot is None else [tokenizer.eot]), *others]
    if len(ends) > 3:
        log.warning("GGUF names at most 3 ends of a text; left out: %s", ends[3:])
    return ends[:3]


def _refusal(reason: str) -> CheckpointError:
    return CheckpointError(f"no GGUF: {reason}", hint=_HINT)
