"""Runs of two processes against one: the same losses, weights, scores and files."""

import itertools
import json
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from faults.small import working_in
from interrupting import Where, interrupted, outcome
from ranks import Ranks, checkpoints, train_together
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook

from gptcli import pretrain, stop
from gptcli.cli.main import main
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import DataError
from gptcli.model.gpt import GPT
from gptcli.runs import checkpoint, sharded
from gptcli.runs.run_dir import read_run_json
from gptcli.training import session, stability

STEPS = 20
SETTINGS = ["training.max_steps=20", "training.tokens_per_step=160", "training.micro_batch_size=1"]
SETTINGS += ["model.n_layer=2", "training.save_every=10", "training.eval_every=10"]
WHERE: dict[str, Where] = {"ddp": "behind evaluation", "fsdp": "evaluation"}
ADAMW = ["optimizer.kind=adamw", "optimizer.lr=0.003"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with working_in(tmp_path_factory.mktemp("parallel")) as place:
        yield place


def arguments(run: str, *settings: str) -> list[str]:
    given = [f"--set={setting}" for setting in (*SETTINGS, *settings)]
    return ["pretrain", "tiny.yaml", f"--run-dir={run}", *given]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Path]:
    """A run of one process with each optimizer."""
    kinds = {"muon": [], "adamw": ADAMW}
    for kind, settings in kinds.items():
        assert main([*arguments(kind, *settings), "--quiet"]) == 0
    return {kind: folder / kind for kind in kinds}


def records(run: Path, event: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def furthest(one: Path, two: Path, key: str, event: str = "train") -> float:
    """The most that the figures of two runs' logs differ by."""
    first, second = ([r[key] for r in records(run, event)] for run in (one, two))
    assert len(first) == len(second) > 0
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def stored(run: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.list_checkpoints(run)[-1] / name)


@pytest.mark.parametrize("kind", ["muon", "adamw"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(
    strategy: str, kind: str, alone: dict[str, Path], folder: Path
) -> None:
    """Guards 20 steps of 5 rows, of which one process has 3 and the other 2: losses, gradient norms
    and evaluations within 1e-5, weights and optimizer state close to those of one process."""
    name = f"{strategy}-{kind}"
    settings = ADAMW if kind == "adamw" else []
    said = train_together(arguments(name, f"distributed.strategy={strategy}", *settings))
    assert f"1 threads each of 2 processes, {strategy.upper()}" in said
    run = folder / name
    assert len(records(run, "train")) == STEPS
    assert furthest(alone[kind], run, "loss") < 1e-5
    assert furthest(alone[kind], run, "loss", "eval") < 1e-5
    assert furthest(alone[kind], run, "grad_norm") < 1e-4
    assert checkpoints(run) == checkpoints(alone[kind])
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, two = stored(alone[kind], file), stored(run, file)
        assert one.keys() == two.keys()
        assert max(float((one[k] - two[k].reshape(one[k].shape)).abs().max()) for k in one) < 1e-3
    assert main(["runs", "verify", name]) == 0
    assert read_run_json(run)["choices"]["processes"] == 2


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_stop_of_one_process_stops_all_and_a_resume_is_bit_exact(
    strategy: str, folder: Path
) -> None:
    """Guards that a signal to any of the processes, wherever it is in its work, stops all of them
    at the same step, saved; and that the resumed run ends with the bits, logs and samples of one
    that was not stopped. With dropout, and AdamW, whose step count is restored too."""
    given = [f"distributed.strategy={strategy}", "model.dropout=0.2", *ADAMW]
    train_together(arguments(f"{strategy}-whole", *given))
    line = arguments(f"{strategy}-cut", *given)
    cuts: list[tuple[int, Where]] = [(3, "accumulation"), (5, "update"), (2, WHERE[strategy])]
    for number, (updates, where) in enumerate(cuts):
        asked = {1: interrupted(updates, where).__enter__}
        ranks = Ranks(line + ["--resume"] * (number > 0), before=asked)
        (code, said), (other_code, silent) = ranks.wait()
        assert (code, other_code, silent) == (143, 143, ""), said
        assert "stopped by SIGTERM at step" in said
        assert "--devices 2 --resume" in said
    train_together([*line, "--resume"])
    assert outcome(folder / f"{strategy}-cut") == outcome(folder / f"{strategy}-whole")
    step = stored(folder / f"{strategy}-whole", "optimizer.safetensors")["norm.weight.step"]
    assert step.flatten().tolist() == [STEPS]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_resume_on_another_number_of_processes(strategy: str, folder: Path) -> None:
    """Guards that the order of the data is the same whatever the number of processes: from two to
    one and from one to two, with the losses of a run that was not stopped."""
    constant = ["schedule.kind=constant", f"distributed.strategy={strategy}"]
    straight = arguments(f"{strategy}-s", *constant)
    assert main([*straight, "--quiet"]) == 0
    for name, first, second in (("21", 2, 1), ("12", 1, 2)):
        run = f"{strategy}-{name}"
        half = [*arguments(run, *constant, "training.max_steps=10")]
        rest = [*arguments(run, *constant), "--resume"]
        for size, line in ((first, half), (second, rest)):
            if size == 1:
                assert main([*line, "--quiet"]) == 0
            else:
                train_together(line)
        assert furthest(folder / f"{strategy}-s", folder / run, "loss") < 1e-5
        history = read_run_json(folder / run)["history"]
        assert [entry["event"] for entry in history] == ["start", "finished", "resume", "finished"]


def test_evaluation_is_that_of_one_process(alone: dict[str, Path], folder: Path) -> None:
    """Guards `gpt eval` of two processes: the very figures of one."""
    line = ["eval", f"--model={alone['muon']}", "--data=text.txt", "--stride=8"]
    line += ["--max-tokens=2000", "--run-dir"]
    assert main([*line, "e1"]) == 0
    train_together([*line, "e2"])
    one, two = (
        json.loads((folder / name / "report.json").read_text())["scores"] for name in ("e1", "e2")
    )
    assert {**one, "seconds": 0} == {**two, "seconds": 0}


def test_prompts_are_dealt(
    alone: dict[str, Path], folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Guards `gpt generate` of two processes: the texts of one, in the order of the prompts."""
    lines = [json.dumps({"prompt": f"On day {i} a"}) for i in range(5)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    line = ["generate", f"--model={alone['muon']}", "--prompt-file=prompts.jsonl", "--seed=3"]
    line += ["-n", "2", "--max-new-tokens=6", "--json", "--device=cpu"]
    assert main(line) == 0
    wanted = [json.loads(row) for row in capfd.readouterr().out.splitlines()]
    ranks = Ranks(line)
    out = [process.stdout.read().decode() for process in ranks.processes]
    ends = ranks.wait()
    assert [code for code, _ in ends] == [0, 0], ends
    assert out[1] == ""
    assert [json.loads(row) for row in out[0].splitlines()] == wanted
    assert len(wanted) == 10


def test_what_several_processes_cannot_share(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards flags that would do the same work twice: exit 2, with what to do."""
    assert main(["generate", "--prompt=a", "--devices=2"]) == 2
    assert "--devices goes with --prompt-file FILE" in capsys.readouterr().err
    assert main(["eval", "--task", "--devices=2"]) == 2
    assert "--task is scored by one process" in capsys.readouterr().err


def test_other_data_on_one_process(folder: Path) -> None:
    """Guards that gradients of different texts are never added up: exit 2, said once."""
    (folder / "other.txt").write_text((folder / "text.txt").read_text().replace("cat", "dog"))
    line = arguments("other")
    ranks = Ranks(line, only={1: [*line, "--set=data.train=other.txt"]})
    (code, said), (other_code, silent) = ranks.wait()
    assert (code, other_code, silent) == (2, 2, "")
    assert "error: rank 1 has another config than rank 0" in said
    assert "error: rank 1 has another data than rank 0" in said


def test_a_process_that_fails_alone(folder: Path) -> None:
    """Guards that what one process meets ends the others with its exit code, told by rank 0."""
    line = arguments("alone-fails")
    ranks = Ranks(line, only={1: [*line, "--set=data.train=missing.txt"]})
    (code, said), (other_code, silent) = ranks.wait()
    assert (code, other_code, silent) == (3, 3, "")
    assert "error: rank 1: " in said
    assert "missing.txt" in said


def steep(updates: int) -> Callable[[], None]:
    """For a child: from its update number `updates` on, once, gradients far too large."""

    def install() -> None:
        passes = 0

        def hook(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
            nonlocal passes
            if isinstance(module, torch.nn.Embedding) and module.training:
                passes += 1
                if passes == updates:
                    output.register_hook(lambda grad: grad * 1e4)

        register_module_forward_hook(hook)
        stability._RECENT_STEPS = 4

    return install


def test_all_go_back_from_a_spike(folder: Path) -> None:
    """Guards a rollback of two processes: both go on from the same checkpoint, rank 0 writes, and
    the log has every step once."""
    settings = ["training.spike=rollback", "training.spike_zscore=50", "training.save_every=5"]
    line = arguments("spiky", *settings, "training.tokens_per_step=64")
    ranks = Ranks(line, before={0: steep(0), 1: steep(13)})
    (code, said), other = ranks.wait()
    assert (code, other) == (0, (0, "")), said
    assert "a spike, back to step 10, past these data" in said
    assert [r["step"] for r in records(folder / "spiky", "train")] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records(folder / "spiky", "rollback")] == [10]
    assert main(["runs", "verify", "spiky"]) == 0


def test_clocks_that_differ(folder: Path) -> None:
    """Guards a stop right after a resume: whether the elapsed time alone is worth a save is rank
    0's decision, however long another process was there before."""
    line = arguments("clocks", "schedule.kind=constant")
    train_together(line)

    def early() -> None:
        began = time.monotonic
        session.time = SimpleNamespace(monotonic=lambda: began() + 60 * next(ticks))
        asked.__enter__()

    ticks, asked = itertools.count(), interrupted(0)
    longer = [*line, "--resume", "--set=training.max_steps=30"]
    ranks = Ranks(longer, before={1: early})
    assert [code for code, _ in ranks.wait()] == [143, 143]


def test_a_process_that_fails_before_training(folder: Path) -> None:
    """Guards run.json of a run that another process ended: failed, and why; and a refused resume,
    which leaves its files as they were."""

    def broken() -> None:
        def fail(*_: Any) -> None:
            raise DataError("the disk of rank 1 is gone")

        pretrain.check_same = fail

    line = arguments("peer", "training.max_steps=10")
    (code, said), _ = Ranks(line, before={1: broken}).wait()
    about = read_run_json(folder / "peer")
    assert (code, about["status"]) == (3, "failed")
    assert about["error"] == "rank 1: the disk of rank 1 is gone"
    train_together([*line, "--overwrite"])
    before = [(folder / "peer" / name).read_bytes() for name in ("run.json", "config.yaml")]
    longer = [*line, "--resume", "--set=training.max_steps=12"]
    (code, said), _ = Ranks(longer, before={1: broken}).wait()
    assert (code, "rank 1: the disk of rank 1 is gone" in said) == (3, True)
    after = [(folder / "peer" / name).read_bytes() for name in ("run.json", "config.yaml")]
    assert after == before
    train_together(longer)


def test_a_stop_of_one_process_before_training(folder: Path) -> None:
    """Guards that all take another's stop for what it is: exit 143 and a stopped run."""

    def asked() -> None:
        def fail(*_: Any) -> None:
            stop.request(signal.SIGTERM)
            stop.raise_if_requested()

        pretrain.check_same = fail

    for rank in (0, 1):
        ranks = Ranks(arguments(f"asked-{rank}"), before={rank: asked})
        assert [code for code, _ in ranks.wait()] == [143, 143]
        assert read_run_json(folder / f"asked-{rank}")["status"] == "stopped"


def test_shares_in_many_files(alone: dict[str, Path], folder: Path) -> None:
    """Guards what is put together of files with a few tensors each: the bytes of one file each,
    and a resume from it by one process."""

    def small() -> None:
        sharded._FILE_BYTES = 2**10

    for name, before in (("few", {}), ("many", {0: small, 1: small})):
        line = arguments(name, "distributed.strategy=fsdp")
        (code, said), other = Ranks(line, before=before).wait()
        assert (code, other) == (0, (0, "")), said
    for file in ("model.safetensors", "optimizer.safetensors"):
        few, many = (checkpoint.list_checkpoints(folder / n)[-1] / file for n in ("few", "many"))
        assert few.read_bytes() == many.read_bytes()
        assert stored(folder / "many", file).keys() == stored(alone["muon"], file).keys()
    assert main([*arguments("many", "training.max_steps=22"), "--resume", "--quiet"]) == 0


def test_samples_of_machines_that_round_differently(folder: Path) -> None:
    """Guards texts that all write together: rank 0's logits are what all go on from, or a process
    that finds the text at its end lets the others wait."""
    settings = ["distributed.strategy=fsdp", "samples.n=3", "training.max_steps=2"]
    settings += ["distributed.timeout_seconds=20"]
    train_together(arguments("even", *settings))
    eot = Tokenizer.load(checkpoint.list_checkpoints(folder / "even")[-1] / "tokenizer").eot

    def rough() -> None:
        def hook(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
            if isinstance(module, GPT) and not module.training:
                output[..., eot] += 100.0

        register_module_forward_hook(hook)

    ranks = Ranks(arguments("rough", *settings), before={1: rough})
    (code, text), other = ranks.wait()
    assert (code, other) == (0, (0, "")), text
    even, rough_ones = (
        [json.loads(line)["text"] for line in (folder / run / "samples.jsonl").open()]
        for run in ("even", "rough")
    )
    assert even == rough_ones != []


def test_a_file_limit_under_fsdp(folder: Path) -> None:
    """Guards the message where shares are larger than a file may be: told once, with the way out;
    nothing is left behind."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))

    line = arguments("limited", "distributed.strategy=fsdp")
    (code, said), (other, silent) = Ranks(line, before={0: limited, 1: limited}).wait()
    assert (code, other, silent) == (6, 6, "")
    assert "a file of it is larger than this process may write" in said
    assert "ulimit -f unlimited" in said
    assert not list((folder / "limited" / "checkpoints").glob("*"))
