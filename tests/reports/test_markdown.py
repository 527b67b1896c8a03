import re

import pytest

from gptcli.reports.markdown import fenced, line_text


@pytest.mark.parametrize("text", ["```\n# out", "a ````` b", "~~~\n```", "``\n`", "plain", ""])
def test_a_fence_outlasts_its_text(text: str) -> None:
    """Guards against a sample that closes its code block and goes on as markup."""
    first, *inside, last = fenced(text, "text").split("\n")
    fence = first.removesuffix("text")
    assert last == fence
    assert "\n".join(inside) == text
    assert not any(re.match(rf" {{0,3}}`{{{len(fence)},}}\s*$", line) for line in inside)


def test_a_cell_cannot_leave_its_cell() -> None:
    """Guards against text that splits a row, starts HTML or hides a link."""
    assert line_text("a|b\nc") == r"a\|b c"
    assert line_text("<b> [x](http://y) `c` *d*") == r"\<b> \[x\](http://y) \`c\` \*d\*"
    assert line_text("a\\|b") == r"a\\\|b"


def test_names_stay_readable() -> None:
    """Guards against backslashes in every snake_case name."""
    assert line_text("bits_per_byte") == "bits_per_byte"
    assert line_text("_emphasis_") == r"\_emphasis\_"
