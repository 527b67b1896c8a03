"""torch.compile of the blocks, where they are trained."""

import importlib.util
import shutil
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from gptcli.device import Device
from gptcli.model.gpt import GPT, Block


def compile_blocks(model: GPT) -> None:
    """From now on the blocks train by compiled code, made at the first call of each shape.

    One graph serves all blocks. Evaluation and generation, whose shapes vary, and the head with
    its loss stay as they are; so do parameters and their names.
    """
    for block in model.blocks:
        # A bound method, so that a copy of the model gets one of its own.
        block.forward = MethodType(_forward, block)


def compile_no_more(model: GPT) -> None:
    """Undo `compile_blocks`."""
    for block in model.blocks:
        block.__dict__.pop("forward", None)


def has_compiler(device: Device) -> bool:
    """Whether what torch.compile needs on `device` is installed: a C++ compiler; on a GPU Triton
    and a C compiler."""
    if device.kind == "cuda":
        c = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
        return c and importlib.util.find_spec("triton") is not None
    return any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl"))


def failure(error: Exception) -> str:
    """One line for people about what a compiler raised."""
    reason = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"torch.compile failed, going on without it: {type(error).__name__}: {reason:.200}"


def _forward(block: Block, *inputs: Any) -> Tensor:
    forward = _compiled() if block.training and torch.is_grad_enabled() else Block.forward
    x: Tensor = forward(block, *inputs)
    return x


@cache
def _compiled() -> Any:
    return torch.compile(Block.forward)
