"""`scripts/fuzz.py`: what it takes for well, and what it does not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest

TARGET = """\
import ctypes
import pytest
from guard import CASES, case

@pytest.fixture(scope="module", autouse=True)
def folder():
    pass

def test_it():
    for number in range({cases}):
        with case("it"):
            {body}
"""
Fuzz = Callable[..., tuple[bool, str]]


@pytest.fixture
def fuzzed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fuzz:
    """(body of a case, how many cases, seconds) -> what it comes to where 12 are asked for."""
    folder = tmp_path / "tests" / "fuzz"
    folder.mkdir(parents=True)
    for name in ("guard.py", "conftest.py"):
        shutil.copy(fuzz.ROOT / "tests" / "fuzz" / name, folder)
    monkeypatch.setattr(fuzz, "ROOT", tmp_path)

    def run(body: str, cases: str = "CASES", seconds: float | None = None) -> tuple[bool, str]:
        (folder / "test_fuzz_it.py").write_text(TARGET.format(body=body, cases=cases))
        return fuzz.fuzz("it", 12, seconds)

    return run


def test_as_many_cases_as_asked(fuzzed: Fuzz) -> None:
    well, said = fuzzed("pass")
    assert well, said
    assert said.startswith("fuzz it: 12 cases, the slowest 0.")


def test_fewer_cases(fuzzed: Fuzz) -> None:
    """Bug: a target that ends early, or whose strategy has no more to give, looks well."""
    well, said = fuzzed("pass", "CASES - 1")
    assert not well
    assert said.endswith("fuzz it: only 11 of 12 cases ran")


def test_a_target_without_an_end(fuzzed: Fuzz) -> None:
    well, said = fuzzed("while True: pass", seconds=2)
    assert not well
    assert said == "fuzz it: still there after 2 s, and killed"


def test_a_hang_in_c(fuzzed: Fuzz, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the alarm's handler is Python, which never runs where C does not come back."""
    guard = fuzz.ROOT / "tests" / "fuzz" / "guard.py"
    text = guard.read_text()
    assert "\n_IN_C_SECONDS = 60 " in text
    guard.write_text(text.replace("\n_IN_C_SECONDS = 60 ", "\n_IN_C_SECONDS = 1 "))
    well, said = fuzzed("sum(range(10**12))", seconds=60)
    assert not well
    assert "Timeout (0:00:01)!" in said
    assert "test_fuzz_it.py" in said
