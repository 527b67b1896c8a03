"""What a report says of a finetuning task: scores, labels, the worst rows, what became of rows."""

from typing import Any

from gptcli.reports.table import Table
from gptcli.reports.text import NOTHING, clip, decimals, field, finite, number

MOST_LABELS = 20  # of a confusion matrix, which is as wide as high
MOST_CHARACTERS = 240  # of a text in a table

MEANINGS = {
    "exact_match": "exact_match = share of answers that equal a reference, without case,"
    " punctuation, articles and blanks; token_f1 = mean F1 of their words, in Chinese of characters"
    " (SQuAD).",
    "accuracy": "accuracy (task) = share of rows with the right label; macro_f1 = mean F1 over the"
    " labels; the baseline always answers with the most frequent label, or by chance.",
    "accuracy_per_byte": "accuracy_per_byte compares the likelihoods of choices per UTF-8 byte of"
    " them (acc_norm in other reports), accuracy as they are.",
    "last_word_perplexity": "accuracy = share of last words of which each token is the likeliest;"
    " last_word_perplexity = exp of the mean -ln p of a word.",
    "bleu": "bleu and chrf are sacrebleu's, of all rows together, from 0 to 100.",
    "chrf": "bleu and chrf are sacrebleu's, of all rows together, from 0 to 100.",
    "rouge_l": "rouge_1, rouge_2 and rouge_l = mean F-measure of shared words, pairs of words and"
    " longest common subsequences, from 0 to 1, without stemming.",
    "code_runs": "code_runs = share of answers that run as a Python program without an error.",
    "preference_accuracy": "preference_accuracy = share of rows whose chosen answer is the likelier"
    " one; reward_accuracy = where it gained more over the model before training.",
    "response_perplexity": "response_perplexity = that of the held-out responses given their"
    " prompts; of rows for a task head that of their texts.",
    "reference_perplexity": "reference_perplexity = that of a text which is not trained on: where"
    " it rises, the model forgets.",
}
INTERVALS = "Intervals are bootstrapped over rows (95 %)."


def score_table(tasks: dict[str, Any]) -> Table | None:
    """The scores of a task before and after finetuning, or those of an evaluation."""
    entries = {str(k): v if isinstance(v, dict) else {"after": v} for k, v in tasks.items()}
    if not entries:
        return None
    whens = [when for when in ("before", "after", "value") if _any(entries, when)]
    change = whens[:2] == ["before", "after"]
    own = {"before", "after", "value", "before_ci95", "after_ci95", "value_ci95"}
    intervals = any(_any(entries, f"{when}_ci95") for when in whens)
    extra = sorted({str(key) for entry in entries.values() for key in entry} - own)
    head = [*whens, *(["change"] if change else []), *(["95 % interval"] if intervals else [])]
    rows = []
    for name, entry in entries.items():
        row = [name, *(_figure(entry.get(when)) for when in whens)]
        if change:
            row.append(_change(finite(entry.get("before")), finite(entry.get("after"))))
        if intervals:
            row.append(_interval(entry.get(f"{whens[-1]}_ci95")))
        rows.append([*row, *(_extra(key, entry.get(key)) for key in extra)])
    return Table("Tasks", ["task", *head, *extra], rows, note=INTERVALS if intervals else "")


def meanings(tasks: dict[str, Any]) -> list[str]:
    """What the scores mean, each once."""
    return list(dict.fromkeys(MEANINGS[name] for name in tasks if name in MEANINGS))


def headline(tasks: dict[str, Any], task: dict[str, Any]) -> tuple[str, str, str] | None:
    """Name, value and a note of the score that stands for the task; None without one."""
    name = str(task.get("headline"))
    entry = tasks.get(name)
    if not isinstance(entry, dict):
        return None
    when = next((when for when in ("after", "value", "before") if when in entry), "after")
    notes = []
    if when == "after" and finite(entry.get("before")) is not None:
        notes.append(f"{_figure(entry['before'])} before")
    elif when == "before":
        notes.append("before training")
    if finite(entry.get("baseline")) is not None:
        notes.append(f"baseline {_figure(entry['baseline'])}")
    interval = _interval(entry.get(f"{when}_ci95"))
    if interval != NOTHING:
        notes.append(f"95 % interval {interval}")
    label = name.replace("_", " ")
    return f"Task: {label}", _figure(entry.get(when)), ", ".join(notes)


def task_parts(task: dict[str, Any]) -> list[Table]:
    """The confusion matrix, the scores of each label, and the worst rows, where there are any."""
    return [t for t in (_confusion(task), _labels(task), worst_rows(task)) if t is not None]


def row_counts(data: dict[str, Any]) -> Table | None:
    """What became of the task's rows, those to train on and those held out."""
    parts = {
        name: data[key]
        for name, key in (("to train on", "train"), ("held out", "held_out"))
        if isinstance(data.get(key), dict)
    }
    if not parts:
        return None
    keys = list(dict.fromkeys(str(key) for part in parts.values() for key in part))
    rows = [
        [key.replace("_", " "), *(field(key, part.get(key)) for part in parts.values())]
        for key in keys
        if any(part.get(key) for part in parts.values())
    ]
    blank = [""] * (len(parts) - 1)
    if finite(data.get("overlap")) is not None:
        rows.append(["held-out rows that are also trained on", number(data["overlap"]), *blank])
    if data.get("class_weights"):
        rows.append(["class weights", field("", data["class_weights"]), *blank])
    return Table("Rows of the task", ["", *parts], rows)


def worst_rows(task: dict[str, Any]) -> Table | None:
    """The rows with the least of the headline score."""
    worst, name = _mappings(task.get("worst")), str(task.get("headline"))
    rows = [
        [
            str(row.get("where")),
            _text(row.get("prompt")),
            _text(row.get("references", row.get("label", row.get("chosen")))),
            _text(row.get("answer", row.get("predicted", row.get("rejected")))),
            *_score(row, name),
        ]
        for row in worst
        if "prompt" in row
    ]
    if not rows:
        return None
    pair, labels = "chosen" in worst[0], "label" in worst[0]
    wanted, got = ("chosen", "rejected") if pair else ("expected", "answered")
    score = "margin in nats" if pair else "p(expected)" if labels else name
    return Table("Worst rows", ["row", "prompt", wanted, got, score], rows)


def _confusion(task: dict[str, Any]) -> Table | None:
    labels, counts = task.get("labels"), task.get("confusion")
    if not isinstance(labels, list) or not isinstance(counts, list) or len(labels) > MOST_LABELS:
        return None
    lines = [line if isinstance(line, list) else [] for line in counts]
    rows = [[str(label), *map(number, line)] for label, line in zip(labels, lines, strict=False)]
    if any(len(row) != len(labels) + 1 for row in rows):
        return None
    note = (
        "Counts of held-out rows: down the label that they have, across what they were taken for."
    )
    return Table("Confusion matrix", ["label, taken for", *map(str, labels)], rows, note=note)


def _labels(task: dict[str, Any]) -> Table | None:
    rows = [
        [
            str(found.get("label")),
            *(decimals(found.get(key), 3) for key in ("precision", "recall", "f1")),
            *(number(found.get(key)) for key in ("rows", "predicted")),
        ]
        for found in _mappings(task.get("per_label"))
    ]
    head = ["label", "precision", "recall", "F1", "rows", "predicted"]
    return Table("Labels", head, rows) if rows else None


def _score(row: dict[str, Any], name: str) -> list[str]:
    """The headline score of one row."""
    probabilities, label = row.get("probabilities"), row.get("label")
    if isinstance(probabilities, dict):
        return [_figure(probabilities.get(label))]
    if isinstance(probabilities, list) and isinstance(label, int) and label < len(probabilities):
        return [_figure(probabilities[label])]
    return [_figure(row.get("margin_nats", row.get(name)))]


def _text(value: Any) -> str:
    text = " | ".join(map(str, value)) if isinstance(value, list) else str(value)
    return clip(" ".join(text.split()), MOST_CHARACTERS)


def _any(entries: dict[str, dict[str, Any]], key: str) -> bool:
    return any(key in entry for entry in entries.values())


def _figure(value: Any) -> str:
    found = finite(value)
    return decimals(value, 3) if found is not None and abs(found) < 1e6 else field("", value)


def _extra(key: str, value: Any) -> str:
    return _figure(value) if key == "baseline" else field(key, value)


def _change(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return NOTHING
    return f"{after - before:+,.3f}".replace("-", "−")


def _interval(value: Any) -> str:
    if not isinstance(value, list) or len(value) != 2:
        return NOTHING
    return f"{_figure(value[0])} – {_figure(value[1])}"


def _mappings(value: Any) -> list[dict[str, Any]]:
    return [v for v in value if isinstance(v, dict)] if isinstance(value, list) else []
