"""A report page as one HTML file that stands alone: no scripts, nothing fetched."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from gptcli.reports.page import Page
from gptcli.reports.section import Plot
from gptcli.reports.text import visible

# Classes for the badge; a status from a damaged file gets none of them.
STATUS_CLASSES = {"running": "running", "finished": "good", "stopped": "stopped", "failed": "bad"}


def render_html(page: Page, plots: list[Plot]) -> str:
    """The page with its figures. All text in `page` is untrusted; the SVG of `plots` is ours."""
    return page_template("report.html.jinja").render(
        page=page,
        large=[(plot, Markup(plot.svg)) for plot in plots if plot.large],
        small=[(plot, Markup(plot.svg)) for plot in plots if not plot.large],
        status_class=STATUS_CLASSES.get(page.status or "", ""),
    )


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
