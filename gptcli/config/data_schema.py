"""The schema of the sections about text: tokenizer and data."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from gptcli.config.section import Fraction, PositiveFloat, PositiveInt, Section
from gptcli.config.units import parse_bytes


class TokenizerConfig(Section):
    """Which tokenizer; `bpe` is trained on the training documents."""

    kind: Literal["bpe", "bytes", "tiktoken", "file"] = Field(
        default="bpe",
        description="bpe: of data.train; bytes: a token each; tiktoken: by name; file: by path",
    )
    vocab_size: Annotated[int, Field(ge=257)] = Field(
        default=2048, description="bpe: with the eot token"
    )
    pattern: Literal["gpt2", "gpt4", "cjk"] = Field(
        default="gpt4",
        description="bpe: how text is split into words; cjk serves Chinese, Japanese and Korean",
    )
    train_bytes: str = Field(
        default="100MB", description="bpe: at most this much text to learn from"
    )
    name: Literal["gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base"] = Field(
        default="gpt2", description="tiktoken: which published encoding"
    )
    path: str | None = Field(
        default=None,
        description="file: a saved tokenizer directory, a .tiktoken or a tokenizer.json",
    )

    @field_validator("train_bytes")
    @classmethod
    def _size(cls, text: str) -> str:
        parse_bytes(text)
        return text

    @model_validator(mode="after")
    def _file_has_path(self) -> "TokenizerConfig":
        if self.kind == "file" and not self.path:
            raise ValueError("kind is file, so path must name a saved tokenizer")
        return self


Personal = Literal["email", "phone", "ip", "card", "national_id", "secret"]


class FiltersConfig(Section):
    """What is left out of a source or rewritten in it. All off by default."""

    min_characters: PositiveInt | None = Field(
        default=None, description="shorter documents are left out"
    )
    max_characters: PositiveInt | None = Field(
        default=None, description="longer documents are left out"
    )
    languages: list[str] | None = Field(
        default=None, description="ISO 639-1 codes; documents in other languages are left out"
    )
    scripts: dict[str, Fraction] | None = Field(
        default=None,
        description="Unicode script -> least share of the letters: {Han: 0.5}",
    )
    max_repeated_lines: Fraction | None = Field(
        default=None, description="documents with a larger share of repeated lines are left out"
    )
    exact_duplicates: bool = Field(
        default=False, description="of documents with the same text, only the first is kept"
    )
    near_duplicates: Fraction | None = Field(
        default=None,
        description="documents this alike (Jaccard, MinHash) to an earlier one are left out",
    )
    boilerplate: bool = Field(
        default=False, description="remove lines such as cookie notices and navigation"
    )
    stop_words: bool = Field(
        default=False,
        description="remove stop words; off because a language model must learn to write them",
    )
    redact: list[Personal] = Field(
        default=[], description="personal data replaced by placeholders such as <EMAIL>"
    )

    @property
    def active(self) -> bool:
        """Whether any filter is on."""
        return self != FiltersConfig()


class SourceConfig(Section):
    """One corpus: `path` is a file, glob, directory, `hub:NAME` or `builtin:NAME`."""

    path: str = Field(description="a file, glob, directory, hub:NAME or builtin:NAME")
    text_field: str = Field(default="text", description="may be dotted: article.body")
    split: str | None = Field(default=None, description="hub: train, validation, ...")
    weight: PositiveFloat | None = Field(
        default=None, description="share of the tokens, relative to the other sources' weights"
    )
    limit: PositiveInt | None = Field(
        default=None, description="at most this many documents, the first ones"
    )
    document: Literal["file", "line", "paragraph"] = Field(
        default="file", description="of plain text files, what one document is"
    )
    encoding: str = Field(
        default="utf-8", description="or binary: bytes as they are, for tokenizer.kind bytes"
    )
    on_bad_text: Literal["replace", "error"] = Field(
        default="replace",
        description="bytes that are no text: replaced by U+FFFD, or an error that names the place",
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error",
        description="rows that cannot be read: an error with the line, or left out and counted",
    )
    filters: FiltersConfig = FiltersConfig()


class CanariesConfig(Section):
    """Made-up secrets planted in the training text, to measure how much of rare text a model keeps
    (Carlini et al. 2019, "The Secret Sharer")."""

    count: PositiveInt = Field(default=8, description="canaries for each number of repetitions")
    repetitions: list[Annotated[int, Field(ge=0)]] = Field(
        default=[0, 1, 4, 16, 64],
        description="copies of a canary in one pass over the training text; 0: never planted, to"
        " compare with",
    )
    format: str = Field(
        default="The random number is {secret}.",
        description="a canary's text, a document of its own; {secret} becomes a random number",
    )
    digits: Annotated[int, Field(ge=2, le=18)] = Field(default=9, description="of a secret")
    seed: Annotated[int, Field(ge=0)] = Field(
        default=0, description="of the secrets, which are the same for the same seed"
    )

    @model_validator(mode="after")
    def _can_be_made(self) -> "CanariesConfig":
        if self.format.count("{secret}") != 1:
            raise ValueError("format must hold {secret} once")
        if not self.repetitions or len(set(self.repetitions)) < len(self.repetitions):
            raise ValueError("repetitions must be one or more different numbers")
        if self.count * len(self.repetitions) > 10**self.digits // 2:
            raise ValueError(f"{self.digits} digits are too few for so many canaries")
        return self


def as_sources(value: Any) -> Any:
    """One source or a list, each a string or a mapping -> a list of mappings."""
    if value is None:
        return value
    values = value if isinstance(value, list) else [value]
    return [{"path": v} if isinstance(v, str) else v for v in values]


# How sources may be written, for the JSON schema.
Written = str | SourceConfig | list[str | SourceConfig]


class DataConfig(Section):
    """Where text comes from and how it is held out and shuffled."""

    train: list[SourceConfig] = Field(
        default_factory=lambda: [SourceConfig(path="builtin:web-bible")],
        description="corpora to train on: a source, or a list of them",
    )
    val: list[SourceConfig] | None = Field(
        default=None,
        description="corpora to validate on; null: val_fraction of the training documents",
    )
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.02,
        description="share of the training documents held out for validation, where val is null",
    )
    shuffle_window: Annotated[int, Field(ge=0)] = Field(
        default=10000,
        description="documents among which the next is drawn at random; 0: in their order",
    )
    packing: Literal["concat", "best_fit"] = Field(
        default="concat",
        description="concat: documents one after the other; best_fit: whole ones, rows padded",
    )
    document_mask: bool = Field(
        default=False, description="no attention across documents; positions restart at each"
    )
    cache: Literal["auto", "on", "off"] = Field(
        default="auto", description="tokenise once and keep the tokens; never changes the result"
    )
    canaries: CanariesConfig | None = Field(
        default=None, description="secrets planted in the training text, to see what is memorised"
    )

    _train = field_validator("train", mode="before", json_schema_input_type=Written)(as_sources)
    _val = field_validator("val", mode="before", json_schema_input_type=Written | None)(as_sources)

    @field_validator("train", "val")
    @classmethod
    def _not_empty(cls, sources: list[SourceConfig] | None) -> list[SourceConfig] | None:
        if sources is not None and not sources:
            raise ValueError("name at least one source")
        return sources

    @field_validator("val")
    @classmethod
    def _no_weights(cls, sources: list[SourceConfig] | None) -> list[SourceConfig] | None:
        if any(source.weight is not None for source in sources or []):
            raise ValueError("weight is for data.train; validation reads all of each source")
        return sources

    @model_validator(mode="after")
    def _canaries_are_shuffled(self) -> "DataConfig":
        if self.canaries is not None and not self.shuffle_window:
            raise ValueError("canaries need shuffle_window above 0, which spreads them in the text")
        return self

    @field_validator("train")
    @classmethod
    def _weights_of_all(cls, sources: list[SourceConfig]) -> list[SourceConfig]:
        if len({source.weight is None for source in sources}) > 1:
            raise ValueError("give every source a weight, or none")
        return sources
