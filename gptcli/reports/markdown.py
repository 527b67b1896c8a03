"""A report page as Markdown (GitHub flavour): the same facts as the HTML, without the curves."""

import re

from gptcli.reports.page import Page
from gptcli.reports.section import Plot, Section
from gptcli.reports.table import Table
from gptcli.reports.text import visible

ALL_SAMPLES = "All texts of all steps are in samples.jsonl."
# What begins markup, links or HTML inside a line or a cell. Underscores inside words are literal
# in this flavour and stay readable.
_MARKUP = re.compile(r"([\\`*\[\]<|~&$]|(?<!\w)_|_(?!\w))")


def render_markdown(page: Page) -> str:
    """The page as Markdown. All text in `page` is untrusted and cannot end its place."""
    status = f" ({line_text(page.status)})" if page.status else ""
    blocks = [f"# {page.kind}: {line_text(page.title)}{status}"]
    if page.subtitle:
        blocks.append(f"*{line_text(' · '.join(page.subtitle))}*")
    blocks += [f"> **Note:** {line_text(note)}" for note in page.notes]
    rows = [[h.label, f"**{line_text(h.value)}**", line_text(h.note)] for h in page.headlines]
    blocks.append(_rows(["", "", ""], rows))
    blocks.append("\n".join(f"- {line_text(definition)}" for definition in page.definitions))
    for table in page.tasks:
        blocks += _table(table)
    for view in page.curves.loss[:1]:
        blocks += ["## Training", *map(_described, [*view.plots, *page.curves.small])]
    if page.shares:
        rows = [[s.label, s.seconds, f"{s.percent:.1f} %"] for s in page.shares]
        blocks += ["## Where the training time went", _rows(["part", "time", "share"], rows)]
    blocks += _table(page.events)
    if page.samples:
        blocks += ["## Samples", *_samples(page)]
    blocks += _table(page.evals) + _table(page.scores)
    for section in page.sections:
        blocks += _section(section)
    for table in page.facts:
        blocks += _table(table)
    blocks += _table(page.history)
    if page.commands:
        blocks.append("## Commands")
        for label, command in page.commands.items():
            blocks += [f"{label}:", fenced(command, "sh")]
    if page.settings is not None:
        blocks += ["## Config", *_table(page.settings.changed, "###")]
        blocks.append(fenced(page.settings.text, "yaml"))
    return visible("\n\n".join(blocks) + "\n")


def fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in `text`."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def line_text(text: str) -> str:
    """`text` on one line that Markdown shows literally."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def _described(plot: Plot) -> str:
    return f"- {line_text(plot.description)}"


def _samples(page: Page) -> list[str]:
    blocks = []
    for strip in page.samples:
        blocks += ["Prompt:", fenced(strip.prompt, "text")]
        for step in strip.steps:
            blocks += [f"### {line_text(step.title)}"]
            blocks += [fenced(text, "text") for text in step.texts]
    return [*blocks, ALL_SAMPLES] if page.more_samples else blocks


def _section(section: Section) -> list[str]:
    blocks = [f"## {line_text(section.title)}", *map(line_text, section.text)]
    blocks += map(_described, section.plots)
    for table in section.tables:
        blocks += _table(table, "###")
    return blocks


def _table(table: Table | None, level: str = "##") -> list[str]:
    if table is None:
        return []
    rows = [
        [f"**{line_text(cell)}**" if i in table.marked else line_text(cell) for cell in row]
        for i, row in enumerate(table.rows)
    ]
    blocks = [f"{level} {line_text(table.title)}", _rows(list(map(line_text, table.columns)), rows)]
    return [*blocks, line_text(table.note)] if table.note else blocks


def _rows(columns: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
