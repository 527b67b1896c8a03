"""Exact match: how often the greedy answer is the response, blanks around it aside."""

from collections.abc import Sequence

from gptcli import stop
from gptcli.data.tasks import Example
from gptcli.data.tokenizer import Tokenizer
from gptcli.generation.engine import Sampling, generate_samples
from gptcli.model.gpt import GPT


def exact_match(
    model: GPT, tokenizer: Tokenizer, examples: Sequence[Example], max_new_tokens: int
) -> float:
    """Share of `examples` whose greedy continuation, up to eot, equals the response.

    An answer may be a little longer than the response it is compared with, but never longer than
    `max_new_tokens`. Raises `stop.Stopped` when a stop is asked for.
    """
    right = 0
    for example in examples:
        stop.raise_if_requested()
        # One token more than the response: enough to see whether the answer ends there.
        room = min(max_new_tokens, len(example.response) + 1)
        sampling = Sampling(temperature=0.0, max_new_tokens=room)
        (answer,) = generate_samples(model, tokenizer, example.prompt, 1, sampling)
        ended = answer.finish_reason == "eot" or room == max_new_tokens
        right += ended and answer.text.strip() == example.text.strip()
    return right / len(examples)
