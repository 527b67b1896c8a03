"""The validation part of a run."""

import torch

from gptcli.config.model_schema import ModelConfig
from gptcli.device import Device
from gptcli.evaluation.perplexity import EncodedDocument, perplexity
from gptcli.model.gpt import GPT
from gptcli.training.validation import Validation


def test_scores_are_those_of_perplexity_and_its_tokens_are_kept() -> None:
    """Bug: the report's worst documents are of another scoring than its figures."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=8), 16)
    documents = [EncodedDocument(torch.arange(n) % 16, 0, bytes=n) for n in (5, 20)]
    device = Device("cpu", None, "a processor", 1, True)
    validation = Validation(model, documents, device, None, "fp32")
    scores = validation()
    assert validation.found is not None
    expected = perplexity(model, documents, device)
    assert (scores.loss, scores.bits_per_byte_ci95) == (expected.loss, expected.bits_per_byte_ci95)
    assert [len(one.nats) for one in validation.found.each] == [4, 19]
