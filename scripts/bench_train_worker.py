"""One contender of scripts/bench_train.py, alone in its process; started by it, not by hand.

Orders come as lines on stdin: a number of steps, or 0 to end. Each answer is a line of JSON: first
the facts, then the rate of each order, at the end the peak of the process's memory. A process of
its own keeps the settings of one contender, its memory and its allocator away from the others.
"""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bench_contenders import Parent
from torch import Tensor

# The settings of nanoGPT's train.py, for every contender.
LR, WEIGHT_DECAY, BETAS, CLIP_NORM = 6e-4, 0.1, (0.9, 0.95), 1.0
PRODUCT_REPEATS = 3


@dataclass(frozen=True)
class Work:
    """What one contender trains. `config` is our YAML, `tokens` the peers' file of uint16 ids,
    `folder` a place to write, `nanogpt` the clone."""

    contender: str
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch: int
    vocab_size: int
    config: str
    tokens: str
    folder: str
    nanogpt: str | None


def train_ours(work: Work, parent: Parent) -> None:
    """The loop of `gpt pretrain` as it is, but for the evaluation and checkpoint at its start."""
    from gptcli.config.load import load_config
    from gptcli.data.pipeline import training_rows
    from gptcli.data.rows import Prefetch, StepBatch, step_batches
    from gptcli.device import resolve_device
    from gptcli.pretrain import read_corpus
    from gptcli.training.build import build_session
    from gptcli.training.loop import train
    from gptcli.training.start import starting

    class Ended(Exception):  # noqa: N818  not an error
        pass

    class Turns(Prefetch):
        """Hands the loop as many batches as there are steps ordered; before the next, answers."""

        ordered, left, began = 0, 0, 0.0

        def next(self) -> StepBatch:
            if not self.left:
                if self.ordered:
                    self._answer()
                self.left = self.ordered = parent.order()
                if not self.ordered:
                    raise Ended
                self.began = time.perf_counter()
            self.left -= 1
            return super().next()

        def _answer(self) -> None:
            # What the steps took from the queue is made again on this contender's time.
            while not self._queue.full() and self._thread.is_alive():
                time.sleep(0.001)
            seconds = time.perf_counter() - self.began
            parent.answer(rate=self.ordered * work.batch * work.block_size / seconds)

    config = load_config(work.config).config
    device = resolve_device(config.training.device)
    run_dir = Path(work.folder) / "run"
    with starting(
        "pretrain", config, run_dir=run_dir, resume="no", overwrite=False, command=""
    ) as start:
        corpus, tokenizer = read_corpus(config, None)
        session = build_session(config, start, device, tokenizer, corpus, [], None)
        session.saved_step = session.state.evaluated_step = 0
        parent.answer(weights=session.model.parameter_count(), choices=session.choices.to_json())
        rows = step_batches(training_rows(config, corpus, tokenizer), work.batch)
        try:
            with Turns(rows) as batches:
                train(session, batches)
        except Ended:
            session.close()


def train_nanogpt(work: Work, parent: Parent, compiled: bool, fused: bool) -> None:
    """The model of the clone, its optimizer, and steps as in its train.py."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(str(work.nanogpt)) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module
    spec.loader.exec_module(module)
    config = module.GPTConfig(
        block_size=work.block_size,
        vocab_size=work.vocab_size,
        n_layer=work.n_layer,
        n_head=work.n_head,
        n_embd=work.n_embd,
        dropout=0.0,
        bias=True,
    )
    torch.manual_seed(1337)
    model = module.GPT(config)
    # It takes the fused AdamW where it is told of a GPU; the CPU has one too.
    kind = "cuda" if fused else "cpu"
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, kind)
    called = torch.compile(model) if compiled else model
    _train_peer(work, parent, model, lambda x, y: called(x, y)[1], optimizer)


def train_transformers(work: Work, parent: Parent, compiled: bool) -> None:
    """GPT2LMHeadModel with fused AdamW and the steps of the other peer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=work.vocab_size,
        n_positions=work.block_size,
        n_embd=work.n_embd,
        n_layer=work.n_layer,
        n_head=work.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    torch.manual_seed(1337)
    model = GPT2LMHeadModel(config)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), LR, BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    called = torch.compile(model) if compiled else model
    # It shifts the labels itself.
    _train_peer(work, parent, model, lambda x, y: called(input_ids=x, labels=x).loss, optimizer)


def multiply(parent: Parent, shapes: list[tuple[int, int, int]]) -> None:
    """Answers every order with the FLOP/s of the fastest of several fp32 products."""
    products = []
    for rows, inner, columns in shapes:
        a, b = torch.randn(rows, inner), torch.randn(inner, columns)
        out = torch.empty(rows, columns)
        products += [(a, b, out), (a, b.mT.contiguous().mT, out)]
    parent.answer(weights=None)
    while parent.order():
        best = 0.0
        for a, b, out in products:
            for _ in range(PRODUCT_REPEATS):
                began = time.perf_counter()
                torch.mm(a, b, out=out)
                seconds = time.perf_counter() - began
                best = max(best, 2 * a.size(0) * a.size(1) * b.size(1) / seconds)
        parent.answer(rate=best)


def product_shapes(work: Work) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of square products and of the linear layers of the model."""
    rows, width = work.batch * work.block_size, work.n_embd
    return [
        (1024, 1024, 1024),
        (2048, 2048, 2048),
        (rows, width, 4 * width),
        (rows, 4 * width, width),
    ]


def peak_memory(status: str) -> int | None:
    """Bytes of VmHWM in the text of /proc/PID/status, None where there is none."""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    return None


def _train_peer(
    work: Work,
    parent: Parent,
    model: torch.nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    batches = _random_batches(work)
    x, y = next(batches)
    parent.answer(weights=sum(p.numel() for p in model.parameters()))
    while steps := parent.order():
        began = time.perf_counter()
        for _ in range(steps):
            loss = loss_of(x, y)
            x, y = next(batches)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
        seconds = time.perf_counter() - began
        parent.answer(rate=steps * work.batch * work.block_size / seconds)


def _random_batches(work: Work) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows at random places of a memory-mapped file of tokens, and the tokens that follow."""
    size = work.block_size
    while True:
        data = np.memmap(work.tokens, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - size, (work.batch,)).tolist()
        rows = torch.stack(
            [torch.from_numpy(data[i : i + size + 1].astype(np.int64)) for i in starts]
        )
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def main() -> None:
    work, parent = Work(**json.loads(sys.argv[1])), Parent()
    name, *how = work.contender.split("-")
    if name == "gptcli":
        train_ours(work, parent)
    elif name == "nanogpt":
        train_nanogpt(work, parent, compiled="compiled" in how, fused="fused" in how)
    elif name == "transformers":
        train_transformers(work, parent, compiled="compiled" in how)
    else:
        multiply(parent, product_shapes(work))
    status = Path("/proc/self/status")
    peak = peak_memory(status.read_text()) if status.exists() else None
    parent.answer(peak_bytes=peak, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
