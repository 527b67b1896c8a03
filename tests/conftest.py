import signal
from collections.abc import Callable

import pytest
import torch

from gptcli import stop
from gptcli.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    """Tests neither read nor fill the user's cache of corpora and tokens; they share one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT_CACHE", str(tmp_path_factory.mktemp("gpt-cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_hub(tmp_path_factory: pytest.TempPathFactory):
    """A MODEL that is not there is looked for on the hub: here nothing answers at its address, and
    its cache is not the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        cache = str(tmp_path_factory.mktemp("hub-cache"))
        patch.setenv("HF_HUB_CACHE", cache)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        yield


@pytest.fixture(scope="session", autouse=True)
def _interruptible():
    """A shell starts what runs in the background with SIGINT ignored, which the commands under test
    would inherit and leave ignored: tests of Ctrl-C would wait for ever."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_process_many_jobs():
    """Tiny models are slower on two threads than on one; a stop request must not leak."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stop.reset()
    yield
    stop.reset()
    torch.set_num_threads(threads)


@pytest.fixture
def gpt(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `gpt` in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return run
