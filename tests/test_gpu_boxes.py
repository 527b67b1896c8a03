"""scripts/gpu_box.sh, slurm.sh and spot.sh: what they start, pass on and start again. First with a
`gpt` that only says what it was told; the slow ones train, in two processes on the CPU."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from doc_lines import lines
from faults.processes import logged, until
from faults.small import working_in
from interrupting import outcome
from ranks import train_together

ROOT = Path(__file__).parents[1]
PATIENCE = 120
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

# One process for each node, as srun starts them; scancel tells them, and only them.
SRUN = """
while case $1 in --*) true ;; *) false ;; esac; do shift; done
trap : TERM; : >tasks; highest=0
for node in $(seq "$SLURM_NNODES"); do "$@" & echo $! >>tasks; done
for task in $(cat tasks); do
    while :; do code=0; wait "$task" || code=$?; kill -0 "$task" 2>/dev/null || break; done
    [ $code -le $highest ] || highest=$code
done
exit $highest
"""
SCANCEL = 'echo "scancel $*" >>slurm.log; kill -TERM $(cat tasks)'
SCONTROL = """
if [ "$1" = show ]; then echo "JobState=$(cat state 2>/dev/null || echo RUNNING)"
else echo "$*" >>slurm.log; fi
"""
# Says what it was told and ends as the file `codes` says, line by line; "wait": at a SIGTERM.
GPT = """
echo "$*" >>told
code=$(head -n 1 codes); sed -i 1d codes
[ "$code" = wait ] || exit "${code:-0}"
trap 'sleep 0.3; echo saved >>told; exit 143' TERM
echo waits >>waits
while :; do sleep 0.05; done
"""


class Box:
    """A folder with a config, in which the scripts find an environment that looks installed."""

    def __init__(self, place: Path) -> None:
        self.place, self.binaries = place, place / "environment" / "bin"
        self.binaries.mkdir(parents=True)
        shutil.copytree(ROOT / "scripts", place / "scripts", ignore=lambda *_: ["__pycache__"])
        shutil.copy(ROOT / "pyproject.toml", place)
        shutil.copy(ROOT / "setup.py", place)
        self.program("python", f'exec "{sys.executable}" "$@"', shell="/bin/sh")
        line = f'. scripts/setup.sh; fingerprint "{self.binaries}/python"'
        found = subprocess.run(
            ["bash", "-c", line], cwd=place, capture_output=True, text=True, check=True
        )
        (place / "environment" / "gptcli-setup").write_text(found.stdout + "\n")
        own = {"GPT_VENV": str(place / "environment"), "OMP_NUM_THREADS": "1", "DEVICES": "2"}
        path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(path)}
        self.environment |= {"PROVIDER": "none", "BACKOFF": "0", "POLL": "0.1"}

    def program(self, name: str, text: str, shell: str = "/bin/bash") -> None:
        (self.binaries / name).write_text(f"#!{shell}\n{text}\n")
        (self.binaries / name).chmod(0o755)

    def slurm(self, nodes: int) -> None:
        for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
            self.program(name, text)
        with socket.socket() as free:  # of those that the number of a job leads to
            free.bind(("127.0.0.1", 0))
            job = free.getsockname()[1] % 3000
        self.environment |= {"SLURM_JOB_ID": str(job), "SLURM_SUBMIT_DIR": str(self.place)}
        self.environment |= {"SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "localhost"}

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", f"scripts/{script}", *arguments],
            cwd=self.place,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, script: str, *arguments: str, **environment: str) -> tuple[int, str]:
        return ended(self.start(script, *arguments, **environment))

    def ends_with(self, *codes: str | int) -> None:
        """What `gpt` ends with, time after time."""
        self.program("gpt", GPT)
        (self.place / "codes").write_text("".join(f"{code}\n" for code in codes))

    def lines(self, name: str) -> list[str]:
        path = self.place / name
        return path.read_text().splitlines() if path.exists() else []


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, said


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def test_one_box_starts_a_process_for_each_device(box: Box) -> None:
    """Guards the command lines, which start again what they began: --auto-resume and a run
    directory that is always the same; and those of finetuning, torchrun and several boxes."""
    box.ends_with()
    shared = "tiny --run-dir runs/tiny --auto-resume"
    asked = {
        f"pretrain {shared} --set seed=3 --devices 2": {},
        f"pretrain {shared} --set training.device=cpu --set seed=3 --devices 2": {"DEVICE": "cpu"},
        "finetune tiny --run-dir r --auto-resume --set seed=3 --devices 2": {
            "JOB": "finetune",
            "RUN": "r",
        },
        f"pretrain {shared} --set seed=3 --devices 2 --nodes 2@here:29400": {
            "NODES": "2@here:29400"
        },
    }
    for given in asked.values():
        code, said = box.run("gpu_box.sh", "tiny", "--set", "seed=3", **given)
        assert code == 0, said
    assert box.lines("told") == list(asked)
    box.program("torchrun", 'echo "$*" >>told')
    assert box.run("gpu_box.sh", "tiny", TORCHRUN="1")[0] == 0
    assert box.lines("told")[-1] == f"--standalone --nproc-per-node 2 -m gptcli pretrain {shared}"


def test_what_is_missing_is_said(box: Box) -> None:
    """Guards against a night in the queue for a job that cannot start."""
    assert "error: which config? bash scripts/gpu_box.sh CONFIG" in box.run("gpu_box.sh")[1]
    code, said = box.run("slurm.sh", "tiny")
    assert (code, "error: this is no Slurm job: sbatch scripts/slurm.sh CONFIG" in said) == (
        1,
        True,
    )
    code, said = box.run("spot.sh", "tiny", PROVIDER="amazon")
    assert code == 1
    assert "error: PROVIDER=amazon is not one of aws, gcp, azure, none" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_box_without_a_gpu(box: Box) -> None:
    """Guards against days of training on a processor because the driver is missing."""
    code, said = box.run("gpu_box.sh", "tiny", DEVICES="")
    assert (code, "error: torch finds no GPU here" in said) == (1, True)


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 6, 143])
def test_slurm_queues_again_what_goes_on(code: int, box: Box) -> None:
    """Guards that a saved run and a lost rank go back to the queue, and that nothing does which
    would fail again, or which somebody cancelled."""
    box.ends_with(code, code)
    box.slurm(1)
    job = box.environment["SLURM_JOB_ID"]
    (box.place / "state").write_text("COMPLETING")
    assert box.run("slurm.sh", "tiny")[0] == code
    assert box.lines("slurm.log") == []
    (box.place / "state").write_text("RUNNING")
    again = code in (6, 137, 143)
    assert box.run("slurm.sh", "tiny")[0] == (0 if again else code)
    assert box.lines("slurm.log") == [f"requeue {job}"] * again
    line = f"pretrain tiny --run-dir runs/slurm-{job} --auto-resume --devices 2 --nodes slurm"
    assert box.lines("told") == [line] * 2


def test_slurm_gives_up_after_some_lost_ranks_in_a_row(box: Box) -> None:
    """Guards against a broken node that a job comes back to for ever; a job that was preempted in
    between is no such case."""
    codes = [6, 6, 143, 6, 6, 6, 0]
    box.ends_with(*codes)
    box.slurm(1)
    found = [box.run("slurm.sh", "tiny", RETRIES="2")[0] for _ in codes]
    assert found == [0, 0, 0, 0, 0, 6, 0]
    assert len(box.lines("slurm.log")) == 5


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_slurm_waits_for_the_save(name: str, box: Box) -> None:
    """Guards that a signal before the end reaches the processes as SIGTERM, not srun, which would
    kill them; and that the job goes back to the queue only when they have saved."""
    box.ends_with("wait", "wait")
    box.slurm(2)
    job = box.start("slurm.sh", "tiny")
    until(lambda: len(box.lines("waits")) == 2, PATIENCE)
    job.send_signal(signal.Signals[name])
    assert ended(job)[0] == 0
    number = box.environment["SLURM_JOB_ID"]
    assert box.lines("slurm.log") == [f"scancel --signal=TERM {number}", f"requeue {number}"]
    assert box.lines("told")[2:] == ["saved"] * 2


class _Metadata(BaseHTTPRequestHandler):
    """The metadata service of AWS, Google and Azure, each as its documentation has it."""

    provider, taken = "aws", False

    def do_PUT(self) -> None:
        asked = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        fits = self.provider == "aws" and asked and self.path == "/latest/api/token"
        self._answer("a-token" if fits else None)

    def do_GET(self) -> None:
        answers = {
            ("aws", "/latest/meta-data/spot/instance-action", "X-aws-ec2-metadata-token"): (
                '{"action": "terminate"}' if self.taken else None
            ),
            ("gcp", "/computeMetadata/v1/instance/preempted", "Metadata-Flavor"): (
                "TRUE" if self.taken else "FALSE"
            ),
            ("azure", "/metadata/scheduledevents?api-version=2020-07-01", "Metadata"): (
                '{"Events": [{"EventType": "%s"}]}' % ("Preempt" if self.taken else "Reboot")
            ),
        }
        found = [
            answer
            for (provider, path, header), answer in answers.items()
            if provider == self.provider and path == self.path and self.headers.get(header)
        ]
        self._answer(found[0] if found else None)

    def _answer(self, text: str | None) -> None:
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def metadata() -> Iterator[tuple[str, type[_Metadata]]]:
    class Own(_Metadata):
        pass

    with HTTPServer(("127.0.0.1", 0), Own) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", Own
        server.shutdown()


@pytest.mark.parametrize("provider", ["aws", "gcp", "azure"])
def test_a_spot_machine_is_taken(
    provider: str, box: Box, metadata: tuple[str, type[_Metadata]]
) -> None:
    """Guards the two minutes (or 30 seconds) between the notice and the end: the run is saved, and
    copied when it is. Nothing is told before there is a notice, and who answers is found out."""
    address, service = metadata
    service.provider = provider
    box.ends_with("wait")
    given = {"METADATA": address, "PROVIDER": "", "FETCH": 'echo "fetch $RUN" >>told'}
    process = box.start("spot.sh", "tiny", **given, SYNC='echo "sync $RUN" >>told')
    until((box.place / "waits").exists, PATIENCE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.4)
    service.taken = True
    code, said = ended(process)
    assert code == 143
    assert f"notices: {provider}" in said
    assert said.count(f"{provider} takes this machine; the run is saved") == 1
    line = "pretrain tiny --run-dir runs/tiny --auto-resume --devices 2"
    assert box.lines("told") == ["fetch runs/tiny", line, "saved", "sync runs/tiny"]


def test_spot_starts_again_what_lost_a_rank(box: Box) -> None:
    """Guards that a lost rank does not end a night's run, nor a broken machine go on for ever, and
    that what would fail again is not begun again."""
    for codes, times, expected in (
        ([6, 137, 0], 3, 0),
        ([6, 6, 6, 6], 3, 6),
        ([6, 2], 2, 2),
        ([5], 1, 5),
    ):
        (box.place / "told").unlink(missing_ok=True)
        box.ends_with(*codes)
        code, said = box.run("spot.sh", "tiny", RETRIES="2")
        assert (code, len(box.lines("told"))) == (expected, times), said


def test_spot_syncs_meanwhile_and_ends_when_told(box: Box) -> None:
    """Guards the copies that are left where no notice comes; and a SIGTERM to the script."""
    box.ends_with("wait")
    given = {"SYNC": "echo sync >>told", "SYNC_SECONDS": "1"}
    process = box.start("spot.sh", "tiny", **given)
    until(lambda: "sync" in box.lines("told"), PATIENCE)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143
    assert box.lines("told")[-2:] == ["saved", "sync"]


def test_spot_without_its_run(box: Box) -> None:
    """Guards against beginning from nothing what is only out of reach, and copying that over it."""
    box.ends_with(0)
    code, said = box.run("spot.sh", "tiny", FETCH="false", SYNC="touch copied")
    assert (code, "error: FETCH failed" in said) == (1, True)
    assert box.lines("told") == []
    assert not (box.place / "copied").exists()


STEPS = 300
SETTINGS = ["--set", f"training.max_steps={STEPS}", "--set", "training.save_every=1000"]


@pytest.fixture
def trains(box: Box) -> Iterator[Box]:
    """A box on which `gpt` trains."""
    with working_in(box.place):
        for name in ("gpt", "torchrun"):
            module = "gptcli" if name == "gpt" else "torch.distributed.run"
            box.program(name, f'exec "{sys.executable}" -m {module} "$@"')
        box.environment |= {"DEVICE": "cpu", "GPT_RUNS": "runs"}
        yield box


def undisturbed(run: str) -> None:
    """The same run of two processes, which nobody stops."""
    train_together(["pretrain", "tiny.yaml", f"--run-dir={run}", *SETTINGS])


@pytest.mark.slow
def test_one_box_trains(trains: Box) -> None:
    """Guards the whole way, by --devices and by torchrun; the second finds the run finished."""
    undisturbed("runs/straight")
    code, said = trains.run("gpu_box.sh", "tiny.yaml", *SETTINGS)
    assert code == 0, said
    assert outcome(Path("runs/tiny")) == outcome(Path("runs/straight"))
    code, said = trains.run("gpu_box.sh", "tiny.yaml", *SETTINGS, TORCHRUN="1")
    assert code == 0, said
    assert "nothing to do: runs/tiny is at its limit" in said


@pytest.mark.slow
def test_slurm_trains_on_two_nodes_and_goes_on_after_a_preemption(trains: Box) -> None:
    """Guards the whole way of two launchers that meet as Slurm says: preempted in the middle,
    queued again, and ended with the bits of a run that was not."""
    trains.slurm(2)
    undisturbed("runs/straight")
    run = Path(f"runs/slurm-{trains.environment['SLURM_JOB_ID']}")
    given = {"DEVICES": "1"}
    job = trains.start("slurm.sh", "tiny.yaml", *SETTINGS, **given)
    until(lambda: logged(run) >= 20, PATIENCE)
    job.send_signal(signal.SIGUSR1)
    code, said = ended(job)
    assert code == 0, said
    assert "stopped by SIGTERM at step" in said
    assert 20 <= logged(run) < STEPS
    assert trains.lines("slurm.log")[-1].startswith("requeue ")
    code, said = trains.run("slurm.sh", "tiny.yaml", *SETTINGS, **given, SLURM_RESTART_COUNT="1")
    assert code == 0, said
    assert outcome(run) == outcome(Path("runs/straight"))


@pytest.mark.slow
def test_a_spot_machine_trains_and_goes_on_elsewhere(
    trains: Box, metadata: tuple[str, type[_Metadata]]
) -> None:
    """Guards the whole way from the notice to another machine, which has only the copy."""
    undisturbed("runs/straight")
    address, service = metadata
    given = {"METADATA": address, "PROVIDER": "aws", "SYNC": 'cp -r "$RUN" copy'}
    process = trains.start("spot.sh", "tiny.yaml", *SETTINGS, **given)
    until(lambda: logged(Path("runs/tiny")) >= 20, PATIENCE)
    service.taken = True
    code, said = ended(process)
    assert code == 143, said
    shutil.rmtree("runs/tiny")
    service.taken = False
    given |= {"FETCH": 'cp -r copy "$RUN"', "SYNC": ""}
    code, said = trains.run("spot.sh", "tiny.yaml", *SETTINGS, **given)
    assert code == 0, said
    assert outcome(Path("runs/tiny")) == outcome(Path("runs/straight"))


def box_lines() -> list[str]:
    """The commands of the pages that need GPUs, those that train first."""
    found = [line.text for line in lines() if "GPUs;" in (line.reason or "")]
    found = [line for line in dict.fromkeys(found) if not line.startswith("@reboot")]
    return sorted(found, key=lambda line: " eval " in line)


@pytest.mark.slow
def test_the_lines_of_the_pages(trains: Box) -> None:
    """Guards every line that the pages give, with a small config and two processes on the CPU."""
    trains.slurm(2)
    trains.program("aws", 'for word; do [ ! -d "$word" ] || cp -r "$word" copied; done')
    steps = "--set training.max_steps=20 --set training.device=cpu"
    for number, line in enumerate(box_lines()):
        for given, here in (
            ("gpt2-124m", "tiny.yaml"),
            (" 8 ", " 2 "),
            ("node01", "127.0.0.1"),
            ("10.0.0.1", "127.0.0.1"),
            ("MODEL", "runs/trained"),
            ("book.txt", "text.txt"),
        ):
            line = f"{line} ".replace(given, here).strip()
        line = re.sub(r"^sbatch( --\S+)*", "bash", line)
        if " eval " not in line:
            line += f" {steps}"
        boxes = 2 if "NODES=" in line else 1
        each = "1" if boxes == 2 or "slurm" in line else "2"
        environment = {**trains.environment, "DEVICES": each, "GPT_RUNS": f"runs-{number}"}
        environment["PATH"] = f"{trains.binaries}{os.pathsep}{environment['PATH']}"
        started = [
            subprocess.Popen(
                ["bash", "-c", line],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in range(boxes)
        ]
        found = [ended(process) for process in started]
        assert [code for code, _ in found] == [0] * boxes, found
        said = "".join(text for _, text in found)
        if " eval " not in line:
            assert "each of 2 processes" in said, line
            (run,) = Path(f"runs-{number}").glob("*/config.yaml")
        if number == 0:
            shutil.copytree(run.parent, "runs/trained")
    assert Path("copied/report.json").exists() or Path("copied/run.json").exists()
