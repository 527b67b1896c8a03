"""Training curves as SVG elements for inlining into HTML.

Colours are placeholders that become CSS variables of the page, so that the figures follow its light
or dark theme; text stays text. The same metrics give the same bytes.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from gptcli.reports.curves import Array, Curve, by_time, curve, lines_of, smooth, thin
from gptcli.reports.section import Plot
from gptcli.reports.text import compact, decimals

# Colours that occur nowhere else, and the CSS variables that the SVG gets instead.
INK, RULE, TRAIN, VAL, SURFACE = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
VARIABLES = {INK: "--muted", RULE: "--rule", TRAIN: "--train", VAL: "--val", SURFACE: "--card"}

STYLE = {
    "svg.fonttype": "none",
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
# Points (1/72 inch): what the SVG's viewBox is in. Two large figures, or three small ones, a row.
LARGE, SMALL = (400, 235), (270, 165)
# Tick distances that people count in.
ROUND = [1, 2, 5, 10]


def training_plots(metrics: list[dict[str, Any]]) -> list[Plot]:
    """Loss by step and by time, learning rate, gradient norm and speed: those that have points."""
    train, evals = lines_of(metrics, "train"), lines_of(metrics, "eval")
    losses = curve(train, "loss"), curve(evals, "loss")
    resumed = [float(line["step"]) for line in lines_of(metrics, "resume")]
    plots = [_loss_plot("loss-by-step", "Loss by step", *losses, _step_axis, resumed)]
    timed = by_time(losses[0], train), by_time(losses[1], train)
    plots.append(_loss_plot("loss-by-time", "Loss by training time", *timed, _time_axis, []))
    for key, title in (
        ("lr", "Learning rate"),
        ("grad_norm", "Gradient norm"),
        ("tokens_per_second", "Tokens per second"),
    ):
        plots.append(_small_plot(key, title, curve(train, key)))
    return [plot for plot in plots if plot is not None]


def _loss_plot(
    name: str,
    title: str,
    train: Curve,
    val: Curve,
    axis: Callable[..., None],
    resumed: list[float],
) -> Plot | None:
    """Training loss with its moving mean, validation loss with its best point marked."""
    if not (np.isfinite(train.y).any() or np.isfinite(val.y).any()):
        return None

    def draw(axes: Axes) -> None:
        if len(train):
            _noisy_line(axes, train, "training")
        if len(val):
            points = thin(val)
            axes.plot(
                points.x, points.y, color=VAL, label="validation", marker=_dot(points, 40), ms=3
            )
            _mark_best(axes, val)
        for step in resumed:
            axes.axvline(step, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.set_ylim(*_limits(train.y, val.y))
        axes.set_ylabel("nats per token")
        axis(axes, train, val)
        axes.legend(frameon=False, loc="upper right", handlelength=1.4, borderaxespad=0.2)

    description = "Training and validation loss in nats per token."
    if resumed:
        description += " Dotted lines: resumed from a checkpoint."
    return Plot(name, title, description, _svg(name, LARGE, draw), large=True)


def _noisy_line(axes: Axes, points: Curve, label: str) -> None:
    """The points faint behind their moving mean; few points are readable as they are."""
    shown = points
    if len(points) >= 50:
        raw, shown = thin(points), thin(smooth(points, len(points) // 20))
        axes.plot(raw.x, raw.y, color=TRAIN, linewidth=0.8, alpha=0.3)
    axes.plot(shown.x, shown.y, color=TRAIN, label=label, marker=_dot(shown), ms=3)


def _dot(points: Curve, most: int = 1) -> str:
    """A marker for curves of few points; a single one would draw no line at all."""
    return "o" if len(points) <= most else ""


def _mark_best(axes: Axes, val: Curve) -> None:
    """A ring and the value at the lowest validation loss."""
    if not np.isfinite(val.y).any():
        return
    i = int(np.nanargmin(val.y))
    x, y = float(val.x[i]), float(val.y[i])
    axes.plot([x], [y], marker="o", ms=6, mfc=SURFACE, mec=VAL, mew=1.6, ls="", clip_on=False)
    axes.annotate(
        f"best {decimals(y, 3)}",
        (x, y),
        xytext=(0, 8),
        textcoords="offset points",
        ha="right" if x > 0.6 * val.x.max() else "left",
        va="bottom",
        color=VAL,
        fontweight="bold",
    )


def _limits(*losses: Array) -> tuple[float, float]:
    """Room for all but single spikes: a diverged step must not flatten the whole curve."""
    values = np.concatenate([y[np.isfinite(y)] for y in losses])
    low, high = float(values.min()), float(values.max())
    usual = float(np.quantile(values, 0.98))
    first = max(float(y[np.isfinite(y)][0]) for y in losses if np.isfinite(y).any())
    high = min(high, max(first, usual + (usual - low)))
    room = (high - low) or max(abs(high), 1.0)
    return low - 0.08 * room, high + 0.06 * room


def _small_plot(key: str, title: str, points: Curve) -> Plot | None:
    if not np.isfinite(points.y).any():
        return None

    def draw(axes: Axes) -> None:
        if key == "lr":  # exact, and its corners mean something
            shown = thin(points)
            axes.plot(shown.x, shown.y, color=TRAIN, marker=_dot(shown), ms=3)
        else:
            _noisy_line(axes, points, title)
        low, high = _limits(points.y)
        axes.set_ylim(low if float(np.nanmin(points.y)) < 0 else 0.0, high)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4, steps=ROUND))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: compact(value)))
        _step_axis(axes, points)

    return Plot(key.replace("_", "-"), title, f"{title} by step.", _svg(key, SMALL, draw), False)


def _step_axis(axes: Axes, *curves: Curve) -> None:
    axes.set_xlim(0, max(float(c.x.max()) for c in curves if len(c)) or 1.0)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=ROUND, integer=True))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: compact(value)))
    axes.set_xlabel("step")


def _time_axis(axes: Axes, *curves: Curve) -> None:
    """Seconds, minutes, hours or days, by the length of the run."""
    last = max(float(c.x.max()) for c in curves if len(c)) or 1.0
    unit, word = next(
        (unit, word)
        for unit, word in (
            (86400.0, "days"),
            (3600.0, "hours"),
            (60.0, "minutes"),
            (1.0, "seconds"),
        )
        if last >= 2 * unit or unit == 1.0
    )
    axes.set_xlim(0, last)
    ticks = np.asarray(ticker.MaxNLocator(5, steps=ROUND).tick_values(0, last / unit)) * unit
    axes.set_xticks(ticks[(ticks >= 0) & (ticks <= last)])
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: compact(value / unit)))
    axes.set_xlabel(word)


def _svg(name: str, size: tuple[int, int], draw: Callable[[Axes], None]) -> str:
    """The `<svg>` element of one pair of axes: no ids shared with other figures, no addresses."""
    with matplotlib.style.context(["default", {**STYLE, "svg.hashsalt": name}]):
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _inline(file.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    # The page's style sheet sets font and joins; a <style> in here would reach the whole page.
    blocks = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->| font-family: [^;\"]*;"
    svg = re.sub(blocks, "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg width="[^"]*" height="[^"]*"', "<svg", svg)
    # The HTML parser knows both namespaces; without them no address is left in the element.
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r' (id="|xlink:href="#)', rf" \1{name}-", svg).replace("url(#", f"url(#{name}-")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.strip()
