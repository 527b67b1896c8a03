"""Twins in transformers with random weights, saved as folders that ours are read from."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptcli.generation.engine import generate_samples
from gptcli.generation.sampling import Sampling
from gptcli.model.gpt import GPT
from gptcli.runs.load import load_model

transformers = pytest.importorskip("transformers")

VOCAB, BLOCK = 61, 24

_GPT2 = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_positions": BLOCK}
_LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 56,
    "max_position_embeddings": BLOCK,
}
_LOCAL = {"use_sliding_window": True, "sliding_window": 5}
# One layer sees all, two see a band: neither the first nor every other layer alone would do.
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

# name -> (model_type, config): each family, then its switches.
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt1": ("openai-gpt", _GPT2),
    "gpt2": ("gpt2", _GPT2),
    "gpt2-inner": ("gpt2", {**_GPT2, "n_inner": 40}),
    "gpt3": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "max_position_embeddings": BLOCK,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 5,
        },
    ),
    "llama": ("llama", _LLAMA),
    "llama-tied": ("llama", {**_LLAMA, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama-half": ("llama", {**_LLAMA, "attention_bias": True}),  # ours has zeros in the others
    "modern": ("qwen3", {**_LLAMA, "head_dim": 8}),
    "modern-wide": ("qwen3", {**_LLAMA, "head_dim": 12, "tie_word_embeddings": True}),
    "modern-bands": ("qwen3", {**_LLAMA, **_LOCAL, "head_dim": 8, "layer_types": _MIXED}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 6}),
    "qwen2": ("qwen2", _LLAMA),
    "qwen2-bands": ("qwen2", {**_LLAMA, **_LOCAL, "layer_types": _MIXED}),
}


def make_twin(model_type: str, **config: Any) -> Any:
    """The twin in eval mode without dropout, every weight random: norms and biases too, which a
    fresh model leaves at 1 and 0, where a wrong place goes unseen."""
    config = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, **config}
    if model_type in ("gpt2", "openai-gpt"):
        config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    made = transformers.AutoConfig.for_model(model_type, **config)
    twin = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in twin.parameters():
            noise = torch.empty(parameter.shape).normal_(generator=generator)
            if parameter.ndim < 2:
                parameter.add_(noise * 0.2)
            elif parameter.shape[0] == VOCAB:
                parameter.copy_(noise * 0.2)
            else:  # so much that greedy texts are not one token over and over
                parameter.copy_(noise * 1.7 * twin.config.hidden_size**-0.5)
    return twin


def tokens_of(length: int, batch: int = 2) -> Tensor:
    """Token ids (batch, length) int64."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(VOCAB, (batch, length), generator=generator)


@dataclass(frozen=True)
class Pair:
    """A twin and the model that was read from the folder it was saved to."""

    folder: Path
    theirs: Any
    ours: GPT

    @classmethod
    def make(cls, folder: Path, model_type: str, **config: Any) -> "Pair":
        """Both, in eval mode; nothing but the folder goes from one to the other."""
        twin = make_twin(model_type, **config)
        twin.save_pretrained(folder)
        return cls(folder, twin, load_model(str(folder), torch.device("cpu")).model)

    @cached_property
    def tokenizer(self) -> Any:
        """The stand-in of a folder without tokenizer."""
        return load_model(str(self.folder), torch.device("cpu")).tokenizer

    def logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Ours and theirs, each (B, T, V), of a model that has seen nothing before."""
        with torch.inference_mode():
            return self.ours(tokens), self.theirs(tokens).logits

    def our_greedy(self, prompt: Tensor, count: int, *, cache: bool) -> list[int]:
        """The `count` tokens that ours puts after `prompt` (T,)."""
        sampling = Sampling(temperature=0.0, max_new_tokens=count)
        (done,) = generate_samples(
            self.ours, self.tokenizer, prompt.tolist(), 1, sampling, use_cache=cache
        )
        return done.tokens

    def their_greedy(self, prompt: Tensor, count: int, *, cache: bool) -> list[int]:
        """The `count` tokens that the twin puts after `prompt` (T,)."""
        with torch.inference_mode():
            row = self.theirs.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt)[None],
                do_sample=False,
                use_cache=cache,
                max_new_tokens=count,
                pad_token_id=0,
            )[0]
        return row[len(prompt) :].tolist()
