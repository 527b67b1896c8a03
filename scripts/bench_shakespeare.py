"""Time to a loss on tinyshakespeare: this project against nanoGPT's README recipe for CPUs.

    python scripts/bench_shakespeare.py --nanogpt CLONE --text tinyshakespeare.txt

Both train on the first 90 % and are scored by one evaluator over the whole last 10 %, in windows
of each model's own block size without overlap. The clock runs in training steps only: nanoGPT's
own per-iteration times (its evaluation reduced to one batch at start and end), and the training
seconds in our checkpoints.
"""

import argparse
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]  # (B, T) int64 -> (B, T, V)


def mean_nats(logits_of: Logits, ids: Tensor, block_size: int) -> float:
    """Mean nats of ids[1:], windows of `block_size` inputs without overlap."""
    total, count = 0.0, 0
    whole = (len(ids) - 1) // block_size
    parts = []
    if whole:
        x = ids[: whole * block_size].view(whole, block_size)
        y = ids[1 : whole * block_size + 1].view(whole, block_size)
        parts += [(x[i : i + 64], y[i : i + 64]) for i in range(0, whole, 64)]
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


def run_nanogpt(clone: Path, text: str, work: Path) -> tuple[float, float]:
    """(seconds in training iterations, loss on the last 10 %) of nanoGPT's CPU recipe."""
    copy = work / "nanoGPT"
    shutil.copytree(clone, copy, ignore=shutil.ignore_patterns(".git", "assets"))
    data = copy / "data" / "shakespeare_char"
    (data / "input.txt").write_text(text)
    subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, capture_output=True)
    recipe = (
        "--device=cpu --compile=False --eval_iters=1 --eval_interval=2000 --log_interval=1"
        " --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000"
        " --lr_decay_iters=2000 --dropout=0.0"
    )
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *recipe.split()]
    done = subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
    seconds = sum(float(ms) for ms in re.findall(r"time ([\d.]+)ms", done.stdout)) / 1000
    spec = importlib.util.spec_from_file_location("nanogpt_model", copy / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    saved = torch.load(copy / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(c) for c in text[int(0.9 * len(text)) :]])

    def logits_of(x: Tensor) -> Tensor:
        logits: Tensor = model(x, x)[0]  # with targets it gives logits of every position
        return logits

    return seconds, mean_nats(logits_of, ids, saved["model_args"]["block_size"])


def run_ours(path: Path, text: str, work: Path) -> list[tuple[int, float, float]]:
    """(step, training seconds, loss) of every checkpoint of configs/shakespeare.yaml."""
    from gptcli.runs.load import load_model

    run_dir = work / "ours"
    flags = ["training.save_every=10", "training.keep_last=1000", "training.eval_every=1000000"]
    settings = [f"data.train={path}", *flags]
    command = [sys.executable, "-m", "gptcli", "--quiet", "pretrain", "shakespeare"]
    command += ["--run-dir", str(run_dir)]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    ids = torch.tensor(list(text[int(0.9 * len(text)) :].encode()))
    found = []
    for directory in sorted((run_dir / "checkpoints").glob("step-*")):
        state = json.loads((directory / "state.json").read_text())["train"]
        model = load_model(str(directory), torch.device("cpu")).model
        loss = mean_nats(model, ids, model.config.block_size)
        found.append((state["step"], state["seconds"], loss))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of karpathy/nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare.txt")
    parser.add_argument("--runs", type=int, default=1, help="interleaved runs of each")
    options = parser.parse_args()
    text = options.text.read_text()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("run  nanoGPT s  loss   ours: s to that loss  share   ours at end: s  loss")
    for number in range(options.runs):
        with tempfile.TemporaryDirectory() as work:
            anchor_seconds, anchor = run_nanogpt(options.nanogpt, text, Path(work))
            ours = run_ours(options.text.resolve(), text, Path(work))
        reached = next((s for _, s, loss in ours if loss <= anchor), math.nan)
        _, end_seconds, end_loss = ours[-1]
        print(
            f"{number + 1:3}  {anchor_seconds:9.1f}  {anchor:.4f}  {reached:19.1f}"
            f"  {reached / anchor_seconds:5.2f}   {end_seconds:14.1f}  {end_loss:.4f}"
        )


if __name__ == "__main__":
    main()
