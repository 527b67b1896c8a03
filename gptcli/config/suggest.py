"""What a user probably meant: near names, keys of other sections, other tools' words."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from gptcli.config.data_schema import SourceConfig
from gptcli.config.fields import all_sections, keys_of
from gptcli.config.schema import Config

# Words of nanoGPT, transformers, Lightning and papers. Suggested, never accepted.
_OTHER_WORDS: dict[str, str] = {
    "model.n_embd": "d_model hidden_size hidden_dim n_embed embed_dim embd_dim emb_dim dim width "
    "embedding_size embedding_dim model_dim",
    "model.n_layer": "n_layers num_layers num_hidden_layers layers depth n_blocks num_blocks",
    "model.n_head": "n_heads num_heads num_attention_heads heads",
    "model.n_kv_head": "n_kv_heads num_key_value_heads num_kv_heads kv_heads n_query_groups",
    "model.head_dim": "head_size d_head d_k",
    "model.n_inner": "intermediate_size d_ff ffn_dim mlp_dim feed_forward_dim ff_dim",
    "model.block_size": "context_length context_size context seq_len seq_length sequence_length "
    "max_seq_len max_seq_length max_position_embeddings n_positions n_ctx",
    "model.window model.block_size": "window_size",
    "model.window": "sliding_window attention_window local_window band band_width "
    "attention_types attention_layers layer_types use_sliding_window windows",
    "model.rope_theta": "rope_base rotary_emb_base rope_freq_base rotary_base",
    "model.rope_scaling": "rope_parameters rope_config rope_scale",
    "model.rope_scaling.kind": "rope_type scaling_type",
    "model.rope_scaling.factor": "scaling_factor rope_factor",
    "model.rope_scaling.original_block_size": "original_max_position_embeddings original_max_pos "
    "original_context_length",
    "model.preset model.rope_scaling.kind tokenizer.kind optimizer.kind schedule.kind": "type",
    "model.embedding_file": "word_vectors pretrained_embeddings embeddings_file embedding_path "
    "glove glove_path word2vec word2vec_path vectors",
    "model.norm": "norm_type normalization norm_layer",
    "model.norm_position": "pre_norm post_norm norm_first normalize_before",
    "model.qkv_bias": "attention_bias attn_bias",
    "model.qk_norm": "use_qk_norm qk_layernorm q_norm",
    "model.norm_eps": "layer_norm_eps layer_norm_epsilon rms_norm_eps",
    "model.activation": "hidden_act activation_function act_fn",
    "model.tie_embeddings": "tie_word_embeddings tie_weights weight_tying",
    "model.dropout": "resid_pdrop attn_pdrop embd_pdrop dropout_rate p_dropout",
    "model.position": "pos_encoding positional_encoding position_embedding pos_emb",
    "model.preset": "arch architecture model_type model_name",
    "tokenizer.vocab_size": "n_vocab vocab vocabulary_size",
    "optimizer.kind": "optimizer_type optim optimizer_name",
    "optimizer.lr": "learning_rate max_lr peak_lr base_lr",
    "optimizer.betas": "beta1 beta2 adam_beta1 adam_beta2",
    "optimizer.eps": "adam_epsilon epsilon",
    "optimizer.weight_decay": "wd",
    "schedule.kind": "lr_scheduler_type lr_scheduler scheduler lr_schedule decay_lr",
    "schedule.warmup_steps": "warmup warmup_iters num_warmup_steps warmup_ratio lr_warmup_steps",
    "schedule.min_lr_ratio": "min_lr lr_min final_lr",
    "schedule.decay_ratio": "lr_decay_iters decay_steps",
    "training.max_steps": "max_iters steps n_steps num_steps num_train_steps iterations iters "
    "total_steps",
    "training.max_epochs": "epochs num_epochs n_epochs num_train_epochs",
    "training.micro_batch_size training.tokens_per_step": "batch_size train_batch_size bs "
    "per_device_train_batch_size",
    "training.tokens_per_step": "gradient_accumulation_steps grad_accum grad_accum_steps "
    "accumulate_grad_batches total_batch_size global_batch_size gradient_accumulation",
    "training.clip_norm": "gradient_clip grad_clip max_grad_norm gradient_clip_val grad_norm_clip "
    "clip_grad_norm",
    "training.precision": "dtype torch_dtype mixed_precision amp fp16 bf16",
    "training.eval_every": "eval_interval eval_steps val_every eval_freq val_interval",
    "training.save_every": "save_interval save_steps checkpoint_every checkpoint_interval",
    "training.log_every": "log_interval logging_steps log_steps",
    "training.keep_last": "save_total_limit",
    "training.compile": "torch_compile use_compile",
    "training.max_time": "max_hours time_limit",
    "data.train": "dataset datasets train_data train_file train_path data_path corpus",
    "data.val": "val_data validation val_file valid validation_file eval_data val_path",
    "data.val_fraction": "val_split val_ratio validation_split test_size valid_fraction",
    "data.shuffle_window": "shuffle shuffle_buffer buffer_size",
    "generate.max_new_tokens": "max_length max_tokens_to_generate num_tokens max_gen_len length",
    "generate.n": "num_samples n_samples num_return_sequences",
    "generate.temperature": "temp",
    "generate.json": "json_lines jsonl",
    "generate.stop": "stop_sequences stop_strings stop_words",
    "generate.model": "checkpoint ckpt ckpt_path",
    "init": "init_from from_pretrained base_model pretrained resume_from",
    "seed": "random_seed",
    "name": "run_name experiment exp_name",
    "--run-dir": "out_dir output_dir save_dir run_dir log_dir checkpoint_dir",
    "--resume": "resume auto_resume resume_from_checkpoint",
}
_TARGETS = {word: homes.split() for homes, words in _OTHER_WORDS.items() for word in words.split()}
_OTHER_VALUES = {
    "float32": "fp32",
    "32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "swish": "silu",
    "swiglu": "silu",
    "gelu_new": "gelu_tanh",
    "rotary": "rope",
    "absolute": "learned",
    "sin": "sinusoidal",
    "sincos": "sinusoidal",
    "nope": "none",
    "ntk": "dynamic",
    "dynamic_ntk": "dynamic",
    "rms": "rmsnorm",
    "rms_norm": "rmsnorm",
    "layer_norm": "layernorm",
    "ln": "layernorm",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu_squared": "relu2",
    # Names by which others call the same shapes.
    "openai-gpt": "gpt1",
    "gpt2-small": "gpt2",
    "gpt2-124m": "gpt2",
    "gpt2-355m": "gpt2-medium",
    "gpt2-774m": "gpt2-large",
    "gpt2-1.5b": "gpt2-xl",
    "gpt3-125m": "gpt3-small",
    "gpt3-350m": "gpt3-medium",
    "gpt3-760m": "gpt3-large",
    "gpt3-1.3b": "gpt3-xl",
    "qwen3": "modern",
    "qwen3-0.6b": "modern-0.6b",
    "qwen3-1.7b": "modern-1.7b",
    "qwen3-4b": "modern-4b",
    "qwen3-8b": "modern-8b",
    "smollm2-135m": "llama-135m",
    "smollm2-360m": "llama-360m",
    "adam": "adamw",
    "byte": "bytes",
    "true": "on",
    "yes": "on",
    "false": "off",
    "no": "off",
}
# Sections and keys that pretraining and finetuning read, which take --set.
_TRAINED = (
    "training",
    "optimizer",
    "schedule",
    "model",
    "data",
    "tokenizer",
    "finetune",
    "seed",
    "name",
)
_LONGEST = 64  # difflib takes quadratic time; no key is longer


@dataclass(frozen=True)
class Suggestion:
    """`text` ends the problem's line. `stand_in` is the key of the same section that was meant."""

    text: str = ""
    stand_in: str | None = None


def for_key(key: str, section: str, keys: Iterable[str]) -> Suggestion:
    """What `key`, unknown in `section` (`""` is the top level) which has `keys`, may mean."""
    keys = list(keys)
    if key == "<<":
        return Suggestion("; merge keys are not supported, write the keys out")
    if len(key) > _LONGEST:
        return Suggestion()
    plain = _plain(key)
    same = [k for k in keys if _plain(k) == plain]
    if same:
        return Suggestion(f"; did you mean '{same[0]}'?", same[0])
    if plain in _TARGETS:
        return _from_other_tools(_TARGETS[plain], section, keys)
    if homes := _homes(plain):
        return Suggestion(f"; it belongs to {_or(homes)}")
    if near := difflib.get_close_matches(plain, keys, n=1, cutoff=0.78):
        return Suggestion(f"; did you mean '{near[0]}'?", near[0])
    if found := difflib.get_close_matches(plain, _TARGETS, n=1, cutoff=0.85):
        return _from_other_tools(_TARGETS[found[0]], section, keys)
    elsewhere = {k: f"{name}.{k}" for name, s in all_sections().items() for k in keys_of(s)}
    elsewhere |= {k: k for k in keys_of(Config)}
    if found := difflib.get_close_matches(plain, elsewhere, n=1, cutoff=0.8):
        return Suggestion(f"; did you mean '{elsewhere[found[0]]}'?")
    if near := difflib.get_close_matches(plain, keys, n=1, cutoff=0.6):
        return Suggestion(f"; did you mean '{near[0]}'?")
    return Suggestion(f"; its keys: {', '.join(keys)}" if len(keys) <= 20 else "")


def key_of_option(name: str) -> str | None:
    """The key that a command's unknown option `--name` has as its own, as `training.max_steps`."""
    plain = _plain(name)
    homes = [f"{section}.{plain}" for section in _homes(plain) if section in all_sections()]
    targets = homes or _TARGETS.get(plain, []) or ([plain] if plain in keys_of(Config) else [])
    near = next((t for t in targets if t.partition(".")[0] in _TRAINED), None)
    keys = [f"{s}.{k}" for s in _TRAINED if s in all_sections() for k in keys_of(all_sections()[s])]
    names = {key.partition(".")[2]: key for key in reversed(keys)}
    found = difflib.get_close_matches(plain[:_LONGEST], names, n=1, cutoff=0.85)
    return near or (names[found[0]] if found else None)


def for_value(value: str, choices: Iterable[str]) -> str | None:
    """The choice that `value` may mean, or None."""
    if len(value) > _LONGEST:
        return None
    choices = list(choices)
    if (other := _OTHER_VALUES.get(value.lower())) in choices:
        return other
    near = difflib.get_close_matches(value.lower(), choices, n=1, cutoff=0.6)
    return near[0] if near else None


def _plain(key: str) -> str:
    return key.strip().lower().replace("-", "_")


def _from_other_tools(targets: list[str], section: str, keys: list[str]) -> Suggestion:
    if targets[0].startswith("--"):
        return Suggestion(f"; it is a flag: {targets[0]}")
    # A section that has a key of that name is meant, whichever section the table names.
    names = [target.rpartition(".")[2] for target in targets]
    here = list(dict.fromkeys(name for name in names if name in keys))
    if here:
        only = here[0] if len(here) == 1 else None
        return Suggestion(f"; did you mean {_or(repr(name) for name in here)}?", only)
    return Suggestion(f"; did you mean {_or(repr(target) for target in targets)}?")


def _homes(key: str) -> list[str]:
    homes = ["the top level"] if key in keys_of(Config) else []
    homes += [name for name, section in all_sections().items() if key in keys_of(section)]
    if not homes and key in keys_of(SourceConfig):
        homes.append("a source, as in train: [{path: ..., " + key + ": ...}]")
    return homes


def _or(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
