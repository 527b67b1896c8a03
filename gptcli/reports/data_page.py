"""Pages of `gpt data`: what a corpus holds, and the rows a model is fed. One HTML file each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptcli.data.shown_rows import ShownRow, ShownToken
from gptcli.reports.headlines import Headline
from gptcli.reports.html import page_template
from gptcli.reports.table import Table
from gptcli.reports.text import compact, decimals, field, number, percent, size


@dataclass(frozen=True)
class _Cell:
    """A token of a row: what is shown, its CSS classes, and what hovering tells."""

    text: str
    classes: str
    title: str


@dataclass(frozen=True)
class _Line:
    """Tokens up to a line end of the text, and the position of the first one."""

    position: str
    cells: list[_Cell]


def check_html(report: dict[str, Any]) -> str:
    """The report of `inspect_data.check_data` as a page."""
    return page_template("data_check.html.jinja").render(
        title=report["name"],
        subtitle=[source["path"] for source in report["sources"]],
        findings=report["findings"],
        headlines=_headlines(report),
        tables=[t for t in (_scripts(report), _sources(report), _personal(report)) if t.rows],
        facts=_facts(report),
    )


def rows_html(rows: Sequence[ShownRow], step: int, block_size: int, facts: dict[str, str]) -> str:
    """Rows of `show_rows` as a page, every token with its id, position and target on hover."""
    shown = [
        {
            "title": (row.name or f"row {index}").capitalize(),
            "about": _about(row, block_size),
            "segments": _segments(row),
            "padding": row.padding,
        }
        for index, row in enumerate(rows)
    ]
    return page_template("data_rows.html.jinja").render(
        title=f"Step {step}",
        subtitle=[f"{name.replace('_', ' ')}: {value}" for name, value in facts.items()],
        rows=shown,
        block_size=block_size,
    )


def _headlines(report: dict[str, Any]) -> list[Headline]:
    train, lengths, held = report["train"], report["lengths"], report["validation"]
    tokenizer = report["tokenizer"]
    return [
        Headline(
            "Training tokens",
            compact(train["tokens"]),
            f"{tokenizer['kind']}, vocabulary of {number(tokenizer['vocab_size'])}",
        ),
        Headline(
            "Documents", compact(train["documents"]), f"{compact(held['documents'])} held out"
        ),
        Headline("Text", size(train["bytes"]), f"{number(train['characters'])} characters"),
        Headline("Bytes per token", decimals(train["bytes_per_token"], 2), "of training text"),
        Headline(
            "Median length",
            compact(lengths["median"]),
            f"tokens, longest {compact(lengths['max'])}",
        ),
        Headline(
            "Overlap",
            percent(held["ngrams_found"] / held["ngrams"]) if held["ngrams"] else "–",
            f"of validation {held['n']}-grams in training",
        ),
    ]


def _scripts(report: dict[str, Any]) -> Table:
    rows = [
        [
            name,
            number(about["letters"]),
            size(about["bytes"]),
            compact(about["tokens"]),
            decimals(about["bytes_per_token"], 2),
        ]
        for name, about in report["scripts"].items()
    ]
    return Table("Scripts", ["script", "characters", "size", "tokens", "bytes per token"], rows)


def _sources(report: dict[str, Any]) -> Table:
    rows = [
        [
            source["path"],
            number(source.get("documents", 0)),
            size(source.get("bytes", 0)),
            compact(source.get("tokens", 0)),
            percent(source["share"]),
            field("", source["filters"]),
        ]
        for source in report["sources"]
    ]
    columns = ["source", "documents", "size", "tokens", "share", "left out or changed by filters"]
    return Table("Sources", columns, rows)


def _personal(report: dict[str, Any]) -> Table:
    rows = [
        [kind, number(about["count"]), number(about["documents"]), ", ".join(about["places"])]
        for kind, about in report["personal"].items()
    ]
    return Table("Personal data", ["kind", "found", "in pieces", "first places"], rows)


def _facts(report: dict[str, Any]) -> list[Table]:
    lengths = {f"{key}_tokens": lengths_value for key, lengths_value in report["lengths"].items()}
    counts = {
        "exact duplicates": report["duplicates"]["exact"]["count"],
        "near duplicates": report["duplicates"]["near"]["count"],
        "of at most one token": report["empty"]["count"],
        "more than 30 % repeated lines": report["repetitive"]["count"],
    }
    damage = {
        "control characters": report["control_characters"]["count"],
        "U+FFFD": report["replacement_characters"]["count"],
        "invalid UTF-8": sum(report["problems"]["invalid_utf8"].values()),
        "rows left out": sum(report["problems"]["skipped_rows"].values()),
        "rows whose text is null": sum(report["problems"]["null_rows"].values()),
        "rows whose text is blank": sum(report["problems"]["blank_rows"].values()),
    }
    held = report["validation"]
    overlap = {key: held[key] for key in ("split", "documents", "exact", "near", "ngrams_found")}
    tables = {
        "Document lengths": lengths,
        "Documents": counts,
        "Characters and rows": damage,
        "Validation": overlap,
        "Languages (of the first documents)": report["languages"],
    }
    return [
        Table(title, ["", ""], [[key, field(key, value)] for key, value in values.items()])
        for title, values in tables.items()
        if values
    ]


def _about(row: ShownRow, block_size: int) -> str:
    facts = [f"loss on {row.targets} of {block_size} targets"]
    documents = sum(token.kind == "eot" for token in row.tokens)
    facts.append(f"{documents} × eot")
    facts.append(f"{row.segments} segments" if row.segments > 1 else "one segment")
    if row.padding:
        facts.append(f"{row.padding} padding")
    if row.label is not None:
        facts.append(f"label {row.label}")
    return ", ".join(facts)


def _segments(row: ShownRow) -> list[list[_Line]]:
    """The lines of the row, a list a segment."""
    segments: list[list[_Line]] = []
    ended = False
    for token in row.tokens:
        if token.begins or not segments:
            segments.append([])
        if ended or not segments[-1]:
            segments[-1].append(_Line("" if token.position is None else str(token.position), []))
        segments[-1][-1].cells.append(_cell(token))
        ended = token.kind == "text" and token.text.endswith("\\n")
    return segments


def _cell(token: ShownToken) -> _Cell:
    classes = ["token", f"is-{token.kind}", "loss" if token.loss else "context"]
    if token.position is None:
        classes.append("target")
    place = "only a target" if token.position is None else f"position {token.position}"
    predicts = "no target" if token.target is None else f"predicts id {token.target}"
    completes = f"={token.completes}" if token.completes else ""
    return _Cell(
        text="eot" if token.kind == "eot" else (token.text or "∅") + completes,
        classes=" ".join(classes),
        title=f"id {token.id}\n{place}\n{predicts}\nloss on it: {'yes' if token.loss else 'no'}",
    )
