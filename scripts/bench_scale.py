"""Two processes against one on this machine's CPU: tokens/s of the same steps, and memory.

    python scripts/bench_scale.py [--rounds 5] [--config configs/small.yaml] [--steps 12]

Speed: one process with all cores, and as many processes with one core each, take turns; the ratio
is that of the medians of their best intervals. Memory: the largest resident size of a process that
has its share of a model (FSDP), less that of one with next to no model, over the bytes of
parameters, gradients and optimizer state of the whole model; and what `gpt plan` says of it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROCESSES = 2
TINY = ["model.n_layer=1", "model.n_embd=16", "model.n_head=1"]
# As deep as GPT-2 medium: a block, of which a process has all while it computes, is 4 % of it.
DEEP = ["model.n_layer=24", "model.n_embd=640", "model.n_head=10"]
LEAN = ["model.block_size=32", "training.tokens_per_step=64", "training.micro_batch_size=1"]


def train(config: str, directory: Path, settings: list[str], processes: int) -> None:
    """One run, in so many processes, each with its part of the cores."""
    command = [sys.executable, "-m", "gptcli", "pretrain", config, "--run-dir", str(directory)]
    command += ["--quiet", "--overwrite", *(f"--set={setting}" for setting in settings)]
    if processes > 1:
        command += ["--devices", str(processes)]
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)


def lines(directory: Path) -> list[dict[str, float]]:
    """The training lines of a run's metrics."""
    text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    return [record for record in records if record["event"] == "train"]


def speeds(config: str, rounds: int, steps: int, given: list[str], place: Path) -> None:
    """Print tokens/s of both, and their ratio."""
    few = [f"training.max_steps={steps}", "training.log_every=1", "training.compile=off"]
    few += ["training.precision=fp32", "schedule.warmup_steps=1", "training.eval_every=1000"]
    few += ["eval.max_tokens=2000", "samples.n=1", *given]
    found: dict[str, list[float]] = {"one": [], "ddp": [], "fsdp": []}
    losses = {}
    for number in range(rounds):
        for name in found:
            run = place / name
            strategy = [] if name == "one" else [f"distributed.strategy={name}"]
            train(config, run, few + strategy, 1 if name == "one" else PROCESSES)
            records = lines(run)
            found[name].append(statistics.median(r["tokens_per_second"] for r in records[2:]))
            losses[name] = [r["loss"] for r in records]
        print(f"round {number + 1}: " + "  ".join(f"{k} {v[-1]:,.0f}" for k, v in found.items()))
    for name in ("ddp", "fsdp"):
        ratio = statistics.median(
            two / one for two, one in zip(found[name], found["one"], strict=True)
        )
        apart = max(abs(a - b) for a, b in zip(losses["one"], losses[name], strict=True))
        print(f"{name}: {ratio:.2f} x the tokens/s of one process; losses differ by {apart:.1e}")


def memory(config: str, kind: str, place: Path) -> None:
    """Print the memory of a process with its share, against what the whole model takes."""
    settings = [*LEAN, f"optimizer.kind={kind}", "training.max_steps=3", "training.log_every=1"]
    settings += ["samples.n=1", "samples.max_new_tokens=2", "eval.max_tokens=64"]
    settings += ["schedule.warmup_steps=1"]
    settings += ["training.precision=fp32", "training.compile=off", "distributed.strategy=fsdp"]
    peaks = {}
    for name, shape in (("tiny", TINY), ("deep", DEEP)):
        train(config, place / name, settings + shape, PROCESSES)
        peaks[name] = lines(place / name)[-1]["memory_bytes"]
    about = json.loads((place / "deep" / "run.json").read_text(encoding="utf-8"))
    stored = list((place / "deep" / "checkpoints").glob("step-*/optimizer.safetensors"))
    state = max(path.stat().st_size for path in stored)
    whole = 8 * about["training"]["parameters"] + state
    held = peaks["deep"] - peaks["tiny"]
    planned = plan(config, settings + DEEP)
    print(
        f"{kind}: {about['training']['parameters']:,} parameters; parameters, gradients and"
        f" optimizer state of one process {whole / 2**20:,.0f} MiB, a process of {PROCESSES} holds"
        f" {held / 2**20:,.0f} MiB at its peak: {held / whole:.2f}; planned were"
        f" {planned / 2**20:,.0f} MiB"
    )


def plan(config: str, settings: list[str]) -> int:
    """Bytes that `gpt plan` expects of a process, less those of the program itself."""
    command = [sys.executable, "-m", "gptcli", "plan", config, "--json", f"--devices={PROCESSES}"]
    command += ["--device-kind=h100", *(f"--set={setting}" for setting in settings)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts: dict[str, int] = json.loads(said)["memory"]
    return sum(size for name, size in parts.items() if name != "other_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/small.yaml")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--only", choices=["speed", "memory"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if given.only != "memory":
            speeds(given.config, given.rounds, given.steps, given.set, Path(place))
        if given.only != "speed":
            for kind in ("adamw", "muon"):
                memory(given.config, kind, Path(place))


if __name__ == "__main__":
    main()
