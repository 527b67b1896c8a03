"""The reference of preference training: computed once, kept with the run, and checked."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptcli import stop
from gptcli.config.model_schema import ModelConfig
from gptcli.data.examples import Example, PreferencePair
from gptcli.device import Device
from gptcli.errors import CheckpointError
from gptcli.evaluation.preferences import pair_log_likelihoods
from gptcli.model.gpt import GPT, initialise
from gptcli.training import reference
from gptcli.training.reference import REFERENCE, reference_log_probabilities

CPU = Device("cpu", None, "a processor", 1, True)


def model(seed: int) -> GPT:
    made = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=16), 40)
    initialise(made, torch.Generator().manual_seed(seed))
    return made


def pair(number: int) -> PreferencePair:
    def answer(token: int) -> Example:
        tokens = [0, 1 + number % 7, *[token] * (1 + number % 5), 0]
        return Example(tokens, [False, False] + [True] * (len(tokens) - 2), 2, "", [""], "")

    return PreferencePair(answer(20), answer(21), 2**60 + number, f"pairs.jsonl:{number + 1}")


def pairs() -> Iterator[PreferencePair]:
    """Of which two are equal."""
    return (pair(number) for number in [*range(9), 3])


def test_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a resumed run compares itself with the model as far as it had come, or values go with
    the wrong keys where pairs come in several groups."""
    monkeypatch.setattr(reference, "_PAIRS_AT_ONCE", 4)
    net = model(0)
    found = reference_log_probabilities(net, pairs, CPU, tmp_path, resumed=False)
    assert len(found) == 9
    for one in pairs():
        right = pair_log_likelihoods(net, [one], CPU, "fp32")[0].tolist()
        assert found[one.key] == pytest.approx(right, abs=1e-4)
    assert reference_log_probabilities(model(1), pairs, CPU, tmp_path, resumed=True) == found


def test_other_data(tmp_path: Path) -> None:
    """Bug: a resumed run ends in a KeyError at a step where a new row comes up."""
    reference_log_probabilities(model(0), pairs, CPU, tmp_path, resumed=False)
    with pytest.raises(CheckpointError, match=r"no log-likelihoods .* pairs.jsonl:10: the rows"):
        reference_log_probabilities(model(0), lambda: [pair(9)], CPU, tmp_path, resumed=True)


def test_damage(tmp_path: Path) -> None:
    """Bug: a file that is missing or not a reference ends in a traceback."""
    path = tmp_path / REFERENCE

    def read() -> None:
        reference_log_probabilities(model(0), pairs, CPU, tmp_path, resumed=True)

    with pytest.raises(CheckpointError, match="is missing"):
        read()
    save_file({"keys": torch.zeros(3, dtype=torch.int64), "values": torch.zeros(2, 2)}, path)
    with pytest.raises(CheckpointError, match="holds no log-likelihoods"):
        read()
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read()


def test_stop(tmp_path: Path) -> None:
    """Bug: Ctrl-C waits for all pairs, or leaves a part of them that a resume takes for all."""
    stop.request(2)
    with pytest.raises(stop.Stopped):
        reference_log_probabilities(model(0), pairs, CPU, tmp_path, resumed=False)
    assert not list(tmp_path.iterdir())
