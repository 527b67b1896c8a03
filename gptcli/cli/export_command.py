"""`gpt export`: a model for transformers, llama.cpp or peft, with int8 weights, or merged."""

from pathlib import Path
from typing import Annotated

import typer

from gptcli.cli.invocation import invocation
from gptcli.cli.run_flags import ModelOption
from gptcli.cli.terminal import write_out


def export_model(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder, or file (gguf).")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="hf|gguf|peft",
            help="For transformers, for llama.cpp, or (an adapter alone) for peft.",
        ),
    ] = None,
    model: ModelOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="hf: f32, bf16 or f16; gguf: f32, f16 or q8_0. [as the weights are stored]",
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize", metavar="int8", help="For gpt itself: a quarter of the size, faster."
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="An adapter and its base as one model that needs neither."),
    ] = False,
) -> int:
    """Write a model for transformers (hf) or llama.cpp (gguf).

    They run it with no code of ours. hf writes weights, config, tokenizer and a model card into a
    new folder. --quantize int8 writes a checkpoint that gpt generate and gpt eval load faster.
    Adapters are merged into their base, but for --to peft; --merge alone writes that as a
    checkpoint. The path is printed.
    """
    from gptcli.export import export

    with invocation(context).display.live():
        result = export(model, out, to, dtype, quantize, merge)
    write_out(f"{result.path}\n")
    return 0
