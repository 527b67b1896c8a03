"""Rows of a finetuning task as readers see them: every text of an example, its mask and label."""

from dataclasses import replace

import numpy as np

from gptcli.data.examples import Example
from gptcli.data.rows import Rows
from gptcli.data.shown_rows import ShownRow, show_rows
from gptcli.data.task_data import TaskData
from gptcli.model.loss import IGNORED


def task_facts(task: TaskData) -> dict[str, str]:
    """How the rows were made, for a heading."""
    settings = task.settings
    packed = settings.packing and isinstance(task.held_out[0], Example)
    facts = {
        "task": f"{settings.task}, with a head that reads the last token"
        if settings.has_head
        else settings.task,
        "packing": "whole examples, none sees another" if packed else "one example a row",
    }
    return {**facts, **({"labels": ", ".join(task.labels)} if task.labels else {})}


def show_task_rows(task: TaskData, rows: Rows) -> list[ShownRow]:
    """The rows, one for each text of an example: of a head's those that it reads, of a preference
    the two answers. Targets are those with loss: a head alone trains none."""
    if rows.inputs.ndim == 2:
        return show_rows(task.tokenizer, rows.inputs, rows.targets, rows.starts, apart=True)
    n, texts = rows.inputs.shape[:2]
    shown = []
    for i in range(n):
        for k in range(texts):
            inputs, targets = rows.inputs[i, k][None], rows.targets[i, k][None]
            lengths = None
            if rows.ends is not None:
                if rows.ends[i, k] < 0:  # this row has fewer texts than others
                    continue
                lengths = [int(rows.ends[i, k]) + 1]
                if task.settings.method == "head" or not task.settings.lm_weight:
                    targets = np.full_like(targets, IGNORED)
            row = show_rows(task.tokenizer, inputs, targets, None, lengths)[0]
            row = replace(row, name=_name(task, i, k, texts), label=_label(task, rows, i))
            shown.append(row)
    return shown


def _name(task: TaskData, row: int, text: int, texts: int) -> str:
    if task.settings.task == "preference":
        return f"row {row}, {('chosen', 'rejected')[text]}"
    kind = "choice" if task.settings.task == "multiple_choice" else "order"
    return f"row {row}, {kind} {text}" if texts > 1 else f"row {row}"


def _label(task: TaskData, rows: Rows, row: int) -> str | None:
    if rows.ends is None or rows.labels is None:
        return None
    number = int(rows.labels[row])
    return task.labels[number] if task.labels else f"choice {number}"
