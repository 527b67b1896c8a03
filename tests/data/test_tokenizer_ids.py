"""Tokenizers with several ends of text, with none, and the stand-in for a missing tokenizer."""

import json
from pathlib import Path

import pytest

from gptcli.data.special_tokens import SpecialTokens
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import DataError


def test_what_was_saved_before_there_were_several_ends(tmp_path: Path):
    """Guards against checkpoints whose tokenizer is no longer the one that they were made with."""
    Tokenizer.of_bytes().save(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert sorted(meta) == ["identity", "kind", "pattern", "special_tokens"]
    before = "c530d70a9918e7115c456e63c2e85a466f116c8bcfb01f7bf5d72316cea00624"
    assert meta["identity"] == before


@pytest.mark.parametrize("eot", [None, 256])
def test_ends_are_saved_and_part_of_the_identity(tmp_path: Path, eot: int | None):
    """Guards against a loaded model that runs on behind an end, and against an invented eot."""
    ranks = {bytes([b]): b for b in range(256)}
    name = None if eot is None else "<|endoftext|>"
    ids = {"<|endoftext|>": 256, "<|im_end|>": 257}
    made = Tokenizer("chat", ranks, r"[\s\S]", eot, SpecialTokens(ids, name, more_ends=(257, 10)))
    plain = Tokenizer("chat", ranks, r"[\s\S]", eot, SpecialTokens(ids, name))
    assert made.identity != plain.identity
    assert made.ends == {257, 10} | plain.ends
    assert plain.ends == (set() if eot is None else {256})
    for number, tokenizer in enumerate((made, plain)):
        tokenizer.save(tmp_path / str(number))
        loaded = Tokenizer.load(tmp_path / str(number))
        assert (loaded.identity, loaded.ends) == (tokenizer.identity, tokenizer.ends)
        assert (loaded.eot, loaded.start) == (eot, eot)
        assert loaded.encode("a\n<|im_end|>") == [*b"a\n<|im_end|>"]


def test_ids_instead_of_a_tokenizer(tmp_path: Path):
    """Guards against a made-up tokenizer for a model that has none, or one that cannot be saved."""
    made = Tokenizer.of_ids(12)
    made.save(tmp_path)
    for tokenizer in (made, Tokenizer.load(tmp_path)):
        assert tokenizer.encode(" 0 11\n2\t007 ") == [0, 11, 2, 7]
        assert tokenizer.encode("") == []
        assert tokenizer.token_bytes(5) == b"5 "
        assert [tokenizer.token_bytes(i) for i in (-1, 12)] == [b"", b""]
        assert tokenizer.decode([0, 11, 2]) == "0 11 2 "
        assert (tokenizer.eot, tokenizer.bos, tokenizer.start) == (None, None, None)
        assert (tokenizer.kind, tokenizer.vocab_size) == ("ids", 12)
        assert tokenizer.ends == frozenset()
        assert tokenizer.identity == made.identity
    assert made.identity != Tokenizer.of_ids(13).identity
    assert (made.ends, made.original_json, made.nfc) == (frozenset(), None, False)


@pytest.mark.parametrize("text", ["hi", "1 -1", "12", "1,2", "²", "٣", "1_0", "+1", "9" * 5000])
def test_text_that_is_no_ids(text: str):
    """Guards against text read as other ids, or a traceback where the model has no tokenizer."""
    with pytest.raises(DataError, match=r"the model has no tokenizer.* from 0 to 11") as caught:
        Tokenizer.of_ids(12).encode(text)
    assert "--prompt-tokens" in str(caught.value.hint)
    assert len(caught.value.message) < 200
