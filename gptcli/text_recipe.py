"""Pretraining from a text alone: tokenizer, model, batch and limits that suit it and this machine.

The constants at the top are the recipe; the rest measures the text and the machine and applies it.
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from gptcli.config import recipe
from gptcli.config.data_schema import TokenizerConfig
from gptcli.config.load import LoadedConfig, load_config
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config, TrainingConfig
from gptcli.config.units import parse_seconds
from gptcli.data.corpus import Corpus, open_corpus
from gptcli.data.files import resolve
from gptcli.data.pipeline import corpus_tokenizer, ready_tokenizer
from gptcli.data.tokenizer import Tokenizer
from gptcli.data.unicode_scripts import letters_by_script
from gptcli.device import Device, allow_tf32, choose_precision, resolve_device
from gptcli.errors import ConfigError, DataError
from gptcli.model.empty import empty_model
from gptcli.training.flops import flops_per_token
from gptcli.training.unit_costs import UnitCosts, unit_costs, update_work

log = logging.getLogger("gptcli")

MAX_TIME = "5m"  # where no other is given: for this long the model is sized, and the run limited
_OTHER_LIMITS = ("training.max_steps", "training.max_tokens", "training.max_epochs")

# n_layer, n_head, n_embd, block_size; the largest that fits is taken. Heads of 32, then of 64.
SHAPES = (
    (2, 2, 64, 64),
    (3, 3, 96, 64),
    (4, 4, 128, 128),
    (4, 6, 192, 128),
    (5, 4, 256, 128),
    (6, 5, 320, 256),
    (6, 6, 384, 256),
    (8, 8, 512, 256),
    (10, 10, 640, 512),
    (12, 12, 768, 512),
)
# A model fits when the run has this many tokens for each weight of its matrices and head: in 100 s
# on tinyshakespeare 3 layers of 128 (2 tokens each) were better than larger models (1.1 and less).
TOKENS_PER_PARAMETER = 2.0
# Read again, a text is worth less: R* of Muennighoff et al. 2023, equation 5.
WORTH_OF_REPEATS = 15.4
MOST_EPOCHS = 40.0  # beyond it the held-out loss only rises; the run ends
# Bytes of text up to which a vocabulary is used; less than the first: bytes as tokens. Each token
# must be seen often enough to be learned.
VOCABULARIES = ((150e3, 0), (1.5e6, 1024), (6e6, 2048), (50e6, 4096), (math.inf, 8192))
CJK_LETTERS = 0.5  # share from which on the words are cut as Chinese, Japanese and Korean need
CJK_VOCABULARY = 2  # times as large: thousands of signs are as common as words elsewhere

LEAST_BYTES = 2048
HELD_OUT_BYTES = 100e3  # enough to tell models apart, within these shares of the text
HELD_OUT_SHARES = (0.005, 0.1)
EVALUATIONS = 5
EVALUATION_SHARE = 0.05  # of the time
TRAINING_SHARE = 0.9  # of the time: the rest is start, evaluation, samples and saving
WARMUP_SHARE, MOST_WARMUP = 0.05, 100

_LOOKED_AT_BYTES = 1_000_000
_MOST_DAMAGE = 0.01  # share of characters that no text has
_PROBES = 4
_CJK = ("Han", "Hiragana", "Katakana", "Hangul")


@dataclass(frozen=True)
class TextPlan:
    """A config for a text, and what was found and chosen, in lines for people."""

    config: Config
    lines: list[str]


@dataclass(frozen=True)
class _Text:
    """What was found out about the text. `train_bytes` and about `tokens` are trained on."""

    name: str
    bytes: int
    train_bytes: int
    tokens: int
    documents: int | None
    beginning: str


@dataclass(frozen=True)
class _Run:
    """A model and the run that fits into the time."""

    model: ModelConfig
    tokens_per_step: int
    steps: int
    epochs: float
    weights: int  # of the matrices and the head
    tokens_per_weight: float  # repeated ones count less

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step


def plan_text(asked: LoadedConfig, overrides: Sequence[str], began: float) -> TextPlan:
    """The config to train on the one text in `asked.config.data`, within its time.

    `asked` is what `overrides` alone give; what the user wrote there wins over every choice made
    here. The time counts from `began` (of time.monotonic()). Measures the machine for some seconds;
    writes nothing but the tokenizer in the cache. DataError for what is no text, or too little.
    """
    _check_asked(asked.config)
    device = resolve_device(asked.config.training.device)
    allow_tf32(device)
    config, held_out = _held_out(asked)
    text, corpus = _read(config)
    config, learned = _with_tokenizer(config, asked, text)
    tokenizer = ready_tokenizer(config.tokenizer) or corpus_tokenizer(config, corpus)
    text = replace(text, tokens=_count_tokens(text, tokenizer))
    limit = parse_seconds(asked.config.training.max_time or MAX_TIME)
    run, costs = _choose(config, asked, tokenizer.vocab_size, text, device, limit, began)
    fitted = _choices(run, text, costs, tokenizer.vocab_size, limit)
    if asked.given.isdisjoint(_OTHER_LIMITS):
        fitted.append(f"training.max_time={MAX_TIME}")
    config = load_config(None, [*held_out, *learned, *fitted, *overrides], asked.path).config
    return TextPlan(config, _describe(config, run, text, tokenizer))


def _check_asked(config: Config) -> None:
    """ConfigError for what the user wrote and a text alone does not go with."""
    if config.init is not None:
        raise ConfigError(
            "init: for a text alone a new model is made",
            hint="to train a model further, write init: and data.train: into a YAML file",
        )
    if any(source.encoding == "binary" for source in config.data.train):
        raise ConfigError(
            "data.train: encoding binary is no text, by which a model could be chosen",
            hint="write data.train, tokenizer and model into a YAML file",
        )


def _held_out(asked: LoadedConfig) -> tuple[Config, list[str]]:
    """How much of the text is held out, by its size as stored."""
    config = asked.config
    files = resolve(config.data.train)
    if asked.given & {"data.val", "data.val_fraction"}:
        return config, []
    size = sum(Path(file.path).stat().st_size for file in files)
    least, most = HELD_OUT_SHARES
    share = float(f"{min(most, max(least, HELD_OUT_BYTES / max(size, 1))):.2g}")
    data = config.data.model_copy(update={"val_fraction": share})
    return config.model_copy(update={"data": data}), [f"data.val_fraction={share}"]


def _read(config: Config) -> tuple[_Text, Corpus]:
    """The text's facts. DataError when it is too short or no text."""
    name = config.data.train[0].path
    log.info(f"reading {name}")
    corpus = open_corpus(config.data, val_tokens=config.eval.max_tokens)
    size = sum(source.bytes for source in corpus.sources)
    if size < LEAST_BYTES:
        raise DataError(
            f"{name}: {size:,} bytes of text are too few to train on (at least {LEAST_BYTES:,})",
            hint="add text, or put several files into one directory and name that",
        )
    sample = "".join(_beginning(corpus))
    strange = sum(c == "\ufffd" or (c < " " and c not in "\t\n\r\f") for c in sample)
    if strange > _MOST_DAMAGE * len(sample):
        raise DataError(
            f"{name}: not UTF-8 text: {strange:,} of its first {len(sample):,} characters are"
            " invalid or control characters",
            hint="text in another encoding: add --set data.train[0].encoding=latin-1 (or cp1252,"
            " gb18030, ...)",
        )
    return _Text(name, size, corpus.train_bytes, 0, corpus.documents, sample), corpus


def _beginning(corpus: Corpus) -> Iterator[str]:
    """The first texts to train on, together about _LOOKED_AT_BYTES."""
    left = _LOOKED_AT_BYTES
    for record in corpus.train_records():
        yield record["text"]
        left -= record["bytes"]
        if left <= 0:
            return


def _with_tokenizer(config: Config, asked: LoadedConfig, text: _Text) -> tuple[Config, list[str]]:
    """The tokenizer for so much text in its script, unless the user named one."""
    if "tokenizer" in asked.given:
        return config, []
    letters = letters_by_script(text.beginning, _CJK)
    cjk = sum(letters.get(script, 0) for script in _CJK) > CJK_LETTERS * sum(letters.values())
    size = next(size for most, size in VOCABULARIES if text.train_bytes <= most)
    keys: dict[str, str | int]
    if size == 0:
        keys = {"kind": "bytes"}
    else:
        pattern = {"pattern": "cjk"} if cjk else {}
        keys = {"kind": "bpe", "vocab_size": size * (CJK_VOCABULARY if cjk else 1), **pattern}
    tokenizer = TokenizerConfig.model_validate(keys)
    chosen = [f"tokenizer.{key}={value}" for key, value in keys.items()]
    return config.model_copy(update={"tokenizer": tokenizer}), chosen


def _count_tokens(text: _Text, tokenizer: Tokenizer) -> int:
    """About how many tokens there are to train on, by the beginning of the text."""
    sample = text.beginning
    return int(text.train_bytes * len(tokenizer.encode_numpy(sample)) / len(sample.encode()))


def _choose(
    config: Config,
    asked: LoadedConfig,
    vocab_size: int,
    text: _Text,
    device: Device,
    limit: float,
    began: float,
) -> tuple[_Run, UnitCosts]:
    """The run with the largest model that fits, by the speed of that model on this machine.

    The smallest is measured first, then the one that this lets expect, until it is the same.
    """
    models = _models(asked, text.tokens)
    precision = choose_precision(config.training.precision, device)
    model = models[0]
    for _ in range(_PROBES):
        costs = unit_costs(
            config, model, vocab_size, device, precision, seconds=min(1.0, limit / 50)
        )
        seconds = max(TRAINING_SHARE * (limit - (time.monotonic() - began)), 0.1 * limit)
        runs = [_expect(asked, m, vocab_size, text.tokens, costs, seconds) for m in models]
        best = _fitting(runs)
        if best.model == model:
            break
        model = best.model
    return best, costs


def _fitting(runs: list[_Run]) -> _Run:
    """The run of the largest model that sees enough tokens, else of the smallest, the first."""
    fitting = [run for run in runs if run.tokens_per_weight >= TOKENS_PER_PARAMETER]
    return max(fitting, key=lambda run: run.weights, default=runs[0])


def _models(asked: LoadedConfig, tokens: int) -> list[ModelConfig]:
    """The ladder, with what the user wrote about the model; the smallest first."""
    written = {k: getattr(asked.config.model, k) for k in asked.config.model.model_fields_set}
    found = []
    for n_layer, n_head, n_embd, block_size in SHAPES:
        while block_size > 16 and block_size > tokens // 4:
            block_size //= 2
        sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}
        try:
            model = ModelConfig.model_validate({**sizes, **written})
        except ValidationError:  # such as an n_head that does not divide this n_embd
            continue
        if model not in found:
            found.append(model)
    return found or [asked.config.model]


def _expect(
    asked: LoadedConfig,
    model: ModelConfig,
    vocab_size: int,
    text_tokens: int,
    costs: UnitCosts,
    seconds: float,
) -> _Run:
    """The run of a model in `seconds`, which ends before where the text has been read enough, or
    at a limit that the user wrote."""
    limits = asked.config.training
    weights = recipe.hidden_parameters(model) + vocab_size * model.n_embd
    token = costs.per_flop * flops_per_token(model, vocab_size)
    update = costs.per_update * update_work(model, vocab_size)
    most = (limits.max_epochs or MOST_EPOCHS) * text_tokens
    most = min(most, limits.max_tokens or most)
    tokens = min(seconds / token, most)
    for _ in range(3):  # the batch follows the tokens, and they what the updates take
        if "training.tokens_per_step" in asked.given:
            per_step = limits.tokens_per_step
        else:
            per_step = recipe.tokens_per_step(tokens, model.block_size)
        steps = max(1, int(min(seconds / (per_step * token + update), most / per_step)))
        steps = min(steps, limits.max_steps or steps)
        tokens = steps * per_step
    epochs = tokens / text_tokens
    worth = min(epochs, 1.0) + WORTH_OF_REPEATS * -math.expm1(
        -max(epochs - 1.0, 0.0) / WORTH_OF_REPEATS
    )
    return _Run(model, per_step, steps, epochs, weights, worth * text_tokens / weights)


def _choices(run: _Run, text: _Text, costs: UnitCosts, vocab_size: int, limit: float) -> list[str]:
    """The keys that make `run`, as --set takes them; what the user wrote comes after them."""
    model, evaluated = run.model, max(1, run.steps // EVALUATIONS)
    token = costs.per_flop * flops_per_token(model, vocab_size) / 3  # forward only
    scored = int(EVALUATION_SHARE * limit / EVALUATIONS / token)
    chosen = {
        "model.n_layer": model.n_layer,
        "model.n_head": model.n_head,
        "model.n_embd": model.n_embd,
        "model.block_size": model.block_size,
        "model.dropout": recipe.dropout(run.epochs),
        "training.tokens_per_step": run.tokens_per_step,
        "training.eval_every": evaluated,
        "training.save_every": evaluated,
        "training.log_every": max(1, min(10, run.steps // 20)),
        "schedule.warmup_steps": min(MOST_WARMUP, int(WARMUP_SHARE * run.steps)),
        "eval.max_tokens": max(scored, 2 * model.block_size),
        "samples.prompts": json.dumps([_prompt(text.beginning)]),
        "samples.n": 1,
    }
    if run.epochs > 0.9 * MOST_EPOCHS:
        chosen["training.max_epochs"] = MOST_EPOCHS
    return [f"{key}={value}" for key, value in chosen.items()]


def _prompt(text: str) -> str:
    """The first words of the first line that is more than a short heading."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = next((line for line in lines if len(line) >= 10), lines[0])
    words = line[:25].rsplit(None, 1)
    return words[0] if len(line) > 25 else line


def _describe(config: Config, run: _Run, text: _Text, tokenizer: Tokenizer) -> list[str]:
    """The plan for people."""
    model, training = config.model, config.training
    parameters = empty_model(model, tokenizer.vocab_size).parameter_count()
    documents = f" in {text.documents:,} documents" if (text.documents or 1) > 1 else ""
    held_out = "" if config.data.val else f", {config.data.val_fraction:.1%} of it held out"
    reason = (
        f"the largest that has {TOKENS_PER_PARAMETER:g} tokens a weight of its matrices and head"
        if run.tokens_per_weight >= TOKENS_PER_PARAMETER
        else "the smallest: text or time are short"
    )
    dropout = f", dropout {model.dropout:g}" if model.dropout else ""
    return [
        f"text        {text.name}: {text.bytes:,} bytes{documents}{held_out}",
        f"tokenizer   {tokenizer.kind}, {tokenizer.vocab_size:,} tokens,"
        f" {text.train_bytes / text.tokens:.2f} bytes each: {text.tokens:,} to train on",
        f"model       {model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide,"
        f" block {model.block_size}{dropout}: {parameters:,} parameters",
        f"training    about {run.steps:,} steps of {training.tokens_per_step:,} tokens,"
        f" {run.epochs:.2g} epochs, until {_ends(training)}",
        f"why         {reason} ({run.tokens_per_weight:.2g}; repeated tokens count less)",
    ]


def _ends(limits: TrainingConfig) -> str:
    """The limits for people; the first that is reached ends the run."""
    counts = (
        (limits.max_steps, "steps"),
        (limits.max_tokens, "tokens"),
        (limits.max_epochs, "epochs"),
    )
    counted = [f"{count:,.12g} {unit}" for count, unit in counts if count]
    return " or ".join([limits.max_time, *counted] if limits.max_time else counted)
