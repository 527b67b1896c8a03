"""What heads attend to, in numbers that a report can keep."""

from typing import Any

import numpy as np
import torch

from gptcli.data.shown_rows import token_texts
from gptcli.data.tokenizer import Tokenizer
from gptcli.evaluation.head_shares import LEVELS, head_shares
from gptcli.model.attention_maps import attention_maps
from gptcli.model.gpt import GPT

_MOST_LAYERS, _MOST_HEADS, _MOST_TOKENS = 6, 8, 20  # of a picture: 48 maps of 20 x 20


def attention_picture(model: GPT, tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """Attention over the first tokens of `text`, as the `attention` of a report; {} for a text of
    fewer than two tokens.

    JSON-able: `tokens`, their texts; `layers` and `heads`, which are shown, from 0, and `of_layers`
    and `of_heads`, how many there are; `maps`, a text for each layer and head: the weights of each
    token to itself and those before it, row after row, a hexadecimal digit each (f is 1); `shares`,
    the `HeadShares` of each.
    """
    ids = tokenizer.begin(tokenizer.encode(text))[: min(_MOST_TOKENS, model.config.block_size)]
    if len(ids) < 2:
        return {}
    layers = _spread(model.config.n_layer, _MOST_LAYERS)
    heads = _spread(model.config.n_head, _MOST_HEADS)
    maps = attention_maps(model, torch.tensor(ids, device=model.device), layers)
    found = [[maps[layer][head].cpu().numpy() for head in heads] for layer in layers]
    lower = np.tril_indices(len(ids))
    digits = [
        ["".join(f"{round(float(w) * LEVELS):x}" for w in weights[lower]) for weights in row]
        for row in found
    ]
    shown = token_texts(tokenizer, ids, [i == 0 for i in range(len(ids))])
    return {
        "tokens": [text + (f"={completes}" if completes else "") for text, completes in shown],
        "layers": layers,
        "heads": heads,
        "of_layers": model.config.n_layer,
        "of_heads": model.config.n_head,
        "maps": digits,
        "shares": [[vars(head_shares(weights)) for weights in row] for row in found],
    }


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of 0 .. count - 1, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
