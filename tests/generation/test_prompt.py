"""What the model is given to continue."""

import logging

import pytest

from gptcli.config.schema import FinetuneConfig
from gptcli.data.examples import Example
from gptcli.data.special_tokens import EOT_TEXT, SpecialTokens
from gptcli.data.task_formats import TaskEncoder
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError
from gptcli.generation.prompt import encode_prompt, fit_prompt, replace_surrogates

TOKENIZER = Tokenizer.of_bytes()


def test_a_prompt_begins_a_document() -> None:
    """Guards: a prompt without the document start that every training document has."""
    assert encode_prompt(TOKENIZER, "hi") == [256, 104, 105]
    assert encode_prompt(TOKENIZER, "") == [256]


def test_bos_goes_before_eot() -> None:
    """Guards: eot as document start where the tokenizer has a token of its own for it."""
    tokenizer = Tokenizer.of_bytes()
    tokenizer.bos = 65
    assert encode_prompt(tokenizer, "hi") == [65, 104, 105]


def bare_tokenizer() -> Tokenizer:
    """As a published one that puts no token before a text."""
    ranks = {bytes([b]): b for b in range(256)}
    special = SpecialTokens({EOT_TEXT: 256}, bare=True)
    return Tokenizer("file", ranks, r"[\s\S]", 256, special)


def test_bare_prompts_begin_with_their_text() -> None:
    """Guards: a start token before texts of a model that learnt none; an empty prompt of none."""
    tokenizer = bare_tokenizer()
    assert encode_prompt(tokenizer, "hi") == [104, 105]
    assert encode_prompt(tokenizer, "") == [256]
    assert encode_prompt(tokenizer, EOT_TEXT, allow_special=True) == [256]


@pytest.mark.parametrize("text", ["", "a", "abcdefgh"])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, bare_tokenizer()], ids=["start", "bare"])
def test_finetuning_rows_begin_as_prompts_do(tokenizer: Tokenizer, text: str) -> None:
    """Guards: a model finetuned on rows that begin otherwise than what it is then given."""
    encoder = TaskEncoder(FinetuneConfig(template="{{ prompt }}"), tokenizer, 32)
    example = encoder.encode({"prompt": text, "response": "xyz"}, "here")
    assert isinstance(example, Example)
    assert example.tokens[: example.prompt] == encode_prompt(tokenizer, text)


def test_bare_finetuning_rows_are_cut_to_the_block() -> None:
    """Guards: a cut prompt of no tokens, from which no first token of the answer is learnt."""
    row = {"prompt": "abcdefgh", "response": "xyz"}
    for block_size, wanted in ((3, None), (4, b"h"), (6, b"fgh"), (11, b"abcdefgh")):
        encoder = TaskEncoder(FinetuneConfig(template="{{ prompt }}"), bare_tokenizer(), block_size)
        example = encoder.encode(row, "here")
        if wanted is None:
            assert example is None
        else:
            assert isinstance(example, Example)
            assert bytes(example.tokens[: example.prompt]) == wanted
        assert encoder.counts.shortened == (block_size in (4, 6))


def test_an_empty_prompt_needs_a_start_token() -> None:
    """Guards: an index error inside the model for a prompt of no tokens."""
    tokenizer = Tokenizer("bytes", {bytes([b]): b for b in range(256)}, r"[\s\S]", None)
    assert encode_prompt(tokenizer, "hi") == [104, 105]
    with pytest.raises(ConfigError, match="the prompt is empty"):
        encode_prompt(tokenizer, "")


def test_special_text_is_ordinary_unless_allowed() -> None:
    """Guards: a prompt that smuggles in an end of text; --allow-special that is ignored."""
    text = "a<|endoftext|>b<|endoftext|>"
    assert encode_prompt(TOKENIZER, text) == [256, *text.encode()]
    assert encode_prompt(TOKENIZER, text, allow_special=True) == [256, 97, 256, 98, 256]


def test_an_explicit_start_is_not_doubled() -> None:
    """Guards: two document starts, which training never shows."""
    assert encode_prompt(TOKENIZER, "<|endoftext|>a", allow_special=True) == [256, 97]


def test_long_prompts(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: a prompt cut silently, at the wrong end, or although it fits."""
    ids = list(range(10))
    with caplog.at_level(logging.WARNING, logger="gptcli"):
        assert fit_prompt(ids, 10, "error") == ids
        assert not caplog.records
        assert fit_prompt(ids, 4, "left") == [6, 7, 8, 9]
    assert "10 tokens" in caplog.text
    assert "6 tokens are dropped" in caplog.text
    with pytest.raises(ConfigError, match="10 tokens, the model's block_size is 4"):
        fit_prompt(ids, 4, "error")


def test_lone_surrogates_become_replacement_characters(caplog: pytest.LogCaptureFixture) -> None:
    """Guards: UnicodeEncodeError for an argument that is not UTF-8 (`$'\\xff'`)."""
    broken = b"a\xff\xfe".decode("utf-8", "surrogateescape")
    with caplog.at_level(logging.WARNING, logger="gptcli"):
        assert replace_surrogates("é🙂") == "é🙂"
        assert not caplog.records
        assert replace_surrogates(broken) == "a\ufffd\ufffd"
    assert "not valid UTF-8" in caplog.text
