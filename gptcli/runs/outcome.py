"""What a run came to, whatever happened on the way: where two runs of one config are the same."""

import hashlib
from pathlib import Path
from typing import Any

from gptcli.errors import CheckpointError
from gptcli.runs import checkpoint
from gptcli.runs.manifest import MODEL, OPTIMIZER, sha256_of
from gptcli.runs.metrics import read_metrics, read_samples
from gptcli.runs.run_dir import json_bytes, read_run_json

# Measured by the clock, or what a process needed for itself.
_MEASURED = ("seconds", "tokens_per_second", "memory_bytes", "mfu", "progress")


def outcome(run_dir: Path) -> dict[str, Any]:
    """The hashes of the last weights and optimizer, where the state stands, every line of the logs
    without times, and how the run ended. Raises CheckpointError where there is no checkpoint."""
    saved = checkpoint.list_checkpoints(run_dir)
    if not saved:
        raise CheckpointError(f"{run_dir} has no checkpoint")
    state = checkpoint.read_state(saved[-1])["train"]
    return {
        "weights": sha256_of(saved[-1] / MODEL),
        "optimizer": sha256_of(saved[-1] / OPTIMIZER),
        # Sums of the interval have times among them; the next line of the log tells the rest.
        "state": {k: v for k, v in _plain(state).items() if k not in ("interval", "reached")},
        "metrics": [_plain(record) for record in read_metrics(run_dir)],
        "samples": read_samples(run_dir),
        "best": checkpoint.read_best(run_dir),
        "status": read_run_json(run_dir).get("status"),
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What of two outcomes differs, in words; empty where they are the same."""
    found = []
    for name, value in one.items():
        if value == other[name]:
            continue
        if name in ("metrics", "samples"):
            found.append(f"{name}: {_first_difference(value, other[name])}")
        elif name == "state":
            keys = [k for k in value if value[k] != other[name].get(k)]
            found.append(f"state: {', '.join(keys) or 'other keys'}")
        elif name in ("weights", "optimizer"):
            found.append(f"{name}: sha256 {value[:12]} and {other[name][:12]}")
        else:
            found.append(f"{name}: {value} and {other[name]}")
    return found


def digest(of: dict[str, Any]) -> str:
    """One sha256 of a whole outcome."""
    return hashlib.sha256(json_bytes(of)).hexdigest()


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in _MEASURED and not k.endswith("_seconds")}


def _first_difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    for a, b in zip(one, other, strict=False):
        if a != b:
            keys = [key for key in a | b if a.get(key) != b.get(key)]
            return f"the first other line is that of step {a.get('step')} ({', '.join(keys)})"
    return f"{len(one)} and {len(other)} lines"
