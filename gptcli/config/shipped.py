"""Configs that come with the program: `configs/` of a checkout, `gptcli/shipped/` of a wheel."""

import re
from pathlib import Path


def shipped_names() -> list[str]:
    """Names of the shipped configs, sorted."""
    folder = _folder()
    return sorted(path.stem for path in folder.glob("*.yaml")) if folder else []


def shipped_config(name: str) -> Path | None:
    """The file of a shipped config (`small`), or None."""
    folder = _folder()
    if folder is None or not re.fullmatch(r"[\w-][\w.-]*", name):
        return None
    path = folder / f"{name}.yaml"
    return path if path.is_file() else None


def _folder() -> Path | None:
    package = Path(__file__).resolve().parent.parent
    # Packaged first: `configs` beside an installed package would be somebody else's.
    folders = (package / "shipped", package.parent / "configs")
    return next((folder for folder in folders if folder.is_dir()), None)
