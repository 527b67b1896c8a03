"""Checkpoints come back equal, damage is found and stepped over, the good ones are kept."""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sealing import reseal

from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError, ResourceError
from gptcli.runs.checkpoint import (
    Contents,
    checkpoint_dir,
    clean_leftovers,
    list_checkpoints,
    newest_valid,
    prune,
    publish,
    read,
    read_best,
    set_aside_after,
    space_needed,
    verify,
    write_best,
)
from gptcli.runs.load import load_model
from gptcli.runs.manifest import sealed
from gptcli.runs.space import check_space

Make = Callable[..., Contents]
CPU = torch.device("cpu")
log = logging.getLogger("gptcli")


def steps(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(run_dir)]


def publish_all(run_dir: Path, make_contents: Make, *at: int) -> None:
    for step in at:
        publish(run_dir, step, make_contents(step))


def test_the_tokenizer_is_the_one_of_the_manifest(tmp_path: Path, make_contents: Make) -> None:
    """T1: guards against another whole tokenizer put into a checkpoint, with the hashes of its
    files in the manifest: generation, evaluation and resuming read it with other meanings."""
    contents = make_contents()
    path = publish(tmp_path, 1, contents)
    ranks = {bytes([255 - b]): b for b in range(256)}
    other = Tokenizer("bytes", ranks, contents.tokenizer.pattern, 256)
    other.save(path / "tokenizer")
    reseal(path)
    for load in (lambda: read(path, with_optimizer=True), lambda: load_model(str(path), CPU)):
        with pytest.raises(CheckpointError) as caught:
            load()
        assert caught.value.exit_code == 4
        assert contents.tokenizer.identity in caught.value.message
        assert other.identity in caught.value.message
    reseal(path, tokenizer=None)
    with pytest.raises(CheckpointError, match="no identity of the tokenizer"):
        verify(path)


@pytest.mark.parametrize("tie", [False, True])
def test_comes_back_equal(tmp_path: Path, make_contents: Make, tie: bool) -> None:
    """Guards against lost or changed tensors, and against tied weights stored or loaded twice."""
    contents = make_contents(tie_embeddings=tie)
    path = publish(tmp_path, 7, contents)
    back = read(path, with_optimizer=True)
    assert path == checkpoint_dir(tmp_path, 7)
    for mine, theirs in [(contents.model, back.model), (contents.optimizer, back.optimizer)]:
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert (back.model["head.weight"] is back.model["wte.weight"]) == tie
    assert verify(path)["tied"] == ({"head.weight": "wte.weight"} if tie else {})
    assert (back.state, back.config_yaml) == (contents.state, contents.config_yaml)
    assert back.tokenizer.identity == contents.tokenizer.identity == verify(path)["tokenizer"]
    assert read(path, with_optimizer=False).optimizer == {}


def test_odd_tensors_and_numbers(tmp_path: Path, make_contents: Make) -> None:
    """Guards against refusing transposed, empty, shared or scalar tensors, and state with inf."""
    base = make_contents()
    shared = torch.tensor(3.0)
    optimizer = {
        "transposed": torch.arange(6.0).view(2, 3).T,
        "empty": torch.empty(0),
        "also_empty": torch.empty(0),
        "a.step": shared,
        "b.step": shared,
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "rng": torch.get_rng_state(),
    }
    state = {"best": math.inf, "tiny": 5e-324, "text": "é\ud800"}
    contents = Contents(base.model, optimizer, state, base.config_yaml, base.tokenizer)
    back = read(publish(tmp_path, 0, contents), with_optimizer=True)
    assert back.state == state
    assert all(torch.equal(tensor, back.optimizer[name]) for name, tensor in optimizer.items())


def test_same_weights_same_file(tmp_path: Path, make_contents: Make) -> None:
    """Guards the comparison of runs by hash: time, step and order must not reach the file."""
    contents = make_contents(5)
    first = verify(publish(tmp_path / "a", 1, contents))
    turned = Contents(
        dict(reversed(contents.model.items())),
        contents.optimizer,
        {"other": 1},
        contents.config_yaml,
        contents.tokenizer,
    )
    second = verify(publish(tmp_path / "b", 2, turned))
    assert first["files"]["model.safetensors"] == second["files"]["model.safetensors"]


def test_umask_is_respected(tmp_path: Path, make_contents: Make) -> None:
    """Guards against weights that only their writer may read (safetensors writes mode 0600)."""
    old = os.umask(0o022)
    try:
        path = publish(tmp_path, 1, make_contents())
    finally:
        os.umask(old)
    assert {p.stat().st_mode & 0o777 for p in path.rglob("*") if p.is_file()} == {0o644}


def test_hostile_manifests(tmp_path: Path, make_contents: Make) -> None:
    """Guards against reading files outside the checkpoint, links, and unbounded JSON."""
    path = publish(tmp_path / "a", 1, make_contents())
    manifest = json.loads((path / "manifest.json").read_text())
    files = manifest["files"]
    entry = files["state.json"]
    for name in ("../../secret", "/etc/passwd", "tokenizer/../x.json", "tokenizer/a\x1b.json", "x"):
        forged = {**manifest, "files": {**files, name: entry}}
        (path / "manifest.json").write_text(json.dumps(sealed(forged)))
        with pytest.raises(CheckpointError, match="unknown file name"):
            verify(path)
    huge = {"files": {**files, "state.json": {**entry, "bytes": 10**9}}}
    for changes in (huge, {"files": []}, {"step": -1}, {"step": True}, {"tied": {"a": 1}}):
        (path / "manifest.json").write_text(json.dumps(sealed({**manifest, **changes})))
        with pytest.raises(CheckpointError, match=r"has|no |is larger"):
            verify(path)
    for flipped in ({"step": 2}, {"format": 2}, {"files": {}}):  # without its seal
        (path / "manifest.json").write_text(json.dumps({**manifest, **flipped}))
        with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
            verify(path)
    del manifest["sha256"]  # as the first versions wrote it
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert verify(path)["step"] == 1
    (path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        verify(path)
    link = publish(tmp_path / "b", 1, make_contents())
    (link / "state.json").rename(tmp_path / "elsewhere.json")
    (link / "state.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="symbolic link"):
        verify(link)


def test_prune_keeps_last_best_and_protected(tmp_path: Path, make_contents: Make) -> None:
    """Guards against retention that deletes the best or the one before the decay."""
    publish_all(tmp_path, make_contents, 1, 2, 3, 4, 5, 6)
    write_best(tmp_path, 2, 1.5)
    prune(tmp_path, 2, {3})
    assert steps(tmp_path) == [2, 3, 5, 6]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    prune(tmp_path, 0, ())
    assert steps(tmp_path) == [2, 6]


def test_prune_does_not_count_damaged_ones(tmp_path: Path, make_contents: Make) -> None:
    """Guards against deleting the only good checkpoint because broken ones look newer."""
    publish_all(tmp_path, make_contents, 1, 2, 3, 4)
    for step in (3, 4):
        os.truncate(checkpoint_dir(tmp_path, step) / "model.safetensors", 10)
    prune(tmp_path, 1, ())
    assert newest_valid(tmp_path, log) == checkpoint_dir(tmp_path, 2)
    (checkpoint_dir(tmp_path, 2) / "manifest.json").unlink()
    prune(tmp_path, 1, ())
    assert steps(tmp_path) == [2, 3, 4]


def test_best_is_never_nan(tmp_path: Path, make_contents: Make, warnings: list[str]) -> None:
    """Guards against best = nan, after which no loss compares as better."""
    publish_all(tmp_path, make_contents, 1)
    assert read_best(tmp_path) is None
    write_best(tmp_path, 1, math.nan)
    assert read_best(tmp_path) is None
    write_best(tmp_path, 1, 2.25)
    write_best(tmp_path, 2, math.inf)
    assert read_best(tmp_path) == (1, 2.25)
    assert len(warnings) == 2
    (tmp_path / "checkpoints/best.json").write_text('{"step": 1, "loss": NaN}')
    assert read_best(tmp_path) is None
    (tmp_path / "checkpoints/best.json").write_text('{"step": ')
    assert read_best(tmp_path) is None
    assert "no finite loss" in warnings[2]
    assert "damaged" in warnings[3]


def test_same_step_is_replaced(tmp_path: Path, make_contents: Make) -> None:
    """Guards a resumed run that saves the step again, over a whole or a damaged checkpoint."""
    publish(tmp_path, 5, make_contents(1))
    publish(tmp_path, 5, make_contents(2))
    assert read(checkpoint_dir(tmp_path, 5), with_optimizer=True).state["seed"] == 2
    (checkpoint_dir(tmp_path, 5) / "manifest.json").unlink()
    publish(tmp_path, 5, make_contents(3))
    assert read(checkpoint_dir(tmp_path, 5), with_optimizer=True).state["seed"] == 3
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_leftovers_are_cleaned(tmp_path: Path, make_contents: Make) -> None:
    """Guards against a disk that fills with leftovers, and the loss of a half replaced one."""
    publish_all(tmp_path, make_contents, 1, 2, 3)
    parent = tmp_path / "checkpoints"
    shutil.copytree(parent / "step-00000001", parent / ".del-step-00000001-99")  # 1 is in place
    (parent / "step-00000002").rename(parent / ".del-step-00000002-99")  # killed while deleting it
    (parent / ".del-step-00000002-99/manifest.json").unlink()
    (parent / "step-00000003").rename(parent / ".del-step-00000003-99")  # killed between renames
    (parent / ".tmp-step-00000003-99").mkdir()
    (tmp_path / ".tmp-run.json-99").touch()
    (tmp_path / ".lock").touch()
    clean_leftovers(tmp_path)
    assert sorted(p.name for p in parent.iterdir()) == ["step-00000001", "step-00000003"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "checkpoints"]
    assert newest_valid(tmp_path, log) == parent / "step-00000003"


def test_set_aside_after(tmp_path: Path, make_contents: Make) -> None:
    """Guards a run that goes on from an older step against resuming from its abandoned future."""
    publish_all(tmp_path, make_contents, 1, 2, 3)
    write_best(tmp_path, 3, 1.0)
    set_aside_after(tmp_path, 1)
    assert steps(tmp_path) == [1]
    assert read_best(tmp_path) is None
    aside = tmp_path / "checkpoints/replaced-step-00000003"
    assert read(aside, with_optimizer=True).state["seed"] == 3
    prune(tmp_path, 1, ())
    assert aside.exists()


def test_space(tmp_path: Path, make_contents: Make) -> None:
    """Guards against training for hours towards a save that cannot fit."""
    contents = make_contents()
    needed = space_needed(contents)
    path = publish(tmp_path, 1, contents)
    assert needed >= sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    check_space(tmp_path / "not" / "yet", needed)
    with pytest.raises(ResourceError, match="two checkpoints need") as caught:
        check_space(tmp_path, 10**17)
    assert caught.value.exit_code == 6
