"""Figures as SVG elements for inlining into HTML.

Colours are placeholders that become CSS variables of the page, so that the figures follow its light
or dark theme; text stays text. The same drawing gives the same bytes.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

# Colours that occur nowhere else, and the CSS variables that the SVG gets instead.
INK, RULE, TRAIN, VAL, SURFACE = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
VARIABLES = {INK: "--muted", RULE: "--rule", TRAIN: "--train", VAL: "--val", SURFACE: "--card"}

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar in a name is no formula
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0.0,
    "xtick.major.size": 3.0,
    "lines.linewidth": 1.6,
    "lines.solid_joinstyle": "round",
}
# Points (1/72 inch): what the SVG's viewBox is in. Two large figures, or four small ones, a row.
LARGE, SMALL = (400, 235), (230, 150)
# Of the same, around the axes: left, bottom, right, top. Fixed, for finding them by drawing the
# figure twice takes twice as long, and figures in a row then line up.
_MARGINS = {LARGE: (48, 36, 8, 8), SMALL: (42, 32, 10, 6)}


def svg(name: str, size: tuple[int, int], draw: Callable[[Axes], None]) -> str:
    """The `<svg>` element of one pair of axes, of `size` LARGE or SMALL: its ids start with `name`,
    there are no addresses in it."""
    style: dict[str, Any] = {k: v for k, v in mpl.rcParamsDefault.items() if k != "backend"}
    style |= {**STYLE, "svg.hashsalt": name}
    left, bottom, right, top = _MARGINS[size]
    width, height = size
    with mpl.rc_context(style):  # type: ignore[arg-type]  # it would have each key by name
        figure = Figure(figsize=(width / 72, height / 72))
        FigureCanvasSVG(figure)
        box = (
            left / width,
            bottom / height,
            (width - left - right) / width,
            (height - bottom - top) / height,
        )
        draw(figure.add_axes(box))
        file = io.StringIO()
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _inline(file.getvalue(), name)


def _inline(drawn: str, name: str) -> str:
    drawn = drawn[drawn.index("<svg") :]
    # The page's style sheet sets font and joins; a <style> in here would reach the whole page.
    blocks = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->| font-family: [^;\"]*;"
    drawn = re.sub(blocks, "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'^<svg width="[^"]*" height="[^"]*"', "<svg", drawn)
    # The HTML parser knows both namespaces; without them no address is left in the element.
    drawn = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawn)
    drawn = re.sub(r' (id="|xlink:href="#)', rf" \1{name}-", drawn)
    drawn = drawn.replace("url(#", f"url(#{name}-")
    for colour, variable in VARIABLES.items():
        drawn = drawn.replace(colour, f"var({variable})")
    return drawn.strip()
