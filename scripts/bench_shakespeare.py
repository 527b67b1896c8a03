"""The case `shakespeare` of scripts/bench_train.py: loss on tinyshakespeare for the time it takes.

nanoGPT runs its README's recipe for CPUs, this project configs/shakespeare.yaml. Both train on the
first 90 % and are scored by one evaluator over the whole last 10 %, in windows of each model's own
block size without overlap. The clock runs in training steps only: nanoGPT's own per-iteration
times (its evaluation reduced to one batch at start and end), and the training seconds in our
checkpoints.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_train_tables import spread, table
from torch import Tensor

Logits = Callable[[Tensor], Tensor]  # (B, T) int64 -> (B, T, V)

SEED = 1337  # of the first run, in nanoGPT's train.py too
# Sizes and steps of nanoGPT's README; the evaluations only cost time.
RECIPE = (
    "--device=cpu --compile=False --eval_iters=1 --eval_interval=2000 --log_interval=1"
    " --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000"
    " --lr_decay_iters=2000 --dropout=0.0"
)
ESTIMATE_SECONDS = 400  # of one run of both on two AVX2 cores
ASKED_SHARE, ASKED_LOSS = "1/5", 1.60


@dataclass(frozen=True)
class Outcome:
    """One run of both. `reached_seconds` is ours to nanoGPT's loss, None if it never got there;
    `end_*` is the end of that run, `equal_*` that of one of as many steps as fit its seconds."""

    peer_seconds: float
    peer_loss: float
    reached_seconds: float | None
    end_seconds: float
    end_loss: float
    equal_seconds: float
    equal_loss: float


def shakespeare_table(clone: Path, path: Path, runs: int, folder: Path) -> str:
    """Train both `runs` times, by turns, with a seed for each run. SystemExit for other text."""
    text = path.read_text(encoding="utf-8")
    if not text.isascii():
        raise SystemExit(f"{path}: not ASCII, so its characters and bytes do not compare")
    outcomes = []
    for number in range(runs):
        work = folder / f"run-{number}"
        seconds, loss = run_nanogpt(clone, text, work, SEED + number)
        print(f"nanoGPT: {loss:.4f} after {seconds:.1f} s", file=sys.stderr)
        setting = ["training.save_every=10", "training.keep_last=1000"]
        states = run_ours(path, work / "to-loss", SEED + number, setting)
        reached, end = first_at_most(states, loss, text)
        steps = steps_within(seconds, _train_state(states[-1]))
        setting = ["training.max_time=null", f"training.max_steps={steps}"]
        setting.append("training.save_every=1000000")
        last = run_ours(path, work / "equal", SEED + number, setting)[-1]
        equal = (_seconds(last), _loss(last, text))
        outcomes.append(Outcome(seconds, loss, reached, *end, *equal))
        print(outcomes[-1], file=sys.stderr)
        shutil.rmtree(work)
    return outcomes_table(outcomes)


def outcomes_table(outcomes: list[Outcome]) -> str:
    """A line a run, and the medians of several."""
    rows = []
    for number, o in enumerate(outcomes):
        share = o.reached_seconds / o.peer_seconds if o.reached_seconds is not None else None
        rows.append(
            [
                str(SEED + number),
                f"{o.peer_loss:.4f} after {o.peer_seconds:.1f} s",
                "never" if share is None else f"{o.reached_seconds:.1f} s",
                "" if share is None else f"{share:.3f}",
                f"{o.end_loss:.4f} after {o.end_seconds:.1f} s",
                f"{o.equal_loss:.4f} after {o.equal_seconds:.1f} s",
            ]
        )
    if len(outcomes) > 1:
        shares = [(o.reached_seconds or float("inf")) / o.peer_seconds for o in outcomes]
        losses = [o.equal_loss for o in outcomes]
        median = ["median", f"{spread([o.peer_loss for o in outcomes]).median:.4f}", ""]
        rows.append([*median, spread(shares).show(".3f"), "", spread(losses).show(".4f")])
    rows.append(["asked", "", "", f"at most {ASKED_SHARE}", "", f"at most {ASKED_LOSS:.2f}"])
    head = ["seed", "nanoGPT", "ours to its loss", "share of its time", "ours, whole run"]
    return table([*head, "ours, given its time"], rows)


def run_nanogpt(clone: Path, text: str, work: Path, seed: int) -> tuple[float, float]:
    """(seconds in training iterations, loss on the last 10 %) of nanoGPT's CPU recipe."""
    copy = work / "nanoGPT"
    shutil.copytree(clone, copy, ignore=shutil.ignore_patterns(".git", "assets"))
    script = (copy / "train.py").read_text()
    (copy / "train.py").write_text(script.replace("manual_seed(1337", f"manual_seed({seed}"))
    data = copy / "data" / "shakespeare_char"
    (data / "input.txt").write_text(text)
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *RECIPE.split()]
    done = subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
    saved = torch.load(copy / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
    spec = importlib.util.spec_from_file_location("nanogpt_model", copy / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(c) for c in held_out(text)])

    def logits_of(x: Tensor) -> Tensor:
        logits: Tensor = model(x, x)[0]  # with targets it gives logits of every position
        return logits

    loss = mean_nats(logits_of, ids, saved["model_args"]["block_size"])
    return iteration_seconds(done.stdout), loss


def iteration_seconds(log: str) -> float:
    """The sum of the times in nanoGPT's lines `iter N: loss L, time Tms, mfu M%`.

    Without the first and the last iteration, whose times hold an evaluation; the last also comes
    after the checkpoint.
    """
    times = [float(ms) for ms in re.findall(r"^iter \d+: .*time ([\d.]+)ms", log, re.MULTILINE)]
    return sum(times[1:-1]) / 1000


def run_ours(path: Path, run_dir: Path, seed: int, settings: list[str]) -> list[Path]:
    """The checkpoints of configs/shakespeare.yaml with these settings, the earliest first."""
    command = [sys.executable, "-m", "gptcli", "--quiet", "pretrain", "shakespeare"]
    command += ["--run-dir", str(run_dir)]
    always = [f"data.train={path.resolve()}", f"seed={seed}", "training.eval_every=1000000"]
    for setting in (*always, *settings):
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return sorted((run_dir / "checkpoints").glob("step-*"))


def first_at_most(
    checkpoints: list[Path], loss: float, text: str
) -> tuple[float | None, tuple[float, float]]:
    """The training seconds of the first checkpoint that is as good as `loss`, None if there is
    none; seconds and loss of the last one."""
    reached = next((_seconds(c) for c in checkpoints if _loss(c, text) <= loss), None)
    return reached, (_seconds(checkpoints[-1]), _loss(checkpoints[-1], text))


def steps_within(seconds: float, state: dict[str, Any]) -> int:
    """How many steps fit into so many training seconds at the speed of the run that ended with
    `state`, a little spared because no two runs are equally fast."""
    return int(0.97 * seconds * state["step"] / state["seconds"])


def held_out(text: str) -> str:
    """The last 10 %, cut where nanoGPT's prepare.py cuts."""
    return text[int(0.9 * len(text)) :]


def mean_nats(logits_of: Logits, ids: Tensor, block_size: int) -> float:
    """Mean nats of ids[1:], windows of `block_size` inputs without overlap."""
    total, count = 0.0, 0
    whole = (len(ids) - 1) // block_size
    x = ids[: whole * block_size].view(whole, block_size)
    y = ids[1 : whole * block_size + 1].view(whole, block_size)
    parts = [(x[i : i + 64], y[i : i + 64]) for i in range(0, whole, 64)]
    rest = ids[whole * block_size :]
    if len(rest) > 1:
        parts.append((rest[None, :-1], rest[None, 1:]))
    with torch.no_grad():
        for x, y in parts:
            losses = torch.nn.functional.cross_entropy(
                logits_of(x).flatten(0, 1).float(), y.flatten(), reduction="sum"
            )
            total, count = total + float(losses), count + y.numel()
    return total / count


def _seconds(checkpoint: Path) -> float:
    """Seconds in training steps up to a checkpoint."""
    return float(_train_state(checkpoint)["seconds"])


def _train_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())["train"]
    return state


def _loss(checkpoint: Path, text: str) -> float:
    """Mean nats a byte on the last 10 %."""
    from gptcli.runs.load import load_model

    model = load_model(str(checkpoint), torch.device("cpu")).model.eval()
    ids = torch.tensor(list(held_out(text).encode()))
    return mean_nats(model, ids, model.config.block_size)
