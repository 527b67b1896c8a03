"""Probabilities of labels and pairs against the model read one text at a time."""

from typing import Any

import pytest
import torch

from gptcli import stop
from gptcli.config.model_schema import ModelConfig
from gptcli.data.examples import Example, HeadExample, PreferencePair
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device
from gptcli.evaluation import likelihoods
from gptcli.evaluation.labels import label_log_probabilities
from gptcli.evaluation.preferences import pair_log_likelihoods
from gptcli.model.gpt import GPT
from gptcli.model.heads import attach_head, head_logits

CPU = Device("cpu", None, "a processor", 1, True)
BYTES = Tokenizer.of_bytes()


def model(**changes: Any) -> GPT:
    """A model whose every weight matters, with a head of three outputs, in training."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 24, "dropout": 0.3, **changes}
    made = GPT(ModelConfig.model_validate(sizes), BYTES.vocab_size)
    attach_head(made, 3)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)
    return made.train()


def head_example(*sequences: str) -> HeadExample:
    return HeadExample([list(text.encode()) for text in sequences], 0, "", "")


def answer(prompt: str, response: str) -> Example:
    """As they come from a row: document start, prompt, response, eot."""
    tokens = [256, *prompt.encode(), *response.encode(), 256]
    first = len(prompt.encode()) + 1
    trained = [place >= first for place in range(len(tokens))]
    return Example(tokens, trained, first, prompt, [response], "")


@torch.no_grad()
def log_likelihood(net: GPT, prompt: list[int], response: list[int]) -> float:
    """ln p of the response's tokens from the logits of the whole text."""
    logits = net.eval()(torch.tensor([prompt + response]))[0].log_softmax(-1)
    net.train()
    start = len(prompt)
    return sum(float(logits[start + i - 1, token]) for i, token in enumerate(response))


EXAMPLES = [
    head_example("abc", "defghi"),
    head_example("j"),
    head_example("klm", "n", "opqrst"),
    head_example("uvwxyz", "abcdefghijkl"),
]


@pytest.mark.parametrize("batch_tokens", [1, 30, 2048])
@pytest.mark.parametrize("choice", [False, True])
def test_label_probabilities(
    batch_tokens: int, choice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: rows come back in the order of their lengths, batches change them, or dropout is on."""
    monkeypatch.setitem(likelihoods._BATCH_TOKENS, "cpu", batch_tokens)
    net = model()
    found = label_log_probabilities(net, EXAMPLES, CPU, "fp32", choice)
    assert net.training
    assert found.shape == (4, 3)
    net.eval()
    for example, row in zip(EXAMPLES, found, strict=True):
        texts = [torch.tensor([[ids]]) for ids in example.sequences]
        ends = [torch.tensor([[text.size(2) - 1]]) for text in texts]
        with torch.no_grad():
            if choice:
                pairs = zip(texts, ends, strict=True)
                logits = torch.cat([head_logits(net, *pair, choice=True)[0] for pair in pairs])
                right = logits.log_softmax(0).tolist() + [-torch.inf] * (3 - len(texts))
            else:
                pairs = zip(texts, ends, strict=True)
                logits = sum(head_logits(net, *pair, choice=False)[0] for pair in pairs)
                bias = (len(texts) - 1) * net.task_head.bias
                right = (logits - bias).log_softmax(0).tolist()
        assert row.tolist() == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 30, 2048])
def test_pairs(batch_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: chosen and rejected change places, the prompt counts or eot does not, or dropout is
    on."""
    monkeypatch.setitem(likelihoods._BATCH_TOKENS, "cpu", batch_tokens)
    net = model()
    texts = [("which?", "the first one", "no"), ("and?", "b", "the other"), ("", "x", "y")]
    pairs = [
        PreferencePair(answer(prompt, chosen), answer(prompt, rejected), number, "")
        for number, (prompt, chosen, rejected) in enumerate(texts)
    ]
    found = pair_log_likelihoods(net, pairs, CPU, "fp32")
    assert net.training
    for (prompt, *answers), row in zip(texts, found.tolist(), strict=True):
        start = [256, *prompt.encode()]
        right = [log_likelihood(net, start, [*text.encode(), 256]) for text in answers]
        assert row == pytest.approx(right, abs=1e-3)


def test_stop() -> None:
    """Bug: Ctrl-C waits until all rows are scored."""
    stop.request(2)
    net, pair = model(), PreferencePair(answer("a", "b"), answer("a", "c"), 0, "")
    with pytest.raises(stop.Stopped):
        label_log_probabilities(net, EXAMPLES, CPU, "fp32", False)
    with pytest.raises(stop.Stopped):
        pair_log_likelihoods(net, [pair], CPU, "fp32")
    assert net.training
