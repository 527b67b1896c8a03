"""`gpt pretrain`: train a model from scratch on text."""

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli.invocation import Invocation, invocation
from gptcli.cli.run_flags import (
    AutoResumeOption,
    ConfigOrTextArgument,
    DataChangeOption,
    DevicesOption,
    DryRunOption,
    MaxTimeOption,
    NodesOption,
    OverwriteOption,
    ResumeOption,
    RunDirOption,
    RunFlags,
    SetOption,
    all_overrides,
    end_run,
    is_text,
    launched,
    load_run_config,
    text_overrides,
)
from gptcli.cli.starting import starting
from gptcli.cli.terminal import write_out
from gptcli.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from gptcli.config.schema import Config

log = logging.getLogger("gptcli")


def pretrain(
    context: typer.Context,
    config: ConfigOrTextArgument,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    resume: ResumeOption = False,
    auto_resume: AutoResumeOption = False,
    overwrite: OverwriteOption = False,
    allow_data_change: DataChangeOption = False,
    max_time: MaxTimeOption = None,
    dry_run: DryRunOption = False,
    devices: DevicesOption = None,
    nodes: NodesOption = None,
    prove: Annotated[
        bool,
        typer.Option(
            "--prove-resume",
            help="Train some steps twice, straight and killed again and again, and compare the"
            " results bit by bit.",
        ),
    ] = False,
) -> int:
    """Train a model from scratch.

    Prints the run directory and its report. Stopped by Ctrl-C or a signal it saves first, and
    prints the command that continues. For a text instead of a config, tokenizer, model and batch
    are chosen by its length and this machine's speed, for 5 minutes or --max-time.
    """
    began = time.monotonic()
    flags = RunFlags(run_dir, resume, auto_resume, overwrite, allow_data_change)
    if prove and (flags.mode != "no" or overwrite or dry_run):
        raise ConfigError("--prove-resume makes runs of its own: leave out the other flags for it")
    if is_text(config):
        settings, flags, plan = _for_text(config, all_overrides(overrides, max_time), flags, began)
    else:
        settings, plan = load_run_config("pretrain", config, overrides, max_time).config, []
    if prove:
        return _prove(settings, overrides or [], run_dir)
    if dry_run:
        from gptcli.pretrain import describe

        write_out("\n".join(plan or [describe(settings).rstrip("\n")]) + "\n")
        return 0
    call = invocation(context)
    code = launched(call.arguments, devices, nodes, settings)
    if code is not None:
        return code
    for line in plan:
        log.info(line)
    return _train(settings, flags, call, began)


def _train(settings: "Config", flags: RunFlags, call: Invocation, began: float) -> int:
    with starting():
        from gptcli.pretrain import pretrain as run

    with call.display.live():
        result = run(
            settings,
            run_dir=flags.run_dir,
            resume=flags.mode,
            overwrite=flags.overwrite,
            allow_data_change=flags.allow_data_change,
            command=call.command,
            began=began,
        )
    return end_run(result)


def _prove(settings: "Config", overrides: list[str], directory: Path | None) -> int:
    """Say whether killed runs of this config end as one that is not."""
    from gptcli.prove_resume import prove_resume

    asked = any(override.startswith("training.max_steps=") for override in overrides)
    proof = prove_resume(
        settings, steps=settings.training.max_steps if asked else None, directory=directory
    )
    tried = f"{proof.steps} steps straight, and killed {proof.training_kills} times while training"
    if starting := len(proof.kills) - proof.training_kills:
        tried += f", {starting} times while starting"
    write_out("".join(f"killed {where}\n" for where in proof.kills))
    if not proof.identical:
        raise CheckpointError(
            "\n".join([f"not bit-identical on this machine: {tried}", *proof.differences]),
            hint=f"both runs are in {proof.directory}",
        )
    write_out(f"bit-identical on this machine: {tried} (sha256 {proof.sha256[0]})\n")
    return 0


def _for_text(
    text: str, overrides: list[str], flags: RunFlags, began: float
) -> tuple["Config", RunFlags, list[str]]:
    """The config for a text: that of the run to resume, else one planned now; and its plan."""
    from gptcli.config.load import load_config

    given = [*text_overrides(text), *overrides]
    # Without a warmup until it is chosen: the usual one may be longer than a limit that is given.
    asked = load_config(None, ["schedule.warmup_steps=0", *given], base=text)
    if [source.path for source in asked.config.data.train] != [text]:
        raise ConfigError(f"--set data.train: the text to train on is {text}; leave it out")
    if flags.mode != "no":
        from gptcli.training.start import run_to_resume

        found = run_to_resume(asked.config.name, flags.run_dir, flags.mode)
        if found is not None:
            config = load_config(str(found / "config.yaml"), overrides).config
            _check_same_text(config, text, found)
            return config, replace(flags, run_dir=found), []
    with starting():
        from gptcli.text_recipe import plan_text

    plan = plan_text(asked, given, began)
    return plan.config, flags, plan.lines


def _check_same_text(config: "Config", text: str, run: Path) -> None:
    """CheckpointError unless the run of that config trains on the text."""
    trained = [source.path for source in config.data.train]
    if [os.path.realpath(path) for path in trained] != [os.path.realpath(text)]:
        raise CheckpointError(
            f"{run} is a run on {', '.join(trained)}, not on {text}",
            hint="name the run to go on with by --run-dir, or start one without --resume",
        )
