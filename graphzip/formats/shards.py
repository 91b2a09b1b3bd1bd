"""Folders of safetensors, in one file or in several with an index: read and written a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import safetensors
import safetensors.torch
import torch

from graphzip.errors import ArchiveError
from graphzip.mapped import MappedFiles

__all__ = ["SHARD", "Shards", "write_shards"]

SHARD: Final = 1 << 29
"""Bytes of tensors that a file gets at most, unless one tensor has more: what is held while it is written."""

_ONE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"


class Shards:
    """The tensors in the safetensors files of a folder. Nothing of a file stays mapped between two reads, unless they
    are read from files that are `mapped`.
    """

    def __init__(self, folder: Path, mapped: MappedFiles | None = None) -> None:
        """Raises `ArchiveError` where a file cannot be read, or two of them have a tensor of the same name."""
        self.files: dict[str, Path] = {}
        self._mapped = mapped
        self._views: dict[Path, dict[str, torch.Tensor]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safetensors.safe_open(file, framework="pt") as opened:
                    names = list(opened.keys())
            except (safetensors.SafetensorError, OSError) as error:
                raise ArchiveError(f"{file} cannot be read: {error}") from error
            for name in names:
                if name in self.files:
                    raise ArchiveError(
                        f"{file} and {self.files[name].name} both have {name!r}; leave the files of one copy there"
                    )
                self.files[name] = file

    def __call__(self, name: str) -> torch.Tensor:
        """The tensor of that name, read anew or mapped."""
        file = self.files[name]
        if self._mapped is not None:
            if file not in self._views:
                self._views[file] = self._mapped.tensors(file)
            return self._views[file][name]
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                value: torch.Tensor = opened.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise ArchiveError(f"{file}: {name!r} cannot be read: {error}") from error
        return value


def write_shards(
    folder: Path,
    names: Iterable[str],
    read: Callable[[str], torch.Tensor],
    most: int = SHARD,
) -> None:
    """Write the tensors that `read` gives into a folder, in files of at most `most` bytes (one tensor may have more)
    that are named and listed as `transformers` does.
    """
    parts: list[list[str]] = []
    total = filled = 0
    held: dict[str, torch.Tensor] = {}
    for name in names:
        value = read(name).detach().contiguous()
        if held and filled + value.nbytes > most:
            parts.append(_written(held, folder / f"{len(parts)}.part"))
            held, filled = {}, 0
        held[name] = value
        filled += value.nbytes
        total += value.nbytes
    parts.append(_written(held, folder / f"{len(parts)}.part"))
    files = (
        [_ONE] if len(parts) == 1 else [f"model-{n + 1:05}-of-{len(parts):05}.safetensors" for n in range(len(parts))]
    )
    for number, file in enumerate(files):
        (folder / f"{number}.part").rename(folder / file)
    if len(parts) > 1:
        where = {name: file for file, own in zip(files, parts, strict=True) for name in own}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _written(tensors: dict[str, torch.Tensor], file: Path) -> list[str]:
    """Write one file; the names in it."""
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return list(tensors)
