"""Choosing tokens on a GPU, where sums and sorts are others, against the CPU."""

import itertools

import numpy as np
import torch

from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device
from gptcli.generation.sampling import Sampler, Sampling


def test_the_same_tokens_as_on_the_cpu(device: Device) -> None:
    """Guards: ids and tables on different devices; ranks or sums of a GPU that choose otherwise."""
    choices = itertools.product([0.0, 0.7], [None, 5], [0.8, 1.0], [0.0, 0.1], [1.0, 1.3], [0, 0.5])
    settings = [
        Sampling(
            temperature=t,
            top_k=k,
            top_p=p,
            min_p=m,
            repetition_penalty=r,
            presence_penalty=q,
            bad_words=("\x03",) if q else (),
        )
        for t, k, p, m, r, q in choices
    ]
    count, tokenizer = len(settings), Tokenizer.of_bytes()
    logits = torch.randn(12, count, 3000, generator=torch.Generator().manual_seed(0)) * 3
    texts = []
    for where in (torch.device("cpu"), device.torch):
        sampler = Sampler(count, tokenizer, 3000, where)
        for slot, asked in enumerate(settings):
            sampler.begin(slot, asked, [1, 2], slot)
        slots = np.arange(count)
        steps = enumerate(logits.to(where))
        texts.append([sampler.choose(x, slots, slots * 0 + t).tolist() for t, x in steps])
    assert texts[0] == texts[1]
