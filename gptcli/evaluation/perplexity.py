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
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcli import stop
from gptcli.data.examples import Example, HeadExample, PreferencePair
from gptcli.data.scan import Document
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device, autocast
from gptcli.errors import DataError
from gptcli.evaluation.statistics import bootstrap_ratio_ci
from gptcli.model.gpt import GPT

MOST_LOGITS = 1 << 24  # logits held at once: 64 MiB in fp32
_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """loss in nats per token; perplexity = exp(loss); bits_per_byte = nats / (ln 2 x bytes);
    accuracy = share of tokens ranked first. The interval is bootstrapped over documents."""

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

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping that `from_json` takes back."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "Scores":
        """The scores that `to_json` gave."""
        interval = saved["bits_per_byte_ci95"]
        return cls(**{**saved, "bits_per_byte_ci95": tuple(interval) if interval else None})


@dataclass(frozen=True)
class EncodedDocument:
    """Tokens (n,) int64 of which those from position `first` on are scored, how many tokens of the
    text are not, and the UTF-8 bytes of the scored text."""

    tokens: Tensor
    unscored: int
    bytes: int
    first: int = 1


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
    for ids, size in _token_ids(documents, tokenizer):
        stop.raise_if_requested()
        if len(ids) > left:
            ids = ids[: int(left)]
            size = len(tokenizer.decode_bytes(ids.tolist()))
        start = tokenizer.start
        if start is not None:
            ids = np.concatenate([[start], ids])
        if len(ids) >= 2:
            unscored = 0 if start is not None else 1
            encoded.append(EncodedDocument(torch.from_numpy(ids), unscored, size))
            left -= len(ids) - 1
        if left <= 0:
            break
    if not encoded:
        raise DataError("no token to evaluate on")
    return encoded


def _token_ids(
    documents: Sequence[Document], tokenizer: Tokenizer
) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Token ids (n,) of each document and the bytes of its text; tokenised ones end at each eot."""
    for document in documents:
        if document.tokens is None:
            ids = tokenizer.encode_numpy(document.text).astype(np.int64)
            text = document.text
            yield ids, len(text if isinstance(text, bytes) else text.encode("utf-8", "replace"))
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
            yield ids, len(tokenizer.decode_bytes(ids.tolist()))


def encode_rows(
    rows: Sequence[Example] | Sequence[HeadExample] | Sequence[PreferencePair],
) -> list[EncodedDocument]:
    """Rows of a finetuning task as documents of which only the last response is scored: of a pair
    the chosen one, of a task head's rows the (first) text. eot never is."""
    return [_document(row) for row in rows]


def _document(row: Example | HeadExample | PreferencePair) -> EncodedDocument:
    if isinstance(row, HeadExample):
        tokens, first, text = row.sequences[0], 1, row.text
    else:
        example = row.chosen if isinstance(row, PreferencePair) else row
        tokens, first, text = example.tokens, example.prompt, example.references[0]
    size = len(text.encode("utf-8", "replace"))
    return EncodedDocument(torch.tensor(tokens[:-1]), unscored=0, bytes=size, first=max(1, first))


@torch.no_grad()
def score_tokens(
    model: GPT, tokens: Tensor, targets: Tensor, device: Device, precision: str
) -> tuple[Tensor, Tensor]:
    """-ln p of each target in nats (fp32) and whether it ranked first: both (B, T).

    `tokens` and `targets` are (B, T) int64 on any device; targets below 0 give 0 nats. Logits are
    made for a part of the targets at a time: those of a long window with a large vocabulary are
    gigabytes (8192 x 49152 in fp32: 1.6 GB).
    """
    tokens, flat = tokens.to(device.torch), targets.to(device.torch).flatten()
    nats = torch.zeros(flat.shape, device=device.torch)
    scored = (flat >= 0).nonzero()[:, 0]
    first = torch.zeros(flat.shape, dtype=torch.bool, device=device.torch)
    with autocast(device, precision):
        hidden = model.hidden(tokens).flatten(0, 1)  # (B T, C)
        for part in torch.split(scored, max(1, MOST_LOGITS // model.vocab_size)):
            logits = model.head(hidden[part]).float()
            target = flat[part]
            # Not cross_entropy, whose sum over a large vocabulary is 1e-5 off, always to one side.
            nats[part] = logits.logsumexp(-1) - logits.gather(1, target[:, None])[:, 0]
            first[part] = logits.argmax(-1) == target
    return nats.view(targets.shape), first.view(targets.shape)


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
    block_size = model.config.block_size
    stride = stride or block_size
    was_training = model.training
    model.eval()
    try:
        nats, counts, correct = _sums(model, documents, device, stride, precision)
    finally:
        model.train(was_training)
    sizes = np.array([document.bytes for document in documents], dtype=np.float64)
    loss_mean = float(nats.sum() / counts.sum())
    bits = nats / math.log(2)
    return Scores(
        loss=loss_mean,
        perplexity=math.inf if loss_mean > 700 else math.exp(loss_mean),
        bits_per_byte=float(bits.sum() / sizes.sum()),
        bits_per_byte_ci95=bootstrap_ratio_ci(bits, sizes),
        accuracy=float(correct.sum() / counts.sum()),
        tokens=int(counts.sum()),
        bytes=int(sizes.sum()),
        documents=len(documents),
        block_size=block_size,
        stride=stride,
        unscored_tokens=sum(document.unscored for document in documents),
        seconds=time.perf_counter() - began,
    )


def _sums(
    model: GPT, documents: Sequence[EncodedDocument], device: Device, stride: int, precision: str
) -> tuple[_Array, _Array, _Array]:
    """For each document the nats, the number of scored tokens and how many of them ranked first."""
    nats, counts, correct = (np.zeros(len(documents)) for _ in range(3))
    windows = [
        window
        for number, document in enumerate(documents)
        for window in _windows(number, document, model.config.block_size, stride)
    ]
    scaling = model.config.rope_scaling
    # Dynamic positions depend on the length of the sequence, and so on padding.
    padded = scaling is None or scaling.kind != "dynamic"
    for batch in _batches(windows, model.vocab_size, padded):
        stop.raise_if_requested()
        width = max(w.stop - w.start for w in batch) - 1
        tokens = torch.zeros(len(batch), width, dtype=torch.int64)
        targets = torch.full((len(batch), width), -100)
        for row, w in enumerate(batch):
            ids = documents[w.document].tokens[w.start : w.stop]
            tokens[row, : len(ids) - 1] = ids[:-1]
            skip = w.first - w.start - 1
            targets[row, skip : len(ids) - 1] = ids[skip + 1 :]
        loss, first = score_tokens(model, tokens, targets, device, precision)
        owners = np.array([w.document for w in batch])
        np.add.at(nats, owners, loss.double().sum(1).cpu().numpy())
        np.add.at(counts, owners, (targets >= 0).sum(1).numpy())
        np.add.at(correct, owners, first.sum(1).cpu().numpy())
    return nats, counts, correct


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
