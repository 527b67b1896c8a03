"""What a frozen model makes of texts, of which a task head alone learns.

Legend of shapes: R rows, S sequences of a row, T time in tokens, C n_embd, N texts.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from gptcli import stop
from gptcli.data.examples import HeadExample
from gptcli.device import Device, autocast
from gptcli.evaluation.likelihoods import batches
from gptcli.model.gpt import GPT
from gptcli.model.heads import sequence_features
from gptcli.training.kept_values import read_kept, write_kept

log = logging.getLogger("gptcli")

# Tokens (R, S, T) and ends (R, S) -> what a task head reads (R, S, C); see `sequence_features`.
FeaturesOf: TypeAlias = Callable[[Tensor, Tensor], Tensor]

FEATURES = "features.safetensors"  # in the run directory: keys int64 (N,), values fp32 (N, C)
_MOST_BYTES = 2**30  # kept: those of 350,000 texts at n_embd 768
_TEXTS_AT_ONCE = 2048  # of which those of like length go into a batch
_TOLD_EVERY = 10.0  # seconds


def frozen_features(
    model: GPT,
    rows: Callable[[], Iterable[HeadExample]] | None,
    device: Device,
    directory: Path,
    *,
    resumed: bool,
    precision: str = "fp32",
) -> FeaturesOf:
    """What the task head reads of texts, without gradient or dropout, while the rest of the model
    does not change.

    The texts of `rows` are read before training, those of like length together, up to 1 GiB of
    results, which are written to the run `directory`; a `resumed` run has those that it wrote when
    it began: CheckpointError when they are damaged; where they are missing, the same batches are
    read again. All other texts are read when they come up, each by itself, so that its numbers
    depend on no other. So a run that was stopped goes on with the same numbers. Without `rows`, as
    of a corpus that is streamed, all are. While they are written, they are in memory twice.
    `stop.Stopped` when a stop is asked for; then nothing is written.
    """
    path, width = directory / FEATURES, model.config.n_embd
    kept = torch.empty(0, width)
    places: dict[int, int] = {}
    if rows is not None:
        if resumed and path.is_file():
            keys, kept = read_kept(path, width, "representations")
        else:
            keys, kept = _computed(model, rows(), device, precision)
            write_kept(path, keys, kept)
        places = {key: place for place, key in enumerate(keys.tolist())}
    alone: dict[int, Tensor] = {}

    def feature(text: Tensor) -> Tensor:  # (T,) int64, on the CPU -> (C,)
        key = _key(text.tolist())
        if (place := places.get(key)) is not None:
            return kept[place]
        found = alone.get(key)
        if found is None:
            found = _read(model, [text.tolist()], device, precision)[0]
            if 4 * width * (len(places) + len(alone) + 1) <= _MOST_BYTES:
                alone[key] = found
        return found

    def features_of(tokens: Tensor, ends: Tensor) -> Tensor:
        missing = torch.zeros(width)
        texts = zip(tokens.flatten(0, 1).cpu(), (ends + 1).flatten().tolist(), strict=True)
        found = torch.stack([feature(text[:n]) if n else missing for text, n in texts])
        return torch.unflatten(found.to(model.device), 0, ends.shape)

    return features_of


def _computed(
    model: GPT, rows: Iterable[HeadExample], device: Device, precision: str
) -> tuple[Tensor, Tensor]:
    """Keys (N,) and values (N, C) of the texts of all rows, equal ones once, as far as they fit."""
    log.info("reading each text once with the frozen model; the head learns of what it makes of it")
    width = model.config.n_embd
    most = _MOST_BYTES // (4 * width)
    found: dict[int, Tensor] = {}
    told = time.monotonic()
    for texts in _groups(islice(chain.from_iterable(row.sequences for row in rows), most)):
        new = {key: text for text in texts if (key := _key(text)) not in found}
        lengths, waiting = list(map(len, new.values())), list(new.items())
        for numbers in batches(lengths, device):
            stop.raise_if_requested()
            these = [waiting[number] for number in numbers]
            read = _read(model, [text for _, text in these], device, precision)
            found.update((key, row) for (key, _), row in zip(these, read, strict=True))
            if time.monotonic() - told > _TOLD_EVERY:
                told = time.monotonic()
                log.info(f"{len(found):,} texts are read")
    keys, kept = torch.tensor(list(found), dtype=torch.int64), torch.empty(len(found), width)
    for place, key in enumerate(list(found)):
        kept[place] = found.pop(key)  # so that all are in memory once
    return keys, kept


@torch.no_grad()
def _read(model: GPT, texts: Sequence[list[int]], device: Device, precision: str) -> Tensor:
    """What the head reads of texts of token ids: (N, C) fp32 on the CPU."""
    tokens = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
    ends = torch.tensor([[len(text) - 1] for text in texts])
    training = model.training
    model.eval()
    try:
        with autocast(device, precision):
            hidden = model.hidden(tokens.to(device.torch))
    finally:
        model.train(training)
    return sequence_features(hidden[:, None], ends.to(device.torch))[:, 0].float().cpu()


def _groups(texts: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    while group := list(islice(texts, _TEXTS_AT_ONCE)):
        yield group


def _key(text: Sequence[int]) -> int:
    """A hash of token ids, the same in every process."""
    digest = hashlib.blake2b(np.asarray(text, dtype=np.int64).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
