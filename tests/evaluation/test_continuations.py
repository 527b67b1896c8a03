"""Likelihoods of continuations against the model read one text at a time."""

from typing import Any

import pytest
import torch

from gptcli import stop
from gptcli.config.model_schema import ModelConfig
from gptcli.device import Device
from gptcli.evaluation import likelihoods
from gptcli.evaluation.continuations import continuation_likelihoods
from gptcli.model.gpt import GPT

CPU = Device("cpu", None, "a processor", 1, True)


def model(**changes: Any) -> GPT:
    """A model whose every weight matters, in training."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 24, "dropout": 0.3, **changes}
    made = GPT(ModelConfig.model_validate(sizes), 257)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)
    return made.train()


@torch.no_grad()
def read(net: GPT, context: list[int], text: list[int]) -> tuple[float, list[int]]:
    """ln p of a text, and the likeliest token at each of its places, from the logits of all."""
    logits = net.eval()(torch.tensor([context + text]))[0].log_softmax(-1)
    net.train()
    rows = logits[len(context) - 1 : -1]
    return float(rows.gather(1, torch.tensor(text)[:, None]).sum()), rows.argmax(-1).tolist()


def ids(text: str) -> list[int]:
    return list(text.encode())


CONTEXTS = [[256, *ids(text)] for text in ("question?", "q", "", "\U0001f600 and more", "abc")]
TEXTS = [["yes", "no", "perhaps so"], ["a"], ["some", "b"], ["b", "é"], ["long continuation"]]
DYNAMIC = {"kind": "dynamic", "factor": 2.0, "original_block_size": 12}


@pytest.mark.parametrize("batch_tokens", [1, 30, 2048])
@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "gpt2"},
        {"preset": "llama", "n_kv_head": 1},
        {"window": [0, 4]},
        {"preset": "llama", "rope_scaling": DYNAMIC},
    ],
)
def test_likelihoods(
    changes: dict[str, Any], batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a text sees another one's tokens, the wrong part of its context or padding, comes back
    in another's place, or dropout is on."""
    monkeypatch.setitem(likelihoods._BATCH_TOKENS, "cpu", batch_tokens)
    net = model(**changes)
    texts = [[ids(text) for text in of] for of in TEXTS]
    found = continuation_likelihoods(net, CONTEXTS, texts, CPU, "fp32")
    assert net.training
    for context, of_context, scores in zip(CONTEXTS, texts, found, strict=True):
        right = [read(net, context, text) for text in of_context]
        assert [score.nats for score in scores] == pytest.approx([n for n, _ in right], abs=1e-3)
        assert [score.likeliest for score in scores] == [likeliest for _, likeliest in right]


def test_bf16() -> None:
    """Bug: a cache of fp32 keys does not go with the bf16 queries of mixed precision."""
    net, args = model(), ([[256, 97]], [[[98], [99, 100]]], CPU)
    (rough,) = continuation_likelihoods(net, *args, "bf16")
    (exact,) = continuation_likelihoods(net, *args, "fp32")
    assert [s.nats for s in rough] == pytest.approx([s.nats for s in exact], rel=0.05)


@pytest.mark.parametrize("texts", [[[97]], [[97], [98]]])
def test_stop(texts: list[list[int]]) -> None:
    """Bug: Ctrl-C waits until all rows are scored."""
    stop.request(2)
    net = model()
    with pytest.raises(stop.Stopped):
        continuation_likelihoods(net, [[256, 97]], [texts], CPU, "fp32")
    assert net.training
