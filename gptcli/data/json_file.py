"""Small files that others wrote: read whole, but never more than they may hold."""

import json
import stat
from pathlib import Path
from typing import Any

from gptcli.errors import GptError

MAX_CONFIG_BYTES = 16 * 2**20  # far above any config; keeps a hostile file out of memory


def bounded_bytes(path: Path, most_bytes: int) -> bytes:
    """What the file holds. ValueError when that is more than `most_bytes`, or it is no regular
    file (a pipe would be waited for); OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")
    with open(path, "rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"larger than {most_bytes} bytes")
    return content


def read_json_object(
    path: Path, error: type[GptError], most_bytes: int = MAX_CONFIG_BYTES
) -> dict[str, Any]:
    """The JSON object in a file; an `error` when it holds none, or more than `most_bytes`."""
    try:
        value = json.loads(bounded_bytes(path, most_bytes))
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} cannot be read: {reason}") from reason
    if not isinstance(value, dict):
        raise error(f"{path}: not a JSON object")
    return value
