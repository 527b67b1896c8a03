import re
from html.parser import HTMLParser

import numpy as np

from gptcli.data.shown_rows import show_rows
from gptcli.data.tokenizer import Tokenizer
from gptcli.model.loss import IGNORED
from gptcli.reports.data_page import check_html, rows_html

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202e"


class Tokens(HTMLParser):
    """The token boxes of a page: (classes, title, text), and the tags that would load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tokens: list[tuple[set[str], str, str]] = []
        self.loads: list[str] = []
        self._open = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        self._open = tag == "span" and "title" in values
        if self._open:
            self.tokens.append((set(values["class"].split()), values["title"], ""))
        if tag in ("script", "link", "img", "iframe") or {"src", "href"} & set(values):
            self.loads.append(tag)

    def handle_data(self, data):
        if self._open:
            classes, title, text = self.tokens.pop()
            self.tokens.append((classes, title, text + data))
            self._open = False


def report(**changes: object) -> dict:
    tally = {"count": 0, "documents": 0, "places": []}
    values = {
        "name": "small",
        "tokenizer": {"kind": "bpe", "vocab_size": 512},
        "train": {
            "documents": 10,
            "bytes": 1000,
            "characters": 900,
            "tokens": 400,
            "bytes_per_token": 2.5,
        },
        "lengths": {
            **{"min": 1, "median": 30, "p95": 60, "max": 90},
            **{"block_size": 64, "shorter_than_block": 9},
        },
        "scripts": {"Latin": {"letters": 800, "bytes": 800, "tokens": 300, "bytes_per_token": 2.7}},
        "languages": {"en": 10},
        "sources": [{"path": "a.txt", "weight": None, "share": 1.0, "filters": {}}],
        "validation": {
            **{"documents": 1, "split": "hash", "n": 13, "exact": 0, "near": 0},
            **{"ngrams": 100, "ngrams_found": 2},
        },
        "duplicates": {"exact": tally, "near": tally},
        "empty": tally,
        "control_characters": {**tally, "codes": {}},
        "replacement_characters": tally,
        "repetitive": tally,
        "personal": {"email": {"count": 2, "documents": 1, "places": ["a.txt"]}},
        "problems": {"invalid_utf8": {}, "skipped_rows": {}, "null_rows": {}, "blank_rows": {}},
        "findings": [{"level": "warning", "check": "personal data", "text": "email 2"}],
    }
    return values | changes


def shown(text: str, masked: int = 0):
    tokenizer = Tokenizer.of_bytes()
    ids = np.array([[256, *text.encode()]])
    targets = ids[:, 1:].copy()
    targets[:, :masked] = IGNORED
    return show_rows(tokenizer, ids[:, :-1], targets, None)


def test_rows_tell_id_position_target_and_loss():
    """A page whose hover is off by one would teach the wrong thing about the loss."""
    page = Tokens(rows_html(shown("ABC", masked=1), 0, 3, {"packing": "concat"}))
    assert [text for _, _, text in page.tokens] == ["eot", "A", "B", "C"]
    titles = [title for _, title, _ in page.tokens]
    assert titles[1] == "id 65\nposition 1\npredicts id 66\nloss on it: no"
    assert titles[2] == "id 66\nposition 2\npredicts id 67\nloss on it: yes"
    assert titles[3] == "id 67\nonly a target\nno target\nloss on it: yes"
    assert ["loss" in classes for classes, _, _ in page.tokens] == [False, False, True, True]


def test_pages_stand_alone():
    """A report that fetches anything tells others what is read here, and breaks offline."""
    for html in (rows_html(shown("AB"), 0, 2, {}), check_html(report())):
        assert Tokens(html).loads == []
        assert "default-src 'none'" in html
        assert not re.search(r"(?i)https?://|@import|url\(", html)


def test_text_is_never_markup():
    """Corpora hold HTML and escape sequences: neither may act in the page."""
    rows = rows_html(shown(HOSTILE), 0, 40, {"data": HOSTILE})
    sources = [{"path": HOSTILE, "weight": None, "share": 1.0, "filters": {}}]
    findings = [{"level": "note", "check": "x", "text": HOSTILE}]
    check = check_html(report(name=HOSTILE, sources=sources, findings=findings))
    for html in (rows, check):
        assert "<script" not in html
        assert "\x1b" not in html
        assert "\u202e" not in html


def test_the_check_shows_findings_and_figures():
    html = check_html(report())
    assert '<li class="warning"><span class="level">warning</span>' in html
    assert "email 2" in html
    assert "Latin" in html


def test_padding_is_counted():
    tokenizer = Tokenizer.of_bytes()
    inputs = np.array([[256, 65, 0, 0]])
    targets = np.array([[65, 256, IGNORED, IGNORED]])
    html = rows_html(show_rows(tokenizer, inputs, targets, None), 0, 4, {})
    assert "padding × 2" in html
    assert len(Tokens(html).tokens) == 3
