"""The model that a run starts from: its shape, what the config changes in it, and its weights."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from gptcli.config.load import given_beside_init
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError, ConfigError
from gptcli.interop.word_vectors import check_word_vectors, start_from_word_vectors
from gptcli.model.empty import empty_model
from gptcli.model.gpt import GPT, initialise
from gptcli.model.heads import attach_head, has_task_head
from gptcli.model.lora import add_lora, has_lora
from gptcli.runs.adapter import adapter_on, fill_adapter
from gptcli.runs.load import LoadedModel, load_model, load_weights, reshaped, with_adapter
from gptcli.runs.manifest import MODEL
from gptcli.runs.tensors import stored_shapes
from gptcli.training.start import Start, write_config

log = logging.getLogger("gptcli")


def starting_point(config: Config, start: Start) -> tuple[Config, LoadedModel | None]:
    """The config with the shape that the run's checkpoint or its `init` has, and that model.

    With `init`, the run's config.yaml gets the automatic rates, which are those for that shape. A
    file of word vectors that a fresh run needs is looked at, before any text is read.
    """
    if config.init is None:
        if start.contents is None:
            check_embedding_file(config)
        return config, None
    if start.contents is not None:
        initial, shape = None, Config.model_validate(start.saved_config).model
    else:
        initial = load_model(config.init, torch.device("cpu"))
        shape = initial.config.model
    shaped = with_shape(config, shape)
    if initial is not None:
        _tell_changes(shape, shaped.model, given_beside_init(config))
    write_config(start.directory, config.settled_for(shaped.model))
    return shaped, initial


def starting_tokenizer(start: Start, initial: LoadedModel | None) -> Tokenizer | None:
    """The tokenizer of the run's checkpoint or of the model it starts from, if any."""
    if start.contents is not None:
        return start.contents.tokenizer
    return initial.tokenizer if initial is not None else None


def check_embedding_file(config: Config) -> None:
    """DataError or ConfigError unless `model.embedding_file`, where given, fits the model."""
    if config.model.embedding_file is not None:
        check_word_vectors(Path(config.model.embedding_file), config.model.n_embd)


def with_shape(config: Config, shape: ModelConfig) -> Config:
    """`config` with the shape of the model that `init` names, changed by what is given beside it.

    Checked again as a whole: ConfigError for what does not fit that shape.
    """
    given = given_beside_init(config)
    own = {"dropout": config.model.dropout, "embedding_file": None}  # rows of `init` replace those
    _check_changes(given, shape)
    try:
        model = ModelConfig.model_validate({**shape.model_dump(), **given, **own})
        merged = Config.model_validate({**dict(config), "model": model})
    except ValidationError as error:
        lines = [line for item in error.errors() for line in item["msg"].splitlines()]
        problems = [line.removeprefix("Value error, ") for line in lines]
        raise ConfigError(
            problems, hint="the sizes that the config leaves open are those of the init model"
        ) from error
    if "rope_scaling" in given and model.idle_scaling is not None:
        raise ConfigError(model.idle_scaling)
    return merged


def required_eot(tokenizer: Tokenizer, where: str) -> int:
    """The end-of-text token, which training puts between documents. CheckpointError without one."""
    if tokenizer.eot is None:
        raise CheckpointError(
            f"{where}: its tokenizer ({tokenizer.kind}, {tokenizer.vocab_size:,} tokens) has no"
            " end-of-text token, which training puts behind each document",
            hint="a tokenizer.json that names an eos_token, beside the model's config.json, has one"
            if tokenizer.kind == "ids"
            else "name one as eos_token in its tokenizer_config.json",
        )
    return tokenizer.eot


def starting_model(
    config: Config,
    start: Start,
    tokenizer: Tokenizer,
    initial: LoadedModel | None,
    outputs: int | None = None,
    *,
    in_shares: bool = False,
) -> tuple[GPT, dict[str, Any]]:
    """The model with its weights, on the CPU, and facts about them for run.json.

    With `in_shares` it is on the meta device where its weights are to be drawn or read when each
    process has its share: see `draws_shares`.

    Weights are those of the run's checkpoint, taken out of `start.contents`, else those of
    `initial`, whose tensors are taken over without a copy, else drawn from the seed, with word
    vectors where the config names some. A run with method lora has adapters on them, whose
    adapter.json is the fact `adapter`; one with `outputs` has a task head of as many.
    """
    if start.contents is not None:
        return _saved_model(config, start, tokenizer)
    generator, facts = torch.Generator().manual_seed(config.seed), dict[str, Any]()
    if initial is not None:
        if has_task_head(initial.model):
            new = "; this run begins a new one" if outputs is not None else ""
            log.warning(f"the task head of {initial.path} is left out{new}")
        model = reshaped(config.model, initial)
        if start.job == "finetune" and config.finetune.method == "lora":
            adapter = adapter_on(initial.path, initial.hub, config.finetune.lora)
            facts = {"adapter": adapter.to_json()}
            add_lora(model, config.finetune.lora, generator)
    elif in_shares and draws_shares(config, start):
        model = empty_model(config.model, tokenizer.vocab_size)
    else:
        model = GPT(config.model, tokenizer.vocab_size)
        initialise(model, generator)
        if config.model.embedding_file is not None:
            found = start_from_word_vectors(model, tokenizer, Path(config.model.embedding_file))
            facts = {"embedding_file": asdict(found)}
    if outputs is not None:
        attach_head(model, outputs, generator)
    return model, facts


def draws_shares(config: Config, start: Start) -> bool:
    """Whether the weights of a model in shares are to be drawn, each process its part of them."""
    given = config.init is not None or config.model.embedding_file is not None
    return start.contents is None and not given


def load_trained(model: GPT, tensors: dict[str, Tensor]) -> None:
    """Give the model of a run the weights (or the adapter) of one of the run's checkpoints."""
    fill = fill_adapter if has_lora(model) else load_weights
    fill(model, tensors, "the checkpoint")


def _saved_model(config: Config, start: Start, tokenizer: Tokenizer) -> tuple[GPT, dict[str, Any]]:
    """The model of the checkpoint that the run goes on from."""
    assert start.contents is not None
    saved, adapter = start.contents.model, start.contents.adapter
    if adapter is not None:
        model = with_adapter(config.model, adapter, saved, str(start.source))
        facts = {"adapter": adapter}
    elif not saved:  # each process reads its share into it
        rows = stored_shapes(start.source / MODEL)["wte.weight"][0]
        model, facts = empty_model(config.model, rows), {}
    else:
        table = saved.get("wte.weight")  # a published one has rows to spare
        rows = table.size(0) if table is not None and table.ndim else tokenizer.vocab_size
        model = empty_model(config.model, rows)  # takes the tensors over
        load_weights(model, saved, str(start.source))
        facts = {}
    saved.clear()  # `start` lives as long as the run
    return model, facts


def _check_changes(given: dict[str, Any], shape: ModelConfig) -> None:
    """ConfigError for what is given beside `init` and cannot be had with its shape."""
    problems = []
    if shape.position == "learned" and given.get("block_size", 0) > shape.block_size:
        problems.append(
            f"model.block_size {given['block_size']} is above {shape.block_size}, where the learned"
            " positions of the model that init names end; a longer block needs a model whose"
            " position is rope, sinusoidal or none"
        )
    if "rope_theta" in given and shape.position != "rope":
        problems.append(
            f"model.rope_theta has no effect: the model that init names has position"
            f" {shape.position}; remove it"
        )
    if given.get("rope_scaling") is not None and shape.position != "rope":
        problems.append(
            "model.rope_scaling stretches position rope, but the model that init names has position"
            f" {shape.position}; remove it"
        )
    if problems:
        raise ConfigError(problems)


def _tell_changes(shape: ModelConfig, model: ModelConfig, given: dict[str, Any]) -> None:
    """Say in the log what differs from the model that `init` names."""
    for key in given:
        old, new = getattr(shape, key), getattr(model, key)
        if old != new and key != "dropout":  # which is a setting of training only
            change = f"{_shown(old)} -> {_shown(new)}{_remark(shape, model, key)}"
            log.info(f"beside init: model.{key} {change}")


def _remark(shape: ModelConfig, model: ModelConfig, key: str) -> str:
    if key != "block_size":
        return ""
    if model.block_size < shape.block_size:
        kept = f" (the first {model.block_size} learned positions are kept)"
        return kept if model.position == "learned" else ""
    scaled = model.position == "rope" and model.rope_scaling is None
    advice = "; model.rope_scaling may help" if scaled else ""
    return f" (positions from {shape.block_size} on are untrained{advice})"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value.kind if hasattr(value, "kind") else str(value)
