"""`gpt eval --lm-eval`: the harness's tasks on a model of ours, against `gpt eval` itself."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import resolve_device
from gptcli.errors import ConfigError, DataError
from gptcli.evaluate import evaluate
from gptcli.evaluate_lm_eval import evaluate_lm_eval
from gptcli.evaluate_task import evaluate_task
from gptcli.pretrain import pretrain
from gptcli.reports.lm_eval import lm_eval_section
from gptcli.runs.load import load_model

pytest.importorskip("lm_eval")

WORDS = ["in", "the", "beginning", "god", "made", "heaven", "and", "earth", "was", "good"]
ROWS = [
    {
        "prompt": " ".join(WORDS[i : i + 3]).capitalize(),
        "choices": [" ".join(WORDS[i + 3 : i + 3 + k]) for k in (1, 2, 4)],
        "label": i % 3,
    }
    for i in range(5)
]
TEXTS = [" ".join(WORDS * 9), "god made the light", "heaven"]
ENDINGS = """
task: own_endings
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS, train: ROWS}}
test_split: test
training_split: train
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TEXT = """
task: own_text
dataset_path: json
dataset_kwargs: {data_files: {test: TEXTS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
BROKEN = "task: own_broken\ndataset_path: json\ndataset_kwargs: {data_files: nowhere.jsonl}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose tokenizer merges letters, task files and their data."""
    made = tmp_path_factory.mktemp("harness")
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (made / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    (made / "book.txt").write_text("\n\n".join(" ".join(WORDS[i:]) for i in range(9)) * 9)
    (made / "tasks").mkdir()
    for name, text in (("endings", ENDINGS), ("text", TEXT), ("broken", BROKEN)):
        for kind in ("rows", "texts"):
            text = text.replace(kind.upper(), str(made / f"{kind}.jsonl"))
        (made / "tasks" / f"{name}.yaml").write_text(text)
    config = {
        "name": "base",
        "tokenizer": {"kind": "bpe", "vocab_size": 280},
        "data": {"train": str(made / "book.txt"), "val_fraction": 0.1},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32},
        "schedule": {"warmup_steps": 0},
        "training": {"max_steps": 6, "tokens_per_step": 64, "precision": "fp32"},
        "samples": {"prompts": []},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptcli.pretrain.write_report", lambda run_dir: None)
        pretrain(Config.model_validate(config), run_dir=made / "base")
    return made


def harness_model(folder: Path) -> tuple[Any, Tokenizer, Any]:
    from gptcli.evaluation.lm_eval_model import HarnessModel

    device = resolve_device("cpu")
    loaded = load_model(str(folder / "base"), device.torch)
    return HarnessModel(loaded.model, loaded.tokenizer, device, "fp32"), loaded.tokenizer, loaded


def requests(kind: str, *arguments: Any) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def test_harness_equals_native(folder: Path, gpt: Any) -> None:
    """Bug: what the harness says of a model is not what `gpt eval` says of it."""
    model, tasks = str(folder / "base"), str(folder / "tasks")
    flags = ["--include-path", tasks, "--model", model, "--run-dir", str(folder / "harness")]
    code, out, err = gpt("eval", "--lm-eval", "own_endings,own_text", *flags, "--json")
    assert code == 0, err
    report = json.loads(out)  # nothing that the harness prints is among it
    found = {(s["task"], s["metric"]): s for s in report["lm_eval"]["scores"]}
    text = evaluate(Config(), model=model, data=[str(folder / "texts.jsonl")])
    bits = found["own_text", "bits_per_byte"]["value"]
    assert bits == pytest.approx(text.scores.bits_per_byte, abs=1e-4)
    config = Config.model_validate({"finetune": {"task": "continuation"}})
    native = evaluate_task(config, model=model, data=[str(folder / "rows.jsonl")])
    for ours, theirs in (("accuracy", "acc"), ("accuracy_per_byte", "acc_norm")):
        score = found["own_endings", theirs]
        assert score["value"] == pytest.approx(native.report["tasks"][ours]["value"], abs=1e-4)
        assert (score["rows"], score["shots"], score["higher_is_better"]) == (5, 0, True)
    assert native.directory is not None
    lines = (native.directory / "predictions.jsonl").read_text().splitlines()
    for row, line in zip(ROWS, map(json.loads, lines), strict=True):
        pairs = [(row["prompt"], f" {choice}") for choice in row["choices"]]
        asked = harness_model(folder)[0].loglikelihood(requests("loglikelihood", *pairs))
        assert [nats for nats, _ in asked] == pytest.approx(line["log_likelihoods"], abs=1e-4)
    section = lm_eval_section(report)
    assert section is not None
    assert [row[1] for row in section.tables[0].rows] == ["acc", "acc_norm", "bits_per_byte"]
    assert (folder / "harness" / "report.html").is_file()
    assert lm_eval_section({}) is None


@torch.no_grad()
def test_requests(folder: Path) -> None:
    """Bug: answers come back in the order of their contexts, an empty context has no start, greedy
    is of the sum, or a long context or text is cut at its end."""
    asked, tokenizer, loaded = harness_model(folder)
    long = " ".join(WORDS * 9)
    pairs = [("god made", " heaven"), ("", "god"), ("god made", " the"), (long, " was"), ("in", "")]
    found = asked.loglikelihood(requests("loglikelihood", *pairs[:4]))
    for (context, text), (nats, greedy) in zip(pairs, found, strict=False):
        whole = [tokenizer.eot, *tokenizer.encode(context + text)]
        count = len(tokenizer.encode(context + text)) - len(tokenizer.encode(context))
        if len(whole) > 33:
            whole = [tokenizer.eot, *whole[-32:]]
        logits = loaded.model(torch.tensor([whole[:-1]]))[0].log_softmax(-1)[-count:]
        ids = torch.tensor(whole[-count:])
        right = float(logits.gather(1, ids[:, None]).sum())
        assert (nats, greedy) == (
            pytest.approx(right, abs=1e-4),
            bool((logits.argmax(1) == ids).all()),
        )
    with pytest.raises(DataError, match="empty text after 'in'"):
        asked.loglikelihood(requests("loglikelihood", pairs[4]))
    with pytest.raises(DataError, match="more than the model's block_size 32"):
        asked.loglikelihood(requests("loglikelihood", ("in", long)))
    rolling = asked.loglikelihood_rolling(requests("rolling", ("",), ("god made",)))
    (whole,) = asked.loglikelihood(requests("loglikelihood", ("", "god made")))
    assert rolling == [0.0, pytest.approx(whole[0], abs=1e-4)]


@torch.no_grad()
def test_generation(folder: Path) -> None:
    """Bug: a text goes on behind its end, has the end in it, or is longer than asked for."""
    asked, tokenizer, loaded = harness_model(folder)
    ids = [tokenizer.eot, *tokenizer.encode("god made")]
    for _ in range(6):
        ids.append(int(loaded.model(torch.tensor([ids]))[0, -1].argmax()))
    text = tokenizer.decode(ids[-6:])
    options = {"until": [], "max_gen_toks": 6, "do_sample": False}
    last = text[-1]
    limits = [options, {**options, "until": last}, {**options, "max_gen_toks": 1}]
    found = asked.generate_until(requests("generate", *(("god made", given) for given in limits)))
    assert found == [text, text.partition(last)[0], tokenizer.decode(ids[-6:-5])]
    with pytest.raises(ConfigError, match="unknown options of generation: \\['beams'\\]"):
        asked.generate_until(requests("generate", ("god", {"beams": 4})))


def test_greedy_keeps_the_penalty(folder: Path) -> None:
    """Bug: greedy answers of a task go without its repetition_penalty."""
    asked, _, _ = harness_model(folder)
    options = {"do_sample": False, "temperature": 0.7, "repetition_penalty": 1.5}
    sampling = asked._request("god", options).sampling
    assert (sampling.temperature, sampling.repetition_penalty) == (0.0, 1.5)


def test_wrong_input(folder: Path, gpt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a task without its data, a flag that does nothing, or a missing package is a crash."""
    model, tasks = str(folder / "base"), str(folder / "tasks")
    flags = ["--include-path", tasks, "--model", model]
    code, _, err = gpt("eval", "--lm-eval", "own_broken", *flags)
    assert (code, "lm-eval could not run own_broken" in err) == (3, True)
    for given, said in (
        (["--lm-eval", "x", "--data", "y"], "--data is not for --lm-eval"),
        (["--lm-eval", "x", "--task"], "--task and --lm-eval do not go together"),
        (["--lm-eval", " ,"], "names no task"),
        (["--lm-eval", "x", "--include-path", "nowhere"], "no such directory"),
        (["--limit", "3"], "--limit is not for text, but for --lm-eval and --memorization"),
        (["--shots", "3"], "--shots is not for text, but for --task and --lm-eval"),
        (["--task", "--shots", "-1"], "--shots"),
    ):
        code, _, err = gpt("eval", "--model", model, *given)
        assert (code, said in err) == (2, True), err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        evaluate_lm_eval(Config(), ["own_text"], model=model)
    assert caught.value.hint == "pip install 'gptcli[eval]'"
