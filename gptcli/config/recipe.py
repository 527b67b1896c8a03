"""What `auto` means: learning rates, weight decay, batch and dropout as functions of size.

So n_layer and n_embd can be changed alone. Whatever is written in the YAML wins. All constants
stand at the top, with where they come from; anchors hold at `ANCHOR_N_EMBD`.
"""

import math
from typing import Literal

from gptcli.config.model_schema import ModelConfig

ANCHOR_N_EMBD = 256

# Muon's update has the same spectral norm at every width (Jordan et al. 2024, with its scale
# sqrt(max(1, rows / columns))), so its rate needs none of the width.
MUON_LR = 0.02
# What AdamW updates beside it: norms and head, and the embeddings. The rates fall with the square
# root of the width, as in nanochat (Karpathy 2025).
MUON_ADAMW_LR = 0.007  # configs/ablations.md: 0.01 at 128 wide was better in 6 of 6 pairs
MUON_EMBEDDING_LR = 0.03
MUON_ADAMW_WIDTH_POWER = -0.5
MUON_WEIGHT_DECAY = 0.0

# AdamW for all parameters: the line through the first row (125M, 768 wide, 6e-4) and the last
# (175B, 12288 wide, 6e-5) of table 2.1 of Brown et al. 2020. The rows between are up to 1.6 times
# lower. Weight decay is theirs too.
ADAMW_LR = 6e-4
ADAMW_N_EMBD = 768
ADAMW_WIDTH_POWER = math.log(0.1) / math.log(12288 / 768)  # -0.83
ADAMW_WEIGHT_DECAY = 0.1

# A model that is trained further keeps what it knows only if the steps are small.
INIT_LR_RATIO = 0.1
INIT_TOKENS_PER_STEP = 4096

# The best batch grows with the tokens of the whole run, not with the model (Zhang et al. 2024, How
# Does Critical Batch Size Scale in Pre-training?), about as their square root.
STEP_TOKENS_PER_ROOT_TOKEN = 3.2
LEAST_STEP_TOKENS = 512  # smaller products are no faster
# How long a run is expected to be where nobody says: a short one. 4096 tokens a step at 4 layers of
# ANCHOR_N_EMBD.
EXPECTED_TOKENS_PER_PARAMETER = 0.5

# A text may be read about four times before repetition costs (Muennighoff et al. 2023); dropout
# helps from there on.
FRESH_EPOCHS = 4.0
MANY_EPOCHS = 12.0
DROPOUT, MORE_DROPOUT = 0.1, 0.2


def rates(
    kind: Literal["muon", "adamw"], model: ModelConfig, *, from_init: bool
) -> dict[str, float]:
    """The keys of `optimizer` that may be `auto` and their values, to two digits.

    `from_init`: a model is trained further, at a tenth of the rates for a new one.
    """
    scale = INIT_LR_RATIO if from_init else 1.0
    if kind == "adamw":
        lr = ADAMW_LR * (model.n_embd / ADAMW_N_EMBD) ** ADAMW_WIDTH_POWER
    else:
        lr = MUON_LR
    width = (model.n_embd / ANCHOR_N_EMBD) ** MUON_ADAMW_WIDTH_POWER
    return {
        "lr": _two_digits(lr * scale),
        "adamw_lr": _two_digits(MUON_ADAMW_LR * width * scale),
        "embedding_lr": _two_digits(MUON_EMBEDDING_LR * width * scale),
        "weight_decay": ADAMW_WEIGHT_DECAY if kind == "adamw" else MUON_WEIGHT_DECAY,
    }


def tokens_per_step(run_tokens: float, unit_tokens: int) -> int:
    """Tokens of a step for a run of `run_tokens`: the nearest power of two times `unit_tokens`,
    which is what a step must be a multiple of."""
    wanted = max(LEAST_STEP_TOKENS, STEP_TOKENS_PER_ROOT_TOKEN * math.sqrt(run_tokens))
    return int(unit_tokens * 2 ** max(0, round(math.log2(wanted / unit_tokens))))


def usual_tokens_per_step(model: ModelConfig, unit_tokens: int, *, from_init: bool) -> int:
    """`training.tokens_per_step: auto`, a multiple of `unit_tokens`.

    It does not depend on the run's limits, so that a longer limit at a resume changes no batch.
    `from_init`: what a model is trained further on is little, whatever its size.
    """
    if from_init:
        return unit_tokens * max(1, INIT_TOKENS_PER_STEP // unit_tokens)
    return tokens_per_step(EXPECTED_TOKENS_PER_PARAMETER * hidden_parameters(model), unit_tokens)


def dropout(epochs: float) -> float:
    """Dropout for a run that reads its text `epochs` times."""
    if epochs <= FRESH_EPOCHS:
        return 0.0
    return DROPOUT if epochs <= MANY_EPOCHS else MORE_DROPOUT


def hidden_parameters(model: ModelConfig) -> int:
    """Weights of the hidden matrices: all but embeddings, head, norms and biases."""
    queries, keys = model.n_head * model.head_size, model.kv_heads * model.head_size
    attention = model.n_embd * (2 * queries + 2 * keys)
    feed_forward = (3 if model.gated else 2) * model.n_embd * model.inner_size
    return model.n_layer * (attention + feed_forward)


def _two_digits(rate: float) -> float:
    return float(f"{rate:.2g}")
