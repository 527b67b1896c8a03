"""`gpt data`: what a corpus holds, and the rows that a model is fed from it."""

import json
import logging
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.cli.display import Display, terminal_is_capable
from gptcli.cli.invocation import invocation
from gptcli.cli.run_flags import ConfigArgument, SetOption, load_run_config
from gptcli.cli.terminal import check_page, columns, styled, takes_colours, write_out, write_page
from gptcli.errors import ConfigError, DataError
from gptcli.reports.text import percent, size, visible

if TYPE_CHECKING:
    from gptcli.data.shown_rows import ShownRow, ShownToken
    from gptcli.inspect_data import DataRows

log = logging.getLogger("gptcli")

data_app = typer.Typer(
    name="data", help="Check a corpus; show what the model is fed.", rich_markup_mode=None
)

_SPLITS = {"given": "data.val", "hash": "whole ones, by hash", "tail": "the end of each"}
_PIPE_WIDTH = 100  # of shown rows where stdout is no terminal
_LEVEL_COLOURS = {"warning": "33", "note": "36", "ok": "32"}
_DIM, _REVERSE = "2", "7"
_LEGEND = """\
|token  the model learns to predict it        ¦token  no loss on it (context only)
⟨eot⟩   end-of-text, before each document     [N]     position of the line's first token;
                                              [end] a target that is no input
\\n \\t \\xe5  escapes; \\xa5=句 ends a character that began in earlier tokens
"""


@data_app.command("check")
def check(
    context: typer.Context,
    config: ConfigArgument,
    overrides: SetOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 if there is a warning.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also write an HTML page.")
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option("--max-bytes", metavar="SIZE", help="Read only the beginning, as 100MB."),
    ] = None,
) -> int:
    """Say what the training text holds and what is wrong with it.

    Sizes, scripts, duplicates, overlap with the validation text, damaged characters, personal data;
    each finding says what to do. Of personal data only counts and places are shown.
    """
    limit = _bytes(max_bytes)
    loaded = load_run_config("data check", config, overrides, None)
    check_page(out)
    from gptcli.inspect_data import check_data

    with _progress(invocation(context).display) as progress:
        result = check_data(loaded.config, max_bytes=limit, progress=progress)
    if as_json:
        write_out(json.dumps(result.report, indent=2, ensure_ascii=False) + "\n")
    else:
        terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if terminal else None
        write_out(check_text(result.report, width, takes_colours()), raw=True)
    if out is not None:
        from gptcli.reports.data_page import check_html

        write_page(out, check_html(result.report))
    if strict and result.warnings:
        warnings = "1 warning" if result.warnings == 1 else f"{result.warnings} warnings"
        raise DataError(f"{warnings} about the data", "see the findings above")
    return 0


@data_app.command("show")
def show(
    context: typer.Context,
    config: ConfigArgument,
    overrides: SetOption = None,
    rows: Annotated[int, typer.Option("-n", metavar="N", min=1, help="How many rows.")] = 4,
    step: Annotated[
        int, typer.Option("--step", metavar="K", min=0, help="Those of this step, from 0.")
    ] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="A run, checkpoint, Hugging Face folder or hub name, whose tokenizer encodes the"
            " rows.",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write an HTML page.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> int:
    """Show rows of a batch as the model sees them.

    Tokens, separators, positions, loss mask."""
    start = [f"init={model}"] if model is not None else []  # so init's rules hold for --model too
    loaded = load_run_config("data show", config, [*(overrides or []), *start], None)
    check_page(html)
    from gptcli.inspect_data import show_data

    result = show_data(loaded.config, rows=rows, step=step)
    if as_json:
        write_out(json.dumps(_rows_json(result), ensure_ascii=False) + "\n")
    else:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _PIPE_WIDTH
        write_out(rows_text(result, width, takes_colours()), raw=True)
    if html is not None:
        from gptcli.reports.data_page import rows_html

        write_page(html, rows_html(result.rows, result.step, result.block_size, result.facts))
    return 0


def check_text(report: dict[str, Any], width: int | None, colours: bool) -> str:
    """The report of `gpt data check` for people; findings are wrapped to `width` columns."""
    parts = [columns(_facts(report)), columns(_scripts(report), right=frozenset(range(1, 6)))]
    parts.append(columns(_sources(report), right=frozenset(range(1, 5))))
    parts += [
        f"{source['path']}: the filters left out or changed: {json.dumps(source['filters'])}\n"
        for source in report["sources"]
        if source["filters"]
    ]
    shown = [visible(part) for part in parts if part]
    return "\n".join([*shown, _findings(report["findings"], width, colours)])


def rows_text(data: "DataRows", width: int, colours: bool) -> str:
    """The rows with a legend, at most `width` columns wide."""
    facts = [f"{name.replace('_', ' ')}: {value}" for name, value in data.facts.items()]
    facts = [f"step {data.step}, rows of {data.block_size} tokens", *facts]
    parts = ["".join(visible(fact) + "\n" for fact in facts), _LEGEND]
    for number, row in enumerate(data.rows):
        name = row.name or f"row {number}"
        title = styled(visible(f"{name}: {_row_facts(row, data.block_size)}"), "1", colours)
        parts.append(f"{title}\n{_row_lines(row, width, colours)}")
    return "\n".join(parts)


def _facts(report: dict[str, Any]) -> list[list[str]]:
    train, lengths, held = report["train"], report["lengths"], report["validation"]
    tokenizer = report["tokenizer"]
    read = report["read"]
    of = "" if read["complete"] else f" (the first of about {read['of_bytes']:,})"
    rows = [
        ["documents", f"{train['documents']:,}"],
        ["bytes", f"{train['bytes']:,}{of}"],
        ["characters", f"{train['characters']:,}"],
        ["tokens", f"{train['tokens']:,} ({tokenizer['kind']}, {tokenizer['vocab_size']:,})"],
        ["bytes per token", f"{train['bytes_per_token']:.2f}"],
        [
            "document length",
            f"{lengths['min']:,} to {lengths['max']:,} tokens, median {lengths['median']:,},"
            f" 95 % up to {lengths['p95']:,}",
        ],
        [
            "shorter than a block",
            f"{lengths['shorter_than_block']:,} (block_size {lengths['block_size']})",
        ],
        ["held out", f"{held['documents']:,} of the documents ({_SPLITS[held['split']]})"],
    ]
    if report["languages"]:
        total = sum(report["languages"].values())
        most = list(report["languages"].items())[:5]
        shown = ", ".join(f"{code} {percent(count / total)}" for code, count in most)
        rows.append(["languages", f"{shown} (of the first {total:,} documents)"])
    if report["text"]:
        return rows
    return [row for row in rows if row[0] not in ("characters", "bytes per token")]


def _scripts(report: dict[str, Any]) -> list[list[str]]:
    scripts = report["scripts"]
    if not scripts:
        return []
    letters = sum(about["letters"] for name, about in scripts.items() if name != "non-letters")
    rows = [["SCRIPT", "CHARACTERS", "OF LETTERS", "BYTES", "TOKENS", "BYTES/TOKEN"]]
    for name, about in scripts.items():
        rows.append(
            [
                name,
                f"{about['letters']:,}",
                percent(about["letters"] / letters) if name != "non-letters" else "",
                f"{about['bytes']:,}",
                f"{about['tokens']:,.0f}",
                f"{about['bytes_per_token']:.2f}",
            ]
        )
    return rows


def _sources(report: dict[str, Any]) -> list[list[str]]:
    rows = [["SOURCE", "DOCUMENTS", "SIZE", "TOKENS", "SHARE"]]
    for source in report["sources"]:
        counts = [f"{source.get(key, 0):,}" for key in ("documents", "tokens")]
        cells = [counts[0], size(source.get("bytes", 0)), counts[1], percent(source["share"])]
        rows.append([source["path"], *cells])
    return rows


def _findings(findings: list[dict[str, str]], width: int | None, colours: bool) -> str:
    """One finding a line, on a terminal wrapped behind its name."""
    indent = max((len(f["check"]) for f in findings), default=0) + 11
    lines = []
    for finding in findings:
        level = styled(f"{finding['level']:<7}", _LEVEL_COLOURS[finding["level"]], colours)
        text = visible(" ".join(finding["text"].split()))
        if width is not None and width > indent + 30:
            wrapped = textwrap.wrap(text, width - indent, break_on_hyphens=False)
            text = ("\n" + " " * indent).join(wrapped)
        lines.append(f"{level}  {finding['check']:<{indent - 11}}  {text}\n")
    return "".join(lines)


def _row_facts(row: "ShownRow", block_size: int) -> str:
    facts = [f"{row.targets} of {block_size} targets with loss"]
    documents = sum(token.kind == "eot" for token in row.tokens)
    facts.append(f"{documents} {'eot token' if documents == 1 else 'eot tokens'}")
    if row.segments > 1:
        facts.append(f"{row.segments} segments")
    if row.padding:
        facts.append(f"{row.padding} padding")
    if row.label is not None:
        facts.append(f"label {row.label}")
    return ", ".join(facts)


def _row_lines(row: "ShownRow", width: int, colours: bool) -> str:
    """The tokens with borders, in lines that begin with their position; a new segment and a line
    end in the text begin a new line."""
    from rich.cells import cell_len

    lines: list[str] = []
    line, used = "", 0
    for i, token in enumerate(row.tokens):
        cell = _token_text(token)
        begins = i > 0 and token.begins
        ended = i > 0 and row.tokens[i - 1].text.endswith("\\n")
        if not line or begins or ended or used + cell_len(cell) + 1 > width:
            if line:
                lines.append(line + "|")
            position = "end" if token.position is None else str(token.position)
            line = styled(f"[{position:>4}] ", _DIM, colours)
            used = 7
        line += styled(cell, _token_style(token), colours)
        used += cell_len(cell)
    lines.append(line + "|")
    if row.padding:
        lines.append(styled(f"       ⟨padding⟩ x {row.padding}", _DIM, colours))
    return "\n".join(lines) + "\n"


def _token_text(token: "ShownToken") -> str:
    border = "|" if token.loss else "¦"
    if token.kind == "eot":
        return f"{border}⟨eot⟩"
    text = token.text + (f"={token.completes}" if token.completes else "")
    return border + text.replace("|", "\\|")


def _token_style(token: "ShownToken") -> str | None:
    if token.kind == "eot":
        return _REVERSE
    return None if token.loss else _DIM


def _rows_json(data: "DataRows") -> dict[str, Any]:
    rows = [
        {
            "targets": row.targets,
            "padding": row.padding,
            "segments": row.segments,
            "name": row.name,
            "label": row.label,
            "tokens": [vars(token) for token in row.tokens],
        }
        for row in data.rows
    ]
    return {"step": data.step, "block_size": data.block_size, **data.facts, "rows": rows}


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    from gptcli.config.units import parse_bytes

    try:
        number = parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--max-bytes: {error}") from None
    if number <= 0:
        raise ConfigError("--max-bytes must be above zero")
    return number


@contextmanager
def _progress(display: Display) -> Iterator[Callable[[int, int], None] | None]:
    """What `check_data` calls as it reads: draws a bar on a terminal, None elsewhere."""
    if display.quiet or not terminal_is_capable():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with Progress(
        BarColumn(bar_width=20),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
