"""What a report says, in order, before it is HTML or Markdown: both say the same."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from gptcli.reports.attention import attention_section
from gptcli.reports.comparison import comparison_section
from gptcli.reports.curves import best, lines_of, time_parts
from gptcli.reports.eval_sections import (
    breakdown_section,
    calibration_section,
    surprising_section,
)
from gptcli.reports.headlines import (
    Headline,
    eval_headlines,
    run_headlines,
    shown_perplexity,
    with_task,
)
from gptcli.reports.history import history_table
from gptcli.reports.lm_eval import lm_eval_section
from gptcli.reports.plots import TrainingPlots, training_plots
from gptcli.reports.privacy import (
    canaries_section,
    memorization_section,
    pairs_section,
)
from gptcli.reports.samples import SampleStrip, sample_strips
from gptcli.reports.section import Section
from gptcli.reports.settings import Settings, settings
from gptcli.reports.table import Table, bounded, cleaning_table, source_table
from gptcli.reports.task_tables import (
    headline,
    meanings,
    row_counts,
    score_table,
    task_parts,
)
from gptcli.reports.text import (
    clip,
    compact,
    decimals,
    duration,
    field,
    finite,
    moment,
    number,
    percent,
    spread,
)

SPLITS = {
    "hash": "documents chosen by the hash of their text",
    "tail": "the end of each document, for there are few",
    "given": "a source of its own",
}
MAX_EVAL_ROWS = 40
MAX_FINGERPRINTS = 8
MAX_EVENTS = 50
MAX_NOTES, MAX_NOTE = 40, 600

DEFINITIONS = [
    "bits per byte = total nats / (ln 2 × UTF-8 bytes); lower is better; comparable across"
    " tokenizers. Its 95 % interval is bootstrapped over documents.",
    "loss = mean negative log-likelihood in nats per token; perplexity = exp(loss). Both depend on"
    " the tokenizer.",
    "accuracy = share of tokens that the model ranked first.",
]
PART_LABELS = {
    "data_wait_seconds": "waiting for data",
    "forward_backward_seconds": "forward and backward",
    "optimizer_seconds": "optimizer",
    "other_seconds": "other",
}
RESUME_LABEL = "Continue this run (a finished one: add a larger --set training.max_steps=N)"


@dataclass(frozen=True)
class Share:
    """A part of the training time, in percent of the whole."""

    label: str
    seconds: str
    percent: float


@dataclass(frozen=True)
class Page:
    """A whole report. Text in it is raw: each format escapes what it must. It is no longer than a
    reader can take in, whatever the run."""

    title: str
    kind: str
    status: str | None
    subtitle: list[str]
    notes: list[str]
    headlines: list[Headline]
    definitions: list[str]
    tasks: list[Table]
    curves: TrainingPlots
    shares: list[Share]
    events: Table | None
    samples: list[SampleStrip]
    more_samples: bool
    evals: Table | None
    scores: Table | None
    sections: list[Section]
    settings: Settings | None
    facts: list[Table]
    history: Table | None
    commands: dict[str, str]


def build_page(
    report: dict[str, Any],
    metrics: list[dict[str, Any]],
    samples: list[dict[str, Any]],
    config: str | None,
) -> Page:
    """The page for an object of report.json and the lines of metrics.jsonl and samples.jsonl.

    Without `training` it is the page of an evaluation: scores only.
    """
    run = report["run"]
    trained = bool(report.get("training")) and run.get("job") != "eval"
    job = {"pretrain": "Pretraining", "finetune": "Finetuning"}.get(str(run.get("job")), "Training")
    warnings = report.get("data", {}).get("warnings") or []
    tasks, task = report.get("tasks") or {}, report.get("task") or {}
    notes = [clip(str(n), MAX_NOTE) for n in [*(report.get("notes") or []), *warnings]]
    commands = {"Command": report.get("command"), **_labelled(report.get("commands") or {})}
    strips, more_samples = sample_strips(samples)
    return Page(
        title=str(run["name"]),
        kind=job if trained else "Evaluation",
        status=report.get("status"),
        subtitle=_subtitle(report),
        notes=notes[:MAX_NOTES],
        headlines=with_task(
            headline(tasks, task), run_headlines(report) if trained else eval_headlines(report)
        ),
        definitions=[*meanings(tasks), *DEFINITIONS],
        tasks=_shown(score_table(tasks), *task_parts(task)),
        curves=training_plots(metrics, _resumed(report.get("history"))),
        shares=_shares(metrics),
        events=_only(_events(metrics)),
        samples=strips,
        more_samples=more_samples,
        evals=_only(_evals(lines_of(metrics, "eval"))),
        scores=_only(_facts("Scores", report["scores"])),
        sections=_sections(report),
        settings=settings(config) if config is not None else None,
        facts=_shown(*_all_facts(report)),
        history=_only(history_table(report.get("history"))),
        commands={label: str(line) for label, line in commands.items() if line},
    )


def _resumed(history: Any) -> list[float]:
    entries = [e for e in history or [] if isinstance(e, dict) and e.get("event") == "resume"]
    return [float(entry["step"]) for entry in entries if finite(entry.get("step")) is not None]


def _subtitle(report: dict[str, Any]) -> list[str]:
    model, machine = report.get("model") or {}, report.get("machine") or {}
    training, created = report.get("training") or {}, report["run"].get("created")
    parts = []
    if model.get("preset"):
        parts.append(f"{model['preset']} model")
    if training.get("tokens"):
        parts.append(f"{compact(training['tokens'])} tokens seen")
    device = machine.get("device_name") if machine.get("device") != "cpu" else None
    device = device or machine.get("device")
    if device:
        threads = f", {machine['threads']} threads" if machine.get("threads") else ""
        parts.append(f"{device}{threads if device == 'cpu' else ''}")
    if created:
        parts.append(moment(created))
    return parts


def _evals(lines: list[dict[str, Any]]) -> Table | None:
    if not lines:
        return None
    lowest = best(lines)
    kept = spread(lines, MAX_EVAL_ROWS)
    if lowest is not None and lowest not in kept:
        kept = sorted([*kept, lowest], key=lambda line: float(line["step"]))
    rows = [
        [
            number(line["step"]),
            compact(line.get("tokens")),
            decimals(line.get("loss"), 4),
            shown_perplexity(line.get("perplexity")),
            decimals(line.get("bits_per_byte"), 4),
            percent(line.get("accuracy")),
        ]
        for line in kept
    ]
    note = f"{len(kept)} of {len(lines)} evaluations; all are in metrics.jsonl."
    return Table(
        "Evaluations",
        ["step", "tokens", "loss", "perplexity", "bits per byte", "accuracy"],
        rows,
        frozenset(i for i, line in enumerate(kept) if line is lowest),
        note if len(kept) < len(lines) else "",
    )


def _shares(metrics: list[dict[str, Any]]) -> list[Share]:
    parts = time_parts(lines_of(metrics, "train"))
    whole = sum(parts.values())
    return [
        Share(PART_LABELS[key], duration(seconds), 100 * seconds / whole)
        for key, seconds in parts.items()
    ]


def _events(metrics: list[dict[str, Any]]) -> Table | None:
    """What happened besides training and evaluating, such as updates that were skipped."""
    lines = [m for m in metrics if m.get("event") not in ("train", "eval", "resume", None)]
    if not lines:
        return None
    rows = []
    for line in lines[-MAX_EVENTS:]:
        rest = {k: v for k, v in line.items() if k not in ("event", "step", "not_finite")}
        if isinstance(line.get("not_finite"), dict):  # what is null in the line
            rest |= line["not_finite"]
        rows.append([str(line["event"]), number(line.get("step")), clip(field("", rest), 300)])
    note = f"The last {MAX_EVENTS} of {len(lines)}." if len(lines) > MAX_EVENTS else ""
    return Table("Events", ["event", "step", "detail"], rows, note=note)


def _sections(report: dict[str, Any]) -> list[Section]:
    """What the parts of an evaluation found, and what was trained on."""
    sections = [_made(make, report) for make in SECTIONS]
    return [
        replace(section, tables=_shown(*section.tables))
        for section in sections
        if section is not None
    ]


def _made(
    make: Callable[[dict[str, Any]], Section | None], report: dict[str, Any]
) -> Section | None:
    """A section; a damaged part of run.json costs no other one."""
    try:
        return make(report)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        name = make.__name__.removesuffix("_section")
        return Section(name.capitalize(), [f"run.json is damaged here: {error!r}"])


def data_section(report: dict[str, Any]) -> Section | None:
    """What was trained on and what the filters did to it."""
    data = report.get("data") or {}
    split = (data.get("val") or {}).get("split") if isinstance(data.get("val"), dict) else None
    tables = [
        _data({k: v for k, v in data.items() if k not in ("sources", "warnings")}),
        source_table(data.get("sources") or [], report.get("mixture") or []),
        cleaning_table(data.get("sources") or []),
        row_counts(report.get("task_data") or {}),
    ]
    shown = [table for table in tables if table is not None]
    text = [f"Held out for validation: {SPLITS[split]}."] if split in SPLITS else []
    return Section("Data", text, tables=shown) if shown else None


SECTIONS = (
    breakdown_section,
    surprising_section,
    calibration_section,
    lm_eval_section,
    memorization_section,
    canaries_section,
    pairs_section,
    comparison_section,
    attention_section,
    data_section,
)


def _all_facts(report: dict[str, Any]) -> list[Table | None]:
    return [
        _facts("Model", report.get("model")),
        _facts("Training", report.get("training")),
        _facts("Machine", report.get("machine")),
        _facts("Automatic choices", report.get("choices")),
        _facts("Versions", report.get("versions")),
        _facts("Timings", report.get("timings")),
        _facts("Seeds", report.get("seeds")),
        _facts("Text left out or replaced", report.get("skipped_text")),
        _facts("Fingerprints", _fingerprints(report.get("fingerprints") or {})),
    ]


def _shown(*tables: Table | None) -> list[Table]:
    return [bounded(table) for table in tables if table is not None]


def _only(table: Table | None) -> Table | None:
    return None if table is None else bounded(table)


def _fingerprints(prints: dict[str, Any]) -> dict[str, Any]:
    """Of many files, their number and one hash over all of theirs; run.json has each."""
    data = prints.get("data")
    if not isinstance(data, dict) or len(data) <= MAX_FINGERPRINTS:
        return prints
    whole = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    return prints | {"data": f"{len(data):,} files, together {whole}; each is in run.json"}


def _data(data: dict[str, Any]) -> Table | None:
    """Parts of the data side by side; what is said of the whole stands below."""
    parts = {name: part for name, part in data.items() if isinstance(part, dict) and part}
    if not parts:
        return _facts("Data", data)
    keys = list(dict.fromkeys(str(key) for part in parts.values() for key in part))
    rows = [
        [key, *(field(key, part.get(key)) for part in parts.values())]
        for key in keys
        if key != "split"
    ]
    whole = {name: value for name, value in data.items() if name not in parts and value}
    blank = [""] * (len(parts) - 1)
    rows += [[str(name), field(str(name), value), *blank] for name, value in whole.items()]
    return Table("Data", ["", *parts], rows)


def _facts(title: str, facts: dict[str, Any] | None) -> Table | None:
    """Names and values of an object that has any; a name keeps the spelling of the JSON."""
    if not facts:
        return None
    rows = [[str(k), field(str(k), value)] for k, value in facts.items() if value is not None]
    return Table(title, ["", ""], rows) if rows else None


def _labelled(commands: dict[str, Any]) -> dict[str, Any]:
    labels = {"reproduce": "Repeat from the resolved config", "resume": RESUME_LABEL}
    return {labels.get(key, key): line for key, line in commands.items()}
