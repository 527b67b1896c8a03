"""Whether a run fits into memory, and what to change where it does not."""

from dataclasses import dataclass, replace
from pathlib import Path

from gptcli.config.schema import Config
from gptcli.device import Device, free_memory_bytes
from gptcli.errors import ResourceError
from gptcli.model.empty import empty_model
from gptcli.training.choices import Choices, largest_divisor, plan_command
from gptcli.training.footprint import Footprint, footprint


@dataclass(frozen=True)
class Case:
    """What decides the memory and the speed of a step."""

    config: Config
    vocab_size: int
    device: Device
    choices: Choices
    text_bytes: int  # of memory, to read it

    def need(self) -> Footprint:
        """The memory of its step, and of the text where both are in one."""
        found = footprint(
            self.config,
            self.vocab_size,
            self.choices.micro_batch_size,
            self.choices.precision,
            recompute=self.choices.activation_checkpointing,
            device_kind=self.device.kind,
        )
        if self.device.kind == "cuda":
            return found
        return replace(
            found,
            other_bytes=found.other_bytes + self.text_bytes,
            total_bytes=found.total_bytes + self.text_bytes,
        )

    def smaller(self, rows: int, *, recompute: bool = False, n_layer: int | None = None) -> "Case":
        """With other micro batches, checkpoints of activations, and fewer layers."""
        config, choices = self.config, replace(self.choices, micro_batch_size=rows)
        if recompute:
            choices = replace(choices, activation_checkpointing=True)
        if n_layer is not None:
            shape = config.model.model_copy(update={"n_layer": n_layer})
            config = config.model_copy(update={"model": shape})
        return replace(self, config=config, choices=choices)


def check_memory(
    config: Config,
    device: Device,
    vocab_size: int,
    held_bytes: int = 0,
    run_dir: Path | None = None,
) -> None:
    """ResourceError where not even what a run keeps all the time fits into the free memory: the
    weights, and where all learn, gradients and one moment. `held_bytes` of it are in this machine's
    memory already; `run_dir` has the config.yaml to name.

    Before the model is made: a system that promises more memory than it has kills who uses it.
    """
    free = free_memory_bytes(device)
    weights = empty_model(config.model, vocab_size).parameter_count()
    tuned = config.finetune
    all_learn = tuned.method == "full" and not (tuned.freeze_embeddings or tuned.freeze_layers)
    needed = (12 if all_learn else 4) * weights - (0 if device.kind == "cuda" else held_bytes)
    if free is not None and needed > free:
        what = "weights, gradients and optimizer" if all_learn else "weights"
        hint = "set model.n_embd, model.n_layer or tokenizer.vocab_size lower"
        if run_dir is not None:
            hint += f"\nwhat takes how much: {plan_command(run_dir)}"
        raise ResourceError(
            f"{weights:,} parameters: their {what} alone need {gib(needed)} of memory on"
            f" {device.kind}, free are {gib(free)}",
            hint=hint,
        )


def misfits(case: Case, needed: Footprint, memory: int | None) -> tuple[list[str], list[str]]:
    """Why a step does not fit in `memory` bytes, and the first change that makes it fit."""
    if memory is None or needed.total_bytes <= memory:
        return [], []
    problem = f"a step takes {gib(needed.total_bytes)} of memory, usable are {gib(memory)}"
    rows = case.config.training.tokens_per_step // case.config.model.block_size
    changes, size = [], case.choices.micro_batch_size
    while size > 1:
        size = largest_divisor(rows, size // 2)
        changes.append((case.smaller(size), f"--set training.micro_batch_size={size}"))
    how = "--set training.micro_batch_size=1 --set training.activation_checkpointing=on"
    changes.append((case.smaller(1, recompute=True), how))
    layers = case.config.model.n_layer
    if case.config.init is not None:  # whose layers stay as many
        return [problem], _advice(changes, memory) or ["choose a smaller model, or method lora"]
    while layers // 2 >= len(case.config.model.window or [0]):
        layers //= 2
        fewer = case.smaller(1, recompute=True, n_layer=layers)
        changes.append((fewer, f"{how} --set model.n_layer={layers}"))
    if changes[-1][0].need().total_bytes > memory:
        return [problem], [f"{layers} layers are too much too: choose a smaller model"]
    return [problem], _advice(changes, memory)


def _advice(changes: list[tuple[Case, str]], memory: int) -> list[str]:
    """The first of the changes that makes a step fit."""
    for changed, words in changes:
        total = changed.need().total_bytes
        if total <= memory:
            return [f"{words} takes {gib(total)}"]
    return []


def gib(size: int) -> str:
    """`size` in bytes, for people."""
    return f"{size / 2**30:,.2f} GiB"
