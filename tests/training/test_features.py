"""What a task head alone learns of: read once, kept with the run, the same wherever it goes on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptcli import stop
from gptcli.config.model_schema import ModelConfig
from gptcli.data.examples import HeadExample
from gptcli.device import Device
from gptcli.errors import CheckpointError
from gptcli.model.gpt import GPT, initialise
from gptcli.training import features
from gptcli.training.features import FEATURES, frozen_features

CPU = Device("cpu", None, "a processor", 1, True)
WIDTH = 16


def model(seed: int = 0) -> GPT:
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": WIDTH, "block_size": 32, "dropout": 0.5}
    made = GPT(ModelConfig.model_validate(sizes), 40)
    initialise(made, torch.Generator().manual_seed(seed))
    return made.train()


def text(number: int) -> list[int]:
    return [(7 * number + i) % 40 for i in range(1 + number % 11)]


def rows() -> Iterator[HeadExample]:
    """Rows of two texts each; text 3 comes twice."""
    pairs = [*((n, n + 1) for n in range(0, 20, 2)), (3, 21)]
    return (HeadExample([text(a), text(b)], 0, "", f"row {a}") for a, b in pairs)


def batch(numbers: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens (R, S, T) and ends (R, S) of the texts with these numbers; -1 is a missing one."""
    tokens = torch.zeros(len(numbers), len(numbers[0]), 12, dtype=torch.int64)
    ends = torch.full(tokens.shape[:2], -1)
    for r, row in enumerate(numbers):
        for s, number in enumerate(row):
            if number >= 0:
                ids = text(number)
                tokens[r, s, : len(ids)], ends[r, s] = torch.tensor(ids), len(ids) - 1
    return tokens, ends


def alone(net: GPT, number: int) -> Tensor:
    with torch.no_grad():
        state = net.eval().hidden(torch.tensor([text(number)]))[0, -1]
    net.train()
    return state


def test_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a text gets the representation of another, or one with dropout; or a text is read again
    for each epoch."""
    monkeypatch.setattr(features, "_TEXTS_AT_ONCE", 7)
    net = model()
    features_of = frozen_features(net, rows, CPU, tmp_path, resumed=False)
    calls: list[int] = []
    net.wte.register_forward_hook(lambda *_: calls.append(1))
    assert text(0) == [0]  # as what fills rows up, but not missing
    for numbers in ([[0, 1], [20, -1]], [[3, 21], [19, 4]]):
        found = features_of(*batch(numbers))
        for r, row in enumerate(numbers):
            for s, number in enumerate(row):
                before = len(calls)
                if number >= 0:
                    assert torch.allclose(found[r, s], alone(net, number), atol=1e-5)
                    del calls[before:]
                else:
                    assert not found[r, s].any()
    assert len(calls) == 1  # text 20
    features_of(*batch([[20, 3]]))
    assert len(calls) == 1
    assert net.training
    assert net.blocks[0].training
    assert len(load_file(tmp_path / FEATURES)["keys"]) == 21


@pytest.mark.parametrize("streamed", [False, True])
def test_resumed(tmp_path: Path, streamed: bool) -> None:
    """Bug: a resumed run learns of other numbers: those of other batches, or of another model."""
    given = None if streamed else rows
    first = frozen_features(model(), given, CPU, tmp_path, resumed=False)
    right = [first(*batch([[n]])) for n in (5, 20, 5)]
    again = frozen_features(model(), given, CPU, tmp_path, resumed=True)
    together = again(*batch([[20], [5]]))
    assert torch.equal(together[0], right[1][0])
    assert torch.equal(together[1], right[0][0])
    if not streamed:  # kept ones come from the file, whatever model there is
        other = frozen_features(model(1), given, CPU, tmp_path, resumed=True)
        assert torch.equal(other(*batch([[5]])), right[0])


def test_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a large set of texts fills the memory, or those beyond the limit are wrong."""
    monkeypatch.setattr(features, "_MOST_BYTES", 4 * WIDTH * 6)
    net = model()
    features_of = frozen_features(net, rows, CPU, tmp_path, resumed=False)
    assert len(load_file(tmp_path / FEATURES)["keys"]) == 6
    calls: list[int] = []
    net.wte.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        assert torch.equal(features_of(*batch([[15]]))[0, 0], alone(net, 15))
    assert len(calls) == 4  # read each time, and once each by `alone`


def test_damage(tmp_path: Path) -> None:
    """Bug: a run whose file is lost cannot be resumed, or goes on with other numbers; a damaged
    file ends in a traceback."""
    frozen_features(model(), rows, CPU, tmp_path, resumed=False)
    path = tmp_path / FEATURES
    right = path.read_bytes()
    path.unlink()
    frozen_features(model(), rows, CPU, tmp_path, resumed=True)
    assert path.read_bytes() == right
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot be read"):
        frozen_features(model(), rows, CPU, tmp_path, resumed=True)


def test_stop(tmp_path: Path) -> None:
    """Bug: Ctrl-C waits for all texts, or leaves a part of them that a resume takes for all."""
    stop.request(2)
    with pytest.raises(stop.Stopped):
        frozen_features(model(), rows, CPU, tmp_path, resumed=False)
    assert not list(tmp_path.iterdir())
