"""Compiled blocks."""

import copy

import pytest
import torch

from gptcli.config.model_schema import ModelConfig
from gptcli.device import Device
from gptcli.model.gpt import GPT, Block, initialise
from gptcli.training.compiling import compile_blocks, compile_no_more, has_compiler

CONFIG = ModelConfig.model_validate({"n_layer": 3, "n_head": 2, "n_embd": 32, "block_size": 16})


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that get compiled, by a compiler that takes no time: torch's tracer is real."""
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        found.append(str(graph.code))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(Block.forward, backend=backend)
    monkeypatch.setattr("gptcli.training.compiling._compiled", lambda: compiled)
    return found


def test_one_graph_for_all_blocks_in_training_only(graphs: list[str]) -> None:
    """Bug: half a minute a block; an evaluation that compiles for each length; other names."""
    model = GPT(CONFIG, 50)
    initialise(model, torch.Generator().manual_seed(0))
    names = list(model.state_dict())
    tokens = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
    model.train()
    model.loss(tokens, tokens).backward()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    compile_blocks(model)
    assert list(model.state_dict()) == names
    with torch.no_grad():
        model(tokens)
    model.eval()(tokens[:, :5])
    assert not graphs
    model.train()
    for _ in range(2):
        model.zero_grad()
        model.loss(tokens, tokens).backward()
    assert len(graphs) == 1
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    compile_no_more(model)
    model.loss(tokens[:, :7], tokens[:, :7])
    assert len(graphs) == 1


def test_a_copy_computes_with_its_own_weights(graphs: list[str]) -> None:
    """Bug: the copy of a compiled model answers with the original's weights."""
    model = GPT(CONFIG, 50).train()
    compile_blocks(model)
    twin = copy.deepcopy(model)
    torch.nn.init.ones_(twin.blocks[0].mlp.up.weight)
    torch.nn.init.ones_(twin.blocks[0].mlp.proj.weight)
    tokens = torch.arange(16)[None]
    assert not torch.equal(model(tokens), twin(tokens))


def test_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a compiler is expected where none is installed."""
    monkeypatch.setenv("PATH", "")
    assert not has_compiler(Device("cpu", None, "a processor", 1, True))
    assert not has_compiler(Device("cuda", 0, "a graphics card", 1, True))
