"""Exact match with a model whose answers are known."""

import pytest
import torch

from gptcli import stop
from gptcli.config.model_schema import ModelConfig
from gptcli.data.tasks import Example
from gptcli.data.tokenizer import Tokenizer
from gptcli.evaluation.exact_match import exact_match
from gptcli.model.gpt import GPT, initialise

BYTES = Tokenizer.of_bytes()


def speller(successors: dict[int, int]) -> GPT:
    """A model that always continues token a with successors[a]: one-hot embeddings, blocks that
    add nothing (their output projections are zero), and a head that is the table."""
    config = ModelConfig(n_layer=1, n_head=1, n_embd=258, block_size=16)
    made = GPT(config, BYTES.vocab_size)
    initialise(made, torch.Generator().manual_seed(0))
    with torch.no_grad():
        made.wte.weight.copy_(torch.eye(257, 258))
        made.head.weight.zero_()
        for token, successor in successors.items():
            made.head.weight[successor, token] = 1.0
    return made


def example(prompt: str, response: str) -> Example:
    return Example([256, *prompt.encode()], list(response.encode()), response)


@pytest.mark.parametrize(
    ("response", "most", "right"),
    [
        ("bc", 64, True),
        ("b", 64, False),  # the answer goes on
        ("bcd", 64, False),  # it ends before
        ("bx", 64, False),
        (" bc\n", 64, True),  # blanks around it do not count
        ("bc", 2, True),  # the limit ends it exactly there
        ("bc", 1, False),
    ],
)
def test_one_answer(response: str, most: int, right: bool) -> None:
    """Bug: an answer that only begins with the response, or never ends, counts as right."""
    model = speller({ord("a"): ord("b"), ord("b"): ord("c"), ord("c"): 256})
    assert exact_match(model, BYTES, [example("a", response)], most) == right


def test_share() -> None:
    """Bug: the share is of the wrong whole."""
    model = speller({ord("a"): ord("b"), ord("b"): 256})
    examples = [example("a", "b"), example("xa", "b"), example("a", "c"), example("b", "b")]
    assert exact_match(model, BYTES, examples, 8) == 0.5


def test_stop() -> None:
    """Bug: Ctrl-C waits until all answers are generated."""
    stop.request(2)
    with pytest.raises(stop.Stopped):
        exact_match(speller({}), BYTES, [example("a", "b")], 8)
