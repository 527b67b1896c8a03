"""The loss curves of a run, drawn with characters."""

import math
from typing import Any

from gptcli.reports.curves import curve, lines_of, smooth, thin

_MOST_POINTS = 400  # more than a terminal has columns
_MARKERS = {"train": "braille", "eval": "circle"}  # told apart without colours too


def loss_plot(metrics: list[dict[str, Any]], width: int, height: int, *, colour: bool) -> str:
    """Training loss (a line, of many points their moving mean) and validation loss (circles) in
    nats per token by step, as `height` lines of text; empty where there are not two points."""
    import plotext

    plotext.terminal.limit(False, False)  # the size asked for, whatever stdout is
    figure = plotext.figure.clear()
    figure.theme("simple").plot_size(width, height)
    drawn, right, top = 0, 0.0, -math.inf
    for event, marker in _MARKERS.items():
        points = curve(lines_of(metrics, event), "loss")
        if event == "train" and len(points) >= 50:  # as in the report
            points = smooth(points, len(points) // 20)
        points = thin(points, _MOST_POINTS)
        pairs = [(x, y) for x, y in zip(points.x, points.y, strict=True) if math.isfinite(y)]
        if pairs:
            name = "training" if event == "train" else "validation"
            signal = figure.signal(*map(list, zip(*pairs, strict=True)), marker=marker)
            figure.draw(signal.label(name).lines(event == "train"))
            drawn += len(pairs)
            right, top = max(right, pairs[-1][0]), max(top, *(y for _, y in pairs))
    if drawn < 2:
        return ""
    figure.legend(x=right, y=top, relative=True, ha="right")  # curves fall: that corner is free
    figure.title("loss in nats per token, by step")
    return str(figure.build().string(colorless=not colour)).rstrip("\n") + "\n"
