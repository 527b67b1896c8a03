import dataclasses
import io
import logging
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from gptcli.cli.display import Display, duration, status_line
from gptcli.training.events import EvalEvent, StepEvent

log = logging.getLogger("gptcli")
STEP = StepEvent(
    step=100,
    max_steps=400,
    progress=0.25,
    loss=3.4123,
    lr=0.02,
    grad_norm=1.0,
    tokens=409600,
    tokens_per_second=12345.6,
    seconds=33.0,
    left_seconds=130.0,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (59.4, "59s"), (130, "2m10s"), (11100, "3h05m")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_status_line():
    assert status_line(STEP) == "step 100/400  loss 3.412  12,346 tok/s  left 2m10s"
    on_known_gpu = dataclasses.replace(STEP, mfu=0.412)
    assert status_line(on_known_gpu).endswith("12,346 tok/s  mfu 41%  left 2m10s")


def test_log_file_gets_plain_lines(capsys):
    """Bars and cursor movements make a log file unreadable."""
    with Display().attached() as display, display.live():
        log.info("step 100/400  loss 3.412", extra={"event": STEP})
        log.warning("odd")
    assert capsys.readouterr().err == "step 100/400  loss 3.412\nwarning: odd\n"


def test_quiet_keeps_warnings(capsys):
    with Display().attached() as display:
        display.quiet = True
        log.info("chatter")
        log.warning("odd")
    assert capsys.readouterr().err == "warning: odd\n"


def test_gone_stderr_does_not_stop_training(monkeypatch):
    """`gpt pretrain 2>&1 | head` ended a training run at its first log line after head's."""

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Display().attached():
        for stream in (Gone(), None):
            monkeypatch.setattr(sys, "stderr", stream)
            log.info("a line")


# What training logs, with text from a model that tries to speak to the terminal and to Rich.
SCENE = """
import logging, sys, time
from gptcli.cli.display import Display
from gptcli.training.events import EvalEvent, StepEvent
log = logging.getLogger("gptcli")
with Display().attached() as display, display.live():
    for step in (1, 2, 3):
        event = StepEvent(step, 3, step / 3, 3.5 - step / 10, 0.02, 1.0, 10, 100.0, 1.0, 5.0)
        log.info(f"step {step}/3", extra={"event": event})
        if step == 2:
            log.info("eval", extra={"event": EvalEvent(2, 3.0, 20.0, 2.125, 0.1)})
    log.info("[/x] :smile: [bold]b[/] \\x1b]0;evil\\x07 \\x9b31m")
    log.warning("odd")
print("end", file=sys.stderr)
"""


def on_terminal(columns: int = 80, **environment: str) -> str:
    """Everything the scene writes to a terminal of that width."""
    import fcntl
    import struct
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-c", SCENE],
        stderr=follower,
        stdout=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
        env={**clean, "TERM": "xterm-256color", **environment},
    )
    os.close(follower)
    data = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not chunk:
            break
        data += chunk
    os.close(leader)
    assert process.wait(20) == 0
    return data.decode()


def test_terminal_gets_one_live_line():
    shown = on_terminal()
    assert "\x1b[2K" in shown  # the line is drawn again in place
    assert "step 3/3  loss 3.200  100 tok/s  left 5s  val 2.125 bits/byte" in shown
    assert shown.count("\n") <= 6  # four messages and the end; no line for every step
    assert shown.endswith("end\r\n")


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_text_cannot_steer_the_terminal(environment):
    """Rich passes ESC and 0x9b through, and fails on `[/x]` or rewrites `:smile:`."""
    shown = on_terminal(**environment)
    assert r"[/x] :smile: [bold]b[/] \x1b]0;evil\x07 \x9b31m" in shown
    assert "\x1b]" not in shown
    assert "\x9b" not in shown
    assert "\x07" not in shown


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_plain_terminal(environment):
    shown = on_terminal(**environment)
    assert "\x1b" not in shown
    assert "step 1/3\r\nstep 2/3\r\n" in shown
    assert "warning: odd\r\n" in shown


def test_narrow_terminal():
    """A status that wraps leaves a trail of half lines at every step."""
    shown = on_terminal(columns=20)
    assert shown.count("\n") <= 8
    assert "end\r\n" in shown


def test_cursor_stays():
    """A killed run must not leave the terminal without a cursor."""
    shown = on_terminal()
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")
    first_step = shown.index("step 1/3")
    assert "\x1b[?25h" in shown[:first_step]


def test_validation_is_remembered(capsys):
    """EvalEvent off a terminal is an ordinary line."""
    with Display().attached() as display, display.live():
        log.info("eval: 2.1 bits/byte", extra={"event": EvalEvent(2, 3.0, 20.0, 2.125, 0.1)})
    assert capsys.readouterr().err == "eval: 2.1 bits/byte\n"
