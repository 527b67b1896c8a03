"""Several processes of one job, forked from this one: real ranks, without seconds of imports."""

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
from forked import Forked, StillRunningError


class Ranks:
    """`gpt` with the same arguments in `size` processes, as torchrun would start them.

    `only` has other arguments by rank, `before` what the process of a rank does first.
    """

    def __init__(
        self,
        arguments: list[str],
        size: int = 2,
        only: dict[int, list[str]] | None = None,
        before: dict[int, Callable[[], object]] | None = None,
    ) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]

        def placed(rank: int) -> None:
            torch.set_num_threads(1)
            os.environ.update(
                {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                }
            )

            if before is not None and rank in before:
                before[rank]()

        chosen = only or {}
        self.processes = [
            Forked(chosen.get(rank, arguments), before=lambda rank=rank: placed(rank))
            for rank in range(size)
        ]

    def wait(self, seconds: float = 120) -> list[tuple[int, str]]:
        """Exit code and stderr of each, by rank. StillRunningError, and an end of all, where they
        take longer."""
        ends, found = time.monotonic() + seconds, list[tuple[int, str]]()
        try:
            for process in self.processes:
                found.append(process.wait(max(ends - time.monotonic(), 0.0)))
        except StillRunningError as error:
            others = self.processes[len(found) + 1 :]
            said = [f"ended with {code}: {text}" for code, text in found]
            said += [str(error), *(f"killed: {process.kill()}" for process in others)]
            lines = (f"rank {rank} {text[-2000:]}" for rank, text in enumerate(said))
            raise StillRunningError("\n".join(lines)) from None
        return found


def train_together(arguments: list[str], size: int = 2) -> str:
    """Run `gpt` in several processes, which must end well; what rank 0 said."""
    (code, said), *others = Ranks(arguments, size).wait()
    assert code == 0, said
    assert all(found == (0, "") for found in others), others
    return said


def checkpoints(run: Path) -> list[str]:
    """Names of a run's checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))
