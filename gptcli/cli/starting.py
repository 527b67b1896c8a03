"""Imports and loading at the start of a command, which leave much that stays."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def starting() -> Iterator[None]:
    """Inside, nothing looks for garbage; where torch is imported, what there is at the end is never
    looked at again.

    That import makes 150,000 objects that stay; to go through them again and again would take half
    a second with all that training needs.
    """
    first = "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if first:  # else there may be garbage among it, which would stay too
            gc.freeze()
        gc.enable()
