"""The job behind `gpt explain`: what a model makes of one text, token by token."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptcli.config.data_schema import SourceConfig
from gptcli.config.model_schema import ModelConfig
from gptcli.config.schema import Config
from gptcli.data.corpus import read_documents
from gptcli.data.scan import Document
from gptcli.device import Device, autocast, resolve_device
from gptcli.errors import ConfigError, DataError
from gptcli.evaluate import eval_precision
from gptcli.evaluation.explain import Explanation, explain_tokens, leave_one_out
from gptcli.evaluation.explain import pieces as pieces_of
from gptcli.evaluation.perplexity import EncodedDocument, encode_documents
from gptcli.model.attention_maps import attention_maps
from gptcli.runs.load import LoadedModel, load_model

_MOST_MAPPED = 1024  # tokens of a window whose attention is looked at: 4 MB a head


def explain(
    config: Config,
    text: str | Path,
    *,
    model: str | None = None,
    top: int = 5,
    token: int | None = None,
    layer: int | None = None,
    head: int | None = None,
    maps: bool = False,
) -> Explanation:
    """What MODEL makes of `text`, or of the one document of a file.

    With `token`, a position (below 0 from the end), what its prediction rests on. The attention of
    `layer` (from 0), of all layers with `maps`, is that over the first tokens of the window that
    the token was predicted in, else of the first window; `head` (from 0) is only checked. Raises
    GptError, `stop.Stopped`.
    """
    device = resolve_device(config.training.device)
    document = _document(text)
    loaded = load_model(model, device.torch)
    encoded = encode_documents([document], loaded.tokenizer)[0]
    precision = eval_precision(config, loaded, device)
    layers = _layers(loaded.model.config, layer, head, maps)
    position = _position(token, len(encoded.tokens))
    found = explain_tokens(
        loaded.model, loaded.tokenizer, encoded, device, top=top, precision=precision
    )
    window, changes = 0, np.zeros(0)
    if position is not None:
        window = position - found[position].context
        part = encoded.tokens[window : position + 1]
        changes = leave_one_out(loaded.model, part, device, precision)
    return Explanation(
        name=loaded.name,
        step=loaded.step,
        block_size=loaded.model.config.block_size,
        bytes=encoded.bytes,
        tokens=found,
        pieces=pieces_of(loaded.tokenizer, found),
        chosen=position,
        changes=changes,
        attention=_attention(loaded, encoded, window, layers, device, precision),
        attention_first=window,
    )


def _document(text: str | Path) -> Document:
    if isinstance(text, str):
        if not text:
            raise ConfigError("there is no text to explain: it is empty")
        return Document("text", text)
    if not text.is_file():
        raise DataError(f"{text}: no such file")
    documents = read_documents([SourceConfig(path=str(text))])
    if len(documents) > 1:
        raise DataError(
            f"{text} holds {len(documents)} documents; one is explained at a time",
            hint="give the text of one, as: gpt explain --text TEXT",
        )
    return documents[0]


def _layers(model: ModelConfig, layer: int | None, head: int | None, maps: bool) -> list[int]:
    if layer is not None and layer >= model.n_layer:
        raise ConfigError(f"--layer {layer}: the model's layers are 0 to {model.n_layer - 1}")
    if head is not None and head >= model.n_head:
        raise ConfigError(f"--head {head}: the model's heads are 0 to {model.n_head - 1}")
    if maps:
        return list(range(model.n_layer))
    return [] if layer is None else [layer]


def _position(token: int | None, count: int) -> int | None:
    """`token` as a position that something predicts; `count` tokens, of which the first is not."""
    if token is None:
        return None
    position = token + count if token < 0 else token
    if not 0 < position < count:
        raise ConfigError(
            f"--token {token}: the predicted tokens of this text are 1 to {count - 1}",
            hint="position 0 is what the text begins with; -1 is the last one",
        )
    return position


def _attention(
    loaded: LoadedModel,
    encoded: EncodedDocument,
    first: int,
    layers: list[int],
    device: Device,
    precision: str,
) -> dict[int, NDArray[np.float32]]:
    if not layers:
        return {}
    length = min(loaded.model.config.block_size, _MOST_MAPPED)
    tokens = encoded.tokens[first : first + length].to(device.torch)
    with autocast(device, precision):
        maps = attention_maps(loaded.model, tokens, layers)
    return {layer: weights.cpu().numpy() for layer, weights in maps.items()}
