"""Packages of the extra `clean`, loaded only by the filters that need them."""

import contextlib
import importlib
from importlib import metadata
from types import ModuleType

from gptcli.errors import DataError


def versions() -> dict[str, str]:
    """Versions of the packages of the extra `clean` that are here: another one may clean another
    way, so what was made with it is made anew."""
    found = {}
    for package in ("datasketch", "phonenumbers", "py3langid", "python-stdnum", "stopwordsiso"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def load(module: str, package: str, needed_by: str) -> ModuleType:
    """The module, or a DataError that says which setting needs which package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{needed_by} needs the package {package} ({error})",
            hint="pip install 'gptcli[clean]'",
        ) from error
