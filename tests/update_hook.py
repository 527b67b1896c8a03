"""A call behind each update of a run, where tests make something happen."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from gptcli.training.adamw import AdamW


class UpdateHook:
    """Until `remove`, `call` gets the optimizer as soon as it has updated its parameters."""

    def __init__(self, call: Callable[[AdamW], Any]) -> None:
        self._patch = pytest.MonkeyPatch()
        update = AdamW.step

        def step(optimizer: AdamW, ratio: float, found_inf: Tensor | None = None) -> None:
            update(optimizer, ratio, found_inf)
            call(optimizer)

        self._patch.setattr(AdamW, "step", step)

    def remove(self) -> None:
        """Call no more."""
        self._patch.undo()
