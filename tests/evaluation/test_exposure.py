"""Exposure of canaries: the extrapolation against exact integrals and ranks, ranks by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gptcli.config.data_schema import CanariesConfig
from gptcli.config.model_schema import ModelConfig
from gptcli.data.canaries import make_canaries
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import resolve_device
from gptcli.evaluation.canaries import (
    canary_report,
    extrapolated_exposure,
    fit_skew_normal,
    skew_normal_below,
)
from gptcli.model.gpt import GPT, initialise

BYTES = Tokenizer.of_bytes()


def test_normal_tail() -> None:
    """Bug: far below the mean, where memorised canaries are, the share is rounding noise."""
    for value in (-30.0, -8.0, -1.0, 0.0, 2.5):
        expected = math.erfc(-value / math.sqrt(2)) / 2
        assert skew_normal_below(value, 0.0) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [-4.0, -0.7, 0.5, 6.0])
def test_skewed(shape: float) -> None:
    """Bug: the integral, or the fit by moments, is that of another distribution."""
    special = pytest.importorskip("scipy.special")
    rng = np.random.default_rng(1)
    delta = shape / math.sqrt(1 + shape**2)
    one, other = rng.normal(size=(2, 200_000))
    values = 50 + 3 * (delta * abs(one) + math.sqrt(1 - delta**2) * other)
    location, scale, found = fit_skew_normal(values)
    for value in (-3.0, -1.0, 0.3, 2.0):
        expected = float(special.ndtr(value) - 2 * special.owens_t(value, shape))
        assert skew_normal_below(value, shape) == pytest.approx(expected, rel=1e-6, abs=1e-14)
        fitted = skew_normal_below((50 + 3 * value - location) / scale, found)
        assert fitted == pytest.approx(expected, abs=0.004)


def test_extrapolation_is_the_rank() -> None:
    """Bug: exposure by the fitted distribution is another than by rank where both are known."""
    rng = np.random.default_rng(0)
    reference, others = rng.normal(100, 5, 4096), rng.normal(100, 5, 1_000_000)
    for value in (100.0, 90.0, 82.0):
        rank = 1 + int((others <= value).sum())
        by_rank = math.log2(len(others)) - math.log2(rank)
        assert extrapolated_exposure(value, reference, 10**9) == pytest.approx(by_rank, abs=0.5)
    assert extrapolated_exposure(0.0, reference, 10**9) == math.log2(10**9)
    with pytest.raises(ValueError, match="equally likely"):
        extrapolated_exposure(1.0, np.ones(9), 100)


def nats_by_hand(model: GPT, text: str) -> float:
    ids = torch.tensor([BYTES.eot, *BYTES.encode(text)])
    with torch.no_grad():
        logits = model(ids[None, :-1])[0]
    return float(F.cross_entropy(logits.double(), ids[1:], reduction="sum"))


def test_ranks() -> None:
    """Bug: a rank counts other canaries, counts from 0, or is of likelihood the wrong way round."""
    shape = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=32, zero_init_output=False)
    model = GPT(shape, BYTES.vocab_size)
    initialise(model, torch.Generator().manual_seed(1))
    settings = CanariesConfig(count=3, repetitions=[0, 2], digits=2)
    found = canary_report(model.eval(), BYTES, settings, resolve_device("cpu"), "fp32")
    assert found["method"] == "rank"
    assert found["candidates"] == 94
    planted = {canary.secret for canary in make_canaries(settings)}
    every = {f"{i:02d}": nats_by_hand(model, f"The random number is {i:02d}.") for i in range(100)}
    others = [nats for secret, nats in every.items() if secret not in planted]
    for canary, made in zip(found["canaries"], make_canaries(settings), strict=True):
        rank = 1 + sum(nats <= every[made.secret] for nats in others)
        assert canary["nats"] == pytest.approx(every[made.secret], abs=1e-3)
        assert canary["rank"] == rank
        assert canary["exposure_bits"] == pytest.approx(math.log2(95) - math.log2(rank))
    by = {part["repetitions"]: part for part in found["by_repetitions"]}
    means = [c["exposure_bits"] for c in found["canaries"] if c["repetitions"] == 2]
    assert by[2]["exposure_bits"] == pytest.approx(np.mean(means))
    assert by[2]["canaries"] == 3
