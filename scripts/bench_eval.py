#!/usr/bin/env python3
"""`gpt eval` measured against the usual sliding-window loop of transformers; a Markdown table.

    python scripts/bench_eval.py --model runs/NAME                    # 1 MB of the Bible
    python scripts/bench_eval.py --model runs/NAME --write docs/measured.md

The model is exported for transformers, so both have the same weights; both score the same tokens of
one document, its start included, given the same context: windows of block_size tokens that move by
the stride, block_size and half of it. The loop is that of transformers' documentation: one window
at a time, labels of -100 where a token was scored before; its window takes one token more, the last
target. Both run in this process and take turns; figures are medians over the rounds, with the
lowest and the highest. Loading and encoding are not timed. `--write FILE` puts the table between
<!-- bench eval --> and <!-- /bench eval -->.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_contenders import machine, note
from bench_train_tables import ratios, spread, table, write

if TYPE_CHECKING:
    from gptcli.runs.load import LoadedModel

CASE = "eval"
ASKED, MOST_DIFFERENCE = 2.0, 1e-4  # times the tokens a second; nats per token


@torch.no_grad()
def usual_loop(model: Any, ids: torch.Tensor, block_size: int, stride: int) -> tuple[float, int]:
    """Nats per token of the ids (n,) behind the first, and their number, as users of transformers
    compute them."""
    nats, tokens, previous = 0.0, 0, 1
    for begin in range(0, len(ids), stride):
        end = min(begin + block_size + 1, len(ids))
        count = end - previous
        inputs = ids[None, begin:end]
        labels = inputs.clone()
        labels[:, :-count] = -100
        nats += float(model(inputs, labels=labels).loss) * count
        tokens, previous = tokens + count, end
        if end == len(ids):
            break
    return nats / tokens, tokens


def bench(loaded: "LoadedModel", twin: Any, text: str, rounds: int) -> str:
    """Tokens per second and loss of both, by turns, for each stride."""
    from gptcli.data.scan import Document
    from gptcli.device import resolve_device
    from gptcli.evaluation.perplexity import encode_documents, perplexity

    documents = encode_documents([Document("the text", text)], loaded.tokenizer)
    ids, block_size = documents[0].tokens, loaded.model.config.block_size
    device = resolve_device("cpu")

    def ours(stride: int) -> tuple[float, int]:
        scores = perplexity(loaded.model, documents, device, stride=stride)
        return scores.loss, scores.tokens

    rows = []
    for stride in (block_size, block_size // 2):
        contenders: dict[str, Callable[[int], tuple[float, int]]] = {
            "gptcli": ours,
            "transformers": lambda stride: usual_loop(twin, ids, block_size, stride),
        }
        rates, found = timed(contenders, stride, rounds)
        (our_loss, our_tokens), (loss, tokens) = found.values()
        difference = abs(our_loss - loss)
        if our_tokens != tokens or difference > MOST_DIFFERENCE:
            raise SystemExit(f"bench_eval: {found}: not the same tokens, or not the same loss")
        ratio = ratios(rates["gptcli"], rates["transformers"])
        cells = [spread(values).show(",.0f") for values in rates.values()]
        verdict = [f"at least {ASKED:g}", "yes" if ratio.median >= ASKED else "no"]
        losses = [f"{our_loss:.5f}", f"{difference:.1e}"]
        rows.append([str(stride), *cells, ratio.show(".2f"), *verdict, *losses])
    size = len(text.encode())
    head = ["stride", "gptcli, tokens/s", "transformers, tokens/s", "ratio", "asked", "holds"]
    about = f"{size:,} bytes, {our_tokens:,} tokens, block_size {block_size}, fp32; {rounds} rounds"
    return table([*head, "loss", "difference"], rows) + f"\n\n{about}. " + machine("transformers")


def timed(
    contenders: dict[str, Callable[[int], tuple[float, int]]], stride: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, tuple[float, int]]]:
    """Tokens per second of each by round, and the loss and number of tokens that each found."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    found = {}
    for number in range(rounds):
        for name, score in contenders.items():
            began = time.perf_counter()
            found[name] = score(stride)
            rates[name].append(found[name][1] / (time.perf_counter() - began))
        shown = ", ".join(f"{name} {values[-1]:,.0f}" for name, values in rates.items())
        note(f"stride {stride}, round {number + 1} of {rounds}: {shown}")
    return rates, found


def main() -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="a run or checkpoint")
    parser.add_argument("--bytes", type=int, default=1_000_000, help="of text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, metavar="FILE")
    given = parser.parse_args()
    if given.rounds < 1 or given.bytes < 1000:
        parser.error("--rounds is at least 1, --bytes at least 1000")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM

    from gptcli.config.data_schema import SourceConfig
    from gptcli.data.corpus import read_documents
    from gptcli.export import export
    from gptcli.runs.load import load_model

    chapters = read_documents([SourceConfig(path="builtin:web-bible")])
    text = "\n\n".join(str(chapter.text) for chapter in chapters)
    text = text.encode()[: given.bytes].decode("utf-8", "ignore")
    with tempfile.TemporaryDirectory() as directory:
        made = export(given.model, Path(directory) / "twin", "hf", "f32").path
        twin = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    loaded = load_model(given.model, torch.device("cpu"))
    block = bench(loaded, twin, text, given.rounds)
    print(f"### {CASE}\n\n{block}", flush=True)
    if given.write:
        write(f"### {CASE}\n\n{block}", CASE, given.write)


if __name__ == "__main__":
    main()
