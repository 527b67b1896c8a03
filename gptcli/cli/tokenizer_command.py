"""`gpt tokenizer`: learn one from text, and see what several make of a text."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.cli.terminal import columns, write_out
from gptcli.errors import ConfigError
from gptcli.reports.text import visible

if TYPE_CHECKING:
    from gptcli.compare_tokenizers import Encoded
    from gptcli.train_tokenizer import TrainedTokenizer

tokenizer_app = typer.Typer(
    name="tokenizer", help="Train and compare tokenizers.", rich_markup_mode=None
)

_SHADES = ("\x1b[48;5;24m", "\x1b[48;5;238m")  # two backgrounds in turn tell tokens apart
_RESET = "\x1b[0m"
_SCRIPTS_SHOWN = 4


@tokenizer_app.command("train")
def train(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Files, globs, directories, hub: or builtin:."),
    ],
    vocab_size: Annotated[
        int, typer.Option("--vocab-size", metavar="N", min=257, help="Tokens, eot included.")
    ] = 2048,
    pattern: Annotated[
        str, typer.Option("--pattern", metavar="P", help="How words are cut: gpt2, gpt4 or cjk.")
    ] = "gpt4",
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where to write it. Overwrites nothing.")
    ] = Path("tokenizer"),
    max_bytes: Annotated[
        str, typer.Option("--max-bytes", metavar="SIZE", help="Learn from at most this much text.")
    ] = "100MB",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Learn a byte-level BPE and save it in tiktoken's format.

    From whole documents. Use it with --set tokenizer.kind=file --set tokenizer.path=DIR.
    """
    from gptcli.config.data_schema import SourceConfig
    from gptcli.config.units import parse_bytes
    from gptcli.data.tiktoken_tables import PATTERNS
    from gptcli.train_tokenizer import train_tokenizer

    if pattern not in PATTERNS:
        raise ConfigError(f"--pattern {pattern}: there are {', '.join(PATTERNS)}")
    try:
        limit = parse_bytes(max_bytes)
    except ValueError as error:
        raise ConfigError(f"--max-bytes: {error}") from error
    result = train_tokenizer(
        [SourceConfig(path=source) for source in sources],
        vocab_size=vocab_size,
        pattern=pattern,
        max_bytes=limit,
        out=out,
    )
    write_out(_figures(result, as_json))
    return 0


@tokenizer_app.command("show")
def show(
    tokenizers: Annotated[
        list[str],
        typer.Argument(
            metavar="TOKENIZER...",
            help="A saved tokenizer, tokenizer.json, .tiktoken, run or checkpoint; gpt2,"
            " cl100k_base, o200k_base, ... or bytes.",
        ),
    ],
    text: Annotated[
        str | None, typer.Option("--text", metavar="TEXT", help="Encode this and show the tokens.")
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", metavar="FILE", help="Encode this file; - is stdin.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Compare tokenizers on a text: vocabulary, tokens, their length."""
    if text is not None and file is not None:
        raise ConfigError("--text and --file exclude each other; give one text")
    from gptcli.compare_tokenizers import compare_tokenizers, read_text

    given = text if file is None else read_text(file)
    results = compare_tokenizers(tokenizers, given or "")
    if as_json:
        write_out(json.dumps(_as_json(results, given, with_tokens=text is not None)) + "\n")
        return 0
    write_out(_table(results, given is not None))
    if text is not None:
        colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        for result in results:
            # Its own escapes are the only ones left: the tokens' are made visible before.
            write_out(f"\n{visible(result.name)}\n{_tokens(result, colours)}", raw=True)
    return 0


def _figures(result: "TrainedTokenizer", as_json: bool) -> str:
    """What `gpt tokenizer train` prints."""
    tokenizer = result.tokenizer
    if as_json:
        figures = {
            "directory": str(result.directory),
            "vocab_size": tokenizer.vocab_size,
            "pattern": tokenizer.pattern,
            "text_bytes": result.text_bytes,
            "bytes_per_token": result.bytes_per_token,
            "seconds": result.seconds,
            "identity": tokenizer.identity,
        }
        return json.dumps(figures) + "\n"
    rows = [
        ["tokenizer", str(result.directory)],
        ["vocabulary", f"{tokenizer.vocab_size:,} tokens"],
        ["learned from", f"{result.text_bytes:,} bytes in {result.seconds:.1f} s"],
        ["bytes per token", f"{result.bytes_per_token:.3f} on that text"],
    ]
    return columns(rows)


def _as_json(results: "list[Encoded]", text: str | None, with_tokens: bool) -> dict[str, object]:
    rows = []
    for result in results:
        row = result.to_json()
        if text is None:
            row = {
                key: row[key] for key in ("name", "kind", "vocab_size", "eot", "bos", "identity")
            }
        if with_tokens:
            texts = [piece.decode("utf-8", "backslashreplace") for piece in result.pieces]
            row |= {"ids": result.tokens, "pieces": texts}
        rows.append(row)
    about: dict[str, object] = {"tokenizers": rows}
    if text is not None:
        about |= {"bytes": len(text.encode("utf-8", "replace")), "characters": len(text)}
    return about


def _table(results: "list[Encoded]", has_text: bool) -> str:
    scripts = list(dict.fromkeys(s for result in results for s in result.by_script))
    scripts = scripts[:_SCRIPTS_SHOWN]
    head = ["TOKENIZER", "VOCABULARY", "EOT"]
    if has_text:
        head += ["TOKENS", "BYTES/TOKEN", "CHARACTERS/TOKEN", *(s.upper() for s in scripts)]
    rows = [head]
    for result in results:
        eot = result.tokenizer.eot
        row = [result.name, f"{result.tokenizer.vocab_size:,}", "-" if eot is None else str(eot)]
        if has_text:
            characters = result.characters / max(len(result.tokens), 1)
            row += [f"{len(result.tokens):,}", f"{result.bytes_per_token:.3f}", f"{characters:.3f}"]
            known = result.by_script
            row += [f"{known[s]:.3f}" if s in known else "-" for s in scripts]
        rows.append(row)
    return columns(rows, right=frozenset(range(1, len(head))))


def _tokens(result: "Encoded", colours: bool) -> str:
    """The tokens on one line with their borders, and below it their ids."""
    shown = [_shown(piece) for piece in result.pieces]
    if colours:
        marked = (f"{_SHADES[i % 2]}{piece}{_RESET}" for i, piece in enumerate(shown))
        line = "".join(marked)
    else:
        line = "".join(f"|{piece}" for piece in shown) + "|"
    return f"{line}\n{' '.join(map(str, result.tokens))}\n"


def _shown(piece: bytes) -> str:
    r"""A token in one line: `\n` and other control characters, parts of characters (`\xe4`)."""
    text = piece.decode("utf-8", "backslashreplace")
    escaped = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return visible("".join(escaped.get(c, c) for c in text))
