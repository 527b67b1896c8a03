"""`--devices` and `--nodes`: what is refused before anything starts, and what a signal to the
process that started the others comes to."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faults.processes import logged, started, until
from faults.small import working_in
from forked import Forked
from ranks import checkpoints

from gptcli import stop
from gptcli.cli import launch
from gptcli.cli.launch import Nodes, check_devices, nodes_of
from gptcli.errors import ConfigError, ResourceError

Gpt = Callable[..., tuple[int, str, str]]
PATIENCE = 120


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    with working_in(tmp_path) as place:
        yield place


def test_more_devices_than_there_are() -> None:
    """Guards that a number of devices that cannot be is said at once, and not by each process."""
    for devices, device, gpus in ((8, "cpu", 0), (2, "auto", 0), (4, "auto", 4), (1, "cuda:1", 2)):
        check_devices(devices, device, gpus)
    with pytest.raises(ResourceError, match="--devices 8: this machine has 4 GPUs") as found:
        check_devices(8, "auto", 4)
    assert (found.value.hint or "").startswith("--devices 4")
    with pytest.raises(ResourceError, match="--devices 2: torch finds no GPU here"):
        check_devices(2, "cuda", 0)
    with pytest.raises(ConfigError, match="cuda:1 is a single device, and --devices 2 are several"):
        check_devices(2, "cuda:1", 4)


def test_devices_that_are_not_here(gpt: Gpt) -> None:
    """Guards the same of the command, which would else load torch in each process first."""
    line = ("pretrain", "tiny.yaml", "--run-dir=r", "--devices=2")
    code, _, err = gpt(*line, "--set=training.device=cuda:0")
    assert (code, Path("r").exists()) == (2, False)
    assert "error: training.device cuda:0 is a single device" in err


def test_slurm_says_where_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards jobs that share their first machine, which would meet each other's processes."""
    monkeypatch.setenv("SLURM_NNODES", "4")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[03-05,9]")
    points = []
    for job in ("123456", "123457"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        found = nodes_of("slurm")
        assert (found.count, found.job) == (4, job)
        points.append(found.meeting_point)
    assert points == ["gpu03:29856", "gpu03:29857"]


def test_nobody_at_the_meeting_point(gpt: Gpt) -> None:
    """Guards a misspelt host and a closed port, which must not be waited for for ever."""
    line = ["pretrain", "tiny.yaml", "--nodes=2@nowhere.invalid:29400"]
    code, _, err = gpt(*line, "--set=distributed.timeout_seconds=0.1")
    assert code == 6
    assert "error: --nodes: nobody at nowhere.invalid:29400 for 0 s: " in err
    assert "hint: start the same command line on nowhere.invalid, and open its port 29400" in err


def test_a_machine_that_does_not_come(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the first machine against waiting for ever for one that is not started."""
    monkeypatch.setattr(launch, "_GATHER_SECONDS", 1)
    code, _, err = gpt("pretrain", "tiny.yaml", "--nodes=2@127.0.0.1:29399")
    assert code == 6
    assert "error: not all of 2 machines came to 127.0.0.1:29399" in err


@pytest.mark.parametrize("host", ["127.0.0.1", "nowhere.invalid"])
def test_ctrl_c_while_others_are_awaited(host: str) -> None:
    """Guards Ctrl-C before there is any process to pass it on to."""
    with socket.socket() as taken:  # a port of its own: at a known one a second test run would meet
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    child = Forked(["pretrain", "tiny.yaml", f"--nodes=2@{host}:{port}"])
    time.sleep(1.5)
    child.send(signal.SIGINT)
    began = time.monotonic()
    code, err = child.wait()
    assert time.monotonic() - began < 5
    assert (code, err.splitlines()[-1]) == (130, "stopped by SIGINT")


def ended(*codes: int) -> Any:
    """What torch's agent says of processes that ended so, one after the other."""
    failures = {
        rank: SimpleNamespace(exitcode=code, pid=100 + rank, timestamp=rank)
        for rank, code in enumerate(codes)
        if code
    }
    return SimpleNamespace(failures=failures, is_failed=lambda: bool(failures))


def test_the_exit_code_of_all() -> None:
    """Guards that the code is that of who knows why, and not of who was killed for it."""
    asked = signal.SIGTERM
    exit_code = launch._exit_code
    assert exit_code(ended(0, 0), None) == 0
    assert exit_code(ended(0, 0), asked) == 0
    assert exit_code(ended(3, 3), None) == 3
    assert exit_code(ended(-9, 6), None) == 6
    assert exit_code(ended(5, -15), None) == 5
    assert exit_code(ended(143, -9), asked) == 143
    assert exit_code(ended(6, 6), asked) == 6
    with pytest.raises(stop.Stopped):
        exit_code(ended(-15, -15), asked)
    with pytest.raises(ResourceError, match=r"rank 0 \(process 100\) was killed by SIGKILL"):
        exit_code(ended(-9, -9), None)


@pytest.mark.parametrize(("timeout", "grace"), [(2.0, 10), (120.5, 121)])
def test_the_time_of_who_hangs(timeout: float, grace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards that a process which hangs is killed for it, but not while it only notices that
    another one is lost, which takes distributed.timeout_seconds."""
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")  # is set to another value here
    given: list[int] = []
    real = SubprocessContext._close

    def close(self: Any, death_sig: signal.Signals, timeout: int = 30) -> None:
        given.append(timeout)
        real(self, death_sig, timeout)

    monkeypatch.setattr(SubprocessContext, "_close", close)
    result = launch._agent(["--no-such-flag"], 2, Nodes(), timeout).run()
    assert result.is_failed()
    assert set(given) == {grace}


ENDLESS = ["pretrain", "tiny.yaml", "--run-dir=r", "--devices=2"]
ENDLESS += ["--set=training.max_steps=1000000", "--set=training.save_every=1000000"]


@pytest.fixture
def launcher() -> Iterator[Forked]:
    """A process that has started two which train."""
    child = Forked(ENDLESS)
    until(lambda: logged(Path("r")) >= 2, PATIENCE)
    yield child
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(child.process, signal.SIGKILL)
        os.waitpid(child.process, 0)


def started_by(launcher: Forked) -> list[int]:
    text = Path(f"/proc/{launcher.process}/task/{launcher.process}/children").read_text()
    return [int(process) for process in text.split()]


def alive(process: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


pytest_slow = [pytest.mark.slow, pytest.mark.skipif(not Path("/proc").exists(), reason="no /proc")]


class TestOfTwoProcesses:
    pytestmark = pytest_slow

    def test_save_and_stop(self, launcher: Forked) -> None:
        """Guards SIGUSR1, which saves once, and SIGHUP; one message, and none of torch's."""
        launcher.send(signal.SIGUSR1)
        until(lambda: len(checkpoints(Path("r"))) == 2)
        saved = int(checkpoints(Path("r"))[-1][5:])
        until(lambda: logged(Path("r")) > saved)
        launcher.send(signal.SIGHUP)
        code, err = launcher.wait()
        last = int(checkpoints(Path("r"))[-1][5:])
        assert code == 129
        assert last > saved
        assert err.count("stopped by SIGHUP") == 1
        assert err.splitlines()[-1].startswith(f"stopped by SIGHUP at step {last}; to continue: ")
        assert not [
            word for word in ("elastic", "Warning", "W1", "E1", "Traceback") if word in err
        ], err

    @pytest.mark.parametrize("asleep", [False, True])
    def test_a_process_that_hangs(self, asleep: bool) -> None:
        """Guards a job whose frozen process, which hears nothing, is waited for for ever: it is
        killed 10 s after the other has ended for want of it. One that wakes up ends by itself."""
        with started(*ENDLESS, "--set=distributed.timeout_seconds=2") as launcher:
            until(lambda: logged(Path("r")) >= 2, PATIENCE)
            frozen, other = sorted(started_by(launcher))[::-1]
            os.kill(frozen, signal.SIGSTOP)
            began = time.monotonic()
            until(lambda: not alive(other))
            assert 2 <= time.monotonic() - began < 9
            assert alive(frozen)
            lost = time.monotonic()
            if not asleep:
                os.kill(frozen, signal.SIGCONT)
            code, err = launcher.wait()
            took = time.monotonic() - lost
            assert 9 < took < 20 if asleep else took < 8
            until(lambda: not alive(frozen))
        assert code == 6
        assert [line for line in err.splitlines() if line.startswith("error: lost rank ")]
        assert err.count("error: ") == 1

    def test_ctrl_c_twice(self, launcher: Forked) -> None:
        """Guards the way out where the processes do not listen any more."""
        processes = started_by(launcher)
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        launcher.send(signal.SIGINT)
        time.sleep(0.2)
        launcher.send(signal.SIGINT)
        began = time.monotonic()
        assert launcher.wait()[0] == 130
        assert time.monotonic() - began < 2
        until(lambda: not any(map(alive, processes)))

    def test_a_killed_launcher_leaves_nobody(self, launcher: Forked) -> None:
        """Guards GPUs against processes that nobody waits for; what they had is saved."""
        processes = started_by(launcher)
        launcher.send(signal.SIGKILL)
        assert os.waitpid(launcher.process, 0)[1] == signal.SIGKILL
        until(lambda: not any(map(alive, processes)))
        assert json.loads(Path("r/run.json").read_text())["status"] == "stopped"
        assert int(checkpoints(Path("r"))[-1][5:]) >= 2
