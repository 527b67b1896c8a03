"""scripts/bench_generate.py: its arithmetic, and each contender on a tiny model."""

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gptcli.config.schema import Config
from gptcli.data.tokenizer import train_bpe
from gptcli.generation.engine import Request, decode
from gptcli.generation.sampling import Sampling

SOURCE = Path(str(argparse.__file__)).read_text(encoding="utf-8")
SHAPE = {"preset": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 128}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("bench_generate")


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    return importlib.import_module("bench_generate_worker")


@pytest.fixture(scope="module")
def models(bench, tmp_path_factory):
    config = Config.model_validate({"name": "bench", "model": SHAPE})
    tokenizer = train_bpe([SOURCE], 512, "gpt2", 10**6)
    return bench.Models(tmp_path_factory.mktemp("models"), config, tokenizer)


class Orders:
    """A parent that gives some orders and keeps the answers."""

    def __init__(self, *orders: int) -> None:
        self._orders, self.answers = [*orders], list[dict[str, Any]]()

    def order(self) -> int:
        return self._orders.pop(0) if self._orders else 0

    def answer(self, **facts: Any) -> None:
        self.answers.append(facts)


def work(worker, models, task="speed", contender="gptcli", **changes):
    path = str(models.file_of({"llama": "llama-f32"}.get(contender, contender)))
    given = {"quantize": None, "n": 2, "new_tokens": 12, "threads": 1, **changes}
    return worker.Work(task, contender, path, vocab_size=models.vocab_size, **given)


@pytest.fixture
def expected(worker, models):
    """What the model continues the prompt of 5 tokens with, by the engine without a cache."""
    ours = worker.Ours(work(worker, models))
    prompt = worker.prompt_ids(5, 0, models.vocab_size)
    request = Request("", prompt, Sampling(temperature=0.0, max_new_tokens=12))
    [(_, [sample])] = decode(ours._model, ours._tokenizer, [request], use_cache=False)
    assert len(sample.tokens) == 12
    return sample.tokens


def test_ours_decodes_greedily(worker, models, expected):
    """Other tokens than those of `gpt generate` would be another program's speed."""
    given = work(worker, models)
    ours = worker.Ours(given)
    prompt = worker.prompt_ids(5, 0, models.vocab_size)
    seconds, texts = ours.decode([prompt], 12)
    assert seconds > 0
    assert texts == [expected, expected]
    parent = Orders(5, 7)
    worker.speed(given, parent, lambda ids: ours.decode([ids], 12)[1][0])
    assert [answer["rate"] > 0 for answer in parent.answers] == [True, True]
    assert parent.answers[0]["tokens"] == expected[:8]


def test_transformers_decodes_the_same(worker, models, expected):
    """A peer with other weights, or one that stops early, is no peer."""
    pytest.importorskip("transformers")
    decode_peer = worker.transformers_decoder(work(worker, models, contender="transformers"))
    assert decode_peer(worker.prompt_ids(5, 0, models.vocab_size)) == expected


@pytest.mark.parametrize("n", [1, 3])
def test_llama_decodes_the_same(worker, models, expected, n):
    """Sequences that read each other's cache, or a prompt left over from the call before."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    llama = worker.Llama(work(worker, models, contender="llama", n=n))
    llama.decode(worker.prompt_ids(9, 1, models.vocab_size))
    assert llama.decode(worker.prompt_ids(5, 0, models.vocab_size)) == expected


def test_all_prompts_of_a_batch_are_timed(worker, models):
    """A batch of one, or one prompt for all, would be no batch."""
    given = work(worker, models, task="batch", n=1)
    ours, asked = worker.Ours(given), list[int]()

    class Counting:
        def decode(self, prompts, new_tokens):
            asked.append(len({tuple(prompt) for prompt in prompts}))
            return ours.decode(prompts, new_tokens)

    parent = Orders(1, 6)
    worker.batch(given, parent, Counting())
    assert asked == [1] * worker.BATCH_SINGLES + [6]
    assert all(answer["rate"] > 0 for answer in parent.answers)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_all_linear_layers_of_a_step_are_timed(worker, models, quantize):
    """A layer that is left out makes the rest of the step look slow."""
    given = work(worker, models, task="linear", quantize=quantize)
    ours = worker.Ours(given)
    calls = ours.linear_calls(worker.prompt_ids(5, 0, models.vocab_size))
    assert len(calls) == 2 * 4 + 1
    assert {x.numel() // x.shape[-1] for _, x in calls} == {2}  # one token of each row
    parent = Orders(5)
    worker.linear(given, parent, ours)
    [answer] = parent.answers
    assert answer["layers"] == 9
    assert answer["linear"] > 0


def test_speed_table(bench):
    """A ratio turned upside down, or of another length of prompt."""
    rates = {
        ("gptcli", 4): [20.0, 30.0],
        ("transformers", 4): [10.0, 10.0],
        ("gptcli", 512): [9.0, 9.0],
        ("transformers", 512): [10.0, 10.0],
    }
    lines = bench.speed_table(rates, {"transformers": 1.4}, "gptcli, fp32").splitlines()
    assert lines[2:] == [
        "| gptcli, fp32 | 4 | 25.0 (20.0 to 30.0) |  |  |  |",
        "| transformers, fp32 | 4 | 10.0 (10.0 to 10.0) | 2.50 (2.00 to 3.00)"
        " | at least 1.4 | yes |",
        "| gptcli, fp32 | 512 | 9.0 (9.0 to 9.0) |  |  |  |",
        "| transformers, fp32 | 512 | 10.0 (10.0 to 10.0) | 0.90 (0.90 to 0.90)"
        " | at least 1.4 | no |",
    ]


def test_verdicts(bench):
    """Limits of both directions; a claim that holds by being upside down."""
    assert bench.verdict(1.25, at_most=1.25) == ["at most 1.25", "yes"]
    assert bench.verdict(1.26, at_most=1.25) == ["at most 1.25", "no"]
    assert bench.verdict(-0.1, at_most=0.3) == ["at most 0.3", "yes"]
    assert bench.verdict(7.9, at_least=8.0) == ["at least 8", "no"]


def test_agreement(bench):
    assert bench.agreement([1, 2, 3], [1, 2, 4]).startswith("the first 2 of 3 tokens")
    assert bench.agreement([1, 2], [1, 2]).startswith("the first 2 of 2 tokens")


def test_prompts(worker):
    """The end-of-text token in a prompt, or prompts that begin alike and share their prefill."""
    prompts = [worker.prompt_ids(600, number, 50257) for number in range(64)]
    assert all(0 <= token < 50256 for ids in prompts for token in ids)
    assert len({ids[0] for ids in prompts}) == 64


@pytest.mark.slow  # processes of their own; the benchmarks are run by hand
def test_processes_take_turns(bench, models, monkeypatch):
    """A peer that is missing ends the comparison, or is passed over in silence."""
    monkeypatch.setattr(bench, "NEW_TOKENS", 8)
    monkeypatch.setitem(bench.PACKAGES, "llama", "no_such_package")
    shown = bench.bench_speed(bench.Case(2, None, {"llama-f32": 1.0}), models, 2, (4,))
    assert "\n| gptcli, fp32 | 4 | " in shown
    assert shown.endswith("Not run: llama-f32: no_such_package is not installed.")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("<!-- bench n1-fp32 --><!-- /bench n1-fp32 -->", "bench start"),
        ("<!-- bench n1-fp32 --><!-- /bench n1-fp32 -->" * 2, "bench n1-fp32"),
        (None, "No such file"),
    ],
)
def test_a_table_has_its_place(bench, monkeypatch, tmp_path, capsys, text, told):
    """An hour of measuring, and then no place to put it."""
    file = tmp_path / "measured.md"
    if text is not None:
        file.write_text(text)
    command = ["bench_generate.py", "--case", "n1-fp32", "--case", "start", "--write", str(file)]
    monkeypatch.setattr("sys.argv", command)
    measured = []
    monkeypatch.setattr(bench, "run_cases", lambda *_: measured.append(1))
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert told in capsys.readouterr().err
    assert not measured
