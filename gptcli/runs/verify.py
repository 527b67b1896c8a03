"""`verify_run`: whether everything that a run directory holds is whole, readable and continuous."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch

from gptcli import stop
from gptcli.config.load import load_config, load_resolved
from gptcli.config.schema import Config
from gptcli.errors import CheckpointError, ConfigError, DataError
from gptcli.runs import checkpoint
from gptcli.runs.holder import lock_holder
from gptcli.runs.load import load_model
from gptcli.runs.manifest import CONFIG, OPTIMIZER
from gptcli.runs.metrics import METRICS, SAMPLES, broken_lines, read_metrics, read_samples
from gptcli.runs.run_dir import CHECKPOINTS, RUN_JSON, RUN_JSON_BYTES, read_json
from gptcli.runs.tensors import stored_shapes

Verdict = Literal["ok", "note", "bad"]
_MOST_STEPS_NAMED = 3


@dataclass(frozen=True)
class Finding:
    """What was looked at (a path below the run, or the name of a file), and how it is.

    `note` is what a resume deals with by itself, `bad` what is lost or wrong.
    """

    what: str
    verdict: Verdict
    text: str


def verify_run(run_dir: Path) -> Iterator[Finding]:
    """Look at everything in a run, one finding after the other. Changes nothing.

    Every file of every checkpoint is hashed, and its model loaded. Raises `stop.Stopped`.
    """
    holder = lock_holder(run_dir)
    if holder is not None:
        yield Finding(
            ".", "note", f"in use by {holder}: what it writes meanwhile may be half there"
        )
    yield _run_json(run_dir)
    yield _config(run_dir)
    saved = checkpoint.list_checkpoints(run_dir)
    if not saved:
        yield Finding(CHECKPOINTS, "bad", "there is no checkpoint")
    for path in saved:
        stop.raise_if_requested()
        yield _checkpoint(run_dir, path)
    yield from _best(run_dir, saved)
    yield from _leftovers(run_dir)
    yield _metrics(run_dir, saved)
    yield _samples(run_dir)


def _run_json(run_dir: Path) -> Finding:
    try:
        about = read_json(run_dir / RUN_JSON, RUN_JSON_BYTES)
    except CheckpointError as error:
        return Finding(RUN_JSON, "bad", error.message)
    status, error_text = about.get("status"), about.get("error")
    if status == "running" and lock_holder(run_dir) is None:
        return Finding(RUN_JSON, "note", "readable; the run was killed, --resume goes on with it")
    return Finding(RUN_JSON, "ok", f"{status}{f': {error_text}' if error_text else ''}")


def _run_config(run_dir: Path) -> Config:
    if not (run_dir / CONFIG).is_file():
        raise ConfigError(f"{run_dir / CONFIG} is missing or no regular file")
    return load_config(str(run_dir / CONFIG)).config


def _config(run_dir: Path) -> Finding:
    try:
        config = _run_config(run_dir)
    except ConfigError as error:
        return Finding(CONFIG, "bad", error.message)
    return Finding(CONFIG, "ok", f"config {config.name}")


def _checkpoint(run_dir: Path, path: Path) -> Finding:
    what = str(path.relative_to(run_dir))
    try:
        manifest = checkpoint.verify(path, weights=False)  # load_model hashes them
        loaded = load_model(str(path), torch.device("cpu"))
        moments = stored_shapes(path / OPTIMIZER)
        train = checkpoint.read_state(path).get("train")
    except (CheckpointError, ConfigError, DataError) as error:
        return Finding(what, "bad", error.message)
    step = train.get("step") if isinstance(train, dict) else None
    if step != manifest["step"]:
        return Finding(what, "bad", f"its manifest says step {manifest['step']}, its state {step}")
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    return Finding(
        what,
        "ok",
        f"{len(manifest['files'])} files, {size:,} bytes: hashes agree,"
        f" {loaded.model.parameter_count():,} parameters and {len(moments)} moments are readable",
    )


def _best(run_dir: Path, saved: list[Path]) -> Iterator[Finding]:
    path = run_dir / CHECKPOINTS / "best.json"
    if not path.exists():
        return
    what, best = f"{CHECKPOINTS}/best.json", checkpoint.read_best(run_dir)
    if best is None:
        yield Finding(what, "bad", "it does not parse: the newest checkpoint counts as the best")
    elif checkpoint.checkpoint_dir(run_dir, best[0]) not in saved:
        yield Finding(what, "bad", f"it names step {best[0]}, of which there is no checkpoint")
    else:
        yield Finding(what, "ok", f"step {best[0]}, validation loss {best[1]:.4f}")


def _leftovers(run_dir: Path) -> Iterator[Finding]:
    hidden = [*run_dir.glob(".tmp-*"), *(run_dir / CHECKPOINTS).glob(".*-*")]
    for path in sorted(hidden):
        what = str(path.relative_to(run_dir))
        yield Finding(what, "note", "left by a process that was killed; a resume removes it")


def _metrics(run_dir: Path, saved: list[Path]) -> Finding:
    """The steps of the log follow on each other, up to the newest checkpoint."""
    every, records = _log_every(run_dir, saved), read_metrics(run_dir)
    trained = [r for r in records if r.get("event") == "train"]
    steps = [r["step"] for r in trained if type(r.get("step")) is int]
    back = [f"{b} behind {a}" for a, b in pairwise(steps) if b <= a]
    gaps = [f"{a + 1} to {b - 1}" for a, b in pairwise([0, *steps]) if b - a > every]
    newest = _newest_step(saved)
    last = steps[-1] if steps else 0
    if back:
        return Finding(METRICS, "bad", f"steps come twice or fall: {_some(back)}")
    if gaps:
        return Finding(METRICS, "bad", f"lines are missing: steps {_some(gaps)}")
    if newest is not None and newest - last >= every:
        return Finding(METRICS, "bad", f"ends at step {last}, before checkpoint {newest}")
    text = f"{len(records):,} lines, steps up to {last:,} without a gap"
    if newest is not None and last > newest:
        text += f"; those behind {newest:,} are not saved, a resume does them again"
    cut = broken_lines(run_dir, METRICS)
    return Finding(METRICS, "note" if cut else "ok", text + (f"; {cut} cut lines" if cut else ""))


def _samples(run_dir: Path) -> Finding:
    cut = broken_lines(run_dir, SAMPLES)
    text = f"{len(read_samples(run_dir)):,} texts" + (f"; {cut} cut lines" if cut else "")
    return Finding(SAMPLES, "note" if cut else "ok", text)


def _log_every(run_dir: Path, saved: list[Path]) -> int:
    """The most steps between two lines: what the config says, which a resume may have changed."""
    found, loads = [1], [partial(_run_config, run_dir)]
    loads += [partial(load_resolved, path / CONFIG) for path in saved]
    for load in loads:
        try:
            found.append(load().training.log_every)
        except ConfigError:  # told of already
            continue
    return max(found)


def _newest_step(saved: list[Path]) -> int | None:
    """Of the newest checkpoint that can be read at all."""
    for path in reversed(saved):
        try:
            return int(checkpoint.verify(path, hashes=False)["step"])
        except CheckpointError:
            continue
    return None


def _some(found: list[str]) -> str:
    more = len(found) - _MOST_STEPS_NAMED
    return ", ".join(found[:_MOST_STEPS_NAMED]) + (f" and {more} more" if more > 0 else "")
