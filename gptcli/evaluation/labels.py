"""Probabilities of labels and choices from a task head."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptcli import stop
from gptcli.data.examples import HeadExample
from gptcli.device import Device, autocast
from gptcli.evaluation.likelihoods import batches
from gptcli.model.gpt import GPT
from gptcli.model.heads import head_logits


@torch.no_grad()
def label_log_probabilities(
    model: GPT, examples: Sequence[HeadExample], device: Device, precision: str, choice: bool
) -> Tensor:
    """ln p of each label by the model's task head: (N, L) fp32 on the CPU.

    With `choice`, of each sequence of a row: (N, S) for the most sequences that one has, -inf for
    those that a row lacks. Without dropout. Raises `stop.Stopped` when a stop is asked for.
    """
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    most = max((len(example.sequences) for example in examples), default=0)
    lengths = [most * max(map(len, example.sequences)) for example in examples]
    training = model.training
    model.eval()
    try:
        for numbers in batches(lengths, device):
            stop.raise_if_requested()
            tokens, ends = _padded([examples[number] for number in numbers], most)
            tokens, ends = tokens.to(device.torch), ends.to(device.torch)
            with autocast(device, precision):
                logits = head_logits(model, tokens, ends, choice)
            for number, row in zip(numbers, logits.log_softmax(-1).cpu(), strict=True):
                found[number] = row
    finally:
        model.train(training)
    return torch.stack(found)


def _padded(examples: Sequence[HeadExample], most: int) -> tuple[Tensor, Tensor]:
    """Tokens (R, S, T) and ends (R, S) int64 of examples of up to `most` = S sequences."""
    width = max(len(ids) for example in examples for ids in example.sequences)
    tokens = torch.zeros(len(examples), most, width, dtype=torch.int64)
    ends = torch.full((len(examples), most), -1)
    for row, example in enumerate(examples):
        for number, ids in enumerate(example.sequences):
            tokens[row, number, : len(ids)] = torch.tensor(ids)
            ends[row, number] = len(ids) - 1
    return tokens, ends
