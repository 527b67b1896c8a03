"""`load_model`: the one way from a MODEL, as users name it, to a model that runs."""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptcli.config.load import load_resolved
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError, ConfigError, ResourceError
from gptcli.model.gpt import GPT
from gptcli.runs import checkpoint
from gptcli.runs.manifest import CONFIG, MANIFEST, MODEL
from gptcli.runs.run_dir import CHECKPOINTS, is_run_dir, newest_run, runs_root

log = logging.getLogger("gptcli")

Shapes = dict[str, tuple[int, ...]]

_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}
_WRAPPERS = {"_orig_mod", "module"}  # what torch.compile and DistributedDataParallel put in names
_LISTED_KEYS = 10
_POSITION_NUMBERS = 2**28  # 1 GiB: the fixed position table is the one size no weight confirms


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with what belongs to it."""

    model: GPT
    tokenizer: Tokenizer
    config: Config
    path: Path  # the checkpoint directory
    run_dir: Path | None  # the run it lies in; None for a checkpoint that was copied elsewhere
    step: int
    name: str
    manifest: dict[str, Any] = field(default_factory=dict)


def load_model(
    reference: str | None, device: torch.device, *, dtype: torch.dtype | None = None
) -> LoadedModel:
    """Load MODEL (see `resolve_checkpoint`) onto `device`, as stored or with weights of `dtype`.

    Raises CheckpointError when there is none or it is damaged or does not fit its config,
    ResourceError when the device's memory is too small.
    """
    path, manifest = _resolve(reference)
    config = _read_config(path)
    model = _empty_model(path, config.model, manifest["tied"])
    contents = checkpoint.read(path, with_optimizer=False, manifest=manifest)
    if contents.tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {contents.tokenizer.vocab_size} tokens,"
            f" the model only {model.vocab_size}"
        )
    load_weights(model, contents.model, str(path / MODEL))
    try:
        model.to(device=device, dtype=dtype)
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"{path}: the model does not fit in the memory of {device}") from error
    model.reset_positions()  # the rotary table stays fp32 whatever the weights are
    parent = Path(os.path.abspath(path)).parent
    in_run = parent.name == CHECKPOINTS and is_run_dir(parent.parent)
    return LoadedModel(
        model=model.eval(),
        tokenizer=contents.tokenizer,
        config=config,
        path=path,
        run_dir=parent.parent if in_run else None,
        step=manifest["step"],
        name=config.name,
        manifest=manifest,
    )


def resolve_checkpoint(reference: str | None) -> Path:
    """The verified checkpoint directory that MODEL means (its optimizer is not hashed).

    MODEL is a checkpoint directory, or a run directory (its best checkpoint, else its newest); None
    is the newest run under `runs_root()` that has a checkpoint. Raises CheckpointError.
    """
    return _resolve(reference)[0]


def load_weights(model: GPT, tensors: dict[str, Tensor], where: str) -> None:
    """Give `model` exactly `tensors`, whose names may carry the prefixes of wrappers.

    A model on the meta device takes them over without a copy and becomes usable. Missing,
    unexpected and misshapen tensors raise a CheckpointError that opens with `where` and lists them.
    """
    names = _plain_names(tensors, where)
    plain = {names[name]: tensor for name, tensor in tensors.items()}
    _check_fit(model, {name: tuple(tensor.shape) for name, tensor in plain.items()}, where)
    if model.config.tie_embeddings and not _same(plain["wte.weight"], plain["head.weight"]):
        raise CheckpointError(f"{where}: wte.weight and head.weight differ, but are tied")
    on_meta = model.device.type == "meta"
    model.load_state_dict(plain, assign=on_meta)
    if on_meta:
        if model.config.tie_embeddings:
            model.head.weight = model.wte.weight  # assigning made two parameters of them
        model.reset_positions()


def _resolve(reference: str | None) -> tuple[Path, dict[str, Any]]:
    if reference is None:
        root = runs_root()
        run_dir = newest_run(root)
        if run_dir is None:
            raise CheckpointError(
                f"no run with a checkpoint under {root}/",
                hint="make one: gpt pretrain configs/small.yaml",
            )
        return _best_or_newest(run_dir)
    path = Path(reference).expanduser()
    if path.is_file():
        raise _not_a_directory(path)
    if not path.is_dir():
        elsewhere = runs_root() / reference
        hint = f"did you mean {elsewhere}?" if elsewhere.is_dir() else "see: gpt runs list"
        raise CheckpointError(f"no run or checkpoint at {reference}", hint=hint)
    if os.path.lexists(path / MANIFEST):
        return path, checkpoint.verify(path, optimizer=False)
    if is_run_dir(path):
        return _best_or_newest(path)
    raise CheckpointError(f"{path} is not a run or a checkpoint (no {MANIFEST})")


def _not_a_directory(path: Path) -> CheckpointError:
    if path.suffix in _PICKLES:
        return CheckpointError(
            f"{path} is a pickle file, which can run any code when it is read, so gpt never does",
            hint="convert it to safetensors where you trust it",
        )
    hint = f"did you mean {path.parent}?" if (path.parent / MANIFEST).is_file() else None
    return CheckpointError(f"{path} is a file; give a run or checkpoint directory", hint=hint)


def _best_or_newest(run_dir: Path) -> tuple[Path, dict[str, Any]]:
    best = checkpoint.read_best(run_dir)
    if best is not None:
        path = checkpoint.checkpoint_dir(run_dir, best[0])
        try:
            return path, checkpoint.verify(path, optimizer=False)
        except CheckpointError as error:
            log.warning("the best checkpoint cannot be used: %s", error.message)
    newest = checkpoint.newest_valid(run_dir, log, optimizer=False)
    if newest is None:
        raise CheckpointError(f"{run_dir} has no valid checkpoint", hint="see: gpt runs list")
    return newest, checkpoint.verify(newest, hashes=False)


def _read_config(path: Path) -> Config:
    try:
        return load_resolved(path / CONFIG)
    except ConfigError as error:  # not the user's config, so not exit code 2
        raise CheckpointError(error.message, error.hint) from error


def _empty_model(path: Path, config: ModelConfig, tied: dict[str, str]) -> GPT:
    """A model on the meta device that the weights file fits; sizes are checked before building."""
    where = str(path / MODEL)
    stored = _stored_shapes(path / MODEL)
    stored.update({name: stored[kept] for name, kept in tied.items() if kept in stored})
    names = _plain_names(stored, where)
    shapes = {names[name]: shape for name, shape in stored.items()}
    embedding = shapes.get("wte.weight", ())
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    if len(embedding) != 2 or embedding[1] != config.n_embd or len(layers) != config.n_layer:
        raise CheckpointError(
            f"{where} has {len(layers)} layers and wte.weight {list(embedding)},"
            f" but {CONFIG} says n_layer {config.n_layer}, n_embd {config.n_embd}"
        )
    if config.block_size * _table_width(config) > _POSITION_NUMBERS:
        raise CheckpointError(f"{path / CONFIG}: model.block_size {config.block_size} is too large")
    try:
        with torch.device("meta"):
            model = GPT(config, embedding[0])
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond 64 bits
        raise CheckpointError(f"{path / CONFIG}: no model has these sizes: {error}") from error
    _check_fit(model, shapes, where)
    return model


def _table_width(config: ModelConfig) -> int:
    """Numbers a position in the table that `GPT.reset_positions` makes."""
    return {"rope": config.head_size, "sinusoidal": config.n_embd}.get(config.position, 0)


def _stored_shapes(path: Path) -> Shapes:
    """Shapes by name from the file's header. CheckpointError for tensors of whole numbers."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            for name, part in slices.items():
                if not re.fullmatch(r"B?F\d+", part.get_dtype()):
                    raise CheckpointError(f"{path}: {name} holds {part.get_dtype()}, not floats")
            return {name: tuple(part.get_shape()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _plain_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Each name -> the name without parts that wrappers added."""
    plain = {n: ".".join(p for p in n.split(".") if p not in _WRAPPERS) for n in names}
    if len(set(plain.values())) < len(plain):
        raise CheckpointError(f"{where} holds tensors twice, with and without a wrapper's prefix")
    return plain


def _check_fit(model: GPT, found: Shapes, where: str) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing: {_listed(missing)}")
    if unexpected := [name for name in found if name not in expected]:
        problems.append(f"unexpected: {_listed(unexpected)}")
    misshapen = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if misshapen:
        problems.append(f"wrong shape: {_listed(misshapen)}")
    if problems:
        raise CheckpointError(f"{where} does not fit the model; " + "; ".join(problems))


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _LISTED_KEYS} more" if len(items) > _LISTED_KEYS else ""
    return ", ".join(items[:_LISTED_KEYS]) + more


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a, b)
