"""What the model that preference training starts from thinks of all pairs, kept with the run.

Direct preference optimization compares the model in training with the one it began as (Rafailov et
al. 2023). Its log-likelihoods never change, so they are computed once and that model is not kept.
"""

import logging
from collections.abc import Callable, Container, Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from gptcli import stop
from gptcli.data.examples import PreferencePair
from gptcli.device import Device
from gptcli.errors import CheckpointError
from gptcli.evaluation.preferences import pair_log_likelihoods
from gptcli.model.gpt import GPT
from gptcli.training.kept_values import read_kept, write_kept

log = logging.getLogger("gptcli")

REFERENCE = "reference.safetensors"  # in the run directory: keys int64 (N,), values fp32 (N, 2)
_PAIRS_AT_ONCE = 512  # of which those of like length go into a batch


def reference_log_probabilities(
    model: GPT,
    pairs: Callable[[], Iterable[PreferencePair]],
    device: Device,
    directory: Path,
    *,
    resumed: bool,
    precision: str = "fp32",
) -> dict[int, tuple[float, float]]:
    """ln p of each pair's chosen and rejected answers, by the pairs' keys, in nats.

    Those of `model` as it is before training, which are written to the run `directory`; for a
    `resumed` run, those that it wrote when it began: CheckpointError when they are missing, damaged
    or lack one of the pairs. Raises `stop.Stopped` when a stop is asked for; then nothing is
    written.
    """
    path = directory / REFERENCE
    if resumed:
        found = _by_key(*read_kept(path, 2, "log-likelihoods"))
        _check(found, pairs(), path)
        return found
    keys, values = _computed(model, pairs(), device, precision)
    write_kept(path, keys, values)
    return _by_key(keys, values)


def _computed(
    model: GPT, pairs: Iterable[PreferencePair], device: Device, precision: str
) -> tuple[Tensor, Tensor]:
    """Keys (N,) and values (N, 2) of all pairs, equal ones once."""
    log.info("computing what the model thinks of all answers before training")
    found: dict[int, Tensor] = {}
    for group in _groups(pairs):
        new = list({pair.key: pair for pair in group if pair.key not in found}.values())
        values = pair_log_likelihoods(model, new, device, precision)
        found.update((pair.key, value) for pair, value in zip(new, values, strict=True))
    return torch.tensor(list(found), dtype=torch.int64), torch.stack(list(found.values()))


def _check(found: Container[int], pairs: Iterable[PreferencePair], path: Path) -> None:
    for pair in pairs:
        stop.raise_if_requested()
        if pair.key not in found:
            raise CheckpointError(
                f"{path} has no log-likelihoods of the pair at {pair.where}: the rows, or how they"
                " become tokens, have changed since the run began",
                hint="start a new run, or restore the data",
            )


def _groups(pairs: Iterable[PreferencePair]) -> Iterator[list[PreferencePair]]:
    iterator = iter(pairs)
    while group := list(islice(iterator, _PAIRS_AT_ONCE)):
        yield group


def _by_key(keys: Tensor, values: Tensor) -> dict[int, tuple[float, float]]:
    chosen, rejected = values.unbind(1)
    return dict(
        zip(keys.tolist(), zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True)
    )
