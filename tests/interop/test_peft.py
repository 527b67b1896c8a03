"""Exported adapters as peft puts them on the model's twin in transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from gptcli.config.finetune_schema import LoraConfig  # noqa: E402
from gptcli.config.model_schema import ModelConfig  # noqa: E402
from gptcli.data.tokenizer import Tokenizer  # noqa: E402
from gptcli.interop.hf_export import write_hf  # noqa: E402
from gptcli.interop.peft import write_peft  # noqa: E402
from gptcli.model.gpt import GPT, initialise  # noqa: E402
from gptcli.model.lora import adapter_tensors, add_lora  # noqa: E402

TINY: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32}
EVERY = ["attn.qkv", "attn.proj", "mlp.up", "mlp.proj"]
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "gpt1": ({"preset": "gpt1"}, EVERY),
    "gpt2": ({"preset": "gpt2"}, EVERY),
    "gpt2-one-c_proj": ({"preset": "gpt2"}, ["mlp.proj"]),
    "gpt3": ({"preset": "gpt3-small", "window": [0, 8]}, EVERY),
    "llama": ({"preset": "llama", "n_kv_head": 2}, EVERY),
    "modern": ({"preset": "modern", "n_kv_head": 1, "head_dim": 16}, EVERY),
    "modern-attention": ({"preset": "modern"}, ["attn.qkv"]),
}
TOKENS = torch.arange(3, 23)[None]


def disturb(tensors: list[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_it(case: str, tmp_path: Path) -> None:
    """Guards: adapters on other matrices than ours, a B that is cut in the wrong place, the scale
    of GPT-Neo's queries, Conv1D's transposed weights."""
    keys, layers = CASES[case]
    model = GPT(ModelConfig.model_validate({**TINY, **keys}), 257)
    initialise(model, torch.Generator().manual_seed(0))
    disturb(list(model.parameters()), 1)
    twin_folder = tmp_path / "twin"
    twin_folder.mkdir()
    write_hf(model, Tokenizer.of_ids(257), twin_folder, torch.float32)
    settings = LoraConfig.model_validate({"rank": 3, "alpha": 7.5, "layers": layers})
    add_lora(model, settings, torch.Generator().manual_seed(2))
    disturb(list(adapter_tensors(model).values()), 3)
    adapter_folder = tmp_path / "adapter"
    adapter_folder.mkdir()
    write_peft(model, settings, str(twin_folder), None, adapter_folder)
    twin = transformers.AutoModelForCausalLM.from_pretrained(twin_folder).eval()
    with torch.no_grad():
        plain = twin(TOKENS).logits
        adapted = peft.PeftModel.from_pretrained(twin, adapter_folder).eval()
        found, wanted = adapted(TOKENS).logits, model.eval()(TOKENS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (found - plain).abs().max() > 0.01
    # Every tensor of the file has a place, and every place got one.
    left = peft.get_peft_model_state_dict(adapted)
    assert len(left) == sum(1 for n in left if "lora_A" in n or "lora_B" in n)
    trained = [p for n, p in adapted.named_parameters() if "lora_B" in n]
    assert all(p.any() for p in trained)
