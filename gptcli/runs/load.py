"""`load_model`: the one way from a MODEL, as users name it, to a model that runs."""

import logging
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptcli.config.load import load_resolved
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import CheckpointError, ConfigError, ResourceError
from gptcli.interop.fit import MAX_POSITION_NUMBERS
from gptcli.model import packed
from gptcli.model.empty import empty_model, parameter_shapes
from gptcli.model.gpt import GPT
from gptcli.model.heads import attach_head, has_task_head, task_head
from gptcli.model.lora import merge_lora
from gptcli.runs import checkpoint
from gptcli.runs.adapter import (
    HEAD_BIAS,
    HEAD_WEIGHT,
    Adapter,
    check_fit,
    find_base,
    give_adapter,
    head_shapes,
)
from gptcli.runs.manifest import CONFIG, MODEL, TOKENIZER, DamagedFileError, check_hash
from gptcli.runs.resolve import ModelPlace, locate
from gptcli.runs.run_dir import CHECKPOINTS, is_run_dir
from gptcli.runs.tensors import Shapes, read_tensors, scale_name, stored_shapes, with_tied

log = logging.getLogger("gptcli")

_WRAPPERS = {"_orig_mod", "module"}  # what torch.compile and DistributedDataParallel put in names
_SCALE = "wte.scale"  # in every file of int8 weights, and in no other
_TOKENS_PER_STEP = 4096  # or one row, of models whose rows are longer


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with what belongs to it.

    Of a Hugging Face folder `state` is None, `step` 0 and `manifest` empty; of one from the hub,
    `hub` is owner/name@commit.
    """

    model: GPT
    tokenizer: Tokenizer
    config: Config
    path: Path  # the checkpoint directory, or the Hugging Face folder
    run_dir: Path | None  # the run it lies in; None for a checkpoint that was copied elsewhere
    step: int
    name: str
    manifest: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] | None = None  # state.json of the checkpoint
    hub: str | None = None
    adapter: dict[str, Any] | None = None  # adapter.json of the checkpoint


def load_model(
    reference: str | None,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    quantize: packed.Kind | None = None,
    merge: bool = True,
) -> LoadedModel:
    """Load MODEL onto `device` with weights of `dtype` (fp32).

    MODEL is what `locate` says; of a run it is the best checkpoint, else the newest valid one.
    Weights are read one tensor at a time, so that they are in memory once. `allow_pickle` also
    reads the .bin files of older Hugging Face folders. `quantize` makes its layers packed ones
    (`model.packed`), which those of an int8 checkpoint are already. The adapter of a finetuned run
    is merged into its base, which is loaded from where it lies; without `merge` it stays beside the
    frozen base. Raises CheckpointError when there is none or it is damaged or does not fit its
    config, ConfigError when it cannot be quantized so, ResourceError when the device's memory is
    too small, `stop.Stopped`.
    """
    place = locate(reference, allow_pickle=allow_pickle)
    dtype = dtype or torch.float32
    try:
        if place.kind == "folder":
            loaded = _from_folder(place, device, dtype, allow_pickle)
        elif place.kind == "run":
            loaded = _from_run(place.path, device, dtype, merge)
        else:
            manifest = checkpoint.verify(place.path, optimizer=False, weights=False)
            loaded = _from_checkpoint(place.path, manifest, device, dtype, merge)
        if quantize is not None:
            _quantize(loaded, quantize)
        return loaded
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{place.path}: the model does not fit in the memory of {device}"
        ) from error


def published_config(name: str, model: ModelConfig) -> Config:
    """A config for a model that was made elsewhere: its shape, with a tokenizer beside it."""
    rows = max(1, _TOKENS_PER_STEP // model.block_size)
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip(".-")[:100]
    return Config.model_validate(
        {
            "name": plain or "model",
            "tokenizer": {"kind": "file", "path": TOKENIZER},
            "model": model,
            "training": {"tokens_per_step": rows * model.block_size},
        }
    )


def load_weights(model: GPT, tensors: dict[str, Tensor], where: str) -> None:
    """Give `model` exactly `tensors`, whose names may carry the prefixes of wrappers; where a task
    head is among them, `model` has it afterwards.

    A model on the meta device takes them over without a copy and becomes usable. Missing,
    unexpected and misshapen tensors raise a CheckpointError that opens with `where` and lists them.
    """
    names = _plain_names(tensors, where)
    plain = {names[name]: tensor for name, tensor in tensors.items()}
    if _SCALE in plain:
        raise CheckpointError(
            f"{where}: the weights are int8, to generate and to score with, not to train",
            hint="train the model that they were made from",
        )
    found = _shapes(plain)
    check_fit(_shapes(model.state_dict()) | head_shapes(found, model.config.n_embd), found, where)
    if model.config.tie_embeddings and not _same(plain["wte.weight"], plain["head.weight"]):
        raise CheckpointError(f"{where}: wte.weight and head.weight differ, but are tied")
    on_meta, head = model.device.type == "meta", _taken_head(plain)
    model.load_state_dict(plain, assign=on_meta, strict=False)  # the names are checked already
    if on_meta:
        if model.config.tie_embeddings:
            model.head.weight = model.wte.weight  # assigning made two parameters of them
        model.reset_positions()
    _load_head(model, head)


def reshaped(config: ModelConfig, loaded: LoadedModel) -> GPT:
    """A model of `config` that holds the tensors of `loaded` but for its task head; of a longer
    learned position table, a copy of the first block_size rows."""
    weights = {name: tensor.float() for name, tensor in loaded.model.state_dict().items()}
    _taken_head(weights)
    if config.position == "learned":
        positions = weights["wpe.weight"]
        if len(positions) > config.block_size:  # cloned: a view would keep all of it
            weights["wpe.weight"] = positions[: config.block_size].clone()
    model = empty_model(config, loaded.model.vocab_size)
    load_weights(model, weights, str(loaded.path))
    return model


def with_adapter(
    config: ModelConfig,
    adapter: dict[str, Any],
    tensors: dict[str, Tensor],
    where: str,
    device: torch.device | None = None,
) -> GPT:
    """The base that `adapter` (adapter.json) names as a model of `config`, with the adapter on it.

    Raises CheckpointError, which opens with `where`, when the base is gone or changed or the
    adapter does not fit it, `stop.Stopped`.
    """
    about = Adapter.from_json(adapter, where)
    place = find_base(about, where)
    base = load_model(place.hub or str(place.path), device or torch.device("cpu"))
    model = reshaped(config, base)
    give_adapter(model, about, tensors, where)
    return model


def _taken_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take a task head out of `tensors`."""
    return {name: tensors.pop(name) for name in (HEAD_WEIGHT, HEAD_BIAS) if name in tensors}


def _load_head(model: GPT, head: dict[str, Tensor]) -> None:
    if not head:
        return
    if not has_task_head(model):
        attach_head(model, len(head[HEAD_WEIGHT]), torch.Generator())
    layer = task_head(model).to(model.dtype)
    with torch.no_grad():
        layer.weight.copy_(head[HEAD_WEIGHT])
        layer.bias.copy_(head[HEAD_BIAS])


def _quantize(loaded: LoadedModel, kind: packed.Kind) -> None:
    if not packed.is_quantized(loaded.model):
        packed.quantize(loaded.model, kind)
    elif kind != "int8":
        raise ConfigError(
            f"{loaded.path} holds int8 weights, which no {kind} can be made of",
            hint="name the model that they were made from",
        )


def _load_int8(model: GPT, tensors: dict[str, Tensor], where: str) -> None:
    """`load_weights` for a file of int8 weights, whose shapes are checked, and an empty model.

    `tensors` is empty afterwards but for what is neither int8 nor belongs to such a layer: each is
    freed as soon as it is packed.
    """
    shared = [(n, n.replace("head.", "wte.")) for n in ("head.weight", "head.scale")]
    if model.config.tie_embeddings and not all(_same(tensors[a], tensors[b]) for a, b in shared):
        raise CheckpointError(f"{where}: wte.weight and head.weight differ, but are tied")

    def pack(name: str) -> nn.Module:
        weight, scale = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.scale")
        return packed.int8_layer(name, weight, scale.float(), tensors.pop(f"{name}.bias", None))

    head = _taken_head(tensors)
    packed.replace_layers(model, packed.matrices(model), pack)
    model.load_state_dict(tensors, assign=True, strict=False)  # those of the new layers they have
    model.reset_positions()
    _load_head(model, head)


def _from_run(run_dir: Path, device: torch.device, dtype: torch.dtype, merge: bool) -> LoadedModel:
    """The best checkpoint; where it is damaged, and where there is none, the newest valid one.

    Weights are hashed once, while they are read.
    """
    best = checkpoint.read_best(run_dir)
    if best is not None:
        path = checkpoint.checkpoint_dir(run_dir, best[0])
        try:
            manifest = checkpoint.verify(path, optimizer=False, weights=False)
        except CheckpointError as error:
            log.warning("the best checkpoint cannot be used: %s", error.message)
        else:
            try:
                return _from_checkpoint(path, manifest, device, dtype, merge)
            except DamagedFileError as error:
                log.warning("the best checkpoint cannot be used: %s", error.message)
    for path in checkpoint.newest_first(run_dir, log, optimizer=False, weights=False):
        try:
            manifest = checkpoint.verify(path, hashes=False)
            return _from_checkpoint(path, manifest, device, dtype, merge)
        except DamagedFileError as error:
            log.warning("checkpoint skipped: %s", error.message)
    raise CheckpointError(f"{run_dir} has no valid checkpoint", hint="see: gpt runs list")


def _from_checkpoint(
    path: Path, manifest: dict[str, Any], device: torch.device, dtype: torch.dtype, merge: bool
) -> LoadedModel:
    """The model of a checkpoint that is verified but for the hash of its weights.

    They are hashed in a thread while they are read. Damage explains whatever else went wrong, so
    its error comes first.
    """
    with ThreadPoolExecutor(1) as pool:
        hashed = pool.submit(check_hash, path, manifest, MODEL)
        try:
            config = _read_config(path)
            tokenizer = checkpoint.read_tokenizer(path, manifest)
            adapter = checkpoint.read_adapter(path, manifest)
            if adapter is None:
                model = _whole_model(path, manifest, config.model, device, dtype)
            else:
                where, stored = str(path / MODEL), read_tensors(path / MODEL)
                model = with_adapter(config.model, adapter, stored, where, device)
                if merge:
                    merge_lora(model)
                    model.to(dtype).reset_positions()
            if tokenizer.vocab_size > model.vocab_size:
                raise CheckpointError(
                    f"{path}: the tokenizer has {tokenizer.vocab_size} tokens,"
                    f" the model only {model.vocab_size}",
                    hint="one of the two belongs to another model; copy or import it again",
                )
        finally:
            hashed.result()
    parent = Path(os.path.abspath(path)).parent
    in_run = parent.name == CHECKPOINTS and is_run_dir(parent.parent)
    return LoadedModel(
        model=model.eval(),
        tokenizer=tokenizer,
        config=config,
        path=path,
        run_dir=parent.parent if in_run else None,
        step=manifest["step"],
        name=config.name,
        manifest=manifest,
        state=checkpoint.read_state(path),
        adapter=adapter,
    )


def _whole_model(
    path: Path,
    manifest: dict[str, Any],
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> GPT:
    """The model whose weights are all in the checkpoint."""
    model = _empty_model(path, config, manifest["tied"])
    stored = read_tensors(path / MODEL, device, dtype)
    tensors = with_tied(stored, manifest["tied"], path)
    load = _load_int8 if _SCALE in tensors else load_weights
    load(model, tensors, str(path / MODEL))
    return model


def _from_folder(
    place: ModelPlace, device: torch.device, dtype: torch.dtype, allow_pickle: bool
) -> LoadedModel:
    """The model of a Hugging Face folder, whose files `open_folder` has checked."""
    from gptcli.interop.hf_folder import open_folder  # much to import, which runs do not need

    folder = open_folder(place.path, allow_pickle=allow_pickle)
    model = empty_model(folder.config.model, folder.config.vocab_size)
    config = published_config(place.name, model.config)
    tensors = {}
    for name, tensor in folder.weights(dtype):
        tensors[name] = tensor.to(device)
    if model.config.tie_embeddings:
        tensors["head.weight"] = tensors["wte.weight"]
    load_weights(model, tensors, str(place.path))
    return LoadedModel(
        model=model.eval(),
        tokenizer=folder.tokenizer,
        config=config,
        path=place.path,
        run_dir=None,
        step=0,
        name=config.name,
        hub=place.hub,
    )


def _read_config(path: Path) -> Config:
    try:
        return load_resolved(path / CONFIG)
    except ConfigError as error:  # not the user's config, so not exit code 2
        raise CheckpointError(error.message, error.hint) from error


def _empty_model(path: Path, config: ModelConfig, tied: dict[str, str]) -> GPT:
    """A model on the meta device that the weights file fits, which is checked before building."""
    where = str(path / MODEL)
    stored = stored_shapes(path / MODEL)
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
    _check_positions(path / CONFIG, config)
    try:
        expected = parameter_shapes(config, embedding[0])
    except (RuntimeError, OverflowError, TypeError) as error:  # sizes beyond 64 bits
        raise CheckpointError(f"{path / CONFIG}: no model has these sizes: {error}") from error
    if _SCALE in shapes:
        kept = ("wpe.weight",)  # the one matrix that stays in floats
        packable = {n: s for n, s in expected.items() if len(s) == 2 and n not in kept}
        expected |= {scale_name(name): shape[:1] for name, shape in packable.items()}
    check_fit(expected | head_shapes(shapes, config.n_embd), shapes, where)
    return empty_model(config, embedding[0])


def _check_positions(path: Path, config: ModelConfig) -> None:
    """Bound the table that `GPT.reset_positions` makes."""
    widths = {"rope": config.head_size, "sinusoidal": config.n_embd}
    if config.block_size * widths.get(config.position, 0) > MAX_POSITION_NUMBERS:
        raise CheckpointError(f"{path}: model.block_size {config.block_size} is too large")


def _plain_names(names: Iterable[str], where: str) -> dict[str, str]:
    """Each name -> the name without parts that wrappers added."""
    plain = {n: ".".join(p for p in n.split(".") if p not in _WRAPPERS) for n in names}
    if len(set(plain.values())) < len(plain):
        raise CheckpointError(f"{where} holds tensors twice, with and without a wrapper's prefix")
    return plain


def _shapes(tensors: dict[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)
