"""`gpt eval --quantize`: the same definition of perplexity, before and after."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.config.load import dump_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.evaluate import evaluate
from gptcli.model.gpt import GPT, initialise
from gptcli.runs import checkpoint

TEXT = "What is now proved was once only imagined. " * 9


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A checkpoint whose logits are far from flat."""
    keys = {"preset": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
    config = Config(name="tiny", model=ModelConfig.model_validate(keys))
    weights = GPT(config.model, 257)
    initialise(weights, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.mul_(3.0)
    contents = checkpoint.Contents(
        weights.state_dict(), {}, {"job": "pretrain"}, dump_config(config), Tokenizer.of_bytes()
    )
    (tmp_path / "text.txt").write_text(TEXT)
    return str(checkpoint.publish(tmp_path / "run", 1, contents))


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.4), ("fp16", 0.65), ("bf16", 0.65)])
def test_before_and_after(model: str, tmp_path: Path, kind: str, share: float) -> None:
    """A tied table is packed twice, as embedding and as head.

    Bug: the two are scored on other tokens or windows, or the change is none because the same
    weights were scored twice."""
    text = [str(tmp_path / "text.txt")]
    plain = evaluate(Config.model_validate({"eval": {"stride": 5}}), model=model, data=text)
    settings = Config.model_validate({"eval": {"stride": 5, "quantize": kind}})
    result = evaluate(settings, model=model, data=text)
    about, report = result.report["quantized"], result.report
    before = {k: v for k, v in about["scores_before"].items() if k != "seconds"}
    assert before == {k: v for k, v in plain.report["scores"].items() if k != "seconds"}
    assert about["kind"] == kind
    assert result.scores.perplexity != plain.scores.perplexity
    assert result.scores.perplexity == pytest.approx(plain.scores.perplexity, rel=0.05)
    ratio = result.scores.perplexity / plain.scores.perplexity
    assert about["perplexity_ratio"] == pytest.approx(ratio)
    assert about["weight_bytes"] < share * about["weight_bytes_before"]
    assert about["weight_bytes_before"] == 4 * plain.report["model"]["parameters"]
    assert report["model"] == plain.report["model"]
    assert (result.scores.tokens, result.scores.stride) == (len(TEXT), 5)
    assert "quantized" not in plain.report
    assert result.directory != plain.directory


def test_both_are_scored_in_fp32(model: str, tmp_path: Path) -> None:
    """Bug: the change is that of the precision as well, where the model was trained in bf16."""
    text = [str(tmp_path / "text.txt")]
    plain = evaluate(Config.model_validate({}), model=model, data=text)
    bf16: dict[str, Any] = {"training": {"precision": "bf16"}}
    settings = Config.model_validate({**bf16, "eval": {"quantize": "int8"}})
    report = evaluate(settings, model=model, data=text).report
    assert report["choices"]["precision"] == "fp32"
    before = report["quantized"]["scores_before"]["perplexity"]
    assert before == plain.scores.perplexity
    half = evaluate(Config.model_validate(bf16), model=model, data=text)
    assert half.scores.perplexity != before


def test_command(model: str, tmp_path: Path, gpt: Any) -> None:
    """Bug: the change, or the memory, is not shown."""
    flags = ["--model", model, "--data", str(tmp_path / "text.txt"), "--quantize"]
    code, out, _ = gpt("eval", *flags, "int8")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["before", "int8", "change"]
    rows = {line[0]: line[1:] for line in lines[1:]}
    perplexity = [float(value) for value in rows["perplexity"][:2]]
    change = float(rows["perplexity"][2].removesuffix("%"))
    assert change == pytest.approx(100 * (perplexity[1] / perplexity[0] - 1), abs=0.02)
    assert rows["weights"][1::2] == ["MB", "MB"]
    assert rows["weights"][4].startswith("-6")
    assert rows["tokens"] == [str(len(TEXT))] * 2
    code, out, _ = gpt("eval", *flags, "fp16", "--json")
    assert code == 0
    assert json.loads(out)["quantized"]["kind"] == "fp16"
    code, _, err = gpt("eval", *flags, "int4")
    assert code == 2
    assert err.startswith("error: --quantize: ")
