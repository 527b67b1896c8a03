"""Exact match: how often the greedy answer is the response, blanks around it aside."""

from collections.abc import Sequence

from gptcli import stop
from gptcli.data.tasks import Example
from gptcli.data.tokenizer import Tokenizer
from gptcli.generation.engine import Request, decode
from gptcli.generation.sampling import Sampling
from gptcli.model.gpt import GPT


def exact_match(
    model: GPT, tokenizer: Tokenizer, examples: Sequence[Example], max_new_tokens: int
) -> float:
    """Share of `examples` whose greedy continuation, up to eot, equals the response.

    An answer may be a little longer than the response it is compared with, but never longer than
    `max_new_tokens`. Raises `stop.Stopped` when a stop is asked for.
    """
    # One token more than the response: enough to see whether the answer ends there.
    rooms = [min(max_new_tokens, len(example.response) + 1) for example in examples]
    requests = [
        Request("", example.prompt, Sampling(temperature=0.0, max_new_tokens=room))
        for example, room in zip(examples, rooms, strict=True)
    ]
    right = 0
    for number, (answer,) in decode(model, tokenizer, requests):
        stop.raise_if_requested()
        ended = answer.finish_reason == "eot" or rooms[number] == max_new_tokens
        right += ended and answer.text.strip() == examples[number].text.strip()
    stop.raise_if_requested()
    return right / len(examples)
