"""Signals as schedulers, shells and users send them: rows S1 to S7 of the fault matrix.

Real signals to real processes. Each test names its row and says what the row owes: the exit code,
what is said, and what is kept.
"""

import hashlib
import os
import pkgutil
import random
import shlex
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from outcome import errors
from processes import logged, started, training, until
from pseudo_terminal import Terminal
from small import PROSE, working_in

from gptcli.cli.main import main
from gptcli.data import bpe
from gptcli.runs import checkpoint
from gptcli.runs.metrics import read_metrics
from gptcli.runs.run_dir import read_run_json

Gpt = Callable[..., tuple[int, str, str]]

CODES = {"SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143}
STEPS = 120
LONG = (
    *("pretrain", "tiny.yaml", "--run-dir=r", f"--set=training.max_steps={STEPS}"),
    *("--set=model.dropout=0.1", "--set=training.save_every=1000"),
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the run `LONG` comes to when nobody disturbs it."""
    with working_in(tmp_path_factory.mktemp("straight")) as place:
        assert main([*LONG, "--quiet"]) == 0
    return result(place / "r")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained run."""
    with working_in(tmp_path_factory.mktemp("model")) as place:
        assert main(["pretrain", "tiny.yaml", "--run-dir=r", "--quiet"]) == 0
    return str(place / "r")


def steps_saved(run_dir: Path = Path("r")) -> list[int]:
    """The steps of its checkpoints."""
    return [int(path.name[5:]) for path in checkpoint.list_checkpoints(run_dir)]


def result(run_dir: Path) -> dict[str, Any]:
    """The bytes of the last checkpoint's tensors, and what was logged without its times."""
    last = checkpoint.list_checkpoints(run_dir)[-1]
    files = ("model.safetensors", "optimizer.safetensors")
    found = {name: hashlib.sha256((last / name).read_bytes()).hexdigest() for name in files}
    kept = ("event", "step", "tokens", "epoch", "loss", "lr", "grad_norm", "perplexity")
    lines = [{k: line[k] for k in kept if k in line} for line in read_metrics(run_dir)]
    return {**found, "step": last.name, "metrics": lines}


def command_shown(err: str) -> list[str]:
    """The arguments of the command that the last line says continues the run."""
    return shlex.split(err.splitlines()[-1].split("to continue: gpt ")[1])


def stopped_at_random(times: int, straight: dict[str, Any]) -> None:
    """`LONG`, ended by SIGTERM `times` times, each time resumed by the command that is printed."""
    arguments, stops, delays = list(LONG), 0, random.Random(times)
    while stops < times:
        before = logged(Path("r"))
        with started(*arguments) as child:
            until(lambda: logged(Path("r")) > before)  # noqa: B023
            time.sleep(delays.uniform(0, 0.05))
            child.send(signal.SIGTERM)
            code, err = child.wait()
        assert code == 143, err
        step = steps_saved()[-1]
        assert err.splitlines()[-1].startswith(f"stopped by SIGTERM at step {step}; to continue: ")
        assert read_run_json(Path("r"))["status"] == "stopped"
        arguments, stops = [*command_shown(err), *LONG[3:]], stops + 1
    with started(*arguments) as child:
        code, err = child.wait()
    assert code == 0, err
    assert result(Path("r")) == straight


def test_s01_sigterm_while_training(straight: dict[str, Any]) -> None:
    """S1: the step ends, the run is saved, exit 143; the command that is printed continues it, and
    it ends with the bits, weights and optimizer, of a run that nobody stopped."""
    stopped_at_random(2, straight)


@pytest.mark.slow
def test_s01_sigterm_again_and_again(straight: dict[str, Any]) -> None:
    """S1: so does a run that is stopped ten times, at any moment."""
    stopped_at_random(10, straight)


def signalled_in(name: str, call: int = 1) -> Callable[[], None]:
    """What sends SIGTERM to its process in the given call of a function, and notes each call."""

    def patch() -> None:
        place, _, attribute = name.rpartition(".")
        owner = pkgutil.resolve_name(place)
        real, calls = getattr(owner, attribute), 0

        def counted(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            Path("calls").write_text(str(calls))
            if calls == call:
                Path("sent").write_text(str(time.monotonic()))
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*given, **named)

        setattr(owner, attribute, counted)

    return patch


def many_files() -> None:
    Path("many").mkdir()
    for i in range(40):
        Path(f"many/{i}.txt").write_text(f"{i} " + PROSE)


TEXTS = "--set=data.train=many"
BPE = "--set=tokenizer={kind: bpe, vocab_size: 300}"
LONGER = ("--set=training.micro_batch_size=auto", "--set=training.max_steps=1000000")
PHASES = {
    "scanning": ("gptcli.data.scan.SourceScan.scan", 2, (TEXTS,)),
    "tokenising": ("gptcli.data.tokenizer.Tokenizer.encode_numpy", 2, (TEXTS, BPE)),
    "the first steps": ("gptcli.training.tuning._timed", 3, LONGER),
}


@pytest.mark.parametrize("phase", PHASES)
def test_s02_sigterm_before_training(
    phase: str, gpt: Gpt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S2: while texts are scanned or tokenised, or the first steps are timed, exit 143 within a
    moment: nothing else is begun, and the directory can be used again. A first step that is being
    compiled ends first, which may take half a minute: torch.compile does not look for signals."""
    monkeypatch.setenv("GPT_CACHE", str(folder / "cache"))
    name, call, flags = PHASES[phase]
    many_files()
    arguments = ("pretrain", "tiny.yaml", "--run-dir=r", *flags)
    with started(*arguments, before=signalled_in(name, call)) as child:
        code, err = child.wait()
    assert time.monotonic() - float(Path("sent").read_text()) < 2
    assert code == 143, err
    assert err.splitlines()[-1] == "stopped by SIGTERM"
    assert int(Path("calls").read_text()) <= call + 1
    assert read_run_json(folder / "r")["status"] == "stopped"
    assert steps_saved() == []
    code, _, err = gpt(*arguments, "--set=training.max_steps=4")
    assert code == 0, err


def words(count: int) -> str:
    """Words that hardly come again, which a BPE has long to learn from."""
    letters = random.Random(0).randbytes(count * 5).hex().translate(LETTERS)
    return " ".join(letters[i : i + 10] for i in range(0, len(letters), 10))


LETTERS = str.maketrans("0123456789", "ghijklmnop")


def test_s02_sigterm_while_a_tokenizer_is_trained(folder: Path) -> None:
    """S2: also while the tokenizer is trained, by a library that does not come back to Python for
    minutes: exit 143 within a second or two, and no tokenizer is left that knows a part of the
    text."""
    (folder / "words.txt").write_text(words(400_000))

    def patch() -> None:
        real = bpe._first_bytes

        def read(texts: Iterable[str], most: int) -> Iterator[str]:
            yield from real(texts, most)
            os.kill(os.getpid(), signal.SIGTERM)  # from here on the library merges, for 10 seconds
            Path("sent").touch()

        bpe._first_bytes = read

    given = ("tokenizer", "train", "words.txt", "--vocab-size=60000", "--out=t")
    with started(*given, before=patch) as child:
        until(Path("sent").exists)
        began = time.monotonic()
        code, err = child.wait()
    assert time.monotonic() - began < 4
    assert code == 143, err
    assert err.splitlines()[-1] == "stopped by SIGTERM"
    assert not (folder / "t").exists()


@pytest.mark.parametrize(
    "name", ["gptcli.evaluation.perplexity.score_tokens", "gptcli.training.samples.encode_prompt"]
)
def test_s02_sigterm_in_an_evaluation(name: str, gpt: Gpt) -> None:
    """S2: a stop while the validation part is scored, or samples are written, saves the run; the
    evaluation leaves no trace, and is done by the run that goes on."""
    flags = ("--set=samples.n=500", "--set=samples.max_new_tokens=500")
    arguments = ("pretrain", "tiny.yaml", "--run-dir=r", *flags)
    with started(*arguments, before=signalled_in(name)) as child:
        code, err = child.wait()
    assert code == 143, err
    assert "evaluation interrupted" in err
    assert err.splitlines()[-1].startswith("stopped by SIGTERM at step 0; to continue: ")
    assert int(Path("calls").read_text()) == 1
    assert read_metrics(Path("r")) == []
    code, _, err = gpt(*command_shown(err), "--set=samples.n=1", "--set=samples.max_new_tokens=1")
    assert code == 0, err
    assert [r["step"] for r in read_metrics(Path("r")) if r["event"] == "eval"] == [0, 4]


@pytest.mark.parametrize("number", CODES)
def test_s02_a_signal_while_generating(number: str, model: str) -> None:
    """S2: `gpt generate` ends within a token, with the code of the signal; what was written
    stays."""
    # Greedy, because a sampled eot would end the text before the signal comes.
    endless = ("--prompt=x", "--temperature=0", "--max-new-tokens=9999999")
    with started("generate", f"--model={model}", *endless) as child:
        assert child.stdout.read(4).startswith(b"x")
        child.send(signal.Signals[number])
        began = time.monotonic()
        child.stdout.read()
        code, err = child.wait()
    assert time.monotonic() - began < 5
    assert code == CODES[number], err
    assert err.splitlines()[-1] == f"stopped by {number}"


def test_s02_a_signal_while_evaluating(model: str, folder: Path) -> None:
    """S2: `gpt eval` ends with exit 143 and leaves no half report."""
    many_files()
    scoring = signalled_in("gptcli.evaluation.perplexity.score_tokens")
    given = ("eval", f"--model={model}", "--data=many", "--run-dir=e")
    with started(*given, before=scoring) as child:
        code, err = child.wait()
    assert code == 143, err
    assert err.splitlines()[-1] == "stopped by SIGTERM"
    assert int(Path("calls").read_text()) == 1
    assert not (folder / "e").exists()


def test_s03_ctrl_c_once() -> None:
    """S3: says that it saves and that Ctrl-C again quits, saves, ends with exit 130 and the command
    that continues."""
    flags = ("--set=training.max_steps=1000000", "--set=training.save_every=1000000")
    terminal = Terminal("pretrain", "tiny.yaml", "--run-dir=r", *flags)
    terminal.until("step 3/")
    terminal.press(b"\x03")
    assert terminal.wait() == 130
    assert "stopping, and saving what there is to save; Ctrl-C again quits at once\n" in (
        terminal.shown
    )
    step = steps_saved()[-1]
    assert step >= 3
    last = terminal.shown.splitlines()[-1]
    assert last.startswith(f"stopped by SIGINT at step {step}; to continue: gpt pretrain ")


def slow_save(after: int, name: str = "swap_in") -> Callable[[], None]:
    """A save behind step `after` waits before its last move, until the file `go` is there."""

    def patch() -> None:
        real = getattr(checkpoint, name)

        def waiting(temp: Path, target: Path) -> None:
            if int(target.name[5:]) > after:
                Path("saving").touch()
                until(Path("go").exists, 60)
            real(temp, target)

        setattr(checkpoint, name, waiting)

    return patch


def test_s03_ctrl_c_twice(gpt: Gpt) -> None:
    """S3: the second Ctrl-C ends at once with exit 130, be it in the middle of a save: nothing half
    is published, and the run goes on from the checkpoint before."""
    flags = ("--set=training.max_steps=1000000", "--set=training.save_every=1000000")
    terminal = Terminal("pretrain", "tiny.yaml", "--run-dir=r", *flags, before=slow_save(0))
    terminal.until("step 3/")
    terminal.press(b"\x03")
    terminal.until("Ctrl-C again quits at once")
    until(Path("saving").exists)
    terminal.press(b"\x03")
    began = time.monotonic()
    assert terminal.wait() == 130
    assert time.monotonic() - began < 2
    assert steps_saved() == [0]
    assert list(Path("r/checkpoints").glob(".tmp-*"))
    code, _, err = gpt("pretrain", "tiny.yaml", "--run-dir=r", "--resume")
    assert code == 0, err
    assert steps_saved()[-1] == 4
    assert not list(Path("r/checkpoints").glob(".tmp-*"))


def test_s04_a_dropped_connection(gpt: Gpt) -> None:
    """S4: SIGHUP saves and ends with exit 129; the run can be continued."""
    with training(Path("r")) as child:
        child.send(signal.SIGHUP)
        code, err = child.wait()
    assert code == 129, err
    step = steps_saved()[-1]
    assert err.splitlines()[-1].startswith(f"stopped by SIGHUP at step {step}; to continue: gpt ")
    code, _, err = gpt(*command_shown(err), f"--set=training.max_steps={step + 1}")
    assert code == 0, err


def test_s04_nohup() -> None:
    """S4: under nohup the run goes on when the connection ends."""
    flags = ("--set=training.max_steps=1000000", "--set=training.save_every=1000000")

    def ignoring() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with started("pretrain", "tiny.yaml", "--run-dir=r", *flags, before=ignoring) as child:
        until(lambda: logged(Path("r")) >= 1)
        child.send(signal.SIGHUP)
        before = logged(Path("r"))
        until(lambda: logged(Path("r")) > before + 2)
        child.send(signal.SIGTERM)
        assert child.wait()[0] == 143


def test_s05_save_now() -> None:
    """S5: SIGUSR1 saves after the step, and the run goes on."""
    with training(Path("r")) as child:
        assert steps_saved() == [0]
        child.send(signal.SIGUSR1)
        until(lambda: len(steps_saved()) == 2)
        saved = steps_saved()[-1]
        until(lambda: logged(Path("r")) > saved + 2)
        assert steps_saved() == [0, saved]
        child.send(signal.SIGTERM)
        assert child.wait()[0] == 143


def test_s05_where_there_is_nothing_to_save(model: str) -> None:
    """S5: a SIGUSR1 to a command that saves nothing changes nothing: it would kill by default."""
    given = ("generate", f"--model={model}", "--prompt=x", "--max-new-tokens=2000", "--seed=1")
    with started(*given) as child:
        assert child.stdout.read(1) == b"x"
        child.send(signal.SIGUSR1)
        text = child.stdout.read()
        code, err = child.wait()
    assert code == 0, err
    with started(*given) as child:
        assert child.stdout.read() == b"x" + text


def test_s06_signals_in_the_middle_of_a_save(gpt: Gpt) -> None:
    """S6: SIGTERM, again SIGTERM and SIGHUP during a save wait until it is whole: it is published,
    the exit code is that of the last, and the run goes on from it."""
    flags = ("--set=training.max_steps=1000000", "--set=training.save_every=3")
    with started(*("pretrain", "tiny.yaml", "--run-dir=r", *flags), before=slow_save(0)) as child:
        until(Path("saving").exists)
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            child.send(number)
            time.sleep(0.02)
        assert steps_saved() == [0]
        Path("go").touch()
        code, err = child.wait()
    assert code == 129, err
    assert steps_saved()[-1] >= 3
    assert gpt("runs", "verify", "r")[0] == 0
    assert err.splitlines()[-1].startswith(f"stopped by SIGHUP at step {steps_saved()[-1]}; ")
    assert not list(Path("r/checkpoints").glob(".*"))
    more = f"--set=training.max_steps={steps_saved()[-1] + 1}"
    code, _, err = gpt(*command_shown(err), more)
    assert code == 0, err


def rained_on(times: int, gpt: Gpt) -> None:
    """A run that saves at every step, ended by two SIGTERMs at random moments, `times` times."""
    flags = ("--set=training.max_steps=1000000", "--set=training.save_every=1", "--auto-resume")
    delays = random.Random(times)
    for _ in range(times):
        before = logged(Path("r"))
        with started("pretrain", "tiny.yaml", "--run-dir=r", *flags) as child:
            until(lambda: logged(Path("r")) > before)  # noqa: B023
            for _ in range(2):
                time.sleep(delays.uniform(0, 0.03))
                child.send(signal.SIGTERM)
            code, err = child.wait()
        assert code == 143, err
        assert steps_saved()[-1] > before
        assert not list(Path("r/checkpoints").glob(".*"))
    code, out, err = gpt("runs", "verify", "r")
    assert code == 0, out + err


def test_s06_signals_around_saves(gpt: Gpt) -> None:
    """S6: two SIGTERMs at any moment of a run that saves all the time leave whole checkpoints
    alone, and the last step is saved."""
    rained_on(3, gpt)


@pytest.mark.slow
def test_s06_signals_around_many_saves(gpt: Gpt) -> None:
    """S6: the same, 25 times."""
    rained_on(25, gpt)


def test_s07_kill_and_a_cut_line(
    straight: dict[str, Any], gpt: Gpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S7: behind a SIGKILL, with a log whose last line is cut, `gpt runs` lists, shows and verifies
    the run, and generate, eval and explain take its model; the resume cuts the log back to its
    checkpoint and ends with the bits of a run that nobody killed."""
    saving = (*LONG[:-1], "--set=training.save_every=20")
    with started(*saving) as child:
        until(lambda: logged(Path("r")) > 30)
        child.send(signal.SIGKILL)
        assert child.wait()[0] == -signal.SIGKILL
    saved, log = steps_saved()[-1], Path("r/metrics.jsonl")
    assert saved > 0
    log.write_bytes(log.read_bytes()[:-9])
    assert not log.read_text().endswith("\n")
    monkeypatch.setenv("GPT_RUNS", ".")
    for command in (
        ("runs", "show", "r"),
        ("runs", "list"),
        ("runs", "verify", "r"),
        ("runs", "prune", "r"),
        ("generate", "--model=r", "--prompt=x", "--max-new-tokens=1"),
        ("eval", "--model=r", "--data=text.txt", "--max-tokens=64"),
        ("explain", "--model=r", "--text=On day 1"),
    ):
        code, out, err = gpt(*command)
        assert (code, errors(err)) == (0, []), (command, err)
        assert out or command[1] == "prune", command
    code, _, err = gpt(*saving, "--resume")
    assert code == 0, err
    assert result(Path("r")) == straight
