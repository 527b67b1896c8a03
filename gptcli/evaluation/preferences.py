"""What a model thinks of the answers that people chose, and of those that they did not."""

from collections.abc import Sequence

from torch import Tensor

from gptcli.data.examples import PreferencePair
from gptcli.device import Device
from gptcli.evaluation.likelihoods import answer_log_likelihoods
from gptcli.model.gpt import GPT


def pair_log_likelihoods(
    model: GPT, pairs: Sequence[PreferencePair], device: Device, precision: str
) -> Tensor:
    """ln p of each pair's chosen and rejected answers given the prompt: (N, 2) fp32, in nats.

    Raises `stop.Stopped` when a stop is asked for.
    """
    answers = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
    return answer_log_likelihoods(model, answers, device, precision).view(-1, 2)
