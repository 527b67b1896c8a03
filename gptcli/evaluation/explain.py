"""What a model makes of a given text: how much each token surprises it, what it held likelier, and
which tokens before it a prediction rests on."""

import codecs
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcli import stop
from gptcli.data.shown_rows import token_texts
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device, autocast
from gptcli.evaluation.perplexity import EncodedDocument
from gptcli.evaluation.token_scores import MOST_LOGITS
from gptcli.model.gpt import GPT

_Array = NDArray[np.float64]
_Weights = NDArray[np.float32]

_MOST_TOKENS = 1 << 15  # in a batch of texts that each lack a token


@dataclass(frozen=True)
class Alternative:
    """A token that could have stood there: its id, its text as `ExplainedToken` has it, and its
    probability in [0, 1]."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class ExplainedToken:
    r"""A token of a document; the document's start, where there is one, is position 0.

    `text` has control characters and parts of characters as escapes, then the character that such a
    part completes: `\xe5\x8f`, `\xa5=句`. What follows is of the prediction of this token from the
    `context` tokens to its left that the model saw: `bits` = -log2 `probability`, its `rank` (1 is
    the likeliest) and the likeliest `alternatives`, which may hold the token itself. A first token,
    which nothing predicts, has none of it.
    """

    position: int
    id: int
    text: str
    bits: float | None = None
    probability: float | None = None
    rank: int | None = None
    context: int = 0
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True)
class Piece:
    """The least run of tokens, at positions `first` to before `stop`, that makes whole characters:
    their text, and their bits together (0 where nothing predicts them)."""

    text: str
    first: int
    stop: int
    bits: float


@dataclass(frozen=True)
class Explanation:
    """What a model makes of a text of `bytes` UTF-8 bytes, read in windows of `block_size` tokens.

    Of a `chosen` token (its position) `changes` are what `leave_one_out` says of the tokens right
    before it. `attention` holds weights (H, T, T) by layer, over the tokens from `attention_first`
    on.
    """

    name: str
    step: int
    block_size: int
    bytes: int
    tokens: list[ExplainedToken]
    pieces: list[Piece]
    chosen: int | None = None
    changes: _Array = field(default_factory=lambda: np.zeros(0))
    attention: dict[int, _Weights] = field(default_factory=dict)
    attention_first: int = 0

    @property
    def scored(self) -> int:
        """The number of tokens that have bits."""
        return len(self.tokens) - 1

    @property
    def bits(self) -> float:
        """The surprise of the whole text."""
        return sum(token.bits or 0.0 for token in self.tokens)

    @property
    def loss(self) -> float:
        """Nats a token, which is the loss that `perplexity` gives."""
        return self.bits * math.log(2) / self.scored

    @property
    def bits_per_byte(self) -> float:
        """As `perplexity` has it."""
        return self.bits / self.bytes

    @property
    def windows(self) -> int:
        """How many times the text was begun anew, at its start included."""
        return math.ceil(self.scored / self.block_size)

    def changed(self) -> list[tuple[ExplainedToken, float]]:
        """The tokens before the chosen one, in order, each with its change in bits."""
        first = (self.chosen or 0) - len(self.changes)
        return [(self.tokens[first + i], float(bits)) for i, bits in enumerate(self.changes)]

    def to_json(self, layer: int | None = None, head: int | None = None) -> dict[str, Any]:
        """A JSON-able mapping; of the attention that of `layer`, if any: all its heads or one."""
        weights = np.zeros((0, 0, 0), np.float32) if layer is None else self.attention[layer]
        heads = range(len(weights)) if head is None else [head]
        return {
            "model": {"name": self.name, "step": self.step, "block_size": self.block_size},
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "bits": self.bits,
            "scored_tokens": self.scored,
            "bytes": self.bytes,
            "windows": self.windows,
            "tokens": [asdict(token) for token in self.tokens],
            "pieces": [asdict(piece) for piece in self.pieces],
            "chosen": self.chosen,
            "without": [
                {"position": token.position, "bits": bits} for token, bits in self.changed()
            ],
            "attention": [
                {
                    "layer": layer,
                    "head": head,
                    "first_position": self.attention_first,
                    "weights": weights[head].round(6).tolist(),
                }
                for head in (heads if layer is not None else [])
            ],
        }


@torch.no_grad()
def explain_tokens(
    model: GPT,
    tokenizer: Tokenizer,
    document: EncodedDocument,
    device: Device,
    *,
    top: int,
    precision: str = "fp32",
) -> list[ExplainedToken]:
    """All tokens of `document` with the `top` likeliest at each place.

    They are scored in the windows of `perplexity` with a stride of block_size, so that their bits
    add up to its loss. `model` is in evaluation mode. Raises `stop.Stopped`.
    """
    ids = document.tokens.tolist()
    texts = _texts(tokenizer, ids)
    explained = [ExplainedToken(0, ids[0], texts[0])]
    for targets, context, found in _windows(model, document.tokens, device, precision, top):
        first = len(explained)
        for row, target in enumerate(targets):
            place = first + row
            begun = _begun(tokenizer, ids, place)
            explained.append(
                ExplainedToken(
                    position=place,
                    id=target,
                    text=texts[place],
                    bits=float(found.nats[row]) / math.log(2),
                    probability=math.exp(-float(found.nats[row])),
                    rank=int(found.ranks[row]),
                    context=context + row,
                    alternatives=tuple(
                        Alternative(int(i), _texts(tokenizer, [*begun, int(i)])[-1], float(p))
                        for i, p in zip(found.likeliest[row], found.probabilities[row], strict=True)
                    ),
                )
            )
    return explained


@dataclass(frozen=True)
class _Found:
    """Of n targets: nats (n,), ranks (n,), the likeliest tokens and their probabilities (n, K)."""

    nats: Tensor
    ranks: Tensor
    likeliest: Tensor
    probabilities: Tensor


def _windows(
    model: GPT, tokens: Tensor, device: Device, precision: str, top: int
) -> Iterator[tuple[list[int], int, _Found]]:
    """Runs of targets in order, each with the number of tokens that its first one is given."""
    for window in torch.split(torch.arange(len(tokens) - 1), model.config.block_size):
        stop.raise_if_requested()
        inputs = tokens[window].to(device.torch)
        with autocast(device, precision):
            hidden = model.hidden(inputs[None])[0]  # (T, C)
            rows = max(1, MOST_LOGITS // model.vocab_size)
            for part in torch.split(torch.arange(len(window)), rows):
                targets = tokens[window[part] + 1]
                logits = model.head(hidden[part[0] : part[-1] + 1]).float()  # (n, V)
                yield targets.tolist(), int(part[0]) + 1, _judged(logits, targets, top)


def _judged(logits: Tensor, targets: Tensor, top: int) -> _Found:
    """What logits (n, V) say of targets (n,)."""
    # Not log_softmax, whose sum over a large vocabulary is less exact: see `score_tokens`.
    shifted = logits - logits.amax(-1, keepdim=True)
    logs = shifted - shifted.exp().sum(-1, keepdim=True).log()
    own = logs.gather(1, targets.to(logs.device)[:, None])  # (n, 1)
    likeliest = logs.topk(min(top, logs.size(1)))
    ranks = (logs > own).sum(1) + 1
    found = (-own[:, 0], ranks, likeliest.indices, likeliest.values.exp())
    return _Found(*(tensor.cpu() for tensor in found))


@torch.no_grad()
def leave_one_out(model: GPT, tokens: Tensor, device: Device, precision: str = "fp32") -> _Array:
    """How much less likely the last of `tokens` (n,) gets without each of those before it.

    (n - 1,) in bits: log2 p(last | all before) - log2 p(last | all but that one), where what stood
    behind the missing one moves up. Above 0 the token spoke for the last one. Empty where one token
    alone is before it. `model` is in evaluation mode. Raises `stop.Stopped`.
    """
    context, target = tokens[:-1].to(device.torch), int(tokens[-1])
    n = len(context)
    if n < 2:
        return np.zeros(0)
    with autocast(device, precision):
        whole = _log_probability(model, context[None], target)
        # Row i holds the places 0 .. n - 2, those from i on moved up by one.
        places = torch.arange(n - 1, device=device.torch)
        changes = []
        for missing in torch.split(torch.arange(n, device=device.torch), _MOST_TOKENS // n or 1):
            stop.raise_if_requested()
            rest = context[places + (places >= missing[:, None])]  # (R, n - 1)
            changes.append(whole - _log_probability(model, rest, target))
    return torch.cat(changes).double().cpu().numpy() / math.log(2)


def _log_probability(model: GPT, tokens: Tensor, target: int) -> Tensor:
    """ln p(target) behind each row of tokens (R, T): (R,) fp32."""
    return model(tokens, last_only=True)[:, 0].float().log_softmax(-1)[:, target]


def pieces(tokenizer: Tokenizer, tokens: Sequence[ExplainedToken]) -> list[Piece]:
    """The tokens put together to whole characters; what is no UTF-8 becomes escapes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found, data, bits, first = [], b"", 0.0, 0
    for place, token in enumerate(tokens):
        own = tokenizer.token_bytes(token.id)
        decoder.decode(own)
        data, bits = data + own, bits + (token.bits or 0.0)
        if decoder.getstate()[0] and place + 1 < len(tokens):
            continue
        text = data.decode("utf-8", "backslashreplace") if data else token.text
        found.append(Piece(text, first, place + 1, bits))
        data, bits, first = b"", 0.0, place + 1
    return found


def _begun(tokenizer: Tokenizer, ids: list[int], place: int) -> list[int]:
    """The tokens right before `place` that hold the parts of a character not yet complete."""
    before = ids[max(0, place - 3) : place]  # a character has at most 4 bytes
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    begun: list[int] = []
    for token in before:
        decoder.decode(tokenizer.token_bytes(token))
        begun = [*begun, token] if decoder.getstate()[0] else []
    return begun


def _texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Each token as it is shown."""
    names = {number: f"⟨{name}⟩" for name, number in tokenizer.special.ids.items()}
    shown = token_texts(tokenizer, ids, [i == 0 for i in range(len(ids))])
    texts = []
    for token, (text, completes) in zip(ids, shown, strict=True):
        name = "⟨eot⟩" if token == tokenizer.eot else names.get(token, "∅")
        texts.append((text or name) + (f"={completes}" if completes else ""))
    return texts
