import os
import signal


def test_handlers_come_back():
    from gptcli.cli import signals

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with signals.installed():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert before == {n: signal.getsignal(n) for n in before}
