import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Says when it is ready, then what it was asked for, as a loop that polls the flag.
LOOP = """
import sys, time
from gptcli import stop
from gptcli.cli import signals
with signals.installed():
    print("ready", flush=True)
    for _ in range(400):
        time.sleep(0.02)
        if stop.take_save_request():
            print("save", flush=True)
        if stop.requested() and "deaf" not in sys.argv:
            sys.exit(stop.EXIT_CODES[stop.requested()])
sys.exit(99)
"""


def start(*arguments: str, before: str = "") -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", before + LOOP, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_one_signal_asks(number, code):
    process = start()
    process.send_signal(number)
    assert process.wait(10) == code


def test_second_interrupt_quits_at_once():
    """Whoever presses Ctrl-C twice does not want to wait for a save."""
    process = start("deaf")
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(5) == 130


def test_terminate_twice_still_waits_for_the_save():
    """Schedulers repeat SIGTERM; that must not cut a save short."""
    process = start("deaf")
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.poll() is None
    process.kill()
    process.wait()


def test_save_request_goes_on():
    process = start()
    process.send_signal(signal.SIGUSR1)
    assert process.stdout is not None
    assert process.stdout.readline() == "save\n"
    assert process.poll() is None
    process.terminate()
    assert process.wait(10) == 143


def test_nohup_is_respected():
    """`nohup gpt pretrain` must survive the end of the session."""
    process = start(before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    assert process.wait(10) == 143


def test_handlers_come_back():
    from gptcli.cli import signals

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with signals.installed():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert before == {n: signal.getsignal(n) for n in before}
