"""Measures the data path against its targets and prints a table (Markdown).

    python scripts/bench_data.py --text english.txt --text chinese.txt

Needs the extra `tables` (the GPT-2 tokenizer). Everything it writes is in a temporary directory.
Rates against tiktoken are medians of interleaved runs: ours, theirs, ours, theirs, ...
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiktoken
import torch

from gptcli.config.load import load_config
from gptcli.config.schema import Config
from gptcli.data.bpe import whole_words
from gptcli.data.corpus import Corpus, open_corpus
from gptcli.data.packing import PackedRows
from gptcli.data.pipeline import ready_tokenizer, training_rows
from gptcli.data.readers import read_shards
from gptcli.data.rows import step_batches
from gptcli.data.tiktoken_tables import named_encoding
from gptcli.data.tokenizer import Tokenizer, train_bpe
from gptcli.model.gpt import GPT, initialise

ROUNDS = 7
THREADS = min(os.cpu_count() or 1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--text", action="append", required=True, type=Path)
    parser.add_argument(
        "--big", type=float, default=1.0, help="GB of the corpus for resume and memory"
    )
    parser.add_argument("--only", action="append", help="encode, cache, resume, wait, bpe or mask")
    options = parser.parse_args()
    wanted = options.only or ["encode", "cache", "resume", "wait", "bpe", "mask"]
    print("| what | measured | target |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        os.environ["GPT_CACHE"] = str(Path(directory) / "cache")
        for text in options.text:
            if "encode" in wanted:
                bench_encode(text)
            if "cache" in wanted:
                bench_cache(text)
        if "cache" in wanted:
            bench_short_documents(options.text[0], Path(directory))
        if "resume" in wanted:
            bench_big(options.text, Path(directory), options.big)
        if "wait" in wanted:
            bench_wait(Path(directory))
        if "bpe" in wanted:
            for text in options.text:
                bench_bpe(text)
        if "mask" in wanted:
            bench_mask(options.text[0], Path(directory))


def row(what: str, measured: str, target: str = "") -> None:
    print(f"| {what} | {measured} | {target} |", flush=True)


def config_for(source: str, block_size: int, **data: Any) -> Config:
    """GPT-2's tokenizer on `source`, limits that make the cache worth while."""
    sets = [
        f"data.train={source}",
        "tokenizer={kind: tiktoken, name: gpt2}",
        f"model.block_size={block_size}",
        f"training.tokens_per_step={32 * block_size}",
        "training.max_epochs=10",
        *(f"data.{key}={value}" for key, value in data.items()),
    ]
    return load_config("small", [*sets, "training.max_steps=null"]).config


def opened(config: Config) -> tuple[Corpus, Tokenizer]:
    tokenizer = ready_tokenizer(config.tokenizer)
    assert tokenizer is not None
    return open_corpus(config.data, eot=tokenizer.eot), tokenizer


def read_steps(rows: PackedRows, per_step: int, tokens: int) -> int:
    """As many whole steps as there are in `tokens` tokens; returns the tokens read."""
    batches, read = step_batches(rows, per_step), 0
    width = rows.take(0).inputs.shape[1]
    for _ in range(tokens // (per_step * width)):
        read += next(batches).count
    return read


def bench_encode(text: Path) -> None:
    """Text file to packed batches, against tiktoken's batch encoding of the same pieces."""
    table = named_encoding("gpt2")
    peer = tiktoken.Encoding(
        "gpt2",
        pat_str=table.pattern,
        mergeable_ranks=table.ranks,
        special_tokens={"<|endoftext|>": table.eot},
    )
    for block_size in (128, 1024):
        config = config_for(str(text), block_size, cache="off")
        corpus, tokenizer = opened(config)
        pieces = [record["text"] for record in read_shards(corpus.train)]
        # One epoch: the step after it would wait for a part of the next one.
        tokens = sum(len(tokenizer.encode_numpy(piece)) for piece in pieces)
        ours, theirs = [], []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            read_steps(training_rows(config, corpus, tokenizer), 32, tokens)
            ours.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            peer.encode_ordinary_batch(pieces, num_threads=THREADS)
            theirs.append(time.perf_counter() - begin)
        mine, other = statistics.median(ours), statistics.median(theirs)
        rate = corpus.train_bytes / 1e6
        row(
            f"{text.name} to batches of 32 x {block_size}, no cache",
            f"{rate / mine:.1f} MB/s; encode_ordinary_batch alone, {THREADS} threads:"
            f" {rate / other:.1f}; ratio {other / mine:.2f}",
            "ratio >= 0.90",
        )


def bench_cache(source: Path, what: str | None = None) -> None:
    """Packed batches from the token cache, and how soon the first one is there."""
    for block_size in (128, 1024):
        config, per_step = config_for(str(source), block_size, cache="on"), 32768 // block_size
        corpus, tokenizer = opened(config)
        training_rows(config, corpus, tokenizer)  # builds the cache
        rates, starts = [], []
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            corpus, tokenizer_again = opened(config)
            rows = training_rows(config, corpus, tokenizer_again)
            next(step_batches(rows, per_step))
            starts.append(time.perf_counter() - begin)
            rows = training_rows(config, corpus, tokenizer)
            begin = time.perf_counter()
            tokens = read_steps(rows, per_step, 20_000_000)
            rates.append(tokens / (time.perf_counter() - begin) / 1e6)
        row(
            f"{what or source.name}: token cache to batches of {per_step} x {block_size}",
            f"{statistics.median(rates):.0f} M tokens/s; first batch after"
            f" {statistics.median(starts):.2f} s, tables and corpus included",
            "> 100 M tokens/s, < 1 s",
        )


def bench_short_documents(text: Path, directory: Path) -> None:
    """The same from JSON lines of about 200 tokens each."""
    path = directory / "short.jsonl"
    words = text.read_text(encoding="utf-8").split()
    with path.open("w") as f:
        for i in range(0, len(words), 150):
            f.write(json.dumps({"text": " ".join(words[i : i + 150])}) + "\n")
    bench_cache(path, "documents of 200 tokens (.jsonl)")


def bench_big(texts: list[Path], directory: Path, gigabytes: float) -> None:
    """Where a resume finds its place in a corpus of 4 MB files, and the reader's memory."""
    folder = directory / "big"
    folder.mkdir()
    data = b"".join(path.read_bytes() for path in texts)
    rng = random.Random(1)
    for number in range(int(gigabytes * 1e9 / 4e6)):
        start = rng.randrange(len(data) - 4_000_000)
        text = data[start : start + 4_000_000].decode("utf-8", "ignore")  # whole characters
        (folder / f"{number:05d}.txt").write_text(text, encoding="utf-8")
    for mode in ("streamed", "cached"):
        result = in_fresh_process("measure_big", str(folder), mode)
        first = result["first"]
        row(
            f"{gigabytes:g} GB in files of 4 MB, {mode}: from a saved position to its first batch",
            f"median {result['median']:.2f} s, worst of {result['cuts']:.0f}"
            f" {result['worst']:.2f} s, the check that no file has changed included"
            + (f"; reading and hashing all at first: {first:.1f} s" if mode == "streamed" else ""),
            "< 1 s",
        )
        row(
            f"peak memory of reading all of it, {mode}",
            f"{result['memory'] / 1e6:.0f} MB above the process before it",
            "< 300 MB",
        )


def measure_big(folder: str, mode: str) -> dict[str, float]:
    """Run in a fresh process: reads an epoch and resumes at places all over it."""
    config = config_for(folder, 1024, cache="on" if mode == "cached" else "auto")
    if mode == "streamed":  # a run that is too short for a cache of the tokens to pay
        short = config.training.model_copy(update={"max_epochs": None, "max_steps": 10})
        config = config.model_copy(update={"training": short})
    ready_tokenizer(config.tokenizer)
    before = peak_memory()
    begin = time.perf_counter()
    corpus, tokenizer = opened(config)
    first = time.perf_counter() - begin
    rows = training_rows(config, corpus, tokenizer)
    states, step = [], 0
    while rows.epochs < 1.0:
        rows.take(32)
        step += 1
        if step % 400 == 0:
            states.append(json.dumps(rows.state()))
    memory = peak_memory() - before
    times = []
    for state in random.Random(2).sample(states, min(12, len(states))):
        begin = time.perf_counter()
        corpus = open_corpus(config.data, eot=tokenizer.eot)
        training_rows(config, corpus, tokenizer, json.loads(state)).take(32)
        times.append(time.perf_counter() - begin)
    return {
        "first": first,
        "median": statistics.median(times),
        "worst": max(times),
        "cuts": len(times),
        "memory": memory,
    }


def peak_memory() -> float:
    """Most bytes that this process has had in memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def in_fresh_process(function: str, *arguments: str) -> dict[str, float]:
    """The result of a function of this file, run by itself."""
    code = f"import json, bench_data; print(json.dumps(bench_data.{function}(*{arguments!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def bench_wait(directory: Path) -> None:
    """Share of the step time that `small` waits for data, with its tokens cached and not."""
    for cache in ("on", "off"):
        run = directory / f"wait-{cache}"
        sets = [f"data.cache={cache}", "training.max_steps=60", "training.eval_every=60"]
        flags = [word for key in sets for word in ("--set", key)]
        subprocess.run(
            [sys.executable, "-m", "gptcli", "pretrain", "small", "--run-dir", str(run), *flags],
            check=True,
            capture_output=True,
        )
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["event"] == "train"]
        waited = sum(line["data_wait_seconds"] for line in steps)
        share = waited / steps[-1]["seconds"]
        row(f"waiting for data, small, 60 steps, cache {cache}", f"{share:.3%}", "< 1 %")


def bench_bpe(text: Path) -> None:
    """Training BPE on (at most) 10 MB, twice."""
    size = min(text.stat().st_size, 10_000_000)
    content = text.read_bytes()[:size].decode("utf-8", "ignore")
    pieces = [content[i : i + 32768] for i in range(0, len(content), 32768)]
    records = [{"text": text, "part": part} for part, text in enumerate(pieces)]
    pattern = "gpt4" if content.count(" ") * 20 > len(content) else "cjk"
    for vocab_size in (4096, 16384):
        times, found = [], set()
        for _ in range(2):
            begin = time.perf_counter()
            texts = whole_words(records)  # as training a tokenizer on a corpus reads it
            found.add(train_bpe(texts, vocab_size, pattern, size).identity)
            times.append(time.perf_counter() - begin)
        row(
            f"BPE, {vocab_size} tokens, pattern {pattern}, {size / 1e6:.1f} MB of {text.name}",
            f"{times[0]:.1f} and {times[1]:.1f} s, {'equal' if len(found) == 1 else 'DIFFERENT'}",
            "< 15 s, equal",
        )


def bench_mask(text: Path, directory: Path) -> None:
    """A training step of `small` with the document mask against one without, interleaved."""
    path = directory / "documents.jsonl"
    words = text.read_text(encoding="utf-8").split()
    with path.open("w") as f:
        for i in range(0, 200_000, 45):
            f.write(json.dumps({"text": " ".join(words[i : i + 45])}) + "\n")
    for block_size, rows in ((128, 32), (1024, 4)):
        times: dict[bool, list[float]] = {False: [], True: []}
        steps = {mask: step_of(path, block_size, rows, mask) for mask in (False, True)}
        for number in range(2 * ROUNDS + 2):
            begin = time.perf_counter()
            steps[number % 2 == 1]()
            if number > 1:
                times[number % 2 == 1].append(time.perf_counter() - begin)
        ratio = statistics.median(times[True]) / statistics.median(times[False])
        row(
            f"forward and backward of small, {rows} x {block_size}, documents of about 60 tokens:"
            " document_mask against plain",
            f"time x {ratio:.2f}",
        )


def step_of(path: Path, block_size: int, rows: int, mask: bool) -> Callable[[], None]:
    """A forward and backward pass on real packed rows."""
    config = config_for(str(path), block_size, document_mask=str(mask).lower())
    corpus, tokenizer = opened(config)
    batch = next(step_batches(training_rows(config, corpus, tokenizer), rows))
    small = config.model.model_copy(update={"block_size": block_size})
    model = GPT(small, 4096)
    initialise(model, torch.Generator().manual_seed(1))
    tokens, targets = batch.tokens % 4096, batch.targets % 4096

    def step() -> None:
        torch.autograd.backward(model.loss(tokens, targets, batch.segments))
        model.zero_grad()

    return step


if __name__ == "__main__":
    main()
