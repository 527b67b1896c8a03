import numpy as np

from gptcli.data.shown_rows import show_rows
from gptcli.data.tokenizer import Tokenizer
from gptcli.model.loss import IGNORED


def test_masked_targets():
    """Loss belongs to the token that is predicted, not to the one that predicts it."""
    tokenizer = Tokenizer.of_bytes()
    inputs = np.array([[256, 65, 66, 67, 0, 0]])
    targets = np.array([[IGNORED, IGNORED, 67, 256, IGNORED, IGNORED]])
    (row,) = show_rows(tokenizer, inputs, targets, None)
    assert [(t.text, t.loss) for t in row.tokens] == [
        ("", False),
        ("A", False),
        ("B", False),
        ("C", True),
        ("", True),
    ]
    assert (row.padding, row.targets) == (2, 2)
    assert [t.kind for t in row.tokens] == ["eot", "text", "text", "text", "eot"]


def test_text_cannot_steer_the_terminal():
    """D19: control characters are shown as escapes, and parts of characters as bytes."""
    tokenizer = Tokenizer.of_bytes()
    ids = np.array([[256, *"\x1b\n\\明".encode()]])
    (row,) = show_rows(tokenizer, ids[:, :-1], ids[:, 1:], None)
    assert [t.text for t in row.tokens] == ["", "\\x1b", "\\n", "\\\\", "\\xe6", "\\x98", "\\x8e"]
    assert [t.completes for t in row.tokens] == [""] * 6 + ["明"]
    ids = np.array([[256, *"\x9b\x85\u202e\u2066\ufeff".encode()]])
    (row,) = show_rows(tokenizer, ids[:, :-1], ids[:, 1:], None)
    completes = [t.completes for t in row.tokens if t.completes]
    assert completes == ["\\x9b", "\\x85", "\\u202e", "\\u2066", "\\ufeff"]
