"""Rotary positions between a Hugging Face config.json and ours.

transformers 5 writes `rope_parameters`, older versions wrote `rope_theta` and `rope_scaling`.
"""

import math
from dataclasses import dataclass
from typing import Any

from gptcli.config.model_schema import ModelConfig
from gptcli.interop.hf_keys import Keys

# What each kind may say besides its name and rope_theta.
_ORIGINAL = "original_max_position_embeddings"
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}
_NOT_READ = frozenset({"finetuned", _ORIGINAL})  # written by YaRN's authors; by some for all kinds


@dataclass(frozen=True)
class Rope:
    """What a config.json says of positions; `scaling` are values for our `RopeScaling`, which
    checks them."""

    theta: float
    scaling: dict[str, Any] | None
    block_size: int


def read_rope(keys: Keys, longest: int) -> Rope:
    """Positions of a config.json; `longest` is its max_position_embeddings.

    What is wrong is noted in `keys.problems`.
    """
    inside, raw = _parameters(keys)
    inner = Keys(raw, f"{inside}.")
    theta, kind = _theta(keys, inner), _kind(inner)
    _no_partial_rotary(keys, inner)
    scaling, reach = None, longest
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        original = _original(keys, inner, longest)
        if kind == "dynamic" and original != longest:
            inner.wrong(_ORIGINAL, original, f"max_position_embeddings ({longest}) for dynamic")
        scaling = _scaling(inner, kind, longest, original)
        if kind == "dynamic" and "factor" in scaling:
            reach = math.floor(scaling["factor"] * longest)
    keys.problems += inner.problems
    if kind is not None and (unknown := inner.unknown(_NOT_READ)):
        keys.problems.append(f"unknown keys for rope type {kind}: {', '.join(unknown)}")
    return Rope(theta, scaling, reach)


def _parameters(keys: Keys) -> tuple[str, dict[str, Any]]:
    """The object that describes positions and the name it has in the file."""
    new, old = keys.get("rope_parameters"), keys.get("rope_scaling")
    name, value = ("rope_parameters", new) if new is not None else ("rope_scaling", old)
    if value is None:
        return name, {}
    if not isinstance(value, dict):
        keys.wrong(name, value, "an object")
        return name, {}
    if new is not None and old is not None:
        if not isinstance(old, dict):
            keys.wrong("rope_scaling", old, "an object")
        elif differing := _differing(new, old):
            keys.problems.append(
                f"rope_parameters and rope_scaling differ in {', '.join(map(str, differing))}"
            )
    return name, value


def _differing(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    """The keys that are not the same in both; the old form has its rope_theta elsewhere."""
    ours, theirs = _normalised(new), _normalised(old)
    theirs.setdefault("rope_theta", ours.get("rope_theta"))
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]


def _normalised(raw: dict[str, Any]) -> dict[str, Any]:
    """The parameters without what is null, the kind under its newer name."""
    given = {key: value for key, value in raw.items() if value is not None}
    kind = given.pop("type", None)
    if given.setdefault("rope_type", kind or "default") != kind and kind is not None:
        given["type"] = kind
    return given


def _theta(keys: Keys, inner: Keys) -> float:
    outside = keys.number("rope_theta", 10000.0)
    theta = inner.number("rope_theta", outside)
    if keys.get("rope_theta") is not None and theta != outside:
        inner.wrong("rope_theta", theta, f"the rope_theta beside it, {outside}")
    return theta


def _no_partial_rotary(keys: Keys, inner: Keys) -> None:
    for where in (keys, inner):
        if where.number("partial_rotary_factor", 1.0) != 1.0:
            where.wrong("partial_rotary_factor", where.get("partial_rotary_factor"), "1.0")


def _kind(inner: Keys) -> str | None:
    """The kind of scaling, "default" for none; None for one that is refused."""
    names = [inner.get(key) for key in ("rope_type", "type")]
    given = [name for name in names if name is not None] or ["default"]
    if any(name != given[0] for name in given):
        inner.wrong("rope_type", given[0], f"type, {given[1]!r}")
    kind = given[0]
    if type(kind) is not str or kind not in _KEYS:
        inner.wrong("rope_type", kind, " or ".join(_KEYS))
        return None
    return kind


def _original(keys: Keys, inner: Keys, longest: int) -> int:
    """The block size of the training; transformers prefers the key outside the object."""
    original = inner.size(_ORIGINAL, longest)
    outside = keys.size(_ORIGINAL, original)
    if inner.get(_ORIGINAL) is not None and outside != original:
        inner.wrong(_ORIGINAL, original, f"the one beside it, {outside}")
    return outside


def _scaling(inner: Keys, kind: str, longest: int, original: int) -> dict[str, Any]:
    values: dict[str, Any] = {"kind": kind}
    if kind == "yarn" or inner.get("factor") is not None:
        values["factor"] = inner.number("factor", longest / original)
    if kind != "linear":
        values["original_block_size"] = original
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            if inner.get(key) is None:
                inner.wrong(key, None, "a number")
        values["low_freq_factor"] = inner.number("low_freq_factor", 1.0)
        values["high_freq_factor"] = inner.number("high_freq_factor", 4.0)
    if kind == "yarn":
        values["beta_fast"] = inner.number("beta_fast", 32.0)
        values["beta_slow"] = inner.number("beta_slow", 1.0)
        values["attention_factor"] = _attention_factor(inner, values["factor"])
        inner.must_be("truncate", True)
    return values


def _attention_factor(inner: Keys, factor: float) -> float | None:
    """By what YaRN multiplies cosines and sines; None where it is 0.1 ln(factor) + 1.

    DeepSeek's two numbers make it a ratio, as in transformers.
    """
    given = inner.get("attention_factor")
    top, bottom = inner.get("mscale"), inner.get("mscale_all_dim")
    if given is not None:
        return inner.number("attention_factor", 1.0)
    if not top or not bottom:
        return None
    growth = 0.1 * math.log(max(factor, 1.0))
    top, bottom = inner.number("mscale", 1.0), inner.number("mscale_all_dim", 1.0)
    return (growth * top + 1.0) / (growth * bottom + 1.0)


def rope_keys(model: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json for the positions of `model`, in the new and the old form.

    Of kind dynamic, `max_position_embeddings` is the block size of the training, and how far the
    model reaches follows from it (see `dynamic_problem`).
    """
    scaling = model.rope_scaling
    keys: dict[str, Any] = {"max_position_embeddings": model.block_size}
    old: dict[str, Any] = {"rope_type": "default"}
    if scaling is not None:
        old = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "dynamic":
            keys["max_position_embeddings"] = scaling.original_block_size
        if scaling.kind in ("llama3", "yarn"):
            old[_ORIGINAL] = scaling.original_block_size
        names = _KEYS[scaling.kind]
        more = {key: getattr(scaling, key) for key in names if hasattr(scaling, key)}
        old |= {key: value for key, value in more.items() if value is not None}
        keys["rope_scaling"] = old
    keys["rope_theta"] = model.rope_theta
    keys["rope_parameters"] = {**old, "rope_theta": model.rope_theta}
    return keys


def dynamic_problem(model: ModelConfig) -> str | None:
    """Why no config.json can say this block_size of a dynamic scaling; None where one can."""
    scaling = model.rope_scaling
    if scaling is None or scaling.kind != "dynamic" or scaling.original_block_size is None:
        return None
    reach = math.floor(scaling.factor * scaling.original_block_size)
    if reach == model.block_size:
        return None
    return (
        f"rope_scaling dynamic reaches factor x original_block_size = {reach} tokens there,"
        f" not block_size {model.block_size}"
    )
