"""Automatic choices: made once at step 0, written to run.json and the checkpoint, reused."""

import logging
import shlex
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gptcli import world
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.device import (
    Device,
    choose_precision,
    faster_precision,
    hardware,
    race_precision,
    usable_memory_bytes,
)
from gptcli.errors import ConfigError, ResourceError
from gptcli.model.gpt import GPT
from gptcli.training.compiling import compile_blocks, compile_no_more, has_compiler
from gptcli.training.footprint import Footprint, footprint
from gptcli.training.parallel import Strategy
from gptcli.training.trainable import sequences_per_row

log = logging.getLogger("gptcli")

# Tokens of a micro batch, at most. A CPU takes the least time for a token at about 2048, and seldom
# 10 % more between 512 and 8192 (2 layers of 64, 4 of 192, 6 of 384 columns; one AVX2 core, fp32);
# but the smallest of these 36 % more at 512. Not measured on cuda and mps, which need many tokens
# to be busy.
_TOKENS = {"cpu": 2048, "cuda": 65536, "mps": 16384}
# With adapters: a micro batch makes no gradients of the frozen weights that have to be added up, so
# small ones cost nothing and halve the activations (SmolLM2-135M, a step of 4 x 256 tokens, the
# processor's time on one core: 10.5 s at 1024 tokens, 10.0 at 512, 10.9 at 256).
_ADAPTER_TOKENS = {**_TOKENS, "cpu": 512}
_PLENTY = 4  # so many times what a step roughly needs is enough for sure


@dataclass(frozen=True)
class Choices:
    """How this run computes.

    `micro_batch_size` is in rows of block_size tokens; `available_threads` is what the machine
    offered when `threads` was chosen (None: the same). `given_micro_batch_size` is what the config
    said of it (None in old checkpoints): out of memory it may have become less. `hardware` is what
    computes, by its model (None in old checkpoints). `races` has the seconds that decided.
    """

    device: str
    threads: int
    precision: str
    compile: bool
    micro_batch_size: int
    torch: str
    activation_checkpointing: bool = False
    available_threads: int | None = None
    given_micro_batch_size: int | str | None = None
    hardware: str | None = None
    races: dict[str, Any] = field(default_factory=dict, compare=False)
    strategy: Strategy = "one"
    processes: int = 1

    def to_json(self) -> dict[str, Any]:
        """For run.json and state.json."""
        return asdict(self)


def choose(
    config: Config,
    device: Device,
    vocab_size: int,
    *,
    held_bytes: int = 0,
    strategy: Strategy = "one",
    run_dir: Path | None = None,
) -> Choices:
    """The choices for a fresh run on `device`, from the config and the free memory alone.

    `held_bytes` of what a step needs this process holds already; `run_dir` has the config.yaml to
    name in a warning. Nothing is computed but, on a CPU with precision auto, a few matrix products.
    `tuning.tune` goes on from here.
    """
    training, races = config.training, dict[str, Any]()
    if training.precision == "auto" and device.kind == "cpu":
        races["precision"] = race_precision()
        precision = faster_precision(races["precision"])
    else:
        precision = choose_precision(training.precision, device)

    def suits(size: int, recompute: bool) -> bool:
        return fits(
            config,
            device,
            vocab_size,
            size,
            precision,
            recompute=recompute,
            held_bytes=held_bytes,
        )

    sizes = _micro_batch_sizes(config, device, rows_of_a_process(config))
    recompute = training.activation_checkpointing == "on"
    if training.activation_checkpointing == "auto":
        recompute = not suits(sizes[-1], False)
    fitting = next((n for n in sizes if suits(n, recompute)), None)
    if fitting is None and strategy != "fsdp":  # of which a process has only a share
        need = footprint(
            config, vocab_size, sizes[-1], precision, recompute=recompute, device_kind=device.kind
        )
        _warn_of_memory(need, usable_memory_bytes(device, held_bytes) or 0, run_dir)
    return Choices(
        device=device_name(device),
        threads=device.threads,
        precision=precision,
        compile=_compiles(training.compile, device),
        micro_batch_size=fitting or sizes[-1],
        torch=torch.__version__,
        activation_checkpointing=recompute,
        available_threads=device.threads,
        given_micro_batch_size=training.micro_batch_size,
        hardware=hardware(device),
        races=races,
        strategy=strategy,
        processes=world.current().size,
    )


def _micro_batch_sizes(config: Config, device: Device, rows: int) -> list[int]:
    """Those that divide `rows`, the largest first; that of the config where it gives one."""
    given = config.training.micro_batch_size
    if given != "auto":
        return [given]
    tokens = _ADAPTER_TOKENS if config.finetune.method == "lora" else _TOKENS
    most = tokens[device.kind] // config.model.block_size
    return [n for n in range(min(rows, max(most, 1)), 0, -1) if rows % n == 0]


def choose_strategy(
    config: Config, device: Device, vocab_size: int, job: str, saved: str | None
) -> Strategy:
    """How several processes share the model: as the config says, else as the run did so far, else
    each has all of it where a step of one row fits, and for finetuning."""
    here, wanted = world.current(), config.distributed.strategy
    if here.size == 1:
        return "one"
    if wanted == "auto" and saved in ("ddp", "fsdp"):
        return "ddp" if saved == "ddp" else "fsdp"
    if wanted != "auto" or job == "finetune":
        return "fsdp" if wanted == "fsdp" else "ddp"
    roomy = fits(config, device, vocab_size, 1, "fp32", recompute=True)
    return "ddp" if world.agree([float(not roomy)], patient=True) == [0.0] else "fsdp"


def check_strategy(config: Config, job: str, strategy: Strategy) -> None:
    """ConfigError for what needs the whole model in each process."""
    if strategy != "fsdp":
        return
    problems = []
    if config.training.spike == "rollback":
        problems.append("training.spike: rollback goes back to a whole model; use skip or warn")
    if job == "finetune":
        problems.append("distributed.strategy: fsdp is for pretraining; finetuning takes ddp")
    if problems:
        raise ConfigError(problems, hint="--set distributed.strategy=ddp")


def rows_of_a_process(config: Config) -> int:
    """The most rows of a step that one of the processes computes."""
    rows = config.training.tokens_per_step // config.model.block_size
    return -(-rows // world.current().size)


def choose_again(saved: dict[str, Any], config: Config, device: Device) -> Choices | None:
    """The saved choices for a resumed run; where the machine or config differs, one warning says
    why the result may differ in its last bits. None on another kind of device, which needs choices
    of its own."""
    old, training = Choices(**saved), config.training
    reasons, new = [], old
    if device_name(device) != old.device:
        new = replace(new, device=device_name(device))
        reasons.append(f"device {old.device} -> {new.device}")
    if device.kind != old.device.partition(":")[0]:
        _not_exact(reasons)
        return None
    processes = world.current().size
    if processes != old.processes:
        new = replace(new, processes=processes)
        reasons.append(f"processes {old.processes} -> {processes}")
    here = hardware(device)
    new = replace(new, hardware=here)
    if old.hardware not in (None, here):
        reasons.append(f"{old.hardware} -> {here}")
    if device.threads != (old.available_threads or old.threads):
        new = replace(new, threads=device.threads, available_threads=device.threads)
        reasons.append(f"threads {old.threads} -> {device.threads}")
    if torch.__version__ != old.torch:
        new = replace(new, torch=torch.__version__)
        reasons.append(f"torch {old.torch} -> {torch.__version__}")
    lacks_bf16 = old.precision == "bf16" and not device.bf16
    if training.precision not in ("auto", old.precision) or lacks_bf16:
        new = replace(new, precision=choose_precision(training.precision, device))
        reasons.append(f"precision {old.precision} -> {new.precision}")
    rows, size = rows_of_a_process(config), old.micro_batch_size
    given = training.micro_batch_size
    if given != "auto" and given != old.given_micro_batch_size:
        if given != size:
            reasons.append(f"micro_batch_size {size} -> {given}")
        size = given
    new = replace(new, micro_batch_size=largest_divisor(rows, size), given_micro_batch_size=given)
    if training.compile != "auto":
        new = replace(new, compile=_compiles(training.compile, device))
    if new.compile != old.compile:
        reasons.append(f"compile {_switch(old.compile)} -> {_switch(new.compile)}")
    if training.activation_checkpointing != "auto":
        new = replace(new, activation_checkpointing=training.activation_checkpointing == "on")
    if reasons:
        _not_exact(reasons)
    return new


def apply(choices: Choices, model: GPT) -> None:
    """Make the process and `model` compute as `choices` say."""
    torch.set_num_threads(choices.threads)
    model.recompute = choices.activation_checkpointing
    if choices.compile:
        compile_blocks(model)
    else:
        compile_no_more(model)


def with_less_memory(
    choices: Choices, config: Config, rows: int, run_dir: Path | None = None
) -> Choices:
    """Choices under which a step of `rows` rows computes the same in less memory, told in a line;
    with dropout it has other masks where the micro batch is another.

    ResourceError when there are none; `run_dir` has the config.yaml to name in it.
    """
    size = choices.micro_batch_size
    if size > 1:
        half = largest_divisor(rows, size // 2)
        log.warning(f"out of memory: micro_batch_size {size} -> {half}, more of them a step")
        return replace(choices, micro_batch_size=half)
    if config.training.activation_checkpointing == "auto" and not choices.activation_checkpointing:
        log.warning("out of memory with one row: activation_checkpointing off -> on")
        return replace(choices, activation_checkpointing=True)
    hint = "set model.block_size, n_layer or n_embd lower; or free memory on this machine"
    if not choices.activation_checkpointing:
        hint = f"set training.activation_checkpointing to auto; or {hint}"
    if run_dir is not None:
        hint += f"\nwhat takes how much: {plan_command(run_dir)}"
    raise ResourceError(
        f"out of memory on {choices.device} with micro batches of one row of"
        f" {config.model.block_size} tokens",
        hint=hint,
    )


def plan_command(run_dir: Path) -> str:
    """The command line that says what the run takes."""
    return f"gpt plan {shlex.quote(str(run_dir / 'config.yaml'))}"


def fits(
    config: Config,
    device: Device,
    vocab_size: int,
    rows: int,
    precision: str,
    *,
    recompute: bool,
    held_bytes: int = 0,
) -> bool:
    """Whether a step with micro batches of `rows` rows fits into the memory that is free now.

    `held_bytes` of what it needs this process holds already.
    """
    usable = usable_memory_bytes(device, held_bytes)
    if usable is None:
        return True
    # The exact figure takes a second or more to compute.
    sequences = rows * sequences_per_row(config.finetune)
    if _PLENTY * _roughly_bytes(config.model, vocab_size, sequences) < usable:
        return True
    need = footprint(
        config, vocab_size, rows, precision, recompute=recompute, device_kind=device.kind
    )
    return need.total_bytes <= usable


def _warn_of_memory(need: Footprint, usable: int, run_dir: Path | None) -> None:
    """Say that even the smallest step takes more memory than there is, by the estimate."""
    less = f" ({plan_command(run_dir)} says what takes less)" if run_dir is not None else ""
    log.warning(
        f"a step may run out of memory: it takes about {need.total_bytes / 2**30:.2f} GiB, usable"
        f" are {usable / 2**30:.2f} GiB{less}"
    )


def largest_divisor(rows: int, most: int) -> int:
    """The largest divisor of `rows` that is at most `most` (1 or more)."""
    return next(n for n in range(min(rows, max(most, 1)), 0, -1) if rows % n == 0)


def _roughly_bytes(model: ModelConfig, vocab_size: int, rows: int) -> int:
    """Of a step: weights, gradient and two moments; what a layer keeps for the backward pass, about
    8 times its width and 4 times that of its feed-forward layer; half a GiB for the rest."""
    weights = model.n_layer * (4 * model.n_embd**2 + 3 * model.n_embd * model.inner_size)
    weights += 2 * vocab_size * model.n_embd
    layer = 8 * model.n_embd + 4 * model.inner_size
    return 16 * weights + 4 * rows * model.block_size * model.n_layer * layer + 2**29


def device_name(device: Device) -> str:
    """The device as a config names it."""
    return f"{device.kind}:{device.index}" if device.index is not None else device.kind


def _compiles(wanted: str, device: Device) -> bool:
    """Whether training.compile is on, told in a line where nothing can compile."""
    if wanted == "on" and not has_compiler(device):
        log.warning("training.compile is on, but there is no compiler here: not compiled")
        return False
    return wanted == "on"


def _switch(on: bool) -> str:
    return "on" if on else "off"


def _not_exact(reasons: list[str]) -> None:
    log.warning(f"not bit-exact with the run so far: {', '.join(reasons)}")
