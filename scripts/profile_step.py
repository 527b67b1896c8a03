#!/usr/bin/env python3
"""Where the time of one training step goes: gpt2 preset, 6 layers of 384, T 256, B 8, V 8192, fp32.

    python scripts/profile_step.py                    # a Markdown table
    PYTHONPATH=CLONE python scripts/profile_step.py   # the same of another version of the code

The operators' own times by PyTorch's profiler, on whatever threads they run, over five steps after
two to warm up: forward, backward, clipping and AdamW on random tokens.
"""

import time

import torch
from torch.profiler import ProfilerActivity, profile

from gptcli.config.model_schema import ModelConfig
from gptcli.config.presets import PRESETS
from gptcli.config.schema import OptimizerConfig
from gptcli.device import keep_freed_memory
from gptcli.model.gpt import GPT, initialise
from gptcli.training.optimizers import Optimizer

SIZES = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}
VOCAB, ROWS, STEPS = 8192, 8, 5
# The first kind whose word is in the operator's name.
KINDS = {
    "matrix products": ("mm", "linear"),
    "attention": ("attention",),
    "GELU": ("gelu",),
    "cross-entropy": ("softmax", "nll", "logsumexp", "exp", "cross_entropy"),
    "LayerNorm": ("layer_norm",),
    "optimizer": ("fused_adamw", "foreach", "norm"),
    "copies and fills": ("copy", "fill", "zero", "cat", "clone"),
    "sums of residuals and gradients": ("add", "sum", "mul"),
}


def main() -> None:
    """Print the table."""
    keep_freed_memory()
    model = GPT(ModelConfig(**{**PRESETS["gpt2"], **SIZES}), VOCAB)
    initialise(model, torch.Generator().manual_seed(0))
    optimizer = Optimizer(model, OptimizerConfig(kind="adamw", lr=1e-4, weight_decay=0.1))
    tokens = torch.randint(VOCAB, (ROWS, SIZES["block_size"] + 1))

    def step() -> None:
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(1.0)
        optimizer.zero_grad()

    for _ in range(2):
        step()
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(STEPS):
            step()
    seconds = (time.perf_counter() - began) / STEPS
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiled.key_averages():
        words = event.key.lower()
        kind = next((k for k, names in KINDS.items() if any(n in words for n in names)), "other")
        spent[kind] += event.self_cpu_time_total / STEPS / 1e3
    total = sum(spent.values())
    print("| operators | ms | share |\n| --- | --: | --: |")
    for kind, ms in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"| {kind} | {ms:,.0f} | {ms / total:.1%} |")
    print(f"\nOne step takes {seconds:.2f} s; torch {torch.__version__}.")


if __name__ == "__main__":
    main()
