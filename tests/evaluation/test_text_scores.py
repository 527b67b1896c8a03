"""BLEU, chrF and ROUGE: the packages get the texts that they should, in the script they are in."""

import math

import pytest

pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")

from gptcli.evaluation.text_scores import bleu, chrf, rouge

ANSWERS = ["the cat sat on the mat today", "a dog ran over the hill", "it rains"]
REFERENCES = [["the cat sat on the mat"], ["the dog ran over a hill"], ["it rains a lot"]]


def ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def plain_bleu(answers: list[list[str]], references: list[list[str]]) -> float:
    """Papineni et al. 2002 with one reference each, where every order has a match."""
    logs = []
    for n in range(1, 5):
        pairs = [(ngrams(a, n), ngrams(r, n)) for a, r in zip(answers, references, strict=True)]
        right = sum(min(a.count(g), r.count(g)) for a, r in pairs for g in set(a))
        logs.append(math.log(right / sum(len(a) for a, _ in pairs)))
    lengths = sum(map(len, answers)), sum(map(len, references))
    brevity = min(0.0, 1 - lengths[1] / lengths[0])
    return 100 * math.exp(sum(logs) / 4 + brevity)


def test_bleu_of_english() -> None:
    """Bug: rows and references are paired the wrong way round, or scores of rows are averaged."""
    found = bleu(ANSWERS, REFERENCES)
    words = [text.split() for text in ANSWERS], [texts[0].split() for texts in REFERENCES]
    assert found.value == pytest.approx(plain_bleu(*words))
    assert found.ci95 is not None
    assert 0 <= found.ci95[0] < found.ci95[1] <= 100
    assert "tok:13a" in found.signature


def test_bleu_of_chinese_is_by_character() -> None:
    """Bug: a Chinese sentence is one word, and BLEU 0 whatever the answer."""
    answers, references = ["今天天气非常好我们去公园"], ["今天天气很好我们去公园玩"]
    found = bleu(answers, [references])
    assert found.value == pytest.approx(plain_bleu([list(answers[0])], [list(references[0])]))
    assert "tok:zh" in found.signature
    assert found.ci95 is None  # one row has no spread


def test_rows_may_have_different_numbers_of_references() -> None:
    """Bug: a row's second reference is compared with another row's answer."""
    several = [["something else", "the cat sat on the mat today"], REFERENCES[1], REFERENCES[2]]
    assert chrf(ANSWERS, several).of_rows[0] == pytest.approx(100)
    assert bleu(ANSWERS, several).value > bleu(ANSWERS, REFERENCES).value
    assert rouge(ANSWERS, several)["rouge_l"][0] == 1.0


def test_some_rows_score_nothing() -> None:
    """Bug: an interval fails, as sacrebleu's own, where some draws score 0 and others do not."""
    for score in (bleu, chrf):
        found = score(["a b c d e", "q"], [["a b c d e"], ["z"]])
        assert found.ci95 is not None
        assert found.ci95[0] == 0
        assert found.ci95[1] == pytest.approx(100)


def test_rouge() -> None:
    """Bug: figures differ from the package's own on English, or Chinese and accents are dropped."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    found = rouge(ANSWERS, REFERENCES)
    for number, (answer, texts) in enumerate(zip(ANSWERS, REFERENCES, strict=True)):
        own = scorer.score(texts[0], answer)
        for ours, theirs in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")):
            assert found[ours][number] == pytest.approx(own[theirs].fmeasure)
    chinese = rouge(["今天好。", "été"], [["今天很好"], ["ete"]])
    assert chinese["rouge_1"] == pytest.approx([2 * 3 / 7, 0.0])
    assert chinese["rouge_2"] == pytest.approx([2 * 1 / 5, 0.0])
