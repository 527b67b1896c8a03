"""What a step minimises, as a function of its rows."""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from gptcli.data.rows import StepBatch
from gptcli.model.gpt import GPT
from gptcli.model.loss import IGNORED

# Of some rows of a step (on the device of the model) and of the whole step: the share of these rows
# in the step's loss, an fp32 scalar. Shares of all rows add up to the loss, however they are cut.
LossOf: TypeAlias = Callable[[StepBatch, StepBatch], Tensor]


def language_model_loss(model: GPT) -> LossOf:
    """Mean -ln p of the step's targets that are not IGNORED, in nats per token."""

    def loss_of(rows: StepBatch, step: StepBatch) -> Tensor:
        count = max(int((step.targets != IGNORED).sum()), 1)
        return model.loss(rows.tokens, rows.targets, rows.segments) / count

    return loss_of
