"""How likely a model finds given answers, without gradients, in batches of like length."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptcli import stop
from gptcli.data.examples import Example
from gptcli.data.scan import Document
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device, autocast
from gptcli.errors import DataError
from gptcli.evaluation.perplexity import encode_documents, score_documents
from gptcli.model.gpt import GPT
from gptcli.model.likelihood import log_likelihoods
from gptcli.model.loss import IGNORED

# Tokens that the model reads at once, padding among them: enough for products at full speed.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 4096}


@torch.no_grad()
def answer_log_likelihoods(
    model: GPT, examples: Sequence[Example], device: Device, precision: str
) -> Tensor:
    """ln p of the trained tokens of each example, summed: (N,) fp32 on the CPU, in nats.

    Without dropout. Raises `stop.Stopped` when a stop is asked for.
    """
    found = torch.zeros(len(examples))
    training = model.training
    model.eval()
    try:
        for numbers in batches([len(example.tokens) for example in examples], device):
            stop.raise_if_requested()
            tokens, targets = _padded([examples[number] for number in numbers])
            with autocast(device, precision):
                nats = log_likelihoods(model, tokens.to(device.torch), targets.to(device.torch))
            found[numbers] = nats.cpu()
    finally:
        model.train(training)
    return found


def text_nats(
    model: GPT, tokenizer: Tokenizer, texts: Sequence[str], device: Device, precision: str
) -> NDArray[np.float64]:
    """-ln p of each text as a document of its own: (N,) float64, in nats.

    DataError for a text of one token where the tokenizer has no token for a document's start, so
    that nothing of it can be scored. Raises `stop.Stopped`.
    """
    documents = [Document(f"text {number}", text) for number, text in enumerate(texts)]
    encoded = encode_documents(documents, tokenizer)
    if len(encoded) < len(texts):
        missing = {d.name for d in documents} - {d.name for d in encoded}
        text = texts[int(min(missing).removeprefix("text "))]
        raise DataError(f"a single token cannot be scored without a document's start: {text!r}")
    return score_documents(model, encoded, device, precision=precision).nats


def batches(lengths: Sequence[int], device: Device) -> Iterator[list[int]]:
    """Numbers of texts of `lengths` tokens, the longest first, so many at a time as fill a batch;
    a longer text comes alone."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    begin = 0
    while begin < len(order):
        rows = max(1, _BATCH_TOKENS[device.kind] // max(lengths[order[begin]], 1))
        yield order[begin : begin + rows]
        begin += rows


def _padded(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T) int64; what fills a row up has no effect on what is before it."""
    width = max(len(example.tokens) for example in examples) - 1
    tokens = torch.zeros(len(examples), width, dtype=torch.int64)
    targets = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        ids, length = torch.tensor(example.tokens), len(example.tokens) - 1
        tokens[row, :length] = ids[:-1]
        trained = torch.tensor(example.trained[1:])
        targets[row, :length] = torch.where(trained, ids[1:], IGNORED)
    return tokens, targets
