"""report.json, report.md and report.html of a run directory or of one evaluation."""

import json
import math
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptcli.errors import CheckpointError, ConfigError, ResourceError
from gptcli.reports.curves import best, curve, lines_of
from gptcli.reports.text import finite
from gptcli.runs.metrics import read_metrics, read_samples
from gptcli.runs.regular import refuse_special
from gptcli.runs.run_dir import is_run_dir, json_bytes, read_run_json, resume_line, write_atomic

# Keys that readers of report.json rely on: always there, null where unknown.
SCORE_KEYS = (
    "loss",
    "perplexity",
    "bits_per_byte",
    "bits_per_byte_ci95",
    "accuracy",
    "tokens",
    "bytes",
    "documents",
    "block_size",
    "stride",
)
TRAINING_KEYS = ("steps", "tokens", "seconds", "tokens_per_second", "parameters", "best_step")
# Parts of run.json that the report repeats as they are.
COPIED = ("machine", "choices", "versions", "seeds", "fingerprints", "timings", "skipped_text")
# Parts that only some runs have.
FOUND = ("surprising", "calibration", "breakdown", "attention")
_FILES = ("report.html", "report.md", "report.json", "predictions.jsonl")  # of an evaluation


@dataclass(frozen=True)
class RunFiles:
    """What a run directory says. Missing parts are empty and named in `problems`."""

    run: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    config: str | None
    problems: list[str]


def write_report(run_dir: Path) -> dict[str, Any]:
    """Write report.json, report.md and report.html of a run from its files; return the object.

    A run that still trains or was killed gets a report of what is there, with the rest named in
    `notes`. The same files give the same bytes. Raises CheckpointError when there is no such
    directory and ResourceError when the disk refuses.
    """
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir}: no such run directory")
    files = read_run(run_dir)
    report = build_report(run_dir, files)
    _write(run_dir, report, files)
    return report


def check_report_directory(directory: Path | None) -> None:
    """ConfigError unless the report of an evaluation can go to `directory`: one that is there or
    can be made, and not that of a training run, whose own report it would replace."""
    if directory is None:
        return
    if is_run_dir(directory):
        raise ConfigError(
            f"--run-dir {directory} is a training run, whose own report this would overwrite",
            hint="name a directory for this report, or leave out --run-dir",
        )
    for name in _FILES:
        refuse_special(directory / name)
    for path in (directory, *directory.parents):
        if path.is_dir():
            return
        if path.exists():
            raise ConfigError(f"--run-dir {directory}: {path} is not a directory")


def write_eval_report(directory: Path, report: dict[str, Any]) -> None:
    """Write the three files for scores on other data into `directory`, made if missing.

    `report` has the keys of report.json that apply: model, data, scores, tasks, and if known run
    (its name is the title), command, machine, versions. Raises ResourceError when the disk refuses.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot make {directory}: {error.strerror}") from error
    full = _complete(report)
    full["run"] = {"name": directory.name} | _mapping(full, "run")
    _write(directory, full, RunFiles({}, [], [], None, []))


def eval_report_json(report: dict[str, Any]) -> str:
    """The text of report.json that `write_eval_report` writes of a `report` with a title."""
    return _json(_complete(report))


def write_predictions(path: Path, predictions: list[dict[str, Any]]) -> None:
    """One JSON object a line. Raises ResourceError when the disk refuses."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    write_atomic(path, lines.encode("utf-8", "replace"))


def build_report(run_dir: Path, files: RunFiles) -> dict[str, Any]:
    """The object of report.json: run.json where it speaks, else what metrics.jsonl implies."""
    run = files.run
    evals = lines_of(files.metrics, "eval")
    scores = dict.fromkeys(SCORE_KEYS) | _mapping(run, "scores")
    report = {
        "run": {
            "name": run.get("name") or run_dir.name,
            "job": _job(run),
            "created": run.get("created"),
            "directory": run_dir.name,
        },
        "status": str(run.get("status") or "unknown"),
        "command": run.get("command"),
        "commands": _commands(run_dir, _job(run)) if files.config is not None else {},
        "model": _mapping(run, "model"),
        "data": _mapping(run, "data"),
        "scores": scores,
        "tasks": _mapping(run, "tasks"),
        "task": _mapping(run, "task"),
        "task_data": _mapping(run, "task_data"),
        "training": _training(run, files.metrics),
        "last_eval": evals[-1] if evals else None,
        "best_eval": best(evals),
        "mixture": run["mixture"] if isinstance(run.get("mixture"), list) else [],
        **{key: _mapping(run, key) for key in COPIED},
        **{key: run[key] for key in FOUND if run.get(key)},
        "history": _history(run),
        "notes": _notes(run, files.metrics, evals) + files.problems,
    }
    return _strict(report)


def read_run(run_dir: Path) -> RunFiles:
    """The run's files; a killed run may lack any of them."""
    problems = []
    run, metrics = read_run_json(run_dir), read_metrics(run_dir)
    if not run:
        problems.append("run.json is missing or damaged: command, machine and scores are unknown.")
    if not metrics:
        problems.append("metrics.jsonl has no lines: there are no curves.")
    path = run_dir / "config.yaml"
    config = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    if config is None:
        problems.append("config.yaml is missing: the run cannot be repeated from here.")
    return RunFiles(run, metrics, read_samples(run_dir), config, problems)


def _write(directory: Path, report: dict[str, Any], files: RunFiles) -> None:
    # Matplotlib takes most of a second: who only asks for the object goes without.
    from gptcli.reports.html import render_html
    from gptcli.reports.markdown import render_markdown
    from gptcli.reports.page import build_page

    page = build_page(report, files.metrics, files.samples, files.config)
    html, markdown = render_html(page), render_markdown(page)
    write_atomic(directory / "report.html", html.encode())
    write_atomic(directory / "report.md", markdown.encode())
    write_atomic(directory / "report.json", _json(report).encode())


def _json(report: dict[str, Any]) -> str:
    # ASCII escapes: names with control characters or lone surrogates stay harmless in a terminal.
    return json.dumps(report, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def _complete(report: dict[str, Any]) -> dict[str, Any]:
    full = _strict(report)
    return full | {"scores": dict.fromkeys(SCORE_KEYS) | _mapping(full, "scores")}


def _training(run: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """`training` of run.json over what the metrics imply (all there is of a killed run)."""
    implied: dict[str, Any] = dict.fromkeys(TRAINING_KEYS)
    implied["parameters"] = _mapping(run, "model").get("parameters")
    train = lines_of(metrics, "train")
    if train:
        last = train[-1]
        implied |= {"steps": last["step"], "tokens": last.get("tokens")}
        implied["seconds"] = last.get("seconds")
        speeds = sorted(v for v in curve(train, "tokens_per_second").y if math.isfinite(v))
        implied["tokens_per_second"] = float(speeds[len(speeds) // 2]) if speeds else None
    best_line = best(lines_of(metrics, "eval"))
    if best_line:
        implied["best_step"] = best_line["step"]
    stated = {k: v for k, v in _mapping(run, "training").items() if v is not None}
    return implied | stated


def _notes(
    run: dict[str, Any], metrics: list[dict[str, Any]], evals: list[dict[str, Any]]
) -> list[str]:
    """What the reader must know before reading the figures."""
    notes = []
    status, scores, training = run.get("status"), _mapping(run, "scores"), _mapping(run, "training")
    if status == "running":
        notes.append("This run was still training, or was killed, when this report was written.")
    elif status == "failed":
        notes.append("This run failed; log.txt says why.")
    elif status == "stopped":
        notes.append("This run was stopped before its limit and can be continued.")
    last = evals[-1]["step"] if evals else None
    if all(finite(scores.get(key)) is None for key in ("loss", "bits_per_byte")):
        found = "none ran" if last is None else f"the evaluation at step {last:,} stands in"
        notes.append(f"There is no final evaluation: {found}.")
    elif last is not None and last != training.get("steps", last):
        notes.append(f"The scores are those of step {last:,}, the last that was evaluated.")
    if finite(training.get("skipped_steps")):
        notes.append(_not_applied(training["skipped_steps"], metrics))
    if run.get("skipped_text"):
        notes.append("Some text was left out or replaced; the counts are listed by file.")
    return notes


def _not_applied(count: int, metrics: list[dict[str, Any]]) -> str:
    """How many updates were left out, and for what figures, as far as their lines say it."""
    why: Counter[str] = Counter()
    for line in metrics:
        lost = line.get("not_finite")
        if line.get("event") == "bad_step" and isinstance(lost, dict):
            why[", ".join(f"{name} {value}" for name, value in lost.items())] += 1
    counted = [f"{times:,} with {what}" for what, times in why.most_common()]
    if (spikes := count - sum(why.values())) > 0:
        counted.append(f"{spikes:,} with a spike, or with figures that are not in the log")
    noun = "update was" if count == 1 else "updates were"
    return f"{count:,} {noun} not applied: {'; '.join(counted)}."


def _history(run: dict[str, Any]) -> list[dict[str, Any]]:
    """How the run began and went on; of an older one the resumes are known."""
    if isinstance(run.get("history"), list):
        return [entry for entry in run["history"] if isinstance(entry, dict)]
    resumes = run["resumes"] if isinstance(run.get("resumes"), list) else []
    began = [{"event": "start", "at": run["created"], "step": 0}] if run.get("created") else []
    return began + [{"event": "resume", **entry} for entry in resumes if isinstance(entry, dict)]


def _job(run: dict[str, Any]) -> str:
    """The subcommand that made the run."""
    return "finetune" if run.get("job") == "finetune" else "pretrain"


def _commands(run_dir: Path, job: str) -> dict[str, str]:
    """Shell lines that repeat and continue the run, from where the report was asked for."""
    whole = run_dir.resolve()
    here = whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else run_dir
    config = shlex.quote(str(here / "config.yaml"))
    return {"reproduce": f"gpt {job} {config}", "resume": resume_line(job, here)}


def _strict(report: dict[str, Any]) -> dict[str, Any]:
    """The report as a reader of its JSON gets it: NaN and infinities are null, tuples lists."""
    parsed: dict[str, Any] = json.loads(json_bytes(report))
    return parsed


def _mapping(parent: dict[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key)
    return value if isinstance(value, dict) else {}
