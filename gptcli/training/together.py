"""What the processes of a run have in common before they train: the tokenizer and the data."""

import hashlib
import json
import shutil
from pathlib import Path

from gptcli import world
from gptcli.config.load import dump_config
from gptcli.config.schema import Config
from gptcli.data.corpus import Corpus
from gptcli.data.tokenizer import Tokenizer
from gptcli.errors import ConfigError, PeerError

_LEFT = ".tmp-tokenizer"  # in the run directory, whose leftovers of that name are cleaned up


def leave_tokenizer(directory: Path, tokenizer: Tokenizer) -> None:
    """Rank 0 leaves its tokenizer, which may have taken long to train, to the others."""
    here = world.current()
    if here.leads and here.size > 1:
        shutil.rmtree(directory / _LEFT, ignore_errors=True)
        tokenizer.save(directory / _LEFT)


def common_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer that rank 0 left; None for rank 0, which makes it."""
    return None if world.current().leads else Tokenizer.load(directory / _LEFT)


def check_same(directory: Path, config: Config, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """ConfigError for all where a process has another config, tokenizer or other data than rank 0:
    gradients of different runs must not be added up."""
    here = world.current()
    if here.size == 1:
        return
    mine = {
        "config": _hash(dump_config(config)),
        "tokenizer": tokenizer.identity,
        "data": _hash(json.dumps(corpus.fingerprint, sort_keys=True)),
    }
    everyone = world.gathered(mine)
    if here.leads:
        shutil.rmtree(directory / _LEFT, ignore_errors=True)
    differing = [
        f"rank {rank} has another {what} than rank 0"
        for rank, theirs in enumerate(everyone)
        for what in mine
        if theirs[what] != everyone[0][what]
    ]
    if differing:
        hint = "start all of them with the same command line, over the same files"
        raise ConfigError(differing, hint) if here.leads else PeerError(differing[0], 2)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
