"""What is said of scored text besides its scores, against plain loops over all tokens."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from gptcli.config.model_schema import ModelConfig
from gptcli.data.scan import Document
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import resolve_device
from gptcli.evaluation.calibration import calibration
from gptcli.evaluation.details import details
from gptcli.evaluation.perplexity import (
    DocumentScores,
    EncodedDocument,
    encode_documents,
    perplexity,
    score_documents,
    total_scores,
)
from gptcli.model.gpt import GPT, initialise
from gptcli.reports.eval_sections import (
    breakdown_section,
    calibration_section,
    surprising_section,
)

BLOCK, STRIDE = 16, 5
BYTES = Tokenizer.of_bytes()
DEVICE = resolve_device("cpu")
TEXTS = [
    ("en.txt", "An English text that says a little of this and a little of that, and some more."),
    ("en.txt", "Another one of about the same length, so that there are two of them in this file."),
    ("zh.txt", "春眠不覺曉，處處聞啼鳥。夜來風雨聲，花落知多少。白日依山盡，黃河入海流。"),
    ("zh.txt", "短"),
]


@pytest.fixture(scope="module")
def model() -> GPT:
    config = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": BLOCK}
    made = GPT(ModelConfig.model_validate({**config, "zero_init_output": False}), BYTES.vocab_size)
    initialise(made, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made.eval()


@pytest.fixture(scope="module")
def encoded() -> list[EncodedDocument]:
    documents = [Document(f"{s}, row {i}", t, source=s) for i, (s, t) in enumerate(TEXTS)]
    return encode_documents(documents, BYTES)


@pytest.fixture(scope="module")
def found(model: GPT, encoded: list[EncodedDocument]) -> DocumentScores:
    return score_documents(model, encoded, DEVICE, stride=STRIDE, tokens=True)


@pytest.fixture(scope="module")
def said(encoded: list[EncodedDocument], found: DocumentScores) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(json.dumps(details(encoded, found, BYTES)))
    return made


def test_each_token(model: GPT, encoded: list[EncodedDocument], found: DocumentScores) -> None:
    """Bug: a token gets the score of a neighbour or of another row of its batch, or a context that
    the model did not see."""
    for document, tokens in zip(encoded, found.each, strict=True):
        ids = document.tokens
        for place in range(1, len(ids)):
            begin = max(0, math.ceil((place - BLOCK) / STRIDE)) * STRIDE
            with torch.no_grad():
                p = torch.softmax(model(ids[None, begin:place])[0, -1].double(), 0)
            k = place - 1
            assert tokens.context[k] == place - begin
            assert tokens.nats[k] == pytest.approx(-math.log(p[ids[place]]), abs=1e-5)
            assert tokens.top[k] == pytest.approx(float(p.max()), abs=1e-5)
            assert tokens.likeliest[k] == int(p.argmax())
            assert tokens.first[k] == (int(p.argmax()) == int(ids[place]))


def test_sums(model: GPT, encoded: list[EncodedDocument], found: DocumentScores) -> None:
    """Bug: the scores of the documents, of their tokens and of all together differ."""
    for number, tokens in enumerate(found.each):
        assert found.nats[number] == pytest.approx(tokens.nats.sum(dtype=np.float64), rel=1e-6)
        assert found.correct[number] == tokens.first.sum()
        assert found.tokens[number] == len(tokens.nats) == len(TEXTS[number][1].encode())
    total = total_scores(found, encoded, BLOCK, STRIDE)
    alone = perplexity(model, encoded, DEVICE, stride=STRIDE)
    assert total.loss == alone.loss
    assert (total.loss_ci95, total.accuracy_ci95) == (alone.loss_ci95, alone.accuracy_ci95)
    assert total.loss_ci95 is not None
    assert total.perplexity_ci95 is not None
    assert total.loss_ci95[0] <= total.loss <= total.loss_ci95[1]
    assert total.perplexity_ci95[1] == pytest.approx(math.exp(total.loss_ci95[1]))


def test_breakdown(said: dict[str, Any], found: DocumentScores) -> None:
    """Bug: a document or token is in no group or in two, or in a wrong one."""
    by_source = {row["name"]: row for row in said["breakdown"]["source"]}
    assert list(by_source) == ["en.txt", "zh.txt"]  # most bytes first
    assert by_source["zh.txt"]["documents"] == 2
    bits = found.nats[:2].sum() / math.log(2) / found.bytes[:2].sum()
    assert by_source["en.txt"]["bits_per_byte"] == pytest.approx(bits)
    key = "language" if "language" in said["breakdown"] else "script"
    assert sum(row["tokens"] for row in said["breakdown"][key]) == found.tokens.sum()
    assert {row["name"] for row in said["breakdown"][key]} & {"zh", "Han"}
    position = said["breakdown"]["position"]
    assert [(row["low"], row["high"]) for row in position] == [
        *((1, 1), (2, 3), (4, 7), (8, 15), (16, 16))
    ]
    for row in position:
        nats = [
            float(n)
            for tokens in found.each
            for n, context in zip(tokens.nats, tokens.context, strict=True)
            if row["low"] <= context <= row["high"]
        ]
        assert row["tokens"] == len(nats)
        assert row["loss"] == pytest.approx(np.mean(nats), rel=1e-6)


def test_surprising(said: dict[str, Any], found: DocumentScores) -> None:
    """Bug: the worst are not the worst, one token fills the list, a tiny document leads it, or text
    cut inside a character is shown as rubbish."""
    documents = said["surprising"]["documents"]
    assert len(documents) == 3  # the short one is none
    bits = [row["bits_per_byte"] for row in documents]
    assert bits == sorted(bits, reverse=True)
    assert {row["start"][:5] for row in documents} == {text[:5] for _, text in TEXTS[:3]}
    tokens = said["surprising"]["tokens"]
    assert len({row["token"] for row in tokens}) == len(tokens) == 20
    worst = max(float(scores.nats.max()) for scores in found.each)
    assert tokens[0]["bits"] == pytest.approx(worst / math.log(2), rel=1e-6)
    for row in tokens:
        number = [f"{s}, row {i}" for i, (s, _) in enumerate(TEXTS)].index(row["document"])
        before = TEXTS[number][1].encode()[: row["position"] - 1]
        shown = before.decode("utf-8", "backslashreplace")
        assert shown.endswith(row["context"])
        assert "\ufffd" not in row["context"] + row["token"]


def test_calibration_against_a_loop() -> None:
    """Bug: a probability on a border falls into two bins, or empty bins divide by zero."""
    rng = np.random.default_rng(0)
    sure = np.concatenate([rng.random(500), [1.0, 1 / 15, 1e-9]]).astype(np.float32)
    right = rng.random(len(sure)) < sure
    found = calibration(sure, right)
    total = 0.0
    for k in range(15):
        own = (sure > np.float64(k / 15)) & (sure <= np.float64((k + 1) / 15))
        if own.any():
            total += own.sum() / len(sure) * abs(sure[own].mean() - right[own].mean())
    assert found["expected_calibration_error"] == pytest.approx(total, rel=1e-5)
    assert sum(row["tokens"] for row in found["bins"]) == len(sure)
    certain = calibration(np.ones(4, np.float32), np.array([True, False, False, False]))
    assert certain["expected_calibration_error"] == 0.75
    assert [row["tokens"] for row in certain["bins"]] == [4]


def test_sections(said: dict[str, Any]) -> None:
    """Bug: the report shows nothing of it, or a report of older making cannot be shown."""
    shown = breakdown_section(said), surprising_section(said), calibration_section(said)
    titles = [table.title for section in shown if section for table in section.tables]
    assert titles[0] == "By source"
    assert {"By position", "Most surprising documents", "Calibration by bin"} <= set(titles)
    assert shown[2] is not None
    assert "<svg" in shown[2].plots[0].svg
    for broken in ({}, {"breakdown": None, "surprising": [], "calibration": {"bins": [1]}}):
        assert breakdown_section(broken) is None
        assert surprising_section(broken) is None
        assert calibration_section(broken) is None
