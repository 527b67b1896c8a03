"""Compare `gpt plan` with what runs then show: memory, seconds of a step, seconds of the run.

For each config: `gpt plan --json`, then the run itself in a process of its own, whose largest
resident memory the system tells. Needs a machine that does nothing else, the table of GPT-2's
tokenizer (extra `tables`) and about six minutes.

    python scripts/check_plan.py [NAME ...]
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

GPT = [sys.executable, "-m", "gptcli"]
LOG_EVERY, WARM_UP_LINES = 5, 1
LIMITS = {"memory_bytes": 0.15, "step_seconds": 0.2, "run_seconds": 0.2}  # of what runs show
_COMMON = """
name: {name}
data: {{train: builtin:web-bible}}
schedule: {{warmup_steps: 1}}
eval: {{max_tokens: 4096}}
samples: {{n: 1, max_new_tokens: 20}}
"""
_BPE, _GPT2 = "{kind: bpe, vocab_size: 8192}", "{kind: tiktoken, name: gpt2}"
_CADENCE = f"log_every: {LOG_EVERY}, eval_every: 100, save_every: 100"
CONFIGS = {
    "tiny": f"""
tokenizer: {{kind: bpe, vocab_size: 512, train_bytes: 1MB}}
model: {{preset: modern, n_layer: 2, n_head: 2, n_embd: 64, block_size: 64}}
training: {{max_steps: 40, tokens_per_step: 2048, {_CADENCE}}}
""",
    "small": f"""
tokenizer: {{kind: bpe, vocab_size: 4096}}
model: {{preset: modern, n_layer: 4, n_head: 4, n_embd: 192, block_size: 128}}
training: {{max_steps: 20, tokens_per_step: 4096, {_CADENCE}}}
""",
    "gpt2-14m": f"""
tokenizer: {_BPE}
model: {{preset: gpt2, n_layer: 6, n_head: 6, n_embd: 384, block_size: 256}}
training: {{max_steps: 15, tokens_per_step: 2048, micro_batch_size: 8, {_CADENCE}}}
optimizer: {{kind: adamw}}
""",
    "modern-33m": f"""
tokenizer: {_BPE}
model: {{preset: modern, n_layer: 8, n_head: 8, n_embd: 512, block_size: 256}}
training: {{max_steps: 15, tokens_per_step: 4096, {_CADENCE}}}
""",
    "gpt2-124m": f"""
tokenizer: {_GPT2}
model: {{preset: gpt2, block_size: 256}}
training: {{max_steps: 15, tokens_per_step: 1024, micro_batch_size: 2, {_CADENCE}}}
optimizer: {{kind: adamw}}
""",
}


@dataclass(frozen=True)
class Seen:
    """What one config was said to take, or took."""

    memory_bytes: float
    step_seconds: float
    run_seconds: float


def main() -> int:
    """Print one line a config; 1 when a plan is wrong by more than LIMITS."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CONFIGS)}; else all")
    names = parser.parse_args().names or list(CONFIGS)
    wrong: list[str] = []
    heads = ("MiB", "s/step", "s/run")
    print(f"{'config':<12}" + "".join(f"{h + ' plan':>13}{'run':>9}{'ratio':>7}" for h in heads))
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.yaml"
            path.write_text(_COMMON.format(name=name) + CONFIGS[name])
            subprocess.run(
                [*GPT, "--quiet", "pretrain", str(path), "--dry-run"],  # keeps corpus and tokenizer
                check=True,
                stdout=subprocess.DEVNULL,
            )
            planned, ran = plan(path), run(path, Path(folder) / "run")
        cells = [f"{name:<12}"]
        for key, unit in (("memory_bytes", 2**20), ("step_seconds", 1.0), ("run_seconds", 1.0)):
            said, was = getattr(planned, key) / unit, getattr(ran, key) / unit
            form = ".0f" if unit > 1 else ".3f"
            cells.append(f"{said:13{form}}{was:9{form}}{said / was:7.2f}")
            if abs(said / was - 1) > LIMITS[key]:
                wrong.append(f"{name}: {key}")
        print("".join(cells), flush=True)
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, torch {version('torch')}, {date.today()}")
    print("beyond the limits: " + ", ".join(wrong) if wrong else "all within the limits")
    return bool(wrong)


def plan(path: Path) -> Seen:
    """What `gpt plan` says of the config."""
    made = subprocess.run([*GPT, "plan", str(path), "--json"], check=True, stdout=subprocess.PIPE)
    said = json.loads(made.stdout)
    return Seen(said["memory"]["total_bytes"], said["paces"]["step_seconds"], said["seconds"])


def run(path: Path, run_dir: Path) -> Seen:
    """What a run of the config shows: its process's peak, the median step, the run's clock."""
    process = subprocess.Popen(
        [*GPT, "--quiet", "pretrain", str(path), "--run-dir", str(run_dir)],
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{path.name}: the run failed")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [_step_seconds(line) for line in lines if line["event"] == "train"]
    about = json.loads((run_dir / "run.json").read_text())
    return Seen(
        memory_bytes=usage.ru_maxrss * 1024,
        step_seconds=statistics.median(steps[WARM_UP_LINES:]),
        run_seconds=about["training"]["elapsed_seconds"],
    )


def _step_seconds(line: dict[str, Any]) -> float:
    """Of a step, from a line of metrics.jsonl for LOG_EVERY of them."""
    names = ("data_wait", "forward_backward", "optimizer", "other")
    return float(sum(line[f"{name}_seconds"] for name in names)) / LOG_EVERY


if __name__ == "__main__":
    sys.exit(main())
