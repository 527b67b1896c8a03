"""Texts that a run writes along the way, for people to see how it comes on."""

from typing import Any

from gptcli import stop
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.generation.engine import generate_samples
from gptcli.generation.prompt import encode_prompt, fit_prompt
from gptcli.generation.sampling import Sampling
from gptcli.model.gpt import GPT


def sample_texts(
    model: GPT, tokenizer: Tokenizer, config: Config, step: int, tokens: int
) -> list[dict[str, Any]]:
    """Records for samples.jsonl: what the model makes of the prompts of `config.samples` after
    `step` updates on `tokens` tokens. Raises `stop.Stopped`."""
    wanted, rows = config.samples, []
    sampling = Sampling(
        temperature=0.8,
        top_p=0.95,
        seed=config.seed,
        max_new_tokens=wanted.max_new_tokens,
    )
    for prompt in wanted.prompts:
        ids = fit_prompt(encode_prompt(tokenizer, prompt), model.config.block_size, "left")
        for made in generate_samples(model, tokenizer, ids, wanted.n, sampling, prompt=prompt):
            stop.raise_if_requested()
            row = {"step": step, "tokens": tokens, "prompt": prompt}
            rows.append({**row, "text": made.text, "sample": made.sample})
    return rows
