"""Records as the filters of their source leave them."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from gptcli.config.data_schema import FiltersConfig
from gptcli.data.cleaning import Cleaner, CleaningReport
from gptcli.data.shards import Shard


def cleaned(
    records: Iterator[dict[str, Any]], shard: Shard, report: CleaningReport | None = None
) -> Iterator[dict[str, Any]]:
    """The records of the shard with their text rewritten; pieces that become blank are left out.

    Documents of a stream that nobody has judged before are judged here, by their first piece.
    `report` counts what is rewritten.
    """
    cleaner = _cleaner(shard.file.source.filters.model_dump_json())
    keep = True
    for record in records:
        if not isinstance(record.get("text"), str):
            yield record
            continue
        text = cleaner.rewrite(record["text"], report)
        if not shard.judged and record["part"] == 0:
            keep = cleaner.judge(text) is None
        if keep and text.strip():
            yield {**record, "text": text, "bytes": len(text.encode())}


@lru_cache(maxsize=16)
def _cleaner(filters: str) -> Cleaner:
    return Cleaner(FiltersConfig.model_validate_json(filters))
