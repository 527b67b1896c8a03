"""`gpt eval`: score a model on held-out text."""

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli.cli.invocation import invocation
from gptcli.cli.run_flags import ModelOption
from gptcli.cli.terminal import columns, write_out

log = logging.getLogger("gptcli")


def evaluate(
    context: typer.Context,
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="A YAML whose eval: section is used.")
    ] = None,
    model: ModelOption = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="SOURCE", help="Text to score. [the held-out part]"),
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
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="Write the report here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report.")] = False,
) -> int:
    """Score a model: loss, perplexity, bits per byte, accuracy.

    Without --data the model's own held-out text is scored. Reports go below the model's run
    directory; bits per byte compare across tokenizers.
    """
    from gptcli.cli.section_flags import with_flags
    from gptcli.config.load import load_config

    base = load_config(config).config
    flags = {"model": model, "stride": stride, "max_tokens": max_tokens, "quantize": quantize}
    section = with_flags(base.eval, flags)
    settings = base.model_copy(update={"eval": section})
    from gptcli.evaluate import evaluate as run

    call = invocation(context)
    with call.display.live():
        result = run(settings, data=data, run_dir=run_dir, command=call.command)
    if as_json:
        write_out(json.dumps(result.report, indent=2) + "\n")
    elif "quantized" in result.report:
        write_out(columns(comparison_rows(result.report), right=frozenset({1, 2, 3})))
    else:
        write_out(columns(score_rows(result.report["scores"]), right=frozenset({1})))
    if result.directory is not None:
        log.info(f"report: {result.directory}")
    return 0


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
