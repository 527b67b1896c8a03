import random

import pytest

from gptcli.data.survey import Lengths, Probes, ScriptCounts, Survey, Tally
from gptcli.data.tokenizer import Tokenizer, train_bpe
from gptcli.data.unicode_scripts import main_script


def test_length_quantiles():
    """A histogram whose bins are too wide would move the median."""
    rng = random.Random(1)
    values = sorted(rng.randrange(1, 200_000) for _ in range(2001))
    lengths = Lengths()
    for value in values:
        lengths.add(value)
    summary = lengths.summary()
    assert summary["max"] == values[-1]
    assert summary["median"] == pytest.approx(values[1000], rel=0.01)
    assert summary["p95"] == pytest.approx(values[1900], rel=0.01)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_script_counts_add_up(kind):
    """Tokens are shared out over their bytes: a share lost would falsify bytes per token."""
    text = "The moon 明月幾時有酒 и луна.\n" * 30
    tokenizer = Tokenizer.of_bytes() if kind == "bytes" else train_bpe([text], 300, "gpt4", 10**6)
    tokens = tokenizer.encode_numpy(text)
    counts = ScriptCounts(tokenizer, main_script)
    counts.add(text, tokens)
    summary = counts.summary()
    assert [*summary] == ["Latin", "Han", "Cyrillic", "non-letters"]
    assert {name: about["letters"] for name, about in summary.items()} == {
        "Latin": 7 * 30,
        "Han": 6 * 30,
        "Cyrillic": 5 * 30,
        "non-letters": 6 * 30,
    }
    assert sum(about["bytes"] for about in summary.values()) == len(text.encode())
    assert sum(about["tokens"] for about in summary.values()) == pytest.approx(len(tokens), abs=1)


def test_survey_joins_the_pieces_of_a_document():
    """Each piece counted as a document would make every long book many short ones."""
    seen: list[str] = []

    def duplicate(text: str) -> None:
        seen.append(text)

    survey = Survey(
        Tokenizer.of_bytes(),
        8,
        Probes(main_script, duplicate, lambda text: {}, None, lambda text: None),
    )
    for document, part, text in [("a", 0, "one\n"), ("a", 1, "two\n"), ("b", 0, "three")]:
        survey.add({"document": document, "part": part, "bytes": len(text), "text": text})
    survey.end()
    assert seen == ["one\ntwo\n", "three"]
    assert (survey.documents, survey.bytes, survey.tokens, survey.shorter) == (2, 13, 15, 1)


def test_a_tally_names_documents_not_pieces():
    tally = Tally()
    for name in ["a", "a", "b"]:
        tally.add(name, 2)
    tally.add("c", 0)
    assert tally.summary() == {"count": 6, "documents": 2, "places": ["a", "b"]}
