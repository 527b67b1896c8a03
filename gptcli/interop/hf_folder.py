"""Models in Hugging Face folders: everything is checked by config and headers, then read."""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli import stop
from gptcli.data.json_file import read_json_object
from gptcli.data.published_files import (
    CHAT_TEMPLATE,
    CONFIG,
    MERGES,
    TOKENIZER_JSON,
    VOCABULARY,
)
from gptcli.data.tokenizer import IdsTokenizer, Tokenizer, load_tokenizer_json
from gptcli.data.tokenizer_json import MAX_TOKENIZER_BYTES, NAMING, NUMBERING
from gptcli.errors import CheckpointError, DataError
from gptcli.interop.fit import LISTED, listed, misfit
from gptcli.interop.hf_config import HFConfig, read_config
from gptcli.interop.hf_files import Reader, Stored, headers, inside, weight_files
from gptcli.interop.hf_weights import layout, our_shape, plain_name, to_ours
from gptcli.interop.safetensors_file import DTYPES

log = logging.getLogger("gptcli")

_HEAD = "lm_head.weight"
_LAYER = re.compile(r"(h|layers)\.(\d{1,9})\.")


@dataclass(frozen=True)
class HFFolder:
    """A folder whose config, tokenizer and headers fit each other.

    `dtype` holds its weights without loss, or is fp32.
    """

    path: Path
    config: HFConfig
    tokenizer: Tokenizer
    files: tuple[Path, ...]
    dtype: torch.dtype
    stored: dict[str, Stored]  # by name without prefix

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Our parameters as `dtype`, in the order of `GPT.named_parameters` (tied ones once).

        Each is made in its own memory from the mapped file, so that nothing is there twice. Raises
        CheckpointError for a damaged file or an lm_head.weight that differs from the embedding it
        is tied to, `stop.Stopped`.
        """
        read = _Parts(self)
        if self.config.model.tie_embeddings and _HEAD in self.stored:
            read.check_tied()
        for name, parts in read.table.items():
            stop.raise_if_requested()
            out = torch.empty(our_shape(parts), dtype=dtype)
            to_ours(parts, read, out)
            yield name, out


class _Parts:
    """Reads the tensors that `layout` names."""

    def __init__(self, folder: HFFolder) -> None:
        config = folder.config
        self.table = layout(config.model, config.vocab_size, config.family)
        self._shapes = {part.name: part.shape for parts in self.table.values() for part in parts}
        self._folder, self._read = folder, Reader()

    def __call__(self, name: str) -> Tensor:
        config = self._folder.config
        if name.endswith(config.zeros):  # of an empty tuple, none does
            return torch.zeros(self._shapes[name])
        return self._read(self._folder.stored[plain_name(name, config.family) or name])

    def check_tied(self) -> None:
        """Refuse a head that the model would not use, though it is not the embedding."""
        head = self._folder.stored[_HEAD]
        embedding = self(self.table["wte.weight"][0].name)
        if not torch.equal(self._read(head).to(embedding.dtype), embedding):
            raise CheckpointError(
                f"{head.path}: {_HEAD} differs from the embedding, but {CONFIG} ties them",
                hint="if the model has a head of its own, set tie_word_embeddings to false",
            )


def open_folder(path: Path, *, allow_pickle: bool = False) -> HFFolder:
    """Check config, headers and tokenizer of a Hugging Face folder; no weight is read yet.

    `allow_pickle` also takes pytorch_model.bin, of which only tensors are unpickled. The tokenizer
    of a folder that has none is `Tokenizer.of_ids`: no id ends its texts, even where config.json
    names an eos_token_id, as that may be an ordinary token (see `IdsTokenizer`). Raises
    CheckpointError when something is missing, damaged or does not fit, listing all tensors that do
    not, DataError when the tokenizer cannot be used.
    """
    config_path = inside(path, CONFIG)
    if config_path is None:
        raise CheckpointError(f"{path} is no model folder (no {CONFIG})")
    config = read_config(read_json_object(config_path, CheckpointError), str(config_path))
    files = weight_files(path, allow_pickle)
    stored = _by_plain_name(headers(files), config, path)
    _check_fit(path, config, stored)
    tokenizer = _tokenizer(path, config)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens,"
            f" the model only {config.vocab_size}"
        )
    _warn_of_ids(path, config.vocab_size, tokenizer)
    return HFFolder(path, config, tokenizer, files, _common_dtype(stored), stored)


def _by_plain_name(found: list[Stored], config: HFConfig, path: Path) -> dict[str, Stored]:
    stored: dict[str, Stored] = {}
    for tensor in found:
        name = plain_name(tensor.name, config.family)
        if name is None:
            continue
        if name in stored:
            raise CheckpointError(
                f"{path} holds {name} twice, in {stored[name].path.name} as {stored[name].name}"
                f" and in {tensor.path.name} as {tensor.name}"
            )
        if tensor.dtype is None:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} holds {tensor.dtype_name}, none of"
                f" {', '.join(DTYPES)}",
                hint="quantised models do not load; take the original one",
            )
        stored[name] = tensor
    return stored


def _check_fit(path: Path, config: HFConfig, stored: dict[str, Stored]) -> None:
    """Refuse tensors that are missing, unexpected or misshapen, all of them in one error."""
    model = config.model
    _check_layers(path, model.n_layer, stored)
    table = layout(model, config.vocab_size, config.family)
    wanted = {
        plain_name(part.name, config.family) or part.name: part.shape
        for parts in table.values()
        for part in parts
        if not part.name.endswith(config.zeros)
    }
    if model.tie_embeddings and _HEAD in stored:
        wanted[_HEAD] = (config.vocab_size, model.n_embd)
    full = [part.name for parts in table.values() for part in parts]
    names = _names_in_files(stored, full, config)
    found = {tensor.name: tensor.shape for tensor in stored.values()}
    if problem := misfit({names[name]: shape for name, shape in wanted.items()}, found):
        raise CheckpointError(
            f"{path}: the weights do not fit {CONFIG} ({config.family}); {problem}"
        )


def _names_in_files(stored: dict[str, Stored], full: list[str], config: HFConfig) -> dict[str, str]:
    """What the tensors are called in the files, by name without prefix; `full` names are those of
    models with a head, which is what missing ones are called unless the files do without prefix.
    """
    plain = {plain_name(name, config.family) or name: name for name in full}
    if not any(tensor.name != name for name, tensor in stored.items()):
        plain = {name: name for name in plain}
    return plain | {_HEAD: _HEAD} | {name: tensor.name for name, tensor in stored.items()}


def _check_layers(path: Path, n_layer: int, stored: dict[str, Stored]) -> None:
    """Refuse another number of layers before a list of their tensors is made, which may be long."""
    numbered = {t.name: match for name, t in stored.items() if (match := _LAYER.match(name))}
    found = {int(match[2]) for match in numbered.values()}
    if len(found) == n_layer:
        return
    block = "h"
    for name, match in numbered.items():
        block = name.removesuffix(match.string) + match[1]
        break
    missing = islice((i for i in range(n_layer) if i not in found), LISTED)
    lists = {
        "missing": ([f"{block}.{i}" for i in missing], n_layer - len(found)),
        "unexpected": ([f"{block}.{i}" for i in sorted(found) if i >= n_layer], 0),
    }
    problems = [f"{what}: {listed(*names)}" for what, names in lists.items() if names[0]]
    raise CheckpointError(
        f"{path / CONFIG} says {n_layer} layers, but the weights have {len(found)}; "
        + "; ".join(problems)
    )


def _common_dtype(stored: dict[str, Stored]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in stored.values()}
    only = dtypes.pop() if len(dtypes) == 1 else None
    return only if only in (torch.float16, torch.bfloat16) else torch.float32


def _tokenizer(path: Path, config: HFConfig) -> Tokenizer:
    """By tokenizer.json, or the older vocab.json and merges.txt; without any, of plain ids."""
    for name in (*NAMING, *NUMBERING, CHAT_TEMPLATE):
        inside(path, name)  # they are read with it
    if found := inside(path, TOKENIZER_JSON):
        return load_tokenizer_json(found)
    if inside(path, VOCABULARY) and inside(path, MERGES):
        if config.family in ("gpt2", "gpt_neo"):
            return _from_merges(path)
        raise _no_json(path, f"only {VOCABULARY} and {MERGES}, of a {config.family}")
    for name in ("tokenizer.model", "vocab.txt", "spiece.model"):
        if inside(path, name):
            raise _no_json(path, f"only {name}")
    for name in NAMING:
        if inside(path, name):
            log.warning(
                "%s is missing, though there is a %s: texts are token ids in decimal, and no id"
                " ends one",
                path / TOKENIZER_JSON,
                name,
            )
            break
    return Tokenizer.of_ids(config.vocab_size)


def _warn_of_ids(path: Path, vocab_size: int, tokenizer: Tokenizer) -> None:
    """Tell of ids in the configs that cannot be followed."""
    if isinstance(tokenizer, IdsTokenizer):
        return
    for name in NUMBERING:
        file = path / name
        raw = read_json_object(file, DataError) if file.is_file() else {}
        given = raw.get("eos_token_id")
        ends = given if isinstance(given, list) else [given]
        odd = [str(i)[:20] for i in ends if i is not None and not _is_end(i, tokenizer)]
        if odd:
            log.warning(
                "%s: eos_token_id %s: no token of the vocabulary of %d; no text ends there",
                file,
                listed(odd),
                vocab_size,
            )
        bos = raw.get("bos_token_id")
        if tokenizer.bos is not None and bos is not None and bos != tokenizer.bos:
            log.warning(
                "%s: bos_token_id is %s, but the tokenizer begins texts with %d, as they do here",
                file,
                str(bos)[:20],
                tokenizer.bos,
            )


def _is_end(token: Any, tokenizer: Tokenizer) -> bool:
    return type(token) is int and token in tokenizer.ends


def _no_json(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} has no {TOKENIZER_JSON}, {what}",
        hint="make one with transformers: AutoTokenizer.from_pretrained(FOLDER)"
        ".save_pretrained(FOLDER)",
    )


def _from_merges(path: Path) -> Tokenizer:
    """GPT-2's byte-level BPE, as its oldest uploads have it."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    try:
        for name in (VOCABULARY, MERGES):
            if (path / name).stat().st_size > MAX_TOKENIZER_BYTES:
                raise ValueError(f"{name} is larger than {MAX_TOKENIZER_BYTES} bytes")
        bpe = models.BPE.from_file(str(path / VOCABULARY), str(path / MERGES))
    except Exception as error:  # the library raises nothing more special
        raise DataError(f"{path}: {VOCABULARY} and {MERGES}: {error}") from error
    library = Library(bpe)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return load_tokenizer_json(path / TOKENIZER_JSON, content=library.to_str().encode())
