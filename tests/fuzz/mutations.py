"""Changes to files that are whole: of JSON and of tensors inside, of bytes, and of the file."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

from gptcli.runs.manifest import sealed

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.integers(-2, 2**70),
        st.floats(),
        st.text(max_size=9),
        st.sampled_from(["../../etc/passwd", "\x1b[2J", "F32", "BF16", "I8", [1, 2**62]]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool)
ODD = ("remove", "link", "directory", "pipe", "empty", "stray")
Change = Callable[[st.DrawFn, bytes], bytes]


def changed_json(draw: st.DrawFn, tree: Any) -> Any:
    """The tree with one of its values replaced, removed or added."""
    if not isinstance(tree, dict | list) or not tree:
        return draw(VALUES)
    node, key = draw(st.sampled_from([any_place, place_by_level]))(draw, tree)
    how = draw(st.sampled_from(["replace", "replace", "near", "remove", "add", "rename"]))
    number = isinstance(node[key], int | float) and not isinstance(node[key], bool)
    if how == "near" and number:
        node[key] = draw(st.sampled_from([node[key] + 1, node[key] - 1, -node[key], 0, 0.5]))
    elif how in ("replace", "near"):
        node[key] = draw(VALUES)
    elif how == "remove":
        del node[key]
    elif isinstance(node, dict):
        name = draw(st.one_of(st.text(max_size=9), st.just(f"module.{key}")))
        node[name] = node.pop(key) if how == "rename" else draw(VALUES)
    return tree


def any_place(draw: st.DrawFn, tree: Any) -> tuple[Any, Any]:
    """A container in the tree and a key of it: any of all, so rather one of a long list."""
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in keys_of(node):
            places.append((node, key))
            collect(node[key])

    collect(tree)
    return places[draw(st.integers(0, len(places) - 1))]


def place_by_level(draw: st.DrawFn, tree: Any) -> tuple[Any, Any]:
    """The same, but each key of a container is as likely as the others, however much it holds."""
    node = tree
    while True:
        key = draw(st.sampled_from(keys_of(node)))
        if not keys_of(node[key]) or draw(st.integers(0, 3)) == 0:
            return node, key
        node = node[key]


def keys_of(node: Any) -> list[Any]:
    """Keys or indices; none of what holds nothing."""
    if isinstance(node, dict):
        return list(node)
    return list(range(len(node))) if isinstance(node, list) else []


def changed_json_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """A JSON file that says something else."""
    return json.dumps(changed_json(draw, json.loads(data))).encode()


def changed_header(draw: st.DrawFn, data: bytes) -> bytes:
    """A safetensors file whose header says something else."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(changed_json(draw, json.loads(data[8 : 8 + size]))).encode()
    length = draw(st.sampled_from([len(header), len(header), 2**62, 0, len(header) - 1]))
    return length.to_bytes(8, "little") + header + data[8 + size :]


def changed_tensors(draw: st.DrawFn, data: bytes) -> bytes:
    """A whole safetensors file with a tensor of another dtype, shape, name or content."""
    tensors = load(data)
    name = draw(st.sampled_from(sorted(tensors)))
    other = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    how = draw(st.sampled_from(["dtype", "dtype", "shape", "shape", "values", "name"]))
    if how == "dtype":
        tensors[name] = tensor.to(draw(st.sampled_from(DTYPES)))
    elif how == "shape":
        tensors[name] = draw(st.sampled_from(reshaped(tensor))).contiguous().clone()
    elif how == "values" and tensor.numel() and tensor.is_floating_point():
        value = draw(st.sampled_from([float("nan"), float("inf"), 1e38, -1.0, 0.0]))
        flat = tensor.reshape(-1)
        flat[: draw(st.sampled_from([1, len(flat)]))] = value
    else:
        renamed = {
            "drop": lambda: tensors.pop(name),
            "swap": lambda: tensors.update({name: tensors[other], other: tensor}),
            "rename": lambda: tensors.update({f"module.{name}": tensors.pop(name)}),
            "more": lambda: tensors.update({f"{name}.more": tensor.clone()}),
        }
        renamed[draw(st.sampled_from(sorted(renamed)))]()
    if len(tensors) > 1 and tensors.get(name) is tensors.get(other) and name != other:
        tensors[name] = tensor.clone()
    return save(tensors, {"format": "pt"})


def reshaped(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensor in other shapes, with as many numbers and with others."""
    flat = tensor.reshape(-1)
    shapes = [flat, tensor[None], tensor[..., None], flat[:0], flat[: len(flat) // 2]]
    shapes += [torch.cat([flat, flat]), flat[:1].reshape(()) if len(flat) else flat]
    return [*shapes, *([tensor.T, tensor[:-1], tensor[:, 1:]] if tensor.dim() == 2 else [])]


def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Some bytes flipped, cut, inserted or doubled."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        how = draw(st.sampled_from(["flip", "truncate", "insert", "cut"]))
        if how == "flip" and changed:
            changed[place] ^= draw(st.integers(1, 255))
        elif how == "truncate":
            del changed[place:]
        elif how == "insert":
            changed[place:place] = draw(st.binary(max_size=9))
        else:
            del changed[place : place + draw(st.integers(1, 80))]
    return bytes(changed)


def changed_inside(draw: st.DrawFn, path: Path) -> bytes:
    """The file's content, changed in a way that only its reader can tell."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return changed_json_bytes(draw, data)
    if path.suffix == ".safetensors":
        change: Change = draw(st.sampled_from([changed_header, changed_tensors, changed_tensors]))
        return change(draw, data)
    return changed_bytes(draw, data)


def spoil(path: Path, how: str) -> None:
    """Make the file something else than a file, or let another one lie beside it."""
    if how == "stray":
        (path.parent / "more.json").write_text("{}")
        return
    path.unlink()
    if how == "link":
        path.symlink_to("/etc/passwd")
    elif how == "directory":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "empty":
        path.touch()


def reseal(directory: Path) -> None:
    """A manifest that agrees with what is there, as somebody who means it would write it."""
    path = directory / "manifest.json"
    if not path.is_file():  # to open a pipe would wait for ever
        return
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"]
        for name in list(files):
            if (directory / name).is_file():
                content = (directory / name).read_bytes()
                digest = hashlib.sha256(content).hexdigest()
                files[name] = {"bytes": len(content), "sha256": digest}
        path.write_text(json.dumps(sealed(manifest)))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return


@st.composite
def mutations(draw: st.DrawFn, names: list[str]) -> Callable[[Path], None]:
    """What to do to a checkpoint directory that has files of these names (globs)."""
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    hows = [draw(st.sampled_from(["inside"] * 7 + ["bytes"] * 2 + ["odd"])) for _ in chosen]
    odd = draw(st.sampled_from(ODD))
    seals = draw(st.integers(0, 9)) < 8
    choice = draw(st.data())

    def apply(directory: Path) -> None:
        for name, how in zip(chosen, hows, strict=True):
            path = min(directory.glob(name), key=str)
            if how == "odd":
                spoil(path, odd)
            elif how == "bytes":
                path.write_bytes(changed_bytes(choice.draw, path.read_bytes()))
            else:
                path.write_bytes(changed_inside(choice.draw, path))
        if seals:
            reseal(directory)

    return apply
