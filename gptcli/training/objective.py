"""What a step minimises, as a function of its rows.

Legend of shapes: R rows, S sequences of a row, T time in tokens, C n_embd, L labels.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.data.rows import StepBatch
from gptcli.model.gpt import GPT
from gptcli.model.heads import logits_of_features, sequence_features
from gptcli.model.likelihood import log_likelihoods
from gptcli.model.loss import IGNORED, linear_cross_entropy
from gptcli.training.features import FeaturesOf

# Of some rows of a step (on the device of the model) and of the whole step: the share of these rows
# in the step's loss, an fp32 scalar. Shares of all rows add up to the loss, however they are cut.
LossOf: TypeAlias = Callable[[StepBatch, StepBatch], Tensor]


def language_model_loss(model: GPT) -> LossOf:
    """Mean -ln p of the step's targets that are not IGNORED, in nats per token."""

    def loss_of(rows: StepBatch, step: StepBatch) -> Tensor:
        return model.loss(rows.tokens, rows.targets, rows.segments) / _scored(step)

    return loss_of


def head_loss(
    model: GPT,
    lm_weight: float,
    class_weights: list[float] | None,
    choice: bool,
    features_of: FeaturesOf | None = None,
) -> LossOf:
    """Cross-entropy of the task head, mean over the step's rows, + `lm_weight` x the mean loss of
    the language model on their targets (Radford et al. 2018, equation 5), in nats.

    With `class_weights` (L,) the mean is weighted by those of the rows' labels. `choice` says that
    the head scores each sequence of a row, and the label is the number of one. `features_of` gives
    what the head reads where it alone learns (see `frozen_features`); then there is no loss of the
    language model, which would change nothing.
    """

    def loss_of(rows: StepBatch, step: StepBatch) -> Tensor:
        ends, labels, all_labels = rows.ends, rows.labels, step.labels
        assert ends is not None
        assert labels is not None
        assert all_labels is not None
        hidden = None
        if features_of is None:
            hidden = model.hidden(rows.tokens.flatten(0, 1))  # (R S, T, C)
            features = sequence_features(torch.unflatten(hidden, 0, ends.shape), ends)
        else:
            features = features_of(rows.tokens, ends)
        logits = logits_of_features(model, features, ends, choice)
        weight = None if class_weights is None else logits.new_tensor(class_weights)
        loss = F.cross_entropy(logits, labels, weight, reduction="sum")
        loss = loss / _weight_of(all_labels, class_weights)
        if hidden is not None and lm_weight:
            flat = hidden.flatten(0, 1)
            nats = linear_cross_entropy(flat, model.head.weight, rows.targets.flatten())
            loss = loss + lm_weight * nats / _scored(step)
        return loss

    return loss_of


def preference_loss(
    model: GPT, beta: float, reference: Mapping[int, tuple[float, float]]
) -> LossOf:
    """Mean over the step's pairs of -ln sigmoid(beta x margin), where the margin is by how much
    more than the reference model this one prefers the chosen answer: the loss of direct preference
    optimization (Rafailov et al. 2023, equation 7), in nats.

    `reference` has, for the key of each pair, its ln p of the chosen and of the rejected answer.
    """

    def loss_of(rows: StepBatch, step: StepBatch) -> Tensor:
        assert rows.labels is not None
        nats = log_likelihoods(model, rows.tokens.flatten(0, 1), rows.targets.flatten(0, 1))
        before = nats.new_tensor([reference[key] for key in rows.labels.tolist()])  # (R, 2)
        chosen, rejected = (nats.view_as(before) - before).unbind(1)
        # Exact where a sigmoid is 0 in fp32 and its logarithm would be infinite.
        return -F.logsigmoid(beta * (chosen - rejected)).sum() / len(step.tokens)

    return loss_of


def _scored(step: StepBatch) -> int:
    """The step's targets that are not IGNORED, at least 1."""
    return max(int((step.targets != IGNORED).sum()), 1)


def _weight_of(labels: Tensor, class_weights: list[float] | None) -> float:
    """What the rows of the step weigh together."""
    if class_weights is None:
        return len(labels)
    return float(torch.tensor(class_weights, dtype=torch.float64)[labels].sum())
