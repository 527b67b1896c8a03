"""`gpt runs compare`: which of several models predicts the same text better."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from gptcli.cli.invocation import invocation
from gptcli.cli.terminal import columns, write_out
from gptcli.errors import ConfigError

log = logging.getLogger("gptcli")


def compare_runs(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(metavar="A B [C]...", help="Runs or their names, or any other MODEL."),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="SOURCE", help="What to score. [the validation part they share]"
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, metavar="N", help="Score at most this many."),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="Write a report here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report.")] = False,
) -> int:
    """Compare models on the same documents, by a paired test.

    Their settings and what they cost are shown too. Bits per byte compare models of different
    tokenizers too. Several models are ranked, and each is tested against the best, with intervals
    that allow for the choice of the best.
    """
    if len(models) < 2:
        raise ConfigError(
            "a comparison needs two models", hint="gpt runs compare A B; gpt runs list"
        )
    from gptcli.compare import compare
    from gptcli.reports.comparison import comparison_tables, pairs_of
    from gptcli.reports.report import eval_report_json

    call = invocation(context)
    with call.display.live():
        result = compare(
            models, data=data, max_tokens=max_tokens, run_dir=run_dir, command=call.command
        )
    if as_json:
        write_out(eval_report_json(result.report))
    else:
        comparison = result.report["comparison"]
        for table in comparison_tables(comparison):
            numbers = frozenset(range(1, len(table.columns)))
            write_out(columns([table.columns, *table.rows], right=numbers))
            write_out(f"{table.note}\n\n" if table.note else "\n")
        for pair in pairs_of(comparison):
            write_out(f"{pair['verdict']}\n")
        for note in comparison["notes"]:
            log.info(f"note: {note}")
    if result.directory is not None:
        log.info(f"report: {result.directory}")
    return 0
