"""Explanations against sums, brute force and a slow loop."""

import math
import signal
from typing import Any

import numpy as np
import pytest
import torch

from gptcli import stop
from gptcli.config.model_schema import ModelConfig
from gptcli.data.scan import Document
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import resolve_device
from gptcli.evaluation import explain as module
from gptcli.evaluation.attention import attention_picture
from gptcli.evaluation.explain import ExplainedToken, explain_tokens, leave_one_out, pieces
from gptcli.evaluation.head_shares import head_shares
from gptcli.evaluation.perplexity import EncodedDocument, encode_documents, perplexity
from gptcli.model.gpt import GPT
from gptcli.reports.attention import attention_section, map_image

BLOCK = 16
DEVICE = resolve_device("cpu")
BYTES = Tokenizer.of_bytes()
TEXT = "Naïve café, 你好, 🙂: a text of two and a half blocks."


def random_model(**settings: Any) -> GPT:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": BLOCK}
    made = GPT(ModelConfig.model_validate({**sizes, **settings}), BYTES.vocab_size)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        mean = 0.5 if parameter.ndim == 1 else 0.0
        parameter.data.normal_(mean, 0.4, generator=generator)
    return made.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model() -> GPT:
    return random_model()


def encoded(text: str = TEXT) -> EncodedDocument:
    return encode_documents([Document("text", text)], BYTES)[0]


def explained(model: GPT, text: str = TEXT, top: int = 3) -> list[ExplainedToken]:
    return explain_tokens(model, BYTES, encoded(text), DEVICE, top=top)


@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_bits_add_up_to_the_loss(model: GPT, monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Guards: a token scored twice, not at all, or with another context than in gpt eval."""
    monkeypatch.setattr(module, "MOST_LOGITS", 5 * BYTES.vocab_size)  # several parts a window
    tokens = explained(model, "x" * (length - 1) + "y")
    scores = perplexity(model, [encoded("x" * (length - 1) + "y")], DEVICE)
    nats = sum(token.bits or 0.0 for token in tokens) * math.log(2)
    assert nats / scores.tokens == pytest.approx(scores.loss, abs=1e-6)
    assert [token.position for token in tokens] == list(range(length + 1))
    assert [token.context for token in tokens] == [0] + [i % BLOCK + 1 for i in range(length)]


def test_alternatives_and_ranks_are_those_of_a_plain_softmax(model: GPT) -> None:
    """Guards: the alternatives of another place, ranks from 0, probabilities that are logits."""
    ids = encoded().tokens
    for token in explained(model)[1:]:
        start = token.position - token.context
        logits = model(ids[None, start : token.position])[0, -1]
        likely = logits.softmax(-1).sort(descending=True)
        assert [a.id for a in token.alternatives] == likely.indices[:3].tolist()
        found = [a.probability for a in token.alternatives]
        assert found == pytest.approx(likely.values[:3].tolist(), rel=1e-4)
        assert token.rank == likely.indices.tolist().index(token.id) + 1
        assert token.probability == pytest.approx(float(logits.softmax(-1)[token.id]), rel=1e-4)
        assert token.bits == pytest.approx(-math.log2(token.probability or 0.0))


def test_more_alternatives_than_tokens(model: GPT) -> None:
    """Bug: --top above the vocabulary ended in an error of topk."""
    found = explained(model, "ab", top=100_000)[1].alternatives
    assert sum(a.probability for a in found) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("settings", [{}, {"window": 4}, {"position": "learned"}])
@pytest.mark.parametrize("most", [1, 40, 1 << 15])
def test_leave_one_out_is_the_slow_loop(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], most: int
) -> None:
    """Guards: the wrong token left out, one row too many or too few, rows that see padding."""
    monkeypatch.setattr(module, "_MOST_TOKENS", most)
    model, ids = random_model(**settings), encoded().tokens[:12]

    def bits(context: list[int]) -> float:
        logs = model(torch.tensor([context]))[0, -1].log_softmax(-1)
        return -float(logs[int(ids[-1])]) / math.log(2)

    context = ids[:-1].tolist()
    slow = [bits(context[:i] + context[i + 1 :]) - bits(context) for i in range(len(context))]
    np.testing.assert_allclose(leave_one_out(model, ids, DEVICE), slow, atol=1e-4)


def test_nothing_to_leave_out(model: GPT) -> None:
    """Guards: a model asked to continue nothing at all."""
    assert len(leave_one_out(model, torch.tensor([256, 65]), DEVICE)) == 0


def test_a_stop_is_heeded(model: GPT) -> None:
    """Guards: Ctrl-C that waits for a long text."""
    stop.request(signal.SIGINT)
    with pytest.raises(stop.Stopped):
        leave_one_out(model, encoded().tokens[:5], DEVICE)
    with pytest.raises(stop.Stopped):
        explained(model)


def test_parts_of_characters(model: GPT) -> None:
    """Guards: a Chinese character of three tokens shown as three boxes, or as nothing; its bits
    lost; alternatives that are bare bytes where they would complete a character."""
    tokens = explained(model, "a你\n", top=256)
    assert [t.text for t in tokens] == ["⟨eot⟩", "a", "\\xe4", "\\xbd", "\\xa0=你", "\\n"]
    found = pieces(BYTES, tokens)
    assert [(p.text, p.first, p.stop) for p in found] == [
        ("⟨eot⟩", 0, 1),
        ("a", 1, 2),
        ("你", 2, 5),
        ("\n", 5, 6),
    ]
    assert found[2].bits == pytest.approx(sum(t.bits or 0.0 for t in tokens[2:5]))
    shown = {a.id: a.text for a in tokens[4].alternatives}
    assert shown[0xA0] == "\\xa0=你"
    assert shown[0xA1] == "\\xa1=佡"
    assert shown[ord("z")] == "z"


def test_bytes_that_are_no_text(model: GPT) -> None:
    """Bug: a byte that begins no character swallowed the characters behind it."""
    document = encode_documents([Document("data", b"a\xff\xe4b\xe4")], BYTES)[0]
    tokens = explain_tokens(model, BYTES, document, DEVICE, top=1)
    found = pieces(BYTES, tokens)
    assert "".join(p.text for p in found[1:]) == "a\\xff\\xe4b\\xe4"
    assert sum(p.bits for p in found) == pytest.approx(sum(t.bits or 0.0 for t in tokens))


def test_shares_by_hand() -> None:
    """Guards: rows and columns confused, the first row counted."""
    weights = np.array([[1, 0, 0], [0.25, 0.75, 0], [0.5, 0.3, 0.2]], np.float32)
    found = head_shares(weights)
    assert found.first == pytest.approx(0.375)
    assert found.itself == pytest.approx((0.75 + 0.2) / 2)
    assert found.previous == pytest.approx((0.25 + 0.3) / 2)
    assert found.distance_tokens == pytest.approx((0.25 + 2 * 0.5 + 0.3) / 2)


def test_picture_of_a_run(model: GPT) -> None:
    """Guards: a picture that makes run.json or the page large, that differs from the maps, or
    that reaches for something on the network."""
    large = random_model(n_layer=9, n_head=8, n_embd=32, block_size=64)
    found = attention_picture(large, BYTES, "你好, " + TEXT)
    assert (found["layers"], found["of_layers"]) == ([0, 2, 3, 5, 6, 8], 9)
    assert all(len(d) == 20 * 21 // 2 for row in found["maps"] for d in row)
    assert found["maps"][0][0][0] == "f"  # the first token sees itself only
    section = attention_section({"attention": found})
    assert section is not None
    svg = section.plots[0].svg
    assert svg.startswith("<svg")
    assert len(svg) < 60_000
    assert "http" not in svg
    assert "to the first token" in section.plots[0].description
    assert len(section.tables[0].rows) == 6


@pytest.mark.parametrize("report", [{}, {"attention": None}, {"attention": {}}])
def test_no_picture(model: GPT, report: dict[str, Any]) -> None:
    """Guards: the report of an older run, or of one whose text was a single token."""
    assert attention_section(report) is None
    assert attention_picture(model, BYTES, "") == {}


def test_images_are_small() -> None:
    """Guards: a page of megabytes, for the noise of weights that nobody sees."""
    weights = np.random.default_rng(0).dirichlet(np.ones(128), 128).astype(np.float32)
    assert map_image(weights).startswith("data:image/png;base64,iVBOR")
    assert len(map_image(np.tril(weights))) < 14_000
