"""Whether a run that is killed ends as one that is not, on this machine: tried, not believed.

One process trains some steps straight through. The others start from its first checkpoint, are
killed (SIGKILL) at random places and resumed until they are through. Then weights, optimizer, state
and logs are compared, bit by bit.
"""

import logging
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

from gptcli import portable, stop
from gptcli.config.load import dump_config
from gptcli.config.schema import Config
from gptcli.errors import ConfigError, GptError, ResourceError
from gptcli.runs.checkpoint import checkpoint_dir
from gptcli.runs.metrics import METRICS, SAMPLES, last_metrics
from gptcli.runs.outcome import differences, digest, outcome
from gptcli.runs.run_dir import (
    CHECKPOINTS,
    RUN_JSON,
    new_place,
    read_run_json,
    runs_root,
    write_atomic,
    write_json_atomic,
)

log = logging.getLogger("gptcli")

STEPS = 40  # unless the config ends before, or --set training.max_steps says otherwise
_SAVES = 5
_POLL_SECONDS = 0.002
_STARTING = "while it started"
_START_SECONDS = (0.2, 2.0)
_LONGEST_PAUSE_SECONDS = 0.3  # behind a step: the kill meets the middle of a later one


@dataclass(frozen=True)
class Proof:
    """What was tried and what came of it. `kills` says where each kill came, in words: each met a
    living process, and `training_kills` of them one that trained. `differences` says what is not
    the same; `sha256` are of everything that was compared."""

    directory: Path
    steps: int
    kills: list[str]
    training_kills: int
    differences: list[str]
    sha256: tuple[str, str]

    @property
    def identical(self) -> bool:
        """Whether both runs came to the same bits."""
        return not self.differences


def prove_resume(
    config: Config,
    *,
    steps: int | None = None,
    kills: int = 5,
    directory: Path | None = None,
    seed: int | None = None,
) -> Proof:
    """Train `config` for `steps` (STEPS, or what it says if that is less) twice, and compare.

    `directory` (runs/NAME-prove-resume-TIME) must be new; runs that are not identical stay in it,
    and proof.json in any case. The places of the kills come from `seed` (a random one). Raises
    ConfigError where no kill met a process that trained, so that nothing is proved; what a run
    raises, also one that was to be killed and failed by itself; `stop.Stopped`.
    """
    if kills < 1:
        raise ConfigError("without a kill there is nothing to prove", hint="give kills=5")
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    place = directory or runs_root() / f"{config.name}-prove-resume-{stamp}"
    config = _shortened(config, steps)
    with new_place(place) as made:
        made.mkdir()
    write_atomic(place / "config.yaml", dump_config(config, loadable=True).encode())
    straight, killed = place / "straight", place / "killed"
    number = config.training.max_steps or 0
    log.info(f"{number} steps without a kill")
    _train(place, straight, [], partial(_give_start, straight, killed))
    told = []
    for moment in _moments(number, kills, random.Random(seed)):
        where = _train(place, killed, ["--resume"], partial(moment, killed))
        if where is None:  # it was through before
            break
        told.append(where)
        log.info(f"kill {len(told)} of {kills}: {where}")
    else:
        _train(place, killed, ["--resume"], lambda process: None)
    training = sum(where != _STARTING for where in told)
    if not training:
        raise ConfigError(
            f"nothing is proved: the run of {number} steps was through before a kill met it",
            hint="give it more to do: --set training.max_steps=1000",
        )
    one, other = outcome(straight), outcome(killed)
    found = differences(one, other)
    proof = Proof(place, number, told, training, found, (digest(one), digest(other)))
    write_json_atomic(place / "proof.json", {**asdict(proof), "directory": place.name})
    if proof.identical:
        for run in (straight, killed):
            shutil.rmtree(run, ignore_errors=True)
    return proof


def _shortened(config: Config, steps: int | None) -> Config:
    """The same training, ended by its steps alone, with enough saves and every step in the log."""
    steps = steps or min(config.training.max_steps or STEPS, STEPS)
    every = max(steps // _SAVES, 1)
    training = config.training.model_copy(
        update={
            "max_steps": steps,
            "max_tokens": None,
            "max_epochs": None,
            "max_time": None,
            "log_every": 1,
            "save_every": every,
            "save_minutes": None,
            "eval_every": max(steps // 2, 1),
        }
    )
    warmup = min(config.schedule.warmup_steps, steps // 4)
    schedule = config.schedule.model_copy(update={"warmup_steps": warmup})
    return config.model_copy(update={"training": training, "schedule": schedule})


Process = subprocess.Popen[bytes]
Moment = Callable[[Path, Process], str | None]


def _moments(steps: int, kills: int, chosen: random.Random) -> list[Moment]:
    """Where to kill: before the first step, in the middle of a save, and behind random steps. Each
    waits for its place and names it; None when the process ended before."""

    def starting(run: Path, process: Process) -> str | None:
        ends = time.monotonic() + chosen.uniform(*_START_SECONDS)
        _wait(process, lambda: time.monotonic() > ends)
        return _STARTING if process.poll() is None else None

    def saving(run: Path, process: Process) -> str | None:
        before = _half_saved(run)  # by a process that was killed
        saves = _wait(process, lambda: bool(_half_saved(run) - before))
        return "in the middle of a save" if saves else None

    def training(run: Path, process: Process) -> str | None:
        resumes = len(read_run_json(run).get("history", []))
        # Before that the log has what the process before did behind its last checkpoint.
        _wait(process, lambda: len(read_run_json(run).get("history", [])) > resumes)
        low = _last_step(run)
        target = low + chosen.randint(1, max((steps - low) // 2, 1))
        if not _wait(process, lambda: _last_step(run) >= target):
            return None
        time.sleep(chosen.random() * _LONGEST_PAUSE_SECONDS)
        return f"behind step {_last_step(run)}"

    moments: list[Moment] = [saving, starting]
    moments += [training] * (kills - 2)
    moments = moments[:kills]
    chosen.shuffle(moments)
    return moments


def _half_saved(run: Path) -> set[str]:
    return {path.name for path in (run / CHECKPOINTS).glob(".tmp-*")}


def _last_step(run: Path) -> int:
    return int(last_metrics(run).get("train", {}).get("step", 0))


def _train(
    place: Path, run: Path, flags: list[str], watch: Callable[[Process], str | None]
) -> str | None:
    """A process that trains in `run`. Killed when `watch` says where it is, which is returned;
    where that gives None it comes to its end. None also where it ended just before the kill.
    GptError when it fails."""
    command = [sys.executable, "-m", "gptcli", "pretrain", str(place / "config.yaml")]
    command += ["--run-dir", str(run), "--quiet", *flags]
    said = place / "process.log"
    with open(said, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        where = watch(process)
        if where is None:
            _wait(process, lambda: False)
    finally:
        process.kill()
        code = process.wait()
    stop.raise_if_requested()
    if where is not None and code == portable.KILLED:
        return where
    if code != 0:
        raise _failure(code, said.read_text(encoding="utf-8", errors="replace"))
    return None


def _failure(code: int, said: str) -> GptError:
    """What a process told of its end, as our own."""
    problems = re.findall(r"^error: (.*)$", said, re.MULTILINE) or said.splitlines()[-1:]
    hints = re.findall(r"^hint: (.*)$", said, re.MULTILINE)
    error = GptError("\n".join(problems) or "a process ended", "\n".join(hints) or None)
    error.exit_code = code if code > 0 else 128 - code
    return error


def _wait(process: Process, until: Callable[[], bool]) -> bool:
    """Whether `until` came true before the process ended. Raises `stop.Stopped`."""
    while process.poll() is None:
        stop.raise_if_requested()
        if until():
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _give_start(straight: Path, killed: Path, process: Process) -> None:
    """Make `killed` a run that has got as far as the first checkpoint of `straight`.

    So both compute with the same choices: a fresh start would race for its own.
    """
    first = checkpoint_dir(straight, 0)
    if not _wait(process, first.is_dir):
        return  # it failed, and says why
    target = checkpoint_dir(killed, 0)
    temp = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True)
        shutil.copytree(first, temp)
        temp.rename(target)
        for name in ("config.yaml", RUN_JSON, METRICS, SAMPLES):
            if (straight / name).exists():
                shutil.copyfile(straight / name, killed / name)
    except OSError as error:
        raise ResourceError(f"cannot copy {first}: {error}") from error
