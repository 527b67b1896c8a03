import pytest
import torch

from gptcli import stop


@pytest.fixture(autouse=True)
def _one_process_many_jobs():
    """Tiny models are slower on two threads than on one; a stop request must not leak."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stop.reset()
    yield
    stop.reset()
    torch.set_num_threads(threads)
