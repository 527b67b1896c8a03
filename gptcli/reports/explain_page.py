"""The page of `gpt explain`: one HTML file that stands alone, with nothing in colour that is not in
a table too."""

import math
from dataclasses import dataclass

from gptcli.evaluation.explain import ExplainedToken, Explanation
from gptcli.evaluation.head_shares import head_shares
from gptcli.reports.attention import SHARE_COLUMNS, in_words, map_image, share_row
from gptcli.reports.headlines import Headline
from gptcli.reports.html import page_template
from gptcli.reports.table import Table
from gptcli.reports.text import clip, decimals, number, percent

_MOST_TOKENS = 2000  # of the text, on a page that a phone still scrolls
_MOST_MAPPED = 128  # tokens of a map, below which a pixel of it is still seen
_MOST_PIXELS = 3_000_000  # of all maps together: less than 2 MB of PNG
_STEPS = (1, 2, 4, 8, 12)  # bits from which on a token has the next stronger colour


@dataclass(frozen=True)
class _Mark:
    """A part of the text: how it is coloured, and what hovering tells."""

    text: str
    style: str
    title: str


@dataclass(frozen=True)
class _Map:
    """One head: its name, the image and the same in words."""

    name: str
    source: str
    words: str


@dataclass(frozen=True)
class _Layer:
    name: str
    maps: list[_Map]
    table: Table


def explain_html(found: Explanation) -> str:
    """The page. It holds the first tokens of a long text only, and says so."""
    text = "".join(piece.text for piece in found.pieces if piece.first or piece.bits)
    windows = f"{number(found.windows)} windows of {number(found.block_size)} tokens"
    subtitle = [f"{found.name}, step {number(found.step)}"]
    subtitle += [windows] if found.windows > 1 else []
    return page_template("explain.html.jinja").render(
        title=clip(" ".join(text.split()), 120),
        subtitle=subtitle,
        headlines=_headlines(found),
        steps=_STEPS,
        marks=_marks(found),
        left_out=max(0, len(found.tokens) - _MOST_TOKENS),
        shown=_MOST_TOKENS,
        tokens=_token_table(found.tokens[:_MOST_TOKENS]),
        chosen=None if found.chosen is None else found.tokens[found.chosen],
        changed=_changed_marks(found),
        changes=_change_table(found),
        layers=_layers(found) if _mapped(found) > 1 else [],
        mapped=_mapped(found),
        mapped_text=_mapped_text(found),
    )


def _headlines(found: Explanation) -> list[Headline]:
    most = max(found.tokens[1:], key=lambda token: token.bits or 0.0)
    return [
        Headline("Bits per byte", decimals(found.bits_per_byte, 3), "lower is less surprised"),
        Headline("Loss", decimals(found.loss, 3), "nats per token"),
        Headline("Tokens", number(found.scored), f"{number(found.bytes)} bytes of text"),
        Headline("Most surprising", _bits(most), f"bits, at position {most.position}"),
    ]


def _marks(found: Explanation) -> list[_Mark]:
    marks = []
    for piece in found.pieces:
        if piece.first >= _MOST_TOKENS:
            break
        parts = found.tokens[piece.first : piece.stop]
        level = sum(piece.bits >= step for step in _STEPS)
        places = "–".join(str(place) for place in dict.fromkeys((piece.first, piece.stop - 1)))
        title = f"position {places}: {_bits(parts[0])} bits"
        if len(parts) > 1:
            title = f"positions {places}: {decimals(piece.bits, 2)} bits"
        elif parts[0].bits is None:
            title = "nothing predicts it"
        marks.append(_Mark(piece.text, f"s{level}", title))
    return marks


def _token_table(tokens: list[ExplainedToken]) -> Table:
    rows = [
        [
            str(token.position),
            _quoted(token.text),
            _bits(token),
            "–" if token.probability is None else f"{token.probability:.2g}",
            "–" if token.rank is None else number(token.rank),
            ", ".join(f"{_quoted(a.text)} {percent(a.probability)}" for a in token.alternatives),
        ]
        for token in tokens
    ]
    columns = ["position", "token", "bits", "probability", "rank", "likeliest"]
    return Table("Tokens", columns, rows)


def _changed_marks(found: Explanation) -> list[_Mark]:
    """The tokens before the chosen one, coloured the more they speak for it or against it."""
    changed = found.changed()
    most = max((abs(bits) for _, bits in changed), default=0.0) or 1.0
    return [
        _Mark(
            token.text,
            f"{'for' if bits > 0 else 'against'}{math.ceil(4 * abs(bits) / most)}",
            f"position {token.position}: {bits:+.2f} bits",
        )
        for token, bits in changed[-_MOST_TOKENS:]
    ]


def _change_table(found: Explanation) -> Table:
    rows = [
        [str(token.position), _quoted(token.text), f"{bits:+.2f}"]
        for token, bits in found.changed()[-_MOST_TOKENS:]
    ]
    return Table("Bits without each token", ["position", "token", "bits without it"], rows)


def _mapped(found: Explanation) -> int:
    """How many tokens the maps show."""
    if not found.attention:
        return 0
    some = next(iter(found.attention.values()))
    fitting = math.isqrt(_MOST_PIXELS // (len(found.attention) * len(some)))
    return min(some.shape[-1], _MOST_MAPPED, fitting)


def _mapped_text(found: Explanation) -> str:
    first = found.attention_first
    return "".join(token.text for token in found.tokens[first : first + _mapped(found)])


def _layers(found: Explanation) -> list[_Layer]:
    size = _mapped(found)
    layers = []
    for layer, weights in found.attention.items():
        heads = [(f"head {head}", one[:size, :size]) for head, one in enumerate(weights)]
        shares = [head_shares(one) for _, one in heads]
        maps = [
            _Map(name, map_image(one), f"Layer {layer}, {name}: {in_words(share)}.")
            for (name, one), share in zip(heads, shares, strict=True)
        ]
        rows = [share_row(name, share) for (name, _), share in zip(heads, shares, strict=True)]
        layers.append(_Layer(f"Layer {layer}", maps, Table(f"Layer {layer}", SHARE_COLUMNS, rows)))
    return layers


def _bits(token: ExplainedToken) -> str:
    return "–" if token.bits is None else decimals(token.bits, 2)


def _quoted(text: str) -> str:
    return f"“{text}”"
