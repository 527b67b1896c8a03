"""Whether the tensors of a file are those that a model needs, and bounds where no tensor tells."""

from collections.abc import Mapping

MAX_POSITION_NUMBERS = 2**28  # 1 GiB: a fixed position table is the one size no weight confirms
LISTED = 10  # names of a kind in an error; the others are counted

Shapes = Mapping[str, tuple[int, ...]]  # by name


def misfit(expected: Shapes, found: Shapes) -> str | None:
    """Which tensors are missing, unexpected and misshapen, all of them; None when none is."""
    lists = {
        "missing": [name for name in expected if name not in found],
        "unexpected": sorted(found.keys() - expected.keys()),
        "wrong shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != tuple(shape)
        ],
    }
    problems = [f"{what}: {listed(names)}" for what, names in lists.items() if names]
    return "; ".join(problems) or None


def listed(names: list[str], total: int = 0) -> str:
    """The first names, and how many more there are (of `total` where that is larger)."""
    hidden = max(len(names), total) - min(len(names), LISTED)
    return ", ".join(names[:LISTED]) + (f" and {hidden} more" if hidden else "")
