"""The flags of `gpt generate`, which other commands share."""

from typing import Annotated

import typer

StdinArgument = Annotated[
    list[str] | None, typer.Argument(metavar="-", help="'-' reads the prompt from stdin.")
]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", metavar="CONFIG", help="A YAML whose generate: section is used."),
]
PromptOption = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="The text to continue.")
]
PromptFileOption = Annotated[
    str | None,
    typer.Option(
        "--prompt-file",
        metavar="FILE",
        help="Prompts, one a line, or JSON lines with prompt and settings; '-' is stdin.",
    ),
]
PromptTokensOption = Annotated[
    str | None,
    typer.Option("--prompt-tokens", metavar="IDS", help="Token ids, as 0,2,1; no start is added."),
]
NOption = Annotated[int | None, typer.Option("-n", metavar="N", help="Texts for each prompt. [1]")]
MaxNewTokensOption = Annotated[
    int | None, typer.Option("--max-new-tokens", metavar="N", help="Most new tokens. [200]")
]
TemperatureOption = Annotated[
    float | None,
    typer.Option("--temperature", metavar="F", help="0 takes the likeliest token. [0.8]"),
]
TopKOption = Annotated[
    int | None, typer.Option("--top-k", metavar="N", help="Only the N likeliest tokens.")
]
TopPOption = Annotated[
    float | None,
    typer.Option("--top-p", metavar="F", help="Only the likeliest, up to this sum. [0.95]"),
]
MinPOption = Annotated[
    float | None,
    typer.Option("--min-p", metavar="F", help="Only tokens above F times the likeliest."),
]
RepetitionPenaltyOption = Annotated[
    float | None,
    typer.Option("--repetition-penalty", metavar="F", help="Above 1: repeat less. [1]"),
]
PresencePenaltyOption = Annotated[
    float | None,
    typer.Option("--presence-penalty", metavar="F", help="Off the logits of tokens that came."),
]
FrequencyPenaltyOption = Annotated[
    float | None,
    typer.Option("--frequency-penalty", metavar="F", help="Off them for each time they came."),
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End before this text (may be repeated)."),
]
BadWordsOption = Annotated[
    list[str] | None,
    typer.Option("--bad-words", metavar="TEXT", help="Never this text (may be repeated)."),
]
ChoicesOption = Annotated[
    str | None,
    typer.Option("--choices", metavar="A,B,...", help="The text is one of these (or a JSON list)."),
]
RegexOption = Annotated[
    str | None, typer.Option("--regex", metavar="PATTERN", help="The whole text matches this.")
]
JsonSchemaOption = Annotated[
    str | None,
    typer.Option("--json-schema", metavar="FILE|JSON", help="The text is JSON of this schema."),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Repeat a generation. [random]")
]
JsonOption = Annotated[bool | None, typer.Option("--json", help="One JSON object a line.")]
LogprobsOption = Annotated[
    int | None,
    typer.Option("--logprobs", metavar="K", help="With --json: the K likeliest of each token."),
]
StreamOption = Annotated[
    bool | None, typer.Option("--stream/--no-stream", help="Show text as it comes. [stream]")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="D", help="auto, cpu, cuda, cuda:N or mps.")
]
QuantizeOption = Annotated[
    str | None,
    typer.Option("--quantize", metavar="int8|fp16|bf16", help="Smaller weights, often faster."),
]
SpeculateOption = Annotated[
    str | None,
    typer.Option("--speculate", metavar="lookup", help="Guess by what stood there before."),
]
NoPromptOption = Annotated[
    bool | None, typer.Option("--no-prompt", help="Print the continuation only.")
]
TruncateOption = Annotated[
    str | None,
    typer.Option("--truncate", metavar="left|error", help="Of a prompt too long. [left]"),
]
AllowSpecialOption = Annotated[
    bool | None, typer.Option("--allow-special", help="<|endoftext|> in prompts is a token.")
]
RawOption = Annotated[
    bool | None, typer.Option("--raw", help="Control characters reach the terminal.")
]
OutputBytesOption = Annotated[
    bool | None,
    typer.Option("--output-bytes", help="Write bytes: of models trained on binary data."),
]
