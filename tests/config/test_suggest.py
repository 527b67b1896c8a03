"""What unknown keys probably meant."""

import pytest

from gptcli.config import suggest
from gptcli.config.fields import all_sections, keys_of
from gptcli.config.presets import PRESETS
from gptcli.config.schema import Config


def hint(dotted: str) -> str:
    section, _, key = dotted.rpartition(".")
    model = all_sections()[section] if section else Config
    return suggest.for_key(key, section, keys_of(model)).text.removeprefix("; ")


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *[(f"model.{k}", "did you mean 'n_embd'?") for k in ("d_model", "hidden_size", "n_embed")],
        *[
            (f"model.{k}", "did you mean 'n_layer'?")
            for k in ("n_layers", "num_layers", "num_hidden_layers", "n-layer", "N_LAYER", "nlayer")
        ],
        *[(f"model.{k}", "did you mean 'n_head'?") for k in ("n_heads", "num_heads")],
        *[
            (f"model.{k}", "did you mean 'block_size'?")
            for k in ("context_length", "seq_len", "max_seq_len", "context_size")
        ],
        ("optimizer.learning_rate", "did you mean 'lr'?"),
        ("optimizer.learnin_rate", "did you mean 'lr'?"),
        ("training.learning_rate", "did you mean 'optimizer.lr'?"),
        ("training.batch_size", "did you mean 'micro_batch_size' or 'tokens_per_step'?"),
        (
            "batch_size",
            "did you mean 'training.micro_batch_size' or 'training.tokens_per_step'?",
        ),
        ("training.max_iters", "did you mean 'max_steps'?"),
        ("training.gradient_clip", "did you mean 'clip_norm'?"),
        ("training.grad_clip", "did you mean 'clip_norm'?"),
        ("training.epochs", "did you mean 'max_epochs'?"),
        ("num_epochs", "did you mean 'training.max_epochs'?"),
        ("training.dtype", "did you mean 'precision'?"),
        ("generate.max_length", "did you mean 'max_new_tokens'?"),
        ("finetune.max_length", "did you mean 'max_new_tokens'?"),
        ("generate.json_lines", "did you mean 'json'?"),
        ("schedule.warmup", "did you mean 'warmup_steps'?"),
        ("schedule.warmup_iters", "did you mean 'warmup_steps'?"),
        ("out_dir", "it is a flag: --run-dir"),
        ("training.out_dir", "it is a flag: --run-dir"),
        ("n_layer", "it belongs to model"),
        ("training.lr", "it belongs to optimizer"),
        ("training.seed", "it belongs to the top level, generate or data.canaries"),
        ("model.kind", "it belongs to tokenizer, optimizer, schedule or model.rope_scaling"),
        *[
            (f"model.{k}", "did you mean 'window'?")
            for k in ("sliding_window", "attention_window", "attention_types", "layer_types")
        ],
        ("model.window_size", "did you mean 'window' or 'block_size'?"),
        ("model.rope_parameters", "did you mean 'rope_scaling'?"),
        ("model.rope_type", "did you mean 'model.rope_scaling.kind'?"),
        ("model.factor", "it belongs to model.rope_scaling"),
        ("model.type", "did you mean 'preset'?"),
        ("model.word_vectors", "did you mean 'embedding_file'?"),
        ("optimizer.type", "did you mean 'kind'?"),
        *[(f"model.rope_scaling.{k}", "did you mean 'kind'?") for k in ("rope_type", "type")],
        (
            "model.rope_scaling.original_max_position_embeddings",
            "did you mean 'original_block_size'?",
        ),
        ("model.rope_scaling.facter", "did you mean 'factor'?"),
        ("model.rope_scaling.high_freq", "did you mean 'high_freq_factor'?"),
        ("model.rope_scaling.rope_theta", "it belongs to model"),
        ("data.text_field", "it belongs to a source, as in train: [{path: ..., text_field: ...}]"),
        ("modle", "did you mean 'model'?"),
        ("schedule.max_stepz", "did you mean 'training.max_steps'?"),
        ("schedule.xyz", "its keys: kind, warmup_steps, decay_ratio, min_lr_ratio"),
        ("model.xyz", ""),
        (f"model.{'n_layer' * 50}", ""),
    ],
)
def test_suggestions(key: str, text: str) -> None:
    """A user of another tool guesses that tool's word; a typo or a wrong section is as common."""
    assert hint(key) == text


def test_every_word_leads_to_a_key() -> None:
    """A renamed key would leave suggestions that are themselves refused."""
    known = {f"{name}.{key}" for name, part in all_sections().items() for key in keys_of(part)}
    known |= set(keys_of(Config))
    for word, targets in suggest._TARGETS.items():
        for target in targets:
            assert target in known or target.startswith("--"), word
            name = target.rpartition(".")[2]
            assert word != name


def test_no_other_word_is_a_key_where_it_is_suggested() -> None:
    """A word of the table that is a key of the same section could never be suggested."""
    for word, targets in suggest._TARGETS.items():
        for target in targets:
            section = target.rpartition(".")[0]
            if section:
                assert word not in keys_of(all_sections()[section]), word


@pytest.mark.parametrize(
    ("value", "choices", "near"),
    [
        ("float32", ["auto", "fp32", "bf16"], "fp32"),
        ("bfloat16", ["auto", "fp32", "bf16"], "bf16"),
        ("adam", ["muon", "adamw"], "adamw"),
        ("Cosine", ["wsd", "cosine"], "cosine"),
        ("zzz", ["wsd", "cosine"], None),
        ("ntk", ["linear", "dynamic"], "dynamic"),
        ("gpt2-355m", [*PRESETS], "gpt2-medium"),
        ("gpt3-1.3b", [*PRESETS], "gpt3-xl"),
        ("llama-7", [*PRESETS], "llama-7b"),
        ("x" * 100_000, ["wsd"], None),
    ],
)
def test_near_choices(value: str, choices: list[str], near: str | None) -> None:
    """Values have other names in other tools, too."""
    assert suggest.for_value(value, choices) == near
