"""Comparing runs: the verdicts on real ones, and that all are scored on the same text."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.compare import compare
from gptcli.config.schema import Config
from gptcli.errors import ConfigError, DataError
from gptcli.evaluate import evaluate
from gptcli.evaluation.paired import paired
from gptcli.pretrain import pretrain
from gptcli.reports.headlines import eval_headlines
from gptcli.reports.report import eval_report_json

WORDS = "the cat dog house sees finds takes small red old tree and under over near".split()  # noqa: SIM905


def sentences(count: int, seed: int) -> str:
    rng = random.Random(seed)
    texts = (" ".join(rng.choices(WORDS, k=rng.randint(8, 30))) for _ in range(count))
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(name, seed, steps, tokenizer, text) -> a run, trained on sentences that no order makes."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", 0), ("other", 1)):
        (folder / f"{name}.jsonl").write_text(sentences(400, seed))

    def train(
        name: str,
        seed: int = 1,
        steps: int = 60,
        tokenizer: str = "bpe",
        text: str = "one",
        **sections: dict[str, Any],
    ) -> Path:
        config = {
            "name": name,
            "seed": seed,
            "tokenizer": {"kind": "bytes"}
            if tokenizer == "bytes"
            else {"kind": "bpe", "vocab_size": 300},
            "data": {"train": str(folder / f"{text}.jsonl"), "val_fraction": 0.1},
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32},
            "schedule": {"warmup_steps": 2},
            "training": {
                "max_steps": steps,
                "tokens_per_step": 512,
                "micro_batch_size": 16,
                "eval_every": 1000,
                "precision": "fp32",
                "compile": "off",
            },
            "samples": {"n": 1, "max_new_tokens": 1},
            **sections,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)
            pretrain(Config.model_validate(config), run_dir=folder / name)
        return folder / name

    return train


@pytest.fixture(scope="module")
def trio(train: Callable[..., Path]) -> list[str]:
    """Two runs that differ in the seed alone, and one that was trained for a sixth of the steps."""
    runs = (train("seed-1"), train("seed-2", seed=2), train("short", steps=10))
    return [str(run) for run in runs]


def test_a_true_difference_and_none(trio: list[str], tmp_path: Path) -> None:
    """Bug: chance is taken for a difference, or a difference for chance, or the sign is turned."""
    same = compare(trio[:2]).report["comparison"]
    assert same["differences"] == {"seed": [1, 2]}
    (pair,) = same["pairs"]
    # On enough text any two models differ: what must not be said is that one seed is better.
    assert pair["seed_alone"]
    assert pair["verdict"].startswith("no difference can be told between ")

    far = compare([trio[2], trio[0]], run_dir=tmp_path / "out").report["comparison"]
    (pair,) = far["pairs"]
    assert (pair["a"], pair["b"], pair["winner"]) == ("short", "seed-1", "b")
    assert pair["ci95"][0] < pair["difference"] < pair["ci95"][1] < 0
    assert pair["better"] / far["units"] > 0.9
    assert pair["sign_p"] < 1e-6
    assert pair["verdict"].startswith("seed-1 is better than short by ")
    assert not pair["seed_alone"]
    early = f"{trio[0]}/checkpoints/step-00000030"
    (pair,) = compare([early, trio[0]]).report["comparison"]["pairs"]
    assert (pair["winner"], pair["seed_alone"]) == ("b", False)  # one run, early and late
    assert far["differences"]["training.max_steps"] == [10, 60]
    assert far["runs"][0]["name"] == "seed-1"
    written = json.loads((tmp_path / "out" / "report.json").read_text())["comparison"]
    assert written == json.loads(json.dumps(far))


def test_scores_are_those_of_gpt_eval(trio: list[str]) -> None:
    """Bug: the ranking shows other figures than gpt eval does for the same run."""
    found = compare(trio).report["comparison"]
    assert [row["bits_per_byte"] for row in found["runs"]] == sorted(
        row["bits_per_byte"] for row in found["runs"]
    )
    assert {(pair["a"]) for pair in found["pairs"]} == {found["runs"][0]["name"]}
    config = Config.model_validate({"training": {"precision": "fp32"}})
    for run in trio:
        scores = evaluate(config, model=run).scores
        (row,) = [row for row in found["runs"] if row["name"] == Path(run).name]
        assert row["bits_per_byte"] == pytest.approx(scores.bits_per_byte, abs=1e-9)
        assert row["tokens"] == scores.tokens
    assert found["units"] == scores.documents


def test_other_tokenizers_and_few_documents(
    trio: list[str], train: Callable[..., Path], tmp_path: Path
) -> None:
    """Bug: a limit in tokens gives each tokenizer another text; three documents have no
    interval."""
    run = train("bytes", tokenizer="bytes", steps=2)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("the cat sees the old tree\n" * 200)
    found = compare([trio[0], str(run)], data=[f"{tmp_path}/*.txt"], max_tokens=2000)
    comparison = found.report["comparison"]
    assert comparison["unit"] == "pieces"
    assert "pieces of 1 KiB" in comparison["notes"][0]
    counts = {row["name"]: row["tokens"] for row in comparison["runs"]}
    assert counts["seed-1"] <= 2000 + comparison["units"]  # a piece may end inside a token
    assert counts["bytes"] == comparison["bytes"] > 2 * counts["seed-1"]
    assert comparison["pairs"][0]["winner"] == "a"


def test_different_data_are_refused(trio: list[str], train: Callable[..., Path]) -> None:
    """Bug: each run is scored on its own validation part, and an easier text wins."""
    run = train("elsewhere", text="other", steps=2)
    with pytest.raises(DataError, match="trained on different data") as caught:
        compare([trio[0], str(run)])
    assert "--data" in (caught.value.hint or "")


def test_the_same_model_twice(trio: list[str]) -> None:
    """Bug: a model against itself is shown as a draw of two."""
    with pytest.raises(ConfigError, match="twice"):
        compare([trio[0], trio[0]])


def test_a_checkpoint_on_the_way_is_no_result(trio: list[str]) -> None:
    """Bug: a run that is a sixth done differs from a finished one "in the seed alone"."""
    early = f"{trio[0]}/checkpoints/step-00000030"
    (pair,) = compare([early, trio[1]]).report["comparison"]["pairs"]
    assert (pair["winner"], pair["seed_alone"]) == ("b", False)


def test_keys_that_change_no_weights(trio: list[str], train: Callable[..., Path]) -> None:
    """Bug: with another number of samples, two seeds of one recipe are said to differ in it."""
    others = {"samples": {"n": 2, "max_new_tokens": 3}, "finetune": {"max_new_tokens": 7}}
    run = train("seed-3", seed=3, **others, generate={"n": 2})
    found = compare([trio[0], str(run)]).report["comparison"]
    assert found["pairs"][0]["seed_alone"]
    assert found["differences"]["samples.n"] == [1, 2]
    assert not [key for key in found["differences"] if key.startswith("finetune.")]


def test_the_best_is_one_of_all_pairs(trio: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the best of three is picked on the text that tests it, and two intervals are too few."""
    counts = []

    def counted(*arguments: Any) -> Any:
        counts.append(arguments[3])
        return paired(*arguments)

    monkeypatch.setattr("gptcli.compare.paired", counted)
    three = compare(trio).report
    assert counts == [3, 3]
    assert [h.label for h in eval_headlines(three)] == ["Best bits per byte", "Text"]
    two = compare(trio[:2]).report
    assert counts == [3, 3, 1]
    (pair,) = two["comparison"]["pairs"]
    first = eval_headlines(two)[0]
    assert (first.label, first.value) == (
        "Difference in bits per byte",
        f"{pair['difference']:+.4f}",
    )
    assert f"95 % interval {pair['ci95'][0]:+.4f} to" in first.note


def test_a_run_keeps_its_own_report(trio: list[str], tmp_path: Path) -> None:
    """Bug: --run-dir names a run, and the comparison replaces the report of its training; or it
    names a file, and the scores are lost."""
    with pytest.raises(ConfigError, match="is a training run"):
        compare(trio[:2], run_dir=Path(trio[0]))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a directory"):
        compare(trio[:2], run_dir=tmp_path / "file" / "out")


def test_json_is_the_report(trio: list[str], tmp_path: Path, gpt: Any) -> None:
    """Bug: --json prints NaN, or other keys than report.json has."""
    flags = ["--json", "--run-dir", str(tmp_path / "out")]
    code, out, _ = gpt("runs", "compare", *trio[:2], *flags)
    assert (code, out) == (0, (tmp_path / "out" / "report.json").read_text())
    assert "NaN" not in eval_report_json({"scores": {"loss": float("nan")}})
