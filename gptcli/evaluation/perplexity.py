"""Perplexity: every token of every document is scored exactly once.

A document starts with the tokenizer's bos, else eot, as context only; without either its first
token is not scored. Documents longer than the block are scored in windows of `block_size` tokens
that move by `stride`: a window scores the tokens that no earlier one did, given all of the window
to their left. So, behind the first window, each token is given at least block_size - stride tokens
and at most block_size. With stride = block_size (the default) windows do not overlap, which is
cheapest and gives the highest loss; a smaller stride gives more context and costs block_size /
stride times as much. Models that could read on past the block (windowed attention in every layer)
are scored in the same windows, so that their figures compare with those of others.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcli import stop
from gptcli.data.examples import Example, HeadExample, PreferencePair
from gptcli.data.scan import Document
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device
from gptcli.errors import DataError
from gptcli.evaluation.in_turn import in_turn
from gptcli.evaluation.statistics import bootstrap_ratio_cis
from gptcli.evaluation.token_scores import MOST_LOGITS, TargetScores, score_tokens
from gptcli.model.gpt import GPT

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """loss in nats per token; perplexity = exp(loss); bits_per_byte = nats / (ln 2 x bytes);
    accuracy = share of tokens ranked first. Intervals are bootstrapped over documents."""

    loss: float
    perplexity: float
    bits_per_byte: float
    bits_per_byte_ci95: tuple[float, float] | None
    accuracy: float
    tokens: int
    bytes: int
    documents: int
    block_size: int
    stride: int
    unscored_tokens: int
    seconds: float
    loss_ci95: tuple[float, float] | None = None
    perplexity_ci95: tuple[float, float] | None = None
    accuracy_ci95: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping that `from_json` takes back."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Scores":
        """The scores that `to_json` gave."""
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()
        }
        return cls(**given)


@dataclass(frozen=True)
class EncodedDocument:
    """Tokens (n,) int64 of which those from position `first` on are scored, how many tokens of the
    text are not, the UTF-8 bytes of the scored text, its name and the source that it is from."""

    tokens: Tensor
    unscored: int
    bytes: int
    first: int = 1
    name: str = ""
    source: str = ""


@dataclass(frozen=True)
class TokenScores:
    """The n scored tokens of a document in order, all (n,): -ln p in nats, whether it ranked first,
    the number of tokens to its left that the model saw (the document's start counts), and the
    likeliest token with its probability."""

    nats: NDArray[np.float32]
    first: NDArray[np.bool_]
    context: NDArray[np.int32]
    likeliest: NDArray[np.int32]
    top: NDArray[np.float32]


@dataclass(frozen=True)
class DocumentScores:
    """For each of N documents, all (N,): the nats of its scored tokens together, their number, how
    many of them ranked first, the UTF-8 bytes of their text; and each token, where asked for."""

    nats: _Array
    tokens: _Array
    correct: _Array
    bytes: _Array
    each: list[TokenScores] = field(default_factory=list)


@dataclass(frozen=True)
class _Window:
    document: int
    start: int  # of the inputs in the document's tokens
    stop: int  # behind the last target
    first: int  # position of the first target it scores


def encode_documents(
    documents: Sequence[Document], tokenizer: Tokenizer, max_tokens: int | None = None
) -> list[EncodedDocument]:
    """Documents as tokens, in order, up to `max_tokens` scored tokens in all."""
    encoded = []
    left = max_tokens if max_tokens is not None else math.inf
    for document, ids, size in _token_ids(documents, tokenizer):
        stop.raise_if_requested()
        if len(ids) > left:
            ids = ids[: int(left)]
            size = len(tokenizer.decode_bytes(ids.tolist()))
        start = tokenizer.start
        if start is not None:
            ids = np.concatenate([[start], ids])
        if len(ids) >= 2:
            unscored = 0 if start is not None else 1
            encoded.append(
                EncodedDocument(
                    torch.from_numpy(ids),
                    unscored,
                    size,
                    name=document.name,
                    source=document.source,
                )
            )
            left -= len(ids) - 1
        if left <= 0:
            break
    if not encoded:
        raise DataError("no token to evaluate on")
    return encoded


def _token_ids(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> Iterator[tuple[Document, NDArray[np.int64], int]]:
    """Each document with its token ids (n,) and the bytes of its text; tokenised ones are several,
    which end at each eot."""
    for document in documents:
        if document.tokens is None:
            ids = tokenizer.encode_numpy(document.text).astype(np.int64)
            text = document.text
            data = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
            yield document, ids, len(data)
            continue
        whole = document.tokens.astype(np.int64)
        if len(whole) and int(whole.max()) >= tokenizer.vocab_size:
            raise DataError(
                f"{document.name}: token id {int(whole.max())} is outside the vocabulary of"
                f" {tokenizer.vocab_size}",
                hint="the tokens were made with another tokenizer",
            )
        for part in np.split(whole, np.flatnonzero(whole == tokenizer.eot)):
            ids = part[1:] if len(part) and part[0] == tokenizer.eot else part
            yield document, ids, len(tokenizer.decode_bytes(ids.tolist()))


def encode_rows(
    rows: Sequence[Example] | Sequence[HeadExample] | Sequence[PreferencePair],
) -> list[EncodedDocument]:
    """Rows of a finetuning task as documents of which only the last response is scored: of a pair
    the chosen one, of a task head's rows the (first) text. eot never is."""
    return [_document(row) for row in rows]


def _document(row: Example | HeadExample | PreferencePair) -> EncodedDocument:
    if isinstance(row, HeadExample):
        tokens, first, size = row.sequences[0], 1, row.bytes
    else:
        example = row.chosen if isinstance(row, PreferencePair) else row
        tokens, first = example.tokens, example.prompt
        size = len(example.references[0].encode("utf-8", "replace"))
    return EncodedDocument(
        torch.tensor(tokens[:-1]), unscored=0, bytes=size, first=max(1, first), name=row.where
    )


def perplexity(
    model: GPT,
    documents: Sequence[EncodedDocument],
    device: Device,
    *,
    stride: int | None = None,
    precision: str = "fp32",
) -> Scores:
    """Score `documents`. Raises `stop.Stopped` when a stop is asked for."""
    began = time.perf_counter()
    found = score_documents(model, documents, device, stride=stride, precision=precision)
    scores = total_scores(found, documents, model.config.block_size, stride)
    return replace(scores, seconds=time.perf_counter() - began)


def total_scores(
    found: DocumentScores,
    documents: Sequence[EncodedDocument],
    block_size: int,
    stride: int | None = None,
    seconds: float = 0.0,
) -> Scores:
    """What `score_documents` found of `documents`, together; `seconds` is what that took."""
    loss = float(found.nats.sum() / found.tokens.sum())
    bits = found.nats / math.log(2)
    tops = np.stack([found.nats, bits, found.correct])
    bottoms = np.stack([found.tokens, found.bytes, found.tokens])
    loss_ci95, bits_ci95, accuracy_ci95 = bootstrap_ratio_cis(tops, bottoms)
    return Scores(
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=float(bits.sum() / found.bytes.sum()),
        bits_per_byte_ci95=bits_ci95,
        accuracy=float(found.correct.sum() / found.tokens.sum()),
        tokens=int(found.tokens.sum()),
        bytes=int(found.bytes.sum()),
        documents=len(documents),
        block_size=block_size,
        stride=stride or block_size,
        unscored_tokens=sum(document.unscored for document in documents),
        seconds=seconds,
        loss_ci95=loss_ci95,
        perplexity_ci95=(_exp(loss_ci95[0]), _exp(loss_ci95[1])) if loss_ci95 else None,
        accuracy_ci95=accuracy_ci95,
    )


def _exp(loss: float) -> float:
    return math.inf if loss > 700 else math.exp(loss)


def score_documents(
    model: GPT,
    documents: Sequence[EncodedDocument],
    device: Device,
    *,
    stride: int | None = None,
    precision: str = "fp32",
    tokens: bool = False,
) -> DocumentScores:
    """Score each of `documents`; with `tokens` each of their tokens too, which takes 17 bytes of
    memory a token and no further pass. Raises `stop.Stopped` when a stop is asked for."""
    was_training = model.training
    model.eval()
    try:
        return _score(model, documents, device, stride, precision, tokens)
    finally:
        model.train(was_training)


def _score(
    model: GPT,
    documents: Sequence[EncodedDocument],
    device: Device,
    stride: int | None,
    precision: str,
    each: bool,
) -> DocumentScores:
    """See `score_documents`; the model is in evaluation mode."""
    block_size = model.config.block_size
    nats, counts, correct = (np.zeros(len(documents)) for _ in range(3))
    kept = [_no_scores(len(d.tokens) - d.first) for d in documents] if each else []
    windows = [
        window
        for number, document in enumerate(documents)
        for window in _windows(number, document, block_size, stride or block_size)
    ]
    scaling = model.config.rope_scaling
    # Dynamic positions depend on the length of the sequence, and so on padding.
    padded = scaling is None or scaling.kind != "dynamic"
    batches = list(_batches(windows, model.vocab_size, padded))

    def score(batch: list[_Window]) -> tuple[TargetScores, Tensor]:
        inputs, targets = _inputs(batch, documents)
        return score_tokens(model, inputs, targets, device, precision), targets

    for batch, (found, targets) in zip(batches, in_turn(batches, score), strict=True):
        first = found.likeliest.cpu() == targets  # never where there is no target: -1 and -100
        owners = np.array([w.document for w in batch])
        np.add.at(nats, owners, found.nats.double().sum(1).cpu().numpy())
        np.add.at(counts, owners, (targets >= 0).sum(1).numpy())
        np.add.at(correct, owners, first.sum(1).numpy())
        if each:
            _keep(kept, documents, batch, found, first)
    sizes = np.array([document.bytes for document in documents], dtype=np.float64)
    return DocumentScores(nats, counts, correct, sizes, kept)


def _inputs(batch: list[_Window], documents: Sequence[EncodedDocument]) -> tuple[Tensor, Tensor]:
    """Tokens and targets (B, T) int64 of the windows; -100 where a window scores nothing."""
    width = max(w.stop - w.start for w in batch) - 1
    tokens = torch.zeros(len(batch), width, dtype=torch.int64)
    targets = torch.full((len(batch), width), -100)
    for row, w in enumerate(batch):
        ids = documents[w.document].tokens[w.start : w.stop]
        tokens[row, : len(ids) - 1] = ids[:-1]
        skip = w.first - w.start - 1
        targets[row, skip : len(ids) - 1] = ids[skip + 1 :]
    return tokens, targets


def _no_scores(count: int) -> TokenScores:
    """Arrays for `count` tokens, to be filled."""
    return TokenScores(
        nats=np.zeros(count, np.float32),
        first=np.zeros(count, np.bool_),
        context=np.zeros(count, np.int32),
        likeliest=np.zeros(count, np.int32),
        top=np.zeros(count, np.float32),
    )


def _keep(
    kept: list[TokenScores],
    documents: Sequence[EncodedDocument],
    batch: list[_Window],
    found: TargetScores,
    first: Tensor,
) -> None:
    """Fill in the tokens that the windows scored."""
    nats, likeliest = found.nats.cpu().numpy(), found.likeliest.cpu().numpy()
    top = found.top.cpu().numpy()
    for row, w in enumerate(batch):
        into, begin = kept[w.document], documents[w.document].first
        there = slice(w.first - begin, w.stop - begin)
        here = slice(w.first - w.start - 1, w.stop - w.start - 1)
        into.nats[there], into.top[there] = nats[row, here], top[row, here]
        into.first[there], into.likeliest[there] = first[row, here], likeliest[row, here]
        into.context[there] = np.arange(w.first, w.stop) - w.start


def _windows(
    number: int, document: EncodedDocument, block_size: int, stride: int
) -> Iterator[_Window]:
    """Windows that score positions `first` to the end once; position 0 is only ever context."""
    start, scored, length = 0, document.first, len(document.tokens)
    while scored < length:
        stop_at = min(start + block_size + 1, length)
        if stop_at > scored:
            yield _Window(number, start, stop_at, scored)
            scored = stop_at
        start += stride


def _batches(windows: list[_Window], vocab_size: int, padded: bool) -> Iterator[list[_Window]]:
    """Windows of like length together, a bounded number of logits in each batch.

    Unless `padded`, those of a batch have the same length.
    """
    ordered = sorted(windows, key=lambda w: (w.start - w.stop, w.document, w.start))
    begin = 0
    while begin < len(ordered):
        width = ordered[begin].stop - ordered[begin].start
        rows = max(1, MOST_LOGITS // (width * vocab_size))
        batch = ordered[begin : begin + rows]
        if not padded:
            batch = [w for w in batch if w.stop - w.start == width]
        yield batch
        begin += len(batch)
