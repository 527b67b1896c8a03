import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gptcli.config.load import dump_config
from gptcli.config.schema import Config
from gptcli.errors import CheckpointError
from gptcli.reports.history import history_table
from gptcli.reports.html import column_classes
from gptcli.reports.plots import TrainingPlots
from gptcli.reports.report import write_eval_report, write_report
from gptcli.reports.settings import Settings, settings
from gptcli.reports.table import Table

HOSTILE = (
    "<script>alert(1)</script><img src=http://evil.example/x>\x1b[2J\x9b\u202e\ud800 ```` 中文"
)


def _scores(**changes: Any) -> dict[str, Any]:
    return {
        "loss": 3.2,
        "perplexity": 24.5,
        "bits_per_byte": 1.5123,
        "bits_per_byte_ci95": [1.47, 1.55],
        "accuracy": 0.381,
        "tokens": 25010,
        "bytes": 81220,
        "documents": 24,
        "block_size": 128,
        "stride": 128,
        **changes,
    }


def _metrics(steps: int = 100) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(0, steps + 1, 5):
        if step:
            lines.append(
                {
                    "event": "train",
                    "step": step,
                    "tokens": step * 512,
                    "loss": 7.0 / (1 + step / 20),
                    "lr": 0.01,
                    "grad_norm": 0.5,
                    "tokens_per_second": 1000.0 + step,
                    "seconds": step * 0.5,
                    "data_wait_seconds": 0.25,
                    "forward_backward_seconds": 2.0,
                    "optimizer_seconds": 0.25,
                    "other_seconds": 0.0,
                    "memory_bytes": 500_000_000 + step,
                }
            )
        if step % 25 == 0:
            loss = 7.2 / (1 + step / 20) + (0.5 if step == steps else 0)
            line = {"event": "eval", "step": step, "tokens": step * 512, "loss": loss}
            lines.append({**line, "perplexity": 2.7**loss, "bits_per_byte": loss / 2, "seconds": 1})
    return lines


def _run(directory: Path, *, run: dict[str, Any] | None = None, text: str = " in the east") -> Path:
    """A run directory as pretrain leaves it; `run` replaces or removes keys of run.json."""
    directory.mkdir(exist_ok=True)
    about = {
        "status": "finished",
        "job": "pretrain",
        "command": "gpt pretrain small",
        "name": "small",
        "created": "2026-11-22T04:37:11+00:00",
        "versions": {"torch": "2.13.0"},
        "machine": {"device": "cpu", "threads": 2, "memory_bytes": 16_600_000_000},
        "choices": {"precision": "fp32", "compile": False},
        "seeds": {"seed": 1337},
        "model": {"parameters": 4_213_760, "preset": "modern", "n_layer": 4, "n_embd": 256},
        "data": {"train": {"documents": 9}, "val": {"documents": 2}, "warnings": []},
        "scores": _scores(),
        "training": {"steps": 100, "tokens": 51200, "seconds": 50.0, "best_step": 75},
        **(run or {}),
    }
    about = {key: value for key, value in about.items() if value is not None}
    (directory / "run.json").write_text(json.dumps(about))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in _metrics()))
    samples = [
        {
            "step": step,
            "tokens": step * 512,
            "prompt": "Once",
            "text": f"at{step}{text}",
            "sample": k,
        }
        for step in (0, 50, 100)
        for k in (0, 1)
    ]
    (directory / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    (directory / "config.yaml").write_text("name: small\nseed: 1337\n")
    return directory


class _Elements(HTMLParser):
    """Every start tag with its attributes, as a browser would see it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run with its report, and what was returned; only to be read."""
    run = _run(tmp_path_factory.mktemp("finished") / "run")
    return run, write_report(run)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of a second: tests of other things do without."""
    monkeypatch.setattr(
        "gptcli.reports.page.training_plots", lambda metrics, resumed: TrainingPlots([], [])
    )


def test_report_json_keeps_the_contract(finished: tuple[Path, dict[str, Any]]) -> None:
    """Guards the names that scripts read; the file holds what is returned."""
    run, report = finished
    assert json.loads((run / "report.json").read_text()) == report
    assert report["scores"] == _scores()
    assert report["training"] == {
        "steps": 100,
        "tokens": 51200,
        "seconds": 50.0,
        "tokens_per_second": 1055.0,  # the median of the log, where run.json has none
        "parameters": 4_213_760,
        "best_step": 75,
    }
    assert report["status"] == "finished"
    assert report["run"]["name"] == "small"
    assert report["machine"]["memory_bytes"] == 16_600_000_000
    assert report["model"]["preset"] == "modern"
    assert report["data"]["val"] == {"documents": 2}
    assert report["tasks"] == {}
    assert report["notes"] == []


def test_no_temporary_files_stay(tmp_path: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    """Guards against leftovers of the atomic writes in the run directory."""
    before = {p.name for p in _run(tmp_path / "run").iterdir()}
    added = {p.name for p in finished[0].iterdir()} - before
    assert added == {"report.json", "report.md", "report.html"}


def test_nan_becomes_null(tmp_path: Path) -> None:
    """Guards against `NaN` in report.json, which strict parsers refuse."""
    run = _run(tmp_path / "run", run={"scores": _scores(loss=800.0, perplexity=float("inf"))})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"event": "eval", "step": 125, "tokens": 1, "loss": NaN}\n')
    write_report(run)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    report = json.loads((run / "report.json").read_text(), parse_constant=refuse)
    assert report["scores"]["perplexity"] is None
    assert report["last_eval"]["loss"] is None
    assert "inf" in (run / "report.md").read_text()  # the loss is known, so this is not unknown


@pytest.mark.usefixtures("no_figures")
def test_updates_that_were_not_applied_say_why(tmp_path: Path) -> None:
    """Guards against inf, nan and spikes told as one: what to change is not the same. And against a
    damaged line that costs the report."""
    run = _run(tmp_path / "run", run={"training": {"steps": 100, "skipped_steps": 4}})
    lines: list[dict[str, Any]] = [
        {"event": "bad_step", "step": 3, "loss": None, "not_finite": {"loss": "inf"}},
        {"event": "bad_step", "step": 4, "loss": None, "not_finite": {"loss": "nan"}},
        {"event": "bad_step", "step": 5, "loss": None, "not_finite": {"loss": "nan"}},
        {"event": "spike", "step": 6, "loss": 9.0},
        {"event": "note", "step": 7, "not_finite": 7},
    ]
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    notes = write_report(run)["notes"]
    told = "4 updates were not applied: 2 with loss nan; 1 with loss inf; 1 with a spike"
    assert any(note.startswith(told) for note in notes)
    events = re.findall(r"\| (\w+) +\| +(\d) +\| (\w+ \S+)", (run / "report.md").read_text())
    assert [detail for name, _, detail in events if name in ("bad_step", "spike")] == [
        "loss inf",
        "loss nan",
        "loss nan",
        "loss 9",
    ]


def test_a_killed_run_gets_a_report_that_says_so(tmp_path: Path) -> None:
    """Guards against a crash, or empty figures, where the run never wrote its scores."""
    run = _run(tmp_path / "run", run={"status": "running", "scores": None, "training": None})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')  # killed while writing
    report = write_report(run)
    assert report["scores"]["loss"] is None
    assert report["training"]["steps"] == 100
    assert report["training"]["best_step"] == 75
    assert any("killed" in note for note in report["notes"])
    html = (run / "report.html").read_text()
    assert "the evaluation at step 100 stands in" in html
    assert "at step 100" in html
    assert "0.850" in html  # bits per byte of the last evaluation stands in


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"scores": [1], "machine": "x"}'])
def test_any_file_may_be_missing_or_damaged(tmp_path: Path, content: str | None) -> None:
    """Guards against a report that fails just when the run went wrong."""
    if content is not None:
        for name in ("run.json", "metrics.jsonl", "samples.jsonl", "config.yaml"):
            (tmp_path / name).write_text(content)
    report = write_report(tmp_path)
    assert report["notes"]
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")


def test_no_such_directory() -> None:
    """Guards against making a directory out of a mistyped name."""
    with pytest.raises(CheckpointError, match="no such run"):
        write_report(Path("nowhere"))


@pytest.mark.usefixtures("no_figures")
def test_scores_older_than_the_last_step_say_so(tmp_path: Path) -> None:
    """Guards against passing off the scores of an earlier step as those of the stopped one."""
    report = write_report(
        _run(tmp_path / "run", run={"status": "stopped", "training": {"steps": 117}})
    )
    assert "The scores are those of step 100, the last that was evaluated." in report["notes"]


def test_untrusted_text_stays_text(tmp_path: Path) -> None:
    """Guards against samples, names or configs that run scripts or steer a terminal."""
    run = _run(
        tmp_path / "run",
        text=HOSTILE,
        run={
            "name": HOSTILE,
            "status": HOSTILE,
            "command": HOSTILE,
            "versions": {HOSTILE: HOSTILE},
            "data": {"train": {HOSTILE: [HOSTILE]}, "warnings": [HOSTILE]},
            "tasks": {HOSTILE: {"before": HOSTILE, "after": 1, HOSTILE: 2}},
        },
    )
    (run / "config.yaml").write_text(HOSTILE.replace("\ud800", ""))
    write_report(run)
    html = (run / "report.html").read_text()
    tags = {tag for tag, _ in _Elements(html).found}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    assert "&lt;script&gt;alert(1)" in html
    for name in ("report.html", "report.md", "report.json"):
        text = (run / name).read_text()
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text), name
    assert r"\x1b[2J\x9b\u202e\ud800" in html
    assert "中文" in html


def test_html_fetches_nothing(finished: tuple[Path, dict[str, Any]]) -> None:
    """Guards against a report that calls home or breaks offline."""
    html = (finished[0] / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import", html)
    elements = _Elements(html).found
    policies = [a["content"] for t, a in elements if a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    for _, attributes in elements:
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("xlink:href") or "#").startswith("#")
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", html))


def test_figures_are_there_and_ids_unique(finished: tuple[Path, dict[str, Any]]) -> None:
    """Guards against figures that borrow each other's clip paths when inlined together."""
    html = (finished[0] / "report.html").read_text()
    titles = re.findall("<figcaption>(.*)</figcaption>", html)
    assert titles == [
        *("Loss by step", "Loss by step, later half"),
        *("Loss by tokens", "Loss by tokens, later half"),
        *("Loss by training time", "Loss by training time, later half"),
        *("Loss by tokens, both axes logarithmic", "Loss by training time, both axes logarithmic"),
        *("Learning rate", "Gradient norm", "Tokens per second", "Peak memory"),
    ]
    assert html.count("<svg ") == len(titles)
    assert "Validation: from 7.200 to 1.700, lowest 1.516." in html  # for those who cannot see it
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]*)', html))
    assert used
    assert used <= set(ids)


def test_latest_samples_first(finished: tuple[Path, dict[str, Any]]) -> None:
    """Guards the order that lets a reader see at once what the model writes now."""
    html = (finished[0] / "report.html").read_text()
    markdown = (finished[0] / "report.md").read_text()
    for text in (html, markdown):
        assert text.index("at100 in the east") < text.index("at50 in") < text.index("at0 in")


@pytest.mark.usefixtures("no_figures")
def test_tasks_before_and_after(tmp_path: Path) -> None:
    """Guards the table that shows what finetuning changed."""
    tasks = {"exact_match": {"before": 0.0, "after": 0.12, "rows": 200}}
    write_report(_run(tmp_path / "run", run={"job": "finetune", "tasks": tasks}))
    markdown = (tmp_path / "run/report.md").read_text()
    assert "| exact_match | 0.000 | 0.120 | +0.120 | 200 |" in markdown
    assert "# Finetuning: small" in markdown
    assert "gpt finetune " in markdown


def test_same_files_same_bytes(finished: tuple[Path, dict[str, Any]]) -> None:
    """Guards against dates or random ids that make two reports of one run differ."""
    run, report = finished
    names = ("report.json", "report.md", "report.html")
    first = [(run / name).read_bytes() for name in names]
    assert write_report(run) == report
    assert [(run / name).read_bytes() for name in names] == first


@pytest.mark.usefixtures("no_figures")
def test_commands_survive_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against commands that break on a space, or name a place that is not there."""
    monkeypatch.chdir(tmp_path)
    report = write_report(_run(tmp_path / "my run"))
    assert report["commands"] == {
        "reproduce": "gpt pretrain 'my run/config.yaml'",
        "resume": "gpt pretrain 'my run/config.yaml' --run-dir 'my run' --resume",
    }


def test_long_runs_stay_light(tmp_path: Path) -> None:
    """Guards against a page of many megabytes for a run of many steps."""
    run = _run(tmp_path / "run")
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(30_000):
            loss = 3 + (step * 7919 % 1000) / 1000
            line = {"event": "train", "step": step, "loss": loss, "seconds": step, "lr": loss}
            file.write(json.dumps(line) + "\n")
            if step % 10 == 0:
                file.write(json.dumps({"event": "eval", "step": step, "loss": loss}) + "\n")
    with open(run / "samples.jsonl", "w") as file:
        for step in range(2000):
            row = {"step": step, "prompt": f"{step % 20}", "text": "\u202e" * 9000}
            file.write(json.dumps(row) + "\n")
    about = json.loads((run / "run.json").read_text())
    facts = {"documents": 1, "train_bytes": 9, "cleaning": {"redact": {"examples": ["c" * 9000]}}}
    about["data"]["sources"] = [{"path": f"{n}-{'d' * 500}", **facts} for n in range(3000)]
    about["data"]["warnings"] = ["e" * 9000] * 3000
    (run / "run.json").write_text(json.dumps(about))
    (run / "config.yaml").write_text("name: small\n" + "# long\n" * 200_000)
    write_report(run)
    assert (run / "report.html").stat().st_size < 2_000_000
    assert (run / "report.md").stat().st_size < 2_000_000
    assert "40 of 3000 evaluations" in (run / "report.html").read_text()


def test_what_differs_from_the_defaults_is_marked(tmp_path: Path) -> None:
    """Guards against a config of a hundred keys in which nobody finds the three that were set."""
    sources = [{"path": "a.txt"}, {"path": "b.txt", "limit": 7}]
    model = {"n_embd": 128, "n_head": 2}
    given = {"name": "mine", "model": model, "data": {"train": sources}, "init": None}
    whole = Config.model_validate(given)
    shown = settings(dump_config(whole, loadable=True))
    assert shown.changed is not None
    assert shown.changed.rows == [
        ["name", "mine", "–"],
        ["data.train[0].path", "a.txt", "builtin:web-bible"],
        ["data.train[1].path", "b.txt", "builtin:web-bible"],
        ["data.train[1].limit", "7", "–"],
        ["model.n_head", "2", "4"],
        ["model.n_embd", "128", "256"],
    ]
    marked = [line.strip(" -") for line, differs in shown.lines if differs]
    assert marked == [
        *("name: mine", "path: a.txt", "path: b.txt", "limit: 7", "n_head: 2", "n_embd: 128")
    ]
    for damaged in ("", "[", "model: 3", "- 1\n- 2", "{a: {b: &x [*x]}}"):
        assert settings(damaged) == Settings([(line, False) for line in damaged.split("\n")], None)


@pytest.mark.usefixtures("no_figures")
def test_a_damaged_part_costs_no_other(tmp_path: Path) -> None:
    """Guards against a report that fails for one odd value in run.json."""
    run = _run(tmp_path / "run", run={"attention": {"layers": 3}, "surprising": [1], "history": 3})
    write_report(run)
    html = (run / "report.html").read_text()
    assert "run.json is damaged here" in html
    assert "Held out" in html or "documents" in html


def test_history_says_what_was_killed() -> None:
    """Guards against a run that seems to have gone on without a break, or a table of nothing."""
    start, stop = {"event": "start", "step": 0}, {"event": "stopped", "step": 5}
    again, end = {"event": "resume", "step": 5, "torch": "2.13"}, {"event": "finished", "step": 9}
    assert history_table([start, end]) is None
    for nothing in (None, 3, [], ["x"]):
        assert history_table(nothing) is None
    table = history_table([start, stop, again, again, end])
    assert table is not None
    assert [row[1:3] for row in table.rows] == [
        *(["start", "0"], ["stopped", "5"], ["resume", "5"], ["was killed", "–"]),
        *(["resume", "5"], ["finished", "9"]),
    ]


@pytest.mark.usefixtures("no_figures")
def test_a_run_of_before_knows_its_resumes(tmp_path: Path) -> None:
    """Guards reports of runs whose run.json has `resumes` and no history."""
    run = _run(tmp_path / "run", run={"resumes": [{"at": "2026-11-22T05:00:00", "step": 50}]})
    assert [entry["event"] for entry in write_report(run)["history"]] == ["start", "resume"]
    assert "2026-11-22 05:00" in (run / "report.html").read_text()


def test_columns_of_figures_and_of_text() -> None:
    """Guards against words set flush right, and sentences that widen a table beyond the page."""
    rows = [["a", "1.47 – 1.55", "12 %", "short", "x" * 40], ["b", "–", "yes", "3 s", "1"]]
    assert column_classes(Table("t", ["", "", "", "", ""], rows)) == ["t", "n", "n", "t", "w"]


def test_eval_report_has_scores_and_no_curves(tmp_path: Path) -> None:
    """Guards `gpt eval` on other data: same fields, no empty training figures."""
    scores = _scores(bits_per_byte_ci95=(1.47, 1.55), accuracy=float("nan"))
    report = {"run": {"name": "small on austen.txt"}, "scores": scores, "data": {"eval": {}}}
    write_eval_report(tmp_path / "evals" / "austen", report)
    written = json.loads((tmp_path / "evals/austen/report.json").read_text())
    assert written["scores"]["bits_per_byte_ci95"] == [1.47, 1.55]
    assert written["scores"]["accuracy"] is None
    html = (tmp_path / "evals/austen/report.html").read_text()
    assert "Evaluation report" in html
    assert "1.512" in html
    assert "<svg" not in html
    assert "Training time" not in html
    assert "# Evaluation: small on austen.txt" in (tmp_path / "evals/austen/report.md").read_text()


def test_eval_report_of_a_bare_score(tmp_path: Path) -> None:
    """Guards against demanding more than the scores."""
    write_eval_report(tmp_path, {"scores": {"loss": 2.0}})
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["scores"]["loss"] == 2.0
    assert written["scores"]["bits_per_byte"] is None
    assert written["run"]["name"] == tmp_path.name
