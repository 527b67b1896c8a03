"""Continuations, clozes and last words: the tokens of the whole text, parted at the right place."""

from typing import Any

import pytest

from gptcli.config.finetune_schema import FinetuneConfig
from gptcli.data.continuations import continuation_ids, fitted
from gptcli.data.examples import Example
from gptcli.data.task_formats import TaskEncoder
from gptcli.data.tokenizer import Tokenizer, train_bpe
from gptcli.errors import DataError

TEXTS = ["the cat sat on the mat and the dog sat on the cat", "a cat and a dog:\na mat"] * 20
BPE = train_bpe(TEXTS, 300, "gpt4", 1 << 20)


def encode(row: dict[str, Any], block_size: int = 64, **settings: Any) -> Example | None:
    encoder = TaskEncoder(FinetuneConfig.model_validate(settings), BPE, block_size)
    made = encoder.encode(row, "f:1")
    assert made is None or isinstance(made, Example)
    return made


def text_of(example: Example, choice: int) -> str:
    return BPE.decode([*example.tokens[: example.prompt], *example.choice_tokens[choice]])


@pytest.mark.parametrize(
    ("context", "texts"),
    [
        ("the cat", [" sat", " and the dog"]),
        ("the cat ", ["sat", "and the dog"]),  # the blank is one token with the word
        ("the c", ["at", "ats"]),  # a border within a token
        ("a cat:", ["\na mat", " x"]),  # a token of one text only reaches into the context
        ("", ["the", "the cat"]),
        ("the cat", [" sat", " sat on"]),  # one begins the other
    ],
)
def test_borders(context: str, texts: list[str]) -> None:
    """Bug: text and context are tokenised apart, as no running text is, or a text loses tokens to
    the context."""
    begin, behind = continuation_ids(BPE, context, texts)
    for text, ids in zip(texts, behind, strict=True):
        assert begin + ids == BPE.encode(context + text)
        assert ids
    whole = [BPE.encode(context), *(BPE.encode(context + text) for text in texts)]
    assert all(ids[: len(begin)] == begin for ids in whole)
    longer = {tuple(ids[: len(begin) + 1]) for ids in whole}
    assert len(longer) > 1 or min(map(len, behind)) == 1  # as much of the context as is shared


def test_fitted() -> None:
    """Bug: a prompt that is cut loses the document start, or is longer than its room."""
    body = BPE.encode("the cat sat on the mat")
    assert fitted(BPE, body, 99) == [BPE.eot, *body]
    assert fitted(BPE, body, 3) == [BPE.eot, *body[-2:]]
    assert fitted(BPE, body, 1) == [BPE.eot]
    bare = Tokenizer.of_ids(9)
    assert fitted(bare, [1, 2, 3], 2) == [2, 3]


def test_continuation() -> None:
    """Bug: choices are compared behind another text than the prompt, with eot, or by the blank."""
    row = {"prompt": "the cat", "choices": ["sat", "sat on the mat"], "label": "1"}
    made = encode(row, task="continuation")
    assert made is not None
    assert [text_of(made, i) for i in range(2)] == ["the cat sat", "the cat sat on the mat"]
    assert made.tokens == [BPE.eot, *BPE.encode("the cat sat on the mat"), BPE.eot]
    assert made.trained.index(True) == made.prompt
    assert (made.prompt_text, made.references) == ("the cat", [" sat on the mat"])
    zh = {"prompt": "天气", "choices": ["很好", "不好"], "label": 0}
    made = encode(zh, task="continuation", template="{{ prompt }}")
    assert made is not None
    assert text_of(made, 1) == "天气不好"


@pytest.mark.parametrize("text", ["the ___ sat on it", "_ sat", "it is the _"])
def test_cloze(text: str) -> None:
    """Bug: what follows the blank, which tells the choices apart, is not read."""
    made = encode({"text": text, "choices": ["cat", "dog"], "label": "dog"}, task="cloze")
    assert made is not None
    filled = [text.replace("___", "_").replace("_", word) for word in ("cat", "dog")]
    assert [text_of(made, i) for i in range(2)] == filled
    assert BPE.decode(made.tokens[1:-1]) == filled[1]


@pytest.mark.parametrize("text", ["no blank", "_ and _"])
def test_wrong_blanks(text: str) -> None:
    """Bug: a row without its blank is scored as if it had one."""
    with pytest.raises(DataError, match=r"f:1: the text has \d blanks"):
        encode({"text": text, "choices": ["cat", "dog"], "label": 0}, task="cloze")


def test_last_word() -> None:
    """Bug: the blank before the word is left in the context, where no running text has it."""
    made = encode({"text": "the cat sat on the  mat\n"}, task="last_word")
    assert made is not None
    assert BPE.decode(made.tokens[: made.prompt]) == "the cat sat on the"
    assert BPE.decode(made.tokens[made.prompt : -1]) == "  mat"
    assert made.references == ["  mat"]
    assert encode({"text": "word "}, task="last_word") is None


def test_too_long() -> None:
    """Bug: a choice does not fit behind the prompt, or a blank one is compared."""
    row = {"prompt": "the cat sat on " * 9, "choices": ["the mat", "a"], "label": 0}
    made = encode(row, 8, task="continuation")
    assert made is not None
    assert made.tokens[0] == BPE.eot
    assert made.prompt + max(map(len, made.choice_tokens)) <= 8
    assert encode(row, 8, task="continuation", too_long="skip") is None
    assert encode({**row, "choices": ["the mat", " "]}, task="continuation") is None
