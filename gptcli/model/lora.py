"""Low-rank adapters (Hu et al. 2021): given to a model, merged into it, taken out of it.

The names of the base's tensors stay (blocks.0.attn.qkv.weight); beside them are those of the
adapter (blocks.0.attn.qkv.lora_a, blocks.0.attn.qkv.lora_b).
"""

import torch
from torch import Tensor, nn

from gptcli.config.finetune_schema import LoraConfig
from gptcli.model.gpt import GPT
from gptcli.model.lora_linear import LoraLinear

_HEAD = "task_head."


def add_lora(model: GPT, settings: LoraConfig, generator: torch.Generator) -> None:
    """Freeze the weights of an fp32 `model` and give it adapters, in place.

    Drawn on the CPU from `generator`, layer by layer, so that every device starts alike.
    """
    model.requires_grad_(False)
    for name in _layers(model, settings):
        place, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        setattr(model.get_submodule(place), child, LoraLinear(linear, settings, generator))


def merge_lora(model: GPT) -> None:
    """Put plain layers in the place of those with adapters: the model computes the same, and all
    of its weights can learn again."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLinear):
            place, _, child = name.rpartition(".")
            setattr(model.get_submodule(place), child, layer.merged())
    model.requires_grad_(True)


def adapter_shapes(model: GPT, settings: LoraConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of what `add_lora` would give `model`, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _layers(model, settings):
        outputs, inputs = model.get_parameter(f"{name}.weight").shape
        shapes[f"{name}.lora_a"] = (settings.rank, inputs)
        shapes[f"{name}.lora_b"] = (outputs, settings.rank)
    return shapes


def has_lora(model: GPT) -> bool:
    """Whether the model has adapters that are not merged."""
    return any(isinstance(module, LoraLinear) for module in model.modules())


def adapter_tensors(model: GPT) -> dict[str, Tensor]:
    """What a run with adapters learns, by name: the adapters, and a task head where there is one.

    They are the model's own memory.
    """
    own = ("lora_a", "lora_b")
    state = model.state_dict()
    return {n: t for n, t in state.items() if n.endswith(own) or n.startswith(_HEAD)}


def _layers(model: GPT, settings: LoraConfig) -> list[str]:
    chosen = sorted(set(settings.layers))
    return [f"blocks.{layer}.{name}" for layer in range(model.config.n_layer) for name in chosen]
