"""Run directories whose files hold anything, read by what shows runs."""

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from guard import Gpt, case, fuzzed, well
from hypothesis import given
from hypothesis import strategies as st
from mutations import ODD, VALUES, changed_bytes, changed_json, changed_json_bytes, spoil

FILES = ["run.json", "metrics.jsonl", "samples.jsonl", "log.txt", "checkpoints/best.json"]
FILES += ["config.yaml", "report.json"]
COMMANDS = (["list"], ["show", "runs/r"], ["tail", "runs/r", "-n", "3"], ["verify", "runs/r"])
MORE = (["prune"], ["show"], ["report", "runs/r"], ["compare", "runs/r", "runs/other"])


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """Two runs, of which one is changed."""
    from gptcli.cli.main import main

    for name in ("r", "other"):
        more = ["--set=training.max_steps=4", "--set=training.eval_every=2", "--quiet"]
        assert main(["pretrain", "tiny.yaml", f"--run-dir=runs/{name}", *more]) == 0
        assert main(["runs", "report", f"runs/{name}"]) == 0
    (folder / "runs").rename(folder / "whole")
    return folder / "whole"


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[Path], None]:
    """What to do to the files of a run directory."""
    names = draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=2, unique=True))
    hows = [draw(st.sampled_from(["inside"] * 6 + ["bytes", "any", "odd"])) for _ in names]
    odd, choice = draw(st.sampled_from(ODD)), draw(st.data())

    def apply(run: Path) -> None:
        for name, how in zip(names, hows, strict=True):
            path = run / name
            if how == "odd":
                spoil(path, odd)
            elif how == "any":
                path.write_bytes(choice.draw(anything()))
            elif how == "inside" and path.suffix == ".json":
                path.write_bytes(changed_json_bytes(choice.draw, path.read_bytes()))
            elif how == "inside" and path.suffix == ".jsonl":
                path.write_bytes(changed_lines(choice.draw, path.read_bytes()))
            else:
                path.write_bytes(changed_bytes(choice.draw, path.read_bytes()))

    return apply


@st.composite
def anything(draw: st.DrawFn) -> bytes:
    """Any bytes, any JSON, or many lines of it."""
    depth = draw(st.sampled_from([10, 1000, 100_000]))
    texts = [b"[" * depth, b'{"a":' * depth + b"1" + b"}" * depth, b"9" * depth, b"\x1b[2J" * 9]
    value = json.dumps(draw(VALUES)).encode()
    return draw(
        st.one_of(st.binary(max_size=300), st.sampled_from([*texts, value, (value + b"\n") * 5]))
    )


def changed_lines(draw: st.DrawFn, data: bytes) -> bytes:
    """Lines of JSON of which one says something else, is doubled, cut or gone."""
    lines = data.splitlines(keepends=True)
    place = draw(st.integers(0, len(lines) - 1))
    how = draw(st.sampled_from(["change", "change", "change", "double", "cut", "remove", "value"]))
    if how == "change":
        tree = changed_json(draw, json.loads(lines[place]))
        lines[place] = json.dumps(tree).encode() + b"\n"
    elif how == "value":
        lines[place] = json.dumps(draw(VALUES)).encode() + b"\n"
    elif how == "double":
        lines[place] *= 2
    elif how == "cut":
        lines[place] = lines[place][: len(lines[place]) // 2]
    else:
        del lines[place]
    return b"".join(lines)


@partial(fuzzed, few=8)
@given(
    mutate=mutations(),
    commands=st.lists(st.sampled_from([*COMMANDS, *MORE]), min_size=1, max_size=3),
)
def test_runs(
    mutate: Callable[[Path], None], commands: list[list[str]], runs: Path, gpt: Gpt, folder: Path
) -> None:
    """Runs are listed, shown, followed and reported on, whatever their files hold."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    shutil.copytree(runs, folder / "runs")
    mutate(folder / "runs" / "r")
    with case("runs"):
        for command in commands:
            well(gpt, ["runs", *command], {0, 2, 3, 4, 6})
    assert os.path.isdir("runs/other")
