"""Scores of tasks that are answered by likelihood: labels, choices, the last word of a text."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.examples import Example
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device
from gptcli.evaluation.continuations import continuation_likelihoods
from gptcli.evaluation.label_scores import label_scores
from gptcli.evaluation.task_result import TaskScores, mean_score, task_scores
from gptcli.model.gpt import GPT

_Floats = NDArray[np.float64]


def choice_text_scores(
    model: GPT,
    rows: Sequence[Example],
    labels: Sequence[str],
    headline: str,
    device: Device,
    precision: str,
) -> TaskScores:
    """Scores where the likeliest of the rows' choices is the answer, or of the `labels`, if any.

    Choices are also compared by their likelihood per UTF-8 byte, so that long ones have a chance
    (accuracy_per_byte; Gao et al. 2021 call it acc_norm). Raises `stop.Stopped`.
    """
    prompts, texts = [row.tokens[: row.prompt] for row in rows], [row.choice_tokens for row in rows]
    found = continuation_likelihoods(model, prompts, texts, device, precision)
    shape = (len(rows), max(map(len, texts)))
    nats, sizes = np.full(shape, -np.inf), np.ones(shape)
    for number, (row, of_row) in enumerate(zip(rows, found, strict=True)):
        nats[number, : len(of_row)] = [likelihood.nats for likelihood in of_row]
        sizes[number, : len(of_row)] = [_bytes(choice) for choice in row.choices]
    truth = [row.choices.index(row.references[0]) for row in rows]
    told: list[dict[str, Any]] = [{"where": row.where, "prompt": row.prompt_text} for row in rows]
    weights = np.exp(nats - nats.max(1, keepdims=True))
    probabilities = weights / weights.sum(1, keepdims=True)
    if labels:
        return label_result(truth, probabilities, told, labels)
    for number, (row, described) in enumerate(zip(rows, told, strict=True)):
        described["choices"] = row.choices
        described["log_likelihoods"] = nats[number, : len(row.choices)].tolist()
    counts = [len(row.choices) for row in rows]
    return choice_result(truth, probabilities, told, counts, nats / sizes, headline)


def label_result(
    truth: Sequence[int], probabilities: _Floats, told: list[dict[str, Any]], labels: Sequence[str]
) -> TaskScores:
    """Scores of labels with the probabilities (N, L)."""
    predicted = probabilities.argmax(1)
    found = label_scores(truth, predicted.tolist(), labels)
    for row, right, label, of_row in zip(told, truth, predicted, probabilities, strict=True):
        row |= {"label": labels[right], "predicted": labels[label]}
        row["probabilities"] = dict(zip(labels, of_row.round(6).tolist(), strict=True))
    return task_scores(
        {"accuracy": found.accuracy, "macro_f1": found.macro_f1},
        {"accuracy": found.accuracy_ci95, "macro_f1": found.macro_f1_ci95},
        "accuracy",
        told,
        probabilities[np.arange(len(truth)), truth],
        baseline={"accuracy": found.majority},
        labels=list(labels),
        confusion=found.confusion,
        per_label=found.per_label,
    )


def choice_result(
    truth: Sequence[int],
    probabilities: _Floats,
    told: list[dict[str, Any]],
    counts: Sequence[int],
    per_byte: _Floats | None = None,
    headline: str = "accuracy",
) -> TaskScores:
    """Scores of the choices with the probabilities (N, S), of which row i has `counts[i]`, and with
    the nats `per_byte` (N, S), where they are compared by these too."""
    chosen = {"accuracy": probabilities.argmax(1)}
    if per_byte is not None:
        chosen["accuracy_per_byte"] = per_byte.argmax(1)
    for number, row in enumerate(told):
        row |= {"label": truth[number], "predicted": int(chosen[headline][number])}
        row["probabilities"] = probabilities[number, : counts[number]].round(6).tolist()
    scores = {name: mean_score(np.equal(truth, picked)) for name, picked in chosen.items()}
    return task_scores(
        {name: value for name, (value, _) in scores.items()},
        {name: interval for name, (_, interval) in scores.items()},
        headline,
        told,
        probabilities[np.arange(len(truth)), truth],
        baseline=dict.fromkeys(scores, float(np.mean([1 / count for count in counts]))),
    )


def last_word_scores(
    model: GPT, tokenizer: Tokenizer, rows: Sequence[Example], device: Device, precision: str
) -> TaskScores:
    """How often each token of the last word is the likeliest one (accuracy), and the perplexity of
    these words, exp of the mean -ln p of a word (Paperno et al. 2016). Raises `stop.Stopped`."""
    prompts = [row.tokens[: row.prompt] for row in rows]
    words = [row.tokens[row.prompt : -1] for row in rows]  # without eot
    texts = [[word] for word in words]
    found = [of for (of,) in continuation_likelihoods(model, prompts, texts, device, precision)]
    right = [of.likeliest == word for of, word in zip(found, words, strict=True)]
    nats = [-of.nats for of in found]
    accuracy, interval = mean_score(right)
    loss, losses = mean_score(nats)
    predictions = [
        {
            "where": row.where,
            "prompt": row.prompt_text,
            "references": [text.strip() for text in row.references],
            "answer": tokenizer.decode(of.likeliest).strip(),
            "accuracy": float(correct),
            "log_likelihood": of.nats,
        }
        for row, of, correct in zip(rows, found, right, strict=True)
    ]
    return task_scores(
        {"accuracy": accuracy, "last_word_perplexity": _exp(loss)},
        {
            "accuracy": interval,
            "last_word_perplexity": losses and (_exp(losses[0]), _exp(losses[1])),
        },
        "accuracy",
        predictions,
        [of.nats for of in found],
    )


def _bytes(choice: str) -> int:
    """UTF-8 bytes of a choice, without the blanks that part it from the text."""
    return len(choice.strip().encode("utf-8", "replace"))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
