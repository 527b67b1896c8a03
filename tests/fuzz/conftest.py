"""A folder to fuzz in, and the counts at the end."""

import os
from pathlib import Path

import pytest
from guard import COUNTS, STDERR, Gpt


def pytest_configure(config: pytest.Config) -> None:
    """Tracebacks of what hangs go to the stderr that nothing captures yet."""
    os.dup2(2, STDERR)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this module's own, which is the working directory, with a config and a text."""
    path = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setenv("GPT_RUNS", str(path / "runs"))
        patch.delenv("GPT_DEBUG", raising=False)
        for job in ("pretrain", "finetune"):  # its plots take a second
            patch.setattr(f"gptcli.{job}.write_report", lambda run_dir: None)
        (path / "text.txt").write_text("".join(f"day {i} was as day {i * i}.\n" for i in range(99)))
        (path / "tiny.yaml").write_text(TINY)
        yield path


@pytest.fixture
def gpt(capsysbinary: pytest.CaptureFixture[bytes]) -> Gpt:
    """Run `gpt` in this process: exit code, stdout, stderr, whatever bytes these get."""
    from gptcli.cli.main import main

    def run(*arguments: str) -> tuple[int, str, str]:
        capsysbinary.readouterr()
        code = main(list(arguments))
        out, err = capsysbinary.readouterr()
        return code, out.decode(errors="replace"), err.decode(errors="replace")

    return run


TINY = """\
name: tiny
tokenizer: {kind: bytes}
data: {train: text.txt}
model: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 32}
training: {max_steps: 1, tokens_per_step: 64, log_every: 1, eval_every: 100, save_every: 100,
           micro_batch_size: 2, precision: fp32, compile: off, device: cpu}
schedule: {warmup_steps: 0}
samples: {n: 1, max_new_tokens: 2}
"""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many cases ran, by target."""
    for target, count in COUNTS.items():
        terminalreporter.write_line(
            f"fuzz {target}: {count.cases:,} cases, the slowest {count.slowest:.2f} s,"
            f" memory grew by {count.growth / 2**20:.0f} MB"
            + "".join(f", {n:,} {what}" for what, n in sorted(count.outcomes.items()))
        )
