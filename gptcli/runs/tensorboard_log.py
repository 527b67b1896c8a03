"""metrics.jsonl with its figures repeated in files that TensorBoard reads (extra `tensorboard`)."""

import importlib.util
import logging
import shutil
from pathlib import Path
from typing import Any

from gptcli.errors import ConfigError
from gptcli.runs.metrics import MetricsLog, read_metrics
from gptcli.runs.run_dir import created, read_run_json

log = logging.getLogger("gptcli")

FOLDER = "tensorboard"
_FLUSH_SECONDS = 10  # a watcher sees a point this much later at most


def check_tensorboard() -> None:
    """ConfigError where the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "report.tensorboard needs the package tensorboard, which is not installed",
            hint="pip install 'gptcli[tensorboard]'",
        )


class TensorBoardLog(MetricsLog):
    """metrics.jsonl, and in the run's folder tensorboard/ each number of it: `train/loss` by step.

    The folder is written anew from metrics.jsonl whenever this is opened, so that a resume, which
    drops the lines behind its checkpoint, leaves no point that is not in metrics.jsonl and none
    twice. A point's time is the run's beginning and the seconds of training since. A disk that
    takes no such files is a warning. Raises what `MetricsLog` raises.
    """

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir)
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._folder = run_dir / FOLDER
        self._began = created(read_run_json(run_dir)).timestamp()
        self._writer: Any = None
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._writer = EventFileWriter(str(self._folder), flush_secs=_FLUSH_SECONDS)
            for record in read_metrics(run_dir):
                self._add(record)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record to both."""
        super().write(record)
        try:
            if self._writer is not None:
                self._add(record)
        except OSError as error:  # of the thread that writes
            self._give_up(error)

    def close(self) -> None:
        """Close both; a second call does nothing."""
        super().close()
        try:
            if self._writer is not None:
                self._writer.close()
            self._writer = None
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Training is worth more than its curves, which the next resume writes anew."""
        self._writer = None
        log.warning("%s: %s; no more points for TensorBoard", self._folder, error.strerror)

    def _add(self, record: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        seconds = record.get("training_seconds", record.get("seconds")) or 0.0
        values = [
            Summary.Value(tag=f"{record.get('event')}/{name}", simple_value=value)
            for name, value in _numbers(record).items()
        ]
        self._writer.add_event(
            Event(
                wall_time=self._began + seconds,
                step=record.get("step", 0),
                summary=Summary(value=values),
            )
        )


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    """The figures of a record; a task's score under the name of the score."""
    task = record.get("task")
    named = {**record, **({task["name"]: task["value"]} if isinstance(task, dict) else {})}
    return {
        name: float(value)
        for name, value in named.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }
