"""What a unit of training work costs on this machine, by which runs of other sizes are foretold."""

from dataclasses import dataclass

import torch

from gptcli.config import recipe
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.device import Device, is_out_of_memory, release_memory
from gptcli.model.gpt import GPT, initialise
from gptcli.training.flops import flops_per_token
from gptcli.training.probe import probe_speed, step_seconds

_CPU_TOKENS, _GPU_TOKENS = 4096, 65536  # of the micro batch that is tried


@dataclass(frozen=True)
class UnitCosts:
    """This machine's seconds for each operation of the products, and for each unit of the work of
    an update (see `update_work`)."""

    per_flop: float
    per_update: float


def unit_costs(
    config: Config,
    model: ModelConfig,
    vocab_size: int,
    device: Device,
    precision: str,
    seconds: float,
) -> UnitCosts:
    """From about `seconds` of real steps of one model, of fewer tokens where memory is short.

    Raises what `probe_speed` raises.
    """
    rows = max(1, (_CPU_TOKENS if device.kind == "cpu" else _GPU_TOKENS) // model.block_size)
    while True:
        try:
            return _measured(config, model, vocab_size, device, precision, seconds, rows)
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
        release_memory(device)
        rows //= 2


def _measured(
    config: Config,
    model: ModelConfig,
    vocab_size: int,
    device: Device,
    precision: str,
    seconds: float,
    rows: int,
) -> UnitCosts:
    tokens = rows * model.block_size
    training = config.training.model_copy(
        update={"tokens_per_step": tokens, "micro_batch_size": "auto"}
    )
    config = Config.model_validate({**dict(config), "model": model, "training": training})
    network = GPT(model, vocab_size)
    initialise(network, torch.Generator().manual_seed(0))
    speed = probe_speed(network.to(device.torch), config, device, precision, rows, seconds)
    update = speed.optimizer_seconds
    return UnitCosts(
        per_flop=(step_seconds(speed, config) - update)
        / (tokens * flops_per_token(model, vocab_size)),
        per_update=update / update_work(model, vocab_size),
    )


def update_work(model: ModelConfig, vocab_size: int) -> float:
    """Weights times columns of the hidden matrices, as Muon's work grows; the others' weights."""
    return recipe.hidden_parameters(model) * model.n_embd + 2 * vocab_size * model.n_embd
