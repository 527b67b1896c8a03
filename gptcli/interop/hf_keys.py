"""Reading a Hugging Face config.json key by key, so that none of them is overlooked."""

from collections.abc import Collection
from typing import Any

_MOST = 2**31 - 1  # no size of a model is larger
_LARGEST = 1e18  # no base or factor is; products of two do not overflow

# What changes no logit: names, ids of tokens, training, other heads, settings of generation.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled _name_or_path
    _num_labels architectures attention_dropout attn_implementation attn_pdrop bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout cls_token_id
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    embed_dropout encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label
    initializer_range is_decoder is_llama_config label2id length_penalty max_length min_length
    model_type n_ctx n_special name_or_path no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_past
    output_scores pad_token_id predict_special_tokens prefix pretraining_tp problem_type
    remove_invalid_values reorder_and_upcast_attn repetition_penalty resid_dropout resid_pdrop
    return_dict return_dict_in_generate sep_token_id summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj suppress_tokens task_specific_params
    temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unk_token_id unsloth_fixed
    unsloth_version use_bfloat16 use_cache use_return_dict
    """.split()  # noqa: SIM905
)


class Keys:
    """The keys of a JSON object, each checked for its type and size as it is read.

    A key that is missing or null has the default. `problems` collects what is wrong.
    """

    def __init__(self, raw: dict[str, Any], inside: str = "") -> None:
        self._raw, self._inside = raw, inside
        self._read: set[str] = set()
        self.problems: list[str] = []

    def get(self, key: str) -> Any:
        """The value as it is, None when it is missing; the key counts as read."""
        self._read.add(key)
        return self._raw.get(key)

    def is_null(self, key: str) -> bool:
        """Whether the key is there and null."""
        return key in self._raw and self._raw[key] is None

    def size(self, key: str, default: int, least: int = 1, most: int = _MOST) -> int:
        """A whole number from `least` to `most`."""
        value = self.get(key)
        if value is None:
            return default
        if type(value) is not int or not least <= value <= most:
            self.wrong(key, value, f"a whole number from {least} to {most}")
            return default
        return value

    def required(self, key: str, default: int, most: int = _MOST) -> int:
        """A size that every published config gives; `default` goes on where one lacks it."""
        if self.get(key) is None:
            self.problems.append(f"{self._inside}{key} is missing")
        return self.size(key, default, most=most)

    def number(self, key: str, default: float) -> float:
        """A number above 0."""
        value = self.get(key)
        if value is None:
            return default
        if type(value) not in (int, float) or not 0 < value < _LARGEST:
            self.wrong(key, value, "a number above 0")
            return default
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            self.wrong(key, value, "true or false")
            return default
        return value

    def must_be(self, key: str, wanted: bool) -> None:
        """A switch of which only the default can be computed."""
        if self.flag(key, wanted) is not wanted:
            self.wrong(key, not wanted, str(wanted).lower())

    def choice(self, key: str, default: str, meaning: dict[str, str]) -> str:
        """What one of the known words means."""
        value = self.get(key)
        if value is None:
            return meaning[default]
        if type(value) is not str or value not in meaning:
            self.wrong(key, value, " or ".join(meaning))
            return meaning[default]
        return meaning[value]

    def wrong(self, key: str, value: Any, wanted: str) -> None:
        """Note that `value` cannot be used."""
        self.problems.append(f"{self._inside}{key} is {_short(value)}; it must be {wanted}")

    def unknown(self, harmless: Collection[str] = _HARMLESS) -> list[str]:
        """The keys that nobody read, but for those that change nothing or are switched off."""
        left = self._raw.keys() - self._read - set(harmless)
        return [self._inside + key for key in sorted(left) if not _is_off(self._raw[key])]


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [])


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if type(value) is bool else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
