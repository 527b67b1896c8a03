"""The config and the text that the faults happen to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

TINY = """\
name: tiny
tokenizer: {kind: bytes}
data: {train: text.txt}
model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 32}
training: {max_steps: 4, tokens_per_step: 64, log_every: 1, eval_every: 100, save_every: 100,
           micro_batch_size: 2, precision: fp32, compile: off, device: cpu}
schedule: {warmup_steps: 1}
samples: {n: 1, max_new_tokens: 4}
"""
PROSE = "".join(f"On day {i} a cat sat on the mat, and then it ran away.\n" for i in range(200))


@contextmanager
def working_in(place: Path) -> Iterator[Path]:
    """Work in `place`, with both in it. Reports, whose plots take a second, are left out."""
    (place / "tiny.yaml").write_text(TINY)
    (place / "text.txt").write_text(PROSE)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.delenv("GPT_DEBUG", raising=False)
        patch.setenv("GPT_RUNS", str(place / "runs"))
        for job in ("pretrain", "finetune"):
            patch.setattr(f"gptcli.{job}.write_report", lambda run_dir: None)
        yield place
