"""In-context learning (Brown et al. 2020): rows behind examples from the training rows."""

import hashlib
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from gptcli import stop
from gptcli.config.finetune_schema import FinetuneConfig
from gptcli.data.corpus import Corpus
from gptcli.data.examples import Example, HeadExample, PreferencePair, RowCounts
from gptcli.data.stream import philox
from gptcli.data.task_formats import TaskEncoder
from gptcli.data.tokenizer import Tokenizer

POOL_ROWS = 1000  # that examples are drawn from: as many as make draws of a few hardly alike


class ShotEncoder:
    """A `TaskEncoder` that puts `settings.shots` examples, or as many as fit, before each row.

    Which ones depends on `seed` and the row alone: they are drawn from `POOL_ROWS` of the training
    rows, without those that ask the same as the row. Those that fit are fewer where their text
    would cut the row, or leave no room for a generated answer. `counts` are as without examples.
    """

    def __init__(
        self,
        settings: FinetuneConfig,
        tokenizer: Tokenizer,
        block_size: int,
        labels: Sequence[str],
        corpus: Corpus,
        seed: int,
    ) -> None:
        generated = settings.task in ("completion", "instruction", "chat")
        room = block_size - (settings.max_new_tokens if generated else 0)
        whole = settings.model_copy(update={"too_long": "skip"})
        self._plain = TaskEncoder(settings, tokenizer, block_size, labels)
        self._whole = TaskEncoder(whole, tokenizer, room, labels)
        self._count, self._seed = settings.shots, seed
        # Of all parts of the data, which may be sorted; by the digest, which is as good as chance.
        records: Iterable[dict[str, Any]] = islice(corpus.train_records(), POOL_ROWS)
        if not corpus.remote:
            records = heapq.nsmallest(POOL_ROWS, _polled(corpus.train_records()), key=_order)
        self._pool: list[tuple[int, dict[str, Any]]] = []
        for record in records:
            example = self._whole.encode(record["row"], record["document"])
            if example is not None:
                self._pool.append((_key(example), record["row"]))

    @property
    def counts(self) -> RowCounts:
        """What became of the rows."""
        return self._plain.counts

    def encode(
        self, row: dict[str, Any], where: str
    ) -> Example | HeadExample | PreferencePair | None:
        """One row as `TaskEncoder.encode` makes it, behind its examples, `shots` of them."""
        alone = self._plain.encode(row, where)
        if alone is None:
            return None
        key = _key(alone)
        order = philox(self._seed, key).permutation(len(self._pool)).tolist()
        others = (self._pool[i][1] for i in order if self._pool[i][0] != key)
        shots = list(islice(others, self._count))
        # Mostly all fit, else the most that do are searched for by halves.
        fitting, least, most, count = alone, 0, len(shots), len(shots)
        while least < most:
            example = self._whole.encode(row, where, shots[:count])
            if example is None:
                most = count - 1
            else:
                fitting, least = _with_count(example, count), count
            count = (least + most + 1) // 2
        return fitting


def shots_of(row: Example | HeadExample | PreferencePair) -> int:
    """How many examples stand before a row."""
    if isinstance(row, HeadExample):
        return 0
    return (row.chosen if isinstance(row, PreferencePair) else row).shots


def _with_count(
    row: Example | HeadExample | PreferencePair, count: int
) -> Example | HeadExample | PreferencePair:
    if isinstance(row, PreferencePair):
        return replace(row, chosen=replace(row.chosen, shots=count))
    return row if isinstance(row, HeadExample) else replace(row, shots=count)


def _key(row: Example | HeadExample | PreferencePair) -> int:
    """Of what a row asks, or says if it asks nothing, without regard to case and blanks."""
    if isinstance(row, HeadExample):
        text = row.text
    else:
        one = row.chosen if isinstance(row, PreferencePair) else row
        text = one.prompt_text.strip() or one.references[0]
    folded = " ".join(text.split()).casefold().encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(folded, digest_size=8).digest(), "big")


def _polled(records: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for record in records:
        stop.raise_if_requested()
        yield record


def _order(record: dict[str, Any]) -> tuple[int, str]:
    return record["digest"], record["document"]
