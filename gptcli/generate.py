"""The job behind `gpt generate`: prompts in, continuations out."""

import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gptcli import stop
from gptcli.config.schema import GenerateConfig
from gptcli.data.tokenizer import IdsTokenizer
from gptcli.errors import ConfigError, DataError
from gptcli.generation.engine import (
    Generated,
    OnText,
    Sampling,
    generate_samples,
    restart_tokens,
)
from gptcli.generation.prompt import encode_prompt, fit_prompt, replace_surrogates
from gptcli.runs.load import LoadedModel

log = logging.getLogger("gptcli")


@dataclass(frozen=True)
class Prompt:
    """A prompt as text, as the ids that the model continues, and as bytes."""

    text: str
    tokens: list[int]
    data: bytes


def generate(
    model: LoadedModel,
    config: GenerateConfig,
    *,
    on_text: OnText | None = None,
    on_prompt: Callable[[str], None] | None = None,
) -> Iterator[list[Generated]]:
    """Continue each prompt `config.n` times; yields the samples of one prompt at a time.

    Prompts are read and checked, and a random seed is drawn and logged, before this returns; the
    decoding happens as the result is iterated. `on_prompt(text)` is called before the first
    `on_text(sample, piece)` of each prompt. A stop request ends the iteration after the texts of
    the prompt at hand ("interrupted"). Raises ConfigError, DataError, CheckpointError.
    """
    prompts = resolve_prompts(model, config)
    if "" in config.stop:
        raise ConfigError("generate.stop: an empty text would stop every sample before it begins")
    return _generate(model, prompts, config.n, _sampling(config), on_text, on_prompt)


def generate_bytes(model: LoadedModel, config: GenerateConfig) -> bytes:
    """The bytes of one prompt (not with `no_prompt`) and of its one continuation.

    Nothing of either goes through text, so that data of any kind comes out as it is. A stop
    request ends it early. Raises what `generate` does, and ConfigError for more than one prompt,
    `n` above 1 or `stop`, whose texts the bytes need not hold.
    """
    if config.n > 1 or config.stop:
        raise ConfigError("output_bytes writes one continuation: not with n above 1, nor with stop")
    prompts = resolve_prompts(model, config)
    if len(prompts) > 1:
        raise ConfigError(f"output_bytes writes one result, and there are {len(prompts)} prompts")
    data = b"" if config.no_prompt else prompts[0].data
    for samples in _generate(model, prompts, 1, _sampling(config), None, None):
        data += model.tokenizer.decode_bytes(samples[0].tokens)
    return data


def resolve_prompts(model: LoadedModel, config: GenerateConfig) -> list[Prompt]:
    """The prompts that `config` names in exactly one of its three ways, as token ids that fit.

    With `output_bytes` and byte tokens, a prompt is the bytes it is made of and a prompt file holds
    one. Raises ConfigError for none or several ways, ids out of range, a file that cannot be opened
    or a prompt that is too long with `truncate: error`; DataError for a file without prompts.
    """
    ways = [config.prompt is not None, config.prompt_file is not None]
    ways.append(config.prompt_tokens is not None)
    if sum(ways) != 1:
        how = "no prompt" if not any(ways) else "more than one kind of prompt"
        raise ConfigError(
            f"{how} given",
            hint="give one of --prompt TEXT, --prompt-file FILE, --prompt-tokens IDS",
        )
    if config.prompt_tokens is not None:
        prompts = [_token_prompt(model, config.prompt_tokens)]
    elif config.output_bytes and model.tokenizer.kind == "bytes":
        prompts = [_bytes_prompt(model, config)]
    else:
        texts = [config.prompt] if config.prompt is not None else _lines(str(config.prompt_file))
        texts = [replace_surrogates(text) for text in texts]
        prompts = [_text_prompt(model, text, config.allow_special) for text in texts]
    if model.model.config.rolls:  # it reads prompts of any length
        return prompts
    size = model.model.config.block_size
    return [replace(p, tokens=fit_prompt(p.tokens, size, config.truncate)) for p in prompts]


def _generate(
    model: LoadedModel,
    prompts: list[Prompt],
    n: int,
    sampling: Sampling,
    on_text: OnText | None,
    on_prompt: Callable[[str], None] | None,
) -> Iterator[list[Generated]]:
    told = model.model.config.rolls
    for prompt in prompts:
        if stop.requested():
            return
        if on_prompt is not None:
            on_prompt(prompt.text)
        samples = generate_samples(
            model.model,
            model.tokenizer,
            prompt.tokens,
            n,
            sampling,
            prompt=prompt.text,
            on_text=on_text,
        )
        yield samples
        # Only now, when the texts are shown to their end: a terminal gets both.
        told = told or _tell_of_restart(model, prompt, samples)


def _tell_of_restart(model: LoadedModel, prompt: Prompt, samples: list[Generated]) -> bool:
    """Whether one of the samples outgrew the model's window; logs it if so."""
    block_size = model.model.config.block_size
    longest = max(len(sample.tokens) for sample in samples)
    if len(prompt.tokens) + longest - 1 <= block_size:  # the last token is not read any more
        return False
    log.info(
        "the text grew past block_size, %d tokens: a full window goes on with its last %d",
        block_size,
        restart_tokens(block_size),
    )
    return True


def _sampling(config: GenerateConfig) -> Sampling:
    """The settings of the engine; a random seed is logged, so that its result can be repeated."""
    seed = config.seed
    if seed is None:
        seed = secrets.randbelow(2**32)
        if config.temperature > 0:
            log.info("seed %d", seed)
    return Sampling(
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        stop=tuple(config.stop),
        seed=seed,
        max_new_tokens=config.max_new_tokens,
        logprobs=config.logprobs,
    )


def _text_prompt(model: LoadedModel, text: str, allow_special: bool) -> Prompt:
    tokens = encode_prompt(model.tokenizer, text, allow_special)
    if model.tokenizer.kind == IdsTokenizer.KIND:
        text = model.tokenizer.decode(tokens)  # with the space that the next id goes behind
    return Prompt(text, tokens, text.encode())


def _token_prompt(model: LoadedModel, tokens: list[int]) -> Prompt:
    """The ids as they are; their text is only for showing."""
    limit = min(model.model.vocab_size, model.tokenizer.vocab_size)
    outside = [token for token in tokens if not 0 <= token < limit]
    if outside:
        raise ConfigError(
            f"prompt_tokens: {outside[0]} is not one of the token ids 0 to {limit - 1}"
        )
    if not tokens:
        raise ConfigError("prompt_tokens: at least one token id is needed")
    data = model.tokenizer.decode_bytes(tokens)
    return Prompt(data.decode("utf-8", "replace"), tokens, data)


def _bytes_prompt(model: LoadedModel, config: GenerateConfig) -> Prompt:
    if config.prompt is not None:  # bytes that were no UTF-8 wait in it as surrogates
        data = config.prompt.encode("utf-8", "surrogateescape")
    else:
        data = _read(str(config.prompt_file))
    tokens = encode_prompt(model.tokenizer, data, config.allow_special)
    return Prompt(data.decode("utf-8", "replace"), tokens, data)


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"prompt_file: cannot read {path}: {error.strerror}") from error


def _lines(path: str) -> list[str]:
    """The lines of a prompt file that are not blank."""
    try:
        text = _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error
    # Not splitlines(), which also cuts at U+2028 and other characters inside a prompt.
    prompts = [line.removesuffix("\r") for line in text.split("\n")]
    prompts = [prompt for prompt in prompts if prompt.strip()]
    if not prompts:
        raise DataError(f"{path}: no prompts in it (one a line)")
    return prompts
