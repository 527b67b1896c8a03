"""The schema of the section `generate`: the flags of `gpt generate` with underscores."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from gptcli.config.section import (
    DeviceName,
    Fraction,
    NonNegative,
    PositiveFloat,
    PositiveInt,
    Section,
)

CONSTRAINTS = ("choices", "regex", "json_schema")  # of which a text has one


class GenerateConfig(Section):
    """The flags of `gpt generate`."""

    model: str | None = None
    prompt: str | None = None
    prompt_file: str | None = None
    prompt_tokens: list[Annotated[int, Field(ge=0)]] | None = None
    n: Annotated[int, Field(gt=0, le=1_000_000)] = 1  # all are kept until they are told
    max_new_tokens: PositiveInt = 200
    temperature: NonNegative = 0.8
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    min_p: Fraction = 0.0
    repetition_penalty: PositiveFloat = 1.0
    presence_penalty: float = Field(default=0.0, description="off the logits of generated tokens")
    frequency_penalty: float = Field(default=0.0, description="the same, for each time they came")
    stop: list[str] = Field(default=[])
    bad_words: list[str] = Field(default=[], description="texts that never come")
    choices: list[str] | None = Field(default=None, description="the text is one of these")
    regex: str | None = Field(default=None, description="the text matches it as a whole")
    json_schema: str | None = Field(
        default=None, description="the text is JSON under this schema: a file, or the schema"
    )
    seed: int | None = None
    json_lines: bool = Field(default=False, alias="json")
    logprobs: Annotated[int, Field(ge=0)] = 0
    stream: bool = True
    device: DeviceName = "auto"
    quantize: Literal["int8", "fp16", "bf16"] | None = None
    speculate: Literal["lookup"] | None = Field(
        default=None, description="lookup: draft what followed the same words before"
    )
    no_prompt: bool = False
    truncate: Literal["left", "error"] = "left"
    allow_special: bool = False
    raw: bool = False
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
