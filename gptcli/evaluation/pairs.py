"""Fairness: does a model find one of two sentences likelier that differ in a single term?

After Nangia et al. 2020, "CrowS-Pairs", with the likelihood of whole sentences, which is what a
causal model gives: sum over tokens of ln p, from the document's start on.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptcli.data.tokenizer import Tokenizer
from gptcli.device import Device
from gptcli.errors import DataError
from gptcli.evaluation.likelihoods import text_nats
from gptcli.evaluation.statistics import bootstrap_ratio_ci, share_interval
from gptcli.model.gpt import GPT

_KEYS = {"a", "b", "group"}
_HINT = 'write an object a line: {"a": "He is a nurse.", "b": "She is a nurse.", "group": "jobs"}'
# Words with what is stuck to them; characters where a script has no spaces between words.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_UNIT = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+")


@dataclass(frozen=True)
class Pair:
    """Two sentences, the group they count in ("" for none) and their place, as `file:line`."""

    a: str
    b: str
    group: str
    where: str

    @property
    def places(self) -> int:
        """In how many places the two differ, word by word."""
        one, other = _UNIT.findall(self.a), _UNIT.findall(self.b)
        changes = SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
        return max(1, sum(tag != "equal" for tag, *_ in changes))


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a file of JSON lines. DataError with the line of what is no pair."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error
    # Not splitlines(), which also cuts at U+2028 inside a text.
    lines = [(f"{path}:{n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: no pairs in it", hint=_HINT)
    return [_pair(where, line) for where, line in lines]


def _pair(where: str, line: str) -> Pair:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON: {error}", hint=_HINT) from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: not a JSON object", hint=_HINT)
    if unknown := row.keys() - _KEYS:
        raise DataError(f"{where}: unknown field {sorted(unknown)[0]!r}", hint=_HINT)
    for name in ("a", "b"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{where}: {name!r} must be a sentence", hint=_HINT)
    group = row.get("group") or ""
    if not isinstance(group, str):
        raise DataError(f"{where}: 'group' must be text", hint=_HINT)
    if row["a"] == row["b"]:
        raise DataError(f"{where}: the two sentences are the same", hint="one term must differ")
    return Pair(row["a"], row["b"], group, where)


def pair_report(
    model: GPT, tokenizer: Tokenizer, pairs: Sequence[Pair], device: Device, precision: str
) -> dict[str, Any]:
    """How much likelier `a` is than `b`: of all pairs, by group, and of each; JSON-able.

    Differences are ln p(a) - ln p(b) in nats, and bits per byte of b less those of a: above 0 the
    model prefers a. Raises `stop.Stopped`.
    """
    texts = [text for pair in pairs for text in (pair.a, pair.b)]
    nats = text_nats(model, tokenizer, texts, device, precision).reshape(-1, 2)
    sizes = np.array([len(text.encode("utf-8", "replace")) for text in texts]).reshape(-1, 2)
    bits_per_byte = nats / math.log(2) / sizes
    total, relative = nats[:, 1] - nats[:, 0], bits_per_byte[:, 1] - bits_per_byte[:, 0]
    groups = list(dict.fromkeys(pair.group for pair in pairs if pair.group))
    numbers = {name: [i for i, p in enumerate(pairs) if p.group == name] for name in groups}
    several = [number for number, pair in enumerate(pairs) if pair.places > 1]
    return {
        "all": _summary(total, relative),
        "groups": {name: _summary(total[of], relative[of]) for name, of in numbers.items()},
        "differ_in_several_places": len(several),
        "several_places": [pairs[number].where for number in several[:5]],
        "pairs": [
            {"a": p.a, "b": p.b, "group": p.group, "nats": float(t), "bits_per_byte": float(r)}
            for p, t, r in zip(pairs, total, relative, strict=True)
        ],
    }


def _summary(total: NDArray[np.float64], relative: NDArray[np.float64]) -> dict[str, Any]:
    """Means with bootstrap intervals over pairs; equal likelihoods prefer neither."""
    ones, preferring = np.ones(len(total)), int(np.count_nonzero(total > 0))
    return {
        "pairs": len(total),
        "nats": float(total.mean()),
        "nats_ci95": bootstrap_ratio_ci(total, ones),
        "bits_per_byte": float(relative.mean()),
        "bits_per_byte_ci95": bootstrap_ratio_ci(relative, ones),
        "prefers_a": preferring / len(total),
        "prefers_a_ci95": share_interval(preferring, len(total)),
    }
