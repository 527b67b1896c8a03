"""Paired sentences: likelihoods by hand, groups, and rows that are no pairs."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gptcli.config.model_schema import ModelConfig
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import resolve_device
from gptcli.errors import DataError
from gptcli.evaluation.pairs import Pair, pair_report, read_pairs
from gptcli.model.gpt import GPT, initialise

BYTES = Tokenizer.of_bytes()
CPU = resolve_device("cpu")


@pytest.fixture(scope="module")
def model() -> GPT:
    shape = ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=24, zero_init_output=False)
    made = GPT(shape, BYTES.vocab_size)
    initialise(made, torch.Generator().manual_seed(1))
    return made.eval()


def logprob(model: GPT, text: str) -> float:
    """Of a text that fits into the block."""
    ids = torch.tensor([BYTES.eot, *BYTES.encode(text)])
    with torch.no_grad():
        logits = model(ids[None, :-1])[0]
    return -float(F.cross_entropy(logits.double(), ids[1:], reduction="sum"))


def test_differences(model: GPT) -> None:
    """Bug: a difference has the wrong sign, is not per byte, or counts in another group."""
    pairs = [
        Pair("he is a nurse", "she is a nurse", "jobs", "p:1"),
        Pair("她是医生", "他是医生", "", "p:2"),
        Pair("the king ruled", "the queen ruled", "jobs", "p:3"),
    ]
    found = pair_report(model, BYTES, pairs, CPU, "fp32")
    nats = [logprob(model, p.a) - logprob(model, p.b) for p in pairs]
    bits = [
        logprob(model, p.a) / len(p.a.encode()) / math.log(2)
        - logprob(model, p.b) / len(p.b.encode()) / math.log(2)
        for p in pairs
    ]
    assert [p["nats"] for p in found["pairs"]] == pytest.approx(nats, abs=1e-4)
    assert [p["bits_per_byte"] for p in found["pairs"]] == pytest.approx(bits, abs=1e-5)
    assert found["all"]["nats"] == pytest.approx(sum(nats) / 3, abs=1e-4)
    assert found["all"]["prefers_a"] == sum(n > 0 for n in nats) / 3
    low, high = found["all"]["nats_ci95"]
    assert min(nats) - 1e-4 <= low <= found["all"]["nats"] <= high <= max(nats) + 1e-4
    assert list(found["groups"]) == ["jobs"]
    assert found["groups"]["jobs"]["nats"] == pytest.approx((nats[0] + nats[2]) / 2, abs=1e-4)
    swapped = [Pair(p.b, p.a, p.group, p.where) for p in pairs]
    other = pair_report(model, BYTES, swapped, CPU, "fp32")
    assert other["all"]["nats"] == pytest.approx(-found["all"]["nats"], abs=1e-5)


def test_long_sentences(model: GPT) -> None:
    """Bug: a sentence longer than the model's block loses its end, where the two may differ."""
    same = "a sentence much longer than a block of the model ends in "
    found = pair_report(model, BYTES, [Pair(same + "x", same + "y", "", "p:1")], CPU, "fp32")
    assert found["all"]["nats"] != 0
    assert found["all"]["nats_ci95"] is None  # of a single pair there is none


@pytest.mark.parametrize(
    ("a", "b", "places"),
    [
        ("He is a nurse.", "She is a nurse.", 1),
        ("He lost his keys.", "She lost her keys.", 2),
        ("a nurse", "a very good nurse", 1),
        ("他是医生", "她是医生", 1),
        ("他说他来", "她说她来", 2),
        ("two  spaces", "two spaces", 1),
    ],
)
def test_places(a: str, b: str, places: int) -> None:
    """Bug: pairs that differ in more than one term pass for ones that differ in one."""
    assert Pair(a, b, "", "p:1").places == places


def test_reading(tmp_path: Path, model: GPT) -> None:
    """Bug: a wrong row ends in a traceback, or its error does not say which row it is."""
    path = tmp_path / "pairs.jsonl"
    good = json.dumps({"a": "one\u2028line", "b": "two", "group": None})
    path.write_text(f"\ufeff{good}\r\n\n" + json.dumps({"a": "x y", "b": "x z", "group": "g"}))
    assert [(p.group, p.where) for p in read_pairs(path)] == [("", f"{path}:1"), ("g", f"{path}:3")]
    for line, message in (
        ('{"a": "x"', ":3: not valid JSON"),
        ("[" * 100_000, ":3: not valid JSON"),
        ("[1]", ":3: not a JSON object"),
        ('{"a": "x"}', ":3: 'b' must be a sentence"),
        ('{"a": "x", "b": " "}', ":3: 'b' must be a sentence"),
        ('{"a": "x", "b": 2}', ":3: 'b' must be a sentence"),
        ('{"a": "x", "b": "x"}', ":3: the two sentences are the same"),
        ('{"a": "x", "b": "y", "group": 3}', ":3: 'group' must be text"),
        ('{"a": "x", "b": "y", "grup": "g"}', ":3: unknown field 'grup'"),
    ):
        path.write_text(f"{good}\n\n{line}\n")
        with pytest.raises(DataError, match=message):
            read_pairs(path)
    path.write_text("\n\n")
    with pytest.raises(DataError, match="no pairs in it"):
        read_pairs(path)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(DataError, match="not UTF-8 at byte 0"):
        read_pairs(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(tmp_path / "none.jsonl")
