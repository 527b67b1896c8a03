"""What steps minimise, against the formulas written out in plain PyTorch, row by row."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.config.model_schema import ModelConfig
from gptcli.data.rows import StepBatch
from gptcli.model.gpt import GPT
from gptcli.model.heads import attach_head, sequence_features, task_head
from gptcli.model.loss import IGNORED
from gptcli.training.objective import LossOf, head_loss, language_model_loss, preference_loss

VOCAB = 40
CPU = torch.device("cpu")


def model(outputs: int = 3, dropout: float = 0.0) -> GPT:
    """A model whose every weight matters, with a head."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "dropout": dropout}
    made = GPT(ModelConfig.model_validate(sizes), VOCAB)
    attach_head(made, outputs)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)
    return made.train()


def step(lengths: list[list[int]], labels: list[int], seed: int = 1) -> StepBatch:
    """Rows of texts of `lengths` tokens, -1 for a missing one; every other target has loss."""
    most, width = max(map(len, lengths)), max(max(row) for row in lengths)
    tokens = torch.zeros(len(lengths), most, width, dtype=torch.int64)
    targets, ends = torch.full_like(tokens, IGNORED), torch.full(tokens.shape[:2], -1)
    generator = torch.Generator().manual_seed(seed)
    for r, row in enumerate(lengths):
        for s, length in enumerate(row):
            if length < 0:
                continue
            ids = torch.randint(VOCAB, (length,), generator=generator)
            tokens[r, s, :length], ends[r, s] = ids, length - 1
            targets[r, s, : length - 1 : 2] = ids[1::2]
    return StepBatch(tokens, targets, None, 0, {}, 0.0, ends, torch.tensor(labels))


def run(net: GPT, loss_of: LossOf, batch: StepBatch, size: int) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a step in micro batches of `size` rows."""
    net.zero_grad()
    total = torch.zeros(())
    for first in range(0, len(batch.tokens), size):
        loss = loss_of(batch.part(slice(first, first + size), CPU), batch)
        loss.backward()
        total += loss.detach()
    return total, gradients(net)


def gradients(net: GPT) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


def check(net: GPT, loss_of: LossOf, batch: StepBatch, expected: Tensor) -> None:
    """The loss is `expected`, in any micro batches, and so are its gradients."""
    net.zero_grad()
    expected.backward()
    right = gradients(net)
    for size in (1, 2, len(batch.tokens)):
        loss, found = run(net, loss_of, batch, size)
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, right, strict=True))


def texts(batch: StepBatch, row: int) -> list[tuple[Tensor, Tensor]]:
    """Tokens and targets (1, T) of the texts that a row has."""
    assert batch.ends is not None
    return [
        (batch.tokens[row, s, : end + 1][None], batch.targets[row, s, : end + 1][None])
        for s, end in enumerate(batch.ends[row].tolist())
        if end >= 0
    ]


def lm_mean(net: GPT, batch: StepBatch) -> Tensor:
    """Mean -ln p of all targets with loss."""
    pairs = [text for row in range(len(batch.tokens)) for text in texts(batch, row)]
    logits = torch.cat([net(tokens)[0] for tokens, _ in pairs])
    return F.cross_entropy(logits, torch.cat([targets[0] for _, targets in pairs]))


@pytest.mark.parametrize("class_weights", [None, [0.5, 3.0, 1.0]])
@pytest.mark.parametrize("lm_weight", [0.0, 0.5])
def test_head_loss(class_weights: list[float] | None, lm_weight: float) -> None:
    """Bug: padding, the weights of other micro batches or the size of the last one enter the loss
    of labels, or the language model's part is weighted by rows."""
    net = model()
    batch = step([[5], [9], [3], [16], [7]], [0, 2, 1, 1, 0])
    head = task_head(net)
    assert batch.labels is not None
    total, weight = torch.zeros(()), 0.0
    for row, label in enumerate(batch.labels.tolist()):
        ((tokens, _),) = texts(batch, row)
        logits = head(net.hidden(tokens)[0, -1])
        own = 1.0 if class_weights is None else class_weights[label]
        total, weight = total - own * logits.log_softmax(-1)[label], weight + own
    expected = total / weight
    if lm_weight:
        expected = expected + lm_weight * lm_mean(net, batch)
    check(net, head_loss(net, lm_weight, class_weights, choice=False), batch, expected)


def test_similarity_loss() -> None:
    """Bug: of a pair in both orders only one is read, or they are averaged."""
    net = model(outputs=2)
    batch = step([[5, 7], [9, 2], [3, 3]], [0, 1, 1])
    assert batch.labels is not None
    logits = torch.stack(
        [
            task_head(net)(sum(net.hidden(tokens)[0, -1] for tokens, _ in texts(batch, row)))
            for row in range(3)
        ]
    )
    expected = F.cross_entropy(logits, batch.labels)
    check(net, head_loss(net, 0.0, None, choice=False), batch, expected)


def test_choice_loss() -> None:
    """Bug: choices that a row lacks take part in its softmax, or make the loss not a number."""
    net = model(outputs=1)
    batch = step([[5, 7, 4], [9, 2, -1], [3, -1, -1]], [2, 0, 0])
    assert batch.labels is not None
    total = torch.zeros(())
    for row, label in enumerate(batch.labels.tolist()):
        states = [net.hidden(tokens)[0, -1] for tokens, _ in texts(batch, row)]
        numbers = torch.cat([task_head(net)(state) for state in states])
        total = total - numbers.log_softmax(0)[label]
    check(net, head_loss(net, 0.0, None, choice=True), batch, total / 3)


def test_frozen_features() -> None:
    """Bug: with representations given, the loss or the head's gradients are others, or there is a
    loss of the language model."""
    net = model()
    net.requires_grad_(False)
    task_head(net).requires_grad_(True)
    batch = step([[5], [9], [5], [16], [7]], [0, 2, 1, 1, 0])
    expected, right = run(net, head_loss(net, 0.0, None, choice=False), batch, 5)

    def features_of(tokens: Tensor, ends: Tensor) -> Tensor:
        hidden = torch.unflatten(net.hidden(tokens.flatten(0, 1)), 0, ends.shape)
        return sequence_features(hidden, ends)

    loss_of = head_loss(net, 0.5, None, choice=False, features_of=features_of)
    loss, found = run(net, loss_of, batch, 2)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, right, strict=True))


def test_preference_loss() -> None:
    """Bug: the margin has the wrong sign or lacks the reference, log-likelihoods are means, or
    micro batches change the loss (of pairs as hopeless as the last: into infinity)."""
    net = model()
    batch = step([[5, 7], [9, 2], [16, 12]], [11, -3, 2**62])
    reference = {11: (-3.0, -2.0), -3: (-10.0, -9.0), 2**62: (1000.0, -1000.0), 5: (0.0, 0.0)}
    beta, total = 0.3, torch.zeros(())
    assert batch.labels is not None
    for row, key in enumerate(batch.labels.tolist()):
        sums = []
        for tokens, targets in texts(batch, row):
            logits, wanted = net(tokens)[0], targets[0]
            sums.append(-F.cross_entropy(logits, wanted, reduction="sum"))
        margin = (sums[0] - reference[key][0]) - (sums[1] - reference[key][1])
        total = total + torch.log1p(torch.exp(-beta * margin.double())).float()
    assert 500 < float(total.detach()) < 700  # where a sigmoid in fp32 is 0
    check(net, preference_loss(net, beta, reference), batch, total / 3)


def test_preferences_begin_at_ln_2() -> None:
    """Bug: a model that is its own reference is told that it prefers something."""
    net = model()
    batch = step([[5, 7]], [1])
    with torch.no_grad():
        sums = [-float(net.loss(tokens, targets)) for tokens, targets in texts(batch, 0)]
    loss, _ = run(net, preference_loss(net, 0.1, {1: (sums[0], sums[1])}), batch, 1)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-5)


def test_language_model_loss() -> None:
    """Bug: rows with few targets count as much as those with many."""
    net = model()
    rows = step([[5], [9], [16]], [0, 0, 0])
    flat = replace(rows, tokens=rows.tokens[:, 0], targets=rows.targets[:, 0])
    check(net, language_model_loss(net), flat, lm_mean(net, rows))
