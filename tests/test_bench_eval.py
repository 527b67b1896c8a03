"""scripts/bench_eval.py: both contenders score the same tokens."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bench_eval import usual_loop

from gptcli.config.model_schema import ModelConfig
from gptcli.device import resolve_device
from gptcli.evaluation.perplexity import EncodedDocument, perplexity
from gptcli.model.gpt import GPT, initialise


class Twin:
    """Answers as a causal model of transformers does: the mean over labels, shifted by one."""

    def __init__(self, model: GPT) -> None:
        self._model = model

    def __call__(self, inputs: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        logits = self._model(inputs[:, :-1])
        return SimpleNamespace(loss=F.cross_entropy(logits[0], labels[0, 1:], ignore_index=-100))


@pytest.mark.parametrize(("length", "stride"), [(41, 16), (41, 8), (33, 16), (12, 8), (40, 8)])
def test_the_same_tokens_and_loss(length: int, stride: int) -> None:
    """Bug: the loop leaves out the first token of each window, or gives it another context, so
    speeds and losses are not of the same work."""
    config = ModelConfig.model_validate(
        {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "zero_init_output": False}
    )
    model = GPT(config, 50)
    initialise(model, torch.Generator().manual_seed(0))
    ids = torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(1))
    loss, tokens = usual_loop(Twin(model.eval()), ids, 16, stride)
    document = EncodedDocument(ids, unscored=0, bytes=length)
    scores = perplexity(model, [document], resolve_device("cpu"), stride=stride)
    assert (tokens, scores.tokens) == (length - 1, length - 1)
    assert loss == pytest.approx(scores.loss, abs=1e-6)
