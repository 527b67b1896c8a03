"""Memorised text and canaries of a small run, and paired sentences, as users ask for them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.schema import Config
from gptcli.errors import CheckpointError, DataError
from gptcli.evaluate_memorization import evaluate_memorization
from gptcli.pretrain import pretrain
from gptcli.reports.privacy import canaries_section, memorization_section, pairs_section
from gptcli.runs.run_dir import read_run_json

Run = Callable[..., tuple[int, str, str]]
CANARIES = {"count": 3, "repetitions": [0, 40], "digits": 4, "format": "code {secret}"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has read random letters, and canaries among them, again and again."""
    folder = tmp_path_factory.mktemp("planted")
    chosen = random.Random(1)
    lines = ["".join(chosen.choices("abcdefgh", k=60)) for _ in range(120)]
    (folder / "letters.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in lines))
    config = Config.model_validate(
        {
            "name": "planted",
            "tokenizer": {"kind": "bytes"},
            "data": {
                "train": str(folder / "letters.jsonl"),
                "val_fraction": 0.2,
                "canaries": CANARIES,
            },
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32},
            "schedule": {"warmup_steps": 5},
            "training": {
                "max_steps": 100,
                "tokens_per_step": 512,
                "micro_batch_size": 16,
                "precision": "fp32",
                "compile": "off",
                "eval_every": 1000,
            },
            "samples": {"n": 1, "max_new_tokens": 2},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)
        pretrain(config, run_dir=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def report(planted: Path) -> dict[str, Any]:
    """What the run has memorised, as report.json says it."""
    result = evaluate_memorization(Config(), model=str(planted), passages=30)
    assert result.directory is not None
    assert result.directory.parent == planted / "evals"
    written: dict[str, Any] = json.loads((result.directory / "report.json").read_text())
    assert written["memorization"] == json.loads(json.dumps(result.report["memorization"]))
    return written


def test_canaries_are_exposed(planted: Path, report: dict[str, Any]) -> None:
    """Bug: secrets that were read hundreds of times count as unknown, or unread ones as known."""
    found = read_run_json(planted)["planted_canaries"]
    assert [canary["repetitions"] for canary in found] == [0, 0, 0, 40, 40, 40]
    exposure = report["canaries"]
    assert [c["text"] for c in exposure["canaries"]] == [c["text"] for c in found]
    never, often = exposure["by_repetitions"]
    assert often["exposure_bits"] > 8  # of 13.3
    assert never["exposure_bits"] < often["exposure_bits"] - 4
    assert exposure["epochs"] > 5
    section = canaries_section(report)
    assert section is not None
    assert [row[0] for row in section.tables[0].rows] == ["0", "40"]
    assert section.plots[0].svg.startswith("<svg")


def test_memorised_text(report: dict[str, Any]) -> None:
    """Bug: passages come from the canaries or the held-out part, or more than were asked for."""
    found = report["memorization"]
    assert [rate["prefix_tokens"] for rate in found["rates"]] == [8, 16]
    assert [rate["passages"] for rate in found["rates"]] == [30, 30]
    assert 0 < found["held_out_rates"][0]["passages"] <= 30
    assert found["searched_bytes"] < 120 * 60  # without what is held out, and canaries
    assert found["sample_runs"]["texts"] == len(found["samples"]) == 16
    assert found["held_out_runs"]["longest_bytes"] == 0  # letters at random
    section = memorization_section(report)
    assert section is not None
    assert [row[0] for row in section.tables[0].rows] == ["8", "16"]


def test_named_text(planted: Path, report: dict[str, Any], tmp_path: Path) -> None:
    """Bug: --data is taken for held-out text, canaries are ranked though other text is asked for,
    or a run of the model's own text is not found in it."""
    copied = tmp_path / "text.txt"
    samples = report["memorization"]["samples"]
    copied.write_text(f"before {samples[3]['text']} after")
    result = evaluate_memorization(
        Config(), model=str(planted), data=[str(copied)], run_dir=tmp_path / "out"
    )
    found = result.report["memorization"]
    assert "canaries" not in result.report
    assert found["held_out_rates"] == []
    assert found["samples"][3]["run"] == samples[3]["text"]
    assert found["samples"][3]["document"] == str(copied)
    assert (tmp_path / "out" / "report.html").exists()


def test_what_cannot_be_measured(planted: Path, tmp_path: Path) -> None:
    """Bug: other text than the run was trained on is searched, or none at all, without a word."""
    text = planted.parent / "letters.jsonl"
    before = text.read_text()
    try:
        text.write_text(before + json.dumps({"text": "another"}) + "\n")
        with pytest.raises(CheckpointError, match="have changed since training"):
            evaluate_memorization(Config(), model=str(planted))
    finally:
        text.write_text(before)
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(DataError, match=r"no document of .*short\.txt has 32 tokens"):
        evaluate_memorization(Config(), model=str(planted), data=[str(tmp_path / "short.txt")])


def test_commands(planted: Path, tmp_path: Path, gpt: Run) -> None:
    """Bug: the flags are not passed on, or ignored without a word."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"a": "abc def", "b": "abc dxf"}\n{"a": "a x b", "b": "c x d"}\n')
    code, out, err = gpt("eval", "--pairs", str(pairs), "--model", str(planted))
    assert code == 0
    assert "prefers a" in out
    assert "1 of 2 pairs differ in more than one place" in err
    assert f"{pairs}:2" in err
    code, out, _ = gpt("eval", "--pairs", str(pairs), "--model", str(planted), "--json")
    report = json.loads(out)
    assert code == 0
    section = pairs_section(report)
    assert section is not None
    assert section.tables[0].rows[-1][:2] == ["all", "2"]
    code, out, _ = gpt("eval", "--memorization", "--limit", "9", "--model", str(planted))
    assert code == 0
    assert "Continued verbatim" in out
    assert "9 passages of the training text" in out
    assert "copies in a pass" in out
    for flags, message in (
        (
            ["--memorization", "--pairs", str(pairs)],
            "--memorization and --pairs do not go together",
        ),
        (["--memorization", "--stride", "3"], "--stride is not for --memorization"),
        (["--pairs", str(pairs), "--data", "x"], "--data is not for --pairs"),
        (["--pairs", str(pairs), "--limit", "3"], "--limit is not for --pairs"),
    ):
        code, _, err = gpt("eval", "--model", str(planted), *flags)
        assert code == 2
        assert message in err
    code, _, err = gpt("eval", "--pairs", str(tmp_path / "none"), "--model", str(planted))
    assert code == 3
    assert "cannot be read" in err
