"""Filters: what is left out, what is rewritten, and the report."""

import pytest

from gptcli.config.data_schema import FiltersConfig
from gptcli.data import cleaning
from gptcli.data.boilerplate import is_boilerplate, remove_boilerplate
from gptcli.data.cleaning import Cleaner, CleaningReport, repeated_lines
from gptcli.errors import ConfigError, DataError

ENGLISH = """CHAPTER I.

It was a bright cold day in April, and the clocks were striking.
She said that this website uses cookies too often, and laughed.
"We use cookies," said the baker, "to decorate the tree at home."
He wrote: https://example.com/a is the address you asked for.
JavaScript is the language most often taught first | so they say.
Home is where the heart is. Menu of the day: soup, fish, cheese.
Log in the fire, cat on the mat; read more books, he told us.
© is the sign for copyright, and all rights are reserved to the author by law.
(c) 1999 results were better than those of 2001.
| name | age | city |
def f(x):
    return x  # Next page
Next
"""
CHINESE = """第一章

今天天气很好，我们去公园散步。孩子们都很高兴。
版权所有者有权要求停止侵权行为，并赔偿损失。
他登录了网站，注册了一个新账号，然后关上了电脑。
首页上的新闻说，明天会下雨；我们使用的饼干是自己烤的。
上一页写的是春天，下一页写的是秋天，他慢慢地读着。
明月几时有？把酒问青天。
"""
NOTICES = [
    *("This website uses cookies to give you the best experience.", "Accept all cookies"),
    *("We use cookies to analyse traffic on our site.", "Cookie policy"),
    *("Please enable JavaScript to view this page.", "JavaScript is disabled in your browser."),
    *("You must be logged in to post a comment.", "Skip to main content", "Back to top"),
    *("Home | About | Contact", "© 2024 Example Ltd. All rights reserved.", "Read more »"),
    *("Copyright 2019-2024 Example Inc.", "https://www.example.com/a?b=c", "www.example.org"),
    *(
        "本网站使用Cookie来提升您的体验。",
        "请启用JavaScript后继续浏览。",
        "登录后才能评论",
        "返回顶部",
    ),
    *("首页 | 新闻中心 | 关于我们 | 联系我们", "版权所有 © 2023 示例公司", "上一篇：示例文章"),
    *("京ICP备12345678号-1", "示例网 版权所有，侵权必究", "登录 | 注册"),
]


def _only(**filters):
    return Cleaner(FiltersConfig(**filters))


def test_boilerplate_lines_go_and_prose_stays():
    """Guards against sentences about cookies, homes and pages that are dropped as notices."""
    assert remove_boilerplate(ENGLISH) == (ENGLISH, [])
    assert remove_boilerplate(CHINESE) == (CHINESE, [])
    assert [line for line in NOTICES if not is_boilerplate(line)] == []
    text = "".join(f"{line}\r\n" for line in [NOTICES[0], "A line.", NOTICES[9], "Another line."])
    assert _only(boilerplate=True).rewrite(text) == "A line.\r\nAnother line.\r\n"


def test_length_bounds():
    """Guards against bounds that count bytes (Chinese has three a character) or leave out documents
    exactly at a bound; a long file is judged by its first part and its whole length."""
    cleaner = _only(min_characters=3, max_characters=5)
    assert [cleaner.judge(t) for t in ("你好", "你好吗", "12345", "123456")] == [
        *("min_characters", None, None, "max_characters")
    ]
    assert cleaner.judge("12345", characters=10**6) == "max_characters"
    with pytest.raises(ConfigError, match="min_characters 9 is above max_characters 3"):
        _only(min_characters=9, max_characters=3)


def test_scripts_by_their_share_of_the_letters():
    """Guards against shares of all characters: digits and spaces would count against a script."""
    cleaner = _only(scripts={"Han": 0.5})
    assert cleaner.judge("你好世界 123,456,789.00 ok") is None
    assert cleaner.judge("你好 hello") == "scripts"
    with pytest.raises(ConfigError, match="did you mean 'Han'"):
        _only(scripts={"Hann": 0.5})


def test_languages():
    """Guards against short texts left out by a guess at their language."""
    cleaner = _only(languages=["en"])
    assert cleaner.judge("The harvest was good this year, and the barns were full.") is None
    assert (
        cleaner.judge("Die Ernte war gut in diesem Jahr, und die Scheunen waren voll.") is not None
    )
    assert cleaner.judge("今年收成很好，谷仓都装满了，村里的人都很高兴。") == "languages"
    assert cleaner.judge("Ja, gut.") is None
    with pytest.raises(ConfigError, match="unknown language code 'xx'"):
        _only(languages=["xx"])


def test_repeated_lines_are_counted_as_gopher_does():
    """Guards against blank lines counted as repeats, and Chinese without line ends as one line."""
    assert repeated_lines("a\n\n\nb\r\nc\n\n") == 0.0
    assert repeated_lines("a\nb\na \n a\n") == 0.5
    assert repeated_lines("你好。再见。你好。你好！你好。") == pytest.approx(2 / 5)
    assert repeated_lines("") == 0.0
    assert _only(max_repeated_lines=0.3).judge("x\nx\ny\n") == "max_repeated_lines"
    assert _only(max_repeated_lines=0.3).judge(ENGLISH + CHINESE) is None


def test_stop_words():
    """Guards against stop words cut out of longer words or placeholders."""
    rewrite = _only(stop_words=True).rewrite
    assert rewrite("The cat isn't in the theatre.\nAnd there\n") == "cat theatre.\n\n"
    assert rewrite("目的地很远，但是，走吧") == "目的地很远，，走吧"
    assert rewrite("<NATIONAL_ID> 3rd i18n") == "<NATIONAL_ID> 3rd i18n"


def test_the_report_counts_and_shows_no_personal_data():
    """Guards against a report that publishes what was redacted, in examples of any filter."""
    cleaner = _only(min_characters=60, redact=["email"], boilerplate=True)
    report = CleaningReport()
    number, key = "13812345678", "ghp_" + "a1B2c3D4e5" * 4
    for i in range(5):
        rewritten = cleaner.rewrite(f"tel 电话{number} a{i}@example.com", report)
        assert cleaner.judge(rewritten) == "min_characters"
        report.left_out("min_characters", rewritten)
    text = f"A longer text\x1b of 5 lines.\n{key} {number}\n"
    text += "mail to ann@example.com or bob@example.org\n"
    cleaned = cleaner.rewrite(text + "Back to top\n", report)
    assert cleaner.judge(cleaned) is None
    assert cleaned == text.replace("ann@example.com or bob@example.org", "<EMAIL> or <EMAIL>")
    found = report.to_json()
    assert found["min_characters"]["documents"] == 5
    assert found["min_characters"]["examples"] == ["tel 电话<PHONE> <EMAIL>"]
    assert found["redact"]["replacements"] == {"email": 2 + 5}
    assert found["redact"]["characters"] == 30 + 5 * len("a0@example.com")
    assert found["boilerplate"]["characters"] == len("Back to top\n")
    examples = [line for one in found.values() for line in one["examples"]]
    assert any("<EMAIL>" in line for line in examples)
    for line in examples:
        assert len(line) <= 80
        assert line.isprintable()
        assert not any(part in line for part in (number, "example", key[-12:], number[-7:]))


def test_pieces_are_rewritten_as_the_whole():
    """Guards against another result for long files, which are rewritten piece by piece."""
    cleaner = _only(redact=["email", "phone", "secret"], boilerplate=True)
    lines = [
        *ENGLISH.splitlines(True),
        *CHINESE.splitlines(True),
        "a@example.com\n",
        NOTICES[0] + "\n",
    ]
    assert "".join(cleaner.rewrite(line) for line in lines) == cleaner.rewrite("".join(lines))


@pytest.mark.parametrize(
    ("filters", "module", "package"),
    [
        ({"languages": ["en"]}, "py3langid.langid", "py3langid"),
        ({"near_duplicates": 0.8}, "datasketch", "datasketch"),
        ({"redact": ["card"]}, "stdnum", "python-stdnum"),
        ({"stop_words": True}, "stopwordsiso", "stopwordsiso"),
    ],
)
def test_missing_packages_are_named_before_the_run(monkeypatch, filters, module, package):
    """Guards against an ImportError hours into a run."""
    monkeypatch.setitem(__import__("sys").modules, module, None)
    cleaning._stop_words.cache_clear()
    with pytest.raises(DataError, match=f"needs the package {package}") as caught:
        Cleaner(FiltersConfig(**filters))
    assert caught.value.hint == "pip install 'gptcli[clean]'"


def test_examples_of_a_filter_differ():
    """Guards against one text, or one that looks the same, shown as three examples."""
    report = CleaningReport()
    for text in ["same", "same", "same", "no 0000000", "no 1111111", "other", "more"]:
        report.left_out("min_characters", text)
    report.removed("boilerplate", ["Back to top\n", "Back to top\r\n", "Next\n"] * 3)
    found = report.to_json()
    assert found["min_characters"]["examples"] == ["same", "no #", "other"]
    assert found["min_characters"]["documents"] == 7
    assert found["boilerplate"]["examples"] == ["Back to top", "Next"]
