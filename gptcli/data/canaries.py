"""Canaries: made-up secrets planted in the training text to see what a model memorises.

After Carlini et al. 2019, "The Secret Sharer: Evaluating and Testing Unintended Memorization in
Neural Networks". Every canary is the same sentence around another random number. Its copies are
documents of their own among the training documents, and never in the validation part.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

from gptcli.config.data_schema import CanariesConfig, SourceConfig
from gptcli.data.files import SourceFile
from gptcli.data.shards import Shard, Split


@dataclass(frozen=True)
class Canary:
    """A text with its secret number, planted `repetitions` times in a pass over the text."""

    text: str
    secret: str
    repetitions: int


def make_canaries(config: CanariesConfig) -> list[Canary]:
    """The canaries that `config` describes: the same ones on every machine."""
    secrets = _secrets(config, "canary")
    return [
        Canary(_text(config, secret), secret, repetitions)
        for repetitions in config.repetitions
        for secret in islice(secrets, config.count)
    ]


def other_texts(config: CanariesConfig, most: int) -> list[str]:
    """Texts of the same form with secrets that no canary has: `most` of them drawn at random, or
    all there are if these are fewer."""
    taken = {canary.secret for canary in make_canaries(config)}
    if 10**config.digits - len(taken) <= most:
        every = (f"{value:0{config.digits}d}" for value in range(10**config.digits))
        return [_text(config, secret) for secret in every if secret not in taken]
    free = (secret for secret in _secrets(config, "other") if secret not in taken)
    return [_text(config, secret) for secret in islice(free, most)]


def canary_shards(canaries: list[Canary]) -> list[Shard]:
    """A shard for each copy of each canary, so that the shuffle of shards spreads them over all of
    the text. With several sources that have weights they go with the first."""
    source = SourceConfig(path="canaries")
    return [
        Shard(file, copy, copy + 1, Split("none"), text=canary.text)
        for number, canary in enumerate(canaries)
        for file in [SourceFile(source, f"canary {number}", "canary")]
        for copy in range(canary.repetitions)
    ]


def canary_hash(canaries: list[Canary]) -> str:
    """sha256 of what is planted, and how often."""
    planted = [(canary.text, canary.repetitions) for canary in canaries]
    return hashlib.sha256(repr(planted).encode("utf-8", "surrogatepass")).hexdigest()


def _text(config: CanariesConfig, secret: str) -> str:
    return config.format.replace("{secret}", secret)


def _secrets(config: CanariesConfig, kind: str) -> Iterator[str]:
    """Different numbers at random, from a hash: no library's generator may change them."""
    seen: set[int] = set()
    for place in count():
        digest = hashlib.sha256(f"{kind} {config.seed} {place}".encode()).digest()
        value = int.from_bytes(digest[:16], "big") % 10**config.digits
        if value not in seen:
            seen.add(value)
            yield f"{value:0{config.digits}d}"
