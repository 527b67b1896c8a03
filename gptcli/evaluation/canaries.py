"""Exposure: how much likelier than chance a model finds the secrets that were planted.

Carlini et al. 2019, "The Secret Sharer". A canary's rank is its place among all texts of its form,
ordered by the model's -ln p; its exposure is log2(texts) - log2(rank), in bits: about 1.4 on
average (log2 e) for a secret that the model never saw, log2(texts) for one that it finds likelier
than all others. Where there are too many texts to score them all, a sample is scored, a skew-normal
distribution is fitted to it, and the share of texts that are at least as likely is read off that
(section 4.3 of the paper).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli.config.data_schema import CanariesConfig
from gptcli.data.canaries import make_canaries, other_texts
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device
from gptcli.evaluation.likelihoods import text_nats
from gptcli.evaluation.statistics import bootstrap_ratio_ci
from gptcli.model.gpt import GPT

CANDIDATES = 4096  # texts with other secrets that are scored
_MOST_SKEW = 0.99  # a skew-normal distribution reaches 0.9953
_STEPS = 4000  # of the integral below a value
_REACH = 12.0  # standard deviations below it; there is nothing beyond

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Exposure:
    """What became of one canary: `nats` is -ln p of its text, `rank` its place among the scored
    texts (1: likelier than all of them)."""

    text: str
    repetitions: int
    nats: float
    rank: int
    exposure_bits: float


def canary_report(
    model: GPT, tokenizer: Tokenizer, config: CanariesConfig, device: Device, precision: str
) -> dict[str, Any]:
    """The exposure of each canary and its mean by repetitions, JSON-able. The model is in eval
    mode. Raises `stop.Stopped`."""
    canaries, others = make_canaries(config), other_texts(config, CANDIDATES)
    texts = [canary.text for canary in canaries] + others
    nats = text_nats(model, tokenizer, texts, device, precision)
    reference, space = nats[len(canaries) :], 10**config.digits
    every = len(others) + len(canaries) == space
    found = []
    for place, canary in enumerate(canaries):
        own = float(nats[place])
        # Other canaries are no candidates: a model may rightly find them likely too.
        rank = 1 + int(np.count_nonzero(reference <= own))
        bits = math.log2(len(others) + 1) - math.log2(rank)
        if not every:
            bits = extrapolated_exposure(own, reference, space)
        found.append(Exposure(canary.text, canary.repetitions, own, rank, bits))
    return {
        "method": "rank" if every else "skew-normal",
        "format": config.format,
        "space": space,
        "candidates": len(others),
        "most_bits": math.log2(len(others) + 1 if every else space),
        "by_repetitions": [_summary(found, number) for number in config.repetitions],
        "canaries": [asdict(exposure) for exposure in found],
    }


def _summary(found: Sequence[Exposure], repetitions: int) -> dict[str, Any]:
    own = [exposure for exposure in found if exposure.repetitions == repetitions]
    bits = [exposure.exposure_bits for exposure in own]
    return {
        "repetitions": repetitions,
        "canaries": len(own),
        "exposure_bits": float(np.mean(bits)),
        "exposure_bits_ci95": bootstrap_ratio_ci(bits, np.ones(len(bits))),
        "ranked_first": sum(exposure.rank == 1 for exposure in own),
    }


def extrapolated_exposure(nats: float, reference: _Array, space: int) -> float:
    """-log2 of the share of texts that are at least as likely, in bits, at most log2(space).

    The share is that of a skew-normal distribution with the mean, the variance and the skewness of
    `reference` (N,).
    """
    location, scale, shape = fit_skew_normal(reference)
    if not scale:
        raise ValueError("all candidates are equally likely")
    share, most = skew_normal_below((nats - location) / scale, shape), math.log2(space)
    return min(most, -math.log2(share)) if share > 0 else most


def fit_skew_normal(values: _Array) -> tuple[float, float, float]:
    """Location, scale and shape of the skew-normal distribution (Azzalini 1985) with the mean, the
    variance and, as far as it has so much, the skewness of `values`."""
    mean, deviation = float(values.mean()), float(values.std())
    if deviation == 0:
        return mean, 0.0, 0.0
    skew = float((((values - mean) / deviation) ** 3).mean())
    power = min(abs(skew), _MOST_SKEW) ** (2 / 3)
    delta = math.sqrt(math.pi / 2 * power / (power + ((4 - math.pi) / 2) ** (2 / 3)))
    delta = math.copysign(delta, skew)
    scale = deviation / math.sqrt(1 - 2 * delta**2 / math.pi)
    location = mean - scale * delta * math.sqrt(2 / math.pi)
    return location, scale, delta / math.sqrt(1 - delta**2)


def skew_normal_below(value: float, shape: float) -> float:
    """P(X <= value) of a standard skew-normal X, far tails too: the integral of its density
    2 phi(x) Phi(shape x), by Simpson's rule."""
    x = np.linspace(value - _REACH, value, _STEPS + 1)
    if value > 0:  # all that is below 0 lies in reach of 0
        x = np.linspace(-_REACH, value, _STEPS + 1)
    cumulated = np.array([math.erfc(-shape * point / math.sqrt(2)) / 2 for point in x])
    density = np.exp(-(x**2) / 2) * cumulated * 2 / math.sqrt(2 * math.pi)
    weights = np.ones(_STEPS + 1)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return min(1.0, float(density @ weights * (x[1] - x[0]) / 3))
