"""Attention drawn: a picture of heads for reports, and images of single heads."""

import base64
import io
from typing import Any

import numpy as np
from matplotlib import image
from matplotlib.axes import Axes
from numpy.typing import NDArray

from gptcli.evaluation.head_shares import LEVELS, HeadShares
from gptcli.reports.drawing import LARGE, svg
from gptcli.reports.section import Plot, Section
from gptcli.reports.table import Table
from gptcli.reports.text import decimals, percent

_BLUE = (84, 110, 224)  # seen on light and on dark
SHARE_COLUMNS = ["head", "first token", "itself", "token before", "tokens back"]


def attention_section(report: dict[str, Any]) -> Section | None:
    """The picture that `attention_picture` left in the report; None without one."""
    found = report.get("attention") or {}
    if not found:
        return None
    layers, heads, tokens = found["layers"], found["heads"], found["tokens"]
    shares = [[HeadShares(**one) for one in row] for row in found["shares"]]
    what = (
        f"What each token of “{''.join(tokens)}” attends to, in {len(layers)} of"
        f" {found['of_layers']} layers (rows) and {len(heads)} of {found['of_heads']} heads"
        " (columns). In each square, a row is a token and its columns are the tokens before it,"
        " from the first; the stronger the colour, the more."
    )
    rows = [
        [f"layer {layer}", *_share_cells(_mean(row))]
        for layer, row in zip(layers, shares, strict=True)
    ]
    columns = ["mean of the heads shown", *SHARE_COLUMNS[1:]]
    words = " ".join(
        f"Layer {layer}: {in_words(_mean(row))}." for layer, row in zip(layers, shares, strict=True)
    )
    plot = Plot("attention", "Attention", words, _drawn(found), large=True)
    return Section("Attention", [what], [plot], [Table("Attention by layer", columns, rows)])


def share_row(name: str, shares: HeadShares) -> list[str]:
    """A row of a table with SHARE_COLUMNS."""
    return [name, *_share_cells(shares)]


def in_words(shares: HeadShares) -> str:
    """The shares, for those who cannot see the map."""
    return (
        f"{percent(shares.first)} to the first token, {percent(shares.itself)} to itself,"
        f" {percent(shares.previous)} to the token before,"
        f" {decimals(shares.distance_tokens, 1)} tokens back on average"
    )


def map_image(weights: NDArray[np.float32]) -> str:
    """Weights (T, T) as a `data:` address of a PNG of T x T pixels, see-through where they are 0.

    The shade goes with the square root, so that weak attention is seen too.
    """
    file = io.BytesIO()
    image.imsave(file, _shaded(weights), format="png", metadata={"Software": ""})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _shaded(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Weights (T, T) as pixels (T, T, 4); few levels, which compress well."""
    shade = np.round(np.sqrt(weights.clip(0, 1)) * 31) / 31
    pixels = np.empty((*weights.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = _BLUE, np.round(shade * 255)
    return pixels


def _drawn(found: dict[str, Any]) -> str:
    """All maps in one image, layers below one another, heads beside one another."""
    size, layers, heads = len(found["tokens"]), found["layers"], found["heads"]
    cell = size + 2  # with the space to the next one
    whole = np.zeros((len(layers) * cell - 2, len(heads) * cell - 2), np.float32)
    lower = np.tril_indices(size)
    for i, row in enumerate(found["maps"]):
        for j, digits in enumerate(row):
            square = np.zeros((size, size), np.float32)
            square[lower] = [int(digit, 16) / LEVELS for digit in digits]
            whole[i * cell : i * cell + size, j * cell : j * cell + size] = square

    def draw(axes: Axes) -> None:
        axes.imshow(_shaded(whole), interpolation="none", aspect="equal")
        middle = (size - 1) / 2
        axes.set_xticks([j * cell + middle for j in range(len(heads))], labels=map(str, heads))
        axes.set_yticks([i * cell + middle for i in range(len(layers))], labels=map(str, layers))
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.set(xlabel="head", ylabel="layer")

    return svg("attention", LARGE, draw)


def _mean(shares: list[HeadShares]) -> HeadShares:
    columns = np.mean([list(vars(one).values()) for one in shares], axis=0)
    return HeadShares(*columns.tolist())


def _share_cells(shares: HeadShares) -> list[str]:
    return [
        percent(shares.first),
        percent(shares.itself),
        percent(shares.previous),
        decimals(shares.distance_tokens, 1),
    ]
