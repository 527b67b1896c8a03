"""Packages of the extra `clean`, loaded only by the filters that need them."""

import importlib
from types import ModuleType

from gptcli.errors import DataError


def load(module: str, package: str, needed_by: str) -> ModuleType:
    """The module, or a DataError that says which setting needs which package."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{needed_by} needs the package {package} ({error})",
            hint="pip install 'gptcli[clean]'",
        ) from error
