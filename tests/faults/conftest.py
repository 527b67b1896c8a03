"""The user's folder, in which the faults happen."""

from pathlib import Path

import pytest
from small import PROSE, TINY


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config and a text. Reports, whose plots take a second, are left out."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    (tmp_path / "text.txt").write_text(PROSE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_RUNS", str(tmp_path / "runs"))
    monkeypatch.delenv("GPT_DEBUG", raising=False)
    for job in ("pretrain", "finetune"):
        monkeypatch.setattr(f"gptcli.{job}.write_report", lambda run_dir: None)
    return tmp_path
