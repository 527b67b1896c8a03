import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Forked

GPT = [sys.executable, "-m", "gptcli"]


@pytest.fixture(autouse=True)
def clean_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run or setting of the outside world reaches a test."""
    monkeypatch.setenv("GPT_RUNS", str(tmp_path / "runs"))
    for name in ("NO_COLOR", "GPT_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a shell line in which `gpt` is this project's."""
    root = Path(__file__).parents[2]

    def run(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", f'gpt() {{ {" ".join(GPT)} "$@"; }}\n{line}'],
            capture_output=True,
            text=True,
            timeout=50,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root), **environment},
            check=False,
        )

    return run


@pytest.fixture
def forked() -> type[Forked]:
    """For tests of streams and signals that must not meet those of this process."""
    return Forked
