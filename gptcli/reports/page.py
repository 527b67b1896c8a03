"""What a report says, in order, before it is HTML or Markdown: both say the same."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from gptcli.reports.curves import best, lines_of, time_parts
from gptcli.reports.table import Table, cleaning_table, source_table
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
)

T = TypeVar("T")

MAX_EVAL_ROWS = 40
MAX_SAMPLE_STEPS = 10
MAX_SAMPLES_A_STEP = 12
MAX_SAMPLE_CHARACTERS = 4000
MAX_FINGERPRINTS = 8
MAX_EVENTS = 50

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
SHAPE = (("n_layer", "layers"), ("n_embd", "wide"))
RESUME_LABEL = "Continue this run (a finished one: add a larger --set training.max_steps=N)"


@dataclass(frozen=True)
class Headline:
    """One large figure: `note` says how it is to be read."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Share:
    """A part of the training time, in percent of the whole."""

    label: str
    seconds: str
    percent: float


@dataclass(frozen=True)
class Sample:
    """A generated text: what it was given and how it went on."""

    index: str
    prompt: str
    text: str


@dataclass(frozen=True)
class SampleStep:
    """The texts of one step."""

    title: str
    samples: list[Sample]
    left_out: int


@dataclass(frozen=True)
class Page:
    """A whole report. Text in it is raw: each format escapes what it must."""

    title: str
    kind: str
    status: str | None
    subtitle: list[str]
    notes: list[str]
    headlines: list[Headline]
    definitions: list[str]
    scores: Table | None
    tasks: Table | None
    task_parts: list[Table]
    evals: Table | None
    shares: list[Share]
    events: Table | None
    samples: list[SampleStep]
    facts: list[Table]
    commands: dict[str, str]
    config: str | None


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
    commands = {"Command": report.get("command"), **_labelled(report.get("commands") or {})}
    return Page(
        title=str(run["name"]),
        kind=job if trained else "Evaluation",
        status=report.get("status"),
        subtitle=_subtitle(report),
        notes=[str(n) for n in [*(report.get("notes") or []), *warnings]],
        headlines=_with_task(
            headline(tasks, task), _run_headlines(report) if trained else _eval_headlines(report)
        ),
        definitions=[*meanings(tasks), *DEFINITIONS],
        scores=_facts("Scores", report["scores"]),
        tasks=score_table(tasks),
        task_parts=task_parts(task),
        evals=_evals(lines_of(metrics, "eval")),
        shares=_shares(metrics),
        events=_events(metrics),
        samples=_samples(samples),
        facts=_all_facts(report),
        commands={label: str(line) for label, line in commands.items() if line},
        config=config,
    )


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


def _with_task(task: tuple[str, str, str] | None, others: list[Headline]) -> list[Headline]:
    """The task's score first, in place of the share of tokens that ranked first."""
    if task is None:
        return others
    return [Headline(*task), *(shown for shown in others if shown.label != "Accuracy")]


def _run_headlines(report: dict[str, Any]) -> list[Headline]:
    training, model = report["training"], report.get("model") or {}
    shape = [f"{number(model[k])} {w}" for k, w in SHAPE if finite(model.get(k)) is not None]
    done = [
        f"{number(training.get('steps'))} steps" if training.get("steps") is not None else "",
        f"{compact(training['tokens'])} tokens" if training.get("tokens") else "",
    ]
    return [
        *_score_headlines(report),
        Headline("Speed", compact(training.get("tokens_per_second")), "tokens per second"),
        Headline("Training time", duration(training.get("seconds")), _join(done)),
        Headline("Parameters", compact(training.get("parameters")), _join(shape)),
    ]


def _score_headlines(report: dict[str, Any]) -> list[Headline]:
    """Bits per byte, perplexity and accuracy: the final ones, else those of the last evaluation."""
    scores, last = report["scores"], report.get("last_eval")
    final = any(finite(scores.get(key)) is not None for key in ("loss", "bits_per_byte"))
    shown = scores if final or not last else last
    when = "" if shown is scores else f"at step {number(last['step'])}" if last else ""
    interval = scores.get("bits_per_byte_ci95")
    spread = "no interval" if finite(shown.get("bits_per_byte")) is not None else "not evaluated"
    if final and isinstance(interval, list) and len(interval) == 2:
        spread = f"95 % interval {decimals(interval[0], 3)} – {decimals(interval[1], 3)}"
    loss = finite(shown.get("loss"))
    perplexity = finite(shown.get("perplexity"))
    # exp(loss) beyond the range of a float is null in JSON though the loss is known.
    value = "inf" if perplexity is None and loss is not None else _perplexity(perplexity)
    nats = f"loss {decimals(loss, 3)} nats per token" if loss is not None else "not evaluated"
    return [
        Headline(
            "Bits per byte" if report["run"].get("job") == "eval" else "Validation bits per byte",
            decimals(shown.get("bits_per_byte"), 3),
            _join([spread, when]),
        ),
        Headline("Perplexity", value, _join([nats, when])),
        Headline("Accuracy", percent(shown.get("accuracy")), "next token ranked first"),
    ]


def _eval_headlines(report: dict[str, Any]) -> list[Headline]:
    scores, model = report["scores"], report.get("model") or {}
    return [
        *_score_headlines(report),
        Headline("Text", field("bytes", scores.get("bytes")), _count(scores, "documents")),
        Headline("Tokens scored", compact(scores.get("tokens")), _count(scores, "unscored_tokens")),
        Headline("Parameters", compact(model.get("parameters")), str(model.get("preset") or "")),
    ]


def _evals(lines: list[dict[str, Any]]) -> Table | None:
    if not lines:
        return None
    lowest = best(lines)
    kept = _spread(lines, MAX_EVAL_ROWS)
    if lowest is not None and lowest not in kept:
        kept = sorted([*kept, lowest], key=lambda line: float(line["step"]))
    rows = [
        [
            number(line["step"]),
            compact(line.get("tokens")),
            decimals(line.get("loss"), 4),
            _perplexity(line.get("perplexity")),
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
    """What happened besides training and evaluating: resumes, skipped updates."""
    lines = [m for m in metrics if m.get("event") not in ("train", "eval", None)]
    if not lines:
        return None
    rows = []
    for line in lines[-MAX_EVENTS:]:
        rest = {k: v for k, v in line.items() if k not in ("event", "step")}
        rows.append([str(line["event"]), number(line.get("step")), clip(field("", rest), 300)])
    note = f"The last {MAX_EVENTS} of {len(lines)}." if len(lines) > MAX_EVENTS else ""
    return Table("Events", ["event", "step", "detail"], rows, note=note)


def _samples(lines: list[dict[str, Any]]) -> list[SampleStep]:
    """Latest step first; of many steps, some spread over the run."""
    steps: dict[Any, list[dict[str, Any]]] = {}
    for line in lines:
        steps.setdefault(finite(line.get("step")) or 0, []).append(line)
    groups = []
    for step in reversed(_spread(sorted(steps), MAX_SAMPLE_STEPS)):
        drawn = steps[step]
        seen = drawn[-1].get("tokens")
        title = f"Step {number(step)}" + (f", {compact(seen)} tokens" if finite(seen) else "")
        shown = drawn[-MAX_SAMPLES_A_STEP:]
        samples = [
            Sample(
                field("", line.get("sample", i)),
                clip(str(line.get("prompt") or ""), MAX_SAMPLE_CHARACTERS),
                clip(str(line.get("text") or ""), MAX_SAMPLE_CHARACTERS),
            )
            for i, line in enumerate(shown)
        ]
        groups.append(SampleStep(title, samples, len(drawn) - len(shown)))
    return groups


def _all_facts(report: dict[str, Any]) -> list[Table]:
    data = {k: v for k, v in (report.get("data") or {}).items() if k != "warnings"}
    tables = [
        _facts("Model", report.get("model")),
        _facts("Training", report.get("training")),
        _data({k: v for k, v in data.items() if k != "sources"}),
        source_table(data.get("sources") or [], report.get("mixture") or []),
        cleaning_table(data.get("sources") or []),
        row_counts(report.get("task_data") or {}),
        _facts("Machine", report.get("machine")),
        _facts("Automatic choices", report.get("choices")),
        _facts("Versions", report.get("versions")),
        _facts("Timings", report.get("timings")),
        _facts("Seeds", report.get("seeds")),
        _facts("Text left out or replaced", report.get("skipped_text")),
        _facts("Fingerprints", _fingerprints(report.get("fingerprints") or {})),
    ]
    return [table for table in tables if table is not None]


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
    rows = [[key, *(field(key, part.get(key)) for part in parts.values())] for key in keys]
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


def _count(scores: dict[str, Any], key: str) -> str:
    words = key.replace("_tokens", "")
    return f"{number(scores[key])} {words}" if finite(scores.get(key)) is not None else ""


def _perplexity(value: Any) -> str:
    value = finite(value)
    return number(value) if value is None or value >= 1e6 else decimals(value, 2)


def _spread(items: list[T], limit: int) -> list[T]:
    """At most `limit` items, evenly spread, with the first and the last."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)]


def _join(parts: Iterable[str]) -> str:
    return ", ".join(part for part in parts if part)
