"""docs/errors.md: what `gpt` says to wrong inputs is what stands there."""

import sys

import pytest
import wrong_inputs


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own words differ elsewhere")
def test_the_page_says_what_comes() -> None:
    """Guards: a message that loses what, where or what to do; a traceback; another exit code."""
    written = wrong_inputs.PAGE.read_text(encoding="utf-8")
    found = wrong_inputs.page()
    assert found == written, "python scripts/wrong_inputs.py"
    assert "internal" not in found
    codes = [block.rpartition("[")[2][0] for block in found.split("```text\n")[1:]]
    assert len(codes) >= 55
    assert set(codes) <= set("234")
