"""The cases of scripts/bench_train.py: shapes, what is asked, data, and how long they take."""

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from bench_train_tables import NAMES
from bench_train_worker import BETAS, CLIP_NORM, LR, WEIGHT_DECAY, Work

NANOGPT = tuple(name for name in NAMES if name.startswith("nanogpt"))
BPE_8192 = {"kind": "bpe", "vocab_size": 8192}
GPT2 = {"kind": "tiktoken", "name": "gpt2"}
WARMUP_STEPS = 2
EXPECTED_SHARE = 0.5  # of the GEMM peak, for the estimate of the time
START_SECONDS, COMPILE_SECONDS = 10, 60


@dataclass(frozen=True)
class Case:
    """Shapes, who takes part, and what is asked: by the first word of a contender's name, ours is
    at least this many times as fast (memory: at most as large)."""

    name: str
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch: int
    tokenizer: dict[str, Any]
    contenders: tuple[str, ...]
    steps: int  # of one turn
    asked: dict[str, float]
    asked_share: float | None = None
    training: dict[str, Any] | None = None  # keys of our config

    def process_bytes(self, weights: int) -> int:
        """About the memory of one contender: weights, gradients and the two moments of AdamW;
        logits, their softmax and gradient; sixteen activations of n_embd a layer; the runtime."""
        tokens = self.batch * self.block_size
        logits = tokens * (8192 if self.tokenizer is BPE_8192 else 50257)
        activations = 16 * tokens * self.n_layer * self.n_embd
        return 4 * (4 * weights + 3 * logits + activations) + 2**29


CASE_13M = Case(
    "13m", 6, 6, 384, 256, 8, BPE_8192, (*NANOGPT, "transformers"), 2,
    {"nanogpt": 1.2, "transformers": 1.5}, 0.8,
)  # fmt: skip
# The idle contenders keep their memory: four of these are 15 GB.
CASE_124M = Case(
    "124m", 12, 12, 768, 256, 4, GPT2, ("nanogpt", "nanogpt-fused", "nanogpt-compiled-fused"), 1,
    {"nanogpt": 1.35},
)  # fmt: skip
# Eager and all rows at once, as the peer: smaller micro batches would be another trade.
MEMORY = replace(
    CASE_124M,
    name="memory",
    block_size=1024,
    contenders=("nanogpt",),
    asked={"nanogpt": 0.75},
    training={"micro_batch_size": 4, "activation_checkpointing": "off", "compile": "off"},
)
THREADS = replace(CASE_13M, name="threads", contenders=(), asked={"threads": 1.7})
CASES = {case.name: case for case in (CASE_13M, CASE_124M, MEMORY, THREADS)}


@dataclass(frozen=True)
class Prepared:
    """The data of a case on disk: our config, the peers' tokens; FLOPs of training on a token."""

    config: Path
    tokens: Path
    vocab_size: int
    flops_per_token: int


def prepare(case: Case, text: Path | None, folder: Path) -> Prepared:
    """Tokenizer and tokens; where no text is given, those of the Bible that is installed."""
    from gptcli.config.load import load_config
    from gptcli.pretrain import read_corpus
    from gptcli.training.flops import flops_per_token

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {key: getattr(case, key) for key in ("n_layer", "n_head", "n_embd", "block_size")}
    values = {
        "name": "bench",
        "tokenizer": case.tokenizer,
        "data": {"train": str(text.resolve()) if text else "builtin:web-bible"},
        "model": {"preset": "gpt2", **sizes},
        "optimizer": {
            "kind": "adamw",
            "lr": LR,
            "weight_decay": WEIGHT_DECAY,
            "betas": list(BETAS),
            "eps": 1e-8,
        },
        "schedule": {"kind": "constant", "warmup_steps": 0},
        "training": {
            "max_steps": 100_000,
            "tokens_per_step": case.batch * case.block_size,
            "clip_norm": CLIP_NORM,
            "device": "cpu",
            "precision": "fp32",
            "eval_every": 1_000_000,
            "save_every": 1_000_000,
            "save_minutes": None,
            **(case.training or {}),
        },
        "eval": {"max_tokens": 4096},
    }
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(values))
    config = load_config(str(path)).config
    corpus, tokenizer = read_corpus(config, None)
    ids = [tokenizer.encode_numpy(record["text"]) for record in corpus.train_records()]
    assert tokenizer.vocab_size <= 2**16
    np.concatenate(ids).astype(np.uint16).tofile(folder / "tokens.bin")
    flops = flops_per_token(config.model, tokenizer.vocab_size)
    return Prepared(path, folder / "tokens.bin", tokenizer.vocab_size, flops)


def work_of(case: Case, contender: str, prepared: Prepared, nanogpt: Path | None) -> Work:
    """What a contender is started with; each has a folder of its own."""
    folder = tempfile.mkdtemp(prefix=f"{contender}-", dir=prepared.config.parent)
    return Work(
        contender,
        case.n_layer,
        case.n_head,
        case.n_embd,
        case.block_size,
        case.batch,
        prepared.vocab_size,
        str(prepared.config),
        str(prepared.tokens),
        folder,
        str(nanogpt.resolve()) if nanogpt else None,
    )


def describe(case: Case, prepared: Prepared) -> str:
    """The shapes of a case."""
    return (
        f"gpt2 preset, {case.n_layer} layers, {case.n_head} heads, n_embd {case.n_embd},"
        f" T {case.block_size}, B {case.batch}, vocabulary {prepared.vocab_size:,}, fp32"
    )


def estimate_seconds(case: Case, prepared: Prepared, peers: tuple[str, ...], rounds: int) -> float:
    """About how long a case takes, by a glance at the machine's speed."""
    a = torch.randn(1024, 1024)
    fastest = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        fastest = min(fastest, time.perf_counter() - began)
    flops = case.batch * case.block_size * prepared.flops_per_token
    step = flops / (EXPECTED_SHARE * 2 * 1024**3 / fastest)
    if case.name == "memory":
        return (1 + len(peers)) * (START_SECONDS + 2 * step)
    turns = WARMUP_STEPS + rounds * case.steps
    if case.name == "threads":
        # One thread takes two steps' time.
        return 4 * START_SECONDS + 2 * COMPILE_SECONDS + 3 * turns * step
    # Ours races compiled against eager steps before it starts.
    compiled = COMPILE_SECONDS * (1 + sum("compiled" in name for name in peers))
    return (2 + len(peers)) * START_SECONDS + compiled + (1 + len(peers)) * turns * step
