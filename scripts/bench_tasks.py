#!/usr/bin/env python3
"""Task scores of the recipes in configs/, before and after finetuning, beside simple baselines.

    python scripts/bench_tasks.py --case sentiment-en sentiment_en.jsonl runs/en
    python scripts/bench_tasks.py --case sentiment-zh sentiment_zh.jsonl runs/zh \\
        --set finetune.method=head --write docs/finetune.md

A case is a recipe, its rows as JSON lines, and the model to start from; it may be given more than
once. The protocol is fixed: rows whose text came before are dropped; of the rest every tenth (index
% 10 == 9) is a test row and the others are for training, in an order shuffled whole. A run sees
no test row: what it holds out to choose its best checkpoint is a part of the training rows, and
"before" is its score there; "after" is what `gpt eval --task` says of the test rows. For rows of
text and label the baseline is logistic regression on TF-IDF (words 1 to 2; Chinese: characters 1 to
3), beside the share of the most frequent label; it needs scikit-learn. Runs are kept in --runs, and
a case that has ended with these settings is not run again. `--write FILE` puts the table between
<!-- bench tasks --> and <!-- /bench tasks -->.
"""

import argparse
import hashlib
import json
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_train_tables import table, write

from gptcli.config.finetune_schema import FinetuneConfig
from gptcli.config.load import load_config

HEAD = ["task", "data", "model", "method", "score", "before", "after", "baseline", "majority"]
SCORED_ROWS = 200  # whose answers are generated, of the rows that a run holds out


@dataclass(frozen=True)
class Split:
    """The rows of a file by the protocol."""

    train: list[dict[str, Any]]
    test: list[dict[str, Any]]


@dataclass(frozen=True)
class Baseline:
    """Accuracies on the test rows."""

    regression: float
    majority: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("RECIPE", "DATA", "MODEL")
    parser.add_argument("--case", nargs=3, action="append", required=True, metavar=names)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of all")
    parser.add_argument("--runs", type=Path, default=Path("runs/tasks"), help="(runs/tasks)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into FILE")
    given = parser.parse_args()
    rows = []
    for recipe, data, model in given.case:
        rows += case(recipe, Path(data), model, given.runs, given.set)
    shown = table(HEAD, rows) + "\n"
    print(shown)
    if given.write:
        write(shown, "tasks", given.write)


def case(recipe: str, data: Path, model: str, runs: Path, changes: list[str]) -> list[list[str]]:
    """The lines of the table for a recipe on the rows in `data`, one for each score."""
    settings = load_config(recipe, changes).config.finetune
    found = split(read_rows(data), settings)
    made_of = hashlib.sha256(json.dumps([str(data), model, changes]).encode()).hexdigest()[:8]
    name = f"{recipe}-{Path(model).name}-{settings.method}-{made_of}"
    report, tested = finetuned(recipe, found, model, runs / name, changes)
    base = baseline(found, settings, chinese=recipe.endswith("-zh"))
    lines = []
    for score, entry in tested["tasks"].items():
        beside = ["", ""]
        if base is not None and score == "accuracy":
            beside = [f"{base.regression:.3f}", f"{base.majority:.3f}"]
        told = [figure(report["tasks"].get(score, {}), "before"), figure(entry, "value")]
        about = [recipe, data.name, Path(model).name, settings.method, score]
        lines.append([*about, *told, *beside])
    return lines


def figure(entry: dict[str, Any], moment: str) -> str:
    """A score before or after with its 95 % interval."""
    if entry.get(moment) is None:
        return ""
    if f"{moment}_ci95" not in entry:
        return f"{entry[moment]:.3f}"
    low, high = entry[f"{moment}_ci95"]
    return f"{entry[moment]:.3f} ({low:.3f} to {high:.3f})"


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def split(rows: list[dict[str, Any]], settings: FinetuneConfig) -> Split:
    """Training and test rows. The text of a row is its first field; a label is none."""
    text = next(iter(settings.names.values()))
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(json.dumps(row[text], ensure_ascii=False), row)
    kept = list(first.values())
    train = [row for i, row in enumerate(kept) if i % 10 != 9]
    random.Random(0).shuffle(train)
    return Split(train, kept[9::10])


def finetuned(
    recipe: str, rows: Split, model: str, run_dir: Path, changes: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report of the run, which is made unless it has ended before, and that of the test."""
    folder, tested = (
        run_dir.parent / f"{run_dir.name}-rows",
        run_dir.parent / f"{run_dir.name}-test",
    )
    if not (tested / "report.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("train", rows.train), ("test", rows.test)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        settings = [
            f"data.train={folder / 'train.jsonl'}",
            "data.val_fraction=0.1",
            f"data.shuffle_window={len(rows.train)}",
            f"finetune.score_rows={SCORED_ROWS}",
            *changes,
        ]
        words = [word for setting in settings for word in ("--set", setting)]
        gpt("finetune", recipe, "--model", model, "--run-dir", run_dir, "--auto-resume", *words)
        scored = ("--data", folder / "test.jsonl", "--run-dir", tested)
        gpt("eval", "--task", "--model", run_dir, *scored)
    run, test = (json.loads((d / "report.json").read_text("utf-8")) for d in (run_dir, tested))
    return run, test


def gpt(*words: str | Path) -> None:
    """Run the command; SystemExit when it fails."""
    command = [sys.executable, "-m", "gptcli", *map(str, words)]
    if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"bench_tasks: gpt {words[0]} {words[1]} ended with status {status}")


def baseline(rows: Split, settings: FinetuneConfig, *, chinese: bool) -> Baseline | None:
    """None for a task without texts and labels."""
    if settings.task != "classification":
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    names = settings.names
    texts, labels = ([row[names[n]] for row in rows.train] for n in ("text", "label"))
    asked, right = ([row[names[n]] for row in rows.test] for n in ("text", "label"))
    kind: dict[str, Any] = {"ngram_range": (1, 2)}
    if chinese:
        kind = {"analyzer": "char", "ngram_range": (1, 3)}
    words = TfidfVectorizer(**kind)
    model = LogisticRegression(max_iter=1000).fit(words.fit_transform(texts), labels)
    usual = Counter(labels).most_common(1)[0][0]
    return Baseline(
        regression=float(model.score(words.transform(asked), right)),
        majority=right.count(usual) / len(right),
    )


if __name__ == "__main__":
    main()
