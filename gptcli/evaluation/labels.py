"""Probabilities of labels and choices: from a task head, or from the texts of the answers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptcli import stop
from gptcli.data.examples import HeadExample
from gptcli.device import Device, autocast
from gptcli.evaluation.likelihoods import batches
from gptcli.model.gpt import GPT
from gptcli.model.heads import head_logits
from gptcli.model.likelihood import log_likelihoods
from gptcli.model.loss import IGNORED


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


@torch.no_grad()
def choice_log_likelihoods(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    device: Device,
    precision: str,
) -> list[list[float]]:
    """How likely the model finds each of several answers to each prompt: their ln p, in nats.

    All are token ids: prompts with at least one, answers (of row i: `answers[i]`) with at least
    one; together at most block_size. A prompt is read once for all its answers. Without dropout.
    Raises `stop.Stopped` when a stop is asked for.
    """
    found = []
    training = model.training
    model.eval()
    try:
        for prompt, texts in zip(prompts, answers, strict=True):
            stop.raise_if_requested()
            with autocast(device, precision):
                found.append(_of_answers(model, prompt, texts).tolist())
    finally:
        model.train(training)
    return found


def _of_answers(model: GPT, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Tensor:
    """ln p of each answer (A,) given the prompt, which is read once where a cache can be shared:
    where no window has begun to move, and positions do not depend on the length of a text."""
    width = max(len(answer) for answer in answers)
    narrowest = min((window for window in model.windows if window), default=len(prompt))
    if len(prompt) > narrowest or len(prompt) + width > model.cacheable_tokens:
        rows = [_answer_rows(prompt, [answer], model.device) for answer in answers]
        return torch.cat([log_likelihoods(model, *row) for row in rows])
    cache = model.new_cache(len(answers), len(prompt) - 1 + width)
    if len(prompt) > 1:
        read = model.new_cache(1, len(prompt) - 1)
        model.hidden(torch.tensor([prompt[:-1]], device=model.device), read)
        cache.take(read)
    return log_likelihoods(model, *_answer_rows(prompt[-1:], answers, model.device), cache)


def _answer_rows(
    prompt: Sequence[int], answers: Sequence[Sequence[int]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (A, T) int64: the prompt with each answer, of which that has loss."""
    width = len(prompt) - 1 + max(len(answer) for answer in answers)
    tokens = torch.zeros(len(answers), width, dtype=torch.int64)
    targets = torch.full((len(answers), width), IGNORED)
    for row, answer in enumerate(answers):
        ids, length = torch.tensor([*prompt, *answer]), len(prompt) - 1 + len(answer)
        tokens[row, :length] = ids[:-1]
        targets[row, len(prompt) - 1 : length] = ids[len(prompt) :]
    return tokens.to(device), targets.to(device)


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
