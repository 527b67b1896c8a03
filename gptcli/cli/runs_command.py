"""`gpt runs`: what lies under the runs directory."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gptcli.cli.eval_command import score_rows
from gptcli.cli.terminal import columns, write_error, write_out
from gptcli.errors import CheckpointError
from gptcli.runs.run_dir import CHECKPOINTS, is_run_dir, newest_run, runs_root

RunArgument = Annotated[
    str | None,
    typer.Argument(metavar="RUN", help="A run directory or its name. [the newest]"),
]

runs_app = typer.Typer(
    name="runs", help="List, show and report runs.", rich_markup_mode=None, no_args_is_help=False
)


@runs_app.command("list")
def list_runs() -> int:
    """List the runs under runs/ (GPT_RUNS chooses another directory), the oldest first."""
    root = runs_root()
    runs = [path for path in sorted(root.iterdir()) if is_run_dir(path)] if root.is_dir() else []
    if not runs:
        write_error(f"no runs in {root}")
        return 0
    from gptcli.reports.report import build_report, read_run

    reports = [(path.name, build_report(path, read_run(path))) for path in runs]
    reports.sort(key=lambda item: str(item[1]["run"]["created"] or ""))
    rows = [["RUN", "STATUS", "STEP", "VAL BITS/BYTE"]]
    rows += [[name, *_summary(report)] for name, report in reports]
    write_out(columns(rows, right=frozenset({2, 3})))
    return 0


@runs_app.command("show")
def show_run(run: RunArgument = None) -> int:
    """Show one run: how it was made, how far it came, its scores and checkpoints."""
    from gptcli.reports.report import build_report, read_run

    path = find_run(run)
    report = build_report(path, read_run(path))
    status, step, bits = _summary(report)
    facts = [
        ["run", str(path)],
        ["status", status],
        ["created", str(report["run"]["created"] or "-")],
        ["command", str(report["command"] or "-")],
        ["step", step],
        ["val bits/byte", bits],
    ]
    scores = {key: value for key, value in report["scores"].items() if value is not None}
    facts += score_rows(scores)
    facts += [["checkpoint", str(p.parent)] for p in _manifests(path)]
    facts += [["note", note] for note in report["notes"]]
    write_out(columns(facts))
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


def _manifests(run_dir: Path) -> list[Path]:
    return sorted((run_dir / CHECKPOINTS).glob("step-*/manifest.json"))


def _summary(report: dict[str, Any]) -> list[str]:
    """Status, step and validation bits per byte; the best evaluation stands in for a final one."""
    bits = report["scores"]["bits_per_byte"]
    if bits is None:
        bits = (report["best_eval"] or {}).get("bits_per_byte")
    step = report["training"]["steps"]
    return [
        str(report["status"]),
        "-" if step is None else str(step),
        f"{bits:.4f}" if isinstance(bits, float) else "-",
    ]
