"""Checkpoints of models with a task head."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptcli.errors import CheckpointError
from gptcli.export import export
from gptcli.model.heads import has_task_head, task_head
from gptcli.runs.checkpoint import Contents, publish
from gptcli.runs.load import load_model, reshaped

CPU = torch.device("cpu")
Make = Callable[..., Contents]


def with_head(contents: Contents, width: int = 16) -> Contents:
    head = {"task_head.weight": torch.randn(3, width), "task_head.bias": torch.randn(3)}
    return replace(contents, model={**contents.model, **head})


def test_head_comes_back(tmp_path: Path, make_contents: Make) -> None:
    """Guards: a classifier whose head is lost, or of another dtype than its model, when it is
    loaded, in int8 too."""
    contents = with_head(make_contents())
    path = publish(tmp_path, 1, contents)
    export(str(path), tmp_path / "int8", None, None, "int8")
    for reference in (path, tmp_path / "int8"):
        head = task_head(load_model(str(reference), CPU).model)
        assert torch.equal(head.weight, contents.model["task_head.weight"])
        assert torch.equal(head.bias, contents.model["task_head.bias"])
    low = load_model(str(path), CPU, dtype=torch.bfloat16).model
    assert task_head(low).weight.dtype == torch.bfloat16


def test_a_run_begins_without_it(tmp_path: Path, make_contents: Make) -> None:
    """Guards: a second finetuning that goes on with the labels of the first."""
    loaded = load_model(str(publish(tmp_path, 1, with_head(make_contents()))), CPU)
    assert not has_task_head(reshaped(loaded.config.model, loaded))


def test_left_out(tmp_path: Path, make_contents: Make, warnings: list[str]) -> None:
    """Guards: a folder that transformers cannot read, or a head that is dropped without a word."""
    path = publish(tmp_path, 1, with_head(make_contents()))
    export(str(path), tmp_path / "hf", "hf", None)
    assert "task head is left out" in warnings[0]
    assert not has_task_head(load_model(str(tmp_path / "hf"), CPU).model)


def test_head_of_another_model(tmp_path: Path, make_contents: Make) -> None:
    """Guards: a traceback for a head that does not fit."""
    path = publish(tmp_path, 1, with_head(make_contents(), width=17))
    with pytest.raises(CheckpointError, match=r"task_head\.weight"):
        load_model(str(path), CPU)
