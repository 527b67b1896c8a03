"""Which weights of a model learn in finetuning."""

import torch

from gptcli.config.finetune_schema import FinetuneConfig
from gptcli.errors import ConfigError
from gptcli.model.gpt import GPT
from gptcli.model.heads import attach_head, has_task_head
from gptcli.model.lora import add_lora

_ADAPTERS = ("lora_a", "lora_b")


def as_finetuned(model: GPT, settings: FinetuneConfig) -> None:
    """Give a model what a finetuning would, to plan with: adapters, a task head where it has none
    (of two labels: how many there will be hardly matters), and weights that are frozen."""
    if settings.method == "lora":
        add_lora(model, settings.lora, torch.Generator())
    if settings.has_head and not has_task_head(model):
        attach_head(model, 2)
    set_trainable(model, settings)


def sequences_per_row(settings: FinetuneConfig) -> int:
    """Sequences that the model reads of an example: both answers of a preference, both orders of
    a pair, each choice (four of them, as is usual)."""
    if settings.task == "preference":
        return 2
    if not settings.has_head:
        return 1
    return {"pairs": 2 if settings.pair_order == "both" else 1, "multiple_choice": 4}.get(
        settings.task, 1
    )


def set_trainable(model: GPT, settings: FinetuneConfig) -> None:
    """Freeze (requires_grad False) all parameters of the model but those that learn.

    full: all, less the embeddings (and the output head where it is tied to them) and the first
    blocks, as the settings say; lora: the adapters and the task head; head: the task head. The
    model has its head and its adapters already. ConfigError where the settings leave no block, or
    nothing at all.
    """
    n_layer, count = model.config.n_layer, settings.freeze_layers
    if count >= n_layer:
        raise ConfigError(
            f"finetune.freeze_layers {count} leaves none of the model's {n_layer} blocks to learn",
            hint=f"choose at most {n_layer - 1}; method: head trains a task head alone",
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_learns(name, settings))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        lacks = "adapters" if settings.method == "lora" else "task head"
        raise ConfigError(
            f"finetune.method {settings.method}: the model has no {lacks}, so nothing would learn"
        )


def _learns(name: str, settings: FinetuneConfig) -> bool:
    parts = name.split(".")
    if parts[0] == "task_head":
        return True
    if settings.method != "full":
        return settings.method == "lora" and parts[-1] in _ADAPTERS
    if parts[0] == "blocks":
        return int(parts[1]) >= settings.freeze_layers
    # An output head tied to the embeddings is the same parameter, and goes by their name.
    return not (settings.freeze_embeddings and parts[0] in ("wte", "wpe"))
