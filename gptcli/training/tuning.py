"""Choices made by trying: short trials of real steps at the start of a run, remembered."""

import hashlib
import json
import logging
import math
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gptcli import __version__, stop
from gptcli.config.schema import Config
from gptcli.data.cache_folder import cache_root
from gptcli.data.json_file import read_json_object
from gptcli.device import (
    MUST_WIN_BY,
    Device,
    is_out_of_memory,
    release_memory,
    threads_are_given,
)
from gptcli.errors import DataError, ResourceError
from gptcli.model.gpt import GPT
from gptcli.runs.run_dir import write_json_atomic
from gptcli.training.choices import Choices, apply, fits, largest_divisor, with_less_memory
from gptcli.training.compiling import compile_blocks, compile_no_more, failure, has_compiler
from gptcli.training.duration import Paces, duration
from gptcli.training.probe import micro_batch, synchronise, undisturbed
from gptcli.training.trainable import sequences_per_row

log = logging.getLogger("gptcli")

_MOST_SECONDS = 2.0  # of all races but that of compiled code
_MOST_SHARE = 0.03  # of the run
_ROUNDS = (2, 5)  # of a race, at least and at most
# Of a run. Compiling the one graph takes about 15 s. On a GPU that saves a quarter of the time or
# more (published speed-ups: 1.3 to 2.3); on a CPU it seldom saves a fifth, so most races are lost.
_WORTH_COMPILING_SECONDS = {"cuda": 90.0, "cpu": 1200.0}
_BYTES_PER_TOKEN = 4.0  # of text, roughly


def tune(
    choices: Choices,
    config: Config,
    device: Device,
    model: GPT,
    train_bytes: int,
    run_dir: Path | None = None,
) -> Choices:
    """`choices` with what short trials on random tokens find possible and faster; applied.

    The micro batch that fits in memory, and on a CPU the faster one and the number of threads; on
    a run that is long enough, compiled code. A second run of the same kind on this machine finds
    them in the cache. Weights and random state stay as they are. ResourceError when a step of one
    row does not fit in memory; `run_dir` has the config.yaml to name in it.
    """
    place = _place(choices, config, device, model)
    tuned = _recall(place, choices, config)
    if tuned is None:
        trials = _Trials(config, device, model, train_bytes, run_dir)
        tuned = trials.of(replace(choices, compile=False))
        tuned = replace(tuned, compile=choices.compile)
        _remember(place, tuned)
    step = tuned.races["forward_backward_seconds"] * _micro_batches(tuned, config)
    expected = _expected_seconds(config, step, train_bytes)
    if config.training.compile == "auto" and worth_compiling(config, device, expected):
        if device.kind == "cpu" and "compile" not in tuned.races:
            tuned = _race_compiled(tuned, config, device, model)
            _remember(place, tuned)
        found = tuned.races.get("compile")
        tuned = replace(tuned, compile=found is None or found["winner"] == "compiled")
    apply(tuned, model)
    return tuned


def worth_compiling(config: Config, device: Device, expected_seconds: float) -> bool:
    """Whether a run of that length can earn back the half minute or more that compiling takes."""
    if device.kind == "cpu" and config.data.document_mask:
        return False  # a call a document: each step would be another graph
    least = _WORTH_COMPILING_SECONDS.get(device.kind, math.inf)
    return expected_seconds >= least and has_compiler(device)


@dataclass(frozen=True)
class Race:
    """The least seconds of each contestant by its name, and whose they are to be."""

    seconds: dict[str, float]
    winner: str


def race(
    contestants: Mapping[str, Callable[[], object]],
    default: str,
    device: Device,
    seconds: float,
    rows: Mapping[str, int] | None = None,
) -> Race:
    """Let the contestants take turns for about `seconds`; figures are for each of their `rows`.

    One beats the default only where it takes 20 % less of both the clock's and the processor's
    time: the clock alone also counts what others do on a busy machine. Each turn begins with an
    untimed call, so that none pays for what the one before left behind. Raises `stop.Stopped`.
    """
    least, most = _ROUNDS
    clock, processor = (dict.fromkeys(contestants, math.inf) for _ in range(2))
    began = time.perf_counter()
    for done in range(1, most + 1):
        for name, work in contestants.items():
            stop.raise_if_requested()
            work()
            used = time.process_time()
            share = 1 if rows is None else rows[name]
            clock[name] = min(clock[name], _timed(work, device) / share)
            processor[name] = min(processor[name], (time.process_time() - used) / share)
        spent = time.perf_counter() - began
        if done >= least and spent * (done + 1) / done > seconds:
            break
    best = min(clock, key=lambda name: clock[name])
    won = all(t[best] * MUST_WIN_BY < t[default] for t in (clock, processor))
    return Race({k: float(f"{v:.4g}") for k, v in clock.items()}, best if won else default)


@dataclass(frozen=True)
class _Trials:
    """What is tried, and how long the run is to be."""

    config: Config
    device: Device
    model: GPT
    train_bytes: int
    run_dir: Path | None = None

    def of(self, choices: Choices) -> Choices:
        """`choices` after all trials, with their figures in `races`."""
        began = time.perf_counter()
        choices = self._first(choices)
        expected = self._run_seconds(choices, choices.races["forward_backward_seconds"])
        ends = began + min(_MOST_SECONDS, _MOST_SHARE * expected)
        if self.device.kind == "cpu":
            with undisturbed(self.model, self.device):
                if not threads_are_given():
                    choices = self._fewer_threads(choices, ends)
                if self.config.training.micro_batch_size == "auto":
                    choices = self._other_sizes(choices, ends)
        return _with_race(choices, "seconds", float(f"{time.perf_counter() - began:.3g}"))

    def _first(self, choices: Choices) -> Choices:
        """Choices whose micro batch fits in memory, beside the optimizer's state to come.

        A CPU's system gives out more memory than it has: there only a limit of the address space
        (`ulimit -v`) is noticed, and what `choose` computed has to hold.
        """
        rows = self.config.training.tokens_per_step // self.config.model.block_size
        need = _optimizer_bytes(self.config, self.model)
        while True:
            stop.raise_if_requested()
            apply(choices, self.model)
            try:
                with undisturbed(self.model, self.device):
                    work = self._work(choices)
                    room = torch.empty(need, dtype=torch.uint8, device=self.device.torch)
                    seconds = _timed(work, self.device)
                    # The first call warms up as well, which can take longer than the work.
                    more = 2 if seconds < _MOST_SECONDS / 4 else 1
                    if more * seconds < _MOST_SHARE * self._run_seconds(choices, seconds):
                        seconds = min(_timed(work, self.device) for _ in range(more))
                    del room
                return _with_race(choices, "forward_backward_seconds", float(f"{seconds:.4g}"))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                choices = with_less_memory(choices, self.config, rows, self.run_dir)
            release_memory(self.device)

    def _fewer_threads(self, choices: Choices, ends: float) -> Choices:
        """Half the threads, as often as that wins: small models and virtual cores do not gain from
        more."""
        figures: dict[str, float] = {}
        seconds, threads = choices.races["forward_backward_seconds"], choices.threads
        work = self._work(choices)

        def with_threads(n: int) -> Callable[[], None]:
            def run() -> None:
                torch.set_num_threads(n)
                work()

            return run

        while threads > 1 and _race_seconds(seconds * 3) < ends - time.perf_counter():
            half = threads // 2
            found = race(
                {str(n): with_threads(n) for n in (threads, half)},
                str(threads),
                self.device,
                ends - time.perf_counter(),
            )
            figures |= found.seconds
            if found.winner == str(threads):
                break
            seconds, threads = found.seconds[str(half)], half
        torch.set_num_threads(threads)
        return _with_race(replace(choices, threads=threads), "threads", figures)

    def _other_sizes(self, choices: Choices, ends: float) -> Choices:
        """About half or double the micro batch, where that is faster for each row."""
        rows = self.config.training.tokens_per_step // self.config.model.block_size
        now = choices.micro_batch_size
        sizes = {now, largest_divisor(rows, now // 2), largest_divisor(rows, 2 * now)}
        if not self._fits(max(sizes), choices):
            sizes.remove(max(sizes))
        seconds = choices.races["forward_backward_seconds"] * sum(sizes) / now
        if len(sizes) == 1 or _race_seconds(seconds) > ends - time.perf_counter():
            return choices
        works = {str(n): self._work(replace(choices, micro_batch_size=n)) for n in sorted(sizes)}
        row_counts = {str(n): n for n in sizes}
        try:
            found = race(works, str(now), self.device, ends - time.perf_counter(), row_counts)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return choices
        if found.winner != str(now):
            best = int(found.winner)
            seconds = float(f"{found.seconds[found.winner] * best:.4g}")
            choices = replace(choices, micro_batch_size=best)
            choices = _with_race(choices, "forward_backward_seconds", seconds)
        return _with_race(choices, "micro_batch_size", found.seconds)

    def _run_seconds(self, choices: Choices, micro_batch_seconds: float) -> float:
        step = micro_batch_seconds * _micro_batches(choices, self.config)
        return _expected_seconds(self.config, step, self.train_bytes)

    def _work(self, choices: Choices) -> Callable[[], None]:
        return micro_batch(
            self.model, self.config, self.device, choices.precision, choices.micro_batch_size
        )

    def _fits(self, rows: int, choices: Choices) -> bool:
        return rows <= choices.micro_batch_size or fits(
            self.config,
            self.device,
            self.model.vocab_size,
            rows,
            choices.precision,
            recompute=choices.activation_checkpointing,
            held_bytes=sum(parameter.nbytes for parameter in self.model.parameters()),
        )


def _race_compiled(choices: Choices, config: Config, device: Device, model: GPT) -> Choices:
    """`choices` with the race of a micro batch as it is and compiled; what fails has lost."""

    def using(switch: Callable[[GPT], None]) -> Callable[[], None]:
        def run() -> None:
            switch(model)
            work()

        return run

    log.info("compiling, to see whether that is faster")
    began = time.perf_counter()
    with undisturbed(model, device):
        work = micro_batch(model, config, device, choices.precision, choices.micro_batch_size)
        compiled = using(compile_blocks)
        try:
            compiled()
            compiling = time.perf_counter() - began
            works = {"eager": using(compile_no_more), "compiled": compiled}
            found = race(works, "eager", device, _MOST_SECONDS)
        except Exception as error:  # a compiler fails in its own ways
            log.warning(failure(error))
            found, compiling = Race({}, "eager"), 0.0
        finally:
            compile_no_more(model)
    figures = {**found.seconds, "compiling": float(f"{compiling:.3g}"), "winner": found.winner}
    return _with_race(choices, "compile", figures)


def _with_race(choices: Choices, name: str, figures: Any) -> Choices:
    return replace(choices, races={**choices.races, name: figures}) if figures else choices


def _timed(work: Callable[[], object], device: Device) -> float:
    began = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - began


def _race_seconds(one_call_of_each: float) -> float:
    """What the shortest race takes: in each turn two calls."""
    return 2 * _ROUNDS[0] * one_call_of_each


def _micro_batches(choices: Choices, config: Config) -> int:
    rows = config.training.tokens_per_step // config.model.block_size
    return math.ceil(rows / choices.micro_batch_size)


def _expected_seconds(config: Config, step_seconds: float, train_bytes: int) -> float:
    """About how long the run's training will take; endless where nothing tells."""
    paces = Paces("probe", step_seconds, 0.0, 0.0, 0.0)
    found = duration(config, paces, int(train_bytes / _BYTES_PER_TOKEN))
    return math.inf if found is None else found.training_seconds


def _optimizer_bytes(config: Config, model: GPT) -> int:
    """Of its state: two moments for each parameter that learns, but one for each of Muon's
    matrices."""
    learning = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    moments = 2 * sum(learning.values())
    if config.optimizer.kind == "adamw":
        return 4 * moments
    hidden = [n for n, p in model.blocks.named_parameters() if n.endswith("weight") and p.ndim == 2]
    return 4 * (moments - sum(learning.get(f"blocks.{name}", 0) for name in hidden))


def _place(choices: Choices, config: Config, device: Device, model: GPT) -> Path:
    """The file in the cache for trials like these: same machine, software, model and settings. The
    memory that is free may be less than it was then: a step that does not fit finds that out."""
    training = config.training
    about = {
        "version": __version__,
        "machine": socket.gethostname(),
        "device": asdict(device),
        "choices": {k: v for k, v in choices.to_json().items() if k != "races"},
        "model": config.model.model_dump(),
        "vocab_size": model.vocab_size,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "sequences_per_row": sequences_per_row(config.finetune),
        "optimizer": config.optimizer.kind,
        "document_mask": config.data.document_mask,
        "tokens_per_step": training.tokens_per_step,
        "micro_batch_size": training.micro_batch_size,
        "activation_checkpointing": training.activation_checkpointing,
        "threads_are_given": threads_are_given(),
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return cache_root() / "choices" / f"{key}.json"


def _recall(place: Path, choices: Choices, config: Config) -> Choices | None:
    """`choices` as tuned by an earlier run; None where there was none or its file is damaged."""
    try:
        saved = read_json_object(place, DataError)
        races = saved["races"]
        tuned = replace(
            choices,
            threads=saved["threads"],
            micro_batch_size=saved["micro_batch_size"],
            activation_checkpointing=saved["activation_checkpointing"],
            races={**races, **choices.races},
        )
        rows = config.training.tokens_per_step // config.model.block_size
        sound = (
            1 <= tuned.threads <= choices.threads
            and rows % tuned.micro_batch_size == 0
            and isinstance(tuned.activation_checkpointing, bool)
            and races["forward_backward_seconds"] > 0
            and ("compile" not in races or isinstance(races["compile"]["winner"], str))
        )
    except (DataError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None
    return tuned if sound else None


def _remember(place: Path, tuned: Choices) -> None:
    """For the next run; a cache that cannot be written costs it the trials again."""
    names = ("threads", "micro_batch_size", "activation_checkpointing", "races")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(place, {name: getattr(tuned, name) for name in names})
    except (OSError, ResourceError) as error:
        log.debug(f"the choices are not kept for the next run: {error}")
