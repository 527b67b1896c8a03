"""The place of a run in its data, as a checkpoint holds it: checked before anything is made of it.

Whether it is a place of the data at hand is for the rows to say, which are restored from it.
"""

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST = 10**18  # of whatever is counted: below what 64 bits hold, above what any run reaches
Count: TypeAlias = Annotated[int, Field(strict=True, ge=0, lt=MOST)]
_Token: TypeAlias = Annotated[int, Field(strict=True, ge=0, lt=2**32)]


_Cursor: TypeAlias = Annotated[tuple[Count, Count], Field(strict=False)]  # a list, in JSON
_Run: TypeAlias = Annotated[tuple[Count, Count, Count], Field(strict=False)]
# Name, part and number. A name may hold what is no text: those of files do.
_LastPiece: TypeAlias = Annotated[tuple[Any, Count, Count], Field(strict=False)]


class _Checked(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _StreamPlace(_Checked):
    """`RecordStream.state()`, and which `part` of a row an `ExampleStream` has reached."""

    epoch: Count
    epoch_bytes: Count
    window: Count
    cursor: _Cursor
    position: Count
    part: Count = 0


class _MixturePlace(_Checked):
    """`Mixture.state()`."""

    streams: Annotated[list[_StreamPlace], Field(min_length=1)]
    tokens: list[Count]

    @model_validator(mode="after")
    def _agree(self) -> "_MixturePlace":
        if len(self.streams) != len(self.tokens):
            raise ValueError(f"{len(self.streams)} streams, but tokens of {len(self.tokens)}")
        return self


class _PiecesPlace(_Checked):
    """`Pieces.state()`: runs are [length, source, mark]."""

    tokens: list[_Token]
    runs: list[_Run]

    @model_validator(mode="after")
    def _agree(self) -> "_PiecesPlace":
        length = sum(run[0] for run in self.runs)
        if length != len(self.tokens):
            raise ValueError(f"{len(self.tokens)} tokens, but runs of {length}")
        if any(mark > 2 for _, _, mark in self.runs):
            raise ValueError("a run has a mark that there is not")
        return self


class _Seen(_Checked):
    tokens: Count
    documents: Count
    epochs: Annotated[float, Field(ge=0, lt=MOST)]


class Position(_Checked):
    """What `PackedRows`, `PackedExamples` or `ExampleRows` gave as their state."""

    mixture: _MixturePlace
    row: Count = 0
    group: Count = 0
    epoch: Count = 0
    epoch_begins: bool = False
    rest: _PiecesPlace | None = None
    head: _PiecesPlace | None = None
    last: _LastPiece | None = None
    seen: list[_Seen] = []

    @property
    def epochs(self) -> int:
        """Whole passes over the stream that has made the fewest."""
        return min(stream.epoch for stream in self.mixture.streams)

    @model_validator(mode="after")
    def _agree(self) -> "Position":
        for number, (stream, seen) in enumerate(zip(self.mixture.streams, self.seen, strict=False)):
            if stream.epoch > seen.epochs + 1:  # a group of rows may be read up to an epoch's end
                told = (
                    f"stream {number} is in epoch {stream.epoch}, of which {seen.epochs:g} are seen"
                )
                raise ValueError(f"mixture: {told}")
        return self
