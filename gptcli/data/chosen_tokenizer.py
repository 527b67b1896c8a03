"""The tokenizer that a config names: trained, published, or read from a file."""

from collections.abc import Iterable
from pathlib import Path

from gptcli.config.data_schema import TokenizerConfig
from gptcli.config.units import parse_bytes
from gptcli.data.published_files import TOKENIZER_JSON
from gptcli.data.tiktoken_tables import PATTERNS, named_encoding, parse_tiktoken
from gptcli.data.tokenizer import META_FILE, Tokenizer, load_tokenizer_json, train_bpe
from gptcli.errors import DataError


def build_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config` names; `texts` (training pieces) are read by kind bpe only.

    Raises DataError when a named table or file is not there, `stop.Stopped` on a stop request.
    """
    if config.kind == "bytes":
        return Tokenizer.of_bytes()
    if config.kind == "tiktoken":
        named = named_encoding(config.name)
        return Tokenizer(config.name, named.ranks, named.pattern, named.eot)
    if config.kind == "file":
        return load_tokenizer(Path(str(config.path)), config.pattern)
    return train_bpe(texts, config.vocab_size, config.pattern, parse_bytes(config.train_bytes))


def load_tokenizer(path: Path, pattern: str) -> Tokenizer:
    """The tokenizer at `path`: a saved directory, a Hugging Face folder or its tokenizer.json, or a
    .tiktoken file, which is split by `pattern`. It has an eot: one is added where there is none.

    DataError when it is none of them, CheckpointError when a saved one is damaged.
    """
    if path.is_dir():
        is_json = (path / TOKENIZER_JSON).is_file() and not (path / META_FILE).is_file()
        if is_json:
            return load_tokenizer_json(path / TOKENIZER_JSON, needs_eot=True)
        return Tokenizer.load(path)
    if not path.is_file():
        raise DataError(f"tokenizer.path: no file or directory {path}")
    if path.suffix == ".json":
        return load_tokenizer_json(path, needs_eot=True)
    if path.suffix != ".tiktoken":
        raise DataError(
            f"tokenizer.path: {path} is neither a saved tokenizer directory nor a .tiktoken file"
            " nor a tokenizer.json"
        )
    try:
        ranks = parse_tiktoken(path.read_bytes())
        eot = max(ranks.values(), default=0) + 1
        return Tokenizer("file", ranks, PATTERNS[pattern], eot)
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: not a .tiktoken file: {error}") from error
