"""`gpt pretrain`: train a model from scratch on text."""

import typer

from gptcli.cli.invocation import invocation
from gptcli.cli.run_flags import (
    AutoResumeOption,
    ConfigArgument,
    DataChangeOption,
    DryRunOption,
    MaxTimeOption,
    OverwriteOption,
    ResumeOption,
    RunDirOption,
    RunFlags,
    SetOption,
    end_run,
    load_run_config,
)
from gptcli.cli.terminal import write_out


def pretrain(
    context: typer.Context,
    config: ConfigArgument,
    overrides: SetOption = None,
    run_dir: RunDirOption = None,
    resume: ResumeOption = False,
    auto_resume: AutoResumeOption = False,
    overwrite: OverwriteOption = False,
    allow_data_change: DataChangeOption = False,
    max_time: MaxTimeOption = None,
    dry_run: DryRunOption = False,
) -> int:
    """Train a model from scratch.

    Prints the run directory and its report. Stopped by Ctrl-C or a signal it saves first, and
    prints the command that continues.
    """
    flags = RunFlags(run_dir, resume, auto_resume, overwrite, allow_data_change)
    loaded = load_run_config("pretrain", config, overrides, max_time)
    from gptcli.pretrain import describe
    from gptcli.pretrain import pretrain as run

    if dry_run:
        write_out(describe(loaded.config).rstrip("\n") + "\n")
        return 0
    call = invocation(context)
    with call.display.live():
        result = run(
            loaded.config,
            run_dir=flags.run_dir,
            resume=flags.mode,
            overwrite=flags.overwrite,
            allow_data_change=flags.allow_data_change,
            command=call.command,
        )
    return end_run(result)
