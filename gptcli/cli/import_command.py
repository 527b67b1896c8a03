"""`gpt import`: a published model becomes a checkpoint of our own."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from gptcli.cli.invocation import invocation
from gptcli.cli.terminal import write_out

log = logging.getLogger("gptcli")


def import_model(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A Hugging Face folder, or a name on the hub: gpt2, OWNER/NAME, OWNER/NAME@REV.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The checkpoint directory to make.")],
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle", help="Also read pytorch_model.bin, tensors only, where you trust it."
        ),
    ] = False,
) -> int:
    """Turn a published model into a checkpoint that stands alone.

    It keeps the dtype of its source and computes the same. Families: GPT-1, GPT-2, GPT-Neo, Llama,
    Mistral, Qwen2, Qwen3. No code of the source is run.
    """
    from gptcli.import_model import import_model as run

    with invocation(context).display.live():
        result = run(source, out, allow_pickle=allow_pickle)
    at = "" if result.commit is None else f" at {result.commit[:12]}"
    log.info(
        f"imported {source}{at}: {result.family}, {result.parameters:,} parameters in"
        f" {result.dtype}, tokenizer {result.tokenizer} of {result.vocab_size:,} tokens,"
        f" {result.bytes / 1e6:,.1f} MB"
    )
    write_out(f"{result.path}\n")
    return 0
