"""scripts/bench_train.py: its arithmetic, its tables, and one run of tiny contenders."""

import argparse
import importlib
import math
import random
from dataclasses import replace
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    return importlib.import_module("bench_train")


@pytest.fixture(scope="module")
def cases() -> ModuleType:
    return importlib.import_module("bench_train_cases")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return importlib.import_module("bench_train_tables")


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    return importlib.import_module("bench_train_worker")


@pytest.fixture(scope="module")
def shakespeare() -> ModuleType:
    return importlib.import_module("bench_shakespeare")


def tiny(cases: ModuleType, **changes):
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch": 2}
    return replace(cases.CASE_13M, **sizes, tokenizer={"kind": "bytes"}, **changes)


def test_a_slow_round_does_not_move_the_ratio(tables):
    """The ratio of two medians would compare a slow minute of one with a fast one of the other."""
    ours, theirs = [100.0, 50.0, 20.0], [50.0, 25.0, 10.0]
    assert tables.ratios(ours, theirs) == tables.Spread(2.0, 2.0, 2.0)
    assert tables.spread([3.0, 1.0, 2.0]).show(".1f") == "2.0 (1.0 to 3.0)"


def test_speed_table(tables):
    """A ratio turned upside down, or a share of the peak without the FLOPs of a token, misleads."""
    rates = {"gptcli": [200.0, 180.0], "nanogpt-fused": [100.0, 100.0], "gemm": [1000.0, 1000.0]}
    peaks = {"gptcli": 2**30, "nanogpt-fused": None, "gemm": 0}
    lines = tables.speed_table(rates, peaks, 4, {"nanogpt": 1.2}, 0.8).splitlines()
    assert lines[2:] == [
        "| gptcli | 190 (180 to 200) |  |  | 76% (72% to 80%); asked at least 80% | 1.00 GiB |",
        "| nanoGPT, fused AdamW | 100 (100 to 100) | 1.90 (1.80 to 2.00) | at least 1.2"
        " | 40% (40% to 40%) | ? |",
    ]


def test_memory_and_threads_tables(tables):
    """Both divide the other way round than the table of speeds: less memory, two threads by one."""
    memory = tables.memory_table({"gptcli": 3 * 2**30, "nanogpt": 4 * 2**30}, {"nanogpt": 0.75})
    assert memory.splitlines()[-1].split(" | ")[1:] == ["4.00 GiB", "0.75", "at most 0.75 |"]
    rates = {("gptcli", 1): [10.0], ("gptcli", 2): [18.0], ("gemm", 1): [1e9], ("gemm", 2): [2e9]}
    ours, gemm = tables.threads_table(rates, 1.7).splitlines()[2:]
    assert ours.endswith("| 1.80 (1.80 to 1.80) | at least 1.7 |")
    assert "| 1 (1 to 1) GFLOP/s | 2 (2 to 2) GFLOP/s | 2.00 (2.00 to 2.00) |" in gemm


def test_write_replaces_one_block(tables, tmp_path):
    """A case written alone must leave the tables of the others as they were."""
    page = tmp_path / "page.md"
    page.write_text("<!-- bench a -->\nold\n<!-- /bench a -->\n<!-- bench b -->\nkept")
    tables.write(r"new \1", "a", page)
    assert page.read_text().startswith("<!-- bench a -->\nnew \\1\n<!-- /bench a -->\n")
    assert page.read_text().endswith("<!-- bench b -->\nkept")
    with pytest.raises(SystemExit, match="bench b"):
        tables.write("new", "b", page)


def test_peak_memory(worker):
    """VmHWM is the peak; VmRSS beside it is what is used now, and both are in kB."""
    assert worker.peak_memory("VmPeak:\t 9 kB\nVmHWM:\t    2 kB\nVmRSS:\t 1 kB\n") == 2048
    assert worker.peak_memory("Name:\tpython\n") is None


def test_other_numbers_of_weights_end_the_run(bench):
    """A peer without biases is a smaller model, and faster."""
    same = {n: SimpleNamespace(facts={"weights": w}) for n, w in (("a", 5), ("b", 5), ("c", None))}
    assert bench.check_weights(same) == 5
    with pytest.raises(SystemExit, match="'a': 5, 'b': 4"):
        bench.check_weights({**same, "b": SimpleNamespace(facts={"weights": 4})})


def test_evaluator_against_brute_force(shakespeare):
    """Overlapping windows, or a rest left out, would score another text than the peer's."""
    table = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(random.Random(0).choices(range(5), k=150 * 3 + 2))

    seen: list[int] = []

    def logits_of(x: Tensor) -> Tensor:
        seen.append(x.numel())
        return table[x]

    nats = [-float(functional.log_softmax(table[a], -1)[b]) for a, b in pairwise(ids)]
    expected = math.fsum(nats) / len(nats)
    assert shakespeare.mean_nats(logits_of, ids, 3) == pytest.approx(expected, rel=1e-5)
    assert sum(seen) == len(ids) - 1


def test_seconds_of_nanogpt(shakespeare):
    """Its first and last iterations hold evaluations, which are not training."""
    log = "step 0: train loss 4.2, val loss 4.2\n" + "".join(
        f"iter {n}: loss 4.2, time {ms:.2f}ms, mfu -100.00%\n"
        for n, ms in enumerate([9000, 50, 60, 9000])
    )
    assert shakespeare.iteration_seconds(log) == pytest.approx(0.11)


def test_equal_time_is_not_more_time(shakespeare):
    """Steps that take longer than the peer's run would compare our loss at a later time."""
    steps = shakespeare.steps_within(100.0, {"step": 300, "seconds": 60.0})
    assert 480 <= steps <= 500
    assert steps * 60.0 / 300 < 100.0


def test_outcomes_table(shakespeare):
    """A run that never gets there has no share, and must not be dropped from the median."""
    reached = shakespeare.Outcome(100.0, 1.9, 20.0, 50.0, 1.7, 99.0, 1.6)
    never = replace(reached, reached_seconds=None)
    lines = shakespeare.outcomes_table([reached, never, never]).splitlines()
    assert "| 20.0 s | 0.200 |" in lines[2]
    assert "| never |  |" in lines[3]
    assert "| inf (0.200 to inf) |" in lines[5]
    assert "at most 1/5" in lines[6]


def test_a_contender_that_cannot_start_is_named(bench, cases, tmp_path):
    """A traceback in a child process must not end as a hang or an empty message."""
    (tmp_path / "model.py").write_text("raise RuntimeError('no such peer')\n")
    prepared = cases.Prepared(tmp_path / "x.yaml", tmp_path / "tokens.bin", 257, 1)
    work = cases.work_of(tiny(cases), "nanogpt", prepared, tmp_path)
    with pytest.raises(bench.Failed, match="nanogpt: RuntimeError: no such peer"):
        bench.started(work)


@pytest.mark.slow  # processes of their own; the benchmarks are run by hand
def test_tiny_contenders_take_turns(bench, cases, tmp_path):
    """The harness drives the real training loop: one that changes must not leave it behind."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 100)
    case = tiny(cases, contenders=("nanogpt",), training={"compile": "off"})
    given = argparse.Namespace(nanogpt=None, contenders=None, rounds=2)
    prepared = cases.prepare(case, text, tmp_path / "data")
    assert (tmp_path / "data" / "tokens.bin").stat().st_size > 2 * 4000
    shown = bench.bench_speed(case, prepared, given)
    head, _, ours, empty, about, *_ = shown.splitlines()
    assert head.startswith("|  | tokens/s |")
    assert ours.startswith("| gptcli | ")
    assert empty == ""
    assert "1 layers, 2 heads, n_embd 16, T 8, B 2, vocabulary 257" in about
    assert shown.endswith("Not run: nanogpt (no --nanogpt CLONE)")
