"""`gpt finetune`: train a model further on the rows of a task."""

from typing import Annotated

import typer

from gptcli.cli.invocation import invocation
from gptcli.cli.run_flags import (
    AllowCodeOption,
    AutoResumeOption,
    ConfigArgument,
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
    end_run,
    launched,
    load_run_config,
)
from gptcli.cli.starting import starting
from gptcli.cli.terminal import write_out


def finetune(
    context: typer.Context,
    config: ConfigArgument,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="A run, checkpoint, Hugging Face folder or hub name to start from.",
        ),
    ] = None,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    resume: ResumeOption = False,
    auto_resume: AutoResumeOption = False,
    overwrite: OverwriteOption = False,
    allow_data_change: DataChangeOption = False,
    max_time: MaxTimeOption = None,
    dry_run: DryRunOption = False,
    allow_code: AllowCodeOption = False,
    devices: DevicesOption = None,
    nodes: NodesOption = None,
) -> int:
    """Train a model further on the rows of a task.

    The model is --model, else the config's init. Prints the run directory, its report, and the
    scores on held-out rows before and after.
    """
    flags = RunFlags(run_dir, resume, auto_resume, overwrite, allow_data_change)
    start = [f"init={model}"] if model is not None else []  # so init's rules hold for --model too
    loaded = load_run_config("finetune", config, [*(overrides or []), *start], max_time)
    with starting():
        from gptcli.finetune import describe
        from gptcli.finetune import finetune as run

    if dry_run:
        write_out(describe(loaded.config))
        return 0
    call = invocation(context)
    code = launched(call.arguments, devices, nodes, loaded.config)
    if code is not None:
        return code
    with call.display.live():
        result = run(
            loaded.config,
            run_dir=flags.run_dir,
            resume=flags.mode,
            overwrite=flags.overwrite,
            allow_data_change=flags.allow_data_change,
            allow_code=allow_code,
            command=call.command,
        )
    return end_run(result)
