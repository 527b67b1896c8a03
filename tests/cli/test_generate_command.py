import json
from pathlib import Path

import pytest
import torch

from gptcli.config.load import dump_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.model.gpt import GPT, initialise
from gptcli.runs.checkpoint import Contents, publish
from gptcli.runs.run_dir import new_run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with one checkpoint of an untrained model on byte tokens, under GPT_RUNS."""
    config = Config(name="tiny", model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=32))
    tokenizer = Tokenizer.of_bytes()
    model = GPT(config.model, tokenizer.vocab_size)
    initialise(model, torch.Generator().manual_seed(0))
    made = new_run_dir("tiny", None, overwrite=False)
    publish(made, 10, Contents(model.state_dict(), {}, {}, dump_config(config), tokenizer))
    return made


def test_newest_run_continues_a_prompt(gpt, run_dir):
    code, out, err = gpt("generate", "--prompt", "Once", "--max-new-tokens", "8")
    assert code == 0
    assert out.startswith("Once")
    assert out.endswith("\n")
    assert err.startswith("seed ")


def test_a_reported_seed_repeats_the_text(gpt, run_dir):
    """A random seed that is not told makes a good text a one-off."""
    _, first, err = gpt("generate", "--prompt", "Once", "--max-new-tokens", "8")
    seed = err.split()[1]
    code, second, err = gpt("generate", "--prompt", "Once", "--max-new-tokens", "8", "--seed", seed)
    assert (code, err) == (0, "")
    assert second == first


FIXED = ("--prompt", "Once", "--max-new-tokens", "12", "--seed", "5", "-n", "3")


def test_streaming_changes_nothing(gpt, run_dir):
    streamed, whole = gpt("generate", *FIXED), gpt("generate", *FIXED, "--no-stream")
    assert streamed == whole
    assert streamed[1].count("\n---\n") == 3


def test_json_holds_the_same_texts(gpt, run_dir):
    code, out, err = gpt("generate", *FIXED, "--json", "--logprobs", "2")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(row["sample"], row["seed"], row["prompt"]) for row in rows] == [
        (k, 5, "Once") for k in range(3)
    ]
    assert [len(row["logprobs"]) for row in rows] == [len(row["tokens"]) for row in rows]
    plain = gpt("generate", *FIXED, "--no-prompt")[1]
    assert plain == "".join(row["text"] + "\n---\n" for row in rows)


def test_the_models_of_the_options(gpt, run_dir):
    """A run directory, a checkpoint in it, and the newest run are the same model here."""
    texts = {
        gpt("generate", *FIXED, *where)[1]
        for where in (
            (),
            ("--model", str(run_dir)),
            ("--model", str(run_dir / "checkpoints" / "step-00000010")),
        )
    }
    assert len(texts) == 1


def test_config_section(gpt, run_dir, tmp_path):
    text = "generate: {prompt: Once, max_new_tokens: 12, seed: 5, n: 3, no_prompt: true}\n"
    (tmp_path / "g.yaml").write_text(text)
    from_file = gpt("generate", "--config", str(tmp_path / "g.yaml"))
    assert from_file == gpt("generate", *FIXED, "--no-prompt")


def test_no_run_yet(gpt):
    code, out, err = gpt("generate", "--prompt", "x")
    assert (code, out) == (4, "")
    assert "hint: " in err
    assert "gpt pretrain" in err


def test_token_ids(gpt, run_dir):
    code, out, _ = gpt("generate", "--prompt-tokens", "72,105", "--max-new-tokens", "2")
    assert code == 0
    assert out.startswith("Hi")
