"""Which of several models predicts the same documents better: paired differences, and whether they
could be chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gptcli.data.scan import Document
from gptcli.evaluation.statistics import bootstrap_ratio_cis

FEW_DOCUMENTS = 20  # below, draws of documents give an interval that is plainly too narrow
_PIECES = 100  # that many, where the text is long enough
_LEAST_PIECE, _LARGEST_PIECE = 1024, 64 * 1024  # bytes
_RESAMPLES = 4000  # with fewer, the tails that several comparisons need are a few draws


@dataclass(frozen=True)
class Paired:
    """Model B against A over the same n documents.

    `difference` is B's bits per byte less A's over all of them: negative where B is better. The
    interval is that of documents drawn anew, both models scored on the same draw, and None where
    there are fewer than two. `better`, `worse` and `ties` count the documents by their own
    difference; `sign_p` is the chance of so uneven a count where each is a fair coin.
    """

    difference: float
    ci95: tuple[float, float] | None
    better: int
    worse: int
    ties: int
    sign_p: float

    @property
    def winner(self) -> str | None:
        """`a` or `b` where the interval leaves zero out, else None."""
        if self.ci95 is None or self.ci95[0] <= 0.0 <= self.ci95[1]:
            return None
        return "b" if self.difference < 0 else "a"


def paired(
    a: NDArray[np.float64], b: NDArray[np.float64], sizes: NDArray[np.float64], comparisons: int = 1
) -> Paired:
    """Compare the bits (n,) that two models spend on each document, of `sizes` (n,) bytes.

    Percentile bootstrap of the ratio of sums over documents (Efron and Tibshirani 1993, chapter
    13). Of several `comparisons` each interval is so much wider that all hold together in 95 of 100
    cases (Bonferroni).
    """
    change = b - a
    better, worse = int((change < 0).sum()), int((change > 0).sum())
    level = 1 - 0.05 / comparisons
    (interval,) = bootstrap_ratio_cis(change[None], sizes[None], resamples=_RESAMPLES, level=level)
    return Paired(
        difference=float(change.sum() / sizes.sum()),
        ci95=interval,
        better=better,
        worse=worse,
        ties=len(change) - better - worse,
        sign_p=sign_test(better, worse),
    )


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of the exact sign test: twice the binomial(n, 1/2) chance of a count as small as
    the smaller one, at most 1. Ties are left out beforehand (Conover 1999, section 3.4)."""
    n, least = better + worse, min(better, worse)
    i = np.arange(least)
    logs = np.concatenate([[0.0], np.cumsum(np.log((n - i) / (i + 1)))])  # ln of n over k
    return min(1.0, 2 * float(np.exp(logs - n * math.log(2)).sum()))


def in_pieces(documents: Sequence[Document]) -> tuple[list[Document], int | None]:
    """`documents` where they are many; else the long ones cut into pieces, at line ends where there
    are any, and the size of a piece in bytes.

    Pieces of one document are more alike than documents are: an interval over them tells how far
    the difference holds throughout these documents, and not whether it would hold on others.
    Documents of token ids are not cut.
    """
    if len(documents) >= FEW_DOCUMENTS or any(d.tokens is not None for d in documents):
        return list(documents), None
    texts = [_bytes(document) for document in documents]
    aim = max(1, sum(map(len, texts)) // _PIECES)
    size = min(max(1 << (aim - 1).bit_length(), _LEAST_PIECE), _LARGEST_PIECE)
    if all(len(text) <= size for text in texts):
        return list(documents), None
    pieces = []
    for document, text in zip(documents, texts, strict=True):
        for number, part in enumerate(_cut(text, size)):
            content = part if isinstance(document.text, bytes) else part.decode("utf-8", "replace")
            name = f"{document.name}, piece {number + 1}"
            pieces.append(replace(document, name=name, text=content))
    return pieces, size


def shortened(document: Document, size: int) -> Document:
    """The first `size` bytes of a document's text, less a character that they would cut."""
    text = _bytes(document)[:size]
    content = text if isinstance(document.text, bytes) else text.decode("utf-8", "ignore")
    return replace(document, text=content)


def _bytes(document: Document) -> bytes:
    text = document.text
    return text if isinstance(text, bytes) else text.encode("utf-8", "replace")


def _cut(text: bytes, size: int) -> list[bytes]:
    """Pieces of at most `size` bytes, each but the last of at least half of that."""
    pieces = []
    while len(text) > size:
        end = text.rfind(b"\n", size // 2, size) + 1
        if not end:
            end = size
            while end > size - 4 and text[end] & 0xC0 == 0x80:  # inside a UTF-8 character
                end -= 1
        pieces.append(text[:end])
        text = text[end:]
    return [*pieces, text] if text else pieces
