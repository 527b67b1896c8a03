"""`gpt export`: a model for transformers or llama.cpp."""

from pathlib import Path
from typing import Annotated

import typer

from gptcli.cli.invocation import invocation
from gptcli.cli.run_flags import ModelOption
from gptcli.cli.terminal import write_out


def export_model(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder (hf) or file (gguf).")],
    to: Annotated[
        str, typer.Option("--to", metavar="hf|gguf", help="For transformers, or for llama.cpp.")
    ],
    model: ModelOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="hf: f32, bf16 or f16; gguf: f32, f16 or q8_0. [as the weights are stored]",
        ),
    ] = None,
) -> int:
    """Write a model so that transformers (hf) or llama.cpp (gguf) runs it, with no code of ours.

    hf writes weights, config, tokenizer and a model card into a new folder. The path is printed.
    """
    from gptcli.export import export

    with invocation(context).display.live():
        result = export(model, out, to, dtype)
    write_out(f"{result.path}\n")
    return 0
