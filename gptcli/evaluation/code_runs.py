"""Whether generated Python programs run: each in a process of its own, confined by sandbox.py."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 20.0  # of the clock, for one program: only who sleeps comes to it
CPU_SECONDS = 4
MEMORY_BYTES = 512 * 2**20
MOST_SHOWN = 300  # characters of what went wrong
_SANDBOX = Path(__file__).with_name("sandbox.py")  # not imported: Windows cannot
_FENCE = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def code_runs(answer: str, seconds: float = SECONDS) -> str | None:
    """None if the program in `answer` ends by itself without an error, else what went wrong.

    The program is the first fenced block (```), else the whole answer; an empty one does not run.
    It gets an empty folder, no input, no environment, and the limits of sandbox.py.
    """
    fenced = _FENCE.search(answer)
    program = fenced[1] if fenced else answer
    if not program.strip():
        return "no program"
    with tempfile.TemporaryDirectory(prefix="gpt-code-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        file = folder / "answer.py"
        file.write_bytes(program.encode("utf-8", "replace"))
        return _run(file, folder, seconds)


def _run(file: Path, folder: Path, seconds: float) -> str | None:
    command = [sys.executable, "-I", "-S", str(_SANDBOX), file.name]
    with (folder / "stderr").open("w+b") as errors:
        process = subprocess.Popen(
            [*command, str(MEMORY_BYTES), str(CPU_SECONDS)],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"still running after {seconds:g} s"
        finally:
            if sys.platform != "win32":  # which task_scores.py refuses
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code == 0:
            return None
        errors.seek(0)
        said = errors.read(1 << 20).decode("utf-8", "replace").strip().splitlines()
        if said:
            return said[-1][:MOST_SHOWN]
        if code < 0 or code > 128:  # by a signal, which sandbox.py reports as shells do
            return "killed, as by the limits of time and memory"
        return f"exit code {code}"
