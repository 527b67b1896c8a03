"""`gpt eval`: score a model on held-out text, or on the rows of a task."""

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.eval_tables import comparison_rows, lm_eval_rows, shown, task_tables, text_tables
from gptcli.cli.invocation import Invocation, invocation
from gptcli.cli.run_flags import AllowCodeOption, ModelOption
from gptcli.cli.terminal import columns, write_out
from gptcli.errors import ConfigError

if TYPE_CHECKING:
    from gptcli.config.schema import Config

log = logging.getLogger("gptcli")


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
    shots: Annotated[
        int | None,
        typer.Option(
            "--shots",
            metavar="K",
            min=0,
            help="With --task or --lm-eval: put K examples from the training rows before each row.",
        ),
    ] = None,
    allow_code: AllowCodeOption = False,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            help="Score tasks of the lm-evaluation-harness: names or YAML files, with commas"
            " between them.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option("--include-path", metavar="DIR", help="Own task files for --lm-eval."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            min=1,
            help="Only N rows of each --lm-eval task, N passages of --memorization. [all, 256]",
        ),
    ] = None,
    memorization: Annotated[
        bool,
        typer.Option(
            "--memorization",
            help="Measure how much of its training text, and of planted canaries, the model knows"
            " by heart; with --data, of that text.",
        ),
    ] = False,
    pairs: Annotated[
        Path | None,
        typer.Option(
            "--pairs",
            metavar="FILE",
            help='Compare paired sentences, JSON lines {"a", "b", "group"}: which are likelier?',
        ),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option("--run-dir", metavar="DIR", help="Write the report here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report.")] = False,
) -> int:
    """Score a model: loss, perplexity, bits per byte, accuracy; with --task what it answers, with
    --lm-eval tasks of the lm-evaluation-harness, with --memorization what it knows by heart, with
    --pairs which of two sentences it finds likelier.

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
    if memorization or pairs is not None:
        kind = "--memorization" if memorization else "--pairs"
        _refuse(f"not for {kind}", stride=stride, max_tokens=max_tokens, quantize=quantize)
        _refuse(f"not for {kind}", task=task or None, lm_eval=lm_eval, shots=shots)
        _refuse(f"not for {kind}", allow_code_execution=allow_code or None)
        _refuse(f"not for {kind}", include_path=include_path)
        if memorization:
            _refuse("not for --memorization", pairs=pairs)
            return _memorization(call, settings, model, data, limit, run_dir, as_json)
    if pairs is not None:
        _refuse("not for --pairs", data=data, limit=limit)
        return _pairs(call, settings, pairs, model, run_dir, as_json)
    if lm_eval is not None:
        _refuse("not for --lm-eval", stride=stride, max_tokens=max_tokens, quantize=quantize)
        _refuse("not for --lm-eval", data=data, task=task or None)
        _refuse("for --task", allow_code_execution=allow_code or None)
        return _lm_eval(
            call, settings, lm_eval, model, include_path, limit, shots, run_dir, as_json
        )
    _refuse("for --lm-eval", include_path=include_path, limit=limit)
    if task:
        _refuse("for text, not for --task", stride=stride, max_tokens=max_tokens, quantize=quantize)
        from gptcli.evaluate_task import evaluate_task

        with call.display.live():
            result = evaluate_task(
                None if config is None else settings,
                model=model,
                data=data,
                run_dir=run_dir,
                shots=shots,
                allow_code=allow_code,
                command=call.command,
            )
    else:
        _refuse("for --task", allow_code_execution=allow_code or None)
        _refuse("for --task and --lm-eval", shots=shots)
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
        write_out("\n".join(text_tables(result.report)))
    if result.directory is not None:
        log.info(f"report: {result.directory}")
    return 0


def _refuse(kind: str, **flags: Any) -> None:
    """ConfigError for flags that are given, but are `kind`: for something else."""
    for name, value in flags.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} is {kind}")


def _lm_eval(
    call: Invocation,
    settings: "Config",
    tasks: str,
    model: str | None,
    include_path: Path | None,
    limit: int | None,
    shots: int | None,
    run_dir: Path | None,
    as_json: bool,
) -> int:
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--lm-eval names no task")
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported: no bars into pipes and logs
    from gptcli.evaluate_lm_eval import evaluate_lm_eval

    with call.display.live():
        result = evaluate_lm_eval(
            settings,
            names,
            model=model,
            include_path=include_path,
            limit=limit,
            shots=shots,
            run_dir=run_dir,
            command=call.command,
        )
    if as_json:
        write_out(json.dumps(result.report, indent=2) + "\n")
    else:
        write_out(columns(lm_eval_rows(result.report["lm_eval"]), right=frozenset({2, 3, 4, 5})))
    if result.directory is not None:
        log.info(f"report: {result.directory}")
    return 0


def _memorization(
    call: Invocation,
    settings: "Config",
    model: str | None,
    data: list[str] | None,
    limit: int | None,
    run_dir: Path | None,
    as_json: bool,
) -> int:
    from gptcli.evaluate_memorization import evaluate_memorization

    with call.display.live():
        result = evaluate_memorization(
            settings,
            model=model,
            data=data,
            run_dir=run_dir,
            passages=limit,
            command=call.command,
        )
    return _show_privacy(result.report, result.directory, as_json)


def _pairs(
    call: Invocation,
    settings: "Config",
    path: Path,
    model: str | None,
    run_dir: Path | None,
    as_json: bool,
) -> int:
    from gptcli.evaluate_pairs import evaluate_pairs

    with call.display.live():
        result = evaluate_pairs(settings, path, model=model, run_dir=run_dir, command=call.command)
    return _show_privacy(result.report, result.directory, as_json)


def _show_privacy(report: dict[str, Any], directory: Path | None, as_json: bool) -> int:
    from gptcli.reports.privacy import privacy_tables

    if as_json:
        write_out(json.dumps(report, indent=2) + "\n")
    else:
        write_out("\n".join(shown(table) for table in privacy_tables(report)))
    if directory is not None:
        log.info(f"report: {directory}")
    return 0
