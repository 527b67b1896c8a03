"""Where a model does well and badly on the text that it was scored on: by source, language and
position, its most surprising documents and tokens, its calibration. No second pass is needed."""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli import stop
from gptcli.data.tokenizer import Tokenizer
from gptcli.data.unicode_scripts import language_of, main_script
from gptcli.evaluation.calibration import calibration
from gptcli.evaluation.perplexity import DocumentScores, EncodedDocument
from gptcli.evaluation.statistics import bootstrap_ratio_ci, bootstrap_ratio_cis

WORST_DOCUMENTS = 10
WORST_TOKENS = 20
LEAST_BYTES = 64  # of a document that is called surprising: a single odd word is no document
MOST_GROUPS = 20
READ_TOKENS = 200  # of a document, to tell its language
SHOWN_CHARACTERS = 160
CONTEXT_TOKENS = 24  # shown to the left of a surprising token

_Array = NDArray[np.float64]


def details(
    documents: Sequence[EncodedDocument], found: DocumentScores, tokenizer: Tokenizer
) -> dict[str, Any]:
    """{"breakdown", "surprising", "calibration"} of what `score_documents` found with `tokens`; for
    a report, JSON-able. Raises `stop.Stopped` when a stop is asked for."""
    top = np.concatenate([tokens.top for tokens in found.each])
    first = np.concatenate([tokens.first for tokens in found.each])
    return {
        "breakdown": _breakdown(documents, found, tokenizer),
        "surprising": {
            "documents": _surprising_documents(documents, found, tokenizer),
            "tokens": _surprising_tokens(documents, found, tokenizer),
        },
        "calibration": calibration(top, first),
    }


def _breakdown(
    documents: Sequence[EncodedDocument], found: DocumentScores, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Scores by source, by language (by script where py3langid is not installed) and by position;
    one group that has everything is left out."""
    sources = [document.source for document in documents]
    spoken = importlib.util.find_spec("py3langid") is not None
    languages = []
    for document in documents:
        stop.raise_if_requested()
        start = _text(tokenizer, document.tokens[document.first :][:READ_TOKENS].tolist())
        languages.append((language_of(start) if spoken else main_script(start)) or "unknown")
    groups = {"source": sources, "language" if spoken else "script": languages}
    shown = {key: _groups(names, found) for key, names in groups.items() if len(set(names)) > 1}
    return {**shown, "position": _positions(found)}


def _groups(names: list[str], found: DocumentScores) -> list[dict[str, Any]]:
    """Scores of the documents of each name, most bytes first; the smallest together."""
    sizes: dict[str, float] = {}
    for name, size in zip(names, found.bytes, strict=True):
        sizes[name] = sizes.get(name, 0.0) + size
    ordered = sorted(sizes, key=lambda name: -sizes[name])
    rest = set(ordered[MOST_GROUPS:])
    shown = [*ordered[:MOST_GROUPS], *([f"{len(rest)} others"] if rest else [])]
    number = {name: min(place, MOST_GROUPS) for place, name in enumerate(ordered)}
    owner = np.array([number[name] for name in names])
    rows = []
    for place, name in enumerate(shown):
        own = owner == place
        nats, tokens, correct, size = (
            values[own] for values in (found.nats, found.tokens, found.correct, found.bytes)
        )
        bits = nats / math.log(2)
        rows.append(
            {
                "name": name,
                "documents": int(own.sum()),
                "tokens": int(tokens.sum()),
                "bytes": int(size.sum()),
                "loss": _ratio(nats, tokens),
                "bits_per_byte": _ratio(bits, size),
                "bits_per_byte_ci95": bootstrap_ratio_ci(bits, size),
                "accuracy": _ratio(correct, tokens),
            }
        )
    return rows


def _positions(found: DocumentScores) -> list[dict[str, Any]]:
    """Loss and accuracy by how many tokens the model saw to the left: 1, 2 to 3, 4 to 7, ..."""
    longest = max(int(tokens.context.max(initial=1)) for tokens in found.each)
    bins = longest.bit_length()
    counts, nats, right = (np.zeros((bins, len(found.each))) for _ in range(3))
    for place, tokens in enumerate(found.each):
        which = np.frexp(tokens.context)[1] - 1  # the exponent: floor(log2), exactly
        counts[:, place] = np.bincount(which, minlength=bins)
        nats[:, place] = np.bincount(which, weights=tokens.nats, minlength=bins)
        right[:, place] = np.bincount(which, weights=tokens.first, minlength=bins)
    intervals = bootstrap_ratio_cis(nats, counts)
    return [
        {
            "low": 1 << k,
            "high": min((2 << k) - 1, longest),
            "tokens": int(counts[k].sum()),
            "loss": _ratio(nats[k], counts[k]),
            "loss_ci95": intervals[k],
            "accuracy": _ratio(right[k], counts[k]),
        }
        for k in range(bins)
        if counts[k].any()
    ]


def _surprising_documents(
    documents: Sequence[EncodedDocument], found: DocumentScores, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The documents with most bits per byte, of those of some length; none of a single one."""
    long = np.flatnonzero(found.bytes >= LEAST_BYTES)
    if len(documents) < 2 or not len(long):
        return []
    bits = found.nats[long] / (math.log(2) * found.bytes[long])
    worst = np.argsort(-bits, kind="stable")[:WORST_DOCUMENTS]
    rows = []
    for place in worst:
        number = int(long[place])
        document = documents[number]
        start = document.tokens[document.first :][:SHOWN_CHARACTERS].tolist()
        rows.append(
            {
                "name": document.name or f"document {number + 1}",
                "bits_per_byte": float(bits[place]),
                "bytes": int(found.bytes[number]),
                "tokens": int(found.tokens[number]),
                "start": _text(tokenizer, start)[:SHOWN_CHARACTERS],
            }
        )
    return rows


def _surprising_tokens(
    documents: Sequence[EncodedDocument], found: DocumentScores, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The tokens with most nats, each token of the vocabulary once, with the text to their left
    (of what the model saw) and what it held for likeliest."""
    candidates = []
    for number, tokens in enumerate(found.each):
        # Of one document no more can be needed than so many different tokens.
        ids = documents[number].tokens.numpy()[documents[number].first :]
        order = np.argsort(-tokens.nats, kind="stable")
        _, firsts = np.unique(ids[order], return_index=True)
        for place in order[np.sort(firsts)[:WORST_TOKENS]]:
            candidates.append((-float(tokens.nats[place]), number, int(place), int(ids[place])))
    rows, seen = [], set()
    for negative, number, place, token in sorted(candidates):
        if token in seen:
            continue
        seen.add(token)
        document, tokens = documents[number], found.each[number]
        at = place + document.first
        left = document.tokens[at - min(CONTEXT_TOKENS, int(tokens.context[place])) : at].tolist()
        likeliest = int(tokens.likeliest[place])
        rows.append(
            {
                "token": _token(tokenizer, token),
                "bits": -negative / math.log(2),
                "context": _text(tokenizer, left, "backslashreplace"),
                "context_tokens": int(tokens.context[place]),
                "likeliest": _token(tokenizer, likeliest),
                "likeliest_probability": float(tokens.top[place]),
                "document": document.name or f"document {number + 1}",
                "position": at,
            }
        )
        if len(rows) == WORST_TOKENS:
            break
    return rows


def _text(tokenizer: Tokenizer, ids: list[int], errors: str = "ignore") -> str:
    """Text of tokens out of the middle of a document, without the rest of a character that begins
    it; with `errors` as bytes.decode has them for other parts of characters."""
    data = tokenizer.decode_bytes(ids)
    begin = next((k for k, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
    return data[begin:].decode("utf-8", errors)


def _token(tokenizer: Tokenizer, token: int) -> str:
    """One token as text; parts of characters are escapes, what has no text is its number."""
    data = tokenizer.token_bytes(token)
    if token == tokenizer.eot:
        return "end of text"
    return data.decode("utf-8", "backslashreplace") if data else f"token {token}"


def _ratio(top: _Array, bottom: _Array) -> float | None:
    whole = float(bottom.sum())
    return float(top.sum()) / whole if whole else None
