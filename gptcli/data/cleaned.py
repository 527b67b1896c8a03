"""Records as the filters of their source leave them."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from gptcli.config.data_schema import FiltersConfig
from gptcli.data.cleaning import Cleaner, CleaningReport
from gptcli.data.shards import Shard

JUDGED_CHARACTERS = 1 << 20  # a longer document is judged by its first million characters


def cleaned(
    records: Iterator[dict[str, Any]], shard: Shard, report: CleaningReport | None = None
) -> Iterator[dict[str, Any]]:
    """The records of the shard with their text rewritten; pieces that become blank are left out.

    Documents of a stream that nobody has judged before are judged here, by as much of them as is
    judged elsewhere. `report` counts what is rewritten.
    """
    cleaner = _cleaner(shard.file.source.filters.model_dump_json())
    rewritten = _rewritten(records, cleaner, report)
    return rewritten if shard.judged else _judged(rewritten, cleaner)


def _rewritten(
    records: Iterator[dict[str, Any]], cleaner: Cleaner, report: CleaningReport | None
) -> Iterator[dict[str, Any]]:
    for record in records:
        if not isinstance(record.get("text"), str):
            yield record
            continue
        text = cleaner.rewrite(record["text"], report)
        if text.strip():
            yield {**record, "text": text, "bytes": len(text.encode())}


def _judged(records: Iterator[dict[str, Any]], cleaner: Cleaner) -> Iterator[dict[str, Any]]:
    """The documents that no filter leaves out. The beginning of a document is held until it ends
    or is long enough to be judged."""
    held: list[dict[str, Any]] = []
    size, name, keep = 0, None, None
    for record in records:
        if record["document"] != name:
            if keep is None and _keeps(held, cleaner):
                yield from held
            held, size, name, keep = [], 0, record["document"], None
        if keep is None:
            held.append(record)
            size += len(record["text"])
            if size >= JUDGED_CHARACTERS:
                keep = _keeps(held, cleaner)
                yield from held if keep else ()
                held = []
        elif keep:
            yield record
    if keep is None and _keeps(held, cleaner):
        yield from held


def _keeps(held: list[dict[str, Any]], cleaner: Cleaner) -> bool:
    return cleaner.judge("".join(record["text"] for record in held)) is None


@lru_cache(maxsize=16)
def _cleaner(filters: str) -> Cleaner:
    return Cleaner(FiltersConfig.model_validate_json(filters))
