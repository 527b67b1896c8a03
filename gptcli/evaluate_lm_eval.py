"""Evaluation on tasks of the lm-evaluation-harness, its own or the user's."""

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.config.suggest import for_value
from gptcli.device import resolve_device
from gptcli.errors import ConfigError, DataError, GptError
from gptcli.evaluate import described, eval_directory, eval_precision
from gptcli.evaluation.result import Evaluation
from gptcli.reports.report import check_report_directory, write_eval_report
from gptcli.runs.load import load_model

log = logging.getLogger("gptcli")

_RESAMPLES = 1000  # for the standard errors of scores that are no means


def evaluate_lm_eval(
    config: Config,
    tasks: list[str],
    *,
    model: str | None = None,
    include_path: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    run_dir: Path | None = None,
    command: str = "",
) -> Evaluation:
    """Score MODEL on `tasks`: names that the harness knows or that the task files (YAML) below
    `include_path` have, or paths of such files.

    Task files are the user's programs: they may name Python that runs, and data on the hub. `limit`
    scores the first rows of each task, `shots` puts as many examples before each. The report goes
    to `run_dir`, else below the model's run. Raises ConfigError without the package lm-eval and for
    an unknown task, DataError for one that does not run, other GptErrors, `stop.Stopped`.
    """
    check_report_directory(run_dir)
    manager = _task_manager(tasks, include_path)
    _check_names(tasks, manager.all_tasks, include_path)
    device = resolve_device(config.training.device)
    loaded = load_model(model if model is not None else config.eval.model, device.torch)
    precision = eval_precision(config, loaded, device)
    from gptcli.evaluation.lm_eval_model import HarnessModel

    asked = HarnessModel(loaded.model, loaded.tokenizer, device, precision)
    names = ", ".join(tasks)
    log.info(f"scoring {loaded.path} on {names} by lm-eval {_version()}")
    found = _run(asked, tasks, manager, limit, shots)
    report = described(loaded, f"lm-eval: {names}", device, precision, command)
    report["lm_eval"] = {"version": _version(), "limit": limit, "scores": _scores(found)}
    about = f"lm-eval {names} limit {limit} shots {shots}"
    paths = [include_path, *(Path(task) for task in tasks if Path(task).is_file())]
    whole = [str(path.resolve()) for path in paths if path is not None]
    directory = eval_directory(loaded, run_dir, about, config.eval, whole)
    if directory is not None:
        write_eval_report(directory, report)
    return Evaluation(report, directory)


def _task_manager(tasks: list[str], include_path: Path | None) -> Any:
    """The harness's list of tasks: the user's alone where these have all `tasks`, since to read its
    own 14,000 files takes longer than many an evaluation."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--lm-eval needs the package lm-eval", hint="pip install 'gptcli[eval]'")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path {include_path}: no such directory")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what was asked for
    from lm_eval.tasks import TaskManager

    with _quiet():
        if include_path is None:
            return TaskManager()
        own = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(own.all_subtasks):
            return own
        return TaskManager(include_path=str(include_path))


def _check_names(tasks: list[str], known: list[str], include_path: Path | None) -> None:
    problems = []
    for name in tasks:
        if name not in known and not (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
            near = for_value(name, known)
            meant = f"; did you mean {near!r}?" if near is not None else ""
            problems.append(f"--lm-eval: lm-eval knows no task {name!r}{meant}")
    if problems:
        hint = None if include_path else "own task files are found with --include-path DIR"
        raise ConfigError(problems, hint=hint)


def _run(
    asked: Any, tasks: list[str], manager: Any, limit: int | None, shots: int | None
) -> dict[str, Any]:
    """What the harness returns. DataError for whatever a task's file, code or data raise."""
    from lm_eval import simple_evaluate

    try:
        with _quiet():
            found: dict[str, Any] = simple_evaluate(
                model=asked,
                tasks=tasks,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=_RESAMPLES,
                log_samples=False,
                task_manager=manager,
            )
    except (GptError, stop.Stopped):
        raise
    except Exception as error:  # tasks are programs
        said = " ".join(str(error).split())[:400]
        raise DataError(
            f"lm-eval could not run {', '.join(tasks)}: {type(error).__name__}: {said}",
            hint="a task's data come from the hub, unless its file names local ones"
            " (dataset_path: json, dataset_kwargs: {data_files: ...})",
        ) from error
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the harness prints on stdout, and without processes forked off for its standard
    errors, which would inherit the threads of this one's model."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _scores(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each score of each task and group of tasks."""
    rows = []
    for task, scores in {**found["results"], **found.get("groups", {})}.items():
        for key, value in scores.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = scores.get(f"{metric}_stderr,{filtered}")
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": filtered,
                    "value": float(value),
                    "stderr": error if isinstance(error, float) else None,
                    "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
                    "shots": found["n-shot"].get(task),
                    "rows": found["n-samples"].get(task, {}).get("effective"),
                }
            )
    return rows


def _version() -> str:
    return importlib.metadata.version("lm_eval")
