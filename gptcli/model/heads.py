"""A task head on a language model: labels or choices from the last token of a text.

Radford et al. 2018 (GPT-1), section 3.2 and figure 1. Legend of shapes: R rows (examples),
S sequences of a row, T time in tokens, C n_embd, L outputs of the head.
"""

import torch
from torch import Tensor, nn

from gptcli.model.gpt import GPT

_STD = 0.02  # of fresh weights, as of the model's own matrices


def attach_head(model: GPT, outputs: int, generator: torch.Generator | None = None) -> None:
    """Give the model a linear layer `task_head` with `outputs` outputs, in place of one it has.

    Weights N(0, 0.02), drawn on the CPU so that every device starts alike, bias 0; where the model
    is, of its dtype. The head goes with the model's parameters and state_dict. On the meta device
    it is empty.
    """
    head = nn.Linear(model.config.n_embd, outputs)
    with torch.no_grad():
        head.weight.normal_(0.0, _STD, generator=generator)
        head.bias.zero_()
    # Not made there: torch imports its compiler to draw what a layer on the meta device holds.
    head.to(model.device, model.dtype)
    model.task_head = head


def has_task_head(model: GPT) -> bool:
    """Whether `attach_head` gave the model a head."""
    return "task_head" in model._modules


def task_head(model: GPT) -> nn.Linear:
    """The model's head. ValueError when it has none."""
    head = model._modules.get("task_head")
    if not isinstance(head, nn.Linear):
        raise ValueError("the model has no task head")
    return head


def sequence_features(hidden: Tensor, ends: Tensor) -> Tensor:
    """Hidden states (R, S, T, C) at each sequence's last token: (R, S, C).

    `ends` (R, S) int64 is below 0 for a sequence that its row lacks; that one's are of token 0.
    """
    where = ends.clamp_min(0)[..., None, None].expand(-1, -1, 1, hidden.size(-1))
    return hidden.gather(2, where)[:, :, 0]


def logits_of_features(model: GPT, features: Tensor, ends: Tensor, choice: bool) -> Tensor:
    """The head's logits, fp32, from the representations (R, S, C) of the rows' sequences.

    Those of a row are added up and give (R, L); for a `choice` each gives a number (the head's
    output 0), (R, S), which is -inf where `ends` (R, S) says that the row lacks the sequence. In
    training the representations get the model's dropout (section 4.1 of the paper).
    """
    head, features = task_head(model), model.drop(features)
    missing = ends < 0
    if choice:
        return head(features)[..., 0].float().masked_fill(missing, -torch.inf)
    logits: Tensor = head(features.masked_fill(missing[..., None], 0.0).sum(1))
    return logits.float()


def head_logits(model: GPT, tokens: Tensor, ends: Tensor, choice: bool) -> Tensor:
    """Token ids (R, S, T) -> logits fp32 (R, L), or (R, S) for a `choice`.

    `ends` (R, S) int64 is the place of each sequence's last token, below 0 for one that the row
    lacks; what follows it is padding and has no effect, as attention is causal.
    """
    hidden = torch.unflatten(model.hidden(tokens.flatten(0, 1)), 0, ends.shape)
    return logits_of_features(model, sequence_features(hidden, ends), ends, choice)
