"""How likely a model finds texts that may follow a context, and whether it would write them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptcli import stop
from gptcli.device import Device, autocast
from gptcli.evaluation.likelihoods import batches
from gptcli.model.cache import KVCache
from gptcli.model.gpt import GPT
from gptcli.model.loss import IGNORED, chunk_rows


@dataclass(frozen=True)
class Likelihood:
    """ln p of a text in `nats`, and at each of its places the token that the model finds
    likeliest, given the text up to there."""

    nats: float
    likeliest: list[int]


@torch.no_grad()
def continuation_likelihoods(
    model: GPT,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    device: Device,
    precision: str,
) -> list[list[Likelihood]]:
    """The likelihood of each of the `continuations[i]` of context i, in order.

    All are token ids, at least one each, a context and a continuation together at most
    block_size + 1. A context is read once for all of its continuations, where a cache can be
    shared; other texts are read in batches of like length. Without dropout. Raises `stop.Stopped`
    when a stop is asked for.
    """
    found = [[Likelihood(0.0, [])] * len(texts) for texts in continuations]
    training = model.training
    model.eval()
    try:
        alone: list[tuple[int, int]] = []
        for number, texts in enumerate(continuations):
            if _shares(model, contexts[number], texts):
                found[number] = _of_one_context(model, contexts[number], texts, device, precision)
            else:
                alone += [(number, k) for k in range(len(texts))]
        pairs = [(contexts[number], continuations[number][k]) for number, k in alone]
        for batch in _batches(model, [len(a) + len(b) for a, b in pairs], device):
            stop.raise_if_requested()
            with autocast(device, precision):
                likelihoods = _likelihoods(model, [pairs[i] for i in batch])
            for i, likelihood in zip(batch, likelihoods, strict=True):
                number, k = alone[i]
                found[number][k] = likelihood
    finally:
        model.train(training)
    return found


def _shares(model: GPT, context: Sequence[int], texts: Sequence[Sequence[int]]) -> bool:
    """Whether a context is read once for several texts: where there is one to read, no window has
    begun to move, and positions do not depend on the length of a text."""
    narrowest = min((window for window in model.windows if window), default=len(context))
    longest = len(context) + max(map(len, texts), default=0)
    fits = len(context) <= narrowest and longest <= model.cacheable_tokens
    return len(texts) > 1 and len(context) > 1 and fits


def _batches(model: GPT, lengths: Sequence[int], device: Device) -> Iterable[list[int]]:
    """Numbers of texts that are read together. Dynamic positions depend on the length of what is
    read, and so on padding: there each text is alone."""
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        return ([number] for number in range(len(lengths)))
    return batches(lengths, device)


def _of_one_context(
    model: GPT,
    context: Sequence[int],
    texts: Sequence[Sequence[int]],
    device: Device,
    precision: str,
) -> list[Likelihood]:
    found = [Likelihood(0.0, [])] * len(texts)
    with autocast(device, precision):
        read = model.new_cache(1, len(context) - 1)
        model.hidden(torch.tensor([context[:-1]], device=model.device), read)
        # What lies in a cache costs memory, but less time than what is read.
        for batch in batches([len(context) // 4 + len(text) for text in texts], device):
            stop.raise_if_requested()
            width = max(len(texts[i]) for i in batch)
            cache = model.new_cache(len(batch), len(context) - 1 + width)
            cache.take(read)
            pairs = [(context[-1:], texts[i]) for i in batch]
            for i, likelihood in zip(batch, _likelihoods(model, pairs, cache), strict=True):
                found[i] = likelihood
    return found


def _likelihoods(
    model: GPT,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    cache: KVCache | None = None,
) -> list[Likelihood]:
    """Of each pair of context and continuation, which go on where the `cache` ends."""
    tokens, targets = _padded(pairs)
    tokens, flat = tokens.to(model.device), targets.flatten().to(model.device)
    hidden = model.hidden(tokens, cache).flatten(0, 1)  # (B T, C)
    places = (flat != IGNORED).nonzero()[:, 0]
    nats = torch.zeros(flat.shape, device=flat.device)
    likeliest = torch.zeros_like(flat)
    for part in torch.split(places, chunk_rows(model.vocab_size, flat.device.type)):
        logits = model.head(hidden[part]).float()
        nats[part] = logits.gather(1, flat[part, None])[:, 0] - logits.logsumexp(-1)
        likeliest[part] = logits.argmax(-1)
    sums = nats.view(targets.shape).double().sum(1).tolist()
    rows = likeliest.view(targets.shape).cpu()
    return [
        Likelihood(total, row[target != IGNORED].tolist())
        for total, row, target in zip(sums, rows, targets, strict=True)
    ]


def _padded(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) int64; what fills a row up has no effect on what is before it."""
    width = max(len(context) + len(text) for context, text in pairs) - 1
    tokens = torch.zeros(len(pairs), width, dtype=torch.int64)
    targets = torch.full((len(pairs), width), IGNORED)
    for row, (context, text) in enumerate(pairs):
        ids, length = torch.tensor([*context, *text]), len(context) + len(text) - 1
        tokens[row, :length] = ids[:-1]
        targets[row, len(context) - 1 : length] = ids[len(context) :]
    return tokens, targets
