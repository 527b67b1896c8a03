"""Tokens that are no text: which there are, and which of them begin and end one."""

from dataclasses import dataclass
from typing import Any

EOT_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class SpecialTokens:
    """Tokens that are no text, by name, and which of them are the end and beginning of a text.

    `in_text` are added tokens that are text all the same: they stand for their own characters
    wherever these occur. `more_ends` are ids besides `eot` that end a generated text (a published
    model may name several); they may be ordinary tokens. `bare` tokenizers put no token before a
    text: those of published models without `bos`, which have learnt to do without.
    """

    ids: dict[str, int]
    eot: str | None = EOT_TEXT
    bos: str | None = None
    in_text: tuple[str, ...] = ()
    more_ends: tuple[int, ...] = ()
    bare: bool = False

    @property
    def eot_id(self) -> int | None:
        """Id of the end of a text."""
        return None if self.eot is None else self.ids[self.eot]

    @property
    def bos_id(self) -> int | None:
        """Id of the token that every document begins with."""
        return None if self.bos is None else self.ids[self.bos]

    @property
    def ends(self) -> frozenset[int]:
        """All ids that end a text."""
        return frozenset(self.more_ends if self.eot_id is None else (self.eot_id, *self.more_ends))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able mapping; what is as usual is left out."""
        saved: dict[str, Any] = {"special_tokens": self.ids}
        if self.eot != EOT_TEXT:
            saved["eot"] = self.eot
        if self.bos is not None:
            saved["bos"] = self.bos
        if self.in_text:
            saved["in_text"] = list(self.in_text)
        if self.more_ends:
            saved["more_ends"] = sorted(self.more_ends)
        if self.bare:
            saved["bare"] = True
        return saved

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "SpecialTokens":
        """What `to_json` gave. KeyError, TypeError or ValueError if damaged."""
        ids = {str(name): int(i) for name, i in saved["special_tokens"].items()}
        eot, bos = saved.get("eot", EOT_TEXT), saved.get("bos")
        in_text = tuple(saved.get("in_text", ()))
        for name in (eot, bos, *in_text):
            if name is not None:
                ids[name]  # all named ones have an id
        more_ends = tuple(int(i) for i in saved.get("more_ends", ()))
        return cls(ids, eot, bos, in_text, more_ends, saved.get("bare") is True)


def check_ids(ranks: dict[bytes, int], special: SpecialTokens) -> None:
    """ValueError for what tiktoken answers with a panic, which is no Exception."""
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise ValueError(f"{len(missing)} of the 256 bytes have no token")
    ids = {*ranks.values(), *special.ids.values()}
    if len(ids) < len(ranks) + len(special.ids):
        raise ValueError("two tokens have the same id")
    if min(ids) < 0 or max(ids) >= 2**31:
        raise ValueError("a token id is negative or above 2^31")
