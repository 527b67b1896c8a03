"""`gpt generate` on a model that came without a tokenizer, and on texts longer than the block."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptcli.config.model_schema import ModelConfig
from gptcli.interop.hf_config import hf_config
from gptcli.interop.hf_weights import layout, to_theirs
from gptcli.model.gpt import GPT, initialise


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of a tiny random gpt2 with 12 tokens and no tokenizer."""
    sizes = {"preset": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16}
    config = ModelConfig.model_validate(sizes)
    model = GPT(config, 12)
    initialise(model, torch.Generator().manual_seed(0))
    ours = model.state_dict()
    made = tmp_path / "hf"
    made.mkdir()
    theirs: dict[str, torch.Tensor] = {}
    for name, parts in layout(config, 12, "gpt2").items():
        theirs |= {key: t.contiguous() for key, t in to_theirs(parts, ours[name]).items()}
    save_file(theirs, made / "model.safetensors", {"format": "pt"})
    (made / "config.json").write_text(json.dumps({**hf_config(config, 12), "eos_token_id": 0}))
    return made


def test_prompt_and_text_are_ids(gpt, folder):
    """Guards against a made-up tokenizer, and against ids that cannot be fed in again."""
    flags = ("--model", str(folder), "--temperature", "0", "--max-new-tokens", "5")
    code, out, err = gpt("generate", *flags, "--prompt-tokens", "3,1,11", "--no-prompt")
    assert (code, err) == (0, "")
    ids = [int(word) for word in out.split()]
    assert len(ids) == 5
    assert max(ids) < 12
    code, whole, _ = gpt("generate", *flags, "--prompt", "3 1 11")
    assert code == 0
    assert [int(word) for word in whole.split()] == [3, 1, 11, *ids]


def test_text_for_a_model_without_a_tokenizer(gpt, folder):
    """Guards against a traceback, or ids guessed from text."""
    code, out, err = gpt("generate", "--model", str(folder), "--prompt", "Once")
    assert (code, out) == (3, "")
    assert "has no tokenizer" in err
    assert "hint: a prompt of ids is given as: --prompt-tokens 0,2,1" in err


def test_a_full_window_is_told(gpt, folder):
    """Guards against a text that forgets its beginning without a word about it."""
    flags = ("--model", str(folder), "--temperature", "0", "--prompt-tokens", "1,2")
    code, out, err = gpt("generate", *flags, "--max-new-tokens", "40", "--no-prompt")
    assert (code, len(out.split())) == (0, 40)
    assert err == (
        "the text grew past block_size, 16 tokens: a full window goes on with its last 8\n"
    )
    assert gpt("generate", *flags, "--max-new-tokens", "15", "--no-prompt")[2] == ""


def test_help_says_how_long_texts_go_on(gpt):
    """Guards against a stride that nobody can find."""
    code, out, _ = gpt("generate", "--help")
    assert code == 0
    assert "goes on from its last block_size // 2 tokens" in " ".join(out.split())
