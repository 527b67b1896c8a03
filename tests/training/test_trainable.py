"""What learns by which method."""

from typing import Any

import pytest
import torch
from torch import nn

from gptcli.config.finetune_schema import FinetuneConfig
from gptcli.config.model_schema import ModelConfig
from gptcli.errors import ConfigError
from gptcli.model.gpt import GPT
from gptcli.model.heads import attach_head
from gptcli.training.trainable import set_trainable


def model(*, tied: bool = True, head: bool = True, adapters: bool = False) -> GPT:
    config = ModelConfig(
        n_layer=3, n_head=2, n_embd=16, block_size=8, position="learned", tie_embeddings=tied
    )
    made = GPT(config, 20)
    if head:
        attach_head(made, 2)
    if adapters:
        made.blocks[1].attn.qkv.lora_a = nn.Parameter(torch.zeros(2, 16))
        made.blocks[1].attn.qkv.lora_b = nn.Parameter(torch.zeros(48, 2))
    return made


def learning(net: GPT, **settings: Any) -> set[str]:
    """Names of the parameters that learn, after all were frozen and after all did."""
    found = []
    for before in (False, True):
        net.requires_grad_(before)
        set_trainable(net, FinetuneConfig(task="classification", **settings))
        found.append({name for name, p in net.named_parameters() if p.requires_grad})
    assert found[0] == found[1]
    return found[0]


def test_full() -> None:
    """Bug: something of the model does not learn."""
    net = model()
    assert learning(net) == {name for name, _ in net.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
def test_frozen_embeddings(tied: bool) -> None:
    """Bug: positions learn on, an output head tied to the embeddings does, or one that is not tied
    does not."""
    net = model(tied=tied)
    frozen = {name for name, _ in net.named_parameters()} - learning(net, freeze_embeddings=True)
    assert frozen == {"wte.weight", "wpe.weight"}
    assert net.head.weight.requires_grad != tied


def test_frozen_layers() -> None:
    """Bug: blocks are counted from the wrong end or from 1."""
    net = model()
    frozen = {name for name, _ in net.named_parameters()} - learning(net, freeze_layers=2)
    assert {name.split(".")[1] for name in frozen} == {"0", "1"}
    assert len(frozen) == 2 * len(list(net.blocks[0].parameters()))


def test_head_alone() -> None:
    """Bug: method head trains the model as well."""
    assert learning(model(), method="head") == {"task_head.weight", "task_head.bias"}


def test_adapters() -> None:
    """Bug: method lora leaves the task head as it was drawn, or trains what it adapts."""
    adapters = {"blocks.1.attn.qkv.lora_a", "blocks.1.attn.qkv.lora_b"}
    heads = {"task_head.weight", "task_head.bias"}
    assert learning(model(adapters=True), method="lora") == adapters | heads
    assert learning(model(adapters=True, head=False), method="lora") == adapters


def test_nothing_left() -> None:
    """Bug: a run trains nothing for hours."""
    with pytest.raises(ConfigError, match="none of the model's 3 blocks"):
        learning(model(), freeze_layers=3)
    with pytest.raises(ConfigError, match="no task head"):
        learning(model(head=False), method="head")
    with pytest.raises(ConfigError, match="no adapters"):
        learning(model(head=False), method="lora")
