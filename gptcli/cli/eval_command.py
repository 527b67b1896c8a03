"""`gpt eval`: score a model on text or on a task, or measure what it knows by heart or prefers."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.eval_tables import tables
from gptcli.cli.invocation import invocation
from gptcli.cli.run_flags import (
    AllowCodeOption,
    DevicesOption,
    ModelOption,
    NodesOption,
    launched,
)
from gptcli.cli.starting import starting
from gptcli.cli.terminal import write_out
from gptcli.errors import ConfigError
from gptcli.world import from_environment

if TYPE_CHECKING:
    from gptcli.config.schema import Config, EvalConfig
    from gptcli.evaluation.result import Evaluation

log = logging.getLogger("gptcli")

# The ways to score -> the flags that one takes, beside CONFIG, --model, --run-dir and --json.
_FLAGS_OF = {
    "text": ("data", "stride", "max_tokens", "quantize"),
    "--task": ("data", "shots", "allow_code_execution"),
    "--lm-eval": ("include_path", "limit", "shots"),
    "--memorization": ("data", "limit"),
    "--pairs": (),
}

ConfigArgument = Annotated[
    str | None, typer.Argument(metavar="CONFIG", help="A YAML whose eval: section is used.")
]
DataOption = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="SOURCE", help="What to score. [the held-out part]"),
]
StrideOption = Annotated[
    int | None, typer.Option("--stride", metavar="N", help="Tokens between windows.")
]
MaxTokensOption = Annotated[
    int | None, typer.Option("--max-tokens", metavar="N", help="Score at most this many.")
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="int8|fp16|bf16",
        help="Score with smaller weights too, and show what that changes.",
    ),
]
TaskOption = Annotated[
    bool,
    typer.Option(
        "--task", help="Score the finetuning task of CONFIG, else that of the model's own run."
    ),
]
ShotsOption = Annotated[
    int | None,
    typer.Option(
        "--shots",
        metavar="K",
        min=0,
        help="With --task or --lm-eval: put K examples from the training rows before each row.",
    ),
]
LmEvalOption = Annotated[
    str | None,
    typer.Option(
        "--lm-eval",
        metavar="TASKS",
        help="Score tasks of the lm-evaluation-harness: names or YAML files, with commas between"
        " them.",
    ),
]
IncludePathOption = Annotated[
    Path | None,
    typer.Option("--include-path", metavar="DIR", help="Own task files for --lm-eval."),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="N",
        min=1,
        help="Only N rows of each --lm-eval task, N passages of --memorization. [all, 256]",
    ),
]
MemorizationOption = Annotated[
    bool,
    typer.Option(
        "--memorization",
        help="Measure how much of its training text, and of planted canaries, the model knows by"
        " heart; with --data, of that text.",
    ),
]
PairsOption = Annotated[
    Path | None,
    typer.Option(
        "--pairs",
        metavar="FILE",
        help='Compare paired sentences, JSON lines {"a", "b", "group"}: which are likelier?',
    ),
]
EvalDirOption = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="Write the report here.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the whole report.")]


def evaluate(
    context: typer.Context,
    config: ConfigArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    stride: StrideOption = None,
    max_tokens: MaxTokensOption = None,
    quantize: QuantizeOption = None,
    task: TaskOption = False,
    shots: ShotsOption = None,
    allow_code: AllowCodeOption = False,
    lm_eval: LmEvalOption = None,
    include_path: IncludePathOption = None,
    limit: LimitOption = None,
    memorization: MemorizationOption = False,
    pairs: PairsOption = None,
    run_dir: EvalDirOption = None,
    as_json: JsonOption = False,
    devices: DevicesOption = None,
    nodes: NodesOption = None,
) -> int:
    """Score a model: loss, perplexity, bits per byte, accuracy.

    With --task what it answers, with --lm-eval tasks of the lm-evaluation-harness, with
    --memorization what it knows by heart, with --pairs which of two sentences it finds likelier.

    Without --data the model's own held-out part is scored. Reports, and with --task all
    predictions, go below the model's run directory; bits per byte compare across tokenizers.
    """
    from gptcli.cli.section_flags import with_flags
    from gptcli.config.load import load_config

    flags = {
        "data": data,
        "stride": stride,
        "max_tokens": max_tokens,
        "quantize": quantize,
        "shots": shots,
        "allow_code_execution": allow_code or None,
        "include_path": include_path,
        "limit": limit,
    }
    chosen: dict[str, Any] = {"--task": task or None, "--lm-eval": lm_eval}
    chosen |= {"--memorization": memorization or None, "--pairs": pairs}
    way, what = _way(chosen, flags)
    settings = load_config(config).config
    _check_section(way, settings.eval)
    of_section = {"model": model, "stride": stride, "max_tokens": max_tokens, "quantize": quantize}
    settings = settings.model_copy(update={"eval": with_flags(settings.eval, of_section)})
    call = invocation(context)
    if way != "text":
        _check_alone(way, devices, nodes)
    code = launched(call.arguments, devices, nodes, settings)
    if code is not None:
        return code
    given = {name: flags[name] for name in _FLAGS_OF[way]}
    given |= {"model": model, "run_dir": run_dir, "command": call.command}
    with call.display.live():
        result = _evaluated(way, what, settings, given, own_task=config is None)
    return _show(result, as_json)


def _show(result: "Evaluation", as_json: bool) -> int:
    if as_json:
        from gptcli.reports.report import eval_report_json

        write_out(eval_report_json(result.report))
    else:
        write_out("\n".join(tables(result.report)))
    if result.directory is not None:
        log.info(f"report: {result.directory}")
    return 0


def _way(chosen: dict[str, Any], flags: dict[str, Any]) -> tuple[str, Any]:
    """The one way to score that is chosen, with its value, else `text`.

    ConfigError when there are two, or a flag is given that it does not take.
    """
    ways = [way for way, value in chosen.items() if value is not None] or ["text"]
    if len(ways) > 1:
        raise ConfigError(f"{ways[0]} and {ways[1]} do not go together: give one of them")
    way = ways[0]
    for name, value in flags.items():
        if value is not None and name not in _FLAGS_OF[way]:
            takers = [other for other, taken in _FLAGS_OF.items() if name in taken]
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} is not for {way}, but for {' and '.join(takers)}")
    return way, chosen.get(way)


def _check_alone(way: str, devices: int | None, nodes: str | None) -> None:
    """ConfigError where several processes are to score in a way that only one can."""
    if devices is not None or nodes is not None or from_environment().size > 1:
        raise ConfigError(
            f"{way} is scored by one process; --devices and torchrun are for perplexity",
            hint="leave them out",
        )


def _check_section(way: str, section: "EvalConfig") -> None:
    """ConfigError for keys of `eval:` that this way to score does not take; a warning for those
    that say how a training evaluates too, since CONFIG may be that of a training."""
    for name in ("data", "quantize", "stride", "max_tokens"):
        if getattr(section, name) is None or name in _FLAGS_OF[way]:
            continue
        if way == "--task" and name == "max_tokens":  # how much of the data is held out
            continue
        takers = [other for other, taken in _FLAGS_OF.items() if name in taken]
        said = f"eval.{name} is not for {way}, but for {' and '.join(takers)}"
        if name in ("data", "quantize"):
            raise ConfigError(said, hint="leave it out of CONFIG")
        log.warning(f"{said}: it changes nothing here")


def _evaluated(
    way: str, what: Any, settings: "Config", given: dict[str, Any], own_task: bool
) -> "Evaluation":
    """What the job of that way returns. `own_task`: no CONFIG is given that names a task."""
    if way == "--lm-eval":
        names = [name.strip() for name in what.split(",") if name.strip()]
        if not names:
            raise ConfigError("--lm-eval names no task")
        os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported: no bars into pipes and logs
        from gptcli.evaluate_lm_eval import evaluate_lm_eval

        return evaluate_lm_eval(settings, names, **given)
    if way == "--memorization":
        from gptcli.evaluate_memorization import evaluate_memorization

        return evaluate_memorization(settings, passages=given.pop("limit"), **given)
    if way == "--pairs":
        from gptcli.evaluate_pairs import evaluate_pairs

        return evaluate_pairs(settings, what, **given)
    if way == "--task":
        with starting():
            from gptcli.evaluate_task import evaluate_task

        allow_code = bool(given.pop("allow_code_execution"))
        return evaluate_task(None if own_task else settings, allow_code=allow_code, **given)
    with starting():
        from gptcli.evaluate import evaluate as evaluate_text

    given = {name: given[name] for name in ("data", "run_dir", "command")}  # the rest is in eval:
    return evaluate_text(settings, **given)
