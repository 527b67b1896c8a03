"""Models without memory for their weights, on torch's meta device: to count, or to be filled."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from gptcli.config.model_schema import ModelConfig
from gptcli.model.gpt import GPT


def empty_model(config: ModelConfig, vocab_size: int) -> GPT:
    """A model whose parameters are on the meta device.

    RuntimeError, OverflowError or TypeError for sizes beyond 64 bits.
    """
    with _OnMeta():
        return GPT(config, vocab_size)


def parameter_shapes(config: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors by their names in `state_dict`, tied ones under both.

    Only one block is built, as all blocks are alike. Raises what `empty_model` raises.
    """
    one = empty_model(config.model_copy(update={"n_layer": 1}), vocab_size)
    shapes: dict[str, tuple[int, ...]] = {}
    block = {name: tuple(tensor.shape) for name, tensor in one.blocks[0].state_dict().items()}
    for name, tensor in one.state_dict().items():
        if not name.startswith("blocks."):
            shapes[name] = tuple(tensor.shape)
    for layer in range(config.n_layer):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


class _OnMeta(TorchFunctionMode):
    """Parameters go to the meta device and their initial values are not drawn.

    `torch.device("meta")` would do, but it computes what layers draw there, for which torch imports
    its compiler: seconds at every start.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            return func(*args, **{**kwargs, "device": "meta"})
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
