"""Tiny runs over tiny corpora, stopped at chosen places, and what they come to."""

import hashlib
import json
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from update_hook import UpdateHook

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.data import corpus, packing, readers, scan, shards
from gptcli.model.gpt import GPT
from gptcli.pretrain import pretrain
from gptcli.runs import checkpoint
from gptcli.runs.metrics import read_metrics, read_samples
from gptcli.runs.run_dir import read_run_json
from gptcli.training.build import RunResult
from gptcli.training.events import EvalEvent

STEPS = 17
TIMES = ("seconds", "tokens_per_second", "training_seconds", "memory_bytes")
Where = Literal["update", "evaluation", "behind evaluation", "accumulation"]


@contextmanager
def many_pieces() -> Iterator[None]:
    """A corpus of a few hundred bytes has several pieces, shards and groups, so a resume meets all
    their borders. The report is left out of runs that nobody looks at: its plots take a second."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (shards, readers, scan, corpus):
            patch.setattr(module, "PIECE_BYTES", 100)
        patch.setattr(corpus, "SHARD_PIECES", 2)
        patch.setattr(corpus, "SHARD_BYTES", 200)
        patch.setattr(packing, "GROUP_TOKENS", 128)
        patch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)
        yield


def prose(size: int, seed: int = 0) -> str:
    """Lines of made-up words."""
    rng = random.Random(seed)
    words = rng.choices(["sun", "moon", "tree", "é", "sing", "a", "of", "river"], k=size)
    lines = [" ".join(words[i : i + 7]) for i in range(0, size, 7)]
    return ("\n".join(lines) + "\n")[:size]


def one_file(folder: Path) -> Path:
    """A corpus in a single text file, a little less than seven steps long."""
    path = folder / "book.txt"
    path.write_text(prose(480))
    return path


def json_rows(folder: Path) -> Path:
    """A corpus of documents of many lengths, some longer than a piece."""
    path = folder / "rows.jsonl"
    texts = [prose(10 + 40 * (i % 5), seed=i) for i in range(6)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tiny(source: Path, **changes: Any) -> Config:
    """A tiny run over `source`; keys like training__max_steps change it."""
    values: dict[str, dict[str, Any]] = {
        "tokenizer": {"kind": "bytes"},
        "data": {"train": str(source), "val_fraction": 0.1, "shuffle_window": 2},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "dropout": 0.2},
        "schedule": {"warmup_steps": 2},
        "training": {
            "max_steps": STEPS,
            "tokens_per_step": 64,
            "log_every": 3,
            "eval_every": 5,
            "save_every": 4,
            "precision": "fp32",
        },
        "samples": {"prompts": ["the sun"], "n": 2, "max_new_tokens": 4},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            values.setdefault(section, {})[name] = value
        else:
            values[section] = value
    return Config.model_validate({"name": "tiny", **values})


@contextmanager
def interrupted(updates: int, where: Where = "update") -> Iterator[None]:
    """Ask for a stop during update number `updates` of this run (0: before the first), between two
    of its micro batches, in the evaluation that follows it, or just behind that."""
    done, passes = 0, 0

    def ask(reached: bool) -> None:
        if reached:
            stop.request(signal.SIGTERM)

    def after_update(*_: Any) -> None:
        nonlocal done, passes
        done, passes = done + 1, 0
        ask(where == "update" and done == updates)

    def before_forward(module: torch.nn.Module, _: Any) -> None:
        nonlocal passes
        if module.training and isinstance(module, torch.nn.Embedding):
            passes += 1
            ask(where == "accumulation" and (done, passes) == (updates - 1, 2))
        elif not module.training and isinstance(module, GPT):
            ask(where == "evaluation" and done == updates)

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "writing to" in record.getMessage():
                ask(where == "update" and updates == 0)
            elif isinstance(getattr(record, "event", None), EvalEvent):
                ask(where == "behind evaluation" and done == updates)

    listener = Listener()
    logger = logging.getLogger("gptcli")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(listener)
    hooks = [
        UpdateHook(after_update),
        register_module_forward_pre_hook(before_forward),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        logger.removeHandler(listener)
        logger.setLevel(level)
        stop.reset()


def outcome(run_dir: Path) -> dict[str, Any]:
    """All of a run that must not depend on where it was interrupted."""
    last = checkpoint.list_checkpoints(run_dir)[-1]
    state = checkpoint.read_state(last)["train"]
    metrics = [
        {k: v for k, v in record.items() if k not in TIMES and not k.endswith("_seconds")}
        for record in read_metrics(run_dir)
    ]
    return {
        "files": {
            name: hashlib.sha256((last / name).read_bytes()).hexdigest()
            for name in ("model.safetensors", "optimizer.safetensors")
        },
        "state": {k: v for k, v in state.items() if not k.endswith("seconds") and k != "interval"},
        "metrics": metrics,
        "samples": read_samples(run_dir),
        "best": checkpoint.read_best(run_dir),
        "status": read_run_json(run_dir)["status"],
    }


WHERE: dict[str, Where] = {"m": "accumulation", "e": "evaluation", "a": "behind evaluation"}


def with_cuts(config: Config, run_dir: Path, cuts: list[str]) -> RunResult:
    """The run, stopped at each of `cuts` and resumed. "3": in its third update; "3m": between two
    micro batches of that; "3e": in the evaluation behind it; "3a": just after that."""
    for number, cut in enumerate(cuts):
        with interrupted(int(cut.rstrip("mea")), WHERE.get(cut[-1], "update")):
            result = pretrain(config, run_dir=run_dir, resume="resume" if number else "no")
        assert (result.status, result.signal) == ("stopped", signal.SIGTERM)
    return pretrain(config, run_dir=run_dir, resume="resume")


def killing(updates: int) -> Callable[[], None]:
    """For a child: SIGKILL in update number `updates`."""

    def install() -> None:
        done = 0

        def kill(*_: Any) -> None:
            nonlocal done
            done += 1
            if done == updates:
                os.kill(os.getpid(), signal.SIGKILL)

        UpdateHook(kill)

    return install


def killed(config: Config, run_dir: Path, updates: int, *, resume: bool) -> None:
    """Run in a child process that SIGKILL ends in update number `updates`."""
    child = os.fork()
    if child == 0:
        killing(updates)()
        try:
            pretrain(config, run_dir=run_dir, resume="resume" if resume else "no")
        finally:
            os._exit(1)  # not reached: the kill comes first
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
