"""One contender of scripts/bench_finetune.py, alone in its process; started by it, not by hand.

Orders come as lines on stdin: a number of steps, or 0 to end. Each answer is a line of JSON: first
the facts, then the rate of each order, at the end the peak of the process's memory above what it
was when everything was imported.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from bench_contenders import Parent
from bench_train_worker import peak_memory
from torch import Tensor

LR, CLIP_NORM, RANK, ALPHA = 1e-4, 1.0, 8, 16
IGNORED = -100  # no target, in both libraries


@dataclass(frozen=True)
class Work:
    """What one contender trains: the model in `folder`, on `rows` rows of `length` tokens whose
    first `prompt` ones are not learned."""

    contender: str
    folder: str
    rows: int
    length: int
    prompt: int


def ours(work: Work, parent: Parent, method: str) -> None:
    """A step as `gpt finetune` takes it, with its automatic choices."""
    from gptcli.config.schema import Config
    from gptcli.data.rows import StepBatch
    from gptcli.device import resolve_device
    from gptcli.evaluation.perplexity import Scores
    from gptcli.model.lora import add_lora
    from gptcli.runs.load import load_model, reshaped
    from gptcli.training.choices import apply, choose
    from gptcli.training.objective import language_model_loss
    from gptcli.training.optimizers import Optimizer
    from gptcli.training.session import Session
    from gptcli.training.state import TrainState
    from gptcli.training.step import forward_backward
    from gptcli.training.trainable import set_trainable

    def never() -> Scores:
        raise AssertionError("a step does not evaluate")

    before = memory_now()
    loaded = load_model(work.folder, torch.device("cpu"))
    shape = loaded.config.model.model_copy(update={"block_size": work.length, "dropout": 0.0})
    config = Config.model_validate(
        {
            "model": shape,
            "finetune": {"method": method, "lora": {"rank": RANK, "alpha": ALPHA}},
            "optimizer": {"kind": "adamw", "lr": LR},
            "training": {"tokens_per_step": work.rows * work.length, "clip_norm": CLIP_NORM},
        }
    )
    model = reshaped(shape, loaded)
    if method == "lora":
        add_lora(model, config.finetune.lora, torch.Generator().manual_seed(0))
    set_trainable(model, config.finetune)
    device = resolve_device("cpu")
    choices = choose(config, device, model.vocab_size)
    apply(choices, model)
    session = Session(
        config=config,
        directory=Path(),
        device=device,
        choices=choices,
        model=model.train(),
        tokenizer=loaded.tokenizer,
        optimizer=Optimizer(model, config.optimizer),
        state=TrainState(),
        loss_of=language_model_loss(model),
        score_validation=never,
        data_fingerprint={},
    )
    tokens, targets = batch(work, model.vocab_size)
    given = StepBatch(tokens, targets, None, tokens.numel(), {}, 0.0)

    def step() -> None:
        forward_backward(session, given)
        session.optimizer.step(1.0)
        session.optimizer.zero_grad()

    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    take_orders(work, parent, step, before, learns)


def peft(work: Work, parent: Parent) -> None:
    """LoRA by peft on the model of transformers, as their documentation has it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    before = memory_now()
    base = AutoModelForCausalLM.from_pretrained(work.folder, dtype=torch.float32)
    settings = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, settings)
    model.train()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, LR, fused=True)
    tokens, targets = batch(work, model.config.vocab_size)
    # It shifts the labels itself: those of the first position are of none before it.
    labels = torch.cat([torch.full((work.rows, 1), IGNORED), targets[:, :-1]], 1)

    def step() -> None:
        model(input_ids=tokens, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    take_orders(work, parent, step, before, sum(p.numel() for p in learned))


def batch(work: Work, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Random tokens and targets (rows, length), the same for every contender."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(vocab_size, (work.rows, work.length + 1), generator=generator)
    targets = drawn[:, 1:].clone()
    targets[:, : work.prompt] = IGNORED
    return drawn[:, :-1].contiguous(), targets


def take_orders(
    work: Work, parent: Parent, step: Callable[[], None], before: int, learns: int
) -> None:
    """Answer every order with its tokens per second, and at the end the memory."""
    parent.answer(learns=learns)
    while steps := parent.order():
        began = time.perf_counter()
        for _ in range(steps):
            step()
        seconds = time.perf_counter() - began
        parent.answer(rate=steps * work.rows * work.length / seconds)
    peak = peak_memory(Path("/proc/self/status").read_text())
    parent.answer(peak_bytes=None if peak is None else peak - before)


def memory_now() -> int:
    """Bytes of this process in memory (VmRSS)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> None:
    work, parent = Work(**json.loads(sys.argv[1])), Parent()
    if work.contender == "peft":
        peft(work, parent)
    else:
        ours(work, parent, work.contender.removeprefix("gptcli-"))


if __name__ == "__main__":
    main()
