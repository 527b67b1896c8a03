"""What a run will take, before it: parameters, memory, disk, time and cost. Trains nothing."""

import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gptcli import portable
from gptcli.config.load import load_resolved
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.config.units import parse_bytes
from gptcli.data.corpus import VAL_TOKENS, Corpus, open_corpus
from gptcli.data.examples import Example
from gptcli.data.files import resolve
from gptcli.data.pipeline import corpus_tokenizer, ready_tokenizer
from gptcli.data.task_data import finetuning_fields, open_task
from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device, allow_tf32, resolve_device, usable_memory_bytes
from gptcli.errors import CheckpointError, ConfigError, DataError
from gptcli.evaluation.perplexity import encode_documents, encode_rows
from gptcli.interop.hf_folder import open_folder
from gptcli.model.empty import empty_model
from gptcli.model.gpt import GPT, initialise
from gptcli.model.sizes import cache_bytes, parameters_by_part
from gptcli.runs import checkpoint
from gptcli.runs.load import load_model
from gptcli.runs.manifest import CONFIG, MODEL
from gptcli.runs.resolve import locate
from gptcli.runs.run_dir import runs_root
from gptcli.runs.space import free_bytes
from gptcli.runs.tensors import stored_shapes
from gptcli.training.choices import choose
from gptcli.training.duration import Duration, Paces, computed_paces, duration, probed_paces
from gptcli.training.fitting import Case, gib, misfits
from gptcli.training.flops import flops_per_token
from gptcli.training.footprint import Footprint
from gptcli.training.initial import with_shape
from gptcli.training.trainable import as_finetuned
from gptcli.training.tuning import tune, worth_compiling

log = logging.getLogger("gptcli")

_MOST_READ_BYTES = 2**30  # of text, to count its tokens
_SAMPLE_BYTES = 256  # of text for each token of a vocabulary: enough to learn their usual length
# Of a micro batch, of which the probe runs at least two: half a minute on a CPU, seconds on a GPU.
_MOST_PROBED_FLOPS = {"cpu": 4e12, "mps": 4e13, "cuda": 4e14}


@dataclass(frozen=True)
class Plan:
    """A run before it begins. None stands for what is not known; `notes` say why.

    `problems` are reasons why it does not fit on this machine, `advice` what would change that.
    """

    name: str
    device: str
    precision: str
    threads: int
    micro_batch_size: int
    activation_checkpointing: bool
    vocab_size: int
    parameters: dict[str, int]
    learning_parameters: int  # those that are not frozen
    memory: Footprint
    kv_cache_bytes: int
    checkpoint_bytes: int
    kept_bytes: int  # of all checkpoints that the run keeps at a time
    free_memory_bytes: int | None  # that the run may take
    free_disk_bytes: int | None
    tokens_per_step: int
    flops_per_token: int
    text_tokens: int | None
    paces: Paces
    duration: Duration | None
    price_per_hour: float | None
    notes: list[str]
    problems: list[str]
    advice: list[str]

    @property
    def tokens(self) -> int | None:
        """Tokens that the run trains on."""
        return None if self.duration is None else self.duration.steps * self.tokens_per_step

    @property
    def cost(self) -> float | None:
        """In the currency of `price_per_hour`."""
        if self.price_per_hour is None or self.duration is None:
            return None
        return self.price_per_hour * self.duration.total_seconds / 3600

    @property
    def tokens_per_parameter(self) -> float | None:
        """Of all parameters; about 20 is best for the computation spent (Hoffmann et al. 2022)."""
        return None if self.tokens is None else self.tokens / self.parameters["total"]


def plan(
    config: Config,
    *,
    vocab_size: int | None = None,
    price_per_hour: float | None = None,
    run_dir: Path | None = None,
    probe_seconds: float = 5.0,
    began: float | None = None,
) -> Plan:
    """What `config` will take on this machine, which runs a few of its steps for about
    `probe_seconds`. Nothing but the caches of a run is written.

    `run_dir` is where its checkpoints would go (a folder under `runs_root`); `began` (of
    time.monotonic(), default: now) when the work began that a run too does first. `vocab_size`
    stands for a tokenizer that is not here. Raises GptError for what a user can cause;
    that the run does not fit is no error here.
    """
    began = time.monotonic() if began is None else began
    device = resolve_device(config.training.device)
    allow_tf32(device)
    config, vocabulary, tokenizer = _start(config, vocab_size)
    empty = _empty(config.model, vocabulary)
    memory, free = _memory_bytes(device), free_bytes((run_dir or runs_root()).absolute())
    text = _text(config, tokenizer)
    chosen = choose(config, device, vocabulary)
    case = Case(config, vocabulary, device, chosen, text.memory_bytes)
    problems, advice = misfits(case, case.need(), memory)
    case, paces = _paced(case, memory, text, began, probe_seconds)
    needed = case.need()
    saved = _saved_bytes(config, needed)
    kept = _kept_checkpoints(config) * saved
    _check_disk(kept + saved, free, problems, advice)  # a new one comes before an old one goes
    length = duration(config, paces, text.train_tokens)
    return Plan(
        name=config.name,
        device=device.name if device.kind == "cuda" else device.kind,
        precision=case.choices.precision,
        threads=case.choices.threads,
        micro_batch_size=case.choices.micro_batch_size,
        activation_checkpointing=case.choices.activation_checkpointing,
        vocab_size=vocabulary,
        parameters=parameters_by_part(empty),
        learning_parameters=_learning_parameters(empty, config),
        memory=needed,
        kv_cache_bytes=cache_bytes(config.model),
        checkpoint_bytes=saved,
        kept_bytes=kept,
        free_memory_bytes=memory,
        free_disk_bytes=free,
        tokens_per_step=config.training.tokens_per_step,
        flops_per_token=flops_per_token(config.model, vocabulary),
        text_tokens=text.train_tokens,
        paces=paces,
        duration=length,
        price_per_hour=price_per_hour,
        notes=_notes(case, text, paces, length),
        problems=problems,
        advice=advice,
    )


def _start(config: Config, vocab_size: int | None) -> tuple[Config, int, Tokenizer | None]:
    """The config with its model's shape, the vocabulary, and the tokenizer if it is there."""
    if config.init is not None:
        shape, size, own = _initial(config.init)
        return with_shape(config, shape), size, own
    settings = config.tokenizer
    if vocab_size is not None:
        return config, vocab_size, None
    tokenizer = ready_tokenizer(settings)
    return config, settings.vocab_size if tokenizer is None else tokenizer.vocab_size, tokenizer


def _initial(reference: str) -> tuple[ModelConfig, int, Tokenizer]:
    """Shape, rows of the embedding and tokenizer of MODEL, without reading its weights."""
    place = locate(reference)
    if place.kind == "folder":
        folder = open_folder(place.path)
        return folder.config.model, folder.config.vocab_size, folder.tokenizer
    path: Path | None = place.path
    if place.kind == "run":
        best = checkpoint.read_best(place.path)
        if best is not None:
            path = checkpoint.checkpoint_dir(place.path, best[0])
        else:
            found = checkpoint.newest_first(place.path, log, optimizer=False, weights=False)
            path = next(found, None)
    if path is None:
        raise CheckpointError(f"{place.path} has no valid checkpoint", hint="see: gpt runs list")
    manifest = checkpoint.verify(path, optimizer=False, weights=False)
    shape = load_resolved(path / CONFIG).model
    tokenizer = checkpoint.read_tokenizer(path, manifest)
    table = stored_shapes(path / MODEL).get("wte.weight")
    if table is None:  # a checkpoint of adapters
        return shape, load_model(str(path), torch.device("cpu")).model.vocab_size, tokenizer
    return shape, table[0], tokenizer


def _empty(config: ModelConfig, vocab_size: int) -> GPT:
    try:
        return empty_model(config, vocab_size)
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond 64 bits
        raise ConfigError(f"no model has these sizes: {error}") from error


def _learning_parameters(model: GPT, config: Config) -> int:
    """Of `model`, which gets what finetuning gives it, those that learn."""
    as_finetuned(model, config.finetune)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class _Text:
    """Tokens of the text, None where they are not known; `note` says why. Of rows to finetune on,
    each fills a block."""

    train_tokens: int | None = None
    val_tokens: int | None = None
    train_bytes: int | None = None
    memory_bytes: int = 0  # that reading it takes
    note: str | None = None
    finetunes: bool = False


def _text(config: Config, tokenizer: Tokenizer | None) -> _Text:
    """Counts the text as a dry run does, if it is here and not too long for that.

    A BPE tokenizer is learned from a sample: it tells how many bytes a token has.
    """
    sources = [*config.data.train, *(config.data.val or [])]
    if any(source.path.startswith("hub:") for source in sources):
        return _Text(note="the text is on the hub: its length is not known")
    resident = _resident_bytes()
    try:
        files = [file for file in resolve(sources) if file.kind != "builtin"]
        size = sum(os.path.getsize(file.path) for file in files)
        if size > _MOST_READ_BYTES:
            return _Text(note=f"the text has {gib(size)} of files: it is not counted")
        fields = finetuning_fields(config)
        corpus = open_corpus(config.data, fields, val_tokens=config.eval.max_tokens)
        next(corpus.train_records())
        memory = _resident_bytes() - resident
        if fields is not None and tokenizer is not None:
            return _rows(config, tokenizer, corpus, memory)
        if tokenizer is None:
            settings = config.tokenizer
            most = min(parse_bytes(settings.train_bytes), _SAMPLE_BYTES * settings.vocab_size)
            sample = settings.model_copy(update={"train_bytes": str(most)})
            tokenizer = corpus_tokenizer(config.model_copy(update={"tokenizer": sample}), corpus)
        held_out = encode_documents(corpus.val_documents, tokenizer, config.eval.max_tokens)
    except (DataError, OSError) as error:
        return _Text(note=f"the text is not counted: {str(error).splitlines()[0]}")
    tokens = sum(len(d.tokens) - d.first for d in held_out)
    per_byte = tokens / max(sum(d.bytes for d in held_out), 1)
    train_tokens = int(corpus.train_bytes * per_byte) + (corpus.documents or 0)
    return _Text(train_tokens, tokens, corpus.train_bytes, memory)


def _rows(config: Config, tokenizer: Tokenizer, corpus: Corpus, memory_bytes: int) -> _Text:
    """The rows to finetune on: one fills a block, unless they are packed."""
    length, settings = config.model.block_size, config.finetune
    task = open_task(config, tokenizer, corpus, block_size=length, labels=settings.labels)
    held_out = encode_rows(task.held_out)
    tokens = sum(len(d.tokens) for d in held_out)
    packed = settings.packing and isinstance(task.held_out[0], Example)
    row_tokens = tokens / len(held_out) + 1 if packed else length
    return _Text(
        train_tokens=None if corpus.remote else int(task.counts.rows * row_tokens),
        val_tokens=tokens,
        train_bytes=corpus.train_bytes,
        memory_bytes=memory_bytes,
        finetunes=True,
    )


def _check_disk(size: int, free: int | None, problems: list[str], advice: list[str]) -> None:
    if free is not None and free < size:
        problems.append(f"its checkpoints take {gib(size)} of disk, free are {gib(free)}")
        advice.append("free some disk, or write elsewhere: GPT_RUNS=DIR or --run-dir DIR")


def _kept_checkpoints(config: Config) -> int:
    """Besides the last ones, the best, and the one before the decay if there is one."""
    return config.training.keep_last + 1 + (config.schedule.kind == "wsd")


def _notes(case: Case, text: _Text, paces: Paces, length: Duration | None) -> list[str]:
    """What the plan does not know, and why."""
    notes = [] if text.note is None else [text.note]
    wanted = case.config.training.compile
    if length is not None and wanted == "auto":
        wanted = "on" if worth_compiling(case.config, case.device, length.total_seconds) else "off"
    if wanted == "on":
        notes.append("seconds are those of code that is not compiled; the run may be faster")
    if paces.source == "products":
        notes.append("seconds are operations over the speed of matrix products, not probed")
    if text.finetunes and length is not None:
        notes.append("the task's scores before and after are not in the seconds")
    if length is None:
        notes.append("no limit tells how long the run is: no seconds, no cost")
    return notes


def _paced(
    case: Case, memory: int | None, text: _Text, began: float, seconds: float
) -> tuple[Case, Paces]:
    """The case as the run will choose it, and how long its parts take: probed where a step fits
    beside a copy of the model, else computed."""
    if _can_be_probed(case, memory):
        return _probed(case, text, began, seconds)
    return case, _computed(case, text, began)


def _can_be_probed(case: Case, memory: int | None) -> bool:
    """Whether a micro batch is short enough to be run a few times, with a copy of the model. What
    trains a head alone reads each row once in all, which a few steps do not show."""
    if case.config.finetune.method == "head":
        return False
    needed = case.need()
    if memory is not None and memory < needed.total_bytes + needed.weights_bytes:
        return False
    tokens = case.choices.micro_batch_size * case.config.model.block_size
    flops = tokens * flops_per_token(case.config.model, case.vocab_size)
    return flops <= _MOST_PROBED_FLOPS[case.device.kind]


def _probed(case: Case, text: _Text, began: float, seconds: float) -> tuple[Case, Paces]:
    """The case with the choices that the run will make, and its paces.

    To compile takes longer than a plan may: it is left out.
    """
    model = GPT(case.config.model, case.vocab_size)
    initialise(model, torch.Generator().manual_seed(case.config.seed))
    as_finetuned(model, case.config.finetune)
    model.to(case.device.torch)
    training = case.config.training.model_copy(update={"compile": "off"})
    config = case.config.model_copy(update={"training": training})
    choices = replace(case.choices, compile=False)
    try:
        tuned = tune(choices, config, case.device, model, text.train_bytes or 0)
        case = replace(case, choices=tuned)
        starting = time.monotonic() - began
        paces = probed_paces(
            model,
            case.config,
            case.device,
            case.choices.precision,
            case.choices.micro_batch_size,
            val_tokens=_scored_tokens(case.config, text),
            checkpoint_bytes=_saved_bytes(config, case.need()),
            seconds=seconds,
        )
    finally:
        torch.set_num_threads(case.device.threads)  # tuning may have chosen fewer
    return case, replace(paces, starting_seconds=starting)


def _computed(case: Case, text: _Text, began: float) -> Paces:
    paces = computed_paces(
        case.config,
        case.vocab_size,
        case.device,
        case.choices.precision,
        recompute=case.choices.activation_checkpointing,
        val_tokens=_scored_tokens(case.config, text),
        checkpoint_bytes=_saved_bytes(case.config, case.need()),
    )
    return replace(paces, starting_seconds=time.monotonic() - began)


def _scored_tokens(config: Config, text: _Text) -> int:
    """Of an evaluation; where the text is not known, as many as it may be."""
    if text.val_tokens is not None:
        return text.val_tokens
    return config.eval.max_tokens or VAL_TOKENS


def _saved_bytes(config: Config, needed: Footprint) -> int:
    """Of a checkpoint: of adapters alone, which are as large as their gradients, or all weights."""
    alone = config.finetune.method == "lora"
    weights = needed.gradients_bytes if alone else needed.weights_bytes
    return weights + needed.optimizer_bytes


def _memory_bytes(device: Device) -> int | None:
    """What a run may take on `device`; on a CPU with what this process holds."""
    return usable_memory_bytes(device, 0 if device.kind == "cuda" else _resident_bytes())


def _resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * portable.page_bytes()
