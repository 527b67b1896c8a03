"""The list of faults, their tests and docs/faults.md agree."""

import re

import fault_table
from rows import NOT_HERE, ROWS


def test_every_fault_has_a_test_and_every_test_a_fault() -> None:
    """A row without a test is a promise, a test without a row is not found."""
    tests = fault_table.tests_by_row()
    assert set(ROWS) == set(tests)
    assert not set(ROWS) & set(NOT_HERE)
    for row, found in tests.items():
        assert any(not test.slow for test in found), f"{row} has slow tests only"


def test_docstrings_open_with_the_row() -> None:
    """They become the table; what it says of a row must be said of that row."""
    for path in fault_table.FOLDER.glob("test_faults_*.py"):
        pairs = re.findall(r"def test_([a-z])(\d\d)_\w+\([^\"]*?\"\"\"(\w+)", path.read_text())
        for letter, number, opening in pairs:
            assert opening == f"{letter.upper()}{int(number)}", f"{path.name}: {opening}"


def test_the_table_is_up_to_date() -> None:
    """docs/faults.md says what the tests say."""
    written = fault_table.TABLE.read_text(encoding="utf-8")
    assert written == fault_table.table(), "run: python scripts/fault_table.py"
