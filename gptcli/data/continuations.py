"""Texts and what may follow them, tokenised in one piece, as running text is."""

from collections.abc import Sequence

from gptcli.data.tokenizer import Tokenizer


def continuation_ids(
    tokenizer: Tokenizer, context: str, texts: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Token ids of `context`, and of each of `texts` (at least one, none empty) behind it.

    Where the end of the context becomes one token with the beginning of a text, as a blank does
    with the word behind it, it belongs to all of the texts: so they differ by what they say alone,
    and the ids of context and text are those of the two together.
    """
    begin, wholes = tokenizer.encode(context), [tokenizer.encode(context + text) for text in texts]
    size = min(len(begin), *(len(whole) - 1 for whole in wholes))  # something is left to score
    while any(whole[:size] != begin[:size] for whole in wholes):
        size -= 1
    return begin[:size], [whole[size:] for whole in wholes]


def fitted(tokenizer: Tokenizer, body: list[int], room: int) -> list[int]:
    """A prompt (at least one token) of the ids of a text, which loses its beginning where it has
    more than `room` >= 1 tokens. See `Tokenizer.begin`."""
    prompt = tokenizer.begin(body)
    if len(prompt) <= room:
        return prompt
    kept = room - (len(prompt) - len(body))
    return tokenizer.begin(body[len(body) - kept :])
