"""`gpt runs`: what lies under the runs directory, and what goes on there."""

import logging
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import typer

from gptcli.cli.compare_command import compare_runs
from gptcli.cli.eval_tables import score_rows
from gptcli.cli.terminal import columns, takes_colours, write_error, write_out
from gptcli.errors import CheckpointError
from gptcli.runs.run_dir import is_run_dir, newest_run, runs_root

log = logging.getLogger("gptcli")

RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="RUN", help="A run directory or its name. [the newest]"),
]

_SHOWN_SCORES = ("bits_per_byte_ci95", "loss", "perplexity", "accuracy")
PLOT_SIZE = (78, 18)  # columns and lines where no terminal says

runs_app = typer.Typer(
    name="runs",
    help="List, show, compare and end runs.",
    rich_markup_mode=None,
    no_args_is_help=False,
)


@runs_app.command("list")
def list_runs() -> int:
    """List the runs, the oldest first.

    Those under runs/; GPT_RUNS chooses another directory. A run that says it is running but that no
    process works in was killed.
    """
    from gptcli.reports.runs_table import RIGHT, runs_rows
    from gptcli.runs import listing

    runs = listing.list_runs(runs_root())
    if not runs:
        write_error(f"no runs in {runs_root()}")
        return 0
    write_out(columns(runs_rows(runs, datetime.now(timezone.utc)), right=RIGHT))
    return 0


@runs_app.command("show")
def show_run(run: RunArgument = None) -> int:
    """Show one run: how far it is and how fast, its scores and loss."""
    from gptcli.reports.runs_table import run_facts
    from gptcli.reports.terminal_plot import loss_plot
    from gptcli.runs.listing import summarise
    from gptcli.runs.metrics import read_metrics

    summary = summarise(find_run(run))
    facts = run_facts(summary)
    scores = summary.about.get("scores")
    if isinstance(scores, dict) and summary.status not in ("running", "killed"):
        facts += score_rows({f"val {key}": scores.get(key) for key in _SHOWN_SCORES})
    write_out(columns(facts))
    width, height = shutil.get_terminal_size(PLOT_SIZE)
    size = (
        (min(width, 120) - 1, min(height - 1, PLOT_SIZE[1])) if sys.stdout.isatty() else PLOT_SIZE
    )
    colour = takes_colours()
    plot = loss_plot(read_metrics(summary.path), *size, colour=colour)
    write_out(f"\n{plot}" if plot else "", raw=colour)  # of numbers and our own words alone
    return 0


@runs_app.command("report")
def report_run(run: RunArgument = None) -> int:
    """Write a run's report.json, report.md and report.html again."""
    from gptcli.reports.report import write_report

    path = find_run(run)
    write_report(path)
    for name in ("report.html", "report.md", "report.json"):
        write_out(f"{path / name}\n")
    return 0


@runs_app.command("tail")
def tail_run(
    run: RunArgument = None,
    lines: Annotated[
        int, typer.Option("-n", min=0, metavar="N", help="Begin with this many lines.")
    ] = 10,
) -> int:
    """Follow the log of a run that another process trains.

    A run that is stopped or killed meanwhile is waited for half a minute, and followed on where it
    is resumed. Ctrl-C ends the following, not the run.
    """
    from gptcli.runs.follow import follow
    from gptcli.runs.listing import summarise

    path = find_run(run)
    for line in follow(path, lines):
        write_out(line + "\n")
    summary = summarise(path)
    at = "" if summary.step is None else f" at step {summary.step}"
    write_error(f"{path}: {summary.status}{at}")
    return 0


@runs_app.command("stop")
def stop_run(
    run: RunArgument = None,
    save: Annotated[
        bool,
        typer.Option(
            "--save/--no-save", help="Let it save first; or kill it, for one that does not answer."
        ),
    ] = True,
) -> int:
    """Ask the process that trains a run to save and stop.

    The process must be one of this machine. Ctrl-C ends the waiting; the run stops all the same.
    """
    from gptcli.runs import holder
    from gptcli.runs.listing import checkpoint_names, summarise

    path = find_run(run)
    asked = holder.stop_run(path, save=save)
    summary = summarise(path)
    saved = checkpoint_names(path)
    write_out(
        f"{path}: {summary.status}, {asked} ended;"
        f" {f'the newest checkpoint is {saved[-1]}' if saved else 'there is no checkpoint'}\n"
    )
    return 0


@runs_app.command("prune")
def prune_runs(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Of these runs only. [all]")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what is listed.")] = False,
) -> int:
    """List what can be removed, and what that frees; --yes does it.

    That is: runs that --overwrite moved aside, runs that failed before their first logged step, and
    checkpoints but for a run's best, its last and the last before the decay. A run that is in use
    is left alone.
    """
    from gptcli.reports.text import size
    from gptcli.runs.listing import list_runs as every_run
    from gptcli.runs.prune import removable, remove

    paths = [find_run(r) for r in runs] if runs else [r.path for r in every_run(runs_root())]
    found = removable(paths)
    if not found:
        write_error("nothing to remove")
        return 0
    done = [not yes or remove(one) for one in found]
    rows = [
        ["removed" if yes else "would remove", size(one.bytes), str(one.path), one.reason]
        for one, gone in zip(found, done, strict=True)
        if gone
    ]
    total = sum(one.bytes for one, gone in zip(found, done, strict=True) if gone)
    write_out(columns([*rows, ["in all", size(total), "", ""]], right=frozenset({1})))
    if not yes:
        log.info("nothing is removed yet; to remove it, add --yes")
    return 0 if all(done) else 6


@runs_app.command("verify")
def verify_runs(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="Which. [the newest]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a finding.")] = False,
) -> int:
    """Check that nothing of a run is lost or damaged.

    Every file of its checkpoints by its hash, every model by loading it, the log by its steps.
    Changes nothing; exit code 4 if something is.
    """
    from gptcli.runs.run_dir import json_bytes
    from gptcli.verify import Finding, mending, verify_run

    found, hints = list[Finding](), list[str]()
    for path in [find_run(run) for run in runs] if runs else [find_run(None)]:
        whole = len(found)
        for one in verify_run(path):
            found.append(one)
            if as_json:
                line = {"run": str(path), "what": one.what, "verdict": one.verdict}
                write_out(json_bytes({**line, "text": one.text}).decode() + "\n")
            else:
                write_out(f"{one.verdict:<5} {path / one.what}: {one.text}\n")
        hints += mending(path, found[whole:])
    bad = sum(one.verdict == "bad" for one in found)
    if bad:
        raise CheckpointError(f"{bad} of {len(found)} findings are bad", "\n".join(hints) or None)
    log.info(f"all is well: {len(found)} findings")
    return 0


runs_app.command("compare")(compare_runs)


def find_run(reference: str | None) -> Path:
    """The run directory meant: a path, a name under the runs root, or None for the newest."""
    if reference is None:
        path = newest_run(runs_root(), having_checkpoint=False)
        if path is None:
            raise CheckpointError(f"no runs in {runs_root()}", "gpt pretrain small")
        return path
    for path in (Path(reference), runs_root() / reference):
        if is_run_dir(path):
            return path
    raise CheckpointError(f"{reference}: no such run", "gpt runs list")
