import os
import signal


def test_handlers_come_back():
    from gptcli.cli import signals

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with signals.installed():
        os.kill(os.getpid(), signal.SIGUSR1)
    assert before == {n: signal.getsignal(n) for n in before}


def test_an_interrupt_takes_back_no_other_stop():
    """SIGTERM while an answer grows, and then Ctrl-C: the program must end."""
    from gptcli import stop
    from gptcli.cli import signals

    with signals.installed(), signals.quiet_interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # no second one that quits at once
        assert stop.requested() is signal.SIGINT
        stop.withdraw(signal.SIGTERM)
        assert stop.requested() is signal.SIGINT
        stop.withdraw(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested() is signal.SIGTERM
