"""Packages that only some of graphzip needs."""

from __future__ import annotations

import importlib
from typing import Any

from graphzip.errors import MissingDependencyError

__all__ = ["require"]


def require(package: str) -> Any:
    """Import a package that only some of graphzip needs; `MissingDependencyError` gives the pip line."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        pip = package.replace("_", "-")
        raise MissingDependencyError(f"{package} is not installed; run: pip install {pip}") from error
