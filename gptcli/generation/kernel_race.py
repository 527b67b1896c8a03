"""Kernels and threads for decoding: chosen by short races on this machine, and remembered.

One step of decoding multiplies few rows with every weight. Which kernel and how many threads are
the fastest at that depends on the processor and the number of rows, so it is tried, once.
"""

import copy
import hashlib
import json
import logging
import math
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from gptcli import __version__
from gptcli.data.cache_folder import cache_root
from gptcli.data.json_file import read_json_object
from gptcli.device import MUST_WIN_BY, Device, free_memory_bytes, threads_are_given
from gptcli.errors import DataError, ResourceError
from gptcli.model.gpt import GPT
from gptcli.model.packed import OneDnnLinear, is_quantized
from gptcli.model.race import race
from gptcli.runs.run_dir import write_json_atomic

log = logging.getLogger("gptcli")

_LEAST_STEPS = 64  # fewer do not earn back the race, which takes as long as a few of them
_LEAST_BYTES = 2**25  # of linear layers; smaller models stay in the processor's caches
_RACED_PART = 4  # of the layers of a shape, one in so many races
_MEMORY_SHARE = 0.5  # of what is free, for the packed copies
_SLOW_STEP_SECONDS = 0.25  # a model that takes longer has work for every thread

_Shape = tuple[int, int]  # (outputs, inputs)


@dataclass(frozen=True)
class Prepared:
    """What the races chose to decode a model with: its twin with the fastest layers, and threads
    for `decode_threads`."""

    decoder: GPT
    threads: int

    @classmethod
    def of(cls, model: GPT, rows: int, steps: int) -> "Prepared":
        """For `steps` steps of `rows` rows; see `packed_for` and `best_threads`."""
        decoder = packed_for(model, rows, steps)
        return cls(decoder, best_threads(decoder, rows, steps))


def packed_for(model: GPT, rows: int, steps: int) -> GPT:
    """The model to decode `steps` steps of `rows` rows with: its parameters and buffers are those
    of `model`, which stays as it is, but its linear layers are the fastest at that.

    They become oneDNN's packed ones, beside the weights that they are copies of, where these win a
    race by 20 %, save more time than packing takes, and fit in memory. Of a shape that raced before
    the result is read from the cache. Where nothing is won it is `model` itself: for few steps, in
    training, on a GPU, in other types than fp32, of a small model.
    """
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    small = sum(layer.weight.nbytes for layer in linear) < _LEAST_BYTES
    if steps < _LEAST_STEPS or small or not _can_be_packed(model):
        return model
    shapes: dict[_Shape, list[nn.Linear]] = {}
    for layer in linear:
        shapes.setdefault((layer.out_features, layer.in_features), []).append(layer)
    packed: dict[nn.Module, nn.Module] = {}
    try:
        with torch.inference_mode():
            for shape, layers in shapes.items():
                if not _room_for(layers):
                    continue
                seconds = _raced(shape, layers, rows)
                if seconds is None:
                    return model
                if _wins(seconds, steps):
                    packed |= {layer: _pack(layer, rows) for layer in layers}
    except (RuntimeError, AttributeError) as error:  # no such kernel, or no memory after all
        log.debug(f"no packed layers: {error}")
        return model
    return cast(GPT, _with_layers(model, packed)) if packed else model


@contextmanager
def decode_threads(count: int) -> Iterator[None]:
    """Inside, torch computes with so many threads; afterwards with as many as before.

    Not to be held across a `yield`, where it would go on in the caller.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def best_threads(model: GPT, rows: int, steps: int) -> int:
    """How many threads to decode `steps` steps of `rows` rows with: torch's number, or half of it
    as often as that wins a race of steps by 20 %.

    What the user chose stays, and every thread of a slow model. Few steps start no race.
    """
    most = torch.get_num_threads()
    if model.device.type != "cpu" or most == 1 or threads_are_given():
        return most
    layer = type(model.get_submodule("blocks.0.mlp.up")).__name__
    shape = [model.config.model_dump(), model.vocab_size, layer]
    place = _place({"race": "threads", "model": shape, "rows": _alike(rows)})
    found = _recall(place, ["threads"])
    if found is None or not 1 <= found["threads"] <= most:
        found = _race_threads(model, rows, most) if steps >= _LEAST_STEPS else None
        if found is None:
            return most
        _remember(place, found)
    return int(found["threads"])


def _can_be_packed(model: GPT) -> bool:
    return (
        model.device.type == "cpu"
        and model.dtype == torch.float32
        and not model.training
        and not is_quantized(model)
    )


def _room_for(layers: Sequence[nn.Linear]) -> bool:
    cpu = Device("cpu", None, "", torch.get_num_threads(), True)
    free = free_memory_bytes(cpu)
    return free is None or sum(layer.weight.nbytes for layer in layers) < _MEMORY_SHARE * free


def _raced(shape: _Shape, layers: Sequence[nn.Linear], rows: int) -> dict[str, float] | None:
    """Seconds of one layer as it is (`linear`) and `packed`, and of `packing` it; None where others
    use the processor too."""
    place = _place({"race": "linear", "shape": shape, "rows": _alike(rows)})
    found = _recall(place, ["linear", "packed", "packing"])
    if found is None:
        chosen = layers[::_RACED_PART]
        x = torch.ones(rows, shape[1])
        began = time.perf_counter()
        packed = [_pack(layer, rows) for layer in chosen]
        packing = time.perf_counter() - began

        def through(raced: Sequence[nn.Module]) -> Callable[[], None]:
            def run() -> None:
                for layer in raced:
                    layer(x)

            return run

        result = race({"linear": through(chosen), "packed": through(packed)}, "linear")
        if not result.fair:
            return None
        times = {**result.seconds, "packing": packing}
        found = {name: float(f"{s / len(chosen):.4g}") for name, s in times.items()}
        _remember(place, found)
    return found


def _wins(seconds: dict[str, float], steps: int) -> bool:
    won = seconds["packed"] * MUST_WIN_BY < seconds["linear"]
    return won and steps * (seconds["linear"] - seconds["packed"]) > seconds["packing"]


def _pack(layer: nn.Linear, rows: int) -> nn.Module:
    return OneDnnLinear(layer.weight, layer.bias, rows)


def _with_layers(module: nn.Module, packed: dict[nn.Module, nn.Module]) -> nn.Module:
    """A copy of the tree of modules, with the same tensors and with `packed` layers in it."""
    twin = copy.copy(module)
    twin._modules = {
        name: child and (packed.get(child) or _with_layers(child, packed))
        for name, child in module._modules.items()
    }
    return twin


def _race_threads(model: GPT, rows: int, most: int) -> dict[str, Any] | None:
    """The winner and the seconds of each; None where others use the processor too."""

    def step_with(threads: int) -> Callable[[], None]:
        def step() -> None:
            torch.set_num_threads(threads)
            model(tokens, model.new_cache(rows, 1), last_only=True)

        return step

    tokens = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
    threads, seconds, fair = most, dict[str, float](), True
    with torch.inference_mode(), decode_threads(most):  # which also takes back what steps set
        while threads > 1 and seconds.get(str(threads), 0.0) < _SLOW_STEP_SECONDS:
            half = threads // 2
            found = race({str(n): step_with(n) for n in (threads, half)}, str(threads))
            fair = fair and found.fair
            seconds |= found.seconds
            if found.winner == str(threads):
                break
            threads = half
    return {"threads": threads, "seconds": seconds} if fair else None


def _alike(rows: int) -> int:
    """The power of two that `rows` come up to: one race serves all of those numbers."""
    return 1 << (rows - 1).bit_length()


def _place(about: dict[str, Any]) -> Path:
    """The file in the cache for races like this one: same machine, software and threads."""
    here = {
        "version": __version__,
        "torch": torch.__version__,
        "machine": socket.gethostname(),
        "threads": torch.get_num_threads(),
    }
    key = hashlib.sha256(json.dumps({**here, **about}, sort_keys=True).encode()).hexdigest()
    return cache_root() / "kernels" / f"{key}.json"


def _recall(place: Path, names: Sequence[str]) -> dict[str, Any] | None:
    """What an earlier race found; None where there was none or its file is damaged."""
    try:
        found = read_json_object(place, DataError)
    except DataError:
        return None
    sound = all(
        type(found.get(name)) in (int, float) and math.isfinite(found[name]) for name in names
    )
    return found if sound else None


def _remember(place: Path, found: dict[str, Any]) -> None:
    """For the next time; a cache that cannot be written costs it the race again."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(place, found)
    except (OSError, ResourceError) as error:
        log.debug(f"the race is not kept for the next time: {error}")
