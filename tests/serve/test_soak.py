"""Many clients of all kinds at once: `bash scripts/test.sh tests/serve -m slow`."""

import random
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from serving import Server, places, resident_bytes, serving

KNOWN = {"prompt": "Once", "max_tokens": 40, "temperature": 0}
BODIES = (b"{", b"x" * 2_000_000, b"[]", b'{"prompt": 3}')
SETTINGS = {
    "prompt": ["a", [1, 2, 3], ["x", "yy"], "z" * 70, "z" * 200],
    "max_tokens": [1, 5, 50, 500, 3000],
    "temperature": [0, 0.7, 1.5],
    "n": [1, 1, 2, 5],
    "stop": [None, "e", ["7", "ab"]],
    "logprobs": [None, 0, 5],
    "repetition_penalty": [1.0, 1.3],
    "presence_penalty": [0, 0.5],
}


class Clients:
    """What they do, and what became of it."""

    def __init__(self, server: Server, seconds: float) -> None:
        self.server, self.expected = server, server.text(**KNOWN)
        self.end = time.monotonic() + seconds
        self.statuses: Counter[int] = Counter()
        self.wrong: list[object] = []

    def run(self, seed: int) -> None:
        chosen = random.Random(seed)
        while time.monotonic() < self.end:
            try:
                self.ask(chosen)
            except Exception as error:
                self.wrong.append(error)

    def ask(self, chosen: random.Random) -> None:
        """Any request, one that is none, one that its client leaves, or a known one."""
        asked = {key: chosen.choice(values) for key, values in SETTINGS.items()}
        kind = chosen.choice(["left", "broken", "known", "any"])
        if kind == "left":
            connection = self.server.streaming(**asked)
            time.sleep(chosen.choice([0, 0.01, 0.2]))
            connection.close()
            return
        if kind == "broken":
            found = self.server.send("POST", "/v1/completions", chosen.choice(BODIES))
        else:
            short = {**asked, "max_tokens": 50}
            found = self.server.complete(**(KNOWN if kind == "known" else short))
        self.statuses[found[0]] += 1
        text = found[1]["choices"][0]["text"] if found[0] == 200 else None
        if found[0] >= 500 or (kind == "known" and text not in (None, self.expected)):
            self.wrong.append(found)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_clients_of_all_kinds(model: Path) -> None:
    """Guards: a text that others change, a place that is never free again, memory, threads and
    files that grow with the number of requests."""
    arguments = ("--model", str(model), "--max-queue", "30", "--max-tokens", "3000")
    with serving(*arguments, before=places(6)) as server:
        sizes = []
        for seconds in (20.0, 40.0):
            clients = Clients(server, seconds)
            threads = [threading.Thread(target=clients.run, args=(i,)) for i in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert clients.wrong == []
            assert {200, 400, 413, 429} >= set(clients.statuses)
            assert clients.statuses[200] > 200
            while server.health() != {"status": "ok", "growing": 0, "waiting": 0}:
                time.sleep(0.05)
            sizes.append(resident_bytes(server.process.process))
        assert sizes[1] - sizes[0] < 40 * 2**20
        time.sleep(1)
        assert len(list(Path(f"/proc/{server.process.process}/fd").iterdir())) < 20
