"""A report page as one HTML file that stands alone: no scripts, nothing fetched."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from gptcli.reports.page import Page
from gptcli.reports.section import Plot
from gptcli.reports.table import Table
from gptcli.reports.text import visible

# Classes for the badge; a status from a damaged file gets none of them.
STATUS_CLASSES = {"running": "running", "finished": "good", "stopped": "stopped", "failed": "bad"}


# A cell of a column of figures: short, and begins as a number does. Other columns are text.
_FIGURE = re.compile(r"(–|[-−+<>≥≤≈±]?\s?\d).{0,22}|inf|yes|no|", re.DOTALL)


def render_html(page: Page) -> str:
    """The page as HTML. All text in it is untrusted; the SVG of its figures is ours."""
    return page_template("report.html.jinja").render(
        page=page,
        status_class=STATUS_CLASSES.get(page.status or "", ""),
        column_classes=column_classes,
        drawn=_drawn,
    )


def column_classes(table: Table) -> list[str]:
    """For each column: `n` for figures, `t` for text that is short, `w` for text that wraps."""
    kinds = []
    for column in zip(*table.rows, strict=False):
        if all(_FIGURE.fullmatch(cell) for cell in column):
            kinds.append("n")
        else:
            kinds.append("w" if max(map(len, column)) > 32 else "t")
    return kinds


def _drawn(plot: Plot) -> Markup:
    return Markup(plot.svg)


def page_template(name: str) -> Template:
    """A template beside this module; what is inserted is escaped and made visible."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    """Applied by Jinja to every inserted value, so that none reaches the page unseen."""
    return value if isinstance(value, Markup) else visible(str(value))
