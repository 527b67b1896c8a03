"""A model that writes the same bytes over and over."""

from pathlib import Path

import torch

from gptcli.config.load import dump_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.model.gpt import GPT, initialise
from gptcli.runs.checkpoint import Contents, publish
from gptcli.runs.run_dir import new_run_dir


def cycle_model(cycle: bytes, block_size: int = 32) -> Path:
    """A run whose model goes through `cycle`, which has no byte twice, for ever."""
    shape = ModelConfig(
        n_layer=1,
        n_head=2,
        n_embd=-len(cycle) // 4 * -4,
        block_size=block_size,
        tie_embeddings=False,
    )
    config = Config(name="cycle", model=shape)
    tokenizer = Tokenizer.of_bytes()
    model = GPT(config.model, tokenizer.vocab_size)
    initialise(model, torch.Generator().manual_seed(0))  # the blocks add nothing
    with torch.no_grad():
        model.wte.weight.zero_()
        model.head.weight.zero_()
        for i, byte in enumerate(cycle):
            model.wte.weight[byte, i] = 1.0
            model.head.weight[cycle[(i + 1) % len(cycle)], i] = 1.0
    made = new_run_dir("cycle", None, overwrite=False)
    publish(made, 10, Contents(model.state_dict(), {}, {}, dump_config(config), tokenizer))
    return made
