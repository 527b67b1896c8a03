"""Scripts and languages of texts."""

import unicodedata

import pytest

from gptcli.data.unicode_scripts import (
    check_languages,
    check_scripts,
    language_of,
    letters_by_script,
    main_script,
    script_share,
)
from gptcli.errors import ConfigError


def test_every_letter_is_counted_in_the_script_of_its_unicode_name():
    """Guards against a table that is off by one or leaves out letters beyond the BMP."""
    text = "Grüße, Ωμέγα, привет, 你好𠮷, ひらがな, カタカナ, 한국어, नमस्ते, สวัสดี, שלום, مرحبا, 123!"
    names = {"CJK": "Han", "HEBREW": "Hebrew", "LATIN": "Latin", "GREEK": "Greek", "THAI": "Thai"}
    names |= {"CYRILLIC": "Cyrillic", "HIRAGANA": "Hiragana", "KATAKANA": "Katakana"}
    names |= {"HANGUL": "Hangul", "DEVANAGARI": "Devanagari", "ARABIC": "Arabic"}
    expected: dict[str, int] = {}
    for c in text:
        if unicodedata.category(c).startswith("L"):
            script = names[unicodedata.name(c).split()[0]]
            expected[script] = expected.get(script, 0) + 1
    assert letters_by_script(text) == expected
    assert main_script(text) == max(expected, key=expected.__getitem__)


def test_texts_without_letters_have_no_script():
    """Guards against a division by zero for numbers and blank texts."""
    assert main_script("12 + 34 = 46\n") is None
    assert letters_by_script("") == {}
    assert script_share("…", "Han") == 0.0


def test_unknown_scripts_are_refused_with_the_near_ones():
    """Guards against a misspelt script that silently leaves every document out."""
    check_scripts(["Han", "Latin", "Hani"])
    with pytest.raises(ConfigError, match="'Hann'; did you mean 'Han'"):
        check_scripts(["Hann"])
    with pytest.raises(ConfigError, match="unknown Unicode script"):
        check_scripts(["Han}|."])


def test_languages():
    """Guards against short texts that are called some language at random."""
    assert language_of("The committee will meet again next Tuesday to discuss it.") == "en"
    assert language_of("会议将于下周二再次召开，届时委员会将讨论新的预算方案。") == "zh"
    assert language_of("OK, 12:30?") is None
    with pytest.raises(ConfigError, match="unknown language code 'english'"):
        check_languages(["english"])
