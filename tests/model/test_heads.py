"""Task heads against what they are defined to be, one text at a time."""

import pytest
import torch
from torch import Tensor

from gptcli.config.model_schema import ModelConfig
from gptcli.model.gpt import GPT
from gptcli.model.heads import attach_head, head_logits, logits_of_features, task_head

OUTPUTS = 3


def model(**changes: object) -> GPT:
    """A model whose every weight matters, with a head."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, **changes}
    made = GPT(ModelConfig.model_validate(sizes), 50)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
    attach_head(made, OUTPUTS, generator)
    made.task_head.bias.data.normal_(generator=generator)
    return made.eval()


def padded(rows: list[list[list[int]]]) -> tuple[Tensor, Tensor]:
    """Tokens (R, S, T) filled up with token 7, and ends (R, S), -1 for missing sequences."""
    most, width = max(map(len, rows)), max(len(ids) for row in rows for ids in row)
    tokens, ends = torch.full((len(rows), most, width), 7), torch.full((len(rows), most), -1)
    for r, row in enumerate(rows):
        for s, ids in enumerate(row):
            tokens[r, s, : len(ids)], ends[r, s] = torch.tensor(ids), len(ids) - 1
    return tokens, ends


ROWS = [[[1, 2, 3], [4, 5, 6, 7, 8]], [[9]], [[10, 11, 12, 13], [14, 15]]]


@pytest.mark.parametrize("preset", ["gpt1", "gpt2", "modern"])
@pytest.mark.parametrize("choice", [False, True])
def test_one_text_at_a_time(preset: str, choice: bool) -> None:
    """Bug: padding, other rows or missing sequences change what a head says of a text."""
    net = model(preset=preset)
    head = task_head(net)
    with torch.no_grad():
        found = head_logits(net, *padded(ROWS), choice)
        for row, logits in zip(ROWS, found, strict=True):
            last = [net.hidden(torch.tensor([ids]))[0, -1] for ids in row]
            if choice:
                expected = [float(head.weight[0] @ state + head.bias[0]) for state in last]
                expected += [-torch.inf] * (2 - len(row))
            else:
                expected = (head.weight @ sum(last) + head.bias).tolist()
            assert logits.tolist() == pytest.approx(expected, abs=1e-5)


def test_attached() -> None:
    """Bug: the head is no part of the model (not trained, saved or counted), is not the same for
    the same seed, or begins with an opinion of its own."""
    config = ModelConfig(n_layer=1, n_head=1, n_embd=512, block_size=8)
    heads = []
    for _ in range(2):
        net = GPT(config, 40)
        before = net.parameter_count(), net.parameter_count(embeddings=False)
        attach_head(net, 20, torch.Generator().manual_seed(3))
        size = 20 * 512 + 20
        after = net.parameter_count(), net.parameter_count(embeddings=False)
        assert after == (before[0] + size, before[1] + size)
        assert {"task_head.weight", "task_head.bias"} <= net.state_dict().keys()
        heads.append(task_head(net))
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert float(heads[0].weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert not heads[0].bias.any()


def test_without_head() -> None:
    """Bug: a model without a head fails with an error that says nothing."""
    with pytest.raises(ValueError, match="no task head"):
        task_head(GPT(ModelConfig(n_layer=1, n_head=1, n_embd=32, block_size=8), 40))


def test_dropout() -> None:
    """Bug: the head learns without the model's dropout on what it reads, or answers with it."""
    net, features, ends = model(dropout=0.5), torch.ones(2, 1, 32), torch.zeros(2, 1).long()
    with torch.no_grad():
        kept = logits_of_features(net, features, ends, False)
        assert torch.equal(*kept)
        torch.manual_seed(0)
        dropped = logits_of_features(net.train(), features, ends, False)
        assert not torch.equal(*dropped)
        assert not torch.equal(dropped, kept)
