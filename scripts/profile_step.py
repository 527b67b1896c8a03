#!/usr/bin/env python3
"""Where the time of one step goes, in training or in decoding, operator by operator.

    python scripts/profile_step.py                    # training; a Markdown table
    python scripts/profile_step.py --decode           # decoding in fp32, one text
    python scripts/profile_step.py --decode int8 -n 5 --prompt 512
    PYTHONPATH=CLONE python scripts/profile_step.py   # the same of another version of the code

Training: gpt2 preset, 6 layers of 384, T 256, B 8, V 8192, fp32; forward, backward, clipping and
AdamW on random tokens. Decoding: the shape of GPT-2 124M, random weights, n texts of 100 tokens,
greedily, as `gpt generate` makes them: packed layers, raced threads and recorded steps. Reading a
prompt is a part of the work, and so of the steps, that is also timed alone.

The operators' own times are by PyTorch's profiler, on whatever threads they run, over all steps
after some to warm up. The step's own time is taken without it.
"""

import argparse
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, profile

from gptcli.config.model_schema import ModelConfig
from gptcli.config.presets import PRESETS
from gptcli.config.schema import OptimizerConfig
from gptcli.data.tokenizer import IdsTokenizer
from gptcli.device import keep_freed_memory
from gptcli.generation.engine import Request, decode
from gptcli.generation.kernel_race import best_threads, decode_threads, packed_for
from gptcli.generation.sampling import Sampling
from gptcli.model.gpt import GPT, initialise
from gptcli.model.packed import Kind, quantize
from gptcli.training.optimizers import Optimizer

SIZES = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}
VOCAB, ROWS, STEPS = 8192, 8, 5
DECODED_VOCAB, DECODED_TOKENS = 50257, 100
LONGEST_PROMPT = 1024 - DECODED_TOKENS  # the block of GPT-2 holds it with what follows
LEAST_MS = 0.05  # kinds of less are not listed
# The first kind whose word is in the operator's name.
KINDS = {
    "matrix products": ("mm", "linear"),
    "attention": ("attention", "sdpa"),
    "GELU": ("gelu",),
    "cross-entropy": ("softmax", "nll", "logsumexp", "exp", "cross_entropy"),
    "LayerNorm": ("layer_norm",),
    "optimizer": ("fused_adamw", "foreach", "norm"),
    "storing keys and values": ("index_put", "index_copy"),
    "copies and fills": ("copy", "fill", "zero", "cat", "clone", "arange"),
    "rows to int8": ("abs", "amax", "addcmul", "div"),
    "sums of residuals and gradients": ("add", "sum", "mul"),
    "the recorded program itself": ("forward",),
    "views and new tensors": ("view", "slice", "stride", "transpose", "empty", "reshape"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ["fp32", "int8", "fp16"]
    parser.add_argument("--decode", nargs="?", const="fp32", choices=kinds, help="not training")
    parser.add_argument("-n", type=int, default=1, help="texts that are decoded together (1)")
    parser.add_argument("--prompt", type=int, default=1, help="tokens before the texts (1)")
    given = parser.parse_args()
    if not (given.n >= 1 and 1 <= given.prompt <= LONGEST_PROMPT):
        parser.error(f"-n is at least 1, --prompt from 1 to {LONGEST_PROMPT}")
    if (given.n > 1 or given.prompt > 1) and given.decode is None:
        parser.error("-n and --prompt go with --decode")
    keep_freed_memory()
    if given.decode is None:
        print(measured(training(), STEPS))
    else:
        work, threads = decoding(given.decode, given.n, given.prompt)
        with decode_threads(threads):
            print(measured(work, DECODED_TOKENS))
            if given.prompt > 1:
                began = time.perf_counter()
                work(1)
                seconds = time.perf_counter() - began
                print(f"Reading the prompt and one step: {1e3 * seconds:,.0f} ms.")


def training() -> Callable[[], None]:
    """`STEPS` training steps, after two to warm up."""
    model = random_model(ModelConfig(**{**PRESETS["gpt2"], **SIZES}), VOCAB)
    optimizer = Optimizer(model, OptimizerConfig(kind="adamw", lr=1e-4, weight_decay=0.1))
    tokens = torch.randint(VOCAB, (ROWS, SIZES["block_size"] + 1))

    def steps(count: int = STEPS) -> None:
        for _ in range(count):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(1.0)
            optimizer.zero_grad()

    steps(2)
    return steps


def decoding(kind: Kind | Literal["fp32"], n: int, prompt: int) -> tuple[Callable[..., None], int]:
    """A function of a number of steps, `DECODED_TOKENS` unless told, that continues a prompt of so
    many tokens by `n` texts, called once to record the steps; and how many threads are to take
    them. A prompt of one token is not read: nothing but steps."""
    model = random_model(ModelConfig(preset="gpt2", **PRESETS["gpt2"]), DECODED_VOCAB).eval()
    if kind != "fp32":
        quantize(model, kind)
    decoder = packed_for(model, n, prompt + DECODED_TOKENS)
    threads = best_threads(decoder, n, prompt + DECODED_TOKENS)
    ids = torch.randint(DECODED_VOCAB, (prompt,), generator=torch.Generator().manual_seed(1))

    def steps(count: int = DECODED_TOKENS) -> None:
        sampling = Sampling(temperature=0.0, max_new_tokens=count)
        requests = [Request("", ids.tolist(), sampling, n)]
        list(decode(model, IdsTokenizer(DECODED_VOCAB), requests, decoder=decoder))

    with decode_threads(threads):
        steps()
    return steps, threads


def random_model(config: ModelConfig, vocab_size: int) -> GPT:
    model = GPT(config, vocab_size)
    initialise(model, torch.Generator().manual_seed(0))
    return model


def measured(work: Callable[[], None], steps: int) -> str:
    """The table of `work`, which takes so many `steps`."""
    began = time.perf_counter()
    work()
    seconds = (time.perf_counter() - began) / steps
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        work()
    spent = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiled.key_averages():
        words = event.key.lower()
        kind = next((k for k, names in KINDS.items() if any(n in words for n in names)), "other")
        spent[kind] += event.self_cpu_time_total / steps / 1e3
    total = sum(spent.values())
    lines = ["| operators | ms | share |", "| --- | --: | --: |"]
    for kind, ms in sorted(spent.items(), key=lambda item: -item[1]):
        if ms > LEAST_MS:
            lines.append(f"| {kind} | {ms:,.1f} | {ms / total:.1%} |")
    about = f"{torch.get_num_threads()} threads; torch {torch.__version__}"
    lines += ["", f"One step takes {1e3 * seconds:,.1f} ms on {about}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
