"""Folders as they are published, made from models of ours, for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gptcli.config.model_schema import ModelConfig
from gptcli.interop.hf_config import family_of, hf_config
from gptcli.interop.hf_weights import layout, to_theirs
from gptcli.model.gpt import GPT, initialise

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32}
TEXT = "low lower lowest, new newer newest; 12 wide and wider\n"


def random_model(preset: str = "llama", vocab_size: int = 300, **keys: Any) -> GPT:
    """A tiny model of a preset in which no tensor is all ones or zeros."""
    model = GPT(ModelConfig(preset=preset, **{**SHAPE, **keys}), vocab_size)
    generator = torch.Generator().manual_seed(vocab_size)
    initialise(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def publish_folder(
    folder: Path, model: GPT, dtype: torch.dtype = torch.float32, *, shards: int = 1
) -> Path:
    """config.json, weights (in `shards` files) and tokenizer.json of `model` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = hf_config(model.config, model.vocab_size)
    (folder / "config.json").write_text(json.dumps(config))
    tensors: dict[str, torch.Tensor] = {}
    state = model.state_dict()
    family = family_of(model.config)
    for name, parts in layout(model.config, model.vocab_size, family).items():
        tensors |= to_theirs(parts, state[name].to(dtype))
    _save(folder, tensors, shards)
    write_tokenizer(folder / "tokenizer.json", model.vocab_size)
    return folder


def write_tokenizer(path: Path, vocab_size: int) -> None:
    """A byte-level BPE of at most `vocab_size` tokens, by the library that published ones use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 5], trainer)
    tokenizer.save(str(path))


def _save(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata=metadata)
        return
    places = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {k: tensors[k] for k in sorted(tensors)[number::shards]}
        save_file(part, folder / name, metadata=metadata)
        places |= dict.fromkeys(part, name)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
