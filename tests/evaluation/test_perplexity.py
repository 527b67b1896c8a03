"""Perplexity against a loop that scores one token at a time."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gptcli import stop
from gptcli.config.model_schema import ModelConfig
from gptcli.data.scan import Document
from gptcli.data.tokenizer import Tokenizer, train_bpe
from gptcli.device import resolve_device
from gptcli.errors import DataError
from gptcli.evaluation import perplexity as module
from gptcli.evaluation import token_scores
from gptcli.evaluation.perplexity import EncodedDocument, Scores, encode_documents, perplexity
from gptcli.model.gpt import GPT, initialise

BLOCK = 16
SIZES: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": BLOCK}
DEVICE = resolve_device("cpu")
BYTES = Tokenizer.of_bytes()
TEXTS = [
    "shorter",
    "exactly sixteen!",
    "seventeen letters",
    "a document that is much longer than one block of the model, so that windows move over it",
    "x",
    "naïve café, 你好, 🙂: characters of several bytes, 漢字かな交じり文, in more than a block",
]


def documents(texts: Sequence[str] = TEXTS) -> list[Document]:
    return [Document(f"document {i}", text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def model() -> GPT:
    """Random weights that depend on the whole context, in training mode with dropout."""
    config = ModelConfig.model_validate({**SIZES, "dropout": 0.3, "zero_init_output": False})
    made = GPT(config, BYTES.vocab_size)
    initialise(made, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return made.train()


def one_by_one(model: GPT, ids: list[int], stride: int, first: int = 1) -> list[tuple[float, bool]]:
    """The oracle: nats of each token from `first` on, and whether it ranked first.

    The windows begin at multiples of the stride; a token is scored in the earliest that reaches it.
    """
    found = []
    for place in range(first, len(ids)):
        begin = max(0, math.ceil((place - model.config.block_size) / stride)) * stride
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:place]]))[0, -1].double()
        nats = -torch.log_softmax(logits, 0)[ids[place]]
        found.append((nats.item(), logits.argmax().item() == ids[place]))
    return found


@pytest.mark.parametrize("stride", [None, BLOCK, 1, BLOCK // 2, 5])
def test_against_the_loop(model: GPT, stride: int | None) -> None:
    """Bug: a token at a window's border is scored twice, never, or with the wrong context."""
    scores = perplexity(model, encode_documents(documents(), BYTES), DEVICE, stride=stride)
    assert model.training  # as it was
    model.eval()
    lists = [one_by_one(model, [256, *t.encode()], stride or BLOCK) for t in TEXTS]
    model.train()
    nats = [n for found in lists for n, _ in found]
    size = sum(len(text.encode()) for text in TEXTS)
    assert scores.tokens == len(nats) == size == scores.bytes
    assert scores.loss == pytest.approx(sum(nats) / len(nats), abs=1e-6)
    assert scores.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-6)
    assert scores.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / size, abs=1e-6)
    assert scores.accuracy == sum(right for found in lists for _, right in found) / len(nats)
    assert (scores.documents, scores.block_size) == (len(TEXTS), BLOCK)
    assert (scores.stride, scores.unscored_tokens) == (stride or BLOCK, 0)
    assert scores.bits_per_byte_ci95 is not None
    low, high = scores.bits_per_byte_ci95
    assert low < scores.bits_per_byte < high


def figures(scores: Scores) -> list[float]:
    return [scores.loss, scores.bits_per_byte, scores.accuracy, scores.tokens]


def test_batches(model: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the mean over batches of unequal size, or padding, changes the result."""
    encoded = encode_documents(documents(), BYTES)
    expected = figures(perplexity(model, encoded, DEVICE, stride=3))
    backwards = figures(perplexity(model, encoded[::-1], DEVICE, stride=3))
    assert backwards == pytest.approx(expected, abs=1e-6)
    for rows in (1, 7):
        monkeypatch.setattr(module, "MOST_LOGITS", rows * BLOCK * BYTES.vocab_size)
        found = figures(perplexity(model, encoded, DEVICE, stride=3))
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("at_once", [1, 100, 257 * 3, 257 * 1000])
def test_logits_of_a_part_at_a_time(
    model: GPT, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Bug: the logits of a whole long window fill the memory, or cutting them changes a number."""
    model.eval()
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 257, (3, BLOCK), generator=generator)
    targets = torch.randint(0, 257, (3, BLOCK), generator=generator)
    targets[0, 3:] = targets[2, :4] = -100
    with torch.no_grad():
        logits = model(tokens)
    wanted = F.cross_entropy(logits.mT, targets, reduction="none", ignore_index=-100)
    sizes: list[int] = []
    model.head.register_forward_hook(lambda *call: sizes.append(call[2].numel()))
    monkeypatch.setattr(token_scores, "MOST_LOGITS", at_once)
    found = token_scores.score_tokens(model, tokens, targets, DEVICE, "fp32")
    torch.testing.assert_close(found.nats, wanted, atol=1e-6, rtol=5e-7)  # losses of about 10
    scored = targets >= 0
    top, likeliest = torch.softmax(logits, -1).max(-1)
    assert torch.equal(found.likeliest, torch.where(scored, likeliest, -1))
    torch.testing.assert_close(found.top, torch.where(scored, top, 0.0), atol=1e-6, rtol=1e-6)
    assert max(sizes) <= max(at_once, 257)
    assert sum(sizes) == 257 * int((targets >= 0).sum())


def test_positions_that_depend_on_the_length() -> None:
    """Bug: with dynamic rope a document is scored otherwise next to a longer one, whose padding it
    shares."""
    scaling = {"kind": "dynamic", "factor": 2.0, "original_block_size": 4}
    made = GPT(ModelConfig.model_validate({**SIZES, "rope_scaling": scaling}), BYTES.vocab_size)
    initialise(made, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    texts = ["abcdefg", "abcdefgh", "hijklmn", "hijklmnopq"]
    apart = [perplexity(made, encode_documents(documents([t]), BYTES), DEVICE) for t in texts]
    together = perplexity(made, encode_documents(documents(texts), BYTES), DEVICE)
    nats = sum(scores.loss * scores.tokens for scores in apart)
    assert together.loss == pytest.approx(nats / together.tokens, abs=1e-6)


def test_bits_per_byte_of_other_tokens() -> None:
    """Bug: bits are divided by characters or tokens, so tokenizers cannot be compared."""
    text = "größer 漢字 🙂 " * 4
    tokenizer = train_bpe([text * 20], 300, "gpt4", 10**6)
    made = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=BLOCK), tokenizer.vocab_size)
    torch.nn.init.zeros_(made.head.weight)  # every token has probability 1 / vocabulary
    encoded = encode_documents(documents([text]), tokenizer)
    scores = perplexity(made, encoded, DEVICE)
    count = len(tokenizer.encode(text))
    assert count < len(text)
    assert (scores.tokens, scores.bytes) == (count, len(text.encode()))
    assert scores.loss == pytest.approx(math.log(tokenizer.vocab_size), abs=1e-6)
    expected = count * math.log2(tokenizer.vocab_size) / len(text.encode())
    assert scores.bits_per_byte == pytest.approx(expected, abs=1e-6)
    assert scores.bits_per_byte_ci95 is None  # one document


def test_max_tokens(model: GPT) -> None:
    """Bug: the limit counts document starts, cuts none or the bytes of the last one wrongly."""
    whole = encode_documents(documents(), BYTES)
    for limit in (1, 7, 8, 30, 45, 10_000):
        encoded = encode_documents(documents(), BYTES, limit)
        scored = [len(d.tokens) - d.first for d in encoded]
        assert sum(scored) == min(limit, sum(len(d.tokens) - 1 for d in whole))
        assert [d.bytes for d in encoded] == scored  # byte tokens
        for part, document in zip(encoded, whole, strict=False):
            assert part.tokens.tolist() == document.tokens[: len(part.tokens)].tolist()
    assert perplexity(model, encode_documents(documents(), BYTES, 30), DEVICE).tokens == 30


class NoStart(Tokenizer):
    """A tokenizer with neither bos nor eot, as some of the field have."""

    @property
    def start(self) -> int | None:
        return None


def test_no_document_start(model: GPT) -> None:
    """Bug: without bos and eot the first token is scored from nothing, or not counted as left."""
    tokenizer = NoStart("bytes", {bytes([b]): b for b in range(256)}, r"[\s\S]", 256)
    encoded = encode_documents(documents(), tokenizer)
    scores = perplexity(model, encoded, DEVICE, stride=BLOCK)
    model.eval()
    lists = [one_by_one(model, list(t.encode()), BLOCK) for t in TEXTS if len(t) > 1]
    model.train()
    nats = [n for found in lists for n, _ in found]
    assert scores.tokens == len(nats)
    assert scores.unscored_tokens == len(lists)
    assert scores.loss == pytest.approx(sum(nats) / len(nats), abs=1e-6)
    with pytest.raises(DataError, match="no token to evaluate on"):
        encode_documents(documents(["x", ""]), tokenizer)


@pytest.mark.parametrize("first", [3, 10, 17, 30])
def test_part_of_a_document(model: GPT, first: int) -> None:
    """Bug: a prompt in front of a response is scored, or is no context where it is long."""
    ids = [256, *TEXTS[3].encode()[:40]]
    document = EncodedDocument(torch.tensor(ids), 0, 41 - first, first=first)
    scores = perplexity(model, [document], DEVICE, stride=4)
    model.eval()
    nats = [n for n, _ in one_by_one(model, ids, 4, first)]
    model.train()
    assert scores.tokens == len(nats) == 41 - first
    assert scores.loss == pytest.approx(sum(nats) / len(nats), abs=1e-6)


def test_special_text(model: GPT) -> None:
    """Bug: `<|endoftext|>` in the text is scored as the real token, or refused."""
    encoded = encode_documents(documents(["a <|endoftext|> b"]), BYTES)
    assert encoded[0].tokens.tolist() == [256, *b"a <|endoftext|> b"]


def test_stop(model: GPT) -> None:
    """Bug: Ctrl-C waits for the end of a long evaluation."""
    encoded = encode_documents(documents(), BYTES)
    stop.request(2)
    with pytest.raises(stop.Stopped):
        perplexity(model, encoded, DEVICE)
    with pytest.raises(stop.Stopped):
        encode_documents(documents(), BYTES)
    assert model.training
