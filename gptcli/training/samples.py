"""Texts that a run writes along the way, for people to see how it comes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.generation.engine import generate_samples
from gptcli.generation.prompt import encode_prompt, fit_prompt
from gptcli.generation.sampling import Sampling
from gptcli.model.gpt import GPT
from gptcli.training.parallel import sharded


def sample_texts(
    model: GPT, tokenizer: Tokenizer, config: Config, step: int, tokens: int
) -> list[dict[str, Any]]:
    """Records for samples.jsonl: what the model makes of the prompts of `config.samples` after
    `step` updates on `tokens` tokens. Raises `stop.Stopped`.

    Of a sharded model all processes write them, together.
    """
    wanted, rows = config.samples, []
    sampling = Sampling(
        temperature=0.8,
        top_p=0.95,
        seed=config.seed,
        max_new_tokens=wanted.max_new_tokens,
    )
    for prompt in wanted.prompts:
        ids = fit_prompt(encode_prompt(tokenizer, prompt), model.config.block_size, "left")
        with _same_logits(model):
            samples = generate_samples(model, tokenizer, ids, wanted.n, sampling, prompt=prompt)
        for made in samples:
            stop.raise_if_requested()
            row = {"step": step, "tokens": tokens, "prompt": prompt}
            rows.append({**row, "text": made.text, "sample": made.sample})
    return rows


@contextmanager
def _same_logits(model: GPT) -> Iterator[None]:
    """Let all processes go on from rank 0's logits: machines that differ round differently, and
    whose text is longer than the others' would wait for them for ever."""
    if not sharded(model):
        yield
        return

    def take(module: nn.Module, given: Any, logits: Tensor) -> Tensor:
        found = logits.contiguous()
        dist.broadcast(found, src=0)
        return found

    hook = model.register_forward_hook(take)
    try:
        yield
    finally:
        hook.remove()
