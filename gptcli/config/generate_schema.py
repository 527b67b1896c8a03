"""The schema of the section `generate`: the flags of `gpt generate` with underscores."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from gptcli.config.section import (
    DeviceName,
    Fraction,
    ModelName,
    NonNegative,
    PositiveFloat,
    PositiveInt,
    Quantize,
    Section,
)

CONSTRAINTS = ("choices", "regex", "json_schema")  # of which a text has one


class GenerateConfig(Section):
    """The flags of `gpt generate`."""

    model: ModelName = None
    prompt: str | None = Field(default=None, description="the text to continue")
    prompt_file: str | None = Field(
        default=None,
        description="prompts, one a line, or JSON lines with prompt and settings; -: stdin",
    )
    prompt_tokens: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="the prompt as token ids; no start token is added"
    )
    n: Annotated[int, Field(gt=0, le=1_000_000)] = Field(  # all are kept until they are told
        default=1, description="texts for each prompt"
    )
    max_new_tokens: PositiveInt = Field(
        default=200, description="tokens after which a text ends, if it has not before"
    )
    temperature: NonNegative = Field(
        default=0.8, description="divides the logits; 0: always the likeliest token"
    )
    top_k: PositiveInt | None = Field(
        default=None, description="draw from the k likeliest tokens only; null: from all"
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=0.95,
        description="draw from the likeliest tokens whose probabilities sum to this; 1: from all",
    )
    min_p: Fraction = Field(
        default=0.0, description="leave out tokens below this times the likeliest one's probability"
    )
    repetition_penalty: PositiveFloat = Field(
        default=1.0, description="above 1: tokens that came before get less likely"
    )
    presence_penalty: float = Field(default=0.0, description="off the logits of generated tokens")
    frequency_penalty: float = Field(default=0.0, description="the same, for each time they came")
    stop: list[str] = Field(default=[], description="texts before which a generated text ends")
    bad_words: list[str] = Field(default=[], description="texts that never come")
    choices: list[str] | None = Field(default=None, description="the text is one of these")
    regex: str | None = Field(default=None, description="the text matches it as a whole")
    json_schema: str | None = Field(
        default=None, description="the text is JSON under this schema: a file, or the schema"
    )
    seed: int | None = Field(default=None, description="repeats a generation; null: a random one")
    json_lines: bool = Field(
        default=False, alias="json", description="one JSON object a line in place of text"
    )
    logprobs: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="with json: the log-probabilities of so many likeliest tokens at each place",
    )
    stream: bool = Field(default=True, description="show the text as it comes, on a terminal")
    device: DeviceName = "auto"
    quantize: Quantize = None
    speculate: Literal["lookup"] | None = Field(
        default=None, description="lookup: draft what followed the same words before"
    )
    no_prompt: bool = Field(default=False, description="leave the prompt out of what is printed")
    truncate: Literal["left", "error"] = Field(
        default="left",
        description="a prompt that does not fit the model: cut at its left, or refused",
    )
    allow_special: bool = Field(
        default=False, description="<|endoftext|> in a prompt is the end-of-text token, not text"
    )
    raw: bool = Field(
        default=False, description="control characters in the text reach the terminal"
    )
    output_bytes: bool = Field(
        default=False, description="write the bytes of the tokens, of models of binary data"
    )

    @field_validator("stop", "bad_words")
    @classmethod
    def _no_empty_text(cls, texts: list[str]) -> list[str]:
        if "" in texts:
            raise ValueError("an empty text is part of every text; write at least one character")
        return texts

    @field_validator("choices")
    @classmethod
    def _some_choices(cls, texts: list[str] | None) -> list[str] | None:
        if texts is not None and (not texts or "" in texts):
            raise ValueError("expected one or more texts of at least one character")
        return texts

    @field_validator("json_schema", mode="before", json_schema_input_type=str | dict | None)
    @classmethod
    def _written_out(cls, schema: Any) -> Any:
        return json.dumps(schema, ensure_ascii=False) if isinstance(schema, dict) else schema

    @field_validator("regex", "json_schema")
    @classmethod
    def _one_constraint(cls, text: str | None, info: ValidationInfo) -> str | None:
        others = [key for key in CONSTRAINTS if info.data.get(key) is not None]
        if text is not None and others:
            raise ValueError(f"excludes {others[0]}, and both are given; give one of them")
        return text
