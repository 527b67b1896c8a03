"""Canaries: what is planted, how often, and only in the training text."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from gptcli.config.data_schema import CanariesConfig
from gptcli.config.schema import Config
from gptcli.data.canaries import make_canaries, other_texts
from gptcli.data.corpus import Corpus, open_corpus
from gptcli.data.pipeline import corpus_tokenizer, training_rows
from gptcli.data.readers import read_shards
from gptcli.data.row_fields import RowFields
from gptcli.data.stream import RecordStream, ShardReader
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError

BYTES = Tokenizer.of_bytes()
CANARIES = {"count": 2, "repetitions": [0, 1, 5], "digits": 6, "seed": 4}


def config(source: Path, **data: Any) -> Config:
    return Config.model_validate(
        {
            "tokenizer": {"kind": "bytes"},
            "data": {"train": str(source), "val_fraction": 0.1, **data},
            "model": {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 16},
            "training": {"max_epochs": 3, "tokens_per_step": 64},
        }
    )


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "lines.jsonl"
    rows = [json.dumps({"text": f"document {i} of many"}) for i in range(200)]
    path.write_text("\n".join(rows))
    return path


def test_planted_as_often_as_said(lines: Path) -> None:
    """Bug: copies get lost or doubled, stand all in one place, or are in the validation part."""
    corpus = open_corpus(config(lines, canaries=CANARIES).data)
    expected = {canary.text: canary.repetitions for canary in corpus.canaries}
    assert sorted(expected.values()) == [0, 0, 1, 1, 5, 5]
    stream = RecordStream(ShardReader(corpus.train), corpus.train_bytes, 1, 10_000)
    for _ in range(2):
        texts = [record["text"] for record in iter(stream.next, None)]
        found = Counter(text for text in texts if text in expected)
        assert found == Counter(expected)
        places = [i for i, text in enumerate(texts) if text in expected]
        assert max(places) - min(places) > len(texts) // 2
    assert not any(document.text in expected for document in corpus.val_documents)
    bare = open_corpus(config(lines).data)
    assert [d.text for d in corpus.val_documents] == [d.text for d in bare.val_documents]
    size = sum(len(text.encode()) * count for text, count in expected.items())
    assert corpus.train_bytes == bare.train_bytes + size


@pytest.mark.parametrize("cache", ["on", "off"])
def test_exact_resume(lines: Path, cache: str) -> None:
    """Bug: with canaries a resumed run, or one that reads the token cache, sees other rows."""

    def rows(position: dict[str, Any] | None = None) -> Any:
        chosen = config(lines, canaries=CANARIES, cache=cache)
        return training_rows(chosen, open_corpus(chosen.data), BYTES, position)

    whole = config(lines, canaries=CANARIES, cache="off")
    reference = training_rows(whole, open_corpus(whole.data), BYTES).take(900)
    first = rows()
    begun = first.take(311)
    rest = rows(json.loads(json.dumps(first.state()))).take(589)
    assert np.array_equal(np.concatenate([begun.inputs, rest.inputs]), reference.inputs)


def test_identity(lines: Path) -> None:
    """Bug: a run resumes, or reads a token cache, with other canaries than it began with."""

    def opened(**canaries: Any) -> Corpus:
        return open_corpus(config(lines, canaries=CANARIES | canaries).data)

    corpora = [opened(), opened(seed=5), opened(repetitions=[0, 1, 6]), opened(format="{secret}!")]
    assert len({corpus.key for corpus in corpora}) == 4
    assert len({corpus.fingerprint["canaries"]["sha256"] for corpus in corpora}) == 4
    again = opened()
    assert (again.key, again.fingerprint) == (corpora[0].key, corpora[0].fingerprint)
    bare = open_corpus(config(lines).data)
    assert "canaries" not in bare.fingerprint
    assert bare.key != again.key


def test_tokenizer_learns_none(lines: Path) -> None:
    """Bug: the tokenizer has tokens of its own for planted numbers, which tell them apart."""
    bpe = {"kind": "bpe", "vocab_size": 300}
    bare = config(lines).model_copy(
        update={"tokenizer": Config.model_validate({"tokenizer": bpe}).tokenizer}
    )
    planted = bare.model_copy(update={"data": config(lines, canaries=CANARIES).data})
    identities = {corpus_tokenizer(c, open_corpus(c.data)).identity for c in (bare, planted)}
    assert len(identities) == 1


def test_several_sources(lines: Path, tmp_path: Path) -> None:
    """Bug: with weighted sources, each a stream of its own, canaries are in none or in all."""
    other = tmp_path / "b.txt"
    other.write_text("another source\n" * 30)
    sources = [{"path": str(path), "weight": 1.0} for path in (lines, other)]
    corpus = open_corpus(config(lines, train=sources, canaries=CANARIES).data)
    held = {record["source"] for record in read_shards(corpus.train) if "random" in record["text"]}
    assert held == {0}


def test_other_texts() -> None:
    """Bug: candidates hold planted secrets, come twice, or are fewer than there are."""
    settings = CanariesConfig(count=2, repetitions=[0, 3], digits=2)
    planted = [canary.text for canary in make_canaries(settings)]
    every = other_texts(settings, 4096)
    assert sorted(planted + every) == sorted(f"The random number is {i:02d}." for i in range(100))
    some = other_texts(settings, 50)
    assert len(set(some)) == 50
    assert set(some) < set(every)
    large = other_texts(CanariesConfig(), 4096)
    assert len(set(large)) == 4096
    assert len(set(large[0])) > 5


def test_what_cannot_be_planted(lines: Path) -> None:
    """Bug: canaries that cannot be told apart, or that nobody plants, are accepted."""
    for wrong, message in (
        ({"format": "no number"}, "format must hold {secret} once"),
        ({"repetitions": []}, "one or more different numbers"),
        ({"repetitions": [4, 4]}, "one or more different numbers"),
        ({"digits": 2, "count": 30}, "too few for so many"),
    ):
        with pytest.raises(ValidationError, match=message):
            CanariesConfig.model_validate(wrong)
    with pytest.raises(ValidationError, match="shuffle_window above 0"):
        config(lines, canaries=CANARIES, shuffle_window=0)
    with pytest.raises(ConfigError, match="not among rows of a task"):
        open_corpus(config(lines, canaries=CANARIES).data, RowFields.texts("text"))
