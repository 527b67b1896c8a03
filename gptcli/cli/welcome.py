"""What `gpt` alone says: what to do next, from what is there."""

import shlex
from pathlib import Path

from gptcli.cli.terminal import columns
from gptcli.runs.listing import RunSummary, summarise
from gptcli.runs.metrics import read_samples
from gptcli.runs.run_dir import has_checkpoint, resume_line, runs_by_age, runs_root

_PROMPT = "Once upon a time"
_LONGEST_PROMPT = 40
_LEAST_TEXT_BYTES = 2_000  # a note or a list of packages is no corpus
_NO_CORPUS = ("requirements", "license", "readme", "robots")
_HELP = [
    ["all commands", "gpt --help"],
    ["this machine", "gpt doctor"],
]


def next_steps(folder: Path) -> str:
    """A few commands that fit the runs under the runs root and the texts of `folder`."""
    try:
        runs = [run for run, _ in runs_by_age(runs_root())]
    except OSError:  # of a folder that may not be read
        runs = []
    if not runs:
        return _first_steps(folder)
    said, steps = [], list[list[str]]()
    newest = summarise(runs[-1])
    said.append(_standing(newest))
    if newest.status == "running":
        steps += _while_running(newest.path)
    elif newest.status != "finished":
        steps += _to_go_on(newest)
    usable = next((run for run in reversed(runs) if has_checkpoint(run)), None)
    if usable is not None:
        if usable != newest.path:
            said.append(_standing(summarise(usable)))
        steps += _with_model(usable)
    else:
        steps += _training(folder)
    return _page(" ".join(said), steps)


def _first_steps(folder: Path) -> str:
    about = f"gpt trains, measures and runs GPT language models. No runs in {runs_root()}/ yet."
    plan = ["what that takes", "gpt plan small"]
    return _page(about, [*_training(folder), plan])


def _training(folder: Path) -> list[list[str]]:
    small = ["a first model", "gpt pretrain small"]
    text = _largest_text(folder)
    if text is None:
        own = ["of your own text", "gpt pretrain book.txt"]
        return [small, own]
    own = ["a model of your text", f"gpt pretrain {_quoted(text)}"]
    return [own, small]


def _standing(run: RunSummary) -> str:
    how = {"killed": "was killed", "stopped": "was stopped", "running": "is running"}
    text = f"{run.path} {how.get(run.status, run.status)}"
    if run.status != "finished" and run.step is not None:
        text += f" at step {run.step}"
    if run.status != "finished" and run.progress is not None:
        text += f", {100 * run.progress:.0f} % done"
    if run.status == "failed" and (error := str(run.about.get("error") or "")):
        text += f": {error.splitlines()[0][:100]}"
    elif run.bits_per_byte is not None:
        text += f", {run.bits_per_byte:.3f} bits a byte"
    return text + "."


def _while_running(path: Path) -> list[list[str]]:
    run = _quoted(path)
    return [
        ["follow it", f"gpt runs tail {run}"],
        ["save and stop it", f"gpt runs stop {run}"],
    ]


def _to_go_on(run: RunSummary) -> list[list[str]]:
    job = "finetune" if run.about.get("job") == "finetune" else "pretrain"
    if has_checkpoint(run.path):
        return [["go on with it", resume_line(job, run.path)]]
    if (run.path / "config.yaml").is_file():
        return [["try again", f"gpt {job} {_quoted(run.path / 'config.yaml')}"]]
    return []


def _with_model(path: Path) -> list[list[str]]:
    run = _quoted(path)
    return [
        ["let it write", f"gpt generate --model {run} --prompt {shlex.quote(_prompt(path))}"],
        ["talk with it", f"gpt chat --model {run}"],
        ["score it", f"gpt eval --model {run}"],
        ["its report", f"gpt runs report {run}"],
    ]


def _prompt(path: Path) -> str:
    """The first prompt of the run's own samples, where it is short."""
    prompt = next((sample.get("prompt") for sample in read_samples(path)), None)
    fits = isinstance(prompt, str) and 0 < len(prompt) <= _LONGEST_PROMPT and prompt.isprintable()
    return prompt if isinstance(prompt, str) and fits else _PROMPT


def _largest_text(folder: Path) -> Path | None:
    sizes = dict[Path, int]()
    try:
        for path in folder.glob("*.txt"):
            if path.is_file() and not path.name.lower().startswith(_NO_CORPUS):
                sizes[path] = path.stat().st_size
    except OSError:  # a folder that may not be read
        return None
    largest = max(sizes, key=lambda path: (sizes[path], path.name), default=None)
    return largest if largest is not None and sizes[largest] >= _LEAST_TEXT_BYTES else None


def _page(said: str, steps: list[list[str]]) -> str:
    """What is there, then commands by what they do, help the last."""
    return f"{said}\n\n{columns([*steps, *_HELP])}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
