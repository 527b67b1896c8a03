"""Where things are kept that can be made again: tokens, tokenizers, the results of races."""

import os
from pathlib import Path


def cache_root() -> Path:
    """Where caches are: $GPT_CACHE, else $XDG_CACHE_HOME/gptcli, else ~/.cache/gptcli."""
    if own := os.environ.get("GPT_CACHE"):
        return Path(os.path.expanduser(own))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "gptcli"
