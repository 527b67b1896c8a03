"""The console entry `gpt`: the commands, the global flags, and the one place that catches errors.

Only the module of the command that is asked for is imported, for help those of all, and a command
imports its job, and with it torch, when it runs: help, usage errors and config errors come at once.
"""

import errno
import importlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli import __version__, stop
from gptcli.cli import signals
from gptcli.cli.display import Display
from gptcli.cli.invocation import Invocation, invocation
from gptcli.cli.terminal import (
    ClosedPipeError,
    prepare_streams,
    settle_stdout,
    write_error,
    write_out,
)
from gptcli.errors import ConfigError, GptError, LostRankError, ResourceError
from gptcli.world import end_with_launcher, from_environment

EXIT_CODES_HELP = """Exit codes: 0 done; 1 a bug; 2 usage or config; 3 data or tokenizer;
4 checkpoint or model; 5 non-finite training; 6 memory, disk or device;
129, 130, 143 stopped by SIGHUP, Ctrl-C, SIGTERM after saving."""

# No space, quota (of a disk, or of one file), memory or file handles left: no bug, wherever.
_EXHAUSTED = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.ENOMEM, errno.EMFILE, errno.ENFILE),
)

_UNPARSED = re.compile(r"Input should be a valid (?:number|integer), unable to parse .*")

# Each command's function in its module, or group of commands; in the order of `gpt --help`.
_COMMANDS = {
    "pretrain": ("pretrain_command", "pretrain"),
    "finetune": ("finetune_command", "finetune"),
    "generate": ("generate_command", "generate"),
    "serve": ("serve_command", "serve"),
    "chat": ("chat_command", "chat"),
    "eval": ("eval_command", "evaluate"),
    "explain": ("explain_command", "explain"),
    "plan": ("plan_command", "plan"),
    "export": ("export_command", "export_model"),
    "import": ("import_command", "import_model"),
    "doctor": ("doctor_command", "doctor"),
    "completion": ("completion_command", "completion"),
}
_GROUPS = {
    "runs": ("runs_command", "runs_app"),
    "config": ("config_command", "config_app"),
    "tokenizer": ("tokenizer_command", "tokenizer_app"),
    "data": ("data_command", "data_app"),
}


def _set_debug(context: typer.Context, value: bool) -> bool:
    invocation(context).debug |= value
    return value


def _set_quiet(context: typer.Context, value: bool) -> bool:
    invocation(context).display.quiet |= value
    return value


def _print_version(value: bool) -> None:
    if value:
        write_out(f"gptcli {__version__}\n")
        raise typer.Exit


def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", callback=_set_debug, expose_value=False, help="Show tracebacks of errors."
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet", callback=_set_quiet, expose_value=False, help="Only warnings and errors."
        ),
    ] = False,
) -> None:
    """Pretrain, finetune, generate with and evaluate GPT language models from YAML configs."""
    if context.invoked_subcommand is None:
        from gptcli.cli.welcome import next_steps

        write_out(next_steps(Path()))


def main(argv: list[str] | None = None) -> int:
    """Run `gpt` with `argv` (default: the process's arguments) and return its exit code."""
    call = Invocation([], Display())
    stop.reset()
    with call.display.attached(), signals.installed(), _only_rank_0_speaks(call.display):
        try:
            prepare_streams()
            end_with_launcher()
            call.arguments = _decodable(sys.argv[1:] if argv is None else argv)
            if "GPT_COMPLETE" in os.environ:
                return _complete(call.arguments, os.environ["GPT_COMPLETE"])
            code = _command(call.arguments).main(
                call.arguments, prog_name="gpt", standalone_mode=False, obj=call
            )
            write_out("")  # a stdout that fails only now must not fail silently at exit
            return code if isinstance(code, int) else 0
        except (Exception, SystemExit) as error:  # the one boundary: everything ends here
            return _report(error, call.debug or os.environ.get("GPT_DEBUG") == "1")
        finally:
            settle_stdout()


@contextmanager
def _only_rank_0_speaks(display: Display) -> Iterator[None]:
    """Of several processes of one job, rank 0 shows what there is to show, errors of others too."""
    if from_environment().leads:
        yield
        return
    display.setLevel(logging.CRITICAL)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def _command(arguments: list[str]) -> Any:
    """The command tree in which every command also takes the global flags; of the first level, the
    one command that `arguments` name, or all; without arguments none."""
    app = typer.Typer(
        name="gpt",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=EXIT_CODES_HELP,
        callback=root,
    )
    name = next((word for word in arguments if not word.startswith("-")), None)
    places = _COMMANDS | _GROUPS
    alone = name is None and not {"-h", "--help"} & {*arguments}
    wanted = () if alone else (name,) if name in places else tuple(places)
    for place in wanted:
        module, attribute = places[place]
        found = getattr(importlib.import_module(f"gptcli.cli.{module}"), attribute)
        if place in _COMMANDS:
            app.command(place)(found)
        else:
            app.add_typer(found, name=place)
    # A single command would be the whole program: what is asked for is its group.
    group = typer.main.get_group(app)
    shared = [option for option in group.params if option.name in ("debug", "quiet")]
    pending = list(group.commands.values())
    while pending:
        command = pending.pop()
        command.params.extend(shared)
        pending.extend(getattr(command, "commands", {}).values())
    return group


def _complete(arguments: list[str], shell: str) -> int:
    """Print what can end the command line that a shell's completion gives."""
    from gptcli.cli.completion import candidates

    found = candidates(" ".join(arguments), shell, [*_COMMANDS, *_GROUPS], _command)
    write_out("".join(f"{word}\n" for word in found))
    return 0


def _decodable(arguments: list[str]) -> list[str]:
    """`arguments` as valid Unicode: bytes that are no UTF-8 become U+FFFD, with a warning."""
    good = [a.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for a in arguments]
    for before, after in zip(arguments, good, strict=True):
        if before != after:
            write_error(f"warning: argument {after!r} is not valid UTF-8; bad bytes replaced")
    return good


def _report(error: BaseException, debug: bool) -> int:
    """Say what went wrong on stderr, and return the exit code for it."""
    if isinstance(error, ClosedPipeError) or isinstance(error.__context__, BrokenPipeError):
        return 0  # Typer turns a pipe closed while it writes help into SystemExit
    if isinstance(error, stop.Stopped):
        number = error.signal or stop.requested()
        if from_environment().leads:
            write_error(f"stopped by {number.name}" if number else "stopped")
        return stop.EXIT_CODES[number] if number else 1
    known = error if isinstance(error, GptError) else _translated(error)
    if known is not None and not (from_environment().leads or isinstance(error, LostRankError)):
        return known.exit_code  # rank 0 says it
    if debug:
        write_error("".join(traceback.format_exception(error)))
    if known is None:
        text = " ".join(str(error).split())
        write_error(f"error: internal: {type(error).__name__}: {text}")
        if not debug:
            write_error("hint: run it again with --debug for the traceback, and report that")
        return 1
    for problem in known.problems if isinstance(known, ConfigError) else [known.message]:
        for line in problem.splitlines() or [""]:
            write_error(f"error: {line}")
    for line in (known.hint or "").splitlines():
        write_error(f"hint: {line}")
    return known.exit_code


def _translated(error: BaseException) -> GptError | None:
    """Errors of libraries that a user can cause, as ours; None for bugs."""
    # Usage errors are Click's in older Typers and Typer's own in newer ones.
    if hasattr(error, "format_message"):
        message = error.format_message().rstrip(".")
        context = getattr(error, "ctx", None)
        message = _UNPARSED.sub("expected a number", message)
        return ConfigError(message[:1].lower() + message[1:], _usage_hint(message, context))
    if isinstance(error, OSError) and error.errno in _EXHAUSTED:
        where = f"{error.filename}: " if error.filename else ""
        return ResourceError(f"{where}{error.strerror}")
    if _is_out_of_memory(error):
        return ResourceError(
            f"out of memory: {' '.join(str(error).split())[:200]}".removesuffix(": "),
            "a smaller training.micro_batch_size, model.block_size or model needs less",
        )
    return None


def _usage_hint(message: str, context: Any) -> str:
    """A command that helps: of an option that is a key of the config, how that is set."""
    if context is None:
        return "gpt --help"
    unknown = re.match(r"No such option:? '?--([\w-]+)", message)
    if unknown and any("--set" in param.opts for param in context.command.params):
        from gptcli.config.suggest import key_of_option

        key = key_of_option(unknown[1])
        if key is not None:
            return f"it is a key of the config: --set {key}=VALUE"
    return f"{context.command_path} --help"


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    return (
        isinstance(error, MemoryError)
        or (torch is not None and isinstance(error, torch.OutOfMemoryError))
        # The CPU allocator has no exception class of its own.
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error))
    )
