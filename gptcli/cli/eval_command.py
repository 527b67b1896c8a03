"""`gpt eval`: score a model on held-out text, or on the rows of a task."""

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli.cli.invocation import invocation
from gptcli.cli.run_flags import AllowCodeOption, ModelOption
from gptcli.cli.terminal import columns, write_out
from gptcli.errors import ConfigError

log = logging.getLogger("gptcli")

MOST_LABELS = 12  # of a confusion matrix in a terminal; reports have larger ones


def evaluate(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A YAML whose eval: section is used.")
    ] = None,
    model: ModelOption = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="SOURCE", help="What to score. [the held-out part]"),
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", metavar="N", help="Tokens between windows.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", help="Score at most this many.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            metavar="int8|fp16|bf16",
            help="Score with smaller weights too, and show what that changes.",
        ),
    ] = None,
    task: Annotated[
        bool,
        typer.Option(
            "--task", help="Score the finetuning task of CONFIG, else that of the model's own run."
        ),
    ] = False,
    allow_code: AllowCodeOption = False,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="Write the report here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report.")] = False,
) -> int:
    """Score a model: loss, perplexity, bits per byte, accuracy; with --task what it answers.

    Without --data the model's own held-out part is scored. Reports, and with --task all
    predictions, go below the model's run directory; bits per byte compare across tokenizers.
    """
    from gptcli.cli.section_flags import with_flags
    from gptcli.config.load import load_config

    base = load_config(config).config
    flags = {"model": model, "stride": stride, "max_tokens": max_tokens, "quantize": quantize}
    section = with_flags(base.eval, flags)
    settings = base.model_copy(update={"eval": section})
    call = invocation(context)
    if task:
        _refuse(stride=stride, max_tokens=max_tokens, quantize=quantize)
        from gptcli.evaluate_task import evaluate_task

        with call.display.live():
            result = evaluate_task(
                None if config is None else settings,
                model=model,
                data=data,
                run_dir=run_dir,
                allow_code=allow_code,
                command=call.command,
            )
    else:
        if allow_code:
            raise ConfigError("--allow-code-execution is for --task")
        from gptcli.evaluate import evaluate as run

        with call.display.live():
            result = run(settings, data=data, run_dir=run_dir, command=call.command)
    if as_json:
        write_out(json.dumps(result.report, indent=2) + "\n")
    elif task:
        write_out("\n".join(task_tables(result.report)))
    elif "quantized" in result.report:
        write_out(columns(comparison_rows(result.report), right=frozenset({1, 2, 3})))
    else:
        write_out(columns(score_rows(result.report["scores"]), right=frozenset({1})))
    if result.directory is not None:
        log.info(f"report: {result.directory}")
    return 0


def _refuse(**flags: Any) -> None:
    """ConfigError for flags that only scores of text have."""
    for name, value in flags.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is for text, not for --task")


def task_tables(report: dict[str, Any]) -> list[str]:
    """What a terminal shows of an evaluation on a task: the scores with their intervals, and where
    there are labels the confusion matrix."""
    rows = [["", "", "95 % interval", "baseline", "rows"]]
    for name, entry in report["tasks"].items():
        interval = " to ".join(f"{v:.4f}" for v in entry.get("value_ci95") or []) or "-"
        baseline = f"{entry['baseline']:.4f}" if "baseline" in entry else "-"
        rows.append([name, f"{entry['value']:.4f}", interval, baseline, str(entry["rows"])])
    tables = [columns(rows, right=frozenset({1, 3, 4}))]
    labels, confusion = report["task"]["labels"], report["task"]["confusion"]
    if confusion is not None and len(labels) <= MOST_LABELS:
        head = ["label, predicted as:", *labels]
        counts = [[label, *map(str, row)] for label, row in zip(labels, confusion, strict=True)]
        tables.append(columns([head, *counts], right=frozenset(range(1, len(head)))))
    return tables


def comparison_rows(report: dict[str, Any]) -> list[list[str]]:
    """Scores and memory of the weights: before, after, and the change where there is one."""
    about, after = report["quantized"], report["scores"]
    before = about["scores_before"]
    rows = [["", "before", about["kind"], "change"]]
    for old, new in zip(score_rows(before), score_rows(after), strict=True):
        pair = before[old[0]], after[old[0]]
        numbers = all(isinstance(value, float) for value in pair) and pair[0]
        rows.append([*old, new[1], f"{pair[1] / pair[0] - 1:+.2%}" if numbers else ""])
    sizes = about["weight_bytes_before"], about["weight_bytes"]
    megabytes = [f"{size / 1e6:.1f} MB" for size in sizes]
    return [*rows, ["weights", *megabytes, f"{sizes[1] / sizes[0] - 1:+.2%}"]]


def score_rows(scores: dict[str, Any]) -> list[list[str]]:
    """The scores of a report as rows of name and value."""
    rows = []
    for name, value in scores.items():
        if isinstance(value, (list, tuple)):
            shown = " to ".join(f"{v:.4f}" for v in value)
        elif isinstance(value, float):
            shown = f"{value:.4f}"
        else:
            shown = "-" if value is None else str(value)
        rows.append([name, shown])
    return rows
