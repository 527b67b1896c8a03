"""Finetuning examples: rows of prompt and response as tokens whose loss is on the response."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptcli import stop
from gptcli.config.finetune_schema import FinetuneConfig
from gptcli.data.readers import read_shards
from gptcli.data.rows import Row, Rows, collate
from gptcli.data.shards import Shard, row_place
from gptcli.data.stream import RecordStream
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError, DataError


@dataclass(frozen=True)
class Example:
    """Prompt tokens (document start included) and response tokens (without eot), and the text
    that the response spells."""

    prompt: list[int]
    response: list[int]
    text: str


class ExampleEncoder:
    """Rows -> examples of at most block_size + 1 tokens, eot included.

    A prompt that is too long loses its beginning; a row whose response does not fit, or is empty,
    gives None and is counted in `skipped`.
    """

    def __init__(self, config: FinetuneConfig, tokenizer: Tokenizer, block_size: int) -> None:
        if tokenizer.eot is None:
            raise DataError("finetuning needs a tokenizer with an end-of-text token")
        self.tokenizer, self.eot, self.block_size = tokenizer, tokenizer.eot, block_size
        self.skipped = self.shortened = 0
        self._fields = config.names
        environment = ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True
        )
        try:
            self._template = environment.from_string(config.template or "{{ prompt }}")
        except jinja2.TemplateError as error:
            raise ConfigError(f"finetune.template: {error}") from error

    def encode(self, row: dict[str, Any], where: str) -> Example | None:
        """One row, whose fields hold text (`open_corpus` has looked); `where` names it in errors.

        DataError when the template cannot be filled from it.
        """
        values = {name: row[field] for name, field in self._fields.items()}
        try:
            prompt_text = self._template.render({**row, **values})
        except Exception as error:  # the template is the user's program: whatever it raises
            raise DataError(
                f"{where}: finetune.template: {error} (has: {', '.join(row)})"
            ) from error
        response = self.tokenizer.encode(values["response"])
        room = self.block_size - len(response)  # eot is a target only
        if not response or room < 1:  # one for the start, or a bare prompt's last token
            self.skipped += 1
            return None
        body = self.tokenizer.encode(prompt_text)
        prompt = self.tokenizer.begin(body)
        if len(prompt) > room:
            self.shortened += 1
            kept = room - (len(prompt) - len(body))
            prompt = self.tokenizer.begin(body[len(body) - kept :])
        return Example(prompt, response, values["response"])

    def check(self, shards: list[Shard]) -> None:
        """Try all rows of the shards, so that what is wrong shows before the training; afterwards
        `skipped` and `shortened` count these rows. DataError with the place of a row that does
        not fill the template."""
        self.skipped = self.shortened = 0
        for shard in shards:
            for record in read_shards([shard]):
                stop.raise_if_requested()
                try:
                    self.encode(record["row"], record["document"])
                except DataError:
                    self.encode(record["row"], row_place(shard.file, record["number"]))

    def encode_all(self, rows: Iterable[tuple[str, dict[str, Any]]]) -> list[Example]:
        """The examples of all rows that fit; each comes with its place."""
        encoded = (self.encode(row, where) for where, row in rows)
        return [example for example in encoded if example is not None]


def example_row(example: Example, eot: int) -> Row:
    """Tokens prompt + response + eot; loss on the response and on eot, never on the prompt."""
    tokens = np.array([*example.prompt, *example.response, eot], dtype=np.uint32)
    mask = np.arange(1, len(tokens)) >= len(example.prompt)
    return Row(tokens, mask)


class ExampleRows:
    """One row an example, from a stream of row records; exactly resumable from `state()`."""

    def __init__(self, stream: RecordStream, encoder: ExampleEncoder) -> None:
        self._stream, self._encoder = stream, encoder

    @property
    def epochs(self) -> float:
        """Passes over the rows so far, as a fraction by bytes."""
        return self._stream.epochs

    @property
    def seen(self) -> list[dict[str, Any]]:
        """Nothing: examples are not counted by source."""
        return []

    def take(self, n: int) -> Rows:
        """The next n examples, the short ones padded. DataError when an epoch has none that fit."""
        return collate([self._next() for _ in range(n)])

    def state(self) -> dict[str, Any]:
        """The place behind the last row, JSON-able."""
        return {"stream": self._stream.state()}

    def _next(self) -> Row:
        skipped_epochs = 0
        while skipped_epochs < 2:
            record = self._stream.next()
            if record is None:
                skipped_epochs += 1
                continue
            example = self._encoder.encode(record["row"], record["document"])
            if example is not None:
                return example_row(example, self._encoder.eot)
        raise DataError(
            "no row fits: every response is empty or longer than block_size"
            f" {self._encoder.block_size}"
        )
