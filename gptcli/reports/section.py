"""Parts of a report page, before they are HTML or Markdown."""

from dataclasses import dataclass, field

from gptcli.reports.table import Table


@dataclass(frozen=True)
class Plot:
    """One figure: `svg` is an `<svg>` element whose ids start with `name`; `description` says in
    words what it shows, for those who cannot see it."""

    name: str
    title: str
    description: str
    svg: str
    large: bool


@dataclass(frozen=True)
class Section:
    """A titled part of a report. Text is raw and untrusted, the SVG of `plots` is ours."""

    title: str
    text: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
