"""What a model says of given tokens: the likelihood of each, and what it held for likeliest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptcli.device import Device, autocast
from gptcli.model.gpt import GPT

MOST_LOGITS = 1 << 24  # logits held at once: 64 MiB in fp32


@dataclass(frozen=True)
class TargetScores:
    """Of each target, all (B, T): -ln p in nats (fp32), the likeliest token (int64) and its
    probability (fp32). Where there is no target: 0, -1 and 0."""

    nats: Tensor
    likeliest: Tensor
    top: Tensor


@torch.no_grad()
def score_tokens(
    model: GPT, tokens: Tensor, targets: Tensor, device: Device, precision: str
) -> TargetScores:
    """Score `targets` (B, T), where not negative, as what follows `tokens` (B, T); int64 on any
    device. Logits are made for a part of the targets at a time: those of a long window with a large
    vocabulary are gigabytes (8192 x 49152 in fp32: 1.6 GB).
    """
    tokens, flat = tokens.to(device.torch), targets.to(device.torch).flatten()
    nats, top = (torch.zeros(flat.shape, device=device.torch) for _ in range(2))
    likeliest = torch.full_like(flat, -1)
    scored = (flat >= 0).nonzero()[:, 0]
    with autocast(device, precision):
        hidden = model.hidden(tokens).flatten(0, 1)  # (B T, C)
        for part in torch.split(scored, max(1, MOST_LOGITS // model.vocab_size)):
            logits = model.head(hidden[part]).float()
            highest, likeliest[part] = logits.max(-1)
            # Not cross_entropy, whose sum over a large vocabulary is 1e-5 off, always to one side.
            margins = highest - logits.gather(1, flat[part][:, None])[:, 0]
            total = logits.sub_(highest[:, None]).exp_().sum(-1)
            nats[part], top[part] = total.log() + margins, 1 / total
    shape = targets.shape
    return TargetScores(nats.view(shape), likeliest.view(shape), top.view(shape))
