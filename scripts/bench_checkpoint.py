"""What it costs to save and to check a checkpoint, beside writing the same bytes and syncing them.

    python scripts/bench_checkpoint.py [--preset gpt2] [--rounds 5] [--directory DIR]

Each round writes the numbers plainly (write and fsync), saves them as a checkpoint, and verifies
that; the table has the medians, and the ratios of each round's own pair.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gptcli.config.load import dump_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.interop.safetensors_file import numbers
from gptcli.model.gpt import GPT, initialise
from gptcli.runs.checkpoint import Contents, publish, verify
from gptcli.runs.tensors import untied

_VOCABULARY = 50257


def contents_of(preset: str) -> Contents:
    """A model of GPT-2's vocabulary with AdamW's two moments, all fp32."""
    config = Config.model_validate({"name": "bench", "model": {"preset": preset}})
    model = GPT(ModelConfig(preset=preset), _VOCABULARY)
    initialise(model, torch.Generator().manual_seed(0))
    moments = {
        f"{name}.{moment}": torch.randn_like(parameter)
        for name, parameter in model.named_parameters()
        for moment in ("exp_avg", "exp_avg_sq")
    }
    tokenizer = Tokenizer.of_bytes()
    return Contents(model.state_dict(), moments, {}, dump_config(config), tokenizer)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to write [a temporary one]")
    given = parser.parse_args()
    contents = contents_of(given.preset)
    groups = [list(untied(contents.model)[0].values()), list(contents.optimizer.values())]
    size = sum(tensor.nbytes for group in groups for tensor in group)
    figures = []
    with tempfile.TemporaryDirectory(dir=given.directory) as name:
        directory = Path(name)

        def plainly() -> None:
            for index, group in enumerate(groups):
                with open(directory / f"plain-{index}", "wb") as file:
                    for tensor in group:
                        file.write(numbers(tensor))
                    file.flush()
                    os.fsync(file.fileno())

        def clear() -> None:
            for path in directory.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            os.sync()

        for _ in range(given.rounds):
            clear()
            plain = seconds(plainly)
            clear()
            saved = seconds(lambda: publish(directory, 1, contents))
            checked = seconds(lambda: verify(directory / "checkpoints" / "step-00000001"))
            figures.append((plain, saved, checked))
    plain, saved, checked = (statistics.median(column) for column in zip(*figures, strict=True))
    ratios = sorted(b / a for a, b, _ in figures)
    print(f"{size / 1e9:.2f} GB ({given.preset} with AdamW's moments), {given.rounds} rounds")
    print(f"plain write and fsync   {plain:.2f} s")
    print(
        f"saved and hashed        {saved:.2f} s, {statistics.median(ratios):.2f} times that"
        f" ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )
    print(f"verified                {checked:.2f} s, {size / checked / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
