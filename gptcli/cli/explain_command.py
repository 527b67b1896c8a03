"""`gpt explain`: how much each token of a text surprises a model, and what it looks at."""

import heapq
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli.generate_command import read_stdin
from gptcli.cli.invocation import invocation
from gptcli.cli.run_flags import ModelOption
from gptcli.cli.starting import starting
from gptcli.cli.terminal import check_page, columns, styled, takes_colours, write_out, write_page
from gptcli.errors import ConfigError
from gptcli.reports.text import decimals, number, percent, visible

if TYPE_CHECKING:
    from gptcli.evaluation.explain import ExplainedToken, Explanation

log = logging.getLogger("gptcli")

_MOST_ROWS = 10  # of a table in a terminal; pipes and files get all
# From so many bits on, black on a background of 256 colours, from pale yellow to red.
_COLOURS = (
    (1, "30;48;5;230"),
    (2, "30;48;5;222"),
    (4, "30;48;5;215"),
    (8, "30;48;5;209"),
    (12, "30;48;5;203"),
)

TextOption = Annotated[
    str | None, typer.Option("--text", metavar="TEXT", help="The text to explain.")
]
FileOption = Annotated[
    Path | None, typer.Option("--file", metavar="FILE", help="A file that holds it.")
]
TopOption = Annotated[
    int,
    typer.Option("--top", metavar="K", min=1, max=100, help="Show the K likeliest at each place."),
]
TokenOption = Annotated[
    int | None,
    typer.Option(
        "--token",
        metavar="N",
        help="Show what the prediction of the token at position N rests on; -1 is the last.",
    ),
]
LayerOption = Annotated[
    int | None,
    typer.Option(
        "--layer",
        metavar="L",
        min=0,
        help="Show what layer L (from 0) attends to, as its heads' mean.",
    ),
]
HeadOption = Annotated[
    int | None,
    typer.Option("--head", metavar="H", min=0, help="With --layer: only its head H (from 0)."),
]
HtmlOption = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Also write a page, with all attention maps."),
]


def explain(
    context: typer.Context,
    stdin: Annotated[
        str | None, typer.Argument(metavar="-", help="'-' reads the text from stdin.")
    ] = None,
    model: ModelOption = None,
    text: TextOption = None,
    file: FileOption = None,
    top: TopOption = 5,
    token: TokenOption = None,
    layer: LayerOption = None,
    head: HeadOption = None,
    html: HtmlOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> int:
    """Show how much each token of a text surprises a model.

    In bits, and with what it held likelier. A terminal gets the text in colours and the most
    surprising tokens, a pipe or file a line a token. A surprise of n bits is a probability of 2^-n;
    together they are the loss of gpt eval. With --token: the bits that the token's probability
    loses without each token before it. With --layer: the tokens that get the most attention. A text
    longer than the model's block_size is read in windows of that many tokens, each of which begins
    with nothing before it, as gpt eval does.
    """
    if head is not None and layer is None:
        raise ConfigError("--head needs --layer", "as: --layer 0 --head 0")
    check_page(html)
    given = _text(stdin, text, file)
    with starting():
        from gptcli.config.load import load_config
        from gptcli.explain import explain as run

    with invocation(context).display.live():
        found = run(
            load_config(None).config,
            given,
            model=model,
            top=top,
            token=token,
            layer=layer,
            head=head,
            maps=html is not None,
        )
    if as_json:
        write_out(json.dumps(found.to_json(layer, head), ensure_ascii=False) + "\n")
    else:
        colours = takes_colours()
        write_out(explanation_text(found, layer, head, colours), raw=True)
        log.info(summary(found))
    if html is not None:
        from gptcli.reports.explain_page import explain_html

        write_page(html, explain_html(found))
    return 0


def _text(stdin: str | None, text: str | None, file: Path | None) -> str | Path:
    """The one text that is given, or the file that holds it."""
    if stdin not in (None, "-"):
        raise ConfigError(
            f"unexpected argument {stdin!r}", "a text is given as: --text TEXT, or - for stdin"
        )
    names = {"--text": text, "--file": file, "-": stdin}
    given = [name for name, value in names.items() if value is not None]
    if len(given) != 1:
        wrong = f"{' and '.join(given)} exclude each other" if given else "no text given"
        raise ConfigError(wrong, "give one of --text TEXT, --file FILE, - (stdin)")
    if file is not None:
        return file
    return read_stdin() if text is None else text


def summary(found: "Explanation") -> str:
    """The figures of the whole text in a line."""
    windows = ""
    if found.windows > 1:
        windows = f", in {found.windows} windows of up to {found.block_size} tokens"
    return (
        f"{found.name}, step {found.step}: {found.scored:,} tokens, {found.bits:.1f} bits:"
        f" loss {found.loss:.4f}, {found.bits_per_byte:.4f} bits per byte{windows}"
    )


def explanation_text(
    found: "Explanation", layer: int | None, head: int | None, colours: bool
) -> str:
    """The parts that were asked for; with `colours`, for a terminal, the most telling rows only."""
    parts = []
    if colours:
        parts += [_heat_map(found), "Most surprising:\n" + _token_table(found, most=_MOST_ROWS)]
    elif found.chosen is None and layer is None:
        parts.append(_token_table(found, most=None))
    if found.chosen is not None:
        parts.append(_changes(found, _MOST_ROWS if colours else None))
    if layer is not None:
        parts.append(_attended(found, layer, head))
    return "\n".join(parts)


def _heat_map(found: "Explanation") -> str:
    """The text as it is, whole characters coloured by their bits, and what the colours mean."""
    shown = []
    for piece in found.pieces:
        # No colour runs on to the edge of the terminal, and a surprising line end is seen.
        lines = visible(piece.text).split("\n")
        marked = [line + "↵" for line in lines[:-1]] + lines[-1:]
        shown.append("\n".join(styled(line, _colour(piece.bits), bool(line)) for line in marked))
    steps = [f" {least}+ " for least, _ in _COLOURS]
    legend = "".join(styled(s, c, True) for s, (_, c) in zip(steps, _COLOURS, strict=True))
    return "".join(shown) + f"\n\nbits: {legend}\n"


def _colour(bits: float) -> str | None:
    return next((code for least, code in reversed(_COLOURS) if bits >= least), None)


def _token_table(found: "Explanation", most: int | None) -> str:
    tokens = found.tokens
    if most is not None:
        tokens = sorted(tokens[1:], key=lambda t: -(t.bits or 0.0))[:most]
    width = max(_cells(quoted(token.text)) for token in tokens)
    rows = [["POSITION", "BITS", "PROBABILITY", "RANK", f"{'TOKEN':<{width}}  LIKELIEST"]]
    for token in tokens:
        likeliest = ", ".join(
            f"{quoted(a.text)} {percent(a.probability)}" for a in token.alternatives
        )
        rows.append([*_numbers(token), f"{_padded(quoted(token.text), width)}  {likeliest}"])
    return columns(rows, right=frozenset(range(4)))


def _numbers(token: "ExplainedToken") -> list[str]:
    rank = "-" if token.rank is None else number(token.rank)
    return [str(token.position), bits_of(token), probability_of(token), rank]


def bits_of(token: "ExplainedToken") -> str:
    """The token's bits, as a table has them."""
    return "-" if token.bits is None else decimals(token.bits, 2)


def probability_of(token: "ExplainedToken") -> str:
    """The token's probability, as a table has it."""
    return "-" if token.probability is None else f"{token.probability:.2g}"


def quoted(text: str) -> str:
    """A token's text such that a space at its ends is seen."""
    return f'"{text}"'


def _changes(found: "Explanation", most: int | None) -> str:
    """What the chosen prediction rests on: each token before it, and the bits it is worth."""
    assert found.chosen is not None
    token = found.tokens[found.chosen]
    title = f"Position {token.position}, {quoted(token.text)}: {bits_of(token)} bits."
    changed = found.changed()
    if not changed:
        return f"{title} One token alone is before it: there is none to leave out.\n"
    if most is not None:
        changed = sorted(changed, key=lambda pair: -abs(pair[1]))[:most]
    rows = [["POSITION", "BITS", "TOKEN"]]
    rows += [[str(t.position), f"{bits:+.2f}", quoted(t.text)] for t, bits in changed]
    return f"{title} Bits more without each token before it:\n" + columns(
        rows, right=frozenset({0, 1})
    )


def _attended(found: "Explanation", layer: int, head: int | None) -> str:
    """The three tokens that each token, or the chosen prediction alone, attends to most."""
    weights = found.attention[layer]
    chosen = weights.mean(0) if head is None else weights[head]  # (T, T)
    queries = range(len(chosen))
    if found.chosen is not None:  # what predicts a token is the place before it
        query = found.chosen - 1 - found.attention_first
        if query >= len(chosen):
            raise ConfigError(
                f"attention is shown over the first {len(chosen)} tokens of a window; the"
                f" prediction of token {found.chosen} is made at its token {query}"
            )
        queries = range(query, query + 1)
    texts = [quoted(token.text) for token in found.tokens[found.attention_first :]]
    width = max(_cells(texts[query]) for query in queries)
    rows = [["POSITION", f"{'TOKEN':<{width}}  ATTENDS TO"]]
    for query in queries:
        row = chosen[query]
        keys = heapq.nlargest(3, range(query + 1), key=row.__getitem__)
        to = ", ".join(
            f"{found.attention_first + key} {texts[key]} {percent(float(row[key]))}" for key in keys
        )
        rows.append([str(found.attention_first + query), f"{_padded(texts[query], width)}  {to}"])
    name = f"Layer {layer}, " + ("mean of its heads" if head is None else f"head {head}")
    return f"{name}:\n" + columns(rows, right=frozenset({0}))


def _cells(text: str) -> int:
    """Columns of a terminal that `text` takes."""
    from rich.cells import cell_len

    return cell_len(text)


def _padded(text: str, width: int) -> str:
    return text + " " * (width - _cells(text))
