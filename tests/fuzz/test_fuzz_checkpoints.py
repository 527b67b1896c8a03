"""Any mutation of a valid checkpoint, with its hashes made anew more often than not."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guard import Gpt, case, fuzzed, well
from hypothesis import given
from hypothesis import strategies as st

from gptcli.runs import checkpoint
from gptcli.runs.manifest import sealed
from gptcli.runs.run_dir import update_run_json

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "config.yaml"]
FILES += ["manifest.json", "tokenizer/*"]
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-2, 2**70),
        st.floats(),
        st.text(max_size=9),
        st.sampled_from(["../../etc/passwd", "\x1b[2J", "F32", "BF16", "I8", [1, 2**62]]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run that has one step left to do."""
    from gptcli.cli.main import main

    assert main(["pretrain", "tiny.yaml", "--run-dir", "r", "--quiet"]) == 0
    update_run_json(folder / "r", status="stopped")
    return folder / "r"


def changed_json(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one of its values replaced, removed or added."""
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            places.append((node, key))
            if isinstance(value, dict | list):
                collect(value)

    collect(tree)
    node, key = places[draw(st.integers(0, len(places) - 1))]
    how = draw(st.sampled_from(["replace", "replace", "remove", "add", "rename"]))
    if how == "replace":
        node[key] = draw(VALUES)
    elif how == "remove":
        del node[key]
    elif isinstance(node, dict):
        name = draw(st.one_of(st.text(max_size=9), st.just(f"module.{key}")))
        node[name] = node.pop(key) if how == "rename" else draw(VALUES)
    return tree


def changed_header(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(changed_json(draw, json.loads(data[8 : 8 + size]))).encode()
    length = draw(st.sampled_from([len(header), len(header), 2**62, 0, len(header) - 1]))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes flipped, cut, inserted or doubled."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        how = draw(st.sampled_from(["flip", "truncate", "insert", "cut"]))
        if how == "flip" and changed:
            changed[place] ^= draw(st.integers(1, 255))
        elif how == "truncate":
            del changed[place:]
        elif how == "insert":
            changed[place:place] = draw(st.binary(max_size=9))
        else:
            del changed[place : place + draw(st.integers(1, 80))]
    return bytes(changed)


def reseal(directory: Path) -> None:
    """A manifest that agrees with what is there, as somebody who means it would write it."""
    path = directory / "manifest.json"
    if not path.is_file():  # to open a pipe would wait for ever
        return
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
        for name in list(files):
            if (directory / name).is_file():
                content = (directory / name).read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                files[name] = {"bytes": len(content), "sha256": digest}
        path.write_text(json.dumps(sealed(manifest)))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return


@st.composite
def mutations(draw: st.DrawFn) -> Callable[[Path], None]:
    """What to do to a checkpoint directory."""
    steps = draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=2, unique=True))
    hows = [draw(st.sampled_from(["inside"] * 6 + ["bytes"] * 3 + ["odd"])) for _ in steps]
    odd = draw(st.sampled_from(["remove", "link", "directory", "pipe", "empty", "stray"]))
    seals = draw(st.integers(0, 9)) < 7
    choice = draw(st.data())

    def apply(directory: Path) -> None:
        for name, how in zip(steps, hows, strict=True):
            path = sorted(directory.glob(name), key=str)[0]
            data = path.read_bytes()
            if how == "odd":
                spoil(path, odd)
                continue
            if how == "bytes":
                changed = changed_bytes(choice.draw, data)
            elif path.suffix == ".json":
                changed = json.dumps(changed_json(choice.draw, json.loads(data))).encode()
            elif path.suffix == ".safetensors":
                changed = changed_header(choice.draw, data)
            else:
                changed = changed_bytes(choice.draw, data)
            path.write_bytes(changed)
        if seals:
            reseal(directory)

    return apply


def spoil(path: Path, how: str) -> None:
    if how == "stray":
        (path.parent / "more.json").write_text("{}")
        return
    path.unlink()
    if how == "link":
        path.symlink_to("/etc/passwd")
    elif how == "directory":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "empty":
        path.touch()


@fuzzed
@given(mutate=mutations())
def test_checkpoints(mutate: Callable[[Path], None], run: Path, gpt: Gpt, folder: Path) -> None:
    """A checkpoint is loaded, verified and resumed from, or what is wrong with it is named."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    path = checkpoint.list_checkpoints(copy)[-1]
    mutate(path)
    with case("checkpoints"):
        prompt = ["--prompt", "a", "--max-new-tokens", "1"]
        well(gpt, ["generate", "--model", str(path), *prompt], {0, 4, 6})
        well(gpt, ["runs", "verify", str(copy)], {0, 4})
        more = ["--set=training.max_steps=2", "--resume"]
        well(gpt, ["pretrain", "tiny.yaml", "--run-dir", str(copy), *more], {0, 4, 5, 6})
