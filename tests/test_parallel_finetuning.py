"""Finetuning by two processes against one: the same losses and scores; one stop stops both."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.small import working_in
from ranks import Ranks, train_together

from gptcli import finetune, stop
from gptcli.cli.main import main
from gptcli.runs.run_dir import read_run_json

TUNE = """\
name: tuned
init: base
data: {train: rows.jsonl, val_fraction: 0.2}
training: {max_steps: 8, tokens_per_step: 160, log_every: 1, eval_every: 4, save_every: 4,
           micro_batch_size: 1, precision: fp32, compile: off, device: cpu}
optimizer: {kind: adamw, lr: 0.003}
schedule: {warmup_steps: 1}
samples: {n: 1, max_new_tokens: 2}
"""
ANSWER = "finetune: {fields: {prompt: q, response: a}, template: '{{ prompt }}:'}\n"
LABEL = "finetune: {task: classification, fields: {text: q, label: a}}\n"
KINDS = {
    "answers": [ANSWER],
    "adapters": [ANSWER.replace("}\n", ", method: lora}\n")],
    "labels": [LABEL],
    "labels and no text": [LABEL.replace("}}", "}, lm_weight: 0}")],
    "a head alone": [LABEL.replace("}}", "}, method: head}")],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with working_in(tmp_path_factory.mktemp("finetuning")) as place:
        sounds = {"cat": "meow", "dog": "woof", "cow": "moo"}
        rows = [{"q": f"{a} {i}", "a": s} for i in range(20) for a, s in sounds.items()]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["pretrain", "tiny.yaml", "--run-dir=base", "--quiet"]) == 0
        yield place


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["event"] in ("train", "eval")]


def numbers(entry: Any) -> list[float]:
    """All numbers of a score, with those of its parts."""
    if isinstance(entry, dict):
        return [number for key in sorted(entry) for number in numbers(entry[key])]
    if isinstance(entry, list):
        return [number for part in entry for number in numbers(part)]
    return [entry]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_finetune_as_one_does(kind: str, folder: Path) -> None:
    """Guards the losses of every step and the scores before and after, of each way to learn."""
    (folder / "tune.yaml").write_text(TUNE + "".join(KINDS[kind]))
    assert main(["finetune", "tune.yaml", f"--run-dir=one {kind}", "--quiet"]) == 0
    train_together(["finetune", "tune.yaml", f"--run-dir=two {kind}"])
    one, two = losses(folder / f"one {kind}"), losses(folder / f"two {kind}")
    assert one == pytest.approx(two, abs=1e-5)
    assert len(one) == 8 + 3
    tasks = [read_run_json(folder / f"{n} {kind}")["tasks"] for n in ("one", "two")]
    assert tasks[0].keys() == tasks[1].keys()
    for name, entry in tasks[0].items():
        assert numbers(entry) == pytest.approx(numbers(tasks[1][name]), rel=1e-4), name


def asked(when: str) -> Callable[[], None]:
    """For a child: a stop as the scores of `when` are taken."""

    def install() -> None:
        score = finetune._Run.score

        def stopped(run: finetune._Run, now: str) -> None:
            if now == when:
                stop.request(15)
            score(run, now)

        finetune._Run.score = stopped  # type: ignore[method-assign]

    return install


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_stop_while_scoring(when: str, rank: int, folder: Path) -> None:
    """Guards a stop that one process sees while the task is scored: exit 143 for both, a run that
    says stopped, and the same command with --auto-resume finishes it."""
    (folder / "tune.yaml").write_text(TUNE + ANSWER)
    run = f"stop {when} {rank}"
    line = ["finetune", "tune.yaml", f"--run-dir={run}"]
    ranks = Ranks(line, before={rank: asked(when)})
    (code, said), (other, silent) = ranks.wait()
    assert (code, other, silent) == (143, 143, ""), said
    assert read_run_json(folder / run)["status"] == "stopped"
    train_together([*line, "--auto-resume"])
    about = read_run_json(folder / run)
    assert about["status"] == "finished"
    assert {"before", "after"} <= about["tasks"]["exact_match"].keys()
