"""The job behind `gpt generate`: prompts in, continuations out."""

import logging
import math
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from gptcli import stop, world
from gptcli.config.generate_schema import GenerateConfig
from gptcli.data.tokenizer import IdsTokenizer
from gptcli.errors import CheckpointError, ConfigError, GptError
from gptcli.generation.constraint import Constraint, constraint_of, read_constraint
from gptcli.generation.engine import BatchSize, Request, decode, restart_tokens
from gptcli.generation.grammar import check_spelled
from gptcli.generation.kernel_race import Prepared, decode_threads
from gptcli.generation.prompt import encode_prompt, fit_prompt, replace_surrogates
from gptcli.generation.prompt_file import read_bytes, read_prompts
from gptcli.generation.row import Generated, OnText
from gptcli.generation.sampling import Sampling
from gptcli.runs.load import LoadedModel

log = logging.getLogger("gptcli")

_MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Prompt:
    """A prompt as text, as the ids that the model continues, as bytes, and its settings."""

    text: str
    tokens: list[int]
    data: bytes
    settings: GenerateConfig
    where: str = ""  # in a file, as `file:line`


def generate(
    model: LoadedModel,
    config: GenerateConfig,
    *,
    on_text: OnText | None = None,
    on_prompt: Callable[[str], None] | None = None,
    on_sample: Callable[[Generated], None] | None = None,
) -> Iterator[list[Generated]]:
    """Continue each prompt `n` times; yields the samples of one prompt at a time, in order.

    Prompts are read and checked, and a random seed is drawn and logged, before this returns; the
    decoding, of all prompts together, happens as the result is iterated. `on_prompt(text)` is
    called before the first `on_text(sample, piece)` of each prompt, and those of the next prompt
    wait until the samples of this one are taken. `on_sample` receives each of them before, when it
    and those before it are done, but for interrupted ones. After a stop request come the texts of
    the prompt at hand ("interrupted") and those of later prompts that are done. Raises ConfigError,
    DataError, CheckpointError; behind all texts ConfigError if some "failed", with a constraint
    that nothing could go on with.
    """
    prompts = resolve_prompts(model, config)
    requests = _requests(prompts)
    texts = _generate(model, prompts, requests, config, on_text, on_prompt, on_sample)
    return _told_of_constraints(prompts, texts)


def generate_dealt(model: LoadedModel, config: GenerateConfig) -> Iterator[list[Generated]]:
    """As `generate`, by several processes that `world.joined` brought together: each continues
    every n-th prompt, and all get the samples of all prompts, in order. Texts are those of one
    process with the same seed, but where rounding decides between two tokens."""
    here = world.current()
    seed = config.seed if config.seed is not None else world.told(secrets.randbelow(2**32))
    config = config.model_copy(update={"seed": seed})
    prompts = resolve_prompts(model, config)
    mine = [prompts[number] for number in here.dealt(len(prompts))]
    requests = _requests(mine)
    texts = _generate(model, mine, requests, config, None, None) if mine else iter(())
    everything = world.gathered([[asdict(sample) for sample in samples] for samples in texts])
    return _told_of_constraints(prompts, _in_order(prompts, everything))


def _in_order(
    prompts: list[Prompt], everything: list[list[list[dict[str, Any]]]]
) -> Iterator[list[Generated]]:
    """The samples of each prompt, from those of the prompts that were dealt to each process."""
    for number in range(len(prompts)):
        turn, rank = divmod(number, len(everything))
        if turn < len(everything[rank]):  # else a stop came before
            yield [Generated(**sample) for sample in everything[rank][turn]]


def generate_bytes(model: LoadedModel, config: GenerateConfig) -> bytes:
    """The bytes of one prompt (not with `no_prompt`) and of its one continuation.

    Nothing of either goes through text, so that data of any kind comes out as it is. A stop
    request ends it early. Raises what `generate` does, and ConfigError for more than one prompt,
    `n` above 1 or `stop`, whose texts the bytes need not hold.
    """
    prompts = resolve_prompts(model, config)
    if len(prompts) > 1:
        raise ConfigError(f"output_bytes writes one result, and there are {len(prompts)} prompts")
    settings = prompts[0].settings
    if settings.n > 1 or settings.stop:
        raise ConfigError("output_bytes writes one continuation: not with n above 1, nor with stop")
    data = b"" if config.no_prompt else prompts[0].data
    texts = _generate(model, prompts, _requests(prompts), config, None, None)
    for samples in _told_of_constraints(prompts, texts):
        data += model.tokenizer.decode_bytes(samples[0].tokens)
    return data


def resolve_prompts(model: LoadedModel, config: GenerateConfig) -> list[Prompt]:
    """The prompts that `config` names in exactly one of its three ways, as token ids that fit.

    With `output_bytes` and byte tokens, a prompt is the bytes it is made of and a prompt file holds
    one. Raises ConfigError for none or several ways, ids out of range, a file that cannot be opened
    or has wrong rows, a prompt that is too long with `truncate: error`, or a constraint that the
    model's tokens cannot spell; DataError for a file without prompts.
    """
    prompts = _resolved(model, read_constraint(config))
    _check_constraints(model, prompts)
    return prompts


def _resolved(model: LoadedModel, config: GenerateConfig) -> list[Prompt]:
    ways = [config.prompt is not None, config.prompt_file is not None]
    ways.append(config.prompt_tokens is not None)
    if sum(ways) != 1:
        how = "no prompt" if not any(ways) else "more than one kind of prompt"
        raise ConfigError(
            f"{how} given",
            hint="give one of --prompt TEXT, --prompt-file FILE, --prompt-tokens IDS",
        )
    as_bytes = config.output_bytes and model.tokenizer.kind == "bytes"
    if as_bytes and config.prompt_tokens is None:
        return [_fitted(model, _bytes_prompt(model, config))]
    if config.prompt_file is None:
        return [_fitted(model, _prompt(model, config))]
    prompts, cut = list[Prompt](), list[str]()
    for line in read_prompts(config.prompt_file, config):
        try:
            whole = _prompt(model, line.settings)
            prompts.append(replace(_fitted(model, whole, warn=False), where=line.where))
        except GptError as error:
            raise type(error)(f"{line.where}: {error.message}", error.hint) from error
        if len(prompts[-1].tokens) < len(whole.tokens):
            cut.append(line.where)
    if cut:
        log.warning(
            "%s%s: the prompt is longer than the model's block_size, %d tokens:"
            " its first ones are dropped",
            cut[0],
            f" and {len(cut) - 1} more" if len(cut) > 1 else "",
            model.model.config.block_size,
        )
    return prompts


class _InTurn:
    """Passes on the prompt whose turn it is, and its texts; those of later prompts wait."""

    def __init__(self, on_prompt: Callable[[str], None] | None, on_text: OnText | None) -> None:
        self._on_prompt = on_prompt or (lambda text: None)
        self._on_text = on_text or (lambda sample, piece: None)
        self._turn = -1
        self._waiting: dict[int, list[tuple[int, str]]] = defaultdict(list)

    def piece(self, request: int, sample: int, text: str) -> None:
        """Some more text of any prompt."""
        if request == self._turn:
            self._on_text(sample, text)
        else:
            self._waiting[request].append((sample, text))

    def begin(self, request: int, prompt: str) -> None:
        """It is this prompt's turn: it and what waited of it are passed on."""
        self._turn = request
        self._on_prompt(prompt)
        for sample, text in self._waiting.pop(request, []):
            self._on_text(sample, text)


def _generate(
    model: LoadedModel,
    prompts: list[Prompt],
    requests: list[Request],
    config: GenerateConfig,
    on_text: OnText | None,
    on_prompt: Callable[[str], None] | None,
    on_sample: Callable[[Generated], None] | None = None,
) -> Iterator[list[Generated]]:
    def done(sample: Generated) -> None:
        if on_sample is not None and not stopped:  # else it comes only if its prompt is done whole
            on_sample(sample)

    stopped, speculate = False, config.speculate is not None
    size = BatchSize.of(model.model, requests, speculate)
    rounds = math.ceil(sum(request.n for request in requests) / size.rows)
    steps = max(request.sampling.max_new_tokens for request in requests) * rounds
    prepared = Prepared.of(model.model, size.rows, steps)
    turns = _InTurn(on_prompt, on_text)
    decoded = decode(
        model.model,
        model.tokenizer,
        requests,
        on_text=None if on_text is None else turns.piece,
        on_sample=done,
        speculate=speculate,
        decoder=prepared.decoder,
        size=size,
    )
    told, drafted, accepted = model.model.config.rolls, 0, 0
    for index, prompt in enumerate(prompts):
        stopped = stop.requested() is not None
        if not stopped:
            turns.begin(index, prompt.text)
        try:
            with decode_threads(prepared.threads):
                _, samples = next(decoded, (index, []))  # none, where a stop came before it began
        except CheckpointError as error:
            raise CheckpointError(f"{model.path}: {error.message}", error.hint) from error
        if not samples:
            break
        if stopped:  # only what was done before the stop
            if any(sample.finish_reason == "interrupted" for sample in samples):
                continue
            turns.begin(index, prompt.text)
        yield samples
        drafted += sum(sample.drafted for sample in samples)
        accepted += sum(sample.accepted for sample in samples)
        # Only now, when the texts are shown to their end: a terminal gets both.
        told = told or _tell_of_restart(model, prompt, samples)
    if speculate:
        share = f" ({accepted / drafted:.0%})" if drafted else ""
        log.info("speculation: %d of %d drafted tokens accepted%s", accepted, drafted, share)


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


def _check_constraints(model: LoadedModel, prompts: list[Prompt]) -> None:
    """ConfigError for one that the model's tokens cannot spell."""
    checked = set[Constraint]()
    for prompt in prompts:
        constraint = constraint_of(prompt.settings)
        if constraint is None or constraint in checked:
            continue
        checked.add(constraint)
        try:
            check_spelled(constraint, model.tokenizer, model.model.vocab_size)
        except ConfigError as error:
            where = f"{prompt.where}: " if prompt.where else ""
            raise ConfigError(f"{where}{error.message}", error.hint) from error


def _told_of_constraints(
    prompts: list[Prompt], texts: Iterator[list[Generated]]
) -> Iterator[list[Generated]]:
    """`texts`; behind them, which of those with a constraint do not fulfil it: a warning for texts
    that were cut, ConfigError for those that nothing could go on with."""
    held = cut = 0
    failures: dict[str, None] = {}
    for number, samples in enumerate(texts):
        yield samples
        for sample in samples:
            held += sample.complete is not None
            if sample.finish_reason == "failed":
                failures[_failure(prompts[number], sample)] = None
            elif sample.complete is False and sample.finish_reason != "interrupted":
                cut += 1
    if cut:
        log.warning(
            "%d of %d texts are not complete: max_new_tokens or a stop text ended them before"
            " their constraint was fulfilled",
            cut,
            held,
        )
    if failures:
        raise ConfigError(list(failures)[:_MOST_PROBLEMS])


def _failure(prompt: Prompt, sample: Generated) -> str:
    constraint = constraint_of(prompt.settings)
    what = "" if constraint is None else f"{constraint.shown()}: "
    return f"{prompt.where}{': ' * bool(prompt.where)}{what}{sample.failure}"


def _requests(prompts: list[Prompt]) -> list[Request]:
    """What the engine is asked for; a random seed is logged, so that its texts can be repeated."""
    seed = secrets.randbelow(2**32)
    if any(p.settings.seed is None and p.settings.temperature > 0 for p in prompts):
        log.info("seed %d", seed)
    return [Request(p.text, p.tokens, sampling_of(p.settings, seed), p.settings.n) for p in prompts]


def sampling_of(settings: GenerateConfig, seed: int) -> Sampling:
    """The settings of the engine; `seed` where none is given."""
    return Sampling(
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        stop=tuple(settings.stop),
        bad_words=tuple(settings.bad_words),
        constraint=constraint_of(settings),
        seed=seed if settings.seed is None else settings.seed,
        max_new_tokens=settings.max_new_tokens,
        logprobs=settings.logprobs,
    )


def _prompt(model: LoadedModel, settings: GenerateConfig) -> Prompt:
    """The prompt of settings that hold one, as text or as ids."""
    if settings.prompt_tokens is not None:
        return _token_prompt(model, settings, settings.prompt_tokens)
    return _text_prompt(model, settings, str(settings.prompt))


def _fitted(model: LoadedModel, prompt: Prompt, *, warn: bool = True) -> Prompt:
    if model.model.config.rolls:  # it reads prompts of any length
        return prompt
    size, how = model.model.config.block_size, prompt.settings.truncate
    return replace(prompt, tokens=fit_prompt(prompt.tokens, size, how, warn=warn))


def _text_prompt(model: LoadedModel, settings: GenerateConfig, text: str) -> Prompt:
    text = replace_surrogates(text)
    tokens = encode_prompt(model.tokenizer, text, settings.allow_special)
    if model.tokenizer.kind == IdsTokenizer.KIND:
        text = model.tokenizer.decode(tokens)  # with the space that the next id goes behind
    return Prompt(text, tokens, text.encode(), settings)


def _token_prompt(model: LoadedModel, settings: GenerateConfig, tokens: list[int]) -> Prompt:
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
    return Prompt(data.decode("utf-8", "replace"), tokens, data, settings)


def _bytes_prompt(model: LoadedModel, config: GenerateConfig) -> Prompt:
    if config.prompt is not None:  # bytes that were no UTF-8 wait in it as surrogates
        data = config.prompt.encode("utf-8", "surrogateescape")
    else:
        data = read_bytes(str(config.prompt_file))
    tokens = encode_prompt(model.tokenizer, data, config.allow_special)
    return Prompt(data.decode("utf-8", "replace"), tokens, data, config)
