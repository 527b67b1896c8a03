"""The user's folder, in which the faults happen."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from small import working_in


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    """A config and a text."""
    with working_in(tmp_path) as place:
        yield place
