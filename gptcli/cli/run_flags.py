"""Flags that several commands share, and how pretrain and finetune end."""

import json
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gptcli import stop
from gptcli.cli.starting import starting
from gptcli.cli.terminal import columns, write_error, write_out
from gptcli.errors import ConfigError
from gptcli.world import from_environment

if TYPE_CHECKING:
    from gptcli.config.load import LoadedConfig
    from gptcli.config.schema import Config
    from gptcli.training.build import RunResult

log = logging.getLogger("gptcli")

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped config such as 'small'.")
]
ConfigOrTextArgument = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG",
        help="A YAML file, a shipped config such as 'small', or a text (book.txt, a directory of"
        " texts), for which all settings are chosen.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="A run, checkpoint, Hugging Face folder or hub name; else the newest run.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one config key, as model.n_layer=6."),
]
RunDirOption = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="Write the run here.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue --run-dir, or this config's newest stopped run.")
]
AutoResumeOption = Annotated[
    bool, typer.Option("--auto-resume", help="As --resume, but start afresh if there is nothing.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Move an existing --run-dir aside and start afresh.")
]
DataChangeOption = Annotated[
    bool, typer.Option("--allow-data-change", help="Resume although the data have changed.")
]
AllowCodeOption = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution",
        help="Run the programs that the model writes, where finetune.scores has code_runs.",
    ),
]
MaxTimeOption = Annotated[
    str | None,
    typer.Option("--max-time", metavar="TIME", help="Stop after this long, as 8h or 30m."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Check the config, say what would be done, and stop.")
]


DevicesOption = Annotated[
    int | None,
    typer.Option(
        "--devices", metavar="N", min=1, help="One process for each of N GPUs, or on the CPU N."
    ),
]
NodesOption = Annotated[
    str | None,
    typer.Option(
        "--nodes",
        metavar="NODES",
        help="N machines, each with --devices: slurm, or N@HOST:PORT of the first.",
    ),
]


@dataclass(frozen=True)
class RunFlags:
    """Where a run is written and what happens to one that is there."""

    run_dir: Path | None
    resume: bool
    auto_resume: bool
    overwrite: bool
    allow_data_change: bool

    def __post_init__(self) -> None:
        chosen = [
            flag
            for flag, given in (
                ("--resume", self.resume),
                ("--auto-resume", self.auto_resume),
                ("--overwrite", self.overwrite),
            )
            if given
        ]
        if len(chosen) > 1:
            raise ConfigError(f"{' and '.join(chosen)} exclude each other; give one of them")

    @property
    def mode(self) -> Literal["no", "resume", "auto"]:
        """What the jobs call it."""
        return "resume" if self.resume else "auto" if self.auto_resume else "no"


def launched(
    arguments: list[str], devices: int | None, nodes: str | None, settings: "Config"
) -> int | None:
    """The exit code of the processes that these flags ask for; None where this process is to do
    the work, alone or as one of them."""
    if devices is None and nodes is None:
        return None
    # Of those that srun starts with --nodes, each is a launcher; torchrun's are processes.
    if from_environment().size > 1 and (nodes is None or "RANK" in os.environ):
        return None
    if sys.platform == "win32":
        raise ConfigError("--devices and --nodes need Linux or macOS", "leave them out")
    else:
        from gptcli.cli.launch import launch, nodes_of

        machines, each = nodes_of(nodes), devices or 1
        if machines.count * each == 1:
            return None
        return launch(
            _without(arguments, ("--devices", "--nodes")),
            each,
            machines,
            settings.training.device,
            settings.distributed.timeout_seconds,
        )


def _without(arguments: list[str], flags: tuple[str, ...]) -> list[str]:
    """`arguments` less these flags and their values."""
    left, skip = list[str](), False
    for argument in arguments:
        if not skip and argument not in flags and argument.partition("=")[0] not in flags:
            left.append(argument)
        skip = argument in flags
    return left


def load_run_config(
    command: str, reference: str, overrides: list[str] | None, max_time: str | None
) -> "LoadedConfig":
    """The checked config of a training command; `max_time` wins over the file and --set."""
    from gptcli.config.load import load_config

    if is_text(reference):
        dry = " --dry-run" if command == "plan" else ""
        raise ConfigError(
            f"{reference}: gpt {command} takes a YAML config, not a text",
            f"to train a new model on a text: gpt pretrain {reference}{dry}",
        )
    try:
        return load_config(reference, all_overrides(overrides, max_time))
    except ConfigError as error:
        ending = Path(reference).suffix.lower()
        if error.hint is None and ending not in ("", ".yaml", ".yml", ".json"):
            error.hint = "a config ends in .yaml; a text to train on in .txt, .md, .jsonl or .csv"
        raise


def all_overrides(overrides: list[str] | None, max_time: str | None) -> list[str]:
    """--set and --max-time, which wins."""
    limits = [f"training.max_time={max_time}"] if max_time is not None else []
    return [*(overrides or []), *limits]


def is_text(reference: str) -> bool:
    """Whether CONFIG names a text, or a directory of texts, and not a config."""
    from gptcli.config.shipped import shipped_config

    ending = Path(reference).suffix.lower()
    if ending in (".yaml", ".yml"):
        return False
    if os.path.isdir(reference):
        has_config = os.path.isfile(os.path.join(reference, "config.yaml"))
        return not has_config and shipped_config(reference) is None
    if not ending:
        return False
    with starting():
        from gptcli.data.files import is_text_name  # imports what takes seconds

    return is_text_name(reference)


def text_overrides(reference: str) -> list[str]:
    """The keys that a text as CONFIG stands for: the run's name and what it is trained on."""
    stem = Path(os.path.abspath(reference)).name
    if not os.path.isdir(reference):
        stem = re.sub(r"\.(gz|zst|xz)$", "", stem, flags=re.IGNORECASE)
        stem = stem.rpartition(".")[0]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.")[:60]
    return [f"name={name or 'text'}", f"data.train={json.dumps(reference)}"]


def end_run(result: "RunResult") -> int:
    """Print where the run is and how it ended; returns the exit code."""
    write_out(f"{result.run_dir}\n")
    if result.report is not None:
        write_out(f"{result.report}\n")
    if result.tasks:
        rows = [["TASK", "BEFORE", "AFTER", "ROWS"]]
        rows += [
            [name, *(_figure(about.get(key)) for key in ("before", "after", "rows"))]
            for name, about in result.tasks.items()
        ]
        write_out(columns(rows, right=frozenset({1, 2, 3})))
    if result.status == "stopped":
        number = result.signal
        by = f" by {number.name}" if number else ""
        if from_environment().leads:
            write_error(f"stopped{by} at step {result.step}; to continue: {result.resume_command}")
        return stop.EXIT_CODES[number] if number else 0
    summary = f"finished at step {result.step}"
    if result.scores is not None:
        summary += (
            f": validation {result.scores.bits_per_byte:.4f} bits/byte,"
            f" perplexity {result.scores.perplexity:.2f}"
        )
    log.info(summary)
    return 0


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
