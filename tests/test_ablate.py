"""scripts/ablate.py: which runs it makes, what it concludes from them, and how it goes on."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gptcli.errors import ConfigError

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(scope="module")
def ablate() -> ModuleType:
    return importlib.import_module("ablate")


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return importlib.import_module("ablation_tables")


def a_plan(tables: ModuleType, variants: list[str], texts: int = 2, seeds: int = 3):
    """Variants `FACTOR VALUE`; the key of a run is `FACTOR VALUE/text/seed`, of bases `/text/seed`.

    Bases are called `FACTOR base`.
    """
    keys = [
        [[f"{'' if 'base' in v else v}/{t}/{s}" for s in range(seeds)] for t in range(texts)]
        for v in variants
    ]
    return tables.Plan(
        kind="ablations",
        command="ablate",
        date="2026-01-01",
        machine="a machine",
        base="small",
        limit="45 s",
        texts=[f"text{t}" for t in range(texts)],
        seeds=list(range(seeds)),
        variants=[tables.Variant(*v.split(" "), settings=()) for v in variants],
        keys=keys,
    )


def results_of(tables: ModuleType, scores: dict[str, list[float | None]], seconds: float = 40.0):
    """Results from `VARIANT/text` -> scores by seed."""
    found = {}
    for name, values in scores.items():
        for seed, score in enumerate(values):
            key = f"{name}/{seed}"
            found[key] = tables.Result(key, score, score, 100, seconds, 1000, "cpu, fp32")
    return found


@pytest.mark.parametrize(
    ("text", "factor", "settings"),
    [
        (
            "optimizer.lr=0.01, 2e-2",
            "optimizer.lr",
            [("optimizer.lr=0.01",), ("optimizer.lr=2e-2",)],
        ),
        (
            "optimizer.betas=[0.9,0.95],[0.9,0.99]",
            "optimizer.betas",
            [("optimizer.betas=[0.9,0.95]",), ("optimizer.betas=[0.9,0.99]",)],
        ),
        (
            "depth: model.n_layer=3 model.n_embd=256 | model.n_layer=6 model.n_embd=192",
            "depth",
            [("model.n_layer=3", "model.n_embd=256"), ("model.n_layer=6", "model.n_embd=192")],
        ),
        ("data.val=hub:a/b", "data.val", [("data.val=hub:a/b",)]),
    ],
)
def test_factors_as_written(ablate, text, factor, settings) -> None:
    """Commas inside brackets, or the colon of a hub name, read as the borders of values."""
    values = ablate.parse_factor(text)
    assert [value.settings for value in values] == settings
    assert {value.factor for value in values} == {factor}


@pytest.mark.parametrize(
    "text", ["", "lr", "=1", "lr=", "lr=1,,2", "d:", "d: a=1 | ", "d: a | b=1"]
)
def test_unreadable_factors_are_refused(ablate, text) -> None:
    """An empty value would train the base under another name."""
    with pytest.raises(ConfigError, match="--factor"):
        ablate.parse_factor(text)


def test_ladder_sizes(ablate) -> None:
    """Anything but layers and width changed in a ladder, or a size read wrongly."""
    sizes = [size.settings for size in ablate.parse_ladder("2x64, 12x768")]
    assert sizes == [
        ("model.n_layer=2", "model.n_embd=64"),
        ("model.n_layer=12", "model.n_embd=768"),
    ]
    with pytest.raises(ConfigError, match="2x64,4x128"):
        ablate.parse_ladder("2x64,large")


def test_values_take_turns(ablate, tables) -> None:
    """All runs of a value together meet one speed of the machine, those of the base another."""
    plan = a_plan(tables, ["lr base", "lr a", "lr b", "clip base", "clip c"])
    runs = list(ablate.in_turns(plan, {}))
    keys = [key for _, _, _, key in runs]
    assert len(keys) == len(set(keys)) == 4 * 2 * 3  # the base once, not once a factor
    blocks = [keys[i : i + 4] for i in range(0, len(keys), 4)]
    names = [{key.split("/")[0] for key in block} for block in blocks]
    assert names == [{"", "lr a", "lr b", "clip c"}] * 6
    assert len({block[0].split("/")[0] for block in blocks}) > 1  # another one begins


def test_only_missing_runs_are_made(ablate, tables) -> None:
    """An interrupted ablation that begins again from its first run."""
    plan = a_plan(tables, ["lr base", "lr a"], texts=1, seeds=2)
    results = results_of(tables, {"/0": [2.0], "lr a/0": [1.9, 1.8]})
    assert [key for *_, key in ablate.in_turns(plan, results)] == ["/0/1"]


@pytest.mark.parametrize(
    ("differences", "times", "words"),
    [
        ([(-0.03, -0.04, -0.02), (-0.01, -0.012, -0.008)], [1.0, 1.0], "better"),
        ([(-0.03, -0.04, -0.02), (-0.01, -0.02, 0.005)], [1.0, 1.0], "no clear difference"),
        ([(-0.03, -0.04, -0.02), (0.01, 0.009, 0.011)], [1.0, 1.0], "no clear difference"),
        ([(0.03, 0.02, 0.04), (0.01, 0.009, 0.011)], [1.0, 1.0], "worse"),
        ([(0.0, 0.0, 0.0)], [1.0], "no clear difference"),
        ([(-0.03, -0.04, -0.02)], [1.08], "no verdict: +8% training time"),
        ([(-0.03, -0.04, -0.02)] * 2, [1.01, 0.9], "no verdict: -10% training time"),
    ],
)
def test_verdicts(tables, differences, times, words) -> None:
    """A value that wins on one text, by noise or by more time must not replace a default."""
    spreads = [tables.Spread(*difference) for difference in differences]
    assert tables.verdict(spreads, times) == words


def test_differences_are_paired_by_seed(tables) -> None:
    """Seeds differ by more than values do: unpaired, a gain that every seed shows is lost."""
    plan = a_plan(tables, ["lr base", "lr a"])
    base = [2.0, 2.5, 3.0]
    scores = {"/0": base, "/1": base}
    scores |= {f"lr a/{text}": [b - 0.1 for b in base] for text in range(2)}
    words, difference = tables.judge(plan, results_of(tables, scores), 0, 1)
    assert (words, round(difference, 6)) == ("better", -0.1)


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([1.9, 1.9], "not finished"),
        ([1.9, None, 1.9], "diverged"),
    ],
)
def test_no_verdict_without_all_runs(tables, scores, words) -> None:
    """A missing or diverged run left out of the mean makes a value look good."""
    plan = a_plan(tables, ["lr base", "lr a"], texts=1)
    results = results_of(tables, {"/0": [2.0, 2.0, 2.0], "lr a/0": scores})
    assert tables.judge(plan, results, 0, 1)[0] == words


def test_one_value_of_a_factor_replaces_the_default(tables) -> None:
    """Two values that both beat the base cannot both become the default."""
    plan = a_plan(tables, ["lr base", "lr a", "lr b", "lr c"], texts=1)
    scores = {"/0": [2.0] * 3, "lr a/0": [1.9] * 3, "lr b/0": [1.8] * 3, "lr c/0": [2.1] * 3}
    lines = tables.factor_table(plan, results_of(tables, scores), "lr")
    assert [line.split("|")[-2].strip() for line in lines[2:]] == [
        "",
        "better",
        "**replaces the default**",
        "worse",
    ]
    assert len({line.count("|") for line in lines}) == 1


def test_ladder_names_the_size_that_is_worse(tables) -> None:
    """A ladder that is called good because its last size beats its first."""
    plan = a_plan(tables, ["size 2x64", "size 4x128", "size 6x192"], texts=1, seeds=1)
    falling = {"size 2x64/0": [5.0], "size 4x128/0": [4.5], "size 6x192/0": [4.0]}
    lines = tables.ladder_table(plan, results_of(tables, falling))
    assert lines[-1] == "The loss falls with every size."
    lines = tables.ladder_table(plan, results_of(tables, falling | {"size 4x128/0": [5.5]}))
    assert lines[-1] == "The loss does not fall: text0 at 4x128."
    del falling["size 6x192/0"]
    assert tables.ladder_table(plan, results_of(tables, falling))[-1] == "Not finished."


def test_results_survive_a_crash(tables, tmp_path) -> None:
    """A line that was cut off swallows the next result, or makes the file unreadable."""
    path, plan = tmp_path / "results.jsonl", a_plan(tables, ["lr base", "lr a"])
    first, second = results_of(tables, {"/0": [2.0, None]}).values()
    tables.append(path, plan)
    tables.append(path, first)
    with path.open("a") as file:
        file.write('{"key": "torn", "bits_per')
    tables.append(path, second)
    results, plans = tables.read_results(path)
    assert results == {first.key: first, second.key: second}
    assert plans == {"ablations": plan}
    assert tables.read_results(tmp_path / "none.jsonl") == ({}, {})


def test_each_kind_of_table_has_its_place(tables) -> None:
    """The ladder's section written over the ablations', or a table added at every run."""
    page = tables.replace_section("# Title\n", "ablations", "old")
    page = tables.replace_section(page, "ladder", "sizes")
    page = tables.replace_section(page, "ablations", r"new \1")
    expected = "# Title\n\n<!-- ablations -->\nnew \\1\n<!-- /ablations -->\n\n"
    assert page == expected + "<!-- ladder -->\nsizes\n<!-- /ladder -->\n"


def options(**given: object) -> argparse.Namespace:
    """The command line's values."""
    usual = {"base": "tiny", "settings": [], "factors": [], "ladder": None}
    usual |= {"seeds": 2, "seconds": 3.0, "tokens": 5000}
    return argparse.Namespace(**(usual | given))


def test_plan_checks_every_value_first(ablate) -> None:
    """A key misspelt in the last factor shows up after twenty minutes of runs."""
    texts = [ablate.Text("a", "/a.txt", "0" * 64)]
    with pytest.raises(ConfigError, match="n_layer"):
        ablate.make_plan(options(factors=["optimizer.lr=0.01", "model.n_layers=2"]), texts)
    with pytest.raises(ConfigError, match="twice"):
        ablate.make_plan(options(factors=["optimizer.lr=0.01", "optimizer.lr=0.03"]), texts)


def test_plan_shares_the_base(ablate) -> None:
    """A base that is trained again for each factor, or for a value that changes nothing."""
    texts = [ablate.Text("a", "/a.txt", "0" * 64), ablate.Text("b", "/b.txt", "1" * 64)]
    factors = ["training.clip_norm=1.0,0.5", "depth: model.n_layer=3 model.n_embd=48"]
    plan, configs = ablate.make_plan(options(factors=factors), texts)
    labels = [variant.label for variant in plan.variants]
    assert labels == ["base: 1.0", "0.5", "base: n_layer=2 n_embd=64", "n_layer=3 n_embd=48"]
    assert plan.keys[0] == plan.keys[2]
    keys = {key for variant in plan.keys for text in variant for key in text}
    assert len(keys) == 3 * 2 * 2  # no two of the runs have one name
    assert {config.training.max_time for config in configs} == {"3s"}
    assert {config.training.max_steps for config in configs} == {None}  # the base has one


def test_ladder_has_equal_tokens(ablate) -> None:
    """Sizes that are stopped by the time or by the base's steps compare speeds instead."""
    texts = [ablate.Text("a", "/a.txt", "0" * 64)]
    _, configs = ablate.make_plan(options(ladder="1x32,2x64"), texts)
    limits = [(c.training.max_tokens, c.training.max_time, c.training.max_steps) for c in configs]
    assert limits == [(5000, None, None)] * 2


@pytest.mark.slow  # processes of their own; the benchmarks are run by hand
def test_runs_and_goes_on(tmp_path) -> None:
    """The whole way: real runs, the file that is written, and nothing trained twice."""
    text, page = tmp_path / "words.txt", tmp_path / "page.md"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    shown = [sys.executable, str(SCRIPTS / "ablate.py"), "--results", str(tmp_path / "r.jsonl")]
    asked = ["--base", "tiny", "--texts", str(text), "--seeds", "1", "--seconds", "2"]
    asked += ["--set", "tokenizer.vocab_size=300", "--set", "data.val_fraction=0.2"]
    asked += ["--factor", "optimizer.lr=0.001", "--write", str(page)]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*shown, *arguments], capture_output=True, text=True, timeout=280)

    done = run(*asked)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("bits/byte") == 2
    results = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()][1:]
    assert len({result["key"] for result in results}) == 2
    assert all(0 < result["bits_per_byte"] < 10 for result in results)
    assert "2 of 2 runs on words" in done.stdout
    assert done.stdout.strip() in page.read_text()
    assert str(tmp_path) not in page.read_text()  # no places of one machine
    again = run(*asked)
    assert again.stderr.splitlines()[0].startswith("0 runs to make")
    assert run("--report-only").stdout == again.stdout == done.stdout
