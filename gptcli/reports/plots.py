"""The curves of a training run as figures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes

from gptcli.reports.curves import (
    Array,
    Curve,
    by_time,
    by_tokens,
    curve,
    later,
    lines_of,
    smooth,
    thin,
)
from gptcli.reports.drawing import INK, LARGE, SMALL, SURFACE, TRAIN, VAL, svg
from gptcli.reports.section import Plot
from gptcli.reports.text import compact, decimals, size

# Tick distances that people count in.
ROUND = [1, 2, 5, 10]
# Points of the noise behind a smoothed curve, and of the curve: more are invisible in a figure 500
# pixels wide, and there are eight figures of the loss.
_NOISE_POINTS, _LINE_POINTS = 1000, 400


@dataclass(frozen=True)
class View:
    """Figures that show the same in one way; `label` names the way."""

    label: str
    plots: list[Plot]


@dataclass(frozen=True)
class TrainingPlots:
    """The loss in several views, of which a reader looks at one, and small figures beside it."""

    loss: list[View]
    small: list[Plot]


@dataclass(frozen=True)
class _Axis:
    """What runs along the bottom: a word for it, and how its ticks are set."""

    name: str
    set: Callable[..., None]


def training_plots(metrics: list[dict[str, Any]], resumed: list[float]) -> TrainingPlots:
    """Loss by step, tokens and time, in whole, its later half and with logarithmic axes; learning
    rate, gradient norm, speed and memory. What has no points is left out. At the steps `resumed`
    the run went on from a checkpoint."""
    train, evals = lines_of(metrics, "train"), lines_of(metrics, "eval")
    losses = curve(train, "loss"), curve(evals, "loss")
    tokens = by_tokens(losses[0], train, evals), by_tokens(losses[1], train, evals)
    seconds = by_time(losses[0], train), by_time(losses[1], train)
    steps_axis, tokens_axis = _Axis("step", _step_axis), _Axis("tokens", _token_axis)
    time_axis = _Axis("training time", _time_axis)
    views = [
        View("by step", _pair(steps_axis, *losses, resumed)),
        View("by tokens", _pair(tokens_axis, *tokens, [])),
        View("by time", _pair(time_axis, *seconds, [])),
        View("log scale", _logarithmic(tokens_axis, *tokens) + _logarithmic(time_axis, *seconds)),
    ]
    speed, memory = curve(train, "tokens_per_second"), curve(train, "memory_bytes")
    small = [
        _small_plot("lr", "Learning rate", curve(train, "lr"), steps_axis),
        _small_plot("grad-norm", "Gradient norm", curve(train, "grad_norm"), steps_axis),
        _small_plot("speed", "Tokens per second", by_time(speed, train), time_axis),
        _small_plot("memory", "Peak memory", by_time(memory, train), time_axis, size),
    ]
    return TrainingPlots(
        [view for view in views if view.plots], [plot for plot in small if plot is not None]
    )


def _pair(axis: _Axis, train: Curve, val: Curve, resumed: list[float]) -> list[Plot]:
    """The loss in whole, and of the later half, where a whole curve is all but flat."""
    if not _shows(train, val):
        return []
    name, title = f"loss-by-{axis.name.replace(' ', '-')}", f"Loss by {axis.name}"
    plots = [_loss_plot(name, title, train, val, axis, resumed)]
    half = max(float(c.x.max()) for c in (train, val) if len(c)) / 2
    late = later(train, half), later(val, half)
    if sum(int(np.isfinite(c.y).sum()) for c in late) >= 3:
        shown = [step for step in resumed if step >= half]
        plots.append(_loss_plot(f"{name}-later", f"{title}, later half", *late, axis, shown))
    return plots


def _logarithmic(axis: _Axis, train: Curve, val: Curve) -> list[Plot]:
    """Both axes logarithmic: a loss that falls as a power of the tokens is a straight line."""
    both = [Curve(c.x[c.x > 0], np.where(c.y > 0, c.y, np.nan)[c.x > 0]) for c in (train, val)]
    if not _shows(*both):
        return []
    name = f"loss-log-{axis.name.replace(' ', '-')}"
    title = f"Loss by {axis.name}, both axes logarithmic"
    return [_loss_plot(name, title, both[0], both[1], axis, [], logarithmic=True)]


def _shows(train: Curve, val: Curve) -> bool:
    return bool(np.isfinite(train.y).any() or np.isfinite(val.y).any())


def _loss_plot(
    name: str,
    title: str,
    train: Curve,
    val: Curve,
    axis: _Axis,
    resumed: list[float],
    logarithmic: bool = False,
) -> Plot:
    """Training loss with its moving mean, validation loss with its best point marked."""

    def draw(axes: Axes) -> None:
        if len(train):
            _noisy_line(axes, train, "training")
        if len(val):
            points = thin(val, _LINE_POINTS)
            axes.plot(
                points.x, points.y, color=VAL, label="validation", marker=_dot(points, 40), ms=3
            )
            _mark_best(axes, val)
        for step in resumed:
            axes.axvline(step, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.set_ylim(*_limits(train.y, val.y, above_zero=logarithmic))
        axes.set_ylabel("nats per token", labelpad=3)
        axis.set(axes, train, val)
        if logarithmic:
            _log_axes(axes, train, val)
        axes.legend(frameon=False, loc="upper right", handlelength=1.4, borderaxespad=0.2)

    description = (
        f"{title}, in nats per token. {_ends('Training', train)}{_ends('Validation', val)}"
    )
    if resumed:
        description += "Dotted lines: resumed from a checkpoint."
    return Plot(name, title, description.strip(), svg(name, LARGE, draw), large=True)


def _ends(label: str, points: Curve) -> str:
    """The curve in words, for those who cannot see it."""
    values = points.y[np.isfinite(points.y)]
    if not len(values):
        return ""
    first, last, least = (decimals(float(v), 3) for v in (values[0], values[-1], values.min()))
    return f"{label}: from {first} to {last}, lowest {least}. "


def _noisy_line(axes: Axes, points: Curve, label: str) -> None:
    """The points faint behind their moving mean; few points are readable as they are."""
    shown = points
    if len(points) >= 50:
        raw = thin(points, _NOISE_POINTS)
        shown = thin(smooth(points, len(points) // 20), _LINE_POINTS)
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
        xytext=(0, -7),
        textcoords="offset points",
        ha="right" if x > 0.6 * val.x.max() else "left",
        va="top",
        color=VAL,
        fontweight="bold",
    )


def _limits(*losses: Array, above_zero: bool = False) -> tuple[float, float]:
    """Room for all but single spikes: a diverged step must not flatten the whole curve."""
    values = np.concatenate([y[np.isfinite(y)] for y in losses])
    low, high = float(values.min()), float(values.max())
    usual = float(np.quantile(values, 0.98))
    first = max(float(y[np.isfinite(y)][0]) for y in losses if np.isfinite(y).any())
    high = min(high, max(first, usual + (usual - low)))
    if above_zero:
        return low * (low / high) ** 0.12, high * 1.05
    room = (high - low) or max(abs(high), 1.0)
    return low - 0.12 * room, high + 0.06 * room


def _small_plot(
    name: str,
    title: str,
    points: Curve,
    axis: _Axis,
    shown_as: Callable[[Any], str] = compact,
) -> Plot | None:
    if not np.isfinite(points.y).any():
        return None

    def draw(axes: Axes) -> None:
        if name in ("lr", "memory"):  # exact, and its corners mean something
            shown = thin(points, _NOISE_POINTS)
            axes.plot(shown.x, shown.y, color=TRAIN, marker=_dot(shown), ms=3)
        else:
            _noisy_line(axes, points, title)
        low, high = _limits(points.y)
        axes.set_ylim(low if float(np.nanmin(points.y)) < 0 else 0.0, high)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4, steps=ROUND))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: shown_as(value)))
        axis.set(axes, points)

    values = points.y[np.isfinite(points.y)]
    extent = f"from {shown_as(float(values.min()))} to {shown_as(float(values.max()))}"
    last = shown_as(float(values[-1]))
    words = f"{title} by {axis.name}: {extent}, at the end {last}."
    return Plot(name, title, words, svg(name, SMALL, draw), large=False)


def _step_axis(axes: Axes, *curves: Curve) -> None:
    _linear(axes, curves, "step")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=ROUND, integer=True))


def _token_axis(axes: Axes, *curves: Curve) -> None:
    _linear(axes, curves, "tokens")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5, steps=ROUND))


def _linear(axes: Axes, curves: tuple[Curve, ...], label: str) -> None:
    axes.set_xlim(*_extent(curves))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: compact(value)))
    axes.set_xlabel(label, labelpad=2)


def _extent(curves: tuple[Curve, ...]) -> tuple[float, float]:
    """From 0 to the last point; of the later half of a run, from its first point."""
    first = min(float(c.x.min()) for c in curves if len(c))
    last = max(float(c.x.max()) for c in curves if len(c)) or 1.0
    return (first if last / 2 <= first < last else 0.0), last


def _time_axis(axes: Axes, *curves: Curve) -> None:
    """Seconds, minutes, hours or days, by the length of the run."""
    first, last = _extent(curves)
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
    axes.set_xlim(first, last)
    found = ticker.MaxNLocator(5, steps=ROUND).tick_values(first / unit, last / unit)
    ticks = np.asarray(found) * unit
    axes.set_xticks(ticks[(ticks >= first) & (ticks <= last)])
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: compact(value / unit)))
    axes.set_xlabel(word, labelpad=2)


def _log_axes(axes: Axes, *curves: Curve) -> None:
    """Logarithmic axes whose ticks are round numbers, as on the linear ones."""
    shown_x = axes.xaxis.get_major_formatter()
    low, high = axes.get_ylim()
    ticks = np.asarray(ticker.MaxNLocator(6, steps=ROUND).tick_values(low, high))
    axes.set(xscale="log", yscale="log", ylim=(low, high))
    first = min(float(c.x.min()) for c in curves if len(c))
    last = max(float(c.x.max()) for c in curves if len(c))
    axes.set_xlim(first, last if last > first else first * 2)
    axes.set_yticks(ticks[(ticks > low) & (ticks <= high)])
    axes.xaxis.set_major_locator(ticker.LogLocator(10, subs=(1, 2, 5), numticks=8))
    axes.xaxis.set_major_formatter(shown_x)
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: compact(value)))
    for side in (axes.xaxis, axes.yaxis):
        side.set_minor_locator(ticker.NullLocator())
